#!/usr/bin/env python3
"""Draws docs/results/terrain-SIDE.png: dense, sparse and their difference, of one seed.

    python benchmarks/diffusion/terrain_pictures.py --side 128 --folder target/terrain

Settings are those of records/terrain-SIDE-cpu.json at its first sparsity, tuned layers included.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from terrain import recorded  # noqa: E402
from terrain_metrics import compare  # noqa: E402
from terrain_methods import FAMILIES, Sparse, skipped  # noqa: E402
from terrain_net import TerrainNet, fetch, heights, sample  # noqa: E402
from terrain_tuned import Tuned  # noqa: E402

HERE = Path(__file__).parent
RESULTS = HERE.parent.parent / "docs" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, choices=(128, 256), required=True)
    parser.add_argument("--folder", type=Path, required=True, help="the calibrations")
    parser.add_argument("--model", type=Path, help="the ONNX file; downloaded where not given")
    parser.add_argument("--seed", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(2)
    net = TerrainNet(fetch(args.model))
    record = json.loads((HERE / f"records/terrain-{args.side}-cpu.json").read_text())
    rows = {r["name"]: r for r in record["rows"][::-1] if r["order"] == "row"}
    layers = recorded(net, [args.seed], args.side, "cpu")
    tuned = Tuned(args.folder, args.side, "row", layers)
    bounds = {int(layer): bound for layer, bound in rows["tuned by effect"]["bounds"].items()}
    shown = [
        ("tuned by effect", tuned.of_each(bounds)),
        (f"tuned, L1 ≤ {rows['tuned']['bound']}", tuned.at(rows["tuned"]["bound"])),
        ("random", FAMILIES["random"][2](rows["random"]["parameter"])),
    ]
    noise, difficulty = sample(args.seed, args.side)
    exact = net(noise, difficulty)
    exact_heights = heights(exact)[0]

    figure, axes = plt.subplots(3, 3, figsize=(8.2, 7.6))
    for line, (name, method) in zip(axes, shown):
        attend = Sparse(method)
        map_ = net(noise, difficulty, attend)
        psnr, ssim = compare(map_, exact)
        share = 100 * skipped(list(attend.counts.values()))
        sparse_heights = heights(map_)[0]
        high = exact_heights.max().item()
        difference = sparse_heights - exact_heights
        titles = ("dense", f"{name}: {share:.0f}% skipped", f"difference: {psnr:.1f} dB, SSIM {ssim:.4f}")
        for axis, title, picture in zip(line, titles, (exact_heights, sparse_heights, difference)):
            if picture is difference:
                most = difference.abs().max().item()
                drawn = axis.imshow(picture, cmap="RdBu", vmin=-most, vmax=most)
            else:
                drawn = axis.imshow(picture, cmap="terrain", vmin=0, vmax=high)
            axis.set_title(title, fontsize=9)
            axis.set_xticks([])
            axis.set_yticks([])
            bar = figure.colorbar(drawn, ax=axis, fraction=0.046, pad=0.03)
            bar.ax.tick_params(labelsize=7)
            bar.set_label("m", fontsize=7)
    title = f"seed {args.seed}, {args.side}×{args.side}; metres, each difference on its own scale"
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    path = RESULTS / f"terrain-{args.side}.png"
    figure.savefig(path, dpi=72)
    # A palette, for a small file.
    Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"wrote {path}: {path.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main()
