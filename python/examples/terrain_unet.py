"""A trained diffusion model draws terrain on the CPU, dense and sparse, and both pictures are written.

    pip install "sparge[torch]" numpy
    python python/examples/terrain_unet.py --size 256 --cdf 0.9

The model is the one-step consistency U-Net of `adaptive-terrain-diffusion` (PyPI, MIT; 39 MB, fetched
by pip once, or given as --model). `benchmarks/diffusion/terrain_net.py`, which this needs from the
repository, runs it in torch with its attention as one function; here that function is exchanged, as in
any model whose code can be changed. How lossless it is over many seeds: docs/results/terrain.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import sparge
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks/diffusion"))
from terrain_net import TerrainNet, dense, fetch, heights, sample  # noqa: E402


def write(path: str, metres: Tensor, highest: Tensor) -> None:
    """A height field as PGM, white at `highest`, which both pictures share."""
    grey = (metres / highest).clamp(0, 1).mul(255).byte().numpy()
    with open(path, "wb") as file:
        file.write(b"P5 %d %d 255\n" % grey.shape[::-1] + grey.tobytes())
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=256, help="of the map, a multiple of 16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cdf", type=float, default=0.9, help="share of the predicted mass to keep")
    parser.add_argument("--model", type=Path, help="the ONNX file; downloaded where not given")
    arguments = parser.parse_args()
    net = TerrainNet(fetch(arguments.model))
    noise, difficulty = sample(arguments.seed, arguments.size)
    skipped: list[float] = []

    def sparse(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[2] < 1024:  # 8×16 blocks; below, there is little to choose from
            return dense(layer, q, k, v)
        out, stats = sparge.attention(q, k, v, cdf=arguments.cdf, return_stats=True)
        skipped.append(stats.qk_sparsity())
        return out  # type: ignore[no-any-return]

    maps = {}
    for name, attend in (("dense", dense), ("sparse", sparse)):
        begin = time.perf_counter()
        maps[name] = net(noise, difficulty, attend)
        print(f"{name:6} {time.perf_counter() - begin:.1f} s for {arguments.size}×{arguments.size}")
        write(f"terrain-{name}.pgm", heights(maps[name])[0], heights(maps["dense"]).max())
    extent = maps["dense"].max() - maps["dense"].min()
    error = (maps["sparse"] - maps["dense"]).square().mean()
    print(f"PSNR of sparse against dense: {10 * torch.log10(extent**2 / error):.1f} dB; skipped by layer:")
    print(" ".join(f"{x:.0%}" for x in skipped))


if __name__ == "__main__":
    main()
