"""Token losses over a vocabulary that is split over tp. B sequences, S positions, V vocabulary, padded."""

from __future__ import annotations

import functools

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moe_dtensor.config.objects import load_object
from moe_dtensor.config.schema import Config
from moe_dtensor.kernels.cross_entropy import cross_entropy
from moe_dtensor.model.transformer import TokenLoss
from moe_dtensor.parallel import collectives


def build_token_loss(config: Config, tp: DeviceMesh) -> TokenLoss:
    """The loss that ``training.loss`` names. Ours works on the vocabulary shard; a user's gets the whole vocabulary."""
    name = config.training.loss
    if name == "cross_entropy":
        return functools.partial(_vocab_parallel_cross_entropy, vocab_size=config.model.vocab_size, tp=tp)
    loss = load_object("training.loss", name)
    return functools.partial(_gathered_loss, loss=loss, vocab_size=config.model.vocab_size, tp=tp)


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
    return loss(collectives.gather_alike(logits_BSV, tp, 2)[..., :vocab_size], labels_BS)
