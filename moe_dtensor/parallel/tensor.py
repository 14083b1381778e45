"""Tensor, sequence and expert parallelism: parameters become DTensors, and collectives go on the borders of layers.

Layers stay as written for one device. ``Layer.local_weight`` gives each the shard that its rank holds, and hooks gather
the tokens before a split layer and sum the partial results after it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from moe_dtensor.config.load import load_object
from moe_dtensor.config.resolve import (
    attends_by_sequence,
    expert_ranks,
    lent_experts,
    padded_vocab,
    routes_by_sequence,
    tp_axis,
)
from moe_dtensor.config.schema import Config
from moe_dtensor.kernels.cross_entropy import cross_entropy
from moe_dtensor.layers.attention import Attention
from moe_dtensor.layers.feed_forward import FeedForward
from moe_dtensor.layers.moe import MoE
from moe_dtensor.layers.weights import Embedding, Layer, WeightView
from moe_dtensor.mesh import expert_axis, expert_mesh
from moe_dtensor.model.transformer import TokenLoss, Transformer
from moe_dtensor.parallel import collectives
from moe_dtensor.parallel.collectives import Borders, sequence_borders, token_borders
from moe_dtensor.parallel.dispatch import build_dispatch
from moe_dtensor.parallel.expert_copies import view_copy
from moe_dtensor.placement import Row, build_table, find_row


def shard_parameters(part: Transformer, config: Config, mesh: DeviceMesh) -> None:
    """Turn every parameter into a DTensor by the placement table, and let layers compute with its shard.

    On tp, for FSDP to split further over dp; experts that live on dp ranks on dp and tp at once.
    """
    table = build_table(config)
    for module_name, module in part.named_modules():
        for name, param in list(module.named_parameters(recurse=False)):
            row = find_row(table, f"{module_name}.{name}" if module_name else name)
            on_tp: Placement = Replicate() if row.tp is None else Shard(row.tp)
            axes, placements, gradient = mesh["tp"], [on_tp], [_gradient_placement(row, config)]
            if row.on_dp:
                axes = expert_mesh(config, mesh)
                alike = axes.ndim - 2  # the groups' axis, where they hold whole weights
                placements = [Replicate()] * alike + [Shard(row.dp), on_tp]
                gradient = [Partial()] * alike + [Shard(row.dp), *gradient]
            sharded = distribute_tensor(param.detach(), axes, placements, src_data_rank=None)
            module.register_parameter(name, nn.Parameter(sharded))
            assert isinstance(module, Layer), f"{type(module).__name__} does not read its weights by local_weight()"
            # What lends experts casts them itself.
            module.weight_views[name] = _local_view(tuple(gradient), row.fsdp or lent_experts(config) > 0)


def _gradient_placement(row: Row, config: Config) -> Placement:
    """What the gradient of the local part is on tp, as the row tells."""
    if row.tp is not None:
        return Shard(row.tp)
    if row.gradient == "heads" or (row.gradient == "tokens" and config.mesh.sequence_parallel):
        return Partial()
    return Replicate()


@functools.cache
def _local_view(gradient: tuple[Placement, ...], master: bool) -> WeightView:
    """The local tensor of a parameter, or of its copy in another dtype, whose gradient flows back with the given
    placements.

    The same function for all layers alike, so that torch.compile compiles them once.
    """

    def view(module: nn.Module, name: str) -> Tensor:
        if not master:
            return view_copy(module, name, gradient)
        param = getattr(module, name)
        assert isinstance(param, DTensor)
        return param.to_local(grad_placements=gradient)

    return view


@functools.cache
def _rows_view(whole: WeightView, start: int, stop: int) -> WeightView:
    """Some rows of what another view gives."""
    return lambda module, name: whole(module, name)[start:stop]


@functools.cache
def _gathered_view(shard: WeightView, tp: DeviceMesh, dim: int, sum_dtype: torch.dtype) -> WeightView:
    """The whole weight of which another view gives this rank's shard."""

    def view(module: nn.Module, name: str) -> Tensor:
        weight = shard(module, name)
        return collectives.gather_weight(weight, tp, dim, torch.promote_types(sum_dtype, weight.dtype))

    return view


