"""A config is judged before torch is loaded, and quickly."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

PLAIN = "tests/config/plain.toml"


def test_train_checks_before_it_loads_torch() -> None:
    """Ranks started without the script say the same, at once, and only rank 0 speaks."""
    command = [sys.executable, "-m", "moe_dtensor", "train", "--config", PLAIN, "--mesh.tp", "3"]
    said = {}
    for rank in ("0", "1"):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        environment = {**os.environ, "RANK": rank, "WORLD_SIZE": "3"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 2
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Of the processor's time, which other processes do not lengthen much; importing torch takes more.
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
        said[rank] = done.stdout + done.stderr
    assert said["0"].startswith("error: model.num_heads = 8")
    assert "Traceback" not in said["0"]
    assert not said["1"]


@pytest.mark.parametrize(("words", "code"), [("--world 4", 0), ("--mesh.tp 3", 2), ("--training.stps 3", 2)])
def test_check_is_quick_and_loads_no_torch(words: str, code: int) -> None:
    program = (
        "import sys; from moe_dtensor.__main__ import main; code = main(sys.argv[1:]);"
        "print(*{'torch', 'numpy', 'triton', 'torchtitan'} & set(sys.modules), file=sys.stderr); sys.exit(code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", program, "check", "--config", PLAIN, *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert not any(name in done.stderr.split() for name in ("torch", "numpy", "triton", "torchtitan"))
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
