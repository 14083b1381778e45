"""torchtitan 0.2's Qwen3-MoE with a config's sizes, trained on the same batches: the peer of ``bench train``.

Its own parts do the work: model, per-module compilation, FSDP2 mixed precision, loss, fused AdamW, clipping, in the
order of its trainer's step. Only the data comes from this package's loader.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.resolve import moe_layers, padded_vocab
from moe_dtensor.config.schema import Config
from moe_dtensor.data import Corpus, Loader
from moe_dtensor.data.loader import IGNORED


def check_peer(name: str, config: Config, world_size: int) -> None:
    """Raise ConfigError unless torchtitan's Qwen3 can have a resolved config's sizes."""
    model, moe = config.model, config.moe
    plain = {
        "model.activation": (model.activation, "swiglu"),
        "model.norm": (model.norm, "rmsnorm"),
        "model.norm_at": (model.norm_at, "pre"),
        "model.parallel_block": (model.parallel_block, False),
        "model.ffn_bias": (model.ffn_bias, False),
        "model.head_bias": (model.head_bias, False),
        "model.embedding_scale": (model.embedding_scale, 1.0),
        "model.residual_scale": (model.residual_scale, 1.0),
        "model.logit_scale": (model.logit_scale, 1.0),
        "moe.top_k_by_layer": (moe.top_k_by_layer, ()),
        "moe.router_by_layer": (moe.router_by_layer, ()),
        "moe.shared_gate": (moe.shared_gate, False),
        "moe.shared_hidden_dim": (moe.shared_hidden_dim, moe.num_shared_experts * moe.hidden_dim),
        "moe.router_bias": (moe.router_bias, False),
        "moe.gate_on": (moe.gate_on, "output"),
        "moe.capacity_factor": (moe.capacity_factor, 0.0),
    }
    for key, (value, wanted) in plain.items():
        if value != wanted:
            raise ConfigError(f"--peers {name}: it has no {key} = {value}.", f"Set {key} = {wanted}, or leave it out.")
    if len(moe_layers(config)) != model.num_layers:
        raise ConfigError(f"--peers {name}: every block of it has experts.", "Set moe.every = 1 and no moe.layers.")
    if name == "torchtitan_amp" and world_size > 1:
        raise ConfigError("--peers torchtitan_amp trains on one GPU.", "Take --peers torchtitan on several.")
    if config.training.global_batch_size % world_size:
        raise ConfigError(
            f"--peers {name} gives each rank as many sequences: training.global_batch_size = "
            f"{config.training.global_batch_size} is no multiple of {world_size} ranks."
        )


def differences(config: Config, device: torch.device) -> list[str]:
    """In what the peer computes something else than the config says."""
    found = {
        f"chooses experts by top-k, not by {config.moe.router}": config.moe.router != "topk",
        "norms queries and keys by head, not over the whole width": config.model.qk_norm == "full",
        "has no auxiliary losses": config.moe.balance_loss > 0 or config.moe.z_loss > 0,
        "takes no document mask": config.data.document_mask,
        "is sharded over all ranks (FSDP2)": config.mesh.pp * config.mesh.tp > 1 or config.mesh.experts != "tp",
        "runs its experts one by one, since its grouped GEMM needs a GPU": device.type == "cpu",
    }
    return [text for text, differs in found.items() if differs]


@contextmanager
def prepared(device: torch.device) -> Iterator[None]:
    """Without torchtitan's log and warnings; on a CPU with the one function of torch that it calls and a CPU lacks
    (``histc`` of integers). Its compiled function of the experts is undone at the end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchtitan.models.moe import moe as module
        from torchtitan.tools.logging import logger

        level, run_experts, histc = logger.level, module._run_experts_grouped_mm, torch.histc
        logger.setLevel(logging.ERROR)
        if device.type == "cpu":
            torch.histc = lambda x, *a, **k: histc(x.double(), *a, **k).to(x.dtype)
        try:
            yield
        finally:
            logger.setLevel(level)
            module._run_experts_grouped_mm = run_experts
            torch.histc = histc


