"""Write a step file of torchtitan's Qwen3-MoE on two tp ranks of the CPU:
python scripts/step_file_torchtitan.py OUT.json [--mended]."""

from __future__ import annotations

import argparse
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, distribute_tensor
from torchtitan.distributed import NoParallel
from torchtitan.models.attention import ScaledDotProductAttentionWrapper
from torchtitan.models.llama4.infra.parallelize import apply_moe_ep_tp
from torchtitan.models.moe import MoEArgs
from torchtitan.models.qwen3.infra.parallelize import apply_non_moe_tp
from torchtitan.models.qwen3.model.args import Qwen3ModelArgs
from torchtitan.models.qwen3.model.model import Qwen3Model

from moe_dtensor.testing.ranks import run_on_ranks
from moe_dtensor.verify.step_file import Name, write_step_file

E, K, HIDDEN, D, HEADS, HEAD, VOCAB, LAYERS = 8, 2, 16, 32, 4, 8, 64, 2
TP = 2


def build() -> Qwen3Model:
    """The model on one device, with weights that hide nothing."""
    torch.manual_seed(0)
    moe = MoEArgs(
        num_experts=E,
        num_shared_experts=0,
        score_func="softmax",
        route_norm=True,
        top_k=K,
        score_before_experts=False,
        use_grouped_mm=False,
        load_balance_coeff=None,
    )
    args = Qwen3ModelArgs(
        dim=D,
        n_layers=LAYERS,
        n_heads=HEADS,
        n_kv_heads=2,
        vocab_size=VOCAB,
        head_dim=HEAD,
        hidden_dim=24,
        norm_eps=1e-6,
        rope_theta=1e6,
        max_seq_len=12,
        moe_enabled=True,
        moe_inter_dim=HIDDEN,
        moe_args=moe,
    )
    model = Qwen3Model(args)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.2)
    return model


def attend(_self: Any, q: DTensor, k: DTensor, v: DTensor, **options: Any) -> DTensor:
    """Attention of the heads at hand: torch 2.13 has no rule for that of DTensors on CPUs."""
    mine = F.scaled_dot_product_attention(*(x.to_local() for x in (q, k, v)), **{"is_causal": True, **options})
    return DTensor.from_local(mine, q.device_mesh, q.placements, run_check=False)


def count(x: Tensor, histc: Any = torch.histc, **options: Any) -> Tensor:
    """``torch.histc`` of integers, which CPUs lack."""
    return histc(x.float(), **options).to(x.dtype)


def gradients(tokens: Tensor, labels: Tensor, mended: bool) -> tuple[float, dict[str, bytes]]:
    """On each tp rank: the loss, and every whole gradient as this rank has it."""

    def summed(_layout: Any, _local: bool, _module: Any, outputs: DTensor, _mesh: Any) -> Tensor:
        # Experts are split: what comes back to the gate is a share.
        return outputs.to_local(grad_placements=(Partial(),))

    model, mesh = build(), init_device_mesh("cpu", (TP,), mesh_dim_names=("tp",))
    right = NoParallel._prepare_output_fn
    with (
        mock.patch.object(NoParallel, "_prepare_output_fn", staticmethod(summed if mended else right)),
        mock.patch.object(ScaledDotProductAttentionWrapper, "forward", attend),
        mock.patch.object(torch, "histc", count),
    ):
        apply_non_moe_tp(
            model, mesh, loss_parallel=False, enable_float8_tensorwise_tp=False, enable_async_tp=False, cp_enabled=False
        )
        apply_moe_ep_tp(model, tp_mesh=mesh, ep_mesh=None, etp_mesh=None, ep_etp_mesh=None)
        for module in model.modules():
            # What no plan names is alike on all ranks.
            for name, p in list(module._parameters.items()):
                if p is not None and not isinstance(p, DTensor):
                    module._parameters[name] = torch.nn.Parameter(distribute_tensor(p.data, mesh))
        logits = model(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        loss.backward()
    found = {}
    for name, p in model.named_parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        found[name] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()
    return float(loss.detach()), found


def export(path: Path, mended: bool = False) -> None:
    """Gradients of one step, as the first rank has them.

    Args:
        path: of the JSON.
        mended: sum the gate's gradient over tp, as torchtitan does since its pull request 2416 (February 2026).
    """
    tokens, labels = torch.randint(0, VOCAB, (2, 2, 12), generator=torch.Generator().manual_seed(1)).unbind()
    loss, found = run_on_ranks(gradients, TP, tokens, labels, mended, timeout=600.0)[0]
    write_step_file(
        path,
        trainer=f"torchtitan {version('torchtitan')} Qwen3-MoE, tp = {TP}{', mended' if mended else ''}",
        dtype="float32",
        loss=loss,
        config={
            "model": {
                "num_layers": LAYERS,
                "dim": D,
                "num_heads": HEADS,
                "num_kv_heads": 2,
                "head_dim": HEAD,
                "vocab_size": VOCAB,
                "norm_eps": 1e-6,
                "qk_norm": "head",
                "rope_theta": 1e6,
            },
            "moe": {"num_experts": E, "top_k": K, "hidden_dim": HIDDEN, "router": "topk", "normalize_gates": True},
            "training": {"microbatch_size": 2, "max_grad_norm": 0.0},
        },
        batch={"tokens": tokens, "labels": labels},
        tensors={"weights": dict(build().named_parameters()), "gradients": found},
        names=names(),
    )


def names() -> dict[str, Name]:
    """Where each of our parameters is: most names are alike."""
    found: dict[str, Name] = {name: name for name in ("tok_embeddings.weight", "norm.weight", "output.weight")}
    for i in range(LAYERS):
        block = f"layers.{i}."
        alike = (
            "attention_norm",
            "ffn_norm",
            *(f"attention.{w}" for w in ("wq", "wk", "wv", "wo", "q_norm", "k_norm")),
        )
        found |= {f"{block}{name}.weight": f"{block}{name}.weight" for name in alike}
        experts = block + "moe.experts."
        found[block + "moe.router.weight"] = block + "moe.router.gate.weight"
        found[experts + "w_up"] = {"from": [experts + "w1", experts + "w3"], "stack": 1}
        found[experts + "w_down"] = experts + "w2"
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--mended", action="store_true")
    options = parser.parse_args()
    export(options.out, options.mended)
