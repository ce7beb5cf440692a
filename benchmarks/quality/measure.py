#!/usr/bin/env python3
"""Makes one record of benchmarks/quality/records/.

    python benchmarks/quality/measure.py RECORD [--sparge target/release/sparge]
                                               [--wikitext FILE] [--calibration FILE]

writes benchmarks/quality/records/RECORD.json: the commands, when and on what they ran, and each
command's JSON as it came. `report.py PAGE` turns the records of a page into docs/results/PAGE.md and .png;
README.md says which records make which page.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent

OURS = [
    "default", "cdf:0.995", "cdf:0.99", "cdf:0.95", "cdf:0.9", "cdf:0.8", "topk:0.7", "topk:0.5",
    "topk:0.3",
]
PAPER = [f"cdf:{t},pool=block,local=0,lambda=inf" for t in (0.99, 0.95, 0.9, 0.8, 0.6)]
MINFERENCE = [f"minference:v={v},s={s}" for v, s in ((30, 100), (30, 200), (60, 400), (30, 800), (120, 400))]
FLEXPREFILL = [f"flexprefill:{g},min=128" for g in (0.99, 0.95, 0.9, 0.8, 0.6)]
XATTENTION = [f"xattention:{t}" for t in (0.98, 0.95, 0.9, 0.8, 0.6)]
CONTROLS = [
    "window:2048", "window:1024", "window:512", "random:0.8", "random:0.6", "random:0.4",
    "block-sparse:16", "block-sparse:8",
]


def ppl(policies: list[str], context: str = "4096", *more: str) -> list[str]:
    return ["eval", "ppl", "--context", context, "--policy", ",".join(policies), *more]


def error(policies: list[str], context: str, every: int) -> list[str]:
    listed = ",".join(policies)
    return ["eval", "error", "--context", context, "--every", str(every), "--policy", listed]


#: τ of SmolLM2's layers 1 to 10, and of its others.
BY_LAYER = {"{sparse-early}": (0.88, 0.97), "{sparse-late}": (0.98, 0.945)}


def by_layer(inside: float, outside: float, path: Path) -> None:
    """A calibration file with the default's settings but for τ."""
    calibration = json.loads((HERE / "calibrations" / "smollm2-135m.json").read_text())
    for layer, settings in enumerate(calibration["layers"]):
        for head in settings["heads"]:
            tau = inside if 1 <= layer <= 10 else outside
            head.update({"cdf": tau, "top_k": None, "theta": 0, "lambda": 6})
    path.write_text(json.dumps(calibration))


