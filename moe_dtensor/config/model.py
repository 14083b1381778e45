"""The tables that say what the model is: ``[model]``, ``[model.rope]``, ``[moe]``. Loads no torch.

As in :mod:`moe_dtensor.config.schema`, the string under a field is its help text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Model:
    """The transformer around the experts."""

    num_layers: int = 6
    """Transformer blocks."""
    dim: int = 256
    """Width D of the residual stream."""
    num_heads: int = 8
    """Query heads; a multiple of mesh.tp."""
    num_kv_heads: int = 0
    """Key/value heads (grouped-query attention). 0: as many as query heads."""
    head_dim: int = 0
    """Width of one head. 0: dim / num_heads."""
    vocab_size: int = 0
    """Vocabulary before padding to a multiple of 64. 0: the tokenizer's."""
    hidden_dim: int = 0
    """Hidden width of the dense feed-forward. 0: 4 * dim for plain activations, 8/3 * dim rounded up to 64
    for gated ones."""
    activation: Literal["swiglu", "geglu", "swiglu_clamped", "gelu", "silu", "relu2"] = "swiglu"
    """Activation of dense feed-forwards and of experts. swiglu, geglu and swiglu_clamped (gpt-oss) are gated: they have
    two up-projections."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalisation before attention, feed-forward and head."""
    norm_bias: bool = False
    """Add a learned bias to what these norms give (Phi-3.5-MoE, GPT-NeoX). Only with norm = layernorm."""
    norm_eps: float = 1e-5
    """Added to the mean square (variance) inside a norm."""
    ffn_bias: bool = False
    """Add learned biases to what the dense feed-forward's projections give (GPT-NeoX). Experts have moe.expert_bias."""
    head_bias: bool = False
    """Add a learned bias to the logits, after logit_scale (Phi-3.5-MoE). Not with tie_embeddings."""
    attention_bias: Literal["none", "qkv", "all"] = "none"
    """Biases of attention's projections: none, of queries, keys and values (Qwen2, GLM-4.5), or of the output too
    (gpt-oss)."""
    qk_norm: Literal["none", "head", "full", "head_after_rope"] = "none"
    """RMSNorm on queries and keys: none, each head by itself (Qwen3), the whole width (OLMoE), or each head after it is
    rotated (Hunyuan)."""
    clip_qkv: float = 0.0
    """Clamp queries, keys and values to at most this magnitude (DBRX; OLMo). 0: do not."""
    attention_scale: float = 0.0
    """Multiply the scores by this. 0: one over the root of a query head's width."""
    attention_gate: bool = False
    """Multiply the heads' outputs by the sigmoid of a projection of the token, before wo (AFMoE)."""
    rope_theta: float = 10000.0
    """Base of the rotary position embedding."""
    rotary_dim: int = 0
    """Rotate only the first so many dimensions of a head (GLM-4.5: a half). 0: all."""
    rope_layers: tuple[Literal["rope", "none"], ...] = ()
    """Which blocks rotate queries and keys: a pattern that is repeated over the blocks, such as
    ["rope", "rope", "rope", "none"]. Empty: all."""
    window: int = 0
    """Sliding window: a query sees its own position and the window - 1 before it. 0: all before it."""
    window_layers: tuple[Literal["window", "full"], ...] = ()
    """Which blocks have the window: a pattern that is repeated over the blocks, such as ["window", "window", "full"].
    Empty: all."""
    window_theta: float = 0.0
    """Base of the rotary position embedding in blocks with a window. 0: rope_theta."""
    sinks: bool = False
    """A learned score for each head that joins the softmax and is then dropped, so that a query may look at nothing
    (gpt-oss)."""
    q_rank: int = 0
    """Latent attention (MLA, DeepSeek-V2): width of the latent that queries are made of. 0: they are made of the
    stream."""
    kv_rank: int = 0
    """Width of the latent that keys and values are made of; above 0 the attention is latent. 0: it is not."""
    nope_dim: int = 0
    """Latent attention: width of the part of a query or key head that is not rotated."""
    rope_dim: int = 0
    """Latent attention: width of the part that is; of the keys all heads share it."""
    v_dim: int = 0
    """Latent attention: width of a value head."""
    attention_backend: Literal["auto", "plain", "flex", "fa4"] = "auto"
    """How attention is computed where it is more than causal (documents, windows, sinks). flex: FlexAttention, which
    skips blocks that nothing is seen of. plain: a mask. auto: flex on a GPU in up to 32 bits, else plain. Causal
    attention is torch's with each of these. fa4: FlashAttention 4's kernels for causal attention, FlexAttention over
    them for the rest; in bfloat16, on Hopper and later, if flash-attn-4 is installed."""
    norm_at: Literal["pre", "post", "both"] = "pre"
    """Where a block's norms stand: pre, on what attention and feed-forward read (Llama); post, on what they give,
    before it is added to the stream (OLMo-2, FlexOlmo); both (AFMoE)."""
    parallel_block: bool = False
    """Attention and feed-forward read the same stream, and their sum is added to it (GPT-NeoX)."""
    embedding_scale: float = 1.0
    """Multiply the embedding by this (Granite; AFMoE: the root of dim)."""
    residual_scale: float = 1.0
    """Multiply what attention and feed-forward add to the stream by this (Granite)."""
    logit_scale: float = 1.0
    """Multiply the logits by this (Granite: 1 / logits_scaling)."""
    mtp_depth: int = 0
    """Blocks after the last that predict a second, third, … next token (multi-token prediction, DeepSeek-V3). They
    share embedding and head, are like the last block, and take no part in evaluation."""
    tie_embeddings: bool = False
    """Use the embedding as the output head. Only with mesh.pp = 1."""
    init_std: float = 0.02
    """Standard deviation of initial weights; output projections are divided by sqrt(2 * num_layers)."""


