"""Blocks on tp ranks with the kernels of heads against the same blocks without: CPU ranks, kernels interpreted.

What the blocks give without is proven by ``verify``.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_dtensor.config.load import override
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.estimate import saved_tensors as estimate
from moe_dtensor.estimate.sizes import tokens
from moe_dtensor.kernels.library import triton_kernels
from moe_dtensor.layers import attention
from moe_dtensor.layers.block import Block
from moe_dtensor.layers.positions import build_positions
from moe_dtensor.mesh import build_mesh
from moe_dtensor.model.transformer import Transformer
from moe_dtensor.parallel.apply import apply_compile, apply_recompute
from moe_dtensor.parallel.pipeline import stream_shape
from moe_dtensor.parallel.tensor import install_collectives, shard_parameters
from moe_dtensor.testing.ranks import run_on_ranks

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="CPU ranks interpret kernels")

Keys = dict[str, Any]
Results = dict[str, Tensor]
LENGTH = 12
SMALL: Keys = {
    "model.dim": 16,
    "model.num_layers": 1,
    "model.num_heads": 4,
    "model.head_dim": 6,
    "model.vocab_size": 64,
    "moe.num_experts": 0,
    "model.hidden_dim": 16,
    "training.seq_len": LENGTH,
    "training.microbatch_size": 3,
    "training.param_dtype": "float32",
}
WHOLE: Keys = {"mesh.sequence_parallel": False}
SEQUENCES: Keys = {"training.microbatch_size": 4}
"""Of which ranks hold whole ones; else they hold parts."""
FULL: Keys = {"model.qk_norm": "full"}
HEAD: Keys = {"model.qk_norm": "head"}
SELECTIVE: Keys = {"activation_checkpoint.mode": "selective"}
COMPILED: Keys = {"compile.enable": True}
ON_2: list[Keys] = [
    FULL,
    {**FULL, **WHOLE},
    {**FULL, "model.num_kv_heads": 2, **SELECTIVE},
    {**FULL, "model.num_kv_heads": 1, **WHOLE},
    {**FULL, "model.num_kv_heads": 2, **COMPILED},
    {**FULL, "model.num_kv_heads": 2, **SEQUENCES},
    {**HEAD, **SEQUENCES, **COMPILED},
    HEAD,
    {**HEAD, "model.num_kv_heads": 1, **SELECTIVE},
    {**HEAD, **COMPILED},
    {},
]
ON_4: list[Keys] = [
    {**FULL, "model.num_kv_heads": 2},
    {**HEAD, "model.num_kv_heads": 2},
    {**FULL, "model.num_kv_heads": 2, **SEQUENCES},
]
KERNELS = {
    "heads": ("norm_and_rotate", "norm_and_rotate_backward"),
    "heads_parts": ("squares_of_heads", "backward_sums", "backward_given"),
}


def _config(keys: Keys, ranks: int) -> Config:
    return resolve(override(Config(), SMALL | keys | {"mesh.dp": 1, "mesh.pp": 1, "mesh.tp": ranks}), ranks)


def _block(config: Config) -> Block:
    """Split over tp, with weights by chance that are the same on all ranks."""
    mesh = build_mesh(config, torch.device("cpu"))
    part = Transformer(config, range(1), first=True, last=True)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in part.parameters():
            weight.normal_()
    shard_parameters(part, config, mesh)
    install_collectives(part, config, mesh)
    apply_recompute(part, config)
    apply_compile(part, config, mesh["tp"])
    return part.layers["0"]


def _results(block: Block, config: Config) -> Results:
    """Output and gradients, from what is the same at each call; bytes that were kept for the backward pass."""
    torch.manual_seed(1 + torch.distributed.get_rank() if config.mesh.sequence_parallel else 1)
    held, whole = stream_shape(config), (config.training.microbatch_size, LENGTH)
    x_BSD, dy_BSD = torch.randn(2, *held)
    # Sequences have their own positions, so that a token in another's place is seen.
    positions_BS = torch.arange(whole[0] * LENGTH).view(whole)
    make = {"dtype": torch.float32, "device": torch.device("cpu")}
    positions = build_positions(config, range(1), whole, positions_BS, None, **make)
    x_BSD.requires_grad_()
    block.zero_grad()
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.to_local().untyped_storage() if isinstance(x, DTensor) else x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        y_BSD, _ = block(x_BSD, positions, torch.zeros(held[:2], dtype=torch.int64))
    y_BSD.backward(dy_BSD)
    of_weights = {name: weight.grad.to_local() for name, weight in block.named_parameters()}
    return {"y": y_BSD.detach(), "x": x_BSD.grad, "kept": torch.tensor(sum(kept.values()))} | of_weights


def _run(cases: list[Keys]) -> list[tuple[Results, Results, Counter[str]]]:
    """With kernels, without, and how often each kernel ran."""
    torch.compile = functools.partial(
        torch.compile, backend="aot_eager_decomp_partition"
    )  # this process ends with the function
    found = []
    for keys in cases:
        config = _config(keys, torch.distributed.get_world_size())
        block = _block(config)
        ran: Counter[str] = Counter()
        with pytest.MonkeyPatch.context() as patch:
            for module, names in KERNELS.items():
                for name in names:
                    _count(triton_kernels(module), name, ran, patch)
            with_kernels = _results(block, config)
        torch.compiler.reset()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "takes", lambda *_: False)
            found.append((with_kernels, _results(block, config), ran))
        torch.compiler.reset()
    return found


def _count(module: ModuleType, name: str, ran: Counter[str], patch: pytest.MonkeyPatch) -> None:
    kernel = getattr(module, name)

    def counted(*args: Any) -> Any:
        ran[name] += 1
        return kernel(*args)

    patch.setattr(module, name, counted)


def _planned(config: Config) -> int:
    """What attention is planned to keep."""
    return estimate.attention_bytes(config, tokens(config), 0)


@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize(("ranks", "cases"), [(2, ON_2), (4, ON_4)])
def test_equals_blocks_without_kernels(ranks: int, cases: list[Keys], monkeypatch: pytest.MonkeyPatch) -> None:
    for results in run_on_ranks(_run, ranks, cases, timeout=300):
        for keys, (got, expected, ran) in zip(cases, results, strict=True):
            backward = KERNELS["heads_parts"] if FULL.items() <= keys.items() else ("norm_and_rotate_backward",)
            assert set(ran) == {"norm_and_rotate", *backward}, keys
            assert ran["norm_and_rotate"] == (4 if SELECTIVE.items() <= keys.items() else 2), f"{keys}: recomputed"
            assert got.keys() == expected.keys()
            more = expected.pop("kept") - got.pop("kept")
            if COMPILED.items() <= keys.items():
                config = _config(keys, ranks)
                with_kernels = _planned(config)
                with monkeypatch.context() as patch:
                    patch.setattr(estimate, "has_kernel", lambda *_: False)
                    assert more == _planned(config) - with_kernels, f"{keys}: kept"
            for name in got:
                error = (got[name] - expected[name]).abs().max() / expected[name].abs().max()
                assert error < 1e-5, f"{keys}: {name}"
