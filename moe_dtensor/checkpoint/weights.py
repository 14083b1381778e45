"""Weights of a Hugging Face or native folder into a model's parts, on any mesh. E experts, L MoE blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from moe_dtensor.checkpoint.hugging_face.source import HuggingFaceSource
from moe_dtensor.checkpoint.native import NativeFolder, NativeWeights
from moe_dtensor.checkpoint.storage import Reader
from moe_dtensor.config.resolve import moe_layers
from moe_dtensor.config.schema import Config
from moe_dtensor.model.balance_state import BalanceState
from moe_dtensor.model.initial import held_slices
from moe_dtensor.parallel.gradients import local_part


@torch.no_grad()
def load_weights(
    parts: Iterable[nn.Module], balance: BalanceState, config: Config, source: HuggingFaceSource | NativeFolder
) -> None:
    """Fill this rank's part of every parameter, and the biases that the choice sees. Called by all ranks together."""
    params = {name: param for part in parts for name, param in part.named_parameters()}
    if isinstance(source, NativeFolder):
        _load_native(balance, params, source)
        return
    for name, param in params.items():
        _read_part(source, name, param)
    for row, layer in enumerate(sorted(moe_layers(config))):
        bias_E = torch.zeros(config.moe.num_experts)
        source.read(f"layers.{layer}.moe.router.bias", [(0, len(bias_E))], bias_E)
        balance.bias_LE[row].copy_(bias_E)


def _read_part(source: HuggingFaceSource, name: str, param: Tensor) -> None:
    """By way of host memory: one tensor of this rank beyond its shard, gone before the next."""
    local = local_part(param)
    part = torch.empty(local.shape, dtype=local.dtype)
    source.read(name, [(held.start, held.stop) for held in held_slices(param)], part)
    local.copy_(part)


def _load_native(balance: BalanceState, params: Mapping[str, Tensor], source: NativeFolder) -> None:
    weights = NativeWeights(source.checkpoint)
    held = set(weights.names())
    tensors = {name: param.detach() for name, param in params.items()}
    _load(source.checkpoint, {name: tensor for name, tensor in tensors.items() if name in held})
    if "output.weight" not in held:
        # The folder's head is its embedding; only the last stage has one to fill.
        head = tensors.get("output.weight")
        _load(source.checkpoint, {} if head is None else {"tok_embeddings.weight": head})
    bias_LE = weights.bias_LE()
    rows = len(balance.bias_LE)
    if bias_LE[:rows].shape == balance.bias_LE.shape:  # a folder may have those of multi-token prediction beside
        balance.bias_LE.copy_(bias_LE[:rows])


def _load(checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    dcp.load({"model": tensors}, storage_reader=Reader(checkpoint))
