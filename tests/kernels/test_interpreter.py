from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FILES = Path(__file__).parent / "on_triton"
# No plugin that happens to be installed takes part: some warn, and warnings are errors.
ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    "PYTEST_ADDOPTS": "",
    "PYTEST_PLUGINS": "",
}


def test_triton_kernels_under_the_interpreter():
    """The tests of on_triton/ pass with kernels interpreted on the CPU."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(FILES)],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
