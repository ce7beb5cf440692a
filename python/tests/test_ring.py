"""Context parallelism of diffusers, for real: two processes that talk over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_two_processes_give_what_one_does() -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, Path(__file__).with_name("ring.py")], capture_output=True, text=True, timeout=500,
        # On the CPU, wherever it runs: the merging is diffusers', what is merged is ours.
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    sparse = found.pop("wan ring sparse")
    assert len(found) == 4 and max(found.values()) < 2e-5, found
    assert 1e-5 < sparse < 0.5
