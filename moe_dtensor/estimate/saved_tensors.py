"""Bytes that a block keeps between its forward and its backward pass, by arithmetic. Loads no torch.

Counted is what autograd saves on a GPU, term by term from ``layers/`` and ``kernels/``: feed-forward and experts first,
attention below. T are the tokens of a microbatch, t those of one tp rank's slice of the sequence (T / tp under sequence
parallelism, else T), U those whose vectors are at hand at a rank's experts, D the width, F an expert's hidden width on
a rank, G 2 for gated activations and else 1, E experts, K choices, N rows of copies that are made room for
(``estimate/sizes.py``).

Compiled, inductor chooses what to save, and its cut through the graph comes to the same but for two things: a
whole-width norm of queries and keys that has no kernel keeps its input in the compute dtype (eager: in float32, and the
result too), and of a dense gated feed-forward ``act(gate)`` is recomputed. What a matrix product's or the attention's
backward reads (normalised x, rotated q and k) it saves although it could recompute it from the norm's input: torch's
partitioner does not recompute what the backward pass would have to write to memory again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moe_dtensor.config.resolve import (
    GATED,
    WIDE,
    attends_by_sequence,
    block_config,
    block_norms,
    block_rotates,
    expert_dp_ranks,
    expert_ranks,
    fuses_activation,
    head_widths,
    is_latent,
    lent_experts,
    padded_vocab,
    sees_more_than_causal,
    tp_axis,
)
from moe_dtensor.config.schema import Config
from moe_dtensor.estimate.shards import gathered_by_attention
from moe_dtensor.estimate.sizes import (
    BYTES,
    Sizes,
    allocated_rows,
    columns,
    expert_weights,
    sent_tokens,
    tokens,
    tokens_at_experts,
)


@dataclass(frozen=True)
class BlockBytes:
    """One block and one microbatch."""

    kept: int
    """From forward to backward, under the configured recomputation; its input included, its output not."""
    backward: int
    """What its backward pass needs beside that at its highest: what it recomputes, and gradients of activations."""


@dataclass(frozen=True)
class AtExperts:
    """What one rank's experts work on in a block and microbatch."""

    tokens: int
    """U."""
    rows: int
    """N."""
    hidden: int
    """F: a slice of an expert's under ``tp_hidden``."""


def at_experts(config: Config, skewed: bool) -> AtExperts:
    """Of a resolved config, ``mesh.dispatch`` settled."""
    moe, mesh = config.moe, config.mesh
    hidden = moe.hidden_dim // mesh.tp if mesh.experts == "tp_hidden" else moe.hidden_dim
    return AtExperts(tokens_at_experts(config, skewed), allocated_rows(config, skewed), hidden)


def block_bytes(config: Config, is_moe: bool, skewed: bool = False, layer: int = 0) -> BlockBytes:
    """What block ``layer`` keeps and needs for one microbatch on a rank of a resolved config, its dispatch settled."""
    config = block_config(config, layer)
    at = tokens(config)
    met = at_experts(config, skewed) if is_moe else None
    stream = at.own * config.model.dim * at.compute
    ffn = _dense(config, at.whole, config.model.hidden_dim) if met is None else moe_bytes(config, at, met)
    streams = _streams(config) * stream + at.whole * _norm_statistics(config, at)
    # Whole weights of attention by sequences, kept where they were gathered for; then their gradients.
    gathered = sum(gathered_by_attention(config)) * at.compute
    everything = streams + attention_bytes(config, at, layer) + gathered + ffn
    mode = config.activation_checkpoint.mode
    kept = {"none": everything, "full": stream}.get(mode) or stream + _selected(config, at, met)
    # Attention's backward pass comes when what the feed-forward kept is freed.
    gradients = max(_gradients(config, at, met), attention_gradient_bytes(config, at) + gathered - ffn)
    return BlockBytes(kept, everything - kept + gradients)