@dataclass(frozen=True)
class Rope:
    """Scaling of the rotary frequencies, for contexts longer than the model was first trained on."""

    scaling: Literal["none", "linear", "llama3", "yarn", "longrope"] = "none"
    """none; linear: all by factor; llama3: slow ones by factor (Llama 3.1); yarn: the same along a ramp
    (arXiv:2309.00071); longrope: each by its own factor (arXiv:2402.13753)."""
    factor: float = 1.0
    """How many times longer contexts become."""
    original_length: int = 0
    """Longest context before scaling. Needed by llama3, yarn and longrope."""
    low: float = 1.0
    """llama3: a frequency that turns fewer times than this in original_length is divided by factor."""
    high: float = 4.0
    """llama3: one that turns more often than this stays as it is."""
    beta_fast: float = 32.0
    """yarn: turns in original_length from which a frequency stays as it is."""
    beta_slow: float = 1.0
    """yarn: turns in original_length up to which it is divided by factor."""
    truncate: bool = True
    """yarn: round the ends of the ramp outwards to whole dimensions. False: gpt-oss."""
    attention_factor: float = 0.0
    """Multiply cos and sin by this. 0: for yarn 1 + ln(factor) / 10, for longrope
    sqrt(1 + ln(factor) / ln(original_length)), else 1."""
    short_factors: tuple[float, ...] = ()
    """longrope: a divisor for each pair of rotated dimensions where training.seq_len is at most original_length."""
    long_factors: tuple[float, ...] = ()
    """longrope: the same where it is longer."""
    scale_windows: bool = True
    """Scale the frequencies of blocks with a window too (gpt-oss). False: only those that see all (OLMo-3, Mellum)."""


