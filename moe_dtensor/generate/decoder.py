"""One forward pass more for each token, on a GPU as a CUDA graph. B sequences, S new positions, V vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from moe_dtensor.config.resolve import block_window, own_routers, padded_vocab
from moe_dtensor.config.schema import Config
from moe_dtensor.generate.cache import KeyValueCache, LatentCache, Slots
from moe_dtensor.kernels.attention import Visible
from moe_dtensor.kernels.experts.mlp import choose_backend
from moe_dtensor.layers.attention import Attention, LatentAttention
from moe_dtensor.layers.block import Block
from moe_dtensor.layers.moe import Experts
from moe_dtensor.layers.positions import Place, Positions, rotation
from moe_dtensor.model.transformer import Transformer
from moe_dtensor.parallel import collectives
from moe_dtensor.parallel.graphed import Graphed


class Decoder:
    """A whole model with caches, on this rank. Open it by :func:`open_decoder`.

    Args:
        model: in evaluation mode; without sequence parallelism, whose single positions could not be split.
        config: resolved.
        tp: over which its vocabulary is split.
        slots: of the batch that is to be continued.
    """

    def __init__(self, model: Transformer, config: Config, tp: DeviceMesh, slots: Slots) -> None:
        self.model, self.config, self.tp, self.slots = model, config, tp, slots
        dtype = getattr(torch, config.training.param_dtype)
        wide = torch.promote_types(dtype, torch.float32)
        position_1N = torch.arange(slots.total, device=slots.first_B.device)[None]
        self.rotations = [rotation(config, window, position_1N, slots.total, wide) for window in (False, True)]
        """cos and sin of every position, of blocks without a window and of those with one."""
        replays = slots.first_B.is_cuda and tp.size() == 1 and is_kernels_only(model, config)
        self.next = Graphed(self._next) if replays else self._next

    @torch.no_grad()
    def __call__(self, tokens_BS: Tensor) -> Tensor:
        """Read the prompts ``(B, S)``, then, call by call, one token more ``(B, 1)``; the logits after the last of
        them, ``(B, V)``, the same on all tp ranks."""
        slots = self.slots
        if not len(slots.new_S):
            slots.take_prompts(tokens_BS.shape[1])
            return self._read(tokens_BS)
        if slots.is_prompt:
            slots.end_prompts()
        return self.next(tokens_BS)

    def _next(self, tokens_B1: Tensor) -> Tensor:
        self.slots.take_next()
        return self._read(tokens_B1)

    def _read(self, tokens_BS: Tensor) -> Tensor:
        positions_BS = self.slots.positions_BS()
        full, window = (
            Place(cos[0, positions_BS], sin[0, positions_BS], Visible(None, None)) for cos, sin in self.rotations
        )
        held_BSV = self.model(tokens_BS, positions=Positions(full, window))
        return whole_vocabulary(held_BSV, self.config, self.tp)[:, -1]


def is_kernels_only(model: Transformer, config: Config) -> bool:
    """Whether a forward pass of a rank alone launches kernels and nothing else, so that it can be replayed: without
    FSDP, whose hooks use streams of their own, without a router of one's own, and with experts that never ask the
    device how many rows they have."""
    if isinstance(model, FSDPModule) or own_routers(config):
        return False
    experts = (module.local_weight("w_up") for module in model.modules() if isinstance(module, Experts))
    float8 = config.moe.expert_dtype == "float8"
    return all(choose_backend(config.moe.backend, w_up, w_up, float8) in ("torch", "triton") for w_up in experts)


@contextmanager
def open_decoder(model: Transformer, config: Config, tp: DeviceMesh, slots: Slots) -> Iterator[Decoder]:
    """While it is open the model's attention remembers, and its head sees the last position alone."""
    layers: list[tuple[Attention, KeyValueCache | LatentCache]] = []
    for index, block in model.layers.items():
        # Blocks of multi-token prediction are for training.
        if int(index) < config.model.num_layers:
            assert isinstance(block, Block)
            kind = LatentCache if isinstance(block.attention, LatentAttention) else KeyValueCache
            layers.append((block.attention, kind(slots, block_window(config, int(index)))))
    before_head = model.before_head
    right = [attention.attend for attention, _ in layers]
    try:
        for attention, cache in layers:
            attention.attend = cache
            if isinstance(attention, LatentAttention) and isinstance(cache, LatentCache):
                attention.recall = cache.recall
        model.before_head = lambda x: before_head(x[:, -1:])
        yield Decoder(model, config, tp, slots)
    finally:
        model.before_head = before_head
        for (attention, _), attend in zip(layers, right, strict=True):
            attention.attend = attend
            if isinstance(attention, LatentAttention):
                attention.recall = None


def whole_vocabulary(held_BSV: Tensor, config: Config, tp: DeviceMesh) -> Tensor:
    """Logits of all ids ``(B, S, V)`` from those of the ids that each tp rank holds."""
    if tp.size() == 1:
        return held_BSV
    rows = padded_vocab(config) // tp.size()
    padded = torch.nn.functional.pad(held_BSV, (0, rows - held_BSV.shape[-1]))
    return collectives.gather_replicated(padded, tp, 2)[..., : config.model.vocab_size]
