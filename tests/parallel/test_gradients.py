"""Gradients are summed, and their norm taken, in the dtype that was asked for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_dtensor.config.load import override
from moe_dtensor.config.schema import Config
from moe_dtensor.parallel.gradients import global_norm
from moe_dtensor.testing.ranks import run_on_ranks
from moe_dtensor.train.build import build
from moe_dtensor.verify.inputs import global_batch, initial_values
from moe_dtensor.verify.miniature import Layout
from moe_dtensor.verify.subject import full, load_parameters, own_share

CPU = torch.device("cpu")
CONFIG = override(
    Config(),
    {
        "model.num_layers": 1,
        "model.dim": 32,
        "model.num_heads": 4,
        "model.num_kv_heads": 1,
        "model.vocab_size": 61,
        "moe.num_experts": 4,
        "moe.hidden_dim": 16,
        "data.corpus": "random",
        "training.seq_len": 16,
        "training.microbatch_size": 2,
        "training.global_batch_size": 2,
        "checkpoint.enable": False,
    },
)


def share_beyond_bfloat16(config: Config) -> dict[str, float]:
    """Of the entries of each gradient, how many bfloat16 cannot hold."""
    trainer = build(config, CPU)
    load_parameters(trainer, initial_values(config))
    trainer.runner.step(own_share(trainer, global_batch(config)), torch.ones(()))
    grads = {name: full(p.grad) for name, p in trainer.parts[0].named_parameters() if p.grad is not None}
    return {name: float((grad != grad.bfloat16().float()).double().mean()) for name, grad in grads.items()}


def test_with_one_microbatch_shares_over_tp_are_summed_in_reduce_dtype() -> None:
    """They were summed in param_dtype: router, norms and repeated keys and values came out rounded to bfloat16."""
    for beyond in run_on_ranks(share_beyond_bfloat16, 2, Layout(1, 1, 2).place(CONFIG)):
        summed = [n for n in beyond if "router" in n or "norm" in n or ".wk." in n or ".wv." in n]
        assert len(summed) == 6
        assert all(beyond[name] > 0.3 for name in summed), beyond


class Whole(nn.Module):
    """Gradients that no other rank holds."""

    def __init__(self, values: list[Tensor]) -> None:
        super().__init__()
        self.values = nn.ParameterList(values)
        for value in self.values:
            value.grad = value.detach().clone()


def norm_of_bfloat16(norm_type: float) -> tuple[Any, float]:
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    values = [torch.randn(1000, generator=generator).bfloat16() for _ in range(50)]
    found = global_norm([Whole(values)], norm_type, CPU)
    exact = torch.cat(values).double()
    return (found.dtype, float(found)), float(exact.abs().max() if math.isinf(norm_type) else exact.square().sum())


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_the_norm_of_bfloat16_gradients_is_taken_in_float32(norm_type: float) -> None:
    """It was squared, summed and reduced in bfloat16; 4,096 ranks' shares stopped growing at 0.31 of the truth."""
    results = run_on_ranks(norm_of_bfloat16, 4, norm_type)
    parts = [own for _, own in results]
    expected = max(parts) if math.isinf(norm_type) else math.sqrt(sum(parts))
    for (dtype, found), _ in results:
        assert dtype == torch.float32
        assert found == pytest.approx(expected, rel=1e-6)
