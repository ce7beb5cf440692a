"""What the pages of report.py are put together from: families of policies, tables, curves."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).parent
RESULTS = HERE.parent.parent / "docs" / "results"
LOWERED, FLOORED = "FlexPrefill, floor lowered to 128", "FlexPrefill, its floor of 1024"
#: Families of policies: what their names start with, label, colour. The first match counts.
FAMILIES = [
    ("our prediction, τ", "#1f4e9c"), ("our prediction, top-k", "#7aa6de"),
    ("paper's pooling, τ", "#d1495b"), ("MInference", "#2e933c"), (LOWERED, "#edae49"),
    (FLOORED, "#b07d12"),
    ("XAttention", "#8f3f97"), ("block-sparse", "#66a182"), ("window", "#888888"),
    ("random", "#bbbbbb"), ("tuned", "#000000"), ("our prediction, τ, no local blocks", "#00a0c0"),
    ("our prediction, τ, 8 samples", "#ff7f0e"), ("our prediction, τ by layer", "#00702a"),
]
#: What "tuned" is where measure.py made the settings itself.
BY_LAYER = {
    "{sparse-early}": "τ = 0.88 in layers 1–10, 0.97 in others",
    "{sparse-late}": "τ = 0.98 in layers 1–10, 0.945 in others",
}


def family(policy: str) -> str | None:
    if policy.startswith("dense"):
        return None
    if "theta=" in policy or policy == "default,lambda=inf":
        return None
    if "pool=128x64" in policy:
        return "paper's pooling, τ" if policy.endswith("local=0") else None
    if policy in BY_LAYER.values():
        return "our prediction, τ by layer" if policy == BY_LAYER["{sparse-early}"] else None
    if "pool=" in policy:
        return "our prediction, τ, 8 samples" if policy.endswith("pool=16x16+8rows") else None
    if "local=" in policy:
        ours = policy.startswith("cdf") and policy.endswith("local=0")
        return "our prediction, τ, no local blocks" if ours else None
    if policy.startswith("flexprefill") and policy.endswith("min=1024"):
        return FLOORED
    prefixes = {
        "default": "our prediction, τ", "cdf": "our prediction, τ", "topk": "our prediction, top-k",
        "minference": "MInference", "flexprefill": LOWERED, "xattention": "XAttention",
        "tuned": "tuned", "block-sparse": "block-sparse", "window": "window", "random": "random",
    }
    return next((label for start, label in prefixes.items() if policy.startswith(start)), None)


def pct(x: float, digits: int = 1) -> str:
    return f"{100 * x:.{digits}f}%"


def signed(x: float | None) -> str:
    return "–" if x is None else f"{100 * x:+.2f}%"


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]) + "\n"


def curves(rows: list[dict], key: str) -> dict[str, list[tuple[float, float, str]]]:
    """Per family (sparsity, value, policy), by sparsity."""
    found: dict[str, list[tuple[float, float, str]]] = {}
    for row in rows:
        label = family(row["policy"])
        if label and row[key] is not None:
            found.setdefault(label, []).append((row["qk_sparsity"], row[key], row["policy"]))
    return {label: sorted(points) for label, points in found.items()}


def at(points: list[tuple[float, float, str]], x: float) -> float | None:
    """Linear interpolation; None outside what was measured."""
    for (x0, y0, _), (x1, y1, _) in zip(points, points[1:]):
        if x0 <= x <= x1 and x1 > x0:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return None


def sparsity_at(points: list[tuple[float, float, str]], y: float) -> float | None:
    """The sparsity at which the interpolated value first reaches y."""
    for (x0, y0, _), (x1, y1, _) in zip(points, points[1:]):
        if y0 <= y <= y1 and y1 > y0:
            return x0 + (x1 - x0) * (y - y0) / (y1 - y0)
    return None


def plot_curves(axis, found: dict, scale: float = 1.0) -> None:
    for label, colour in FAMILIES:
        if label in found:
            xs = [100 * x for x, _, _ in found[label]]
            ys = [scale * y for _, y, _ in found[label]]
            axis.plot(xs, ys, marker="o", ms=4, lw=1.5, color=colour, label=label)
    axis.set_xlabel("share of Q·Kᵀ blocks skipped, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))


def save(figure, name: str) -> str:
    figure.tight_layout()
    figure.savefig(RESULTS / f"{name}.png", dpi=100, metadata={"Software": None})
    plt.close(figure)
    return f"![{name}]({name}.png)\n"


def equal(found: dict, levels: list[float], form) -> str:
    heads = ["at sparsity"] + [pct(x, 0) for x in levels]
    rows = []
    for label, _ in FAMILIES:
        # One setting has nothing to be interpolated between.
        if len(found.get(label, [])) > 1:
            values = [at(found[label], x) for x in levels]
            rows.append([label] + ["–" if v is None else form(v) for v in values])
    return table(heads, rows)


def load(name: str) -> list[dict]:
    record = json.loads((HERE / "records" / f"{name}.json").read_text())
    return [r for run in record["runs"] for r in run["output"]["results"]]


def tokens_axis(axis, ticks: list[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{round(n / 1024)}K" for n in ticks], fontsize=8)
    axis.minorticks_off()
    axis.set_xlabel("tokens")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def ppl_table(rows: list[dict]) -> str:
    return table(
        ["tokens", "policy", "Q·Kᵀ skipped", "P·V skipped", "perplexity", "change"],
        [[str(r["context"]), f"`{r['policy']}`", pct(r["qk_sparsity"]), pct(r["pv_sparsity"]),
          f"{r['ppl']:.3f}", signed(r["ppl_change"])] for r in rows],
    )
