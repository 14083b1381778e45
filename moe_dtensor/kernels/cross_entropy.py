"""Cross-entropy over a shard of the vocabulary, without float32 logits.

Forward reads the logits once per statistic in row blocks; backward turns the saved logits into their own gradient, in
place. Neither ever holds a float32 copy of more than one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from moe_dtensor.kernels.library import launches_triton, triton_kernels

IGNORED = -100
_BLOCK_ELEMENTS = 1 << 22

AllReduce = Callable[[Tensor, str], Tensor]


def cross_entropy(
    logits_TV: Tensor,
    labels_T: Tensor,
    *,
    vocab_size: int | None = None,
    first_row: int = 0,
    all_reduce: AllReduce | None = None,
) -> Tensor:
    """Per-token cross-entropy ``logsumexp(logits) - logits[label]``; 0 where the label is -100.

    Padded columns do not take part: their gradient is 0, whatever they hold.

    The backward pass overwrites the logits with their gradient (unless they are a leaf), so they must not be read
    after it, and it runs once.

    Args:
        logits_TV: ``(T, V)``, or one shard of the vocabulary whose first column is the global id ``first_row``.
        labels_T: global ids ``(T,)``, int64; -100 is ignored.
        vocab_size: global ids from here on are padding. None: there is none.
        first_row: global id of column 0.
        all_reduce: ``all_reduce(t, "max" | "sum")`` returns ``t`` combined over the shards; None when there is one.

    Returns:
        ``(T,)`` in ``promote_types(logits.dtype, float32)``, the same on every shard.
    """
    columns = logits_TV.shape[1] if vocab_size is None else held_ids(vocab_size, first_row, logits_TV.shape[1])
    return _CrossEntropy.apply(logits_TV, labels_T, first_row, columns, all_reduce)


def held_ids(vocab_size: int, first_row: int, rows: int) -> int:
    """How many of a shard's ``rows`` from the global id ``first_row`` are ids of the vocabulary, not padding."""
    return min(max(vocab_size - first_row, 0), rows)


def _row_blocks(logits_TV: Tensor) -> Iterator[slice]:
    rows = max(1, _BLOCK_ELEMENTS // max(1, logits_TV.shape[1]))
    return (slice(i, i + rows) for i in range(0, logits_TV.shape[0], rows))


def _shard_column(labels_T: Tensor, first_row: int, columns: int) -> tuple[Tensor, Tensor]:
    """Column of each label in this shard (0 where it is elsewhere), and whether it is here."""
    column_T = labels_T - first_row
    here_T = (column_T >= 0) & (column_T < columns) & (labels_T != IGNORED)
    return column_T.where(here_T, 0), here_T


def _row_statistics(logits_TV: Tensor, columns: int, column_T: Tensor, here_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the first ``columns`` of each row the maximum and the sum of the exponentials above it, -inf and 0 where there
    are none; and the target's logit, 0 where it is elsewhere."""
    if _by_triton(logits_TV):
        return triton_kernels("cross_entropy").row_statistics(logits_TV, columns, column_T, here_T)
    wide = torch.promote_types(logits_TV.dtype, torch.float32)
    if columns == 0:
        none_T = torch.full(logits_TV.shape[:1], -torch.inf, dtype=wide, device=logits_TV.device)
        return none_T, torch.zeros_like(none_T), torch.zeros_like(none_T)
    max_T = logits_TV[:, :columns].amax(1).to(wide)
    sum_T = torch.empty_like(max_T)
    for block in _row_blocks(logits_TV):
        sum_T[block] = (logits_TV[block, :columns].to(wide) - max_T[block, None]).exp_().sum(1)
    return max_T, sum_T, logits_TV.gather(1, column_T[:, None])[:, 0].to(wide).where(here_T, 0)


def _write_gradient(
    logits_TV: Tensor, columns: int, column_T: Tensor, here_T: Tensor, log_sum_T: Tensor, grad_T: Tensor, out_TV: Tensor
) -> None:
    """``out = (softmax - one_hot) * grad``, 0 from ``columns`` on; ``out_TV`` may be ``logits_TV``."""
    if _by_triton(logits_TV):
        triton_kernels("cross_entropy").write_gradient(logits_TV, columns, column_T, here_T, log_sum_T, grad_T, out_TV)
        return
    out_TV[:, columns:] = 0
    if columns == 0:
        return
    for block in _row_blocks(logits_TV):
        softmax = (logits_TV[block, :columns].to(log_sum_T.dtype) - log_sum_T[block, None]).exp_()
        softmax.scatter_add_(1, column_T[block, None], -here_T[block, None].to(softmax.dtype))
        out_TV[block, :columns] = softmax.mul_(grad_T[block, None])


def _by_triton(logits_TV: Tensor) -> bool:
    return launches_triton(logits_TV) and logits_TV.dtype != torch.float64 and logits_TV.numel() > 0


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, logits_TV: Tensor, labels_T: Tensor, first_row: int, columns: int, all_reduce: AllReduce | None
    ) -> Tensor:
        in_place = not logits_TV.is_leaf
        if logits_TV.stride(1) != 1:
            logits_TV = logits_TV.contiguous()
        column_T, here_T = _shard_column(labels_T, first_row, columns)
        max_T, sum_T, target_T = _row_statistics(logits_TV, columns, column_T, here_T)
        if all_reduce is not None:
            shard_max_T, max_T = max_T, all_reduce(max_T.clone(), "max")  # a collective may work in place
            sum_T = sum_T * (shard_max_T - max_T).exp()
            sum_T, target_T = all_reduce(torch.stack([sum_T, target_T]), "sum").unbind()
        log_sum_T = max_T + sum_T.log()
        ctx.save_for_backward(logits_TV, labels_T, log_sum_T)
        ctx.first_row, ctx.columns, ctx.in_place = first_row, columns, in_place
        return (log_sum_T - target_T).where(labels_T != IGNORED, 0)

    @staticmethod
    def backward(ctx, grad_T: Tensor):
        logits_TV, labels_T, log_sum_T = ctx.saved_tensors
        column_T, here_T = _shard_column(labels_T, ctx.first_row, ctx.columns)
        grad_T = grad_T.to(log_sum_T.dtype).where(labels_T != IGNORED, 0)
        grad_TV = logits_TV if ctx.in_place else torch.empty_like(logits_TV)
        _write_gradient(logits_TV, ctx.columns, column_T, here_T, log_sum_T, grad_T, grad_TV)
        return grad_TV, None, None, None, None
