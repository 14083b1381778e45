"""The expert MLP, one signature over several backends, and the reference among them."""

from __future__ import annotations

import logging
from functools import partial

import torch
from torch import Tensor

from moe_dtensor.kernels.experts import autograd
from moe_dtensor.kernels.experts.activation import activate, num_up_projections
from moe_dtensor.kernels.experts.exchange import PEERS
from moe_dtensor.kernels.experts.float8 import reference_gated_product, reference_product

_LOGGER = logging.getLogger(__name__)
_LOGGED: set[tuple[str, str]] = set()

BACKENDS = ("reference", "torch", "triton", "grouped_gemm", "quack")


def expert_mlp(
    x_TD: Tensor,
    w_up_EGFD: Tensor,
    w_down_EDF: Tensor,
    gate_TK: Tensor,
    expert_TK: Tensor,
    *,
    activation: str,
    backend: str = "auto",
    first_expert: int = 0,
    rows: str | int = "exact",
    num_experts: int | None = None,
    split_backward: bool = False,
    up_bias_EGF: Tensor | None = None,
    group: str | None = None,
    keep_rows: bool = False,
    float8: bool = False,
) -> Tensor:
    """Send each token to its K experts and sum their gate-weighted outputs: dropless, in a fixed order.

    ``y_t = sum_k gate_tk * W_down[e_tk] act(W_up[e_tk] x_t + b_up[e_tk])``, over those k whose expert is held here.

    Args:
        x_TD: tokens ``(T, D)``; T may be 0.
        w_up_EGFD: up-projections ``(E, G, F, D)`` of the experts ``first_expert .. first_expert + E - 1``.
        w_down_EDF: down-projections ``(E, D, F)`` of the same experts.
        gate_TK: weight of each choice ``(T, K)``, any floating dtype.
        expert_TK: global expert ids ``(T, K)``, int64. An id of -1 stands for no copy: a choice that was dropped, or
            that a token does not have. Such choices, and those for experts outside the held range, take up no row,
            contribute nothing and give their gate a gradient of 0, whatever the gate is (NaN too).
        activation: swiglu, geglu, swiglu_clamped, gelu, silu or relu2.
        backend: ``auto`` or one of :data:`BACKENDS`.
        first_expert: global id of the first expert held here.
        rows: how many rows of copies to allocate. A number is taken as it is: the caller knows that the copies held
            here are no more (nothing checks it on a GPU). Else, for a rank that holds only a part of the experts,
            ``exact`` reads the count from the device once, and ``worst`` takes the static bound ``T * min(K, E)``; a
            rank that holds them all takes T * K rows, without reading anything.
        num_experts: experts of all ranks. None: those held here, when ``first_expert`` is 0.
        split_backward: weights' gradients as nodes of their own, for schedules that run them apart; else one node.
        up_bias_EGF: added to the up-projections' outputs; None: nothing. Takes the nodes of ``split_backward``.
        group: of ranks that share the experts and reach each other's memory (:mod:`.exchange`). ``x_TD`` and the output
            are then a rank's own tokens, gates and ids those of all ranks, one rank after the other; the output is
            summed over them. Not with the backend ``reference``, nor with ``split_backward`` or a bias.
        keep_rows: keep the gathered rows of tokens for the gradient of ``w_up`` instead of gathering them once more.
        float8: products of rows read E4M3 (:mod:`.float8`). With the backends ``triton`` and ``reference``, without a
            group, ``split_backward`` or a bias.

    Returns:
        ``(T, D)`` in the dtype of ``x_TD``. Differentiable in x, both weights, the bias and the gate.

    Raises:
        ValueError: shapes that do not fit, an unknown backend, or sizes that the backend cannot take.
    """
    ranks = 1 if group is None else PEERS[group].ranks
    check_shapes(x_TD, w_up_EGFD, w_down_EDF, gate_TK, expert_TK, activation, ranks)
    if isinstance(rows, str) and rows not in ("exact", "worst"):
        raise ValueError(f"rows = {rows!r} is not known. Use exact, worst or a number of rows.")
    chosen = choose_backend(backend, x_TD, w_up_EGFD, float8)
    if float8 and (chosen not in ("triton", "reference") or group or split_backward or up_bias_EGF is not None):
        raise ValueError(f"float8 is for the backends triton and reference, as one node and without a bias: {chosen}.")
    _log_once(backend, chosen, x_TD)
    run = (
        partial(reference_mlp, float8=float8)
        if chosen == "reference"
        else partial(autograd.expert_mlp, backend=chosen, group=group, keep_rows=keep_rows, float8=float8)
    )
    if group is not None and (chosen == "reference" or split_backward or up_bias_EGF is not None):
        raise ValueError("A group needs one node of a backend other than reference, without a bias.")
    return run(
        x_TD,
        w_up_EGFD,
        w_down_EDF,
        gate_TK,
        expert_TK,
        activation=activation,
        first_expert=first_expert,
        rows=rows,
        num_experts=num_experts,
        split_backward=split_backward,
        up_bias_EGF=up_bias_EGF,
    )