#: What each table runs. `{image}`, `{clip}` are made by features.py, `{wikitext}` and
#: `{calibration}` are given, the files of BY_LAYER are made here.
TABLES: dict[str, list[list[str]]] = {
    # Equal error: one dense reading, every third layer.
    "error": [error(OURS + PAPER + MINFERENCE + FLEXPREFILL + XATTENTION + CONTROLS, "4096", 3)],
    # FlexPrefill with the floor it has by default, 1024 keys for every block of queries.
    "error-flexprefill": [
        error([f"flexprefill:{g}" for g in (0.99, 0.95, 0.9, 0.8, 0.6)], "4096", 3),
    ],
    # Tables 1, 5, 6, 10 of the paper: one reading for each policy.
    "perplexity": [
        ppl(["dense", "default", "default,lambda=inf", "dense,lambda=6", "cdf:0.95", "cdf:0.9",
             "topk:0.5", "cdf:0.95,pool=block,local=0,lambda=inf",
             "cdf:0.9,pool=block,local=0,lambda=inf",
             "cdf:0.9,pool=block,local=0,theta=0.3,lambda=inf", "minference:v=60,s=400",
             "minference:v=30,s=200", "flexprefill:0.95,min=128", "flexprefill:0.9,min=128",
             "xattention:0.95", "xattention:0.9", "window:1024", "window:512", "random:0.6"]),
    ],
    "perplexity-flexprefill": [ppl(["dense", *(f"flexprefill:{g}" for g in (0.99, 0.95, 0.9, 0.6))])],
    # Blocks before the diagonal that are always kept.
    "local": [
        ppl(["dense", *(f"cdf:0.95,local={n}" for n in (0, 1, 2, 4, 8)), "cdf:0.9,local=0",
             "cdf:0.9,local=4", "cdf:0.9,local=8", "cdf:0.98,local=0", "cdf:0.98,local=2",
             "topk:0.5,local=0", "topk:0.5,local=2",
             *(f"cdf:0.9,pool=block,lambda=inf,local={n}" for n in (0, 8))]),
        ppl(["dense", *(f"cdf:{t},local={n}" for t in (0.95, 0.98) for n in (0, 2))], "8000"),
        error([f"cdf:0.95,local={n}" for n in (0, 1, 2, 8)], "4096", 6),
    ],
    # The same with every head's own settings, made by `sparge tune` on Emma; and on another text.
    "tuned": [ppl(["dense", "default"], "4096", "--calibration", "{calibration}")],
    "wikitext": [
        ppl(["dense", "default", "cdf:0.99", "cdf:0.95", "cdf:0.9", "cdf:0.98,local=0",
             "cdf:0.98,pool=16x16", "cdf:0.98,pool=16x16+var", "cdf:0.95,pool=block,local=0,lambda=inf",
             "minference:v=30,s=200", "flexprefill:0.95,min=128", "xattention:0.95", "window:1024"],
            "4096", "--windows", "3", "--prompt-file", "{wikitext}", "--calibration", "{calibration}"),
    ],
    "wikitext-flexprefill": [
        ppl(["dense", *(f"flexprefill:{g}" for g in (0.95, 0.9, 0.6))],
            "4096", "--windows", "3", "--prompt-file", "{wikitext}"),
    ],
    # Why XAttention is ahead on that text: how many queries are sampled, and which layers skip.
    "wikitext-why": [
        ppl(["cdf:0.96", "cdf:0.96,pool=16x16+4rows", "cdf:0.96,pool=16x16+8rows"], "4096",
            "--windows", "3", "--prompt-file", "{wikitext}", "--calibration", "{sparse-early}"),
        ppl(["cdf:0.95,pool=16x16+8rows"], "4096",
            "--windows", "3", "--prompt-file", "{wikitext}", "--calibration", "{sparse-late}"),
        [*error(["cdf:0.96", "cdf:0.96,pool=16x16+4rows", "cdf:0.96,pool=16x16+8rows",
                 "xattention:0.95"], "4096", 1), "--prompt-file", "{wikitext}"],
        ppl(["dense", "cdf:0.96", "cdf:0.96,pool=16x16+8rows"], "4096", "--calibration", "{sparse-early}"),
    ],
    # Table 7, with what "perplexity" has at 4096.
    "length": [ppl(["dense", "default"], "1024,2048,8000", "--calibration", "{calibration}")],
    # Another model, tuned on its own.
    "qwen": [
        ppl(["dense", "default", "cdf:0.95", "topk:0.5", "minference:v=30,s=200", "xattention:0.95"],
            "4096", "--model", "qwen2.5-coder-0.5b", "--calibration", "{calibration}"),
        ppl(["dense", "default"], "2048,8192,16384", "--model", "qwen2.5-coder-0.5b",
            "--calibration", "{calibration}"),
    ],
    # The longest that it was made for.
    "qwen-32k": [ppl(["dense", "default"], "32768", "--model", "qwen2.5-coder-0.5b")],
    # Three times as large, with heads of 128.
    "qwen-1.5b": [
        ppl(["dense", "default", "topk:0.5", "minference:v=30,s=200", "xattention:0.95"],
            "4096", "--model", "qwen2.5-coder-1.5b"),
        ppl(["dense", "default"], "8192", "--model", "qwen2.5-coder-1.5b"),
    ],
    "qwen-1.5b-16k": [ppl(["dense", "default"], "16384", "--model", "qwen2.5-coder-1.5b")],
    "qwen-1.5b-samples": [
        ppl(["cdf:0.95", "cdf:0.95,pool=16x16+8rows"], "4096", "--model", "qwen2.5-coder-1.5b"),
    ],
    # What could stand for the skipped blocks.
    "compensation": [
        ["eval", "compensation", "--context", "4096", "--model", model]
        for model in ("smollm2-135m", "qwen2.5-coder-0.5b")
    ],
    # The prediction against true masses, in perplexity; stage 2 off, two local blocks kept by all.
    "oracle": [
        ppl(["dense", *(f"{p},lambda=inf" for t in (0.98, 0.95, 0.9) for p in
             (f"cdf:{t},pool=block", f"cdf:{t},pool=16x16", f"cdf:{t}", f"oracle:{t}"))],
            "4096", "--windows", "2"),
    ],
    "oracle-qwen": [
        ppl(["dense", *(f"{p},lambda=inf" for t in (0.98, 0.95, 0.9) for p in
             (f"cdf:{t},pool=block", f"cdf:{t}", f"oracle:{t}"))],
            "4096", "--model", "qwen2.5-coder-0.5b"),
    ],
    # Equal sparsity and equal error on a second model, with what "qwen" has at 4096.
    "qwen-policies": [
        ppl(["dense", "cdf:0.9", "minference:v=30,s=100", "minference:v=60,s=400", "flexprefill:0.95",
             "flexprefill:0.9", "flexprefill:0.95,min=128", "xattention:0.9"],
            "4096", "--model", "qwen2.5-coder-0.5b"),
    ],
    "qwen-error": [
        [*error(["default", "cdf:0.99", "cdf:0.95", "cdf:0.9", "cdf:0.8", "topk:0.7", "topk:0.5", "topk:0.3",
                 *PAPER, *MINFERENCE, *FLEXPREFILL, *(f"flexprefill:{g}" for g in (0.99, 0.95, 0.9, 0.6)),
                 *XATTENTION, "window:2048", "window:1024", "window:512"], "4096", 4),
         "--model", "qwen2.5-coder-0.5b"],
    ],
    "qwen-1.5b-tuned": [
        ppl(["dense"], "4096", "--model", "qwen2.5-coder-1.5b", "--calibration", "{calibration}"),
    ],
    "qwen-1.5b-tuned-8k": [
        ppl(["dense"], "8192", "--model", "qwen2.5-coder-1.5b", "--calibration", "{calibration}"),
    ],
    # The compared methods on WikiText-2 at more than one setting, with what "wikitext" has.
    "wikitext-policies": [
        ppl(["dense", "minference:v=30,s=100", "minference:v=60,s=400", "xattention:0.98", "xattention:0.9",
             "window:512"], "4096", "--windows", "3", "--prompt-file", "{wikitext}"),
    ],
    # How long tuning takes: five samples, as the paper uses.
    "tune-time": [
        ["tune", "--samples", "5", "--context", "4096", "--l1", "0.02", "--l2", "0.025", "-o", "{out}"],
    ],
    # Tables 5 and 10.
    "judge": [
        error([f"cdf:0.9,local=0,lambda=inf,pool={p},theta={t}" for p in ("block", "16x16+2rows")
               for t in (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)], "4096", 6),
    ],
    # Table 3.
    "overhead": [
        ["bench", "--reps", "7",
         *(x for n in (1024, 2048, 4096, 8192, 16384) for x in ("--shape", f"9/3x{n}x64:causal")),
         "--policy", "dense,cdf:0.98,cdf:0.98,pool=16x16+8rows,cdf:0.98,pool=block,minference,flexprefill,xattention,xattention:0.9,stride=16"],
    ],
    # Tables 4 and 9.
    "order": [
        ["eval", "order", "{image}", "--grid", "1x64x64"],
        ["eval", "order", "{clip}", "--grid", "16x18x22"],
    ],
    # Retrieval.
    "needle": [
        ["eval", "needle", "--context", "1024,2048", "--depth", "0.1,0.5,0.9", "--policy",
         "dense,default,topk:0.5,minference:v=30,s=100,flexprefill:0.9,min=128,xattention:0.9",
         "--calibration", "{calibration}"],
        ["eval", "needle", "--context", "4096", "--depth", "0.1,0.5,0.9", "--policy", "dense,default",
         "--calibration", "{calibration}"],
        ["eval", "needle", "--context", "1024", "--keys", "4", "--depth", "0.1,0.5,0.9",
         "--policy", "dense,default"],
    ],
    # The longest that SmolLM2 reads.
    "needle-8k": [
        ["eval", "needle", "--context", "8000", "--depth", "0.1,0.5,0.9", "--policy", "dense,default",
         "--calibration", "{calibration}"],
    ],
    # A model that can do the multi-key task.
    "needle-qwen-keys": [
        ["eval", "needle", "--model", "qwen2.5-coder-0.5b", "--context", "4096", "--keys", "4",
         "--depth", "0.1,0.5,0.9", "--policy", "dense,default", "--calibration", "{calibration}"],
    ],
    "needle-qwen": [
        ["eval", "needle", "--model", "qwen2.5-coder-0.5b", "--context", "8192",
         "--depth", "0.1,0.5,0.9", "--policy", "dense,default", "--calibration", "{calibration}"],
    ],
}


