"""How a run ends: one status, each error told once by the rank that has it."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from .starts import Start, tiny

# Ranks are forked from a process with threads; see pyproject.toml.


def losses(folder: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records]


def test_a_run_that_stops_on_a_loss_that_is_not_finite_says_so_by_its_status(tmp_path: Path) -> None:
    """On several CPU ranks it ended with 0."""
    ended = Start(tmp_path, tiny(tmp_path / "run", optimizer__lr="1e30", optimizer__eps="1e-30"), 2).wait()
    assert ended.statuses == [1, 1], ended.text
    assert len(ended.errors) == 1
    assert "loss or gradient was not finite by step" in ended.errors[0]
    assert "Traceback" not in ended.text


def test_skipping_ends(tmp_path: Path) -> None:
    """A dead model skipped on and on, its dead checkpoints rotated the healthy ones away, status 0."""
    argv = tiny(
        tmp_path / "run",
        optimizer__lr="1e30",
        optimizer__eps="1e-30",
        training__nonfinite="skip",
        training__max_skipped="4",
        training__steps="40",
        checkpoint__interval="1",
    )
    ended = Start(tmp_path, argv, 1).wait()
    assert ended.statuses == [1], ended.text
    assert "4 steps in a row were skipped" in ended.text
    first = next(
        i
        for i, line in enumerate((tmp_path / "run/metrics.jsonl").read_text().splitlines(), 1)
        if json.loads(line)["skipped"]
    )
    saved = sorted(int(p.name[5:]) for p in (tmp_path / "run/checkpoints").iterdir())
    assert saved[-1] < first


def test_an_error_of_one_rank_is_told_by_it(tmp_path: Path) -> None:
    """A wrong config of a rank other than 0 was never printed."""
    ended = Start(tmp_path, tiny(tmp_path / "run"), 4, more={3: ["--model.dim", "33"]}).wait()
    assert ended.statuses == [2] * 4, ended.text
    assert len(ended.errors) == 1
    assert ended.errors[0].startswith("error: rank 3 on ")
    assert "model.dim = 33 is not a multiple of" in ended.errors[0]
    assert ended.outputs[3].count("error: ") == 1
    assert "Traceback" not in ended.text


def test_an_error_of_all_ranks_is_nobodys(tmp_path: Path) -> None:
    ended = Start(tmp_path, tiny(tmp_path / "run", model__dim="33"), 2).wait()
    assert ended.statuses == [2, 2], ended.text
    assert ended.errors == [line for line in ended.outputs[0].splitlines() if line.startswith("error: model.dim = 33")]


def wait_for_step(folder: Path, step: int) -> None:
    end = time.monotonic() + 90
    while time.monotonic() < end:
        path = folder / "metrics.jsonl"
        if path.exists() and path.read_text().count("\n") >= step:
            return
        time.sleep(0.02)
    raise TimeoutError


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_saves_and_ends(tmp_path: Path, name: str) -> None:
    """SIGTERM ended a run with 143 and nothing saved. Sent to one rank, all save and end."""
    folder = tmp_path / "run"
    argv = tiny(folder, training__steps="300", checkpoint__interval="100000")
    start = Start(tmp_path, argv, 2)
    wait_for_step(folder, 3)
    os.kill(start.pids[1], getattr(signal, name))
    ended = start.wait()
    assert ended.statuses == [75, 75], ended.text
    taken = losses(folder)
    assert f"after step {len(taken)} of 300, which is saved; the same command goes on" in ended.text
    assert [p.name for p in (folder / "checkpoints").iterdir()] == [f"step-{len(taken):08d}"]
    steps = str(len(taken) + 2)
    ended = Start(tmp_path, [*argv, "--training.steps", steps], 2).wait()
    assert ended.statuses == [0, 0], ended.text
    assert losses(folder)[: len(taken)] == taken
    assert len(losses(folder)) == len(taken) + 2


def test_data_may_take_longer_than_a_collective(tmp_path: Path) -> None:
    """A rank that tokenised for longer than ``comm.timeout_seconds`` failed the others, which had met before."""

    def be_slow(rank: int) -> None:
        from moe_dtensor.train import opened

        build = opened.build_corpus
        opened.build_corpus = lambda config: (time.sleep(12 * rank), build(config))[1]

    ended = Start(tmp_path, tiny(tmp_path / "run", comm__timeout_seconds="10"), 2, before=be_slow).wait()
    assert ended.statuses == [0, 0], ended.text


def test_a_rank_that_hangs_is_named(tmp_path: Path) -> None:
    """It ended the others after their timeout, with a trace that named nobody."""
    folder = tmp_path / "run"
    argv = tiny(folder, training__steps="100000", comm__timeout_seconds="20")
    start = Start(tmp_path, argv, 4, environment={"TORCH_FR_BUFFER_SIZE": "100"})
    wait_for_step(folder, 3)
    os.kill(start.pids[1], signal.SIGSTOP)
    begin = time.monotonic()
    ended = start.wait()
    assert ended.statuses == [1, -9, 76, 76], ended.text
    assert len(ended.errors) == 1
    assert "rank 1 on " in ended.errors[0]
    assert "hangs in step " in ended.errors[0]
    assert "Rank 0 waits for it in step " in ended.text
    assert time.monotonic() - begin < 20 + 25  # the stopped one is killed ten seconds after
    kept = {p.name[-11:] for p in (folder / "hangs").iterdir()}
    assert kept == {"rank-0.json", "rank-2.json", "rank-3.json"}


def test_a_thawed_run_writes_nothing(tmp_path: Path) -> None:
    """Frozen, overtaken and thawed, a run wrote on into the metrics of the one that had taken over."""

    def soon(rank: int) -> None:
        from moe_dtensor.train import lease, loop

        lease.RENEW_SECONDS, lease.STALE_SECONDS = 0.3, 3.0
        take = loop.train_step
        loop.train_step = lambda *args: (time.sleep(0.2), take(*args))[1]

    folder = tmp_path / "run"
    argv = tiny(folder, training__steps="20", checkpoint__interval="5")
    first = Start(tmp_path, argv, 2, before=soon)
    wait_for_step(folder, 7)
    for pid in first.pids:
        os.kill(pid, signal.SIGSTOP)
    second = Start(tmp_path, argv, 2, before=soon).wait()
    assert second.statuses == [0, 0], second.text
    assert "Resuming the run" in second.text
    written = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for pid in first.pids:
        os.kill(pid, signal.SIGCONT)
    ended = first.wait()
    assert ended.statuses[0] == 1, ended.text
    assert len(ended.errors) == 1
    assert "lost the run in" in ended.errors[0]
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == written


def test_a_killed_rank_is_no_riddle(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    start = Start(tmp_path, tiny(folder, training__steps="100000"), 2)
    wait_for_step(folder, 3)
    os.kill(start.pids[1], signal.SIGKILL)
    ended = start.wait()
    assert ended.statuses == [76, -9], ended.text
    assert len(ended.errors) == 1
    assert "lost contact with another rank" in ended.errors[0]


def test_ranks_that_are_started_again_resume(tmp_path: Path) -> None:
    """They found the addresses of the ranks before them in the launcher's store, which stays, and met nobody; and with
    ``--run.fresh true`` each restart deleted the run's own checkpoints."""
    alone = Start(tmp_path, tiny(tmp_path / "alone", mesh__pp="2"), 2).wait()
    assert alone.statuses == [0, 0], alone.text
    argv = [*tiny(tmp_path / "run", mesh__pp="2"), "--run.fresh", "true"]

    def die(rank: int) -> None:
        from moe_dtensor.train import loop

        take, steps = loop.train_step, iter(range(1, 7))

        def step(*args):  # type: ignore[no-untyped-def]
            if next(steps) == 4 and rank == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return take(*args)

        loop.train_step = step

    first = Start(tmp_path, argv, 2, before=die)
    assert first.wait().statuses[0] == -signal.SIGKILL
    again = Start(tmp_path, argv, 2, again=first).wait()
    assert again.statuses == [0, 0], again.text
    assert f"Resuming the run in {tmp_path / 'run'} after step 2" in again.text
    assert losses(tmp_path / "run") == losses(tmp_path / "alone")


