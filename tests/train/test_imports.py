"""What a rank loads before it can train: every module is paid for on every rank, at every start."""

from __future__ import annotations

import subprocess
import sys

import torch

from moe_dtensor.kernels.experts.mlp import _is_hopper

COMPILER = ("torch._dynamo", "torch._inductor", "torch.distributed.pipelining", "triton")
LIBRARIES = ("datasets", "matplotlib", "pandas", "pyarrow", "rich", "tensorboard", "tokenizers", "torchtitan")
UNNEEDED = (*COMPILER, *LIBRARIES, "transformers")


def test_what_training_imports() -> None:
    program = f"import sys, moe_dtensor.train.loop; print(*[m for m in {UNNEEDED} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_constant_is_marked_as_torch_marks_it() -> None:
    """The mark is set by hand, since torch's own decorator loads the compiler."""

    @torch.compiler.assume_constant_result
    def marked() -> None: ...

    assert vars(marked).items() <= vars(_is_hopper).items()
