"""The configuration: one frozen dataclass per TOML table. Loads no torch.

Every field has a default, so a TOML names only what it changes. The string
under a field is its help text; ``docs/config.md`` is generated from it.
Rules that span fields live in :mod:`moe_dtensor.config.check`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from moe_dtensor.config.model import Model, Moe, Rope

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
class Mesh:
    """The device mesh (dp, pp, tp); tp is innermost."""

    dp: int = -1
    """Data-parallel (FSDP) ranks. -1: what pp and tp leave of the world."""
    pp: int = 1
    """Pipeline stages' ranks."""
    tp: int = 1
    """Tensor-, sequence- and expert-parallel ranks."""
    sequence_parallel: bool = True
    """Between layers tp ranks hold different tokens: sequences if tp divides a microbatch, else equal parts of each."""
    attention: Literal["heads", "sequences"] = "heads"
    """What tp ranks divide attention by. heads: each has its own heads of all tokens; tokens travel. sequences: each
    has all heads of its own sequences, and weights travel; for that tp has to divide training.microbatch_size."""
    experts: Literal["tp", "dp", "tp_hidden", "dp_tp"] = "tp"
    """Where experts live. tp: whole experts over tp. dp: whole experts over dp, alike on all tp ranks. dp_tp: whole
    experts over both. tp_hidden: a slice of every expert's hidden width on each tp rank."""
    dp_replicate: int = 1
    """Two levels of dp (HSDP): weights, gradients and moments are sharded inside groups of dp / dp_replicate
    consecutive dp ranks, and each group holds all; gradients are summed across the groups. 1: one level."""
    expert_ranks: int = 0
    """With experts = dp or dp_tp: how many consecutive dp ranks share the experts; the groups of so many ranks then
    hold them alike. 0: dp / dp_replicate."""
    expert_weights: Literal["replicated", "sharded"] = "replicated"
    """Across the groups of expert_ranks. replicated: each group holds whole weights, and gradients are all-reduced once
    a step. sharded: each of the dp / (dp_replicate * expert_ranks) groups holds a part, gathered as FSDP does."""
    lent_experts: int = 0
    """Even work where routing is uneven: each of the ranks that share experts lends so many to the others, in each
    microbatch and block those with most copies. Ranks below the mean compute copies of those above it. Needs dispatch
    = all_gather. 0: each rank computes its own experts alone."""
    dispatch: Literal["all_gather", "all_to_all", "one_sided", "auto"] = "all_gather"
    """How tokens reach experts on other ranks. all_gather: all tokens to all. all_to_all: each token once to each rank
    that holds one of its experts; reads counts from the device once a layer. one_sided: as all_gather, but the experts'
    kernels read and write the other ranks' memory; for GPUs of one host. auto: of the first two the cheaper by
    ``plan``'s cost model."""
    link_bandwidth: float = 450.0
    """GB/s that a rank can send to the ranks it shares experts with; dispatch = auto and ``plan`` reckon with it."""
    device_memory: float = 75.0
    """GiB of a device that ``plan``'s peak may fill, for fsdp.accumulate = auto too. Of 80 GB some 75 are to be had."""


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
    revision: str = ""
    """As data.revision, of this source."""
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
    """stdlib (the Python standard library's source), files (text, JSON lines, tables: by content), conversations
    (records with messages, or prompt and completion, of which the assistant's tokens are trained), datasets (local or
    hub, read as training goes), tokens (memory-mapped), random, or your own ``package.module:Name``."""
    path: str = ""
    """files, conversations and tokens: a file, a folder or a glob; datasets: a file, a folder or a hub name."""
    validation_path: str = ""
    """The same for validation. Empty: a part of ``path`` is held out."""
    text_key: str = "text"
    """Field that holds the text in .jsonl files and datasets; of conversations the field of their messages, if it is
    not messages."""
    split: str = "train"
    """Split of a ``datasets`` name."""
    revision: str = ""
    """Commit, branch or tag of a hub name. Empty: the newest when the run begins, which the run then keeps."""
    tokenizer: str = "bytes"
    """bytes (256 byte values and an end token), or the path of a Hugging Face ``tokenizer.json``
    (or a folder that has one)."""
    chat_template: str = ""
    """File of the Jinja template that makes text of conversations. Empty: the tokenizer's own."""
    too_long: Literal["refuse", "cut", "drop"] = "refuse"
    """What becomes of a conversation that is longer than a sequence: the run is refused, its end is cut off, or it is
    left out. How many is told at the start."""
    max_bad_records: float = 0.0
    """Share of records that may be skipped because they hold no text (broken JSON, a null); each is counted, the first
    are shown with file and line. 0: the first one ends the run."""
    document_mask: bool = False
    """Keep attention inside a document and restart positions at its start. Always so with conversations."""
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """How documents fill sequences. concatenate: one after the other, cut where a sequence ends. best_fit: whole
    documents, each where it fits best, the rest filled up (arXiv:2404.10830); needs document_mask and a finite
    corpus. Conversations are always packed whole."""
    sources: tuple[Source, ...] = ()
    """Several sources instead of ``corpus`` and ``path``: ``[[data.sources]]``."""


