"""The training loop: what every rank runs from start to end."""

from __future__ import annotations

import contextlib
import gc
from dataclasses import dataclass, field
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dtensor.checkpoint.manager import CheckpointManager, Identity
from moe_dtensor.config.errors import AGAIN, DONE, FAILED, RunError
from moe_dtensor.config.resolve import moe_layers
from moe_dtensor.config.schema import Config
from moe_dtensor.config.stages import stage_at
from moe_dtensor.data import Corpus, Loader, describe
from moe_dtensor.data.loader import Prefetcher
from moe_dtensor.estimate.shards import flops_per_token, parameters
from moe_dtensor.train.build import Trainer, build, give, keep, same_sizes
from moe_dtensor.train.checkpoints import carried_files, check_weights, load_initial, plan_export, write_export
from moe_dtensor.train.held_out import HeldOut, build_held_out
from moe_dtensor.train.metrics import DelayedFlag, Meter, Skips, Value
from moe_dtensor.train.opened import Opened
from moe_dtensor.train.profile import Profiler
from moe_dtensor.train.ranks import EndRequest, Ranks, end_ranks
from moe_dtensor.train.replicas import check_replicas
from moe_dtensor.train.routing import RoutingDrift, routing_metrics, routing_notice
from moe_dtensor.train.run_folder import HANG_FOLDER, RunFolder
from moe_dtensor.train.sinks import Display, Owner, Sink, build_sinks, say_aside
from moe_dtensor.train.step import StepResult, to_device, train_step
from moe_dtensor.train.watch import Watch


def train(opened: Opened, ranks: Ranks, request: EndRequest) -> int:
    """Run what is opened to its last step on this rank; returns the exit status.

    Raises:
        Ended: the ranks agreed to end; all that one rank may meet before the first step is told once.
    """
    config, folder, watch = opened.config, opened.folder, opened.watch
    try:
        status = DONE
        if folder.state == "finished":
            _say(folder.message)
        else:
            check_weights(config)
            loaders = ranks.agree(lambda: build_loaders(config, opened.corpus, opened.loader))
            run = ranks.agree(lambda: Run(config, opened.device, opened.corpus, folder, request, loaders, watch))
            status = run.to_the_end()
        watch.now("end", config.training.steps)
        end_ranks()
    finally:
        opened.close()
    return status


def build_loaders(config: Config, corpus: Corpus, loader: Loader | None = None) -> tuple[Loader, HeldOut]:
    """Of training, and of what is measured beside it; a split that is too small is told at once."""
    return loader or Loader(config, corpus), build_held_out(config, corpus)


