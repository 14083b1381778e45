"""The training loop: what every rank runs from start to end."""

from __future__ import annotations

import gc
import logging
import os
import sys
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dtensor.checkpoint.manager import CheckpointManager
from moe_dtensor.config.resolve import FORCED, moe_layers
from moe_dtensor.config.schema import Config
from moe_dtensor.config.stages import stage_at
from moe_dtensor.data import Corpus, Loader, build_corpus, describe
from moe_dtensor.data.prefetch import Prefetcher
from moe_dtensor.estimate.counts import flops_per_token, parameters
from moe_dtensor.train.build import Trainer, build, set_vocabulary
from moe_dtensor.train.metrics import Meter, Value
from moe_dtensor.train.profile import Profiler
from moe_dtensor.train.run_folder import RunFolder, open_run_folder
from moe_dtensor.train.sinks import Display, Sink, build_sinks, check_sinks
from moe_dtensor.train.stages import give, keep, same_sizes
from moe_dtensor.train.step import StepResult, evaluate, read_batch, to_device, train_step
from moe_dtensor.train.weights import check_weights, load_initial, open_initial, plan_export, write_export


def train(config: Config) -> int:
    """Run ``config`` (resolved) to its last step on this rank; returns the exit status.

    The process group is made here from torchrun's environment, and ended here.
    """
    device = start_ranks(config)
    check_sinks(config)
    corpus = build_corpus(config)
    config = set_vocabulary(config, corpus)
    check_weights(config)
    folder = open_run_folder(config, corpus.fingerprint())
    status = 0
    if folder.state == "finished":
        _say(folder.message)
    else:
        status = Run(config, device, corpus, folder).to_the_end()
    end_ranks()
    return status


def start_ranks(config: Config) -> torch.device:
    """Join the process group (nccl on GPUs, gloo on CPUs; one rank without torchrun); the device of this rank."""
    timeout = timedelta(seconds=config.comm.timeout_seconds)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        os.environ.setdefault(name, value)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    store = None if "MASTER_ADDR" in os.environ else dist.HashStore()
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=int(os.environ["RANK"]) if store else -1,
        world_size=int(os.environ["WORLD_SIZE"]) if store else -1,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    return device


def end_ranks(status: int = 0) -> None:
    """Leave the process group together; of several CPU ranks the processes end here, with ``status``."""
    dist.barrier()
    dist.destroy_process_group()
    if not torch.cuda.is_available() and int(os.environ["WORLD_SIZE"]) > 1:
        # gloo's threads can abort in an interpreter's shutdown.
        sys.stdout.flush()
        sys.stderr.flush()
        logging.shutdown()
        os._exit(status)


