#!/usr/bin/env python3
"""Turns a record of measure.py into docs/results/TABLE.md and docs/results/TABLE.png.

    python benchmarks/quality/report.py TABLE [TABLE ...]

What stands under "## Reading" in an existing page is kept: it is written by hand.
"""

import argparse
import json

from pages import MODEL, NEEDS, PAPER, RECORDS, SHOWN, TITLES
from studies import report_compensation, report_needle, report_oracle
from tables import (
    BY_LAYER, FAMILIES, HERE, RESULTS, curves, equal, load, pct, plot_curves, plt, ppl_table, save, signed,
    sparsity_at, table, tokens_axis,
)

#: The pages of relative L1 by policy.
ERRORS = ("error", "qwen-error")


def report_error(name: str, runs: list[dict]) -> tuple[str, str]:
    rows = [r for run in runs for r in run["output"]["results"]]
    found = curves(rows, "rel_l1")
    figure, axis = plt.subplots(figsize=(9.5, 4.5))
    plot_curves(axis, found)
    axis.set_ylabel("relative L1 of a layer's attention, mean")
    axis.set_yscale("log")
    picture = save(figure, name)
    body = "At equal measured sparsity (linear between neighbours of the sweep below):\n\n"
    body += equal(found, [0.2, 0.3, 0.4, 0.5, 0.6, 0.7], lambda v: f"{v:.3f}")
    body += "\nAt equal error, the share skipped:\n\n"
    bounds = [0.02, 0.05, 0.08, 0.1]
    lines = []
    for label, _ in FAMILIES:
        if label in found:
            shares = [sparsity_at(found[label], y) for y in bounds]
            lines.append([label] + ["–" if s is None else pct(s, 0) for s in shares])
    body += table(["relative L1"] + [str(b) for b in bounds], lines)
    body += "\nAll settings:\n\n" + table(
        ["policy", "Q·Kᵀ skipped", "P·V skipped", "relative L1", "worst layer"],
        [[f"`{r['policy']}`", pct(r["qk_sparsity"]), pct(r["pv_sparsity"]), f"{r['rel_l1']:.4f}",
          f"{r['rel_l1_worst']:.4f}"] for r in rows],
    )
    return picture, body


def report_ppl(name: str, runs: list[dict]) -> tuple[str, str]:
    rows = []
    layers = [r for run in runs for r in run["output"]["results"] if "rel_l1" in r]
    for row in (r for run in runs for r in run["output"]["results"] if "ppl" in r):
        known = {(r["context"], r["policy"]) for r in rows}
        if (row["context"], row["policy"]) not in known and (name != "policies" or row["context"] == 4096):
            rows.append(row)
    # A run without dense takes the dense perplexity of another at its length.
    dense = {r["context"]: r["ppl"] for r in rows if r["policy"] == "dense"}
    for row in rows:
        if row["ppl_change"] is None and row["context"] in dense:
            row["ppl_change"] = row["ppl"] / dense[row["context"]] - 1
    found = curves([r for r in rows if r["context"] == 4096], "ppl_change")
    figure, axis = plt.subplots(figsize=(9.5, 4.5))
    plot_curves(axis, found, 100.0)
    axis.axhline(0, color="black", lw=0.8)
    axis.set_ylabel("perplexity above dense, %")
    if name in ("qwen", "qwen-1.5b", "wikitext", "policies"):
        axis.set_title(f"{MODEL[runs[0]['output']['model']]}, {runs[0]['output']['text']}, 4096 tokens", fontsize=10)
    if name in ("local", "tuned"):
        plt.close(figure)
        picture = {"local": draw_local, "tuned": draw_tuned}[name](rows)
    else:
        picture = save(figure, name)
    if name == "local":
        rows.sort(key=lambda r: (r["context"], r["policy"]))
    if name.startswith("qwen"):
        rows.sort(key=lambda r: r["context"])
    body = ppl_table(rows)
    if layers:
        body += "\nError of a layer at the same settings (every sixth layer):\n\n" + table(
            ["policy", "Q·Kᵀ skipped", "relative L1", "worst layer"],
            [[f"`{r['policy']}`", pct(r["qk_sparsity"]), f"{r['rel_l1']:.4f}", f"{r['rel_l1_worst']:.4f}"]
             for r in layers],
        )
    if name in ("policies", "qwen", "wikitext"):
        body += "\nChange of perplexity at equal measured sparsity (linear between the settings "
        body += f"above; – where they do not reach){', 4096 tokens' if name == 'qwen' else ''}:\n\n"
        levels = [0.35, 0.4, 0.45, 0.5, 0.55, 0.6] if name == "qwen" else [0.35, 0.4, 0.5, 0.55, 0.6, 0.65]
        body += equal(found, levels, signed)
    return picture, body


