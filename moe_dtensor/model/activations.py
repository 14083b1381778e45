"""Bytes that a block keeps between its forward and its backward pass, by arithmetic. Loads no torch.

Counted is what autograd saves on a GPU, term by term from ``layers/`` and ``kernels/``. T are the tokens of a
microbatch, t those of one tp rank's slice of the sequence (T / tp under sequence parallelism, else T), D the width,
F an expert's hidden width, G 2 for gated activations and else 1, E experts, K choices, N rows of copies at hand.

Compiled, inductor chooses what to save, and its cut through the graph comes to the same but for two things: a
whole-width norm of queries and keys keeps its input in the compute dtype (eager: in float32, and the result too), and
of a dense gated feed-forward ``act(gate)`` is recomputed. What a matrix product's or the attention's backward reads
(normalised x, rotated q and k) it saves although it could recompute it from the norm's input: torch's partitioner
does not recompute what the backward pass would have to write to memory again.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_dtensor.config.resolve import GATED, padded_vocab
from moe_dtensor.config.schema import Config

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class BlockBytes:
    """One block and one microbatch."""

    kept: int
    """From forward to backward, under the configured recomputation; its input included, its output not."""
    backward: int
    """What its backward pass needs beside that at its highest: what it recomputes, and gradients of activations."""


@dataclass(frozen=True)
class Tokens:
    """Sizes that all terms share."""

    whole: int
    """T."""
    own: int
    """t."""
    compute: int
    """Bytes of an element in ``training.param_dtype``."""
    wide: int
    """The same, at least float32: gates, logits of the router, statistics."""


def tokens(config: Config) -> Tokens:
    """Sizes of a microbatch on one rank of a resolved config."""
    training, mesh = config.training, config.mesh
    whole = training.microbatch_size * training.seq_len
    own = whole // mesh.tp if mesh.sequence_parallel else whole
    compute = BYTES[training.param_dtype]
    return Tokens(whole, own, compute, max(4, compute))


def expert_rows(config: Config, skewed: bool) -> int:
    """N: rows of copies that a rank computes in one MoE block.

    Balanced, each rank gets its share of the T * K copies. Skewed, all tokens prefer one rank's experts, and it gets
    ``T * min(K, E / tp)`` under all-gather dispatch. At tp = 1 both are T * K: no copy is ever dropped.
    """
    moe, tp = config.moe, config.mesh.tp
    size = tokens(config).whole
    return size * min(moe.top_k, moe.num_experts // tp) if skewed else size * moe.top_k // tp


def block_bytes(config: Config, is_moe: bool, skewed: bool = False) -> BlockBytes:
    """What a block keeps and needs, for one microbatch on one rank of a resolved config."""
    at = tokens(config)
    rows = expert_rows(config, skewed) if is_moe else 0
    stream = at.own * config.model.dim * at.compute
    ffn = _experts(config, at, rows) if is_moe else _dense(config, at, config.model.hidden_dim)
    everything = 2 * stream + _attention(config, at) + ffn
    mode = config.activation_checkpoint.mode
    kept = {"none": everything, "full": stream}.get(mode) or stream + _selected(config, at, is_moe, rows)
    return BlockBytes(kept, everything - kept + _gradients(config, at, is_moe, rows))


def head_bytes(config: Config) -> tuple[int, int]:
    """``(kept, logits)`` of the last stage: the norm's input to the head, and the logits over a rank's vocabulary.

    Cross-entropy turns the logits into their gradient in place. A loss of your own gets a copy of the whole
    vocabulary.
    """
    at = tokens(config)
    vocab = padded_vocab(config)
    own_loss = config.training.loss != "cross_entropy"
    columns = vocab // config.mesh.tp + (vocab if own_loss else 0)
    return at.whole * config.model.dim * at.compute, at.whole * (columns * at.compute + at.wide)


def _attention(config: Config, at: Tokens) -> int:
    """The projections' input; q, k, v as attention reads them, its output and row sums; q and k before their norm."""
    model, tp = config.model, config.mesh.tp
    heads, kv_heads = model.num_heads // tp, max(1, model.num_kv_heads // tp)
    width, kv_width = heads * model.head_dim, kv_heads * model.head_dim
    per_token = (model.dim + 2 * width + 2 * kv_width) * at.compute + 4 * heads + _norm_statistics(config, at)
    if model.qk_norm == "full":
        per_token += (width + kv_width) * (at.compute if config.compile.enable else at.wide + at.compute) + 2 * at.wide
    elif model.qk_norm == "head":
        per_token += (width + kv_width) * at.compute + (heads + kv_heads) * at.wide
    # The mask of documents becomes a bias in the compute dtype, in each attention by itself.
    mask = config.training.seq_len * at.compute if config.data.document_mask else 0
    return at.whole * (per_token + mask)


