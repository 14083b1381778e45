"""A model to generate or evaluate with, from a run, a checkpoint or a Hugging Face folder, on any mesh."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_dtensor.checkpoint.hugging_face.source import HuggingFaceSource
from moe_dtensor.checkpoint.native import NativeFolder, find_native
from moe_dtensor.checkpoint.weights import load_weights
from moe_dtensor.config.check import check
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.load import override
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.data.tokenizer import Tokenizer, build_tokenizer, files_beside
from moe_dtensor.generate.batch import Model
from moe_dtensor.mesh import build_mesh
from moe_dtensor.model.balance_state import BalanceState
from moe_dtensor.parallel.apply import build_parts


@dataclass(frozen=True)
class Source:
    """Where a model comes from."""

    path: Path
    config: Config
    """Not resolved, for generation on the mesh that the overrides name."""
    weights: HuggingFaceSource | NativeFolder

    @property
    def max_length(self) -> int:
        """Tokens that the model was made to see at once: a run's training.seq_len, what a config.json says."""
        if isinstance(self.weights, HuggingFaceSource):
            return self.weights.described.max_positions or self.config.training.seq_len
        return self.config.training.seq_len


def find_source(path: str | Path, overrides: Mapping[str, Any], world_size: int) -> Source:
    """What a path names, checked for ``world_size`` ranks.

    Raises:
        ConfigError: it is no model; or the mesh does not go with it.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        source = HuggingFaceSource(path)
        config = source.written_config
        if (path / "tokenizer.json").is_file():
            config = replace(config, data=replace(config.data, tokenizer=str(path)))
        found = Source(path, _for_generation(config, overrides, world_size), source)
    else:
        native = find_native(path)
        found = Source(native.path, _for_generation(native.config, overrides, world_size), native)
    if found.config.mesh.pp != 1:
        raise ConfigError(
            f"mesh.pp = {found.config.mesh.pp}: generate and eval have no pipeline.", "Set mesh.pp = 1, and more tp."
        )
    check(found.config, world_size)
    return found


def _for_generation(config: Config, overrides: Mapping[str, Any], world_size: int) -> Config:
    """Without what is for training; whole batches come from the prompts."""
    computed = overrides.get("training.param_dtype", config.training.param_dtype)
    attention = config.model.attention_backend
    changes: dict[str, Any] = {
        "mesh.dp": -1,
        "mesh.pp": 1,
        "mesh.tp": 1,
        "mesh.dp_replicate": 1,
        "mesh.expert_ranks": 0,
        # A single position cannot be split.
        "mesh.sequence_parallel": False,
        "mesh.attention": "heads",
        # Those that only some GPUs have, and packages that are not installed everywhere.
        "model.attention_backend": "auto" if attention == "fa4" else attention,
        "moe.backend": "auto" if config.moe.backend == "quack" else config.moe.backend,
        "moe.group_sequences": 0,
        "moe.capacity_factor": 0.0,
        "pipeline.stages_per_rank": 0,
        "fsdp.reshard_after_forward": "auto",
        "compile.enable": False,
        "compile.async_tp": False,
        "compile.cuda_graph": False,
        # Weights would be rounded for every token.
        "moe.expert_dtype": "param",
        "activation_checkpoint.mode": "none",
        "training.microbatch_size": 1,
        "training.loss": "cross_entropy",
        "training.validation_interval": 0,
        "training.sample_prompts": (),
        "eval.interval": 0,
        "eval.sets": (),
        "stages": (),
        "training.global_batch_size": world_size,
        "training.dtype": computed,
        "training.reduce_dtype": computed,
    }
    return override(config, {**changes, **overrides})


def load_model(source: Source, device: torch.device) -> Model:
    """Build and fill the model on all ranks together."""
    config = resolve(source.config, dist.get_world_size())
    mesh = build_mesh(config, device)
    (part,) = build_parts(config, mesh, device, trains=False)
    balance = BalanceState(config, [part], device)
    load_weights([part], balance, config, source.weights)
    return Model(part.eval(), config, mesh, device)


def load_tokenizer(source: Source) -> tuple[Tokenizer, set[int]]:
    """The model's tokenizer, and the ids that end a text: its own, and those of a generation_config.json."""
    tokenizer = build_tokenizer(source.config.data.tokenizer)
    ends = {tokenizer.end_id}
    file = source.path / "generation_config.json"
    if file.is_file():
        stated = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        ends |= set(stated if isinstance(stated, list) else [] if stated is None else [stated])
    return tokenizer, ends


def tokenizer_folder(source: Source) -> Path:
    """Where the files of the model's tokenizer are, its chat template among them."""
    named = Path(source.config.data.tokenizer).expanduser()
    return files_beside(source.config.data.tokenizer) if named.exists() else source.path