def device() -> str:
    name = platform.processor()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{name}, {len(os.sched_getaffinity(0))} cores, {platform.system()} {platform.machine()}"


def cpu_seconds() -> float:
    """Of all commands that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--sparge", default="target/release/sparge")
    parser.add_argument("--wikitext", help="the WikiText-2 test text, for the table of that name")
    parser.add_argument("--calibration", help="a file of sparge tune, for the tables with tuned heads")
    args = parser.parse_args()
    given = {"{wikitext}": args.wikitext, "{calibration}": args.calibration}
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for line in TABLES[args.table]:
            command = [args.sparge]
            for word in line:
                if word in ("{image}", "{clip}"):
                    kind = word.strip("{}")
                    path = Path(folder) / f"{kind}.safetensors"
                    make = [sys.executable, str(HERE / "features.py"), kind, str(path)]
                    subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
                    word = str(path)
                elif word == "{out}":
                    word = str(Path(folder) / "out.json")
                elif word in BY_LAYER:
                    path = Path(folder) / f"{word.strip('{}')}.json"
                    by_layer(*BY_LAYER[word], path)
                    word = str(path)
                elif word in given:
                    if not given[word]:
                        raise SystemExit(f"this table needs --{word.strip('{}')} FILE")
                    word = given[word]
                command.append(word)
            began, used = time.monotonic(), cpu_seconds()
            output = subprocess.run([*command, "--json"], check=True, capture_output=True, text=True)
            times = {"wall_s": round(time.monotonic() - began, 1), "cpu_s": round(cpu_seconds() - used, 1)}
            result = json.loads(output.stdout)
            # A record names the text, not where it lay.
            if "{wikitext}" in line:
                result["text"] = "WikiText-2 test"
            runs.append({"command": " ".join(["sparge", *line]), **times, "output": result})
    record = {
        "date": datetime.date.today().isoformat(),
        "device": device(),
        "runs": runs,
    }
    path = HERE / "records" / f"{args.table}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
