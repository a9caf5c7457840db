"""The Triton versions on CPU tensors, in Triton's interpreter.

It has to be chosen before triton is first imported, which other tests may have done; so it has a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import triton

CASES = Path(__file__).parents[1] / "kernel_cases.py"


def test_triton_versions_are_as_good_as_plain_torch():
    assert triton.__version__
    command = [sys.executable, "-m", "pytest", str(CASES), "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, cwd=CASES.parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
