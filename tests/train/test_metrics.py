"""Records, where they go, and what is shown of them."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from moe_dtensor.config.check_files import check_files
from moe_dtensor.config.errors import ConfigError, RunError
from moe_dtensor.config.schema import Config, Metrics, Profiling, Training
from moe_dtensor.train.metrics import Meter, peak_flops
from moe_dtensor.train.profile import Profiler
from moe_dtensor.train.sinks import Display, Record, build_sinks, format_record

CPU = torch.device("cpu")


class Kept:
    def __init__(self) -> None:
        self.records: list[Record] = []

    def log(self, record: Record) -> None:
        self.records.append(record)

    def close(self) -> None:
        pass


def config_of(**metrics: Any) -> Config:
    return Config(training=Training(seq_len=5, global_batch_size=4), metrics=Metrics(**metrics))


def values_of(step: int) -> dict[str, torch.Tensor | float]:
    return {
        "loss": torch.tensor(1.0 / step, dtype=torch.float32),
        "lr": 0.5,
        "grad_norm": torch.tensor([2.0 / 3], dtype=torch.float64).squeeze(),
        "expert_load_max_over_mean": torch.tensor([1.5, 1.25 + step]),
    }


def test_record() -> None:
    kept = Kept()
    meter = Meter(config_of(), CPU, [kept], layers=(1, 3))
    time.sleep(0.02)
    meter.add(1, values_of(1))
    meter.add(2, {**values_of(3), "validation_loss": 4.0})
    first, second = kept.records
    assert first["step"] == 1
    assert first["loss"] == 1.0
    assert first["grad_norm"] == 2.0 / 3
    assert first["lr"] == 0.5
    assert first["tokens"] == 20
    assert first["expert_load_max_over_mean"] == {"1": 1.5, "3": 2.25}
    assert 0.02 <= first["step_seconds"] < 1.0
    assert first["tokens_per_second"] == pytest.approx(20 / first["step_seconds"])
    assert 0.01 < first["peak_memory_gib"] < 100
    assert "mfu" not in first
    # float32 values come over as they are.
    assert second["loss"] == torch.tensor(1.0 / 3, dtype=torch.float32).item()
    assert second["validation_loss"] == 4.0


def test_interval_reads_once_and_keeps_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(1) or tolist(tensor))
    kept = Kept()
    meter = Meter(config_of(log_interval=3), CPU, [kept], layers=(0, 1))
    for step in range(1, 6):
        meter.add(step, values_of(step))
    assert [record["step"] for record in kept.records] == [1, 2, 3]
    meter.flush()
    meter.flush()
    assert [record["step"] for record in kept.records] == [1, 2, 3, 4, 5]
    assert [r["expert_load_max_over_mean"]["1"] for r in kept.records] == [1.25 + step for step in range(1, 6)]
    assert len(reads) == 2


def test_pauses_do_not_count() -> None:
    kept = Kept()
    meter = Meter(config_of(), CPU, [kept], layers=(0, 1))
    with meter.paused():
        time.sleep(0.3)
    meter.add(1, values_of(1))
    assert kept.records[0]["step_seconds"] < 0.2


def test_mfu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_dtensor.train.metrics.peak_flops", lambda device: 1000.0)
    kept = Kept()
    meter = Meter(config_of(), CPU, [kept], world_size=2, flops_per_token=10.0, layers=(0, 1))
    meter.add(1, values_of(1))
    assert kept.records[0]["mfu"] == pytest.approx(kept.records[0]["tokens_per_second"] * 10.0 / 2000.0)


def test_peak_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops(CPU) is None
    for name, flops in (
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA T1000", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda")) == flops


def test_other_ranks_keep_nothing() -> None:
    meter = Meter(config_of(), CPU, [])
    meter.add(1, values_of(1))
    assert meter._steps == []
    meter.close()


RECORD: Record = {
    "step": 3,
    "loss": 1.0 / 3,
    "grad_norm": float("inf"),
    "lr": 1e-3,
    "tokens_per_second": 12345.6,
    "mfu": 0.321,
    "peak_memory_gib": 1.5,
    "expert_load_max_over_mean": {"1": 1.5, "3": 2.25},
}


def test_json_lines(tmp_path: Path) -> None:
    for start in (0, 1):
        (sink,) = build_sinks(config_of(), tmp_path, "id", start)
        sink.log({**RECORD, "step": start + 1})
        written = (tmp_path / "metrics.jsonl").read_text()  # On disk before close.
        sink.close()
    records = [json.loads(line) for line in written.splitlines()]
    assert records == [{**RECORD, "step": step, "grad_norm": None} for step in (1, 2)]


def test_tensorboard_is_readable(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sinks = build_sinks(config_of(tensorboard=True), tmp_path, "id", 2)
    for sink in sinks:
        sink.log({**RECORD, "grad_norm": 2.0})
        sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(3, pytest.approx(1 / 3))]
    assert [e.value for e in events.Scalars("expert_load_max_over_mean/layer_3")] == [2.25]


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    run = SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finished")
    )
    module = ModuleType("wandb")
    module.init = lambda **options: calls.append(options) or run  # type: ignore[attr-defined]
    module.__spec__ = SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(ConfigError, match="not logged in"):  # it was a traceback
        check_files(config_of(wandb=True))
    monkeypatch.setenv("WANDB_API_KEY", "key")
    for sink in build_sinks(config_of(wandb=True, wandb_project="mine"), tmp_path, "the-id", 0):
        sink.log(RECORD)
        sink.close()
    options, (step, values), end = calls
    assert (options["project"], options["id"], options["resume"]) == ("mine", "the-id", "allow")
    assert step == 3
    assert values["expert_load_max_over_mean/layer_1"] == 1.5
    assert end == "finished"
    module.init = lambda **options: 1 / 0  # type: ignore[attr-defined]
    with pytest.raises(RunError, match="could not be started"):
        build_sinks(config_of(wandb=True), tmp_path, "the-id", 0)


def test_missing_wandb_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_files(config_of())
    with pytest.raises(ConfigError, match="needs the package wandb") as error:
        check_files(config_of(wandb=True))
    assert "moe_dtensor[wandb]" in error.value.remedy


FORCED: Record = {**RECORD, "grad_norm": 2.0, "forced_router": "uniform"}


def test_a_forced_router_is_named_in_every_line_and_record(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert format_record(FORCED, 10).endswith("load 2.25  router uniform (forced)")
    sinks = build_sinks(config_of(tensorboard=True), tmp_path, "id", 0)
    for sink in sinks:
        for step in (1, 2):
            sink.log({**FORCED, "step": step})
        sink.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["forced_router"] for line in lines] == ["uniform", "uniform"]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.tensor_proto.string_val for e in events.Tensors("forced_router/text_summary")] == [[b"uniform"]]


def test_texts_pass_through_the_meter() -> None:
    kept = Kept()
    meter = Meter(config_of(), CPU, [kept], layers=(0, 1))
    meter.add(1, {**values_of(1), "forced_router": "zipf"})
    assert kept.records[0]["forced_router"] == "zipf"
    assert kept.records[0]["expert_load_max_over_mean"] == {"0": 1.5, "1": 2.25}


def test_line() -> None:
    assert format_record(RECORD, 1000) == (
        "step    3/1000  loss 0.3333  grad inf  lr 1.0e-03  12,346 tok/s  MFU 32.1%  1.50 GiB  load 2.25"
    )
    assert format_record({"step": 10, "loss": 2.0}, 10) == "step 10/10  loss 2.0000"


def test_plain_lines_in_a_pipe() -> None:
    stream = io.StringIO()
    display = Display(steps=5, every=2, stream=stream)
    for step in range(1, 6):
        display.log({"step": step, "loss": 1.0})
    display.say("saved [1]")
    display.close()
    assert stream.getvalue().splitlines() == [*(f"step {step}/5  loss 1.0000" for step in (2, 4, 5)), "saved [1]"]


def test_live_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name, value in (("TERM", "xterm"), ("COLUMNS", "140"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    stream = Terminal()
    display = Display(steps=100, stream=stream)
    for step in range(1, 11):
        display.log({**RECORD, "step": step})
    display.say("saved [1]")
    display.close()
    shown = stream.getvalue()
    # The line is renewed in place; every fifth of these hundred steps stays.
    assert "step   7/100" in shown
    lines = [line for line in shown.split("\n") if line.strip()]
    assert sum("step   5/100" in line for line in lines) >= 1
    assert sum("step   7/100" in line and "\r" not in line for line in lines) == 0
    assert "saved [1]" in shown


def test_profiler_window(tmp_path: Path) -> None:
    profiler = Profiler(Profiling(enable=True, first_step=2, steps=2), tmp_path)
    written = []
    for step in range(1, 6):
        profiler.before_step(step)
        torch.ones(3) @ torch.ones(3)
        written.append(profiler.after_step(step))
    assert written == [None, None, tmp_path / "profile" / "steps-2-3.json", None, None]
    assert profiler.close() is None
    trace = json.loads((tmp_path / "profile" / "steps-2-3.json").read_text())
    assert any("aten::" in event.get("name", "") for event in trace["traceEvents"])


def test_profiler_cut_short_or_late(tmp_path: Path) -> None:
    """A run that resumes past first_step still gets its window; one that ends inside it still gets a trace."""
    profiler = Profiler(Profiling(enable=True, first_step=2, steps=5), tmp_path)
    for step in (7, 8):
        profiler.before_step(step)
        assert profiler.after_step(step) is None
    assert profiler.close() == tmp_path / "profile" / "steps-7-8.json"
    other_rank = Profiler(Profiling(enable=True, first_step=1, steps=1), tmp_path / "other", rank=1)
    other_rank.before_step(1)
    assert other_rank.after_step(1) is None
