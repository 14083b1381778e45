"""What a rank does in Python does not grow with the world."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

FLAGS = "--data.corpus random --model.vocab_size 512 --model.dim 256 --model.num_heads 8 --moe.hidden_dim 32"
FLAGS += " --training.seq_len 16 --training.microbatch_size 1"


def measure(dp: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "moe_dtensor.bench.fake_world", "--config", "train_configs/debug.toml"]
    command += ["--mesh", f"{dp}x1x2", *FLAGS.split(), "--training.global_batch_size", str(dp)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.full
def test_a_step_of_512_ranks_has_the_collectives_of_8() -> None:
    small, large = measure(4), measure(256)
    for what in ("collectives of a step", "process groups", "items of a rank's plan"):
        assert large[what] == small[what]
    assert small["collectives of a step"]["dp reduce_scatter"] > 0
