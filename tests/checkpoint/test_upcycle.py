"""A dense model as a mixture: the same function where theory says so, and what each option does where it does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe_dtensor.checkpoint.change import deviation, feed_forward_output
from moe_dtensor.checkpoint.upcycle import Upcycling, redrawn_units, upcycled, upcycled_config, upcycled_shapes
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.load import override
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.model.initial import init_weights
from moe_dtensor.model.transformer import Transformer

DENSE = resolve(
    override(
        Config(),
        {
            "model.num_layers": 3,
            "model.dim": 24,
            "model.num_heads": 2,
            "model.hidden_dim": 40,
            "model.vocab_size": 61,
            "moe.num_experts": 0,
            "training.seq_len": 12,
        },
    ),
    1,
)


def dense(config: Config = DENSE) -> Transformer:
    model = Transformer(config, range(config.model.num_layers)).double()
    init_weights(model, override(config, {"model.init_std": 0.2}))
    return model.eval()


def mixture(how: Upcycling, parent: Config = DENSE) -> tuple[Transformer, Transformer]:
    """The dense model, and the mixture that is made of it by name."""
    before = dense(parent)
    values = dict(before.state_dict())
    config = upcycled_config(parent, how)
    shapes = upcycled_shapes({name: tuple(value.shape) for name, value in values.items()}, config)
    made = {name: upcycled(name, values.__getitem__, config, how) for name in shapes}
    assert {name: tuple(value.shape) for name, value in made.items()} == {n: shape for n, (shape, _) in shapes.items()}
    after = Transformer(config, range(config.model.num_layers)).double().eval()
    after.load_state_dict(made)
    return before, after


def difference(before: Callable[..., Tensor], after: Callable[..., Tensor]) -> float:
    tokens = torch.randint(0, 61, (4, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        old, new = before(tokens), after(tokens)
    return float((new - old).abs().max() / old.abs().max())


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize(
    "how",
    [
        Upcycling(8, 2),
        Upcycling(8, 4, split=2),
        Upcycling(20, 5, split=5),
        Upcycling(8, 2, layers=(0, 2)),
    ],
    ids=["copies", "halves", "fifths", "some blocks"],
)
def test_the_mixture_is_the_dense_model(how: Upcycling, activation: str) -> None:
    assert how.exact
    parent = override(DENSE, {"model.activation": activation})
    before, after = mixture(how, parent)
    assert difference(before, after) < 1e-14
    assert len(after.moe_layers) == len(how.layers or range(3))
    # Not because one expert is all there is: tokens go to several copies.
    after.train()
    after(torch.randint(0, 61, (4, 12)))
    record_LR = after.take_record()
    assert record_LR is not None
    assert (record_LR[:, : how.num_experts] > 0).sum(1).min() > how.top_k


def test_unnormalised_gates_are_near_and_said_not_to_be_exact() -> None:
    how = Upcycling(8, 2, normalize=False, router_std=0.02)
    assert not how.exact
    assert 1e-6 < difference(*mixture(how)) < 0.3
    nearer = difference(*mixture(Upcycling(8, 2, normalize=False, router_std=0.0002)))
    assert nearer < difference(*mixture(how)) / 20


def test_half_a_copy_is_not_the_whole() -> None:
    how = Upcycling(8, 3, split=2)
    assert not how.exact
    assert difference(*mixture(how)) > 1e-3


def test_noise_leaves_the_first_copies_alone() -> None:
    before, after = mixture(Upcycling(8, 2, noise=0.1, noise_share=0.5))
    down = before.state_dict()["layers.1.feed_forward.down.weight"]
    experts = after.state_dict()["layers.1.moe.experts.w_down"]
    same = [torch.equal(expert, down) for expert in experts]
    assert same == [True] * 4 + [False] * 4
    added = (experts[4:] - down).std() / down.std()
    assert float(added) == pytest.approx(0.1, rel=0.1)


def test_drop_upcycling_draws_whole_hidden_units_anew() -> None:
    how = Upcycling(4, 2, reinit=0.25)
    before, after = mixture(how)
    old, new = before.state_dict(), after.state_dict()
    for e in range(4):
        units = redrawn_units(40, 1, e, how)
        assert len(units) == 10
        down_kept = (new["layers.1.moe.experts.w_down"][e] == old["layers.1.feed_forward.down.weight"]).all(0)
        up_kept = (new["layers.1.moe.experts.w_up"][e, 1] == old["layers.1.feed_forward.up.weight"]).all(1)
        assert (~down_kept).nonzero().flatten().tolist() == (~up_kept).nonzero().flatten().tolist() == units.tolist()
    assert len({tuple(redrawn_units(40, 1, e, how).tolist()) for e in range(4)}) == 4
    drawn = new["layers.1.moe.experts.w_up"] - old["layers.1.feed_forward.up.weight"]
    assert drawn.abs().sum() > 0
    assert float(new["layers.1.moe.experts.w_up"].std()) == pytest.approx(
        float(old["layers.1.feed_forward.up.weight"].std()), rel=0.1
    )


def test_the_deviation_that_is_told() -> None:
    """Of one block, on random tokens: rounding where the function is kept, and of the size of what was done to it."""
    found = {}
    for key, how in {"exact": Upcycling(8, 4, split=2), "noise": Upcycling(8, 4, split=2, noise=0.1)}.items():
        before, after = (model.state_dict() for model in mixture(how))
        config = upcycled_config(DENSE, how)
        old, new = (
            {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
            for values, prefix in ((before, "layers.1.feed_forward."), (after, "layers.1.moe."))
        )
        found[key] = deviation(
            lambda x, old=old: feed_forward_output(DENSE, 1, old, None, x),
            lambda x, new=new, config=config: feed_forward_output(config, 1, new, None, x),
            24,
        )
    assert found["exact"] < 1e-15
    assert 0.03 < found["noise"] < 0.3


@pytest.mark.parametrize(
    ("how", "rule"),
    [
        (Upcycling(8, 2, split=3), "does not divide model.hidden_dim = 40"),
        (Upcycling(9, 2, split=2), "not a multiple of --upcycle-split 2"),
        (Upcycling(8, 9), "no number from 1 to"),
        (Upcycling(8, 1), "the router learns nothing"),
        (Upcycling(8, 2, layers=(3,)), "blocks 0 to 2"),
        (Upcycling(8, 2, reinit=1.5), "shares from 0 to 1"),
    ],
)
def test_refused(how: Upcycling, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        upcycled_config(DENSE, how)
