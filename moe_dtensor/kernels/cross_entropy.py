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


def _row_statistics(logits_TV: Tensor, column_T: Tensor, here_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum of each row, sum of the exponentials above it, and the target's logit (0 where it is elsewhere)."""
    if _by_triton(logits_TV):
        return triton_kernels("cross_entropy").row_statistics(logits_TV, column_T, here_T)
    wide = torch.promote_types(logits_TV.dtype, torch.float32)
    max_T = logits_TV.amax(1).to(wide)
    sum_T = torch.empty_like(max_T)
    for block in _row_blocks(logits_TV):
        sum_T[block] = (logits_TV[block].to(wide) - max_T[block, None]).exp_().sum(1)
    return max_T, sum_T, logits_TV.gather(1, column_T[:, None])[:, 0].to(wide).where(here_T, 0)


def _write_gradient(
    logits_TV: Tensor, column_T: Tensor, here_T: Tensor, log_sum_T: Tensor, grad_T: Tensor, out_TV: Tensor
) -> None:
    """``out = (softmax - one_hot) * grad``; ``out_TV`` may be ``logits_TV``."""
    if _by_triton(logits_TV):
        triton_kernels("cross_entropy").write_gradient(logits_TV, column_T, here_T, log_sum_T, grad_T, out_TV)
        return
    for block in _row_blocks(logits_TV):
        softmax = (logits_TV[block].to(log_sum_T.dtype) - log_sum_T[block, None]).exp_()
        softmax.scatter_add_(1, column_T[block, None], -here_T[block, None].to(softmax.dtype))
        out_TV[block] = softmax.mul_(grad_T[block, None])


def _by_triton(logits_TV: Tensor) -> bool:
    return launches_triton(logits_TV) and logits_TV.dtype != torch.float64 and logits_TV.numel() > 0


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TV: Tensor, labels_T: Tensor, first_row: int, all_reduce: AllReduce | None) -> Tensor:
        in_place = not logits_TV.is_leaf
        if logits_TV.stride(1) != 1:
            logits_TV = logits_TV.contiguous()
        column_T, here_T = _shard_column(labels_T, first_row, logits_TV.shape[1])
        max_T, sum_T, target_T = _row_statistics(logits_TV, column_T, here_T)
        if all_reduce is not None:
            shard_max_T, max_T = max_T, all_reduce(max_T.clone(), "max")  # a collective may work in place
            sum_T = sum_T * (shard_max_T - max_T).exp()
            sum_T, target_T = all_reduce(torch.stack([sum_T, target_T]), "sum").unbind()
        log_sum_T = max_T + sum_T.log()
        ctx.save_for_backward(logits_TV, labels_T, log_sum_T)
        ctx.first_row, ctx.in_place = first_row, in_place
        return (log_sum_T - target_T).where(labels_T != IGNORED, 0)

    @staticmethod
    def backward(ctx, grad_T: Tensor):
        logits_TV, labels_T, log_sum_T = ctx.saved_tensors
        column_T, here_T = _shard_column(labels_T, ctx.first_row, logits_TV.shape[1])
        grad_T = grad_T.to(log_sum_T.dtype).where(labels_T != IGNORED, 0)
        grad_TV = logits_TV if ctx.in_place else torch.empty_like(logits_TV)
        _write_gradient(logits_TV, column_T, here_T, log_sum_T, grad_T, grad_TV)
        return grad_TV, None, None, None