def head_bytes(config: Config) -> tuple[int, int]:
    """``(kept, logits)`` of the last stage: the norm's input to the head, and the logits over a rank's vocabulary.

    Cross-entropy turns the logits into their gradient in place. A loss of your own gets a copy of the whole
    vocabulary.
    """
    at = tokens(config)
    vocab = padded_vocab(config)
    own_loss = config.training.loss != "cross_entropy"
    columns = (vocab // config.mesh.tp + (vocab if own_loss else 0)) * (1 + config.model.mtp_depth)
    return at.whole * config.model.dim * at.compute, at.whole * (columns * at.compute + at.wide)


def _streams(config: Config) -> int:
    """What norms read: the stream before attention and before the feed-forward, which a parallel block has one of; what
    both give, which after norms on both sides is kept beside that."""
    read = 1 if config.model.parallel_block and config.model.norm_at != "post" else 2
    return read + 2 if config.model.norm_at == "both" else read


def _norm_statistics(config: Config, at: Sizes) -> int:
    """Bytes a token of a block's norms: the reciprocal deviation, and LayerNorm's mean."""
    return len(block_norms(config)) * at.wide * (2 if config.model.norm == "layernorm" else 1)


def _dense(config: Config, count: int, hidden: int, with_input: bool = True) -> int:
    """For ``count`` tokens its input; gate, up and their product; eager also act(gate)."""
    gated = config.model.activation in GATED
    copies = (3 if config.compile.enable else 4) if gated else 2
    width = config.model.dim if with_input else 0
    return count * (width + copies * hidden // config.mesh.tp) * tokens(config).compute


def moe_bytes(config: Config, at: Sizes, met: AtExperts) -> int:
    """What an MoE block's second half keeps without recomputation: router, dispatch, experts and shared expert.

    Of the experts x (``moe.keep_rows``: X), H, gates and route (``kernels/experts/autograd.py``); A and Y are not kept.
    """
    model, moe = config.model, config.moe
    vector = model.dim * at.compute
    kept = at.own * vector + _router(config, at) + _route(config, at, met)
    if _experts_have_own_input(config) and (not _keeps_rows(config) or _shared_reads_experts_input(config)):
        kept += met.tokens * vector
    if _keeps_rows(config):
        kept += met.rows * vector
    kept += met.rows * gates(config) * met.hidden * at.compute
    if uses_reference(config):  # X, the activation's parts and A; each copy's output in float32
        inner = met.hidden * (2 if model.activation in GATED else 1)
        kept += met.rows * (model.dim + inner) * at.compute + met.tokens * columns(config) * model.dim * at.wide
    if lent := lent_experts(config):  # a rank's own weights, and beside them those of all lent ones
        at_hand = moe.num_experts // expert_ranks(config) + expert_ranks(config) * lent
        kept += at_hand * sum(expert_weights(config)) * at.compute
    if moe.shared_hidden_dim:
        kept += _dense(config, at.whole, moe.shared_hidden_dim, with_input=_shared_has_own_input(config))
        if moe.shared_gate:  # the shared expert's output, the gate and its logit
            kept += at.whole * (model.dim + 2) * at.compute
    return kept


def _experts_have_own_input(config: Config) -> bool:
    """Whether what the experts read is another tensor than what the router reads, a rank's own tokens."""
    mesh = config.mesh
    over_tp = mesh.experts != "dp" and mesh.tp > 1 and mesh.sequence_parallel
    over_dp = expert_dp_ranks(config) > 1
    return mesh.dispatch == "all_to_all" or over_tp or over_dp


def _keeps_rows(config: Config) -> bool:
    """X in place of x."""
    return config.moe.keep_rows and not uses_reference(config)


def _shared_reads_experts_input(config: Config) -> bool:
    """Whether a shared expert reads the tokens that were gathered for the experts."""
    mesh = config.mesh
    inside = mesh.tp > 1 and mesh.sequence_parallel and not _shared_has_own_input(config)
    return bool(config.moe.shared_hidden_dim) and inside


def _shared_has_own_input(config: Config) -> bool:
    """Whether the shared expert reads tokens gathered over tp that nothing else keeps."""
    mesh = config.mesh
    if mesh.tp == 1 or not mesh.sequence_parallel:
        return False
    together = mesh.experts == "dp_tp" and expert_dp_ranks(config) == 1
    experts_read_them = mesh.experts in ("tp", "tp_hidden") or together
    return mesh.dispatch != "all_gather" or not experts_read_them


def _router(config: Config, at: Sizes) -> int:
    """Logits and ids of a rank's own tokens, what noise made of the vectors, and what the losses read."""
    moe = config.moe
    each = moe.num_experts * at.wide + columns(config) * 8
    if moe.jitter > 0:
        each += 2 * config.model.dim * at.compute
    if moe.router == "expert_choice":  # which of the E are taken
        each += moe.num_experts
    if moe.balance_loss > 0:  # their softmax, or sigmoid
        each += moe.num_experts * at.wide
    return at.own * each


def _route(config: Config, at: Sizes, met: AtExperts) -> int:
    """For each choice of the tokens at hand a gate and two int32; of an all-to-all also ids beside the gates, and an
    int32 for each token and rank."""
    sends = config.mesh.dispatch == "all_to_all"
    kept = met.tokens * columns(config) * ((2 if sends else 1) * at.wide + 8)
    if fuses_activation(config):  # each row's token and its gate in place of its copy
        kept += met.rows * 8 - met.tokens * columns(config) * 4
    return kept + (sent_tokens(config) * expert_ranks(config) * 4 if sends else 0)


def _selected(config: Config, at: Sizes, met: AtExperts | None) -> int:
    """What selective recomputation keeps beside the input: attention's output, sums over ranks, operators' results.

    Eager, every result of a named operator is stored; compiled, only those that the backward pass reads.
    """
    model, moe, tp = config.model, config.moe, config.mesh.tp
    eager = not config.compile.enable
    kept = at.whole * model.num_heads // tp * (head_widths(config).value * at.compute + 4)
    if tp > 1 and not attends_by_sequence(config):
        kept += at.own * model.dim * at.compute
    if eager:
        kept += _sums(config, at, met) * model.dim * at.compute
    if met is None or uses_reference(config):
        return kept
    kept += _router(config, at) + _route(config, at, met) + met.rows * gates(config) * met.hidden * at.compute
    if _keeps_rows(config) and not eager:
        kept += met.rows * model.dim * at.compute
    if eager:  # X, A, Y, their sum, and Sinkhorn's matrix
        written = 1 if _gathers_in_products(config, met) else 2
        kept += (met.rows * (written * model.dim + met.hidden) + met.tokens * model.dim) * at.compute
        kept += at.whole * moe.num_experts * at.wide if moe.router == "sinkhorn" else 0
        if config.mesh.dispatch == "all_to_all":  # rows for other ranks, and the sum of what they send back
            sent = sent_tokens(config)
            rows = tokens_at_experts(config, skewed=False) * (model.dim * at.compute + 2 * columns(config) * at.wide)
            kept += rows + sent * model.dim * at.compute
    return kept


def _sums(config: Config, at: Sizes, met: AtExperts | None) -> int:
    """Tokens of what reduce-scatters and all-reduces bring out of the second half of a block."""
    mesh = config.mesh
    over_tp = at.own if mesh.tp > 1 else 0
    if met is None or (mesh.dispatch != "all_to_all" and mesh.experts in ("tp", "tp_hidden")):
        return over_tp
    shared = over_tp if config.moe.shared_hidden_dim else 0
    if mesh.dispatch == "all_to_all":
        return shared
    over_dp = at.own if mesh.experts == "dp" else at.whole
    return (over_dp if expert_dp_ranks(config) > 1 else 0) + (shared if mesh.experts == "dp" else over_tp)


def _gradients(config: Config, at: Sizes, met: AtExperts | None) -> int:
    """At the widest point of a block's backward: the stream's gradient and, for each row, dO, dA', A' and dH, in
    float8 too where products read that. Fused products write no dA', nor dO where they gather tokens."""
    model, mesh = config.model, config.mesh
    if met is None:
        inner = at.whole * (1 + gates(config)) * model.hidden_dim // mesh.tp
        return ((at.whole + at.own) * model.dim + inner) * at.compute
    written = 0 if _gathers_in_products(config, met) else model.dim
    written += met.hidden if fuses_activation(config) else 2 * met.hidden
    rows = met.rows * (gates(config) * met.hidden + max(written, model.dim))
    narrow = met.rows * gates(config) * met.hidden if config.moe.expert_dtype == "float8" else 0
    return ((met.tokens + at.own) * model.dim + rows) * at.compute + narrow


def _gathers_in_products(config: Config, met: AtExperts) -> bool:
    """Whether rows of tokens are not written: products gather them."""
    return fuses_activation(config) and met.hidden < WIDE and config.mesh.dispatch != "one_sided"


def gates(config: Config) -> int:
    """G."""
    return 2 if config.model.activation in GATED else 1


def uses_reference(config: Config) -> bool:
    """Whether a GPU would run the ``reference`` backend: it is named, or no other takes the sizes."""
    size, float8 = BYTES[config.training.param_dtype], config.moe.expert_dtype == "float8"
    smallest = 1 if float8 else size
    aligned = config.model.dim * smallest % 16 == 0 and config.moe.hidden_dim * smallest % 16 == 0
    none = size == 8 or not aligned or (float8 and size != 2)
    return config.moe.backend == "reference" or (config.moe.backend == "auto" and none)


def attention_bytes(config: Config, at: Sizes, layer: int) -> int:
    """What attention of block ``layer`` keeps of a microbatch: the projections' input; q, k, v as they are read; output
    and row sums; what norms, clamps, latents, gate and sinks read.

    Where tp splits positions also the output in the order of its ranks.
    """
    config, at = _of_one_rank(config, at)
    model, tp = config.model, config.mesh.tp
    query, value, _ = head_widths(config)
    heads, kv_heads = model.num_heads // tp, max(1, model.num_kv_heads // tp)
    output = heads * value * at.compute
    per_token = model.dim * at.compute + output + 4 * heads
    if tp_axis(config) == 1:
        per_token += output
    read = (heads + kv_heads) * query + kv_heads * value
    if is_latent(config):
        per_token += _latent_bytes(config, at, heads)
    else:
        per_token += read * at.compute + _qk_norm_bytes(config, at, heads, kv_heads, layer)
        if model.clip_qkv:
            per_token += read * at.compute
    if model.attention_gate:  # the sigmoid, and what it makes of the output
        per_token += 2 * output
    if model.sinks:  # the heads' shares, and what they make of the output
        per_token += output + 4 * heads
    return at.whole * (per_token + _mask_bytes(config, at, layer))


def _of_one_rank(config: Config, at: Sizes) -> tuple[Config, Sizes]:
    """Attention by sequences is that of a rank's own tokens without tp."""
    if not attends_by_sequence(config):
        return config, at
    return replace(config, mesh=replace(config.mesh, tp=1)), replace(at, whole=at.own)


def _latent_bytes(config: Config, at: Sizes, heads: int) -> int:
    """A token's latents before and after their norm; q and k as they are read; k and v as they are made."""
    model = config.model
    made = heads * (model.nope_dim + model.v_dim)
    latents = 2 * (model.q_rank + model.kv_rank) + model.rope_dim
    norms = at.wide * (2 if model.q_rank else 1)
    return (latents + made + 2 * heads * (model.nope_dim + model.rope_dim)) * at.compute + norms


def has_kernel(config: Config, layer: int) -> bool:
    """Whether on a GPU kernels norm and rotate queries and keys of block ``layer`` (``layers/attention.py``)."""
    model, widths = config.model, head_widths(config)
    plain = block_rotates(config, layer) and not model.clip_qkv and model.qk_norm != "head_after_rope"
    return (
        plain and config.training.param_dtype != "float64" and widths.rotated == widths.query and not is_latent(config)
    )


def _qk_norm_bytes(config: Config, at: Sizes, heads: int, kv_heads: int, layer: int) -> int:
    """A token's q and k before their norm, and of a norm over the whole width that tp splits the sums of squares.

    Where no kernel does it, the reciprocal deviations of any norm, and of one over the whole width, compiled and where
    tp splits positions, also q and k between norm and weight.
    """
    model, mesh, width = config.model, config.mesh, (heads + kv_heads) * config.model.head_dim
    if model.qk_norm == "none":
        return 0
    if has_kernel(config, layer):
        return width * at.compute + (2 * at.wide if model.qk_norm == "full" and mesh.tp > 1 else 0)
    if model.qk_norm != "full":
        return width * at.compute + (heads + kv_heads) * at.wide
    compiled = at.compute * (2 if tp_axis(config) == 1 else 1)
    return width * (compiled if config.compile.enable else at.wide + at.compute) + 2 * at.wide


def _mask_bytes(config: Config, at: Sizes, layer: int) -> int:
    """A token's row of the mask, as a bias in the compute dtype, where no kernel knows what is seen."""
    model, dtype = config.model, config.training.param_dtype
    plain = model.attention_backend == "plain" or (model.attention_backend == "auto" and dtype == "float64")
    return config.training.seq_len * at.compute if plain and sees_more_than_causal(config, layer) else 0


def attention_gradient_bytes(config: Config, at: Sizes) -> int:
    """Gradients of attention's output, of q, k and v and of what made k and v, alive together in its backward pass; of
    FlashAttention 4 what it sums them in."""
    config, at = _of_one_rank(config, at)
    model, tp = config.model, config.mesh.tp
    query, value, _ = head_widths(config)
    heads, kv_heads = model.num_heads // tp, max(1, model.num_kv_heads // tp)
    made = heads * (model.nope_dim + model.v_dim)
    sums = 0
    if model.attention_backend == "fa4":  # in float32: of queries, and of keys and values that heads share
        sums = 4 * (heads * query + (kv_heads * (query + value) if kv_heads < heads else 0))
    return at.whole * (((heads + kv_heads) * (query + value) + made) * at.compute + sums)
