"""Every example of `python/examples` runs, on short settings: what is shown works."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
MODELS = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sparge" / "models"
SMOLLM2 = MODELS / "smollm2-135m.gguf"

# The arguments, and what is said at the end.
RUNS = {
    "sdpa_drop_in.py": ((SMOLLM2, "--tokens", "64"), "wrote mask.png"),
    "transformers_smollm2.py": (
        (SMOLLM2, "novel.txt", "--tokens", "64", "--cdf", "0.9", "--new-tokens", "2"), "sparge ",
    ),
    "diffusers_discs.py": (("--train-steps", "2", "--steps", "2"), "wrote sparse.ppm"),
    "terrain_unet.py": (("--size", "128"), "PSNR"),
    "comfyui_terrain.py": (("--size", "128"), "PSNR"),
}  # fmt: skip


def test_all_of_them_are_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_it_runs(name: str, tmp_path: Path) -> None:
    arguments, said = RUNS[name]
    if SMOLLM2 in arguments and not SMOLLM2.exists():
        _missing(f"{SMOLLM2} is missing; `cargo run --release -p sparge-cli -- run` fetches it")
    (tmp_path / "novel.txt").write_text("She walked to the village and back. " * 60)
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments], cwd=tmp_path, capture_output=True, text=True,
        # Short calls: threads would wait for one another, most of all on a busy machine.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if "could not be downloaded" in done.stderr:
        _missing(done.stderr.strip().splitlines()[0])
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


def _missing(what: str) -> None:
    if os.environ.get("SPARGE_REQUIRE_MODELS") == "1":
        pytest.fail(what)
    pytest.skip(what)
