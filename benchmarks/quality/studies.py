"""Pages of studies: predictions against true masses, stand-ins for skipped blocks, retrieval."""

from pages import MODEL
from tables import at, pct, plt, save, signed, sparsity_at, table

#: Predictions by what a policy's name holds besides τ, λ.
PREDICTIONS = {
    "pool=128x64": ("one mean per block (the paper's)", "#d1495b"),
    "pool=16x16": ("16×16 means", "#edae49"),
    "": ("16×16 means and two samples (the default)", "#1f4e9c"),
    "oracle": ("true masses (oracle)", "#222222"),
}
#: Sparsities at which they are compared.
LEVELS = [0.5, 0.55, 0.6, 0.65]
#: A mass for every skipped block, and whether the mean of its values goes with it.
FORMS = {
    ("none", False): ("nothing", "#222222"),
    ("predicted", False): ("predicted mass, denominator", "#e8a0a8"),
    ("predicted", True): ("predicted mass × mean value", "#d1495b"),
    ("mean_key", False): ("mean key, denominator", "#b9d0ec"),
    ("mean_key", True): ("mean key × mean value", "#1f4e9c"),
    ("means16", False): ("16-key means, denominator", "#b5ddb8"),
    ("means16", True): ("16-key means × their mean values", "#2e933c"),
    ("true", False): ("true mass, denominator", "#bbbbbb"),
    ("true", True): ("true mass × mean value", "#888888"),
}


def prediction(policy: str) -> str | None:
    if policy.startswith("oracle"):
        return "oracle"
    parts = [part for part in policy.split(",") if part.startswith("pool=")]
    return None if policy == "dense" else "".join(parts)


def report_oracle(runs: list[dict]) -> tuple[str, str]:
    """Perplexity by prediction at equal sparsity, and how far each goes towards the oracle."""
    figure, axes = plt.subplots(1, len(runs), figsize=(6 * len(runs), 4.4), squeeze=False)
    body = ""
    for run, axis in zip(runs, axes[0]):
        out = run["output"]
        model = MODEL[out["model"]].split(" (")[0]
        found: dict[str, list] = {}
        for r in out["results"]:
            if (kind := prediction(r["policy"])) is not None:
                found.setdefault(kind, []).append((r["qk_sparsity"], r["ppl_change"], r["policy"]))
        found = {kind: sorted(found[kind]) for kind in PREDICTIONS if kind in found}
        for kind, points in found.items():
            label, colour = PREDICTIONS[kind]
            axis.plot([100 * x for x, _, _ in points], [100 * y for _, y, _ in points], "o-", ms=4, color=colour,
                      label=label)
        axis.axhline(0, color="black", lw=0.8)
        axis.set_xlabel("share of Q·Kᵀ blocks skipped, %")
        axis.set_ylabel("perplexity above dense, %")
        axis.set_title(f"{model}, {out['text']}, {out['results'][0]['context']} tokens", fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
        body += f"{model}, dense perplexity {out['results'][0]['ppl']:.3f}:\n\n"
        body += table(
            ["policy", "Q·Kᵀ skipped", "perplexity", "change"],
            [[f"`{r['policy']}`", pct(r["qk_sparsity"]), f"{r['ppl']:.3f}", signed(r["ppl_change"])]
             for r in out["results"]],
        )
        body += "\nAt equal sparsity (linear between the settings; – where they do not reach), and in brackets "
        body += "how much of the way from the paper's prediction to the oracle:\n\n"
        rows = []
        for kind, points in found.items():
            row = [PREDICTIONS[kind][0]]
            for level in LEVELS:
                x, paper, oracle = (at(p, level) for p in (points, found["pool=128x64"], found["oracle"]))
                cell = "–" if x is None else signed(x)
                if kind not in ("pool=128x64", "oracle") and None not in (x, paper, oracle):
                    cell += f" ({(paper - x) / (paper - oracle):.0%})"
                row.append(cell)
            rows.append(row)
        body += table(["at sparsity"] + [pct(level, 0) for level in LEVELS], rows) + "\n"
    return save(figure, "oracle"), body.rstrip("\n") + "\n"


def report_compensation(runs: list[dict]) -> tuple[str, str]:
    """Relative L1 with each stand-in, at the same blocks; and the sparsity that it allows."""
    figure, axes = plt.subplots(1, len(runs), figsize=(6 * len(runs), 4.4), squeeze=False)
    body = ""
    for run, axis in zip(runs, axes[0]):
        out = run["output"]
        model = MODEL[out["model"]].split(" (")[0]
        budgets = out["budgets"]
        curves = {
            form: [next((b["qk_sparsity"], f["rel_l1"], f["cost"]) for f in b["forms"]
                        if (f["mass"], f["values"]) == form) for b in budgets]
            for form in FORMS
        }
        body += f"{model}, {out['context']} tokens of {out['text']}, layers {out['layers']}. Relative L1 at the same "
        body += "blocks:\n\n"
        half = min(range(len(budgets)), key=lambda i: abs(budgets[i]["qk_sparsity"] - 0.5))
        rows = []
        for form, points in curves.items():
            label, colour = FORMS[form]
            cost = points[half][2]
            rows.append([label] + [f"{y:.4f}" for _, y, _ in points] + ["–" if cost is None else pct(cost)])
            axis.plot([100 * x for x, _, _ in points], [y for _, y, _ in points], "o-", ms=4, color=colour, label=label)
        skipped = pct(budgets[half]["qk_sparsity"], 0)
        heads = [f"τ = {b['cdf']}, {pct(b['qk_sparsity'], 0)} skipped" for b in budgets]
        body += table(["in a skipped block's place"] + heads + [f"multiplications at {skipped}, of dense"], rows)
        body += "\nThe share of Q·Kᵀ that may be skipped within an error (linear between these):\n\n"
        bounds = [0.01, 0.02, 0.03, 0.05, 0.08]
        rows = []
        for form, points in curves.items():
            ascending = sorted((x, y, "") for x, y, _ in points)
            shares = [sparsity_at(ascending, bound) for bound in bounds]
            rows.append([FORMS[form][0]] + ["–" if s is None else pct(s) for s in shares])
        body += table(["relative L1"] + [str(b) for b in bounds], rows) + "\n"
        axis.set_yscale("log")
        axis.set_xlabel("share of Q·Kᵀ blocks skipped, %")
        axis.set_ylabel("relative L1, mean over layers")
        axis.set_title(f"{model}, {out['text']}, {out['context']} tokens", fontsize=10)
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=7)
    return save(figure, "compensation"), body.rstrip("\n") + "\n"