class Peer:
    """The model, its optimizer and its share of the data, on this rank.

    By the name ``torchtitan`` with weights in float32, computing in ``param_dtype`` by FSDP2, on one rank too; by
    ``torchtitan_amp`` as its trainer does on one GPU: no FSDP, torch.autocast.
    """

    def __init__(self, name: str, config: Config, corpus: Corpus, device: torch.device, microbatch: int) -> None:
        from torchtitan.components.loss import cross_entropy_loss
        from torchtitan.components.optimizer import build_optimizers
        from torchtitan.config import Optimizer
        from torchtitan.distributed import ParallelDims

        self.device = device
        self.microbatch = microbatch
        self.max_norm = config.training.max_grad_norm or float("inf")
        self.loader = Loader(config, corpus)
        dtype = getattr(torch, config.training.param_dtype)
        self.model = _build_model(config, device, dtype, sharded=name == "torchtitan")
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        if name == "torchtitan_amp" and dtype != torch.float32:
            self.autocast = lambda: torch.autocast(device.type, dtype=dtype)
        self.loss = torch.compile(cross_entropy_loss) if config.compile.enable else cross_entropy_loss
        world = dist.get_world_size()
        options = config.optimizer
        self.optimizers = build_optimizers(
            [self.model],
            Optimizer(
                lr=options.lr,
                beta1=options.beta1,
                beta2=options.beta2,
                eps=options.eps,
                weight_decay=options.weight_decay,
            ),
            ParallelDims(dp_replicate=1, dp_shard=world, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=world),
        )

    def step(self) -> Tensor:
        """One global batch: forward and backward of each microbatch, clipping, AdamW. The mean loss."""
        from torchtitan.distributed.utils import clip_grad_norm_

        self.optimizers.zero_grad()
        share = self.loader.batch_size // dist.get_world_size()
        batch = self.loader.next_batch(dist.get_rank() * share, (dist.get_rank() + 1) * share)
        targets = (batch.labels_BS != IGNORED).sum().to(self.device)
        dist.all_reduce(targets)
        losses = []
        pieces = zip(batch.tokens_BS.split(self.microbatch), batch.labels_BS.split(self.microbatch), strict=True)
        for tokens_BS, labels_BS in pieces:
            with self.autocast():
                logits_BSV = self.model(tokens_BS.to(self.device))
                loss = self.loss(logits_BSV, labels_BS.to(self.device)) / targets
            del logits_BSV
            loss.backward()
            losses.append(loss.detach())
        clip_grad_norm_(list(self.model.parameters()), self.max_norm, foreach=True)
        self.optimizers.step()
        total = torch.stack(losses).sum()
        dist.all_reduce(total)
        return total


def _build_model(config: Config, device: torch.device, dtype: torch.dtype, sharded: bool) -> Any:
    """torchtitan's Qwen3 of the config's sizes with initial values: compiled, then sharded, as it does itself."""
    from torchtitan.config import job_config
    from torchtitan.models.llama4.infra.parallelize import apply_compile, apply_fsdp
    from torchtitan.models.moe import MoEArgs
    from torchtitan.models.qwen3 import Qwen3Model, Qwen3ModelArgs

    model, moe = config.model, config.moe
    arguments = Qwen3ModelArgs(
        dim=model.dim,
        n_layers=model.num_layers,
        n_heads=model.num_heads,
        n_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        vocab_size=padded_vocab(config),
        hidden_dim=model.hidden_dim,
        norm_eps=model.norm_eps,
        rope_theta=model.rope_theta,
        qk_norm=model.qk_norm != "none",
        max_seq_len=config.training.seq_len,
        enable_weight_tying=model.tie_embeddings,
        moe_enabled=True,
        moe_inter_dim=moe.hidden_dim,
        moe_args=MoEArgs(
            num_experts=moe.num_experts,
            num_shared_experts=moe.num_shared_experts,
            top_k=moe.top_k,
            score_func="sigmoid" if moe.score == "sigmoid" else "softmax",
            route_norm=moe.normalize_gates or (moe.score == "softmax" and not moe.score_before_top_k),
            route_scale=moe.gate_scale,
            score_before_experts=False,
            use_grouped_mm=device.type == "cuda",
            load_balance_coeff=None,
        ),
    )
    torch.manual_seed(config.training.seed)
    with torch.device("meta"):
        built = Qwen3Model(arguments)
    if config.compile.enable:
        apply_compile(built, job_config.Compile(enable=True), ep_enabled=False)
    if sharded:
        ranks = init_device_mesh(device.type, (dist.get_world_size(),))
        apply_fsdp(built, ranks, param_dtype=dtype, reduce_dtype=torch.float32, pp_enabled=False)
        if device.type == "cpu":
            for module in built.modules():
                if isinstance(module, FSDPModule):
                    module.set_force_sum_reduction_for_comms(True)  # gloo cannot multiply while it sums
    built.to_empty(device=device)
    with torch.no_grad():
        built.init_weights(buffer_device=device)
    return built.train()
