"""Weight decay where it belongs, updates equal to plain AdamW, states free of the mesh."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from moe_dtensor.config.schema import Config, Optimizer
from moe_dtensor.testing.ranks import run_on_ranks
from moe_dtensor.train import optimizer
from moe_dtensor.train.optimizer import Optimizers, is_decayed

CONFIG = Config(optimizer=Optimizer(lr=0.01, weight_decay=0.5))


@pytest.mark.parametrize(
    ("name", "shape", "decayed"),
    [
        ("tok_embeddings.weight", (64, 8), False),
        ("output.weight", (64, 8), True),
        ("norm.weight", (8,), False),
        ("layers.0.attention_norm.weight", (8,), False),
        ("layers.0.attention.q_norm.weight", (8,), False),
        ("layers.0.attention.wq.weight", (8, 8), True),
        ("layers.0.moe.router.weight", (4, 8), False),
        ("layers.0._checkpoint_wrapped_module.moe.router.weight", (4, 8), False),
        ("layers.0.moe.experts.w_up", (4, 2, 6, 8), True),
        ("layers.0.moe.shared.down.weight", (8, 6), True),
    ],
)
def test_what_is_decayed(name: str, shape: tuple[int, ...], decayed: bool) -> None:
    assert is_decayed(name, torch.empty(shape, device="meta")) == decayed


class Part(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.tok_embeddings = nn.Embedding(6, 4, dtype=dtype)
        self.wq = nn.Linear(4, 8, bias=False, dtype=dtype)
        self.norm = nn.RMSNorm(4, dtype=dtype)
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype))


def gradient(parameter: torch.Tensor, seed: int) -> torch.Tensor:
    full = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed), dtype=parameter.dtype)
    if isinstance(parameter, DTensor):
        return distribute_tensor(full, parameter.device_mesh, parameter.placements)
    return full


def adamw_by_hand(dtype: torch.dtype, steps: int) -> dict[str, torch.Tensor]:
    """Loshchilov & Hutter, algorithm 2."""
    part, options = Part(dtype), CONFIG.optimizer
    result = {}
    for seed, (name, parameter) in enumerate(part.named_parameters()):
        p, m, v = parameter.detach().clone(), 0.0, 0.0
        for step in range(1, steps + 1):
            g = gradient(parameter, 10 * step + seed)
            m = options.beta1 * m + (1 - options.beta1) * g
            v = options.beta2 * v + (1 - options.beta2) * g * g
            decay = options.weight_decay if name == "wq.weight" else 0.0
            m_hat, v_hat = m / (1 - options.beta1**step), v / (1 - options.beta2**step)
            p = p - options.lr * decay * p - options.lr * m_hat / (v_hat.sqrt() + options.eps)
        result[name] = p
    return result


def train(part: nn.Module, steps: int) -> dict[str, np.ndarray]:
    optimizers = Optimizers([part], CONFIG)
    for step in range(1, steps + 1):
        for seed, parameter in enumerate(part.parameters()):
            parameter.grad = gradient(parameter, 10 * step + seed)
        optimizers.step()
        optimizers.zero_grad()
        assert all(parameter.grad is None for parameter in part.parameters())
    full = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in part.named_parameters()}
    return {name: tensor.detach().numpy() for name, tensor in full.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plain_parameters(dtype: torch.dtype) -> None:
    got = train(Part(dtype), 4)
    for name, want in adamw_by_hand(dtype, 4).items():
        torch.testing.assert_close(torch.from_numpy(got[name]), want)


def train_sharded(dtype: torch.dtype) -> dict[str, np.ndarray]:
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("dp", "pp", "tp"))
    part = Part(dtype)
    for name, module in part.named_children():
        placement = Shard(0) if name == "wq" else Replicate()
        module.weight = nn.Parameter(distribute_tensor(module.weight.data, mesh["tp"], [placement]))
    # Embedding and wq have 4 columns over 2 ranks, the norm 4 entries.
    fully_shard(part, mesh=mesh["dp"], shard_placement_fn=lambda p: Shard(p.ndim - 1))
    return train(part, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sharded_parameters(dtype: torch.dtype) -> None:
    want = adamw_by_hand(dtype, 4)
    for got in run_on_ranks(train_sharded, 4, dtype):
        for name, value in want.items():
            torch.testing.assert_close(torch.from_numpy(got[name]), value)


def test_state_keys_name_parameters_only() -> None:
    state = Optimizers([Part(torch.float32)], CONFIG).state_dict()
    assert set(state) == {
        f"state.{name}.{kind}"
        for name in ("tok_embeddings.weight", "wq.weight", "norm.weight")
        for kind in ("step", "exp_avg", "exp_avg_sq")
    }


def test_zero_eps_survives_saving() -> None:
    """torch's own way to make a missing state divides 0 by 0 and leaves NaN weights when eps is 0."""
    part = Part(torch.float32)
    before = part.wq.weight.detach().clone()
    optimizers = Optimizers([part], Config(optimizer=Optimizer(eps=0.0)))
    optimizers.load_state_dict(optimizers.state_dict())
    assert torch.equal(part.wq.weight, before)


def _updated(training: str, state: str, steps: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    config = replace(
        CONFIG,
        optimizer=replace(CONFIG.optimizer, state_dtype=state),
        training=replace(CONFIG.training, dtype=training),
    )
    part = Part(getattr(torch, training))
    optimizers = Optimizers([part], config)
    for step in range(steps):
        for seed, parameter in enumerate(part.parameters()):
            parameter.grad = gradient(parameter, 100 * step + seed)
        optimizers.step()
    return {name: p.detach() for name, p in part.named_parameters()}, optimizers.state_dict()


def test_moments_in_bfloat16_are_rounded_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step from zero moments is the exact one; many steps stay within bfloat16's digits. In several pieces too."""
    monkeypatch.setattr(optimizer, "PIECE", 5)
    exact, _ = _updated("float32", "auto", 1)
    narrow, state = _updated("float32", "bfloat16", 1)
    assert all(torch.equal(exact[name], narrow[name]) for name in exact)
    moments = [value for key, value in state.items() if "exp_avg" in key]
    assert len(moments) == 6
    assert {value.dtype for value in moments} == {torch.bfloat16}
    assert {float(value) for key, value in state.items() if key.endswith("step")} == {1.0}
    (exact, _), (narrow, _) = _updated("float32", "auto", 20), _updated("float32", "bfloat16", 20)
    for name in exact:
        assert 0 < (exact[name] - narrow[name]).abs().max() < 2**-7 * 20 * CONFIG.optimizer.lr


def test_weights_in_bfloat16_may_have_moments_in_float32() -> None:
    _, state = _updated("bfloat16", "float32", 3)
    assert {value.dtype for key, value in state.items() if "exp_avg" in key} == {torch.float32}


def test_a_loaded_state_keeps_the_dtype_that_is_asked_for() -> None:
    for saved, wanted in (("auto", "bfloat16"), ("bfloat16", "float32")):
        _, state = _updated("float32", saved, 3)
        config = replace(CONFIG, optimizer=replace(CONFIG.optimizer, state_dtype=wanted))
        optimizers = Optimizers([Part(torch.float32)], config)
        optimizers.load_state_dict(state)
        loaded = optimizers.state_dict()
        for key in (key for key in state if "exp_avg" in key):
            assert loaded[key].dtype == getattr(torch, wanted)
            assert torch.equal(loaded[key].float(), state[key].to(getattr(torch, wanted)).float())