@dataclass
class Run:
    """One run on this rank."""

    config: Config
    device: torch.device
    corpus: Corpus
    folder: RunFolder
    request: EndRequest = field(default_factory=EndRequest)
    loaders: tuple[Loader, HeldOut] | None = None
    watch: Watch | None = None

    def __post_init__(self) -> None:
        config, folder = self.config, self.folder
        self.told = describe(config, self.corpus)
        self.exported = plan_export(config, self.folder.checkpoints)
        self.trainer: Trainer = build(config, self.device)
        self.loader, self.held_out = self.loaders or build_loaders(config, self.corpus)
        self.batches = Prefetcher(self.loader, self.trainer.mesh["dp"].get_local_rank(), config.mesh.dp)
        self.checkpoints = CheckpointManager(
            folder.checkpoints,
            config,
            list(self.trainer.parts),
            self.trainer.optimizers,
            self.trainer.schedule,
            self.batches,
            self.trainer.balance,
            Identity(folder.run_id, folder.run["data"], folder.start_id, folder.check_owner),
            say_aside,
        )
        self.drift: RoutingDrift | None = None
        if config.training.routing_drift_interval:
            load_initial(self.trainer, config)
            self.drift = RoutingDrift(self.trainer, self.loader)
        resumes = config.checkpoint.enable and folder.state == "unfinished"
        self.step = (self.checkpoints.load_latest() or 0) if resumes else 0
        if self.drift is None and self.step == 0:
            load_initial(self.trainer, config)
        self.is_rank_0 = dist.get_rank() == 0
        self.profiler = Profiler(config.profiling, folder.path, dist.get_rank())
        self.display: Display | None = None
        self.sinks: list[Sink] = []
        if self.is_rank_0:
            self.display = self._open_display()
            self.sinks.append(self.display)
        self.meter = Meter(
            config,
            self.device,
            self.sinks,
            world_size=dist.get_world_size(),
            flops_per_token=flops_per_token(config),
            layers=sorted(moe_layers(config)),
            names=names_of_entries(config),
        )
        self.routing: dict[str, Value] = {}
        self.begun = False
        self.unfinite: Tensor = torch.zeros((), dtype=torch.bool, device=self.device)
        self.skips = Skips(self.device)
        self.end_flag = DelayedFlag(self.device)

    def _open_display(self) -> Display:
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
        return display

    def to_the_end(self) -> int:
        """Take the remaining steps; returns the exit status.

        0 at the last step; 1 if the run stopped on a loss or gradient that is not finite, or if its last state could
        not be saved; 75 if it was asked to end, saved and ended.
        """
        steps = self.config.training.steps
        self.request.from_now_on_save()
        if self.watch is not None:
            self.watch.arm(self.folder.path / HANG_FOLDER)
        while self.step < steps:
            self.step += 1
            self._now("step")
            self._enter_stage()
            self.profiler.before_step(self.step)
            lr = self.trainer.schedule.lr
            asked = float(self.request.signal != 0)
            result = train_step(self.trainer, to_device(self.batches.next(), self.device), asked)
            self._begin()
            self._record(result, lr)
            self.profiler.after_step(self.step)
            if self._must_stop(result):
                self._stop()
            ends = self.end_flag.read(result.asked_to_end) and self.step < steps
            self._check_replicas()
            self._save(ends)
            if ends:
                return self._end_early()
        return self._finish()

    def _begin(self) -> None:
        """With the first step taken the folder becomes this run's."""
        if self.begun:
            return
        self.begun = True
        if self.is_rank_0:
            config = self.config
            self.folder.begin(self.step - 1)
            opened = build_sinks(config, self.folder.path, self.folder.run_id, self.step - 1)
            self.sinks[:0] = [Owner(self.folder.check_owner), *opened]

    def _finish(self) -> int:
        self._close()
        if self.config.checkpoint.enable and self.checkpoints.saved_step != self.step:
            self._save(True)  # a disk that was full may have room by now
            self.checkpoints.wait()
        if self.config.checkpoint.enable and self.checkpoints.saved_step != self.step:
            raise RunError(
                f"all {self.step} steps are taken, but the last state could not be saved; the newest checkpoint is "
                f"that of step {self.checkpoints.saved_step}.",
                "Make room, and start again: the run resumes from there.",
                common=True,
            )
        if self.exported is not None:
            _say(f"The weights are in {write_export(self.exported, self.folder.path)}.")
        if self.is_rank_0:
            self.folder.finish(self.step)
        return DONE

    def _end_early(self) -> int:
        self._close()
        saved = self.checkpoints.saved_step == self.step
        if self.is_rank_0:
            by = f" by {self.request.name}" if self.request.name else ""
            kept = "which is saved; the same command goes on" if saved else "which could not be saved"
            say_aside(f"Ended{by} after step {self.step} of {self.config.training.steps}, {kept}.")
        return AGAIN if saved else FAILED

    def _enter_stage(self) -> None:
        """Before a step with other sizes than the last: build for them, with the same weights."""
        config = stage_at(self.config, self.step)
        if same_sizes(config, self.trainer.config):
            return
        kept, mesh = keep(self.trainer), self.trainer.mesh
        self.checkpoints.replace([], self.trainer.optimizers, self.trainer.schedule, self.trainer.balance)
        with self.meter.paused():
            self.trainer.runner.close()
            del self.trainer
            gc.collect()  # modules and their hooks hold one another
            self.trainer = build(config, self.device, mesh)
            give(self.trainer, kept)
            trainer = self.trainer
            self.checkpoints.replace(list(trainer.parts), trainer.optimizers, trainer.schedule, trainer.balance)
            self.held_out.enter_stage(config)
        self.meter.enter_stage(flops_per_token(config))
        training = config.training
        _say(
            f"From step {self.step} on a batch is {training.global_batch_size} sequences of {training.seq_len} tokens."
        )

    def _close(self) -> None:
        self.batches.close()
        self.loader.close()
        self.profiler.close()
        self._now("saving")
        self.checkpoints.wait()
        self._note_saved()
        self.meter.close()
        self.trainer.runner.close()

    def _record(self, result: StepResult, lr: float) -> None:
        values: dict[str, Value] = {"loss": result.loss, "grad_norm": result.grad_norm, "lr": lr}
        values["data_wait_seconds"] = self.batches.wait_seconds
        values |= {f"mtp_loss_{k}": loss for k, loss in enumerate(result.mtp_loss_K, start=1)}
        values |= result.token_shares
        if result.source_loss_N is not None:
            values["source_loss"] = result.source_loss_N
            values["source_tokens"] = torch.tensor([*self.batches.tokens_by_source.values()], dtype=torch.float64)
        if len(result.churn_L):
            self.routing = routing_metrics(self.config, result)
            values |= self.routing
        if self.config.training.nonfinite == "skip":
            values["skipped"] = (~result.finite).to(torch.float64)
        if self.drift is not None and self.step % self.config.training.routing_drift_interval == 0:
            with self.meter.paused():
                values["routing_drift"] = self.drift.measure(self.trainer)
        if self.held_out.is_due(self.step):
            with self.meter.paused():
                values |= self.held_out.measure(self.trainer, self.step)
        self.meter.add(self.step, values)

    def _must_stop(self, result: StepResult) -> bool:
        """Whether a step since the last look was not finite, or too many in a row were skipped.

        Looks before anything is saved.
        """
        skips = self.config.training.nonfinite == "skip"
        if skips:
            self.skips.add(result.finite)
        else:
            self.unfinite |= ~result.finite
        if not (self.step % self.config.metrics.log_interval == 0 or self._saves_now()):
            return False
        return self.skips.longest() >= self.config.training.max_skipped if skips else bool(self.unfinite)

    def _stop(self) -> NoReturn:
        self._close()
        if self.config.training.nonfinite == "skip":
            raise RunError(
                f"{self.config.training.max_skipped} steps in a row were skipped by step {self.step}, since loss or "
                "gradient was not finite: the model does not train any more. Nothing was saved after the first.",
                "Start again to resume from the last checkpoint, with a lower optimizer.lr.",
                common=True,
            )
        raise RunError(
            f"loss or gradient was not finite by step {self.step}; the update of such a step was not applied, and "
            "nothing was saved after it.",
            "Start again to resume from the last checkpoint, with a lower optimizer.lr or with "
            'training.nonfinite = "skip".',
            common=True,
        )

    def _saves_now(self) -> bool:
        options = self.config.checkpoint
        return options.enable and (self.step % options.interval == 0 or self.step == self.config.training.steps)

    def _save(self, at_once: bool = False) -> None:
        """Save where it is time to, or at once; a model whose last step was skipped waits for a better one."""
        if not self.config.checkpoint.enable or not (at_once or self._saves_now()):
            return
        if self.config.training.nonfinite == "skip" and self.skips.now() and self.step < self.config.training.steps:
            self._tell(f"step {self.step} was skipped: no checkpoint of it is written")
            return
        self.meter.flush()
        with self.meter.paused():
            self._now("saving")
            self.checkpoints.save(self.step, self._carried())
        self._note_saved()

    def _carried(self) -> dict[str, str]:
        if not self.is_rank_0:
            return {}
        return carried_files(self.folder, self.trainer.config, self.device, self.step, self.routing, say_aside)

    def _note_saved(self) -> None:
        if self.is_rank_0 and self.checkpoints.saved_step is not None:
            try:
                self.folder.note_saved(self.checkpoints.saved_step)
            except OSError as error:
                say_aside(f"warning: run.json cannot be written: {error.strerror}.")

    def _check_replicas(self) -> None:
        interval = self.config.training.check_replicas
        if interval and self.step % interval == 0:
            check_replicas(self.trainer, self.step)

    def _now(self, what: str) -> None:
        if self.watch is not None:
            self.watch.now(what, self.step)

    def _tell(self, text: str) -> None:
        if self.display is not None:
            self.display.say(text)


def names_of_entries(config: Config) -> dict[str, list[str]]:
    """Of values with an entry for each source or text."""
    sources, sets = [s.name for s in config.data.sources], [s.name for s in config.eval.sets]
    return {"source_loss": sources, "source_tokens": sources, "eval_loss": sets, "eval_bits_per_byte": sets}


def _say(message: str) -> None:
    if dist.get_rank() == 0:
        with contextlib.suppress(OSError, ValueError):
            print(message, flush=True)