def report_needle(runs: list[dict]) -> tuple[str, str]:
    body, grids = "", []
    for run in runs:
        out = run["output"]
        contexts = sorted({r["context"] for r in out["results"]})
        depths = sorted({r["depth"] for r in out["results"]})
        what = "one sentence" if out["keys"] == 1 else f"one of {out['keys']} sentences (multi-key)"
        model = MODEL[out["model"]].split(" (")[0]
        body += f"{model}, {what}, contexts {', '.join(map(str, contexts))}; found / asked by context, all depths:\n\n"
        rows = []
        for acc in out["accuracy"]:
            cells = [r for r in out["results"] if r["policy"] == acc["policy"]]
            line = [f"`{acc['policy']}`", pct(acc["accuracy"], 0)]
            for n in contexts:
                of = [c for c in cells if c["context"] == n]
                found, asked = sum(c["correct"] for c in of), sum(c["trials"] for c in of)
                line.append(f"{found}/{asked} ({pct(sum(c['qk_sparsity'] for c in of) / len(of), 0)} skipped)")
            rows.append(line)
        body += table(["policy", "found"] + [f"{n} tokens" for n in contexts], rows) + "\n"
        grids.append((out, contexts, depths))
    out, contexts, depths = grids[0]
    names = [a["policy"] for a in out["accuracy"]]
    figure, axes = plt.subplots(1, len(names), figsize=(1.9 * len(names), 3), sharey=True)
    for axis, name in zip(axes, names):
        grid = [[next(r["correct"] / r["trials"] for r in out["results"] if
                      (r["policy"], r["context"], r["depth"]) == (name, n, d)) for n in contexts] for d in depths]
        axis.imshow(grid, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        for y, line in enumerate(grid):
            for x, share in enumerate(line):
                axis.text(x, y, "found" if share == 1 else "missed" if share == 0 else pct(share, 0), ha="center",
                          va="center", fontsize=7, color="black" if share > 0.5 else "white")
        axis.set_xlabel("tokens", fontsize=8)
        axis.set_xticks(range(len(contexts)), contexts, fontsize=7)
        axis.set_yticks(range(len(depths)), depths, fontsize=7)
        axis.set_title(name.replace(",", "\n", 1), fontsize=7)
    axes[0].set_ylabel("depth of the sentence", fontsize=8)
    figure.suptitle("One sentence asked for, once per context and depth", fontsize=9)
    return save(figure, "needle"), body
