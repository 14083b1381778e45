"""The configuration: one frozen dataclass per TOML table. Loads no torch.

Every field has a default, so a TOML names only what it changes. The string
under a field is its help text; ``docs/config.md`` is generated from it.
Rules that span fields live in :mod:`moe_dtensor.config.check`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

DType = Literal["bfloat16", "float16", "float32", "float64"]
Schedule = Literal["GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"]


@dataclass(frozen=True)
class Run:
    """Where a run lives and whether it starts over."""

    folder: str = ""
    """Folder of the run: checkpoints, metrics, resolved config. Empty: ``outputs/<name of the TOML>``."""
    fresh: bool = False
    """Delete what the folder holds and start at step 0. False resumes an unfinished run."""


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
    """Normalisation before attention, feed-forward and head. No biases."""
    norm_eps: float = 1e-5
    """Added to the mean square (variance) inside a norm."""
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
    skips blocks that nothing is seen of. fa4: FlexAttention over FlashAttention 4, if that is installed. plain: a mask.
    auto: flex on a GPU in up to 32 bits, else plain."""
    norm_at: Literal["pre", "post", "both"] = "pre"
    """Where a block's norms stand: pre, on what attention and feed-forward read (Llama); post, on what they give,
    before it is added to the stream (OLMo-2, FlexOlmo); both (AFMoE)."""
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
    """Experts K that each token is sent to."""
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
    backend: Literal["auto", "reference", "torch", "triton", "grouped_gemm"] = "auto"
    """Expert compute. auto: the fastest measured one for the device, dtype and shape; the choice is logged."""


@dataclass(frozen=True)
class Mesh:
    """The device mesh (dp, pp, tp); tp is innermost."""

    dp: int = -1
    """Data-parallel (FSDP) ranks. -1: what pp and tp leave of the world."""
    pp: int = 1
    """Pipeline stages' ranks."""
    tp: int = 1
    """Tensor-, sequence- and expert-parallel ranks."""
    sequence_parallel: bool = True
    """Split the sequence over tp between attention and feed-forward. Needs seq_len % tp == 0."""
    experts: Literal["tp", "dp", "tp_hidden", "dp_tp"] = "tp"
    """Where experts live. tp: whole experts over tp. dp: whole experts over dp, alike on all tp ranks. dp_tp: whole
    experts over both. tp_hidden: a slice of every expert's hidden width on each tp rank."""
    dispatch: Literal["all_gather", "all_to_all", "auto"] = "all_gather"
    """How tokens reach experts on other ranks. all_gather: all tokens to all. all_to_all: each token once to each rank
    that holds one of its experts; reads counts from the device once a layer. auto: the cheaper by ``plan``'s cost
    model."""
    link_bandwidth: float = 450.0
    """GB/s that a rank can send to the ranks it shares experts with; dispatch = auto and ``plan`` reckon with it."""
    device_memory: float = 75.0
    """GiB of a device that ``plan``'s peak may fill; fsdp.accumulate = auto reckons with it. Of 80 GB some 75 GiB are
    to be had."""


@dataclass(frozen=True)
class Pipeline:
    """The pipeline schedule."""

    schedule: Schedule = "1F1B"
    """Schedule by name, used when mesh.pp > 1."""
    stages_per_rank: int = 0
    """Stages on one rank for Interleaved schedules. 0: 2. One- and V-schedules fix it themselves (1 and 2)."""


@dataclass(frozen=True)
class Fsdp:
    """FSDP2 over dp."""

    reshard_after_forward: Literal["auto", "always", "never"] = "auto"
    """Free gathered weights after the forward, and gather them again for the backward. never: keep them for a step.
    auto: never for pp > 1, where always is refused, and for dp = 1 without cpu_offload, where the copy in param_dtype
    is kept."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory."""
    accumulate: Literal["whole", "sharded", "auto"] = "whole"
    """How the gradients of a step's microbatches add up. whole: each rank sums its own, whole, in
    training.reduce_dtype, and they are sent once. sharded: those of each microbatch are reduce-scattered, and shards
    add up in training.dtype: memory falls by the number of dp ranks, bytes sent grow by the number of microbatches.
    auto: whole if ``plan``'s peak is within mesh.device_memory, else sharded."""


