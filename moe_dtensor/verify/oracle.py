"""What every mesh must reproduce: training steps, written a second time, as plainly as they can be.

One process, float64, a Python loop over experts and tokens. It shares nothing with what it judges but
the config: no module, no kernel, no DTensor, no fused call. Where there is a choice it takes another road
than the library does (complex numbers for the rotation, products of probabilities for Sinkhorn). Routing is in
:mod:`moe_dtensor.verify.oracle_routing`, attention in :mod:`moe_dtensor.verify.oracle_attention`, experts in float8 in
:mod:`moe_dtensor.verify.oracle_float8`.

B sequences, S positions, D width, H heads, C head width, V vocabulary, T = B*S tokens, E experts, K choices,
F hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_dtensor.config.resolve import moe_layers
from moe_dtensor.config.schema import Config
from moe_dtensor.verify import oracle_float8
from moe_dtensor.verify.oracle_attention import Attention
from moe_dtensor.verify.oracle_routing import Balance, Routed, histogram, jitter, place, route

IGNORED = -100


@dataclass(frozen=True)
class Microbatch:
    """``(B, S)`` int64 each; a label of -100 is no target; documents number the document of each token."""

    tokens: Tensor
    labels: Tensor
    documents: Tensor | None = None
    numbers: Sequence[int] | None = None
    """Of its sequences in the run. None: from 0."""


Batch = Sequence[Microbatch]
"""A step's global batch in order."""


@dataclass(frozen=True)
class Answer:
    """One step. Of each MoE block, by index: ``counts`` and ``bias`` ``(E,)``, the diagnostics ``means`` by name, and
    for every microbatch the experts chosen and whether each was kept, ``(T, K)``."""

    loss: float
    mtp_losses: list[float]
    """Of each depth of multi-token prediction, over the step's targets."""
    gradients: dict[str, Tensor]
    grad_norm: float
    parameters: dict[str, Tensor]
    counts: dict[int, Tensor]
    bias: dict[int, Tensor]
    means: dict[int, dict[str, float]]
    routing: dict[int, list[Tensor]]
    kept: dict[int, list[Tensor]]
    first_moments: dict[str, Tensor]
    second_moments: dict[str, Tensor]
    updates: int
    """Steps until now whose update was applied."""
    validation: float | None
    """Loss of the same batch after the step, routed as in evaluation, and the experts chosen there; None where there is
    no evaluation: after the first of several steps, so that two follow each other."""
    validation_routing: dict[int, list[Tensor]]


def one_step(
    config: Config, initial: Mapping[str, Tensor], batch: Batch, bias: Mapping[int, Tensor] | None = None
) -> Answer:
    """The first of :func:`steps`."""
    return steps(config, initial, [batch], bias)[0]


