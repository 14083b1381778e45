"""``fsdp.accumulate``: gradients of microbatches as shards or whole are the same, and sums in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_dtensor.config.check import check
from moe_dtensor.config.load import override
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.data import Loader, build_corpus
from moe_dtensor.data.loader import Batch
from moe_dtensor.estimate.memory import rank_memory, settle_accumulate
from moe_dtensor.testing.ranks import run_on_ranks
from moe_dtensor.train.build import Trainer, build
from moe_dtensor.train.step import read_batch
from moe_dtensor.verify.miniature import Case, Layout
from moe_dtensor.verify.run import prove

Keys = dict[str, Any]
SMALL: Keys = {
    "model.num_layers": 2,
    "model.dim": 16,
    "model.num_heads": 4,
    "model.num_kv_heads": 1,
    "model.vocab_size": 257,
    "model.qk_norm": "head",
    "moe.num_experts": 4,
    "moe.hidden_dim": 8,
    "moe.router": "hash",
    "data.corpus": "random",
    "training.seq_len": 8,
    "training.microbatch_size": 1,
    "training.global_batch_size": 8,
    "checkpoint.enable": False,
}
WIDE: Keys = {f"training.{name}": "float64" for name in ("dtype", "param_dtype", "reduce_dtype")}


def small(layout: Layout, keys: Keys) -> Config:
    config = override(Config(), SMALL | {"mesh.dp": layout.dp, "mesh.pp": layout.pp, "mesh.tp": layout.tp} | keys)
    if layout.pp > 1:
        config = override(config, {"pipeline.schedule": layout.schedule, "model.num_layers": 4})
    return config


PROVEN = [
    (Layout(2, 1, 2), {}),
    (Layout(2, 2, 1, "1F1B"), {}),
]
MORE = [
    (Layout(2, 1, 2), {"mesh.sequence_parallel": False, "activation_checkpoint.mode": "full"}),
    (Layout(2, 2, 1, "ZBVZeroBubble"), {}),
    (Layout(2, 1, 2), {"mesh.experts": "dp"}),
    (Layout(2, 2, 1, "GPipe"), {}),
    (Layout(2, 2, 1, "Interleaved1F1B"), {}),
    (Layout(2, 2, 1, "InterleavedZeroBubble"), {}),
    (Layout(2, 2, 1, "DualPipeV"), {}),
    (Layout(2, 2, 2, "1F1B"), {"mesh.experts": "dp_tp"}),
]


def _prove(layouts: list[tuple[Layout, Keys]]) -> None:
    cases = [
        Case(layout, small(layout, WIDE | keys | {"fsdp.accumulate": "sharded", "moe.router": "topk"}))
        for layout, keys in layouts
    ]
    for case, verdict in zip(cases, prove(cases), strict=True):
        assert verdict.ok, f"{case.layout}: {verdict.worst} {verdict.failed()[:5]} {verdict.failure}"
        assert verdict.largest("gradient") < 1e-9


def test_sums_of_shards_are_the_oracles_gradients() -> None:
    _prove(PROVEN)


@pytest.mark.full
def test_sums_of_shards_on_more_meshes() -> None:
    _prove(MORE)


def start(keys: Keys) -> Trainer:
    ranks = torch.distributed.get_world_size()
    config = override(Config(), SMALL | keys)
    check(config, ranks)
    return build(resolve(config, ranks), torch.device("cpu"))


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    found = {}
    for name, param in trainer.parts[0].named_parameters():
        assert isinstance(param.grad, DTensor)
        assert param.grad.dtype == torch.float32, name
        found[name] = param.grad.full_tensor().double()
    return found


def _sums(dp: int, mode: str) -> tuple[dict[str, float], dict[str, float]]:
    """Computed in bfloat16: how far each gradient of all microbatches is from the exact sum of each one's own, and
    from what rounding that to bfloat16 would give."""
    trainer = start({"mesh.dp": dp, "mesh.tp": 2, "fsdp.accumulate": mode, "moe.router_bias": True})
    batch = read_batch(trainer, Loader(trainer.config, build_corpus(trainer.config)))
    exact: dict[str, Tensor] = {}
    for i in range(len(batch.tokens_BS)):
        one = Batch(*(None if x is None else x[i : i + 1] for x in vars(batch).values()))
        trainer.runner.step(one, torch.tensor(1.0))
        for name, value in gradients(trainer).items():
            exact[name] = exact.get(name, torch.zeros_like(value)) + value
        trainer.optimizers.zero_grad()
    trainer.runner.step(batch, torch.tensor(1.0))
    apart, rounded = {}, {}
    for name, value in gradients(trainer).items():
        size = exact[name].norm()
        apart[name] = float((value - exact[name]).norm() / size)
        rounded[name] = float((exact[name].bfloat16() - exact[name]).norm() / size)
    return apart, rounded


@pytest.mark.parametrize(("dp", "mode"), [(2, "whole"), (2, "sharded"), (1, "whole")])
def test_gradients_computed_in_bfloat16_add_up_in_float32(dp: int, mode: str) -> None:
    """Over microbatches, dp, and tp: what tp ranks hold alike (norms, router, a shared key/value head) too."""
    for apart, rounded in run_on_ranks(_sums, 2 * dp, dp, mode, timeout=600):
        assert {"layers.0.moe.router.weight", "layers.0.attention_norm.weight", "layers.0.attention.wk.weight"} <= set(
            apart
        )
        for name, error in apart.items():
            assert rounded[name] > 1e-4, name
            assert error < 1e-6, name


def _kept(mode: str) -> bool:
    """Whether whole gradients lie between the first microbatch and the second."""
    trainer = start({"mesh.dp": 2, "fsdp.accumulate": mode})
    part, found = trainer.parts[0], []

    def look(*unused: Any) -> None:
        groups = [m._get_fsdp_state()._fsdp_param_group for m in (part.layers["0"], part)]
        found.append(any(p.unsharded_accumulated_grad is not None for g in groups for p in g.fsdp_params))

    part.register_forward_pre_hook(look)
    trainer.runner.step(read_batch(trainer, Loader(trainer.config, build_corpus(trainer.config))), torch.tensor(1.0))
    assert found[0] is False
    return found[1]


def test_no_whole_gradient_lies_between_microbatches() -> None:
    assert run_on_ranks(_kept, 2, "sharded") == [False, False]
    assert run_on_ranks(_kept, 2, "whole") == [True, True]


def _fsdp_reduces() -> bool:
    """Whether a step goes through FSDP's reduction, which copies every gradient."""
    group, reduced = torch.distributed.fsdp._fully_shard._fsdp_param_group, []
    reduce = group.foreach_reduce
    group.foreach_reduce = lambda *args, **more: reduced.append(True) or reduce(*args, **more)
    trainer = start({})
    trainer.runner.step(read_batch(trainer, Loader(trainer.config, build_corpus(trainer.config))), torch.tensor(1.0))
    assert len(gradients(trainer)) == len(list(trainer.parts[0].parameters()))
    return bool(reduced)