@dataclass(frozen=True)
class Source:
    """One of several sources of a run's data: its own documents, and its share of the tokens."""

    name: str = ""
    """What metrics and stages call it."""
    corpus: str = "files"
    """As data.corpus."""
    path: str = ""
    """As data.path."""
    validation_path: str = ""
    """As data.validation_path, of this source."""
    text_key: str = ""
    """As data.text_key. Empty: that one."""
    split: str = ""
    """As data.split. Empty: that one."""
    weight: float = 0.0
    """Share of the sequences, against the other sources' weights."""
    tokens: int = 0
    """Instead of a weight: tokens that the run takes from this source. The rest is shared by weight."""
    epochs: float = 0.0
    """Times that the source may be read, at most; a run that needs more is refused. 0: any."""


@dataclass(frozen=True)
class Data:
    """Where the tokens come from."""

    corpus: str = "stdlib"
    """stdlib (the Python standard library's source), files (text, JSON lines, tables: by content), datasets (local or
    hub, read as training goes), tokens (memory-mapped), random, or your own ``package.module:Name``."""
    path: str = ""
    """files and tokens: a file, a folder or a glob; datasets: a file, a folder or a hub name."""
    validation_path: str = ""
    """The same for validation. Empty: a part of ``path`` is held out."""
    text_key: str = "text"
    """Field that holds the text in .jsonl files and datasets."""
    split: str = "train"
    """Split of a ``datasets`` name."""
    tokenizer: str = "bytes"
    """bytes (256 byte values and an end token), or the path of a Hugging Face ``tokenizer.json``
    (or a folder that has one)."""
    max_bad_records: float = 0.0
    """Share of records that may be skipped because they hold no text (broken JSON, a null); each is counted, the first
    are shown with file and line. 0: the first one ends the run."""
    document_mask: bool = False
    """Keep attention inside a document and restart positions at its start."""
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """How documents fill sequences. concatenate: one after the other, cut where a sequence ends. best_fit: whole
    documents, each where it fits best, the rest filled up (arXiv:2404.10830); needs document_mask and a finite
    corpus."""
    sources: tuple[Source, ...] = ()
    """Several sources instead of ``corpus`` and ``path``: ``[[data.sources]]``."""


@dataclass(frozen=True)
class Stage:
    """What changes from a step on. Keys that are left out stay as they were."""

    from_step: int = 0
    """First step of the stage, from 2 on."""
    weights: tuple[tuple[str, float], ...] = ()
    """New weights of all sources, by name: ``weights = {web = 0.3, code = 0.7}``; a source left out is not read."""
    seq_len: int = 0
    """Tokens in a sequence. Every source is then read from its start again, in another order. 0: as before."""
    global_batch_size: int = 0
    """Sequences in a step. 0: as before, or as keep_batch_tokens says."""
    keep_batch_tokens: bool = False
    """With seq_len: so many sequences in a step that its tokens stay the same."""
    microbatch_size: int = 0
    """Sequences in one forward. 0: as before."""
    lr: float = 0.0
    """Peak learning rate; the schedule's shape goes on. 0: as before."""


@dataclass(frozen=True)
class Training:
    """Steps, batches, precision."""

    steps: int = 1000
    """Optimizer steps of the whole run."""
    seq_len: int = 128
    """Tokens in a sequence."""
    global_batch_size: int = 24
    """Sequences in a step, over all ranks."""
    microbatch_size: int = 2
    """Sequences in one forward. A dp rank runs global_batch_size / (dp * microbatch_size) microbatches a step."""
    loss: str = "cross_entropy"
    """cross_entropy (vocabulary-parallel), or your own ``package.module:name``."""
    mtp_weight: float = 0.3
    """Weight of the mean loss of model.mtp_depth's predictions beside the loss of the next token."""
    max_grad_norm: float = 1.0
    """Clip the global gradient norm to this. 0: measure, do not clip."""
    norm_type: float = 2.0
    """Order of the gradient norm: 2, or inf."""
    nonfinite: Literal["skip", "stop"] = "stop"
    """On a loss or gradient that is not finite: skip the update, or stop the run. Every rank decides alike."""
    max_skipped: int = 10
    """With nonfinite = "skip": steps skipped in a row that end the run."""
    check_replicas: int = 0
    """Steps between comparisons of what several ranks hold alike; a rank that differs ends the run. 0: never."""
    seed: int = 0
    """Seed of initial values and data order."""
    dtype: DType = "float32"
    """dtype of the master weights and optimizer state."""
    param_dtype: DType = "bfloat16"
    """dtype of the computation (FSDP's mixed precision)."""
    reduce_dtype: DType = "float32"
    """dtype in which gradients are summed."""
    deterministic: bool = False
    """Allow only algorithms that torch promises to repeat bit for bit on the same mesh, on GPUs too."""
    validation_interval: int = 0
    """Steps between measurements of the validation loss. 0: never."""
    validation_sequences: int = 0
    """Sequences in one measurement. 0: one global batch."""