def _norm_statistics(config: Config, at: Tokens) -> int:
    """Bytes a token of both norms of a block: the reciprocal deviation, and LayerNorm's mean."""
    return 2 * at.wide * (2 if config.model.norm == "layernorm" else 1)


def _dense(config: Config, at: Tokens, hidden: int, with_input: bool = True) -> int:
    """Its input; gate, up and their product; eager also act(gate)."""
    gated = config.model.activation in GATED
    copies = (3 if config.compile.enable else 4) if gated else 2
    width = config.model.dim if with_input else 0
    return at.whole * (width + copies * hidden // config.mesh.tp) * at.compute


def _experts(config: Config, at: Tokens, rows: int) -> int:
    """Router, dispatch and experts: x, H, gates and route (``kernels/mlp.py``); X, A and Y are not kept."""
    model, moe = config.model, config.moe
    gathered = config.mesh.tp > 1 and config.mesh.sequence_parallel
    kept = at.whole * model.dim * at.compute + _route(config, at)
    if gathered:  # the router reads a rank's own tokens
        kept += at.own * model.dim * at.compute
    kept += rows * gates(config) * moe.hidden_dim * at.compute
    if uses_reference(config):  # X, the activation's parts and A; each copy's output in float32
        inner = moe.hidden_dim * (2 if model.activation in GATED else 1)
        kept += rows * (model.dim + inner) * at.compute + at.whole * moe.top_k * model.dim * at.wide
    if moe.num_shared_experts:
        kept += _dense(config, at, moe.num_shared_experts * moe.hidden_dim, with_input=False)
    return kept


def _route(config: Config, at: Tokens) -> int:
    """The router's logits, gates and ids of a rank's own tokens; gates and two int32 of the route for each copy."""
    moe = config.moe
    own = at.own * (moe.num_experts * at.wide + moe.top_k * 8)
    return own + at.whole * moe.top_k * (at.wide + 8)


def _selected(config: Config, at: Tokens, is_moe: bool, rows: int) -> int:
    """What selective recomputation keeps beside the input: attention's output, sums over tp, operators' results.

    Eager, every result of a named operator is stored; compiled, only those that the backward pass reads.
    """
    model, moe, tp = config.model, config.moe, config.mesh.tp
    eager = not config.compile.enable
    kept = at.whole * model.num_heads // tp * (model.head_dim * at.compute + 4)
    if tp > 1:
        kept += at.own * model.dim * at.compute * (2 if eager else 1)
    if not is_moe or uses_reference(config):
        return kept
    kept += _route(config, at) + rows * gates(config) * moe.hidden_dim * at.compute
    if eager:  # X, A, Y, their sum, and Sinkhorn's matrix
        kept += (rows * (2 * model.dim + moe.hidden_dim) + at.whole * model.dim) * at.compute
        kept += at.whole * moe.num_experts * at.wide if moe.router == "sinkhorn" else 0
    return kept


def _gradients(config: Config, at: Tokens, is_moe: bool, rows: int) -> int:
    """At the widest point of a block's backward: the stream's gradient and, for each row, dO, dA', A' and dH."""
    model, moe = config.model, config.moe
    stream = (at.whole + at.own) * model.dim * at.compute
    if is_moe:
        return stream + rows * (model.dim + (2 + gates(config)) * moe.hidden_dim) * at.compute
    return stream + at.whole * (1 + gates(config)) * model.hidden_dim // config.mesh.tp * at.compute


def gates(config: Config) -> int:
    """G."""
    return 2 if config.model.activation in GATED else 1


def uses_reference(config: Config) -> bool:
    """Whether a GPU would run the ``reference`` backend: it is named, or no other takes the sizes."""
    size = BYTES[config.training.param_dtype]
    aligned = config.model.dim * size % 16 == 0 and config.moe.hidden_dim * size % 16 == 0
    return config.moe.backend == "reference" or (config.moe.backend == "auto" and (size == 8 or not aligned))