def test_a_replica_that_differs_is_named(tmp_path: Path) -> None:
    """A rank that computed garbage went unnoticed."""

    def spoil(rank: int) -> None:
        from moe_dtensor.train import loop

        take = loop.train_step

        def step(trainer, *args):  # type: ignore[no-untyped-def]
            result = take(trainer, *args)
            if rank == 2 and trainer.schedule.state_dict()["steps"] == 3:
                next(p for n, p in trainer.parts[0].named_parameters() if n.endswith("router.weight")).data.mul_(2)
            return result

        loop.train_step = step

    argv = tiny(tmp_path / "run", mesh__dp="1", mesh__tp="4", training__check_replicas="2")
    ended = Start(tmp_path, argv, 4, before=spoil).wait()
    assert ended.statuses == [1] * 4, ended.text
    assert len(ended.errors) == 1
    assert "after step 4 replicas are not alike: rank 2 differs from rank " in ended.errors[0]
    assert "router.weight" in ended.errors[0]


def test_replicas_that_are_alike(tmp_path: Path) -> None:
    argv = tiny(tmp_path / "run", mesh__dp="1", mesh__tp="2", training__check_replicas="1", moe__bias_rate="0.01")
    assert Start(tmp_path, argv, 2).wait().statuses == [0, 0]