@dataclass
class Run:
    """One run on this rank."""

    config: Config
    device: torch.device
    corpus: Corpus
    folder: RunFolder

    def __post_init__(self) -> None:
        config = self.config
        self.told = describe(config, self.corpus)
        self.exported = plan_export(config, self.folder.checkpoints)
        self.trainer: Trainer = build(config, self.device)
        self.loader = Loader(config, self.corpus)
        self.batches = Prefetcher(self.loader, self.trainer.mesh["dp"].get_local_rank(), config.mesh.dp)
        # Made now, though used later: a split that is too small is told at once.
        self.validation = Loader(config, self.corpus, "validation") if config.training.validation_interval else None
        self.checkpoints = CheckpointManager(
            self.folder.checkpoints,
            config,
            list(self.trainer.parts),
            self.trainer.optimizers,
            self.trainer.schedule,
            self.batches,
            self.trainer.balance,
        )
        self.step = (self.checkpoints.load_latest() or 0) if config.checkpoint.enable else 0
        if config.checkpoint.initial and self.step == 0:
            load_initial(self.trainer, open_initial(config))
        self.is_rank_0 = dist.get_rank() == 0
        self.profiler = Profiler(config.profiling, self.folder.path, dist.get_rank())
        self.meter = Meter(
            config,
            self.device,
            self._open_sinks(),
            world_size=dist.get_world_size(),
            flops_per_token=flops_per_token(config),
            layers=sorted(moe_layers(config)),
            names={key: [s.name for s in config.data.sources] for key in ("source_loss", "source_tokens")},
        )
        self.unfinite: Tensor = torch.zeros((), dtype=torch.bool, device=self.device)

    def _open_sinks(self) -> list[Sink]:
        if not self.is_rank_0:
            return []
        self.folder.cut_back(self.step)
        display = Display(self.config.training.steps, self.step, self.config.metrics.log_interval)
        total, active = parameters(self.config)
        if self.folder.message:
            display.say(self.folder.message)
        mesh = self.config.mesh
        display.say(
            f"{total / 1e6:,.1f}M parameters, {active / 1e6:,.1f}M active; dp {mesh.dp} x pp {mesh.pp} x tp {mesh.tp} "
            f"on {self.device.type}; run folder {self.folder.path}"
        )
        display.say(self.told)
        if packing := self.loader.told():
            display.say(packing)
        if notice := routing_notice(self.config):
            display.say(notice)
        return [*build_sinks(self.config, self.folder.path, self.folder.run_id, self.step), display]

    def to_the_end(self) -> int:
        """Take the remaining steps; 0, or 1 if the run stopped on a loss or gradient that is not finite."""
        steps = self.config.training.steps
        while self.step < steps:
            self.step += 1
            self._enter_stage()
            self.profiler.before_step(self.step)
            lr = self.trainer.schedule.lr
            result = train_step(self.trainer, to_device(self.batches.next(), self.device))
            self._record(result, lr)
            self.profiler.after_step(self.step)
            if self._must_stop(result):
                self._close()
                _say(
                    f"error: loss or gradient was not finite by step {self.step}; the update of such a step was not "
                    "applied, and nothing was saved after it.\n"
                    "Start again to resume from the last checkpoint, with a lower optimizer.lr or with "
                    'training.nonfinite = "skip".'
                )
                return 1
            self._save()
        self._close()
        if self.exported is not None:
            _say(f"The weights are in {write_export(self.exported, self.folder.path)}.")
        if self.is_rank_0:
            self.folder.finish(self.step)
        return 0

    def _enter_stage(self) -> None:
        """Before a step with other sizes than the last: build for them, with the same weights."""
        config = stage_at(self.config, self.step)
        if same_sizes(config, self.trainer.config):
            return
        kept, mesh = keep(self.trainer), self.trainer.mesh
        self.checkpoints.replace([], self.trainer.optimizers, self.trainer.schedule, self.trainer.balance)
        with self.meter.paused():
            del self.trainer
            gc.collect()  # modules and their hooks hold one another
            self.trainer = build(config, self.device, mesh)
            give(self.trainer, kept)
            trainer = self.trainer
            self.checkpoints.replace(list(trainer.parts), trainer.optimizers, trainer.schedule, trainer.balance)
            if self.validation is not None:
                self.validation = Loader(replace(config, stages=()), self.corpus, "validation")
        self.meter.enter_stage(flops_per_token(config))
        training = config.training
        _say(
            f"From step {self.step} on a batch is {training.global_batch_size} sequences of {training.seq_len} tokens."
        )

    def _close(self) -> None:
        self.batches.close()
        self.loader.close()
        self.profiler.close()
        self.checkpoints.wait()
        self.meter.close()

    def _record(self, result: StepResult, lr: float) -> None:
        values: dict[str, Value] = {"loss": result.loss, "grad_norm": result.grad_norm, "lr": lr}
        values["data_wait_seconds"] = self.batches.wait_seconds
        values |= {f"mtp_loss_{k}": loss for k, loss in enumerate(result.mtp_loss_K, start=1)}
        if result.source_loss_N is not None:
            values["source_loss"] = result.source_loss_N
            values["source_tokens"] = torch.tensor([*self.batches.tokens_by_source.values()], dtype=torch.float64)
        if len(result.churn_L):
            values |= routing_metrics(self.config, result)
        if self.config.training.nonfinite == "skip":
            values["skipped"] = (~result.finite).to(torch.float64)
        interval = self.config.training.validation_interval
        if self.validation is not None and self.step % interval == 0:
            with self.meter.paused():
                values["validation_loss"] = self._validate(self.validation)
        self.meter.add(self.step, values)

    def _validate(self, loader: Loader) -> Tensor:
        """Mean loss of the targets in ``training.validation_sequences`` held-out sequences, the same every time."""
        start = loader.state_dict()
        training = self.trainer.config.training
        batches = training.validation_sequences // training.global_batch_size
        loss = evaluate(self.trainer, (read_batch(self.trainer, loader) for _ in range(batches)))
        loader.load_state_dict(start)
        return loss

    def _must_stop(self, result: StepResult) -> bool:
        """Whether a step since the last look was not finite and the run is to stop. Looks before anything is saved."""
        if self.config.training.nonfinite == "skip":
            return False
        self.unfinite |= ~result.finite
        looks = self.step % self.config.metrics.log_interval == 0 or self._saves_now()
        return looks and bool(self.unfinite)

    def _saves_now(self) -> bool:
        options = self.config.checkpoint
        return options.enable and (self.step % options.interval == 0 or self.step == self.config.training.steps)

    def _save(self) -> None:
        if self._saves_now():
            self.meter.flush()
            with self.meter.paused():
                self.checkpoints.save(self.step)


def routing_notice(config: Config) -> str:
    """What has to be known of a router before its numbers are believed; empty if nothing."""
    moe = config.moe
    if moe.num_experts and moe.router == "expert_choice":
        return (
            "moe.router = expert_choice: experts choose among the tokens of a whole routing group, later ones too, so "
            "the training loss may profit from what a generating model cannot know. Validation takes plain top-k."
        )
    if moe.num_experts and moe.router in FORCED:
        return f"moe.router = {moe.router} is forced: it looks at no token's vector, in validation neither."
    return ""


def routing_metrics(config: Config, result: StepResult) -> dict[str, Value]:
    """Diagnostics of the MoE blocks by name, ``(L,)`` each; those of what is switched off are left out. A forced
    router is named in every record."""
    load_LE, means = result.routing
    off = {
        "balance_loss": config.moe.balance_loss == 0,
        "dropped": config.moe.capacity_factor == 0,
        "differs_from_top_k": config.moe.router in ("topk", *FORCED),
        "sinkhorn_error": config.moe.router != "sinkhorn",
    }
    label: dict[str, Value] = {"forced_router": config.moe.router} if config.moe.router in FORCED else {}
    return label | {
        "expert_load_max_over_mean": load_LE.amax(1) / load_LE.mean(1),
        "expert_load_cv": load_LE.std(1, correction=0) / load_LE.mean(1),
        "experts_without_tokens": (load_LE == 0).sum(1),
        "expert_load_churn": result.churn_L,
        **{name: mean_L for name, mean_L in means.items() if not off.get(name)},
    }


def _say(message: str) -> None:
    if dist.get_rank() == 0:
        print(message, flush=True)