def draw_local(rows: list[dict]) -> str:
    """Perplexity and sparsity against the number of blocks before the diagonal."""
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4))
    lines = [
        ("cdf:0.98,local=", 4096, "τ = 0.98", "#00702a"), ("cdf:0.95,local=", 4096, "τ = 0.95", "#1f4e9c"),
        ("cdf:0.9,local=", 4096, "τ = 0.9", "#00a0c0"), ("topk:0.5,local=", 4096, "top-k 0.5", "#7aa6de"),
        ("cdf:0.9,pool=128x64,lambda=inf,local=", 4096, "paper's pooling, τ = 0.9", "#d1495b"),
        ("cdf:0.95,local=", 8000, "τ = 0.95, 8000 tokens", "#888888"),
    ]
    for start, context, label, colour in lines:
        of = sorted((int(r["policy"][len(start):]), r) for r in rows
                    if r["policy"].startswith(start) and r["context"] == context)
        for axis, key in zip(axes, ("ppl_change", "qk_sparsity")):
            axis.plot([n for n, _ in of], [100 * r[key] for _, r in of], "o-", ms=4, color=colour, label=label)
    axes[0].set_ylabel("perplexity above dense, %")
    axes[0].axhline(0, color="black", lw=0.8)
    axes[1].set_ylabel("share of Q·Kᵀ blocks skipped, %")
    axes[1].set_ylim(0, 80)
    for axis in axes:
        axis.set_xlabel("blocks of 64 keys before the diagonal, always kept")
        axis.set_xticks([0, 1, 2, 4, 8])
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle("SmolLM2-135M on Emma, 4096 tokens where not said otherwise", fontsize=10)
    return save(figure, "local")


def draw_tuned(rows: list[dict]) -> str:
    """Tuned and default against length, with the lengths of the record `length`."""
    rows = [*rows, *load("length")]
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4))
    lengths = sorted({r["context"] for r in rows})
    for policy, colour in (("default", "#1f4e9c"), ("tuned", "#000000")):
        of = [next(r for r in rows if (r["policy"], r["context"]) == (policy, n)) for n in lengths]
        axes[0].plot(lengths, [100 * r["qk_sparsity"] for r in of], "o-", color=colour, label=f"{policy}, Q·Kᵀ")
        axes[0].plot(lengths, [100 * r["pv_sparsity"] for r in of], "s--", color=colour, label=f"{policy}, P·V")
        axes[1].plot(lengths, [100 * r["ppl_change"] for r in of], "o-", color=colour, label=policy)
    axes[0].set_ylabel("skipped, %")
    axes[1].set_ylabel("perplexity above dense, %")
    axes[1].axhline(0, color="black", lw=0.8)
    for axis in axes:
        tokens_axis(axis, lengths)
    figure.suptitle("SmolLM2-135M on Emma", fontsize=10)
    return save(figure, "tuned")


