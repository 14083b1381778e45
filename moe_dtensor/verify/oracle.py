"""What every mesh must reproduce: one training step, written a second time, as plainly as it can be.

One process, float64, a Python loop over experts and tokens. It shares nothing with what it judges but
the config: no module, no kernel, no DTensor, no fused call. Where there is a choice it takes another road
than the library does (complex numbers for the rotation, products of probabilities for Sinkhorn).

B sequences, S positions, D width, H heads, C head width, V vocabulary, T = B*S tokens, E experts, K choices,
F hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dtensor.config.schema import Config

IGNORED = -100


@dataclass(frozen=True)
class Microbatch:
    """``(B, S)`` int64 each; a label of -100 is no target; documents number the document of each token."""

    tokens: Tensor
    labels: Tensor
    documents: Tensor | None = None


@dataclass(frozen=True)
class Answer:
    """One step. ``counts[i]`` is ``(E,)``; ``routing[i]`` holds a ``(T, K)`` of chosen experts per microbatch."""

    loss: float
    gradients: dict[str, Tensor]
    grad_norm: float
    parameters: dict[str, Tensor]
    counts: dict[int, Tensor]
    routing: dict[int, list[Tensor]]


def one_step(config: Config, initial: Mapping[str, Tensor], microbatches: Sequence[Microbatch]) -> Answer:
    """Loss, gradients, one clipped AdamW step and the routing of a whole global batch.

    Args:
        config: resolved, with the vocabulary's size; its mesh is not looked at.
        initial: every full parameter by its checkpoint name.
        microbatches: the global batch in order.
    """
    weights = {name: value.detach().double().requires_grad_() for name, value in initial.items()}
    targets = sum(int((m.labels != IGNORED).sum()) for m in microbatches)
    model = _Transformer(config, weights)
    loss = torch.zeros((), dtype=torch.float64)
    for microbatch in microbatches:
        part = _cross_entropy(model.logits(microbatch), microbatch.labels.reshape(-1)) / targets
        part.backward()
        loss = loss + part.detach()
    gradients = {n: torch.zeros_like(w) if w.grad is None else w.grad for n, w in weights.items()}
    norm = gradient_norm(gradients, config.training.norm_type)
    counts = {i: _histogram(torch.cat(chosen), config.moe.num_experts) for i, chosen in model.routing.items()}
    parameters = adamw_step(config, {n: w.detach() for n, w in weights.items()}, gradients, norm)
    return Answer(float(loss), gradients, norm, parameters, counts, model.routing)


def gradient_norm(gradients: Mapping[str, Tensor], order: float) -> float:
    """The 2-norm, or the largest magnitude (``inf``), of all gradients taken as one vector."""
    if order == math.inf:
        return max(float(g.abs().max()) for g in gradients.values())
    return math.sqrt(sum(float((g * g).sum()) for g in gradients.values()))


def adamw_step(
    config: Config, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor], norm: float
) -> dict[str, Tensor]:
    """The first AdamW update (arXiv:1711.05101) after clipping; bias correction leaves g and g² as the moments."""
    optimizer, limit = config.optimizer, config.training.max_grad_norm
    clip = min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0
    lr = first_learning_rate(config)
    after = {}
    for name, value in parameters.items():
        gradient = gradients[name] * clip
        kept = 1.0 if _undecayed(name) else 1.0 - lr * optimizer.weight_decay
        after[name] = value * kept - lr * gradient / (gradient.abs() + optimizer.eps)
    return after


def first_learning_rate(config: Config) -> float:
    """Learning rate of step 1: one warm-up step up from 0, or the peak when there is no warm-up."""
    return config.optimizer.lr / max(1, config.lr_scheduler.warmup_steps)


def _undecayed(name: str) -> bool:
    return "norm" in name or "router" in name or name.startswith("tok_embeddings")


def _histogram(chosen_TK: Tensor, num_experts: int) -> Tensor:
    return torch.stack([(chosen_TK == e).sum() for e in range(num_experts)])


def _cross_entropy(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """Summed over the targets."""
    rows = [t for t in range(labels_T.numel()) if labels_T[t] != IGNORED]
    shifted = logits_TV - logits_TV.detach().max(dim=1, keepdim=True).values
    log_p = shifted - shifted.exp().sum(dim=1, keepdim=True).log()
    return -log_p[rows, labels_T[rows]].sum()


class _Transformer:
    def __init__(self, config: Config, weights: Mapping[str, Tensor]) -> None:
        self.config = config
        self.weights = weights
        self.routing: dict[int, list[Tensor]] = {}

    def logits(self, microbatch: Microbatch) -> Tensor:
        """``(T, V)`` of one microbatch."""
        x_BSD = self.weights["tok_embeddings.weight"][microbatch.tokens]
        for i in range(self.config.model.num_layers):
            block = f"layers.{i}."
            h_BSD = self._norm(block + "attention_norm", x_BSD)
            x_BSD = x_BSD + self._attention(block + "attention.", h_BSD, microbatch)
            h_TD = self._norm(block + "ffn_norm", x_BSD).flatten(0, 1)
            if block + "moe.router.weight" in self.weights:
                y_TD = self._experts(i, h_TD, microbatch.tokens.shape[0])
            else:
                y_TD = self._feed_forward(block + "feed_forward.", h_TD)
            x_BSD = x_BSD + y_TD.view_as(x_BSD)
        head = "tok_embeddings.weight" if self.config.model.tie_embeddings else "output.weight"
        return self._norm("norm", x_BSD).flatten(0, 1) @ self.weights[head].T

    def _norm(self, name: str, x: Tensor) -> Tensor:
        if self.config.model.norm == "layernorm":
            x = x - x.mean(-1, keepdim=True)
        return self._rms(name, x)

    def _attention(self, prefix: str, x_BSD: Tensor, microbatch: Microbatch) -> Tensor:
        model = self.config.model
        B, S, _ = x_BSD.shape
        q, k, v = (x_BSD @ self.weights[f"{prefix}{name}.weight"].T for name in ("wq", "wk", "wv"))
        if model.qk_norm == "full":
            q, k = self._rms(prefix + "q_norm", q), self._rms(prefix + "k_norm", k)
        q, k, v = (t.reshape(B, S, -1, model.head_dim) for t in (q, k, v))
        if model.qk_norm == "head":
            q, k = self._rms(prefix + "q_norm", q), self._rms(prefix + "k_norm", k)
        visible_BSS = torch.ones(S, S, dtype=torch.bool).tril().expand(B, S, S)
        positions_BS = torch.arange(S).expand(B, S)
        if microbatch.documents is not None:
            documents = microbatch.documents
            visible_BSS = visible_BSS & (documents[:, :, None] == documents[:, None, :])
            positions_BS = positions_BS - _first_positions(documents)
        q, k = self._rotate(q, positions_BS), self._rotate(k, positions_BS)
        heads = []
        for h in range(model.num_heads):
            group = h * model.num_kv_heads // model.num_heads
            scores_BSS = q[:, :, h] @ k[:, :, group].transpose(1, 2) / math.sqrt(model.head_dim)
            weight_BSS = (scores_BSS - scores_BSS.detach().amax(-1, keepdim=True)).exp() * visible_BSS
            heads.append(weight_BSS / weight_BSS.sum(-1, keepdim=True) @ v[:, :, group])
        return torch.cat(heads, dim=-1) @ self.weights[prefix + "wo.weight"].T

    def _rms(self, name: str, x: Tensor) -> Tensor:
        root = ((x * x).mean(-1, keepdim=True) + self.config.model.norm_eps).sqrt()
        return x / root * self.weights[name + ".weight"]

    def _rotate(self, x_BSHC: Tensor, positions_BS: Tensor) -> Tensor:
        """Pair (j, j + C/2) is a complex number, turned by position * theta^(-2j/C)."""
        half, theta = self.config.model.head_dim // 2, self.config.model.rope_theta
        frequency = torch.tensor([theta ** (-j / half) for j in range(half)], dtype=torch.float64)
        turn = torch.polar(torch.ones(1, dtype=torch.float64), positions_BS[:, :, None, None] * frequency)
        z = torch.complex(x_BSHC[..., :half].contiguous(), x_BSHC[..., half:].contiguous()) * turn
        return torch.cat([z.real, z.imag], dim=-1)

    def _activate(self, hidden: Tensor, gate: Tensor | None) -> Tensor:
        name = self.config.model.activation
        x = hidden if gate is None else gate
        if name in ("swiglu", "silu"):
            x = x / (1 + (-x).exp())
        elif name in ("geglu", "gelu"):
            x = x * (1 + torch.erf(x / math.sqrt(2))) / 2
        elif name == "relu2":
            x = x * x * (x > 0)
        return x if gate is None else x * hidden

    def _feed_forward(self, prefix: str, x_TD: Tensor) -> Tensor:
        gated = prefix + "gate.weight" in self.weights
        gate = x_TD @ self.weights[prefix + "gate.weight"].T if gated else None
        hidden = x_TD @ self.weights[prefix + "up.weight"].T
        return self._activate(hidden, gate) @ self.weights[prefix + "down.weight"].T

    def _experts(self, layer: int, x_TD: Tensor, sequences: int) -> Tensor:
        prefix = f"layers.{layer}.moe."
        logits_TE = x_TD @ self.weights[prefix + "router.weight"].T
        chosen_TK, gate_TK = self._route(logits_TE, sequences)
        self.routing.setdefault(layer, []).append(chosen_TK)
        up_EGFD, down_EDF = (self.weights[f"{prefix}experts.{name}"].unbind(0) for name in ("w_up", "w_down"))
        parts: list[list[Tensor]] = [[] for _ in x_TD]
        for e in range(self.config.moe.num_experts):
            for t, k in (chosen_TK == e).nonzero().tolist():
                *gate, hidden = up_EGFD[e] @ x_TD[t]
                parts[t].append(gate_TK[t, k] * (down_EDF[e] @ self._activate(hidden, gate[0] if gate else None)))
        y_TD = torch.stack([sum(part[1:], part[0]) for part in parts])
        if self.config.moe.num_shared_experts:
            y_TD = y_TD + self._feed_forward(prefix + "shared.", x_TD)
        return y_TD

    def _route(self, logits_TE: Tensor, sequences: int) -> tuple[Tensor, Tensor]:
        """Chosen experts and their gates, both ``(T, K)``. No gradient flows through the choice."""
        moe = self.config.moe
        scores_TE = logits_TE.detach()
        if moe.router == "sinkhorn":
            groups = scores_TE.reshape(sequences // moe.group_sequences, -1, moe.num_experts)
            scores_TE = torch.cat([_sinkhorn(group, moe.sinkhorn_iterations) for group in groups])
        elif moe.router != "topk":
            raise ValueError(f"The oracle knows the routers sinkhorn and topk, not {moe.router!r}.")
        # A stable sort sends ties to the lower index.
        chosen_TK = scores_TE.sort(dim=1, descending=True, stable=True).indices[:, : moe.top_k]
        if moe.router == "sinkhorn" and moe.top_k == 1:
            gate_TE = 1 / (1 + (-logits_TE).exp())
        else:
            exp_TE = (logits_TE - _row_max(logits_TE)).exp()
            gate_TE = exp_TE / exp_TE.sum(1, keepdim=True)
        return chosen_TK, gate_TE.gather(1, chosen_TK)


def _row_max(logits_TE: Tensor) -> Tensor:
    """``(T, 1)``: the shift that keeps exp from overflowing; it cancels, so it needs no gradient."""
    return logits_TE.detach().max(dim=1, keepdim=True).values


def _sinkhorn(logits_TE: Tensor, iterations: int) -> Tensor:
    """Rows scaled to sum 1, then columns to sum T/E, ``iterations`` times over (Sinkhorn and Knopp, 1967)."""
    p_TE = (logits_TE - logits_TE.max()).exp()
    tokens, experts = p_TE.shape
    for _ in range(iterations):
        p_TE = p_TE / p_TE.sum(1, keepdim=True)
        p_TE = p_TE / p_TE.sum(0, keepdim=True) * (tokens / experts)
    return p_TE


def _first_positions(documents_BS: Tensor) -> Tensor:
    """Position at which each token's document starts in its sequence."""
    first = torch.zeros_like(documents_BS)
    for b, row in enumerate(documents_BS.tolist()):
        for s, document in enumerate(row):
            first[b, s] = s if s == 0 or document != row[s - 1] else first[b, s - 1]
    return first
