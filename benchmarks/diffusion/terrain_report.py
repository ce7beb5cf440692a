#!/usr/bin/env python3
"""Turns the records of terrain.py into docs/results/terrain.md and terrain.png.

    python benchmarks/diffusion/terrain_report.py

What stands under "## Reading" in an existing page is kept: it is written by hand.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).parent
RESULTS = HERE.parent.parent / "docs" / "results"
COLOURS = {
    "tuned by effect": "#000000", "tuned": "#00a0c0", "SpargeAttn, τ": "#1f4e9c",
    "SpargeAttn, top-k": "#7aa6de", "paper's pooling, τ": "#d1495b",
    "paper's pooling, top-k": "#e8a0aa", "MInference, block-sparse": "#2e933c",
    "FlexPrefill, query-aware": "#edae49", "XAttention": "#8f3f97", "window": "#888888",
    "random": "#bbbbbb",
}  # fmt: skip
# Families whose parameter is a number of blocks or tokens.
WHOLE = ("MInference, block-sparse", "window")
DEVICES = {"cpu": "CPU", "cuda": "GPU"}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def quality(row: dict) -> list[str]:
    shares = [f"{100 * row[kind]:.1f}%" for kind in ("qk_sparsity", "pv_sparsity")]
    return shares + agreement(row["psnr"], row["ssim"])


def agreement(psnr: list[float], ssim: list[float]) -> list[str]:
    figures = [f"{mean(psnr):.1f}", f"{min(psnr):.1f}", f"{mean(ssim):.4f}", f"{min(ssim):.4f}"]
    return [*figures, str(len(psnr))]


QUALITY = ["Q·Kᵀ skipped", "P·V skipped", "PSNR, dB", "worst", "SSIM", "worst", "seeds"]


def alone(record: dict) -> str:
    """What was read on all seeds, and the yardsticks."""
    rows = [[r["name"], r["order"], *quality(r)] for r in record["rows"] if "target" not in r]
    for r in record["rows"]:
        if r["name"] == "tuned":
            rows.append([f"tuned, relative L1 ≤ {r['bound']} per head", r["order"], *quality(r)])
        if r["name"] == "tuned by effect":
            name = f"tuned by effect, matched to {100 * r['target']:.0f}%"
            rows.append([name, r["order"], *quality(r)])
    other = record["another_seed"]
    psnr, ssim = other["psnr"], other["ssim"]
    rows.append(["the map of another seed", "–", "–", "–", *agreement(psnr, ssim)])
    return table(["setting", "order", *QUALITY], rows)


def side_by_side(record: dict, target: float) -> str:
    found = [r for r in record["rows"] if r.get("target") == target]
    # On the seeds that all of them were read on.
    seeds = min(len(r["psnr"]) for r in found)
    found = [{**r, "psnr": r["psnr"][:seeds], "ssim": r["ssim"][:seeds]} for r in found]
    found.sort(key=lambda r: -mean(r["psnr"]))
    rows = []
    for r in found:
        parameter = r.get("parameter", "–")
        if r["name"] in WHOLE:
            parameter = round(parameter)
        rows.append([r["name"], r["order"], str(parameter), *quality(r)])
    return table(["method", "order", "parameter", *QUALITY], rows)


def by_layer(record: dict) -> str:
    """Effect and sparsity of each layer, in row order, at the first bound."""
    rows = {r["name"]: r for r in record["rows"][::-1] if r["order"] == "row"}
    lines = []
    for layer, effect in sorted(record["effects"]["row"].items(), key=lambda x: int(x[0])):
        heads = rows["tuned"]["layers"][layer]
        # Two heads where the map is a quarter as wide as the picture, three where an eighth.
        tokens = (record["side"] // (4 if len(heads) == 2 else 8)) ** 2
        shares = [
            ", ".join(f"{100 * x:.0f}%" for x in rows[name]["layers"][layer])
            for name in ("τ = 0.99", "tuned", "tuned by effect")
        ]
        bound = rows["tuned by effect"]["bounds"][layer]
        lines.append([layer, str(tokens), f"{effect:.1f}", *shares, bound or "dense"])
    settings = ["τ = 0.99: skipped by head", "tuned", "tuned by effect", "its bound"]
    return table(["layer", "tokens", "PSNR, it alone sparse", *settings], lines)


def by_prediction(record: dict) -> str:
    names = list(dict.fromkeys(r["name"] for r in record["rows"]))
    errors = {(r["layer"], r["name"]): r["rel_l1"] for r in record["rows"]}
    tokens = {r["layer"]: r["tokens"] for r in record["rows"]}
    lines = [
        [str(layer), str(tokens[layer]), *(f"{errors[layer, name]:.4f}" for name in names)]
        for layer in sorted(tokens)
    ]
    text = "\nRelative L1 of each layer with half of its blocks skipped, row order, one tuning seed:\n\n"
    return f"{text}    {record['command']}\n\n" + table(["layer", "tokens", *names], lines)


def draw(records: list[dict]) -> str:
    figure, axes = plt.subplots(1, len(records), figsize=(4.6 * len(records), 4.2), squeeze=False)
    for axis, record in zip(axes[0], records):
        seeds = min(len(r["psnr"]) for r in record["rows"])
        for name, colour in COLOURS.items():
            for order, marker in (("row", "o"), ("hilbert", "^")):
                points = [r for r in record["rows"] if r["name"] == name and r["order"] == order]
                if points:
                    label = name if order == "row" else f"{name}, Hilbert"
                    xs = [100 * r["qk_sparsity"] for r in points]
                    ys = [mean(r["psnr"][:seeds]) for r in points]
                    line = "-" if order == "row" else ":"
                    axis.plot(xs, ys, marker, ms=5, lw=1, color=colour, label=label, ls=line)
        axis.set_title(f"{record['side']}×{record['side']}, {DEVICES[record['name']]}")
        axis.set_xlabel("share of Q·Kᵀ blocks skipped, %")
        axis.set_ylabel("PSNR against dense, dB, mean over the same seeds")
        axis.grid(alpha=0.3)
    axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    figure.savefig(RESULTS / "terrain.png", dpi=120, metadata={"Software": None})
    return "![PSNR against sparsity](terrain.png)\n"


def section(record: dict) -> str:
    side = record["side"]
    text = f"\n## {side}×{side}, {DEVICES[record['name']]}\n\n"
    text += f"{record['device']}, {record['date']}, {record['seconds']} s:\n\n    {record['command']}\n\n"
    text += alone(record)
    for target in dict.fromkeys(r["target"] for r in record["rows"] if "target" in r):
        text += f"\nAt equal sparsity (matched to {100 * target:.0f}% on the tuning seeds; best first):\n\n"
        text += side_by_side(record, target)
    text += "\nBy layer, in row order (one figure for each head):\n\n" + by_layer(record)
    layers = HERE / f"records/terrain-{side}-layers.json"
    if record["name"] == "cpu" and layers.exists():
        text += by_prediction(json.loads(layers.read_text()))
    picture = f"terrain-{side}.png"
    if record["name"] == "cpu" and (RESULTS / picture).exists():
        text += f"\n![dense, sparse and difference, {side}×{side}]({picture})\n"
    return text


def main() -> None:
    records = []
    for side in (128, 256):
        for device in DEVICES:
            path = HERE / "records" / f"terrain-{side}-{device}.json"
            if path.exists():
                records.append({**json.loads(path.read_text()), "name": device})
    check = json.loads((HERE / "records/terrain-check.json").read_text())
    worst = {
        side: max(r["max_abs"] for r in check["rows"] if r["side"] == side) for side in (128, 256)
    }
    count = len(check["rows"]) // 2
    text = f"""# A trained diffusion model: the terrain U-Net

`adaptive-terrain-diffusion==0.4.2` (PyPI, MIT): a one-step consistency U-Net, 10.5 million parameters,
noise and a difficulty in, a height field out. 28 self-attention layers with heads of 32; those with at
least 1024 tokens (nine at 128×128; at 256×256 nine with 4096 and nine with 1024) run sparse, the rest
exact. Every figure is against the dense map of the same noise. PSNR and SSIM take the range of that map
as the range of the picture, which is stricter than −1..1.

The evaluator: torch runs the file's nodes (`benchmarks/diffusion/terrain_net.py`). Against onnxruntime
on {count} seeds the maps differ by at most {worst[128]:.0e} at 128×128 and {worst[256]:.0e} at 256×256, its sizes
rewritten (tolerance {check["tolerance"]:g}): `{check["command"]}`, {check["device"]}, {check["date"]}.

{draw(records)}{"".join(section(record) for record in records)}
"""
    page = RESULTS / "terrain.md"
    old = page.read_text() if page.exists() else ""
    reading = old[old.index("## Reading") :] if "## Reading" in old else "## Reading\n"
    page.write_text(text + reading)
    print(f"wrote {page}")


if __name__ == "__main__":
    main()