def report_wikitext(runs: list[dict]) -> tuple[str, str]:
    """One table for each text, and which layers the policies take the error from."""
    for run in runs:
        for made, label in BY_LAYER.items():
            for r in run["output"]["results"]:
                if made in run["command"] and r["policy"] == "tuned":
                    r["policy"] = label
    errors = [run for run in runs if "eval error" in run["command"]]
    emma = [run for run in runs if run["output"]["text"] == "Emma"]
    picture, body = report_ppl("wikitext", [run for run in runs if run not in errors + emma])
    body += "\nThe same on Emma:\n\n" + ppl_table([r for run in emma for r in run["output"]["results"]])
    rows = [r for run in errors for r in run["output"]["results"]]
    early = lambda r: sum(r["layers"][1:11]) / 10  # noqa: E731
    late = lambda r: sum(r["layers"][11:]) / len(r["layers"][11:])  # noqa: E731
    body += "\nError of a layer's attention on WikiText-2, given exact inputs:\n\n" + table(
        ["policy", "Q·Kᵀ skipped", "relative L1", "layers 1–10", "layers 11–29"],
        [[f"`{r['policy']}`", pct(r["qk_sparsity"]), f"{r['rel_l1']:.4f}", f"{early(r):.4f}", f"{late(r):.4f}"]
         for r in rows],
    )
    figure, axis = plt.subplots(figsize=(7, 3.4))
    for r in rows:
        axis.plot(range(len(r["layers"])), r["layers"], marker="o", ms=3, lw=1.2,
                  label=f"{r['policy']}, {pct(r['qk_sparsity'], 0)} skipped")
    axis.set_xlabel("layer")
    axis.set_ylabel("relative L1")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return picture, body + "\n" + save(figure, "wikitext-layers")


def report_length(runs: list[dict]) -> tuple[str, str]:
    names = ("dense", "default", "tuned")
    every = [r for run in runs for r in run["output"]["results"] if r["policy"] in names]
    every = list({(r["context"], r["policy"]): r for r in every}.values())
    every.sort(key=lambda r: (r["context"], names.index(r["policy"])))
    figure, axis = plt.subplots(figsize=(7.5, 4.8))
    qwen, larger = [*load("qwen"), *load("qwen-32k")], [*load("qwen-1.5b"), *load("qwen-1.5b-16k")]
    for of, policy, label, style in (
        (every, "default", "SmolLM2-135M, default", {"color": "#1f4e9c"}),
        (every, "tuned", "SmolLM2-135M, tuned", {"color": "#1f4e9c", "ls": "--", "marker": "s", "ms": 4}),
        (qwen, "default", "Qwen2.5-Coder-0.5B, default", {"color": "#2e933c"}),
        (qwen, "tuned", "Qwen2.5-Coder-0.5B, tuned", {"color": "#2e933c", "ls": "--", "marker": "s", "ms": 4}),
        (larger, "default", "Qwen2.5-Coder-1.5B, default", {"color": "#edae49"}),
    ):
        points = sorted((r["context"], 100 * r["qk_sparsity"]) for r in of if r["policy"] == policy)
        axis.plot(*zip(*points), **{"marker": "o", "ms": 5, "ls": "-", **style}, label=label)
    paper = {8192: 6.8, 16384: 26.4, 24576: 35.7, 49152: 49.8, 131072: 54.0}
    axis.plot(paper.keys(), paper.values(), "^:", color="#d1495b", label="Llama-3.1-8B (paper)")
    axis.set_ylabel("Q·Kᵀ skipped, % (paper: its sparsity)")
    tokens_axis(axis, [2**n for n in range(10, 18)])
    return save(figure, "length"), ppl_table(every)