@dataclass(frozen=True)
class Optimizer:
    """AdamW."""

    lr: float = 3e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay; not applied to norms, embeddings and router."""


@dataclass(frozen=True)
class LrScheduler:
    """Warm-up, then decay."""

    warmup_steps: int = 20
    """Steps of linear warm-up from 0."""
    decay: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape after warm-up. wsd holds the peak, then falls linearly over the last decay_fraction of the steps."""
    decay_fraction: float = 0.2
    """Share of the steps that wsd decays over."""
    min_lr_ratio: float = 0.1
    """Final learning rate over peak learning rate."""


@dataclass(frozen=True)
class ActivationCheckpoint:
    """Recompute activations in the backward pass."""

    mode: Literal["none", "full", "selective"] = "none"
    """none; full: every block; selective: keep attention's and the experts' outputs, recompute the rest."""


@dataclass(frozen=True)
class Compile:
    """torch.compile, block by block."""

    enable: bool = False
    """Compile each block. Refused with schedules that split the backward pass (ZeroBubble, DualPipeV)."""
    order: bool = True
    """Keep the order of kernels and collectives in compiled blocks, so that they overlap. On GPUs that exchange
    activations; with a version of torch that this was not tested with, it is off, and a line of the log says so."""
    async_tp: bool = False
    """Asynchronous tensor parallelism: cut the products next to tp's collectives, so that a part of the tokens travels
    while another is computed with. Needs enable, mesh.sequence_parallel, and GPUs that reach each other's memory."""


@dataclass(frozen=True)
class Checkpoint:
    """Distributed checkpoints."""

    enable: bool = True
    """Save and resume."""
    interval: int = 500
    """Steps between checkpoints; the last step is always saved."""
    folder: str = "checkpoints"
    """Folder inside run.folder."""
    async_save: bool = False
    """Write in the background."""
    keep_last: int = 2
    """Checkpoints kept (at least 2). 0: all."""
    verify: bool = True
    """Compare the checksum of every file before a checkpoint is loaded. Their sizes are compared in any case."""
    initial: str = ""
    """Start a new run from these weights: a Hugging Face folder, a run's folder or one of its checkpoints. Optimizer,
    schedule and data start anew. Empty: from random values."""
    export_hf: bool = False
    """When the run ends, also write its weights to <run.folder>/hugging_face as transformers and inference engines read
    them."""


@dataclass(frozen=True)
class Metrics:
    """What is written while training."""

    log_interval: int = 1
    """Steps between lines and records."""
    tensorboard: bool = False
    """Write TensorBoard events to <run.folder>/tensorboard."""
    wandb: bool = False
    """Log to Weights & Biases (the extra ``wandb``)."""
    wandb_project: str = "moe_dtensor"
    """Project for Weights & Biases."""


@dataclass(frozen=True)
class Profiling:
    """A window of torch.profiler."""

    enable: bool = False
    """Write a Chrome trace to <run.folder>/profile."""
    first_step: int = 10
    """First step of the window."""
    steps: int = 3
    """Steps in the window."""


@dataclass(frozen=True)
class Comm:
    """Process groups."""

    timeout_seconds: int = 600
    """A collective that waits longer fails the run."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    run: Run = field(default_factory=Run)
    model: Model = field(default_factory=Model)
    rope: Rope = field(default_factory=Rope)
    moe: Moe = field(default_factory=Moe)
    mesh: Mesh = field(default_factory=Mesh)
    pipeline: Pipeline = field(default_factory=Pipeline)
    fsdp: Fsdp = field(default_factory=Fsdp)
    data: Data = field(default_factory=Data)
    training: Training = field(default_factory=Training)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: LrScheduler = field(default_factory=LrScheduler)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    compile: Compile = field(default_factory=Compile)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    metrics: Metrics = field(default_factory=Metrics)
    profiling: Profiling = field(default_factory=Profiling)
    comm: Comm = field(default_factory=Comm)
    stages: tuple[Stage, ...] = ()