@pytest.mark.parametrize(("ranks", "reduces"), [(1, False), (2, True)])
def test_a_rank_that_is_alone_copies_no_gradient(ranks: int, reduces: bool) -> None:
    assert run_on_ranks(_fsdp_reduces, ranks) == [reduces] * ranks


def _resolved(keys: Keys) -> Config:
    config = override(Config(), SMALL | {"mesh.dp": 4} | keys)
    check(config, 4)
    return resolve(config, 4)


def test_auto_goes_by_memory() -> None:
    whole, sharded = (_resolved({"fsdp.accumulate": mode}) for mode in ("whole", "sharded"))
    most, least = (rank_memory(config, 0) for config in (whole, sharded))
    assert least.gradients * 4 == most.gradients
    between = (most.peak + least.peak) / 2 / 2**30
    for memory, mode in ((between, "sharded"), (most.peak / 2**30, "whole")):
        auto = _resolved({"fsdp.accumulate": "auto", "mesh.device_memory": memory})
        assert settle_accumulate(auto).fsdp.accumulate == mode
        assert rank_memory(auto, 0) == (least if mode == "sharded" else most)


@pytest.mark.parametrize("keys", [{"training.global_batch_size": 4}, {"mesh.dp": 1, "mesh.tp": 4}])
def test_where_nothing_is_saved_sharded_is_whole(keys: Keys) -> None:
    """A single microbatch, and a single dp rank."""
    assert settle_accumulate(_resolved(keys | {"fsdp.accumulate": "sharded"})).fsdp.accumulate == "whole"