@dataclass(frozen=True)
class Moe:
    """Experts and routing."""

    num_experts: int = 8
    """Experts E in an MoE block; a multiple of the ranks that mesh.experts spreads them over. 0: no MoE block, a dense
    model."""
    top_k: int = 2
    """Experts K that each token is sent to. A list sets top_k_by_layer, and this to its largest."""
    top_k_by_layer: tuple[int, ...] = ()
    """Experts K by block: a pattern that is repeated over the blocks, dense ones counted too. Empty: top_k in all."""
    hidden_dim: int = 512
    """Hidden width F of one expert."""
    every: int = 1
    """Every n-th block is an MoE block, counted so that the last of each n is (1: all blocks)."""
    layers: tuple[int, ...] = ()
    """Indices of the MoE blocks, from 0. Empty: follow ``every``."""
    num_shared_experts: int = 0
    """Experts of width hidden_dim that every token visits, kept as one feed-forward."""
    shared_hidden_dim: int = 0
    """Hidden width of that feed-forward. 0: num_shared_experts * hidden_dim."""
    shared_gate: bool = False
    """Multiply the shared expert's output by the sigmoid of a projection of the token (Qwen2-MoE)."""
    router: str = "sinkhorn"
    """How experts are chosen in training: sinkhorn, topk, expert_choice (each expert takes the tokens that score
    highest for it), your own ``package.module:Name``, or forced, for benchmarks: hash (by the token's id), uniform,
    zipf (by chance, skewed by 1/rank)."""
    router_by_layer: tuple[str, ...] = ()
    """How experts are chosen by block, a pattern like top_k_by_layer. A list given for router sets this, and router to
    its first. Empty: router in all."""
    group_sequences: int = 0
    """Consecutive sequences that form a routing group (what Sinkhorn balances over, what experts choose from, what a
    capacity counts); must divide the microbatch. 0: the microbatch."""
    sinkhorn_iterations: int = 8
    """Sinkhorn iterations, in the log domain."""
    score: Literal["auto", "softmax", "sigmoid"] = "auto"
    """What a gate is made of: softmax of the logits, or sigmoid of each. auto: sigmoid for sinkhorn with top_k = 1,
    else softmax."""
    score_before_top_k: bool = True
    """True: scores over all experts, of which the K chosen are the gates. False: the choice goes by logits, and only
    the K chosen are scored, so that softmax gates sum to 1."""
    normalize_gates: bool = False
    """Divide the K gates of a token by their sum. Needs top_k > 1."""
    gate_scale: float = 1.0
    """Multiply the gates by this."""
    gate_on: Literal["output", "input"] = "output"
    """What a gate multiplies: what its expert gives, or what it reads (Llama 4). input needs top_k = 1."""
    expert_bias: bool = False
    """Add learned biases to what an expert's up- and down-projections give (gpt-oss)."""
    router_bias: bool = False
    """Add a learned bias to the router's logits, which gates see too (gpt-oss)."""
    expert_groups: int = 0
    """Choose among experts of a few groups only (DeepSeek-V3): into how many groups of consecutive experts they fall.
    0: no groups."""
    expert_groups_kept: int = 0
    """Groups that a token may choose from: those that score highest by group_score."""
    group_score: Literal["top2", "max"] = "top2"
    """What a group of experts scores: the sum of its two highest (DeepSeek-V3), or its highest (DeepSeek-V2)."""
    jitter: float = 0.0
    """Multiply what the router sees in training by noise from 1 - jitter to 1 + jitter (Switch Transformer)."""
    capacity_factor: float = 0.0
    """In training an expert takes at most this times the average number of copies of a routing group, the rest is
    dropped. 0: dropless."""
    drop_by: Literal["score", "position"] = "score"
    """Which copies stay under a capacity: those with the highest gates, or first choices before second ones and among
    them the earlier tokens."""
    balance_loss: float = 0.0
    """Coefficient of the load-balancing loss, added in each MoE block (Switch Transformer, eq. 4)."""
    balance_over: Literal["sequence", "group", "batch"] = "group"
    """Whose load the balancing loss evens out: each sequence's, each routing group's, or the global batch's (with the
    counts of the step before)."""
    z_loss: float = 0.0
    """Coefficient of the router z-loss: the mean square of the logits' logsumexp (ST-MoE, eq. 5)."""
    bias_rate: float = 0.0
    """Balance without a loss: after each step an expert's bias, which only the choice sees, moves by this toward the
    average load (arXiv:2408.15664). 0: it stays as it is."""
    selection_bias: bool = False
    """Add a bias to what the choice goes by, and to no gate. It is 0 at the start or as loaded, and moves by bias_rate.
    A bias_rate above 0 sets it to true."""
    rows: Literal["exact", "worst"] = "exact"
    """Rows of copies that a rank makes room for where it cannot know how many will come. exact: reads the number from
    the device once a layer. worst: as many as could come, without a read."""
    keep_rows: bool = False
    """Keep the rows of tokens that experts read for their weights' gradients, instead of gathering them once more: less
    traffic in memory, for model.dim numbers a row."""
    expert_dtype: Literal["param", "float8"] = "param"
    """What experts' products read, forward and for the gradients of their inputs. param: training.param_dtype. float8:
    that, rounded to E4M3 (4 bits of exponent, 3 of fraction) with a scale for each row and for each expert's weight;
    gradients of weights are computed in param_dtype. On Hopper; elsewhere the same rounding in plain PyTorch."""
    backend: Literal["auto", "reference", "torch", "triton", "grouped_gemm", "quack"] = "auto"
    """Expert compute. auto: the fastest of this project's and torch's for the device, dtype and shape; the choice is
    logged. quack: the package quack-kernels, whose products gather tokens and compute the activation; on Hopper."""