def steps(
    config: Config,
    initial: Mapping[str, Tensor],
    batches: Sequence[Batch],
    bias: Mapping[int, Tensor] | None = None,
    skipped: Collection[int] = (),
) -> list[Answer]:
    """Loss, gradients, one clipped AdamW step, routing and evaluation of each global batch, one after the other.

    Args:
        config: resolved, with the vocabulary's size; its mesh is not looked at.
        initial: every full parameter by its checkpoint name.
        batches: one for each step.
        bias: what each MoE block's choice starts with, ``(E,)`` float32 by the block's index; None: 0.
        skipped: steps, from 1, whose gradient norm is infinite: nothing is updated, no bias moves.
    """
    adamw = AdamW(config, {name: value.detach().double() for name, value in initial.items()})
    experts = config.moe.num_experts
    balance = {i: Balance(bias[i] if bias else torch.zeros(experts), [0] * experts) for i in sorted(moe_layers(config))}
    answers = []
    for number, batch in enumerate(batches, 1):
        weights = {name: value.clone().requires_grad_() for name, value in adamw.parameters.items()}
        model = Transformer(config, weights, balance)
        loss, *mtp_losses = _differentiate(model, batch)
        gradients = {n: torch.zeros_like(w) if w.grad is None else w.grad for n, w in weights.items()}
        frozen = {n for n in gradients if config.optimizer.router_lr == 0 and ".router." in n}
        used = {n: torch.zeros_like(g) if n in frozen else g for n, g in gradients.items()}
        norm = math.inf if number in skipped else gradient_norm(used, config.training.norm_type)
        if number not in skipped:
            adamw.step(used, norm, learning_rate(config, number))
        load = {i: _load(routed, experts) for i, routed in model.routed.items()}
        means = {i: _means(of_block(config, i), routed) for i, routed in model.routed.items()}
        for i in means:
            means[i]["churn"] = balance[i].churn(load[i])
        rate = 0.0 if number in skipped else config.moe.bias_rate
        balance = {i: balance[i].after(rate, load[i]) for i in balance}
        validation: float | None = None
        evaluated: dict[int, list[Routed]] = {}
        if number > 1 or len(batches) == 1:
            validation, evaluated = _evaluate(config, adamw.parameters, balance, batch)
        answers.append(
            Answer(
                loss,
                mtp_losses,
                gradients,
                norm,
                dict(adamw.parameters),
                {i: torch.tensor(counts) for i, counts in load.items()},
                {i: state.bias for i, state in balance.items()},
                means,
                {i: [r.chosen_TK for r in routed] for i, routed in model.routed.items()},
                {i: [r.kept_TK for r in routed] for i, routed in model.routed.items()},
                dict(adamw.first),
                dict(adamw.second),
                adamw.steps,
                validation,
                {i: [r.chosen_TK for r in routed] for i, routed in evaluated.items()},
            )
        )
    return answers


def _load(routed: Sequence[Routed], experts: int) -> list[int]:
    """How many choices each expert has over all microbatches."""
    return histogram([e for r in routed for e in _lists(r.chosen_TK)], experts)


def _differentiate(model: Transformer, batch: Batch) -> list[float]:
    """Backward through all microbatches; the cross-entropies of the next and of further tokens, in which no auxiliary
    loss is counted."""
    targets = sum(int((m.labels != IGNORED).sum()) for m in batch)
    tokens = sum(m.tokens.numel() for m in batch)
    depths = model.config.model.mtp_depth
    losses = [0.0] * (1 + depths)
    for microbatch in batch:
        labels = [microbatch.labels.reshape(-1), *(_labels_ahead(microbatch, k + 1) for k in range(depths))]
        logits = model.logits(microbatch)
        parts = [cross_entropy(*pair) / targets for pair in zip(logits, labels, strict=True)]
        auxiliary = sum((r[-1].auxiliary for r in model.routed.values()), torch.zeros((), dtype=torch.float64)) / tokens
        weights = [1.0] + [model.config.training.mtp_weight / max(1, depths)] * depths
        torch.stack([w * part for w, part in zip(weights, parts, strict=True)] + [auxiliary]).sum().backward()
        losses = [loss + float(part.detach()) for loss, part in zip(losses, parts, strict=True)]
    return losses


@torch.no_grad()
def _evaluate(
    config: Config, parameters: Mapping[str, Tensor], balance: Mapping[int, Balance], batch: Batch
) -> tuple[float, dict[int, list[Routed]]]:
    """The mean cross-entropy of all targets, and the routing of each MoE block."""
    model = Transformer(config, parameters, balance, training=False)
    total = sum(float(cross_entropy(model.logits(m)[0], m.labels.reshape(-1))) for m in batch)
    return total / sum(int((m.labels != IGNORED).sum()) for m in batch), model.routed


def _means(config: Config, routed: Sequence[Routed]) -> dict[str, float]:
    """The diagnostics over all tokens of a step; dropped copies over all copies."""
    tokens = sum(len(r.chosen_TK) for r in routed)
    means = {name: sum(r.sums[name] for r in routed) / tokens for name in routed[0].sums}
    return means | {"dropped": means["dropped"] / config.moe.top_k}


