"""Router arithmetic: logits, top-k, and the gates of the chosen experts, in float32 (or wider) whatever x is.

On GPUs the matrix products stay in bf16 tensor cores with fp32 sums, which is exact for bf16 inputs; the gradient of
the logits goes through them as a sum of two bf16 numbers. Top-k, softmax and gates are one launch, their backward
another.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from moe_dtensor.kernels.library import define, launches_triton, triton_kernels

SCORES = ("softmax", "sigmoid")


def router_logits(x_TD: Tensor, w_ED: Tensor) -> Tensor:
    """``x @ w^T``, ``(T, E)``, in ``promote_types(x.dtype, float32)``, without a float32 copy of x on GPUs."""
    if x_TD.is_cuda and x_TD.dtype == w_ED.dtype and x_TD.dtype in (torch.bfloat16, torch.float16):
        return _Logits.apply(x_TD, w_ED)
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    return x_TD.to(wide) @ w_ED.to(wide).T


def top_k_gates(
    logits_TE: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    ranking_TE: Tensor | None = None,
    normalize: bool = False,
) -> tuple[Tensor, Tensor]:
    """Choose K experts per token, and weight each by its score.

    Args:
        logits_TE: ``(T, E)``, the router's output.
        top_k: K, at most E. Ties go to the lower id; a NaN ranks last.
        score: ``softmax`` over all E experts, or ``sigmoid`` of each logit.
        ranking_TE: what the choice goes by, for example Sinkhorn's matrix. None: the logits.
        normalize: divide a token's gates by their sum over the K chosen. This is the softmax over the K of the scores'
            logarithms (for ``softmax``, of the logits), and computed as such, so that no sum of tiny scores underflows.

    Returns:
        ``(gate_TK, expert_TK)``: gates in the logits' dtype, differentiable in the logits, and int64 ids. The choice
        itself has no gradient.

    Raises:
        ValueError: top_k greater than E, or an unknown score.
    """
    if not 0 < top_k <= logits_TE.shape[1]:
        raise ValueError(f"moe.top_k = {top_k} must be from 1 to moe.num_experts = {logits_TE.shape[1]}.")
    if score not in SCORES:
        raise ValueError(f"score = {score!r} is not known. Use one of {', '.join(SCORES)}.")
    if ranking_TE is not None:
        ranking_TE = ranking_TE.detach()
    return _Gates.apply(logits_TE, ranking_TE, top_k, score, normalize)


def _logits(x_TD: Tensor, w_ED: Tensor) -> Tensor:
    return torch.mm(x_TD, w_ED.T, out_dtype=torch.float32)


_logits_op = define(
    "router_logits(Tensor x, Tensor w) -> Tensor",
    _logits,
    lambda x_TD, w_ED: x_TD.new_empty(x_TD.shape[0], w_ED.shape[0], dtype=torch.float32),
)


def _logits_backward(dlogits_TE: Tensor, x_TD: Tensor, w_ED: Tensor) -> tuple[Tensor, Tensor]:
    # A float32 number as the sum of two bf16 ones, side by side: one product each for dx and dw.
    halves_TC, twice_CD = triton_kernels("router").split_halves(dlogits_TE.contiguous(), w_ED.contiguous())
    dx_TD = torch.mm(halves_TC, twice_CD)
    high_ED, low_ED = torch.mm(halves_TC.T, x_TD, out_dtype=torch.float32).chunk(2)
    return dx_TD, torch.add(high_ED, low_ED, out=torch.empty_like(w_ED))


_logits_backward_op = define(
    "router_logits_backward(Tensor dlogits, Tensor x, Tensor w) -> (Tensor, Tensor)",
    _logits_backward,
    lambda dlogits_TE, x_TD, w_ED: (torch.empty_like(x_TD), torch.empty_like(w_ED)),
)


class _Logits(Function):
    @staticmethod
    def forward(ctx, x_TD, w_ED):
        ctx.save_for_backward(x_TD, w_ED)
        return _logits_op(x_TD, w_ED)

    @staticmethod
    def backward(ctx, dlogits_TE):
        return _logits_backward_op(dlogits_TE, *ctx.saved_tensors)


def _by_triton(logits_TE: Tensor) -> bool:
    return launches_triton(logits_TE) and logits_TE.dtype == torch.float32 and logits_TE.numel() > 0


def _top_k(
    logits_TE: Tensor, ranking_TE: Tensor | None, top_k: int, score: str, normalize: bool
) -> tuple[Tensor, Tensor]:
    if _by_triton(logits_TE):
        return triton_kernels("router").top_k_gates(logits_TE, ranking_TE, top_k, score, normalize)
    ranking_TE = (logits_TE if ranking_TE is None else ranking_TE).nan_to_num(nan=-torch.inf)
    expert_TK = ranking_TE.sort(dim=1, descending=True, stable=True).indices[:, :top_k].contiguous()
    if normalize:
        return _normalized(logits_TE.gather(1, expert_TK), score), expert_TK
    return _score(logits_TE, score).gather(1, expert_TK), expert_TK


def _score(logits_TE: Tensor, score: str) -> Tensor:
    return logits_TE.softmax(1) if score == "softmax" else logits_TE.sigmoid()


def _normalized(chosen_TK: Tensor, score: str) -> Tensor:
    """Gates of the chosen logits that sum to 1."""
    return (chosen_TK if score == "softmax" else F.logsigmoid(chosen_TK)).softmax(1)


_top_k_op = define(
    "top_k_gates(Tensor logits, Tensor? ranking, int top_k, str score, bool normalize) -> (Tensor, Tensor)",
    _top_k,
    lambda logits_TE, ranking_TE, top_k, score, normalize: (
        logits_TE.new_empty(logits_TE.shape[0], top_k),
        logits_TE.new_empty(logits_TE.shape[0], top_k, dtype=torch.int64),
    ),
)


def _gates_backward(dgate_TK: Tensor, logits_TE: Tensor, expert_TK: Tensor, score: str, normalize: bool) -> Tensor:
    if _by_triton(logits_TE):
        return triton_kernels("router").gates_backward(dgate_TK.contiguous(), logits_TE, expert_TK, score, normalize)
    if normalize:
        chosen_TK = logits_TE.gather(1, expert_TK)
        gate_TK = _normalized(chosen_TK, score)
        dchosen_TK = gate_TK * (dgate_TK - (dgate_TK * gate_TK).sum(1, keepdim=True))
        if score == "sigmoid":
            dchosen_TK = dchosen_TK * (-chosen_TK).sigmoid()
        return torch.zeros_like(logits_TE).scatter_(1, expert_TK, dchosen_TK)
    score_TE = _score(logits_TE, score)
    dscore_TE = torch.zeros_like(logits_TE).scatter_(1, expert_TK, dgate_TK)
    if score == "sigmoid":
        return dscore_TE * score_TE * (1 - score_TE)
    return score_TE * (dscore_TE - (dscore_TE * score_TE).sum(1, keepdim=True))


_gates_backward_op = define(
    "gates_backward(Tensor dgate, Tensor logits, Tensor expert, str score, bool normalize) -> Tensor",
    _gates_backward,
    lambda dgate_TK, logits_TE, expert_TK, score, normalize: torch.empty_like(logits_TE),
)


class _Gates(Function):
    @staticmethod
    def forward(ctx, logits_TE, ranking_TE, top_k, score, normalize):
        logits_TE = logits_TE.contiguous()
        gate_TK, expert_TK = _top_k_op(logits_TE, ranking_TE, top_k, score, normalize)
        ctx.save_for_backward(logits_TE, expert_TK)
        ctx.score, ctx.normalize = score, normalize
        ctx.mark_non_differentiable(expert_TK)
        return gate_TK, expert_TK

    @staticmethod
    def backward(ctx, dgate_TK, _):
        logits_TE, expert_TK = ctx.saved_tensors
        return _gates_backward_op(dgate_TK, logits_TE, expert_TK, ctx.score, ctx.normalize), None, None, None, None


STATISTICS = ("entropy", "margin", "gate_norm", "squared_logsumexp")
"""What :func:`router_statistics` sums up, in this order."""


@torch.no_grad()
def router_statistics(logits_TE: Tensor, gate_TK: Tensor) -> Tensor:
    """Sums over tokens of four statistics of the router, in a fixed order of summation and without a host sync.

    Divided by T (summed over ranks first), they are means over tokens; that of the squared logsumexp is the z-loss
    without its coefficient (Zoph et al., arXiv:2202.08906).

    Args:
        logits_TE: the router's output ``(T, E)``; T may be 0.
        gate_TK: weights of the chosen experts ``(T, K)``, 0 for choices without a copy; any floating dtype.

    Returns:
        ``(4,)`` in ``promote_types(logits.dtype, float32)``, without gradient: the entropy of ``softmax(logits)`` in
        nats; its largest less its second largest probability (1 when E = 1); the 2-norm of a token's gates; and
        ``logsumexp(logits)^2``.
    """
    return _statistics_op(logits_TE.detach(), gate_TK.detach())


def _statistics(logits_TE: Tensor, gate_TK: Tensor) -> Tensor:
    wide = torch.promote_types(logits_TE.dtype, torch.float32)
    if launches_triton(logits_TE) and wide == torch.float32 and logits_TE.numel() > 0:
        return triton_kernels("router").router_statistics(logits_TE.contiguous(), gate_TK.contiguous())
    logits_TE, gate_TK = logits_TE.to(wide), gate_TK.to(wide)
    logsumexp_T = logits_TE.logsumexp(1)
    probability_TE = logits_TE.softmax(1)
    entropy_T = torch.special.entr(probability_TE).sum(1)
    highest = probability_TE.topk(min(2, logits_TE.shape[1]), 1).values
    margin_T = highest[:, 0] - (highest[:, 1] if highest.shape[1] == 2 else 0)
    return torch.stack([entropy_T.sum(), margin_T.sum(), gate_TK.norm(dim=1).sum(), logsumexp_T.square().sum()])


_statistics_op = define(
    "router_statistics(Tensor logits, Tensor gate) -> Tensor",
    _statistics,
    lambda logits_TE, gate_TK: logits_TE.new_empty(4, dtype=torch.promote_types(logits_TE.dtype, torch.float32)),
)