def report_stages(runs: list[dict]) -> tuple[str, str]:
    rows = [r for run in runs for r in run["output"]["results"]]
    names = {
        "dense": "dense", "default": "both (λ = 6)", "default,lambda=inf": "stage 1 alone",
        "dense,lambda=6": "stage 2 alone (λ = 6)",
    }
    rows = [r for r in rows if r["policy"] in names]
    figure, axis = plt.subplots(figsize=(6, 3.2))
    for i, r in enumerate(rows):
        axis.barh(i, 100 * r["qk_sparsity"], color="#1f4e9c", height=0.35, label="Q·Kᵀ" if not i else None)
        axis.barh(i + 0.36, 100 * r["pv_sparsity"], color="#7aa6de", height=0.35, label="P·V" if not i else None)
    axis.set_yticks([i + 0.18 for i in range(len(rows))], [names[r["policy"]] for r in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("skipped, %")
    axis.legend(fontsize=8)
    body = table(
        ["stages", "policy", "Q·Kᵀ skipped", "P·V skipped", "mean of both", "perplexity", "change"],
        [[names[r["policy"]], f"`{r['policy']}`", pct(r["qk_sparsity"]), pct(r["pv_sparsity"]),
          pct((r["qk_sparsity"] + r["pv_sparsity"]) / 2), f"{r['ppl']:.3f}", signed(r["ppl_change"])]
         for r in rows],
    )
    return save(figure, "stages"), body


def report_judge(runs: list[dict]) -> tuple[str, str]:
    rows = runs[0]["output"]["results"]
    groups = {"one mean per block (the paper's)": [], "16×16 means and two samples": []}
    for r in rows:
        key = "one mean per block (the paper's)" if "pool=128x64" in r["policy"] else "16×16 means and two samples"
        groups[key].append(r)
    figure, axis = plt.subplots(figsize=(6.5, 4.2))
    for (label, members), colour in zip(groups.items(), ("#d1495b", "#1f4e9c")):
        axis.plot([100 * r["qk_sparsity"] for r in members], [r["rel_l1"] for r in members], "o-",
                  color=colour, label=label)
        below = colour == "#1f4e9c"
        for r in members:
            theta = r["policy"].split("theta=")[1].split(",")[0] if "theta=" in r["policy"] else "0"
            # Above θ = 0.4 the points lie on one another.
            if float(theta) <= 0.4:
                axis.annotate(f"θ = {theta}", (100 * r["qk_sparsity"], r["rel_l1"]), fontsize=8, color=colour,
                              textcoords="offset points",
                              xytext=(5, -11) if below else (6, 2) if theta == "0" else (-6, 4),
                              ha="left" if below or theta == "0" else "right")
    axis.annotate("θ = 0.5, 0.6", (0, 0), fontsize=8, textcoords="offset points", xytext=(24, 2))
    axis.set(xlim=(-2, 70), ylim=(-0.004, 0.108))
    axis.set_xlabel("share of Q·Kᵀ blocks skipped, %")
    axis.set_ylabel("relative L1")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    body = "Error of a layer, τ = 0.9, stage 2 off:\n\n" + table(
        ["policy", "Q·Kᵀ skipped", "relative L1", "worst layer"],
        [[f"`{r['policy']}`", pct(r["qk_sparsity"]), f"{r['rel_l1']:.4f}", f"{r['rel_l1_worst']:.4f}"]
         for r in rows],
    )
    judged = [r for r in runs[1]["output"]["results"] if r["policy"] in (
        "dense", "cdf:0.9,pool=128x64,lambda=inf,local=0", "cdf:0.9,pool=128x64,theta=0.3,lambda=inf,local=0",
        "cdf:0.95,pool=128x64,lambda=inf,local=0")]
    body += "\nPerplexity, one mean per block:\n\n" + ppl_table(judged)
    return save(figure, "judge"), body


def report_overhead(runs: list[dict]) -> tuple[str, str]:
    rows = [r for r in runs[0]["output"]["results"] if r["policy"] != "dense"]
    shapes = list(dict.fromkeys(r["shape"] for r in rows))
    policies = list(dict.fromkeys(r["policy"] for r in rows))
    tokens = {s: int(s.split("x")[1]) for s in shapes}
    share = {(r["shape"], r["policy"]): r["predict_of_dense"] for r in rows}
    figure, axis = plt.subplots(figsize=(6.5, 4.2))
    for policy in policies:
        axis.plot([tokens[s] for s in shapes], [100 * share[s, policy] for s in shapes], "o-", ms=4, label=policy)
    paper = {8192: 3.78, 16384: 1.82, 32768: 0.91, 65536: 0.61, 131072: 0.52}
    axis.plot(paper.keys(), paper.values(), "ks--", ms=4, label="paper, Llama-3.1 on a GPU")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("tokens")
    axis.set_ylabel("prediction, % of dense attention")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=7)
    body = table(
        ["policy"] + [str(tokens[s]) for s in shapes],
        [[f"`{p}`"] + [pct(share[s, p], 2) for s in shapes] for p in policies],
    )
    dense = {r["shape"]: r["median_s"] for r in runs[0]["output"]["results"] if r["policy"] == "dense"}
    body += "\nDense attention: " + ", ".join(
        f"{tokens[s]} tokens {1000 * dense[s]:.1f} ms" for s in shapes) + ".\n"
    body += "\nShare of Q·Kᵀ skipped on these inputs, and the whole call's time over dense:\n\n"
    found = {(r["shape"], r["policy"]): r for r in rows}
    body += table(
        ["policy"] + [str(tokens[s]) for s in shapes],
        [[f"`{p}`"] + [f"{pct(found[s, p]['qk_sparsity'], 0)}, {1 / found[s, p]['speedup']:.2f}" for s in shapes]
         for p in policies],
    )
    return save(figure, "overhead"), body


def report_order(runs: list[dict]) -> tuple[str, str]:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    body = ""
    for run, axis, title in zip(runs, axes, ("photograph", "clip")):
        out = run["output"]
        t, h, w = out["grid"]
        poolings = [b["pooling"] for b in out["results"][0]["at_bound"]]
        body += f"{title.capitalize()}, {t}×{h}×{w} tokens, {out['heads']} heads of {out['head_dim']}:\n\n"
        body += table(
            ["order", "distance in a block of 64", "similarity of Q blocks", "of K blocks",
             "blocks that hold 95%"] + [f"skipped at L1 ≤ {out['l1']}, pooling {p}" for p in poolings],
            [[r["order"], f"{r['distance']:.2f}", f"{r['similarity_q']:.3f}", f"{r['similarity_k']:.3f}",
              pct(r["blocks_95"])] + [pct(b["qk_sparsity"]) for b in r["at_bound"]] for r in out["results"]],
        ) + "\n"
        for i, colour in enumerate(("#d1495b", "#1f4e9c")):
            places = [j + 0.38 * i for j in range(len(out["results"]))]
            axis.bar(places, [100 * r["at_bound"][i]["qk_sparsity"] for r in out["results"]], width=0.36,
                     color=colour, label=f"pooling {poolings[i]}")
        axis.set_xticks([j + 0.19 for j in range(len(out["results"]))],
                        [r["order"] for r in out["results"]], fontsize=8, rotation=20)
        axis.set_title(title, fontsize=10)
        axis.set_ylabel("Q·Kᵀ skipped, %")
        axis.legend(fontsize=7)
    return save(figure, "order"), body


def subject(name: str, runs: list[dict]) -> str:
    outputs = [run["output"] for run in runs]
    first = outputs[0]
    if "model" in first:
        texts = " and ".join(dict.fromkeys(o["text"] for o in outputs))
        lengths = SHOWN.get(name) or sorted({r["context"] for o in outputs for r in o.get("results", [o])})
        texts = texts if name != "needle" else "Emma"
        models = " and ".join(dict.fromkeys(MODEL.get(o["model"], o["model"]) for o in outputs))
        length = ", ".join(map(str, lengths))
        return f"Model {models}; text {texts}; {length} tokens"
    if "grid" in first:
        return "Tensors made from a photograph and from a clip by `benchmarks/quality/features.py` (no trained model)"
    return "Operator on structured random inputs (`sparge bench`), 9 query and 3 key/value heads of 64, causal, f32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="+", choices=TITLES)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in parser.parse_args().tables:
        names = RECORDS.get(name, [name])
        records = [json.loads((HERE / "records" / f"{n}.json").read_text()) for n in names]
        special = {
            "length": report_length, "stages": report_stages,
            "judge": report_judge, "overhead": report_overhead, "order": report_order,
            "needle": report_needle, "wikitext": report_wikitext, "oracle": report_oracle,
            "compensation": report_compensation,
        }
        runs = [run for record in records for run in record["runs"]]
        if name in special:
            picture, body = special[name](runs)
        else:
            picture, body = (report_error if name in ERRORS else report_ppl)(name, runs)
        path = RESULTS / f"{name}.md"
        old = path.read_text() if path.exists() else ""
        reading = old[old.index("## Reading"):] if "## Reading" in old else "## Reading\n"
        commands = "".join(f"    {run['command']}\n" for run in runs)
        when = " and ".join(dict.fromkeys(r["date"] for r in records))
        files = " and ".join(f"`benchmarks/quality/records/{n}.json`" for n in names)
        made = " and ".join(f"`python benchmarks/quality/measure.py {' '.join([n, *NEEDS.get(n, '').split()])}`" for n in names)
        devices = " and ".join(dict.fromkeys(r["device"] for r in records))
        path.write_text(
            f"# {TITLES[name]}\n\n{subject(name, runs)}. {devices}, {when}. "
            f"Record: {files}, made by {made}:\n\n{commands}\n"
            f"The paper: {PAPER[name]}\n\n{picture}\n{body}\n{reading}"
        )
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
