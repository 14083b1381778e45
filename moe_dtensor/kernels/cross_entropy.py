"""Cross-entropy over a shard of the vocabulary, without float32 logits.

Forward reads the logits once per statistic in row blocks; backward turns the saved logits into their own gradient, in
place. Neither ever holds a float32 copy of more than one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

IGNORED = -100
_BLOCK_ELEMENTS = 1 << 22

AllReduce = Callable[[Tensor, str], Tensor]


def cross_entropy(
    logits_TV: Tensor, labels_T: Tensor, *, first_row: int = 0, all_reduce: AllReduce | None = None
) -> Tensor:
    """Per-token cross-entropy ``logsumexp(logits) - logits[label]``; 0 where the label is -100.

    The backward pass overwrites the logits with their gradient (unless they are a leaf), so they must not be read
    after it, and it runs once.

    Args:
        logits_TV: ``(T, V)``, or one shard of the vocabulary whose first column is the global id ``first_row``.
        labels_T: global ids ``(T,)``, int64; -100 is ignored.
        first_row: global id of column 0.
        all_reduce: ``all_reduce(t, "max" | "sum")`` returns ``t`` combined over the shards; None when there is one.

    Returns:
        ``(T,)`` in ``promote_types(logits.dtype, float32)``, the same on every shard.
    """
    return _CrossEntropy.apply(logits_TV, labels_T, first_row, all_reduce)


def _row_blocks(logits_TV: Tensor) -> Iterator[slice]:
    rows = max(1, _BLOCK_ELEMENTS // max(1, logits_TV.shape[1]))
    return (slice(i, i + rows) for i in range(0, logits_TV.shape[0], rows))


def _shard_column(labels_T: Tensor, first_row: int, columns: int) -> tuple[Tensor, Tensor]:
    """Column of each label in this shard (0 where it is elsewhere), and whether it is here."""
    column_T = labels_T - first_row
    here_T = (column_T >= 0) & (column_T < columns) & (labels_T != IGNORED)
    return column_T.where(here_T, 0), here_T


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TV: Tensor, labels_T: Tensor, first_row: int, all_reduce: AllReduce | None) -> Tensor:
        wide = torch.promote_types(logits_TV.dtype, torch.float32)
        combine = all_reduce if all_reduce is not None else lambda t, op: t
        column_T, here_T = _shard_column(labels_T, first_row, logits_TV.shape[1])
        max_T = combine(logits_TV.amax(1).to(wide), "max")
        sum_T = torch.empty_like(max_T)
        for block in _row_blocks(logits_TV):
            sum_T[block] = (logits_TV[block].to(wide) - max_T[block, None]).exp_().sum(1)
        target_T = logits_TV.gather(1, column_T[:, None])[:, 0].to(wide).where(here_T, 0)
        sum_T, target_T = combine(torch.stack([sum_T, target_T]), "sum").unbind()
        log_sum_T = max_T + sum_T.log()
        ctx.save_for_backward(logits_TV, labels_T, log_sum_T)
        ctx.first_row = first_row
        ctx.in_place = not logits_TV.is_leaf
        return (log_sum_T - target_T).where(labels_T != IGNORED, 0)

    @staticmethod
    def backward(ctx, grad_T: Tensor):
        logits_TV, labels_T, log_sum_T = ctx.saved_tensors
        column_T, here_T = _shard_column(labels_T, ctx.first_row, logits_TV.shape[1])
        grad_T = grad_T.to(log_sum_T.dtype).where(labels_T != IGNORED, 0)
        grad_TV = logits_TV if ctx.in_place else torch.empty_like(logits_TV)
        for block in _row_blocks(logits_TV):
            softmax = (logits_TV[block].to(log_sum_T.dtype) - log_sum_T[block, None]).exp_()
            softmax.scatter_add_(1, column_T[block, None], -here_T[block, None].to(softmax.dtype))
            grad_TV[block] = softmax.mul_(grad_T[block, None])
        return grad_TV, None, None, None
