"""The model on one device: documents, splits, initial values."""

from __future__ import annotations

import pytest
import torch

from moe_dtensor.config.load import override
from moe_dtensor.config.resolve import resolve, stage_layers
from moe_dtensor.config.schema import Config
from moe_dtensor.data.loader import build_batch
from moe_dtensor.layers.router import STATISTICS
from moe_dtensor.mesh import build_mesh
from moe_dtensor.model.initial import init_weights
from moe_dtensor.model.transformer import Transformer
from moe_dtensor.parallel.apply import build_parts
from moe_dtensor.testing.ranks import run_on_ranks

SMALL = {
    "model.dim": 32,
    "model.num_layers": 3,
    "model.num_heads": 4,
    "model.vocab_size": 61,
    "moe.num_experts": 4,
    "moe.hidden_dim": 16,
    "moe.every": 2,
    "moe.router": "topk",
    "training.seq_len": 12,
    "training.dtype": "float64",
    "training.param_dtype": "float64",
    "training.reduce_dtype": "float64",
}


def small(**keys: object) -> Config:
    return resolve(override(Config(), SMALL | {key.replace("__", "."): value for key, value in keys.items()}), 1)


def build(config: Config, layers: range | None = None, first: bool = True, last: bool = True) -> Transformer:
    model = Transformer(config, range(config.model.num_layers) if layers is None else layers, first, last).double()
    init_weights(model, config)
    return model


def test_a_document_in_a_sequence_is_as_if_alone() -> None:
    """With the mask, a document's losses do not depend on what stands before it in the window."""
    end = 60
    model = build(small(training__seq_len=12))
    alone = build(small(training__seq_len=6))
    document = torch.randint(0, end, (6,))
    window = torch.cat([torch.randint(0, end, (5,)), torch.tensor([end]), document, torch.tensor([end])])
    batch = build_batch(window[None].numpy(), end)
    x = model(batch.tokens_BS, None, batch.positions_BS, batch.documents_BS)
    torch.testing.assert_close(x[:, 6:], alone(document[None]))


def test_parts_make_the_whole() -> None:
    config = small(mesh__pp=3)
    whole = build(config)
    tokens, labels = torch.randint(0, 61, (2, 2, 12)).unbind()
    x = tokens
    for stage in range(3):
        x = build(config, stage_layers(config, stage), stage == 0, stage == 2)(x, labels, tokens_BS=tokens)
    assert torch.equal(x, whole(tokens, labels))


def test_a_token_sees_no_later_token() -> None:
    model = build(small())
    tokens = torch.randint(0, 61, (1, 12))
    changed = tokens.clone()
    changed[0, 8:] += 1
    changed %= 61
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :8], after[:, :8])
    assert (before[:, 8:] - after[:, 8:]).abs().max() > 1e-3


def test_load_counts_every_copy_once_in_training_and_never_in_evaluation() -> None:
    model = build(small(activation_checkpoint__mode="full"))
    tokens = torch.randint(0, 61, (2, 12))
    model(tokens)
    model(tokens)
    record = model.take_record()
    assert record is not None
    assert record.shape == (1, 4 + len(STATISTICS))
    assert record[:, :4].sum() == 2 * 2 * 12 * 2
    model.eval()
    model(tokens)
    assert model.take_record() is None


def _initial(overrides: dict[str, object]) -> dict[str, torch.Tensor]:
    config = resolve(override(Config(), SMALL | overrides), torch.distributed.get_world_size())
    parts = build_parts(config, build_mesh(config, torch.device("cpu")), torch.device("cpu"))
    return {name: param.full_tensor() for part in parts for name, param in part.named_parameters()}


@pytest.mark.parametrize("mesh", [(2, 1, 2), (1, 2, 2), (1, 3, 1)])
def test_initial_values_do_not_depend_on_the_mesh(mesh: tuple[int, int, int]) -> None:
    dp, pp, tp = mesh
    keys = {"mesh.dp": dp, "mesh.pp": pp, "mesh.tp": tp, "model.qk_norm": "full"}
    ranks = run_on_ranks(_initial, dp * pp * tp, keys)
    expected = dict(build(small(model__qk_norm="full")).named_parameters())
    assert {name for rank in ranks for name in rank} == set(expected)
    for rank in ranks:
        for name, value in rank.items():
            assert torch.equal(value, expected[name]), name
    assert expected["layers.0.feed_forward.up.weight"].std().item() == pytest.approx(0.02, rel=0.1)
