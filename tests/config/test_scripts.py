"""run_train.sh up to the point where ranks would start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run_train(*words: str, folder: str | Path = ".", **variables: str) -> subprocess.CompletedProcess[str]:
    """Call the script with this Python's environment as the active one."""
    inherited = {
        k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "CONFIG_FILE", "NGPU", "NNODES")
    }
    path = f"{Path(sys.executable).parent}:{inherited['PATH']}"
    environment = {**inherited, "VIRTUAL_ENV": sys.prefix, "PATH": path, "CUDA_VISIBLE_DEVICES": "", **variables}
    script = Path("run_train.sh").resolve()
    return subprocess.run(
        [script, *words], capture_output=True, text=True, check=False, env=environment, cwd=folder, timeout=120
    )


CHECK = ["check", "--config", "tests/config/plain.toml"]


@pytest.mark.parametrize(
    ("words", "variables", "problem"),
    [
        (["--mesh.tp", "3"], {}, "but there are 4"),
        (["--mesh.tp", "3"], {"NGPU": "3"}, "model.num_heads = 8 is not a multiple of mesh.tp = 3"),
        (["--mesh.dp", "4"], {"NNODES": "2"}, "= 4 ranks, but there are 8"),
        (["--mesh.dp", "4"], {"CUDA_VISIBLE_DEVICES": "0,1"}, "= 4 ranks, but there are 2"),
        ([], {"CONFIG_FILE": "train_configs/none.toml"}, "cannot read the config train_configs/none.toml"),
        (["--training.stps", "3"], {}, "Did you mean training.steps?"),
        ([], {"NGPU": "0"}, "NGPU=0 must be a whole number, 1 or more"),
        ([], {"NGPU": "two"}, "NGPU=two must be a whole number, 1 or more"),
        ([], {"MAX_RESTARTS": "-1"}, "MAX_RESTARTS=-1 must be a whole number, 0 or more"),
    ],
)
def test_a_wrong_config_stops_before_any_rank_starts(words: list[str], variables: dict[str, str], problem: str) -> None:
    done = run_train(*words, **variables)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert problem in done.stderr
    assert len(done.stderr.splitlines()) == 2
    assert not done.stdout


def test_a_full_output_is_no_wrong_config() -> None:
    """`check` ended with a traceback, so no rank started."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "moe_dtensor", *CHECK], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert (done.returncode, done.stderr) == (0, b"")


def test_several_machines_need_a_meeting_place() -> None:
    done = run_train("--mesh.dp", "8", NNODES="2", NGPU="4")
    assert done.returncode != 0
    assert "RDZV_ENDPOINT=host:port" in done.stderr


def test_a_config_in_the_folder_one_calls_from_is_found(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[model]\ndim = 100\n")
    done = run_train(folder=tmp_path, CONFIG_FILE="mine.toml")
    assert "model.dim = 100" in done.stderr


def test_help_tells_variables_and_keys() -> None:
    done = run_train("--help")
    assert done.returncode == 0
    assert "RDZV_ENDPOINT  host:port" in done.stdout
    assert "--checkpoint.keep_last INT" in done.stdout


def test_slurm_asks_for_a_signal_and_requeues() -> None:
    """It asked for none: a job at its limit was killed with nothing saved."""
    text = Path("docs/slurm.sh").read_text()
    assert "#SBATCH --signal=USR1@120" in text
    assert "#SBATCH --requeue" in text
    assert '[ "$status" -eq 75 ]' in text
    assert subprocess.run(["bash", "-n", "docs/slurm.sh"], check=False).returncode == 0
