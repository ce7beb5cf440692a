#!/usr/bin/env python3
"""Draws records of `sparge eval predictor --json` into docs/results/ and prints their tables.

    sparge eval predictor --context 4096 --reps 7 --json | python -m json.tool --compact - \\
        > benchmarks/quality/records/predictor-4096.json
    python benchmarks/quality/predictor.py benchmarks/quality/records/predictor-{4096,8000,qwen-4096}.json
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

RESULTS = Path(__file__).parent.parent.parent / "docs" / "results"
PAPER, ORACLE = "128x64", "oracle"
#: What is drawn; everything is in the record and in the table.
DRAWN = {
    PAPER: ("the paper: one mean per block", "#d1495b"),
    "16x16+var": ("16×16 means, second order", "#edae49"),
    "16x8+var": ("16×8 means, second order", "#c9a227"),
    "8 sampled rows": ("8 sampled rows", "#66a182"),
    "antidiagonals, stride 8": ("antidiagonals, stride 8", "#8f3f97"),
    "128x64+2rows": ("one mean per block & 2 rows", "#7aa6de"),
    "16x16+2rows": ("16×16 means & 2 rows (default)", "#1f4e9c"),
    ORACLE: ("true masses (oracle)", "#222222"),
}
AT = [0.2, 0.3, 0.4, 0.5, 0.6]


def by_cdf(curve: dict) -> list[tuple[float, float]]:
    """(sparsity, relative L1) of one τ for all heads, by sparsity."""
    kept = (p for p in curve["points"] if p["selection"].startswith("cdf:") and "+" not in p["selection"])
    return sorted((p["qk_sparsity"], p["rel_l1"]) for p in kept)


def between(points: list[tuple[float, float]], x: float) -> float | None:
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 <= x <= x1 and x1 > x0:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return None


def table(record: dict) -> str:
    curves = {c["predictor"]: c for c in record["curves"]}
    paper, oracle = by_cdf(curves[PAPER]), by_cdf(curves[ORACLE])
    cell = lambda x: "–" if x is None else x  # noqa: E731
    heads = ["predictor", "share of dense time"]
    heads += [f"L1 at {s:.0%}" for s in AT] + ["of the way to the oracle", "sparsity, τ per head at L1 ≤ 0.05"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, curve in curves.items():
        points = by_cdf(curve)
        errors = [between(points, s) for s in AT]
        way = []
        for s, error in zip(AT, errors):
            a, b = between(paper, s), between(oracle, s)
            if None not in (a, b, error):
                way.append((a - error) / (a - b))
        way = f"{min(way):.0%} to {max(way):.0%}" if way else "–"
        tuned = next(t["qk_sparsity"] for t in curve["tuned"] if t["bound"] == 0.05)
        cost = "–" if curve["cost"] is None else f"{curve['cost']:.1%}"
        row = [name, cost] + [cell(e and f"{e:.4f}") for e in errors] + [way, f"{tuned:.1%}"]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def draw_curves(records: list[dict], path: Path) -> None:
    figure, axes = plt.subplots(1, len(records), figsize=(6.4 * len(records), 5), squeeze=False)
    for axis, record in zip(axes[0], records):
        for curve in record["curves"]:
            if curve["predictor"] in DRAWN:
                label, colour = DRAWN[curve["predictor"]]
                cost = "" if curve["cost"] is None else f", {curve['cost']:.1%} of dense"
                xs, ys = zip(*by_cdf(curve))
                axis.plot(xs, ys, marker="o", ms=3, color=colour, label=label + cost)
        axis.set(xlim=(0.15, 0.75), ylim=(1e-3, 0.2), yscale="log", xlabel="share of Q·Kᵀ skipped",
                 ylabel="relative L1, mean over layers")
        axis.set_title(f"{record['model']}, {record['context']} tokens of {record['text']}", fontsize=10)
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def draw_scatter(records: list[dict], path: Path) -> None:
    figure, axes = plt.subplots(1, len(records), figsize=(5.6 * len(records), 5), squeeze=False)
    for axis, record in zip(axes[0], records):
        estimate = record["estimate"]
        xs, ys = zip(*estimate["points"])
        axis.scatter(xs, ys, s=4, alpha=0.35, color="#1f4e9c", linewidths=0)
        axis.plot([1e-4, 0.3], [1e-4, 0.3], color="#222222", lw=1, label="error = estimated loss")
        axis.set(xscale="log", yscale="log", xlim=(1e-4, 0.3), ylim=(1e-5, 1),
                 xlabel="estimated share of the attention that is skipped",
                 ylabel="true relative L1 of the query block")
        axis.set_title(f"rank correlation {estimate['spearman']:.2f}; {record['model']}, "
                       f"{record['context']} tokens", fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path)
    parser.add_argument("--tables", action="store_true", help="print only, leave the plots alone")
    args = parser.parse_args()
    records = [json.loads(path.read_text()) for path in args.records]
    if not args.tables:
        RESULTS.mkdir(parents=True, exist_ok=True)
        draw_curves(records, RESULTS / "predictor.png")
        draw_scatter(records, RESULTS / "estimate.png")
    for record in records:
        dense = record["dense_s"]
        print(f"\n{record['model']}, {record['context']} tokens of {record['text']}, layers {record['layers']}, "
              f"{record['threads']} threads, {record['isa']}, dense attention "
              f"{'not timed' if dense is None else f'{1e3 * dense:.0f} ms'}\n\n{table(record)}\n")
        print(f"estimated loss against error: rank correlation {record['estimate']['spearman']:.2f}\n")
        print("| query blocks | count | rank correlation | error ÷ estimate, median | 90% |\n|---|---|---|---|---|")
        for g in record["estimate"]["groups"]:
            print(f"| {g['name']} | {g['count']} | {g['spearman']:.2f} | {g['ratio_median']:.2f} | {g['ratio_p90']:.2f} |")


if __name__ == "__main__":
    main()
