"""The plots of docs/results/diffusion.md; each returns the line that shows it."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

BARS = {
    "native": "#bbbbbb", "cudnn": "#888888", "fa3": "#edae49", "sparge 1.0": "#7aa6de", "sparge 0.5": "#1f4e9c",
    "sparge 0.5, hilbert, reuse 4": "#00a0c0", "sparge 0.3": "#2e933c", "no attention": "#d1495b",
}  # fmt: skip
LINES = {
    "topk": "#1f4e9c", "paper's pooling, topk": "#d1495b", "MInference-style": "#2e933c",
    "FlexPrefill-style": "#edae49", "window": "#888888", "random": "#bbbbbb", "oracle": "#000000",
}  # fmt: skip


def save(figure, folder: Path, name: str) -> str:
    figure.tight_layout()
    figure.savefig(folder / f"{name}.png", dpi=100, metadata={"Software": None})
    plt.close(figure)
    return f"![{name}]({name}.png)\n"


def latency(rows: dict, folder: Path) -> str:
    rows = {n: r["methods"] for n, r in rows.items() if r.get("methods", {}).get("native", {}).get("median")}
    figure, axis = plt.subplots(figsize=(11, 4))
    width = 0.8 / len(BARS)
    for at, (method, colour) in enumerate(BARS.items()):
        found = [(x, m[method]["median"] / m["native"]["median"]) for x, m in enumerate(rows.values())
                 if m.get(method, {}).get("median")]  # fmt: skip
        places = [x + (at - len(BARS) / 2) * width for x, _ in found]
        axis.bar(places, [y for _, y in found], width, label=method, color=colour)
    axis.set_xticks(range(len(rows)), rows)
    axis.set_ylabel("time of a step, native SDPA = 1")
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=8, ncols=len(BARS) // 2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return save(figure, folder, "diffusion-latency")


def agreement(kind: str, rows: list[dict], folder: Path) -> str:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for method, colour in LINES.items():
        found = [r for r in rows if r["name"] == f"{method}, {r['label']}" and "failed" not in r]
        found.sort(key=lambda r: r["density"])
        sparsity = [100 * (1 - r["density"]) for r in found]
        for axis, values in (
            (axes[0], [sum(r["psnr"]) / len(r["psnr"]) for r in found]),
            (axes[1], [r["attention_l1"] for r in found]),
        ):
            axis.plot(sparsity, values, marker="o", ms=4, color=colour, label=method)
    axes[0].set_ylabel("PSNR to the dense sample, dB")
    axes[1].set_ylabel("relative L1 of an attention call")
    for axis in axes:
        axis.set_xlabel("share of Q·Kᵀ blocks skipped, %")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    return save(figure, folder, f"diffusion-{kind}-agreement")


def breakdown(kind: str, parts: dict, folder: Path) -> str:
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6))
    axes[0].plot([100 * x for x in parts["by_step"]], marker="o", ms=3)
    axes[0].set_xlabel("denoising step")
    axes[0].set_ylabel("blocks skipped, %")
    axes[0].grid(alpha=0.3)
    axes[0].set_title("by denoising step, mean of layers and heads", fontsize=10)
    for axis, key, x, y, of in (
        (axes[1], "by_layer_head", "head", "layer", "mean of steps"),
        (axes[2], "by_step_layer", "layer", "denoising step", "mean of heads"),
    ):
        picture = axis.imshow([[100 * v for v in row] for row in parts[key]], vmin=0, vmax=100, aspect="auto")
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.set_title(f"by {y.split()[-1]} and {x}, {of}", fontsize=10)
        figure.colorbar(picture, ax=axis, label="blocks skipped, %")
    return save(figure, folder, f"diffusion-{kind}-sparsity")