def install_collectives(part: Transformer, config: Config, mesh: DeviceMesh) -> None:
    """Put the collectives on the borders of the split layers, and tell each layer which part it holds."""
    tp = mesh["tp"]
    shared_inside = _install_dispatch(part, config, mesh)
    if tp.size() == 1:
        part.token_loss = build_token_loss(config, tp)
        return
    by_sequence, by_token = sequence_borders(config, tp), token_borders(config, tp)
    rank, axis = tp.get_local_rank(), tp_axis(config)
    for module in part.modules():
        if isinstance(module, Embedding):
            module.first_row = rank * (module.num_rows // tp.size())
            module.register_forward_hook(lambda _module, _args, y: by_sequence.leave(y)())
        elif isinstance(module, Attention) and attends_by_sequence(config):
            _gather_weights(module, config, tp)
        elif isinstance(module, Attention):
            by_token.enter_before(module)
            module.sum_output = functools.partial(_leave, by_token)
            _split_heads(module, config, tp)
            if axis == 1:
                module.shards = tp.size()
                module.to_sequences = functools.partial(collectives.merge_shards, ranks=tp.size(), dim=1)
                module.from_sequences = functools.partial(collectives.split_shards, ranks=tp.size(), dim=1)
        elif isinstance(module, MoE) and axis is not None and not routes_by_sequence(config):
            module.router.gather_tokens = by_sequence.enter_data
            module.router.own_tokens = functools.partial(collectives.local_slice, mesh=tp, dim=axis)
    own_sequences = functools.partial(collectives.local_slice, mesh=tp, dim=0)
    if attends_by_sequence(config):
        part.attended = own_sequences
    if routes_by_sequence(config):
        part.routed = own_sequences
    for name, module in part.named_modules():
        if isinstance(module, FeedForward) and not (shared_inside and name.endswith("moe.shared")):
            by_token.enter_before(module)
            module.sum_output = functools.partial(_leave, by_token)
    if part.is_last:
        part.first_row = rank * (padded_vocab(config) // tp.size())
        part.before_head = lambda x: by_sequence.enter(x)()
        part.token_loss = build_token_loss(config, tp)


def _leave(borders: Borders, y: Tensor) -> Tensor:
    return borders.leave(y)()


def _install_dispatch(part: Transformer, config: Config, mesh: DeviceMesh) -> bool:
    """Give each MoE block its dispatch and its first expert; whether shared experts work inside the dispatch."""
    dispatch, shared_inside = build_dispatch(config, mesh)
    each = config.moe.num_experts // expert_ranks(config)
    rank = 0 if config.mesh.experts == "tp_hidden" else expert_axis(config, mesh).get_local_rank()
    for module in part.modules():
        if isinstance(module, MoE):
            module.dispatch = dispatch
            module.experts.first_expert = rank * each
    return shared_inside


def _gather_weights(attention: Attention, config: Config, tp: DeviceMesh) -> None:
    """All heads on each rank: it gathers the weights that tp splits."""
    table, sum_dtype = build_table(config), getattr(torch, config.training.reduce_dtype)
    for module_name, module in attention.named_modules(prefix="attention"):
        if isinstance(module, Layer):
            for name, view in module.weight_views.items():
                if (dim := find_row(table, f"{module_name}.{name}").tp) is not None:
                    module.weight_views[name] = _gathered_view(view, tp, dim, sum_dtype)


def _split_heads(attention: Attention, config: Config, tp: DeviceMesh) -> None:
    """Key/value heads that are fewer than ranks are held whole; each rank then uses the one its queries need."""
    copies = 1
    if config.model.num_kv_heads % tp.size():
        copies = tp.size() // config.model.num_kv_heads
        head = tp.get_local_rank() // copies
        start, stop = head * config.model.head_dim, (head + 1) * config.model.head_dim
        for layer in attention.key_value_layers():
            for name, view in layer.weight_views.items():
                layer.weight_views[name] = _rows_view(view, start, stop)
    if config.model.qk_norm == "full":
        attention.sum_heads = _sum_over(tp, copies)


def _sum_over(tp: DeviceMesh, copies: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Sum parts over tp, in one collective, when each part of the keys is held by ``copies`` ranks. Its own adjoint."""

    def sum_heads(of_queries: Tensor, of_keys: Tensor) -> tuple[Tensor, Tensor]:
        of_queries, of_keys = collectives.all_reduce_partials(torch.stack([of_queries, of_keys / copies]), tp).unbind()
        return of_queries, of_keys

    return sum_heads


def build_token_loss(config: Config, tp: DeviceMesh) -> TokenLoss:
    """The loss that ``training.loss`` names. Ours works on the vocabulary shard; a user's gets the whole vocabulary."""
    name = config.training.loss
    if name == "cross_entropy":
        return functools.partial(_vocab_parallel_cross_entropy, vocab_size=config.model.vocab_size, tp=tp)
    loss = load_object("training.loss", name, _is_loss, "a function of (logits, labels)")
    return functools.partial(_gathered_loss, loss=loss, vocab_size=config.model.vocab_size, tp=tp)


def _is_loss(found: Any) -> bool:
    """Whether an object can be called with logits and labels, and is no class and nothing built in."""
    if isinstance(found, type) or inspect.isbuiltin(found) or not callable(found):
        return False
    try:
        inspect.signature(found).bind(None, None)
    except (TypeError, ValueError):
        return False
    return True


def _vocab_parallel_cross_entropy(logits_BSV: Tensor, labels_BS: Tensor, vocab_size: int, tp: DeviceMesh) -> Tensor:
    loss_T = cross_entropy(
        logits_BSV.flatten(0, 1),
        labels_BS.flatten(),
        vocab_size=vocab_size,
        first_row=tp.get_local_rank() * logits_BSV.shape[-1],
        all_reduce=functools.partial(_combine, tp=tp) if tp.size() > 1 else None,
    )
    return loss_T.view(labels_BS.shape)


def _combine(x: Tensor, op: str, tp: DeviceMesh) -> Tensor:
    return collectives.all_reduce(x, tp, op)


def _gathered_loss(logits_BSV: Tensor, labels_BS: Tensor, loss: TokenLoss, vocab_size: int, tp: DeviceMesh) -> Tensor:
    """Without the padding, of which a user's loss need not know."""
    return loss(collectives.gather_replicated(logits_BSV, tp, 2)[..., :vocab_size], labels_BS)