def of_block(config: Config, layer: int) -> Config:
    """The config with the number of choices and the router of one block."""
    moe, last = config.moe, config.model.num_layers - 1
    numbers, names = moe.top_k_by_layer or [moe.top_k], moe.router_by_layer or [moe.router]
    at = layer if layer < last else last
    return replace(config, moe=replace(moe, top_k=numbers[at % len(numbers)], router=names[at % len(names)]))


def _lists(chosen_TK: Tensor) -> list[list[int]]:
    return [[e for e in row if e >= 0] for row in chosen_TK.tolist()]


def gradient_norm(gradients: Mapping[str, Tensor], order: float) -> float:
    """The 2-norm, or the largest magnitude (``inf``), of all gradients taken as one vector."""
    if order == math.inf:
        return max(float(g.abs().max()) for g in gradients.values())
    return math.sqrt(sum(float((g * g).sum()) for g in gradients.values()))


class AdamW:
    """Clipping and AdamW (arXiv:1711.05101) over parameters by name."""

    def __init__(self, config: Config, parameters: Mapping[str, Tensor]) -> None:
        self.config = config
        self.parameters = dict(parameters)
        self.first = {name: torch.zeros_like(value) for name, value in parameters.items()}
        self.second = {name: torch.zeros_like(value) for name, value in parameters.items()}
        self.steps = 0

    def step(self, gradients: Mapping[str, Tensor], norm: float, lr: float) -> None:
        """New parameters; the old tensors stay as they are."""
        optimizer, limit = self.config.optimizer, self.config.training.max_grad_norm
        clip = min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0
        self.steps += 1
        for name, value in self.parameters.items():
            g = gradients[name] * clip
            self.first[name] = optimizer.beta1 * self.first[name] + (1 - optimizer.beta1) * g
            self.second[name] = optimizer.beta2 * self.second[name] + (1 - optimizer.beta2) * g * g
            m = self.first[name] / (1 - optimizer.beta1**self.steps)
            v = self.second[name] / (1 - optimizer.beta2**self.steps)
            kept = 1.0 if _undecayed(name) else 1.0 - lr * optimizer.weight_decay
            rate = lr * (optimizer.router_lr if ".router." in name else 1.0)
            self.parameters[name] = value * kept - rate * m / (v.sqrt() + optimizer.eps)


def learning_rate(config: Config, step: int) -> float:
    """Of a step from 1: up from 0 over the warm-up, then the peak, from which the oracle knows no way down.

    Raises:
        ValueError: the step is one of the decay's.
    """
    schedule, peak = config.lr_scheduler, config.optimizer.lr
    if step > max(1, schedule.warmup_steps) and schedule.decay != "constant":
        raise ValueError(f"Step {step} is beyond lr_scheduler.warmup_steps = {schedule.warmup_steps}.")
    return peak * min(1.0, step / max(1, schedule.warmup_steps))


def _undecayed(name: str) -> bool:
    return "norm" in name or "router" in name or name.endswith(("bias", "sinks")) or name.startswith("tok_embeddings")