@dataclass(frozen=True)
class EvalSet:
    """A text measured during training, all of it each time: documents whole, every token once."""

    name: str = ""
    """What metrics call it."""
    path: str = ""
    """A file, a folder or a glob, as data.path of data.corpus = "files"."""
    text_key: str = ""
    """As data.text_key. Empty: that one."""


@dataclass(frozen=True)
class Eval:
    """Texts measured during training, each a curve of loss and of bits per byte: ``[[eval.sets]]``."""

    interval: int = 0
    """Steps between measurements. 0: never."""
    sets: tuple[EvalSet, ...] = ()
    """The texts: ``[[eval.sets]]``."""


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
    routing_drift_interval: int = 0
    """Steps between measurements of routing_drift, the share of the first batch's tokens that by now go to other
    experts. 0: never."""
    validation_interval: int = 0
    """Steps between measurements of the validation loss. 0: never."""
    validation_sequences: int = 0
    """Sequences in one measurement. 0: one global batch."""
    sample_prompts: tuple[str, ...] = ()
    """Texts that are continued at each validation and evaluation, for the metrics. Needs mesh.pp = 1."""
    sample_tokens: int = 32
    """New tokens of each."""
    sample_temperature: float = 0.0
    """How they are drawn. 0: always the likeliest."""


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
    state_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """dtype in which the two moments are kept; updates are computed in the wider of it and training.dtype. bfloat16
    halves them. auto: training.dtype."""
    rounding: Literal["nearest", "stochastic", "remainder"] = "nearest"
    """What becomes of an update that training.dtype = "bfloat16" cannot hold: one below some 1/256 of the weight.
    nearest: lost. stochastic: updates are computed in float32 and weights rounded up or down by chance, right on
    average. remainder: 16 low bits are kept beside a weight (2 bytes more); both together are a float32 weight. Under
    all three gradients come to the update in training.dtype."""
    router_lr: float = 1.0
    """Multiply the learning rate of routers by this, in fine-tuning. 0: they are frozen, and no part of the gradient
    norm. moe.bias_rate has a rate of its own."""


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
    """Order a compiled block's kernels and collectives so that they overlap. Off, as logged, with untested torch."""
    async_tp: bool = False
    """Asynchronous tensor parallelism: cut the products next to tp's collectives, so that a part of the tokens travels
    while another is computed with. Needs enable, mesh.sequence_parallel, and GPUs that reach each other's memory."""
    cuda_graph: bool = False
    """A microbatch, forward and backward, as one CUDA graph: for small models and few sequences. With mesh.pp = 1."""


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
    """When the run ends, also write its weights to <run.folder>/hugging_face, for other libraries to read."""


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
    eval: Eval = field(default_factory=Eval)
    stages: tuple[Stage, ...] = ()