def choose_backend(backend: str, x_TD: Tensor, w_up_EGFD: Tensor, float8: bool = False) -> str:
    """The backend in use: the one named, or for ``auto`` the fastest of ours and torch's that takes these sizes.

    ``auto`` is ``reference`` off CUDA, in float64, and where D or F are no multiple of 16 bytes. Elsewhere it is
    ``triton`` in bf16 and fp16 on Hopper, where it beat ``torch`` on every shape measured (``docs/log.md``), and
    ``torch`` on other GPUs and in float32. With ``float8`` it is ``triton`` or ``reference``.
    """
    if backend != "auto":
        if backend not in BACKENDS:
            raise ValueError(f"moe.backend = {backend!r} is not known. Use auto or one of {', '.join(BACKENDS)}.")
        return backend
    hidden, width = w_up_EGFD.shape[2:]
    size = 1 if float8 else x_TD.dtype.itemsize
    aligned = width * size % 16 == 0 and hidden * size % 16 == 0
    if not x_TD.is_cuda or x_TD.dtype == torch.float64 or not aligned:
        return "reference"
    if x_TD.dtype.itemsize == 2 and _is_hopper(x_TD.device.index):
        return "triton"
    return "reference" if float8 else "torch"


def _is_hopper(device: int) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


# What torch.compiler.assume_constant_result does, without loading the compiler to say it.
_is_hopper._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _log_once(backend: str, chosen: str, x_TD: Tensor) -> None:
    if torch.compiler.is_compiling() or (backend, chosen) in _LOGGED:
        return
    _LOGGED.add((backend, chosen))
    _LOGGER.info("experts: moe.backend = %s runs as %s (%s on %s)", backend, chosen, x_TD.dtype, x_TD.device)


def check_shapes(
    x_TD: Tensor,
    w_up_EGFD: Tensor,
    w_down_EDF: Tensor,
    gate_TK: Tensor,
    expert_TK: Tensor,
    activation: str,
    ranks: int = 1,
) -> None:
    """Raise ValueError unless the five tensors fit each other and the activation; gates and ids are of so many ranks'
    tokens."""
    experts, groups, hidden, width = w_up_EGFD.shape
    if groups != num_up_projections(activation):
        raise ValueError(
            f"{activation} takes {num_up_projections(activation)} up-projection(s), but w_up is (E, G, F, D) = "
            f"{tuple(w_up_EGFD.shape)}."
        )
    if tuple(w_down_EDF.shape) != (experts, width, hidden):
        raise ValueError(
            f"w_down is {tuple(w_down_EDF.shape)}, but w_up asks for (E, D, F) = {(experts, width, hidden)}."
        )
    if x_TD.dim() != 2 or x_TD.shape[1] != width:
        raise ValueError(f"x is {tuple(x_TD.shape)}, but the weights ask for (T, {width}).")
    if gate_TK.shape != expert_TK.shape or gate_TK.dim() != 2 or gate_TK.shape[0] != ranks * x_TD.shape[0]:
        raise ValueError(
            f"gate {tuple(gate_TK.shape)} and expert {tuple(expert_TK.shape)} must both be (T, K) with T = "
            f"{ranks * x_TD.shape[0]}."
        )
    if expert_TK.dtype != torch.int64:
        raise ValueError(f"expert ids must be int64, not {expert_TK.dtype}.")


def reference_mlp(
    x_TD: Tensor,
    w_up_EGFD: Tensor,
    w_down_EDF: Tensor,
    gate_TK: Tensor,
    expert_TK: Tensor,
    *,
    activation: str,
    first_expert: int = 0,
    rows: str | int = "exact",
    num_experts: int | None = None,
    split_backward: bool = False,
    up_bias_EGF: Tensor | None = None,
    float8: bool = False,
) -> Tensor:
    """:func:`expert_mlp` as a plain loop over experts, which every other backend is tested against.

    Any device and dtype; ``rows``, ``num_experts`` and ``split_backward`` change nothing.
    """
    tokens, choices = expert_TK.shape
    width, experts = x_TD.shape[1], w_up_EGFD.shape[0]
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    local_TK = expert_TK - first_expert
    held_TK = (local_TK >= 0) & (local_TK < experts)
    # unbind, not indexing: its backward stacks the gradients, where E selects would make E full-size zero tensors.
    weights = zip(w_up_EGFD.unbind(), w_down_EDF.unbind(), strict=True)
    biases = [None] * experts if up_bias_EGF is None else up_bias_EGF.unbind()
    gate_TK = gate_TK.to(wide).where(held_TK, 0)
    where, copies = [], []
    # Experts without tokens go through as well, so that their weights get zeros for a gradient and not None.
    for expert, ((w_up_GFD, w_down_DF), up_bias_GF) in enumerate(zip(weights, biases, strict=True)):
        where.append((local_TK.flatten() == expert).nonzero().flatten())
        x_nD, w_up_PD = x_TD[where[-1] // choices], w_up_GFD.flatten(0, 1)
        h_nGF = (reference_product(x_nD, w_up_PD) if float8 else x_nD @ w_up_PD.T).unflatten(1, w_up_GFD.shape[:2])
        h_nGF = h_nGF if up_bias_GF is None else h_nGF + up_bias_GF
        a_nF = activate(h_nGF, activation)
        if float8:
            copies.append(reference_gated_product(a_nF, w_down_DF, gate_TK.flatten()[where[-1]]))
        else:
            copies.append(a_nF @ w_down_DF.T)
    assert experts == len(copies)
    y_nD = torch.cat(copies)
    y_TKD = y_nD.new_zeros(tokens * choices, width).index_copy(0, torch.cat(where), y_nD).view(tokens, choices, width)
    y_TKD = y_TKD if float8 else y_TKD.to(wide) * gate_TK.unsqueeze(-1)
    return y_TKD.sum(1).to(x_TD.dtype)