def cross_entropy(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """Summed over the targets."""
    rows = [t for t in range(labels_T.numel()) if labels_T[t] != IGNORED]
    shifted = logits_TV - logits_TV.detach().max(dim=1, keepdim=True).values
    log_p = shifted - shifted.exp().sum(dim=1, keepdim=True).log()
    return -log_p[rows, labels_T[rows]].sum()


class Transformer:
    """The model over full weights by name.

    Args:
        config: resolved.
        weights: of every parameter, float64.
        balance: of each MoE block, by index.
        training: whether further tokens are predicted too.
    """

    def __init__(
        self, config: Config, weights: Mapping[str, Tensor], balance: Mapping[int, Balance], training: bool = True
    ) -> None:
        self.config = config
        self.training = training
        self.weights = weights
        self.balance = balance
        self.routed: dict[int, list[Routed]] = {}

    def logits(self, microbatch: Microbatch) -> list[Tensor]:
        """``(T, V)`` of one microbatch, V without padding: of the next token, then in training of each further one."""
        model = self.config.model
        embedding = model.embedding_scale * self.weights["tok_embeddings.weight"]
        x_BSD = embedding[microbatch.tokens]
        for i in range(model.num_layers):
            x_BSD = self._block(i, x_BSD, microbatch)
        x_BSD = self._norm("norm", x_BSD)
        logits = [self._head(x_BSD)]
        for k in range(model.mtp_depth if self.training else 0):
            block = f"layers.{model.num_layers + k}.mtp_"
            length = microbatch.tokens.shape[1]
            ahead_BS = microbatch.tokens[:, [min(s + k + 1, length - 1) for s in range(length)]]
            e_BSD = self._norm(block + "embedding_norm", embedding[ahead_BS])
            joined_BSD = torch.cat([e_BSD, self._norm(block + "stream_norm", x_BSD)], -1)
            x_BSD = joined_BSD @ self.weights[block + "projection.weight"].T
            x_BSD = self._block(model.num_layers + k, x_BSD, microbatch)
            logits.append(self._head(self._norm(block + "norm", x_BSD)))
        return logits

    def _head(self, x_BSD: Tensor) -> Tensor:
        head = "tok_embeddings.weight" if self.config.model.tie_embeddings else "output.weight"
        weight_VD = self.weights[head][: self.config.model.vocab_size]
        bias_V = self.weights["output.bias"][: len(weight_VD)] if self.config.model.head_bias else 0
        return x_BSD.flatten(0, 1) @ weight_VD.T * self.config.model.logit_scale + bias_V

    def _block(self, index: int, x_BSD: Tensor, microbatch: Microbatch) -> Tensor:
        block, scale = f"layers.{index}.", self.config.model.residual_scale
        h_BSD = self._norm(block + "attention_norm", x_BSD)
        y_BSD = self._attention(index, h_BSD, microbatch)
        attended_BSD = x_BSD + scale * self._norm(block + "attention_post_norm", y_BSD)
        h_TD = self._norm(block + "ffn_norm", x_BSD if self.config.model.parallel_block else attended_BSD).flatten(0, 1)
        if block + "moe.router.weight" in self.weights:
            y_TD = self._experts(index, h_TD, microbatch)
        else:
            y_TD = self._feed_forward(block + "feed_forward.", h_TD)
        return attended_BSD + scale * self._norm(block + "ffn_post_norm", y_TD).view_as(x_BSD)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        """As it is where the config puts no norm."""
        if name + ".weight" not in self.weights:
            return x
        if self.config.model.norm == "layernorm":
            x = x - x.mean(-1, keepdim=True)
        return self._rms(name, x) + self.weights.get(name + ".bias", 0)

    def _attention(self, layer: int, x_BSD: Tensor, microbatch: Microbatch) -> Tensor:
        prefix = f"layers.{layer}.attention."
        attention = Attention(self.config, layer, {n.removeprefix(prefix): w for n, w in self.weights.items()})
        return attention.run(x_BSD, microbatch.documents)

    def _rms(self, name: str, x: Tensor) -> Tensor:
        root = ((x * x).mean(-1, keepdim=True) + self.config.model.norm_eps).sqrt()
        return x / root * self.weights[name + ".weight"]

    def _activate(self, hidden: Tensor, gate: Tensor | None) -> Tensor:
        name = self.config.model.activation
        x = hidden if gate is None else gate
        if name == "swiglu_clamped":
            x = torch.where(x < 7, x, 7.0)
            x, hidden = x / (1 + (-1.702 * x).exp()), 1 + torch.where(hidden.abs() < 7, hidden, 7.0 * hidden.sign())
        if name in ("swiglu", "silu"):
            x = x / (1 + (-x).exp())
        elif name in ("geglu", "gelu"):
            x = x * (1 + torch.erf(x / math.sqrt(2))) / 2
        elif name == "relu2":
            x = x * x * (x > 0)
        return x if gate is None else x * hidden

    def _feed_forward(self, prefix: str, x_TD: Tensor) -> Tensor:
        gated = prefix + "gate.weight" in self.weights
        biases = {name: self.weights.get(prefix + name, 0) for name in ("gate.bias", "up.bias", "output_bias")}
        gate = x_TD @ self.weights[prefix + "gate.weight"].T + biases["gate.bias"] if gated else None
        hidden = x_TD @ self.weights[prefix + "up.weight"].T + biases["up.bias"]
        return self._activate(hidden, gate) @ self.weights[prefix + "down.weight"].T + biases["output_bias"]

    def _experts(self, layer: int, x_TD: Tensor, microbatch: Microbatch) -> Tensor:
        prefix, config = f"layers.{layer}.moe.", of_block(self.config, layer)
        at = place(self.config, layer, microbatch.tokens, microbatch.numbers or range(len(microbatch.tokens)))
        seen_TD = jitter(self.config, x_TD, at) if self.config.moe.jitter and self.training else x_TD
        logits_TE = seen_TD @ self.weights[prefix + "router.weight"].T
        if self.config.moe.router_bias:
            logits_TE = logits_TE + self.weights[prefix + "router.logit_bias"]
        routed = route(config, logits_TE, at, self.balance[layer], self.training)
        self.routed.setdefault(layer, []).append(routed)
        up_EGFD, down_EDF = (self.weights[f"{prefix}experts.{name}"].unbind(0) for name in ("w_up", "w_down"))
        parts: list[list[Tensor]] = [[torch.zeros_like(x)] for x in x_TD]
        in_float8 = self.config.moe.expert_dtype == "float8"
        for e in range(self.config.moe.num_experts):
            float8 = oracle_float8.expert(up_EGFD[e], down_EDF[e], self._activate) if in_float8 else None
            for t, k in ((routed.chosen_TK == e) & routed.kept_TK).nonzero().tolist():
                weight = routed.gate_TK[t, k]
                before, after = (weight, 1) if self.config.moe.gate_on == "input" else (1, weight)
                if float8:
                    parts[t].append(float8(before * x_TD[t], after))
                    continue
                h_GF = up_EGFD[e] @ (before * x_TD[t])
                if self.config.moe.expert_bias:
                    h_GF = h_GF + self.weights[prefix + "experts.up_bias"][e]
                *gate, hidden = h_GF
                y_D = down_EDF[e] @ self._activate(hidden, gate[0] if gate else None)
                if self.config.moe.expert_bias:
                    y_D = y_D + self.weights[prefix + "down_bias"][e]
                parts[t].append(after * y_D)
        y_TD = torch.stack([sum(part[1:], part[0]) for part in parts])
        if prefix + "shared.up.weight" in self.weights:
            shared_TD = self._feed_forward(prefix + "shared.", x_TD)
            if self.config.moe.shared_gate:
                logit_T1 = x_TD @ self.weights[prefix + "shared.token_gate.weight"].T
                shared_TD = shared_TD / (1 + (-logit_T1).exp())
            y_TD = y_TD + shared_TD
        return y_TD


def _labels_ahead(microbatch: Microbatch, depth: int) -> Tensor:
    """``(T,)``: the label ``depth`` positions on, if every label from here to there is one, all of one document."""
    labels, documents = microbatch.labels, microbatch.documents
    result = torch.full_like(labels, IGNORED)
    for b, row in enumerate(labels.tolist()):
        for s in range(len(row) - depth):
            apart = documents is not None and documents[b, s] != documents[b, s + depth]
            if IGNORED not in row[s : s + depth + 1] and not apart:
                result[b, s] = row[s + depth]
    return result.flatten()
