#!/usr/bin/env python3
"""Times one denoising step, or one prefill, of full-size architectures with random weights.

    python benchmarks/diffusion/latency.py --json benchmarks/diffusion/records/latency.json

Every method runs once uncounted (compilation, library handles), then all take turns; the medians are
of whole forward passes by device events. Random weights say nothing about quality; the density of a
fixed share of blocks does not depend on them. `--device cpu --tiny` tries every path on a small model.
"""

import argparse
import contextlib
import gc
import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from architectures import ARCHITECTURES, Architecture, build, inputs
from methods import REUSE, methods


BLOCKS = ("transformer_blocks", "single_transformer_blocks", "blocks", "layers")


class Clock:
    """Seconds of device work."""

    def __init__(self, device: str) -> None:
        self.is_cuda = device == "cuda"

    def measure(self, run) -> float:
        if not self.is_cuda:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def reset_peak(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float | None:
        return torch.cuda.max_memory_allocated() / 2**30 if self.is_cuda else None


class OutOfBudget(Exception):
    pass


@contextlib.contextmanager
def shortened(model: torch.nn.Module) -> Iterator[float]:
    """The model with the first block of each list only, and what share of its blocks that is."""
    lists = {n: x for n, x in model.named_modules() if isinstance(x, torch.nn.ModuleList)}
    # Lists of blocks, not those inside of blocks.
    lists = {n: x for n, x in lists.items() if n.split(".")[-1] in BLOCKS and len(x) > 1}
    places = {n: model.get_submodule(n.rpartition(".")[0]) for n in lists}
    try:
        for name, blocks in lists.items():
            setattr(places[name], name.split(".")[-1], blocks[:1])
        yield len(lists) / sum(map(len, lists.values())) if lists else 1.0
    finally:
        for name, blocks in lists.items():
            setattr(places[name], name.split(".")[-1], blocks)


class Bench:
    """The methods on one architecture."""

    def __init__(self, arch: Architecture, args, clock: Clock, deadline: float) -> None:
        self.args, self.clock, self.deadline = args, clock, deadline
        self.is_language = arch.kind.startswith("Llama")
        self.model = build(arch, args.device, args.tiny)
        self.inputs = inputs(arch, self.model, args.device, args.tiny)
        self.reps = args.reps or arch.reps
        self.row = {
            "params": sum(p.numel() for p in self.model.parameters()) / 1e9,
            "published_params": arch.params, "source": arch.source, "about": arch.about,
            "batch": arch.batch, "reps": self.reps, "paper": arch.paper, "methods": {},
        }  # fmt: skip
        self.methods = methods(self.model, self.is_language, self.row)
        if args.methods:
            self.methods = {n: m for n, m in self.methods.items() if n in args.methods.split(";")}

    def forward(self) -> torch.Tensor:
        out = self.model(**self.inputs)
        return out.logits if self.is_language else out.sample

    def sample(self, name: str) -> float:
        """Seconds of one forward pass; with mask reuse, of a mask's life: one step that finds it and
        those that reuse it, the second of which stands for all."""
        with self.methods[name]() as handle:
            first = self.clock.measure(self.forward)
            if "reuse" not in name:
                return first
            handle.step = 1
            return (first + (REUSE - 1) * self.clock.measure(self.forward)) / REUSE

    def first(self, name: str) -> None:
        """The uncounted run: finite output, and how long it took.

        A model that is too slow to run twice warms up with one block of each kind.
        """
        found = self.row["methods"].setdefault(name, {"seconds": []})
        try:
            with shortened(self.model) if self.reps == 1 else contextlib.nullcontext(1.0) as share:
                start = time.perf_counter()
                with self.methods[name]() as handle:
                    out = self.forward()
                    if "reuse" in name:
                        handle.step = 1
                        out = self.forward()
                is_finite = bool(out.isfinite().all())
                found["first_seconds"] = (time.perf_counter() - start) / share
            if not is_finite:
                raise RuntimeError("the output is not finite")
        except Exception as error:  # recorded by name; the other methods go on
            self.failed(name, error)

    def failed(self, name: str, error: Exception) -> None:
        text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        self.row["methods"][name]["failed"] = text
        print(f"    {name}: failed: {text}", flush=True)
        if self.clock.is_cuda:
            torch.cuda.empty_cache()

    def once(self, name: str) -> None:
        found = self.row["methods"][name]
        if "failed" in found:
            return
        # Short warm-ups are mostly overhead: what was measured before says more.
        before = [x for m in self.row["methods"].values() for x in m["seconds"]]
        expected = min([found["first_seconds"], *(2 * x for x in before)])
        if time.time() + expected > self.deadline:
            raise OutOfBudget
        try:
            self.clock.reset_peak()
            found["seconds"].append(self.sample(name))
            found["peak_gib"] = self.clock.peak()
        except Exception as error:
            self.failed(name, error)

    def run(self, save) -> None:
        try:
            for name in self.methods:
                if time.time() > self.deadline:
                    raise OutOfBudget
                self.first(name)
                if self.reps == 1:  # long ones: no round is lost to a budget that ends
                    self.once(name)
                save()
            for _ in range(self.reps if self.reps > 1 else 0):
                for name in self.methods:
                    self.once(name)
                save()
        except OutOfBudget:
            self.row["stopped"] = "the time budget ended here"
        for found in self.row["methods"].values():
            if found["seconds"]:
                found["median"] = statistics.median(found["seconds"])
        save()


def table(rows: dict) -> str:
    lines = []
    for name, row in rows.items():
        if "failed" in row or "skipped" in row:
            lines.append(f"{name:14} {'failed: ' + row['failed'] if 'failed' in row else row['skipped']}")
            continue
        done = {n: m.get("median") for n, m in row["methods"].items()}
        native, cudnn, rest = (done.get(n) for n in ("native", "cudnn", "no attention"))
        share = f", attention {1 - rest / native:.0%}" if native and rest else ""
        lines.append(f"{name:14} {row['params']:.2f} G parameters ({row['published_params']}){share}")
        for method, found in row["methods"].items():
            if not found.get("median"):
                lines.append(f"    {method:30} {'failed: ' + found['failed'][:90] if 'failed' in found else 'not run'}")
                continue
            ratio = lambda x: f"{x / found['median']:5.2f}" if x else "    -"
            peak = f"{found['peak_gib']:6.1f} GiB" if found.get("peak_gib") else ""
            lines.append(
                f"    {method:30} {found['median'] * 1e3:9.1f} ms  /native {ratio(native)}"
                f"  /cudnn {ratio(cudnn)} {peak}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(ARCHITECTURES), help="in this order")
    parser.add_argument("--methods", default="", help="names, between semicolons; default all")
    parser.add_argument("--budget", type=float, default=420.0, help="seconds for everything")
    parser.add_argument("--reps", type=int, default=0, help="default: each model's own")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models of the same classes")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    start, clock = time.time(), Clock(args.device)
    record = {
        "device": torch.cuda.get_device_name() if clock.is_cuda else "cpu", "tiny": args.tiny,
        "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "rows": {},
    }  # fmt: skip
    for package in ("diffusers", "transformers", "sparge"):
        try:
            record[package] = __import__(package).__version__
        except Exception as error:
            record[package] = f"failed: {type(error).__name__}: {error}"
    args.json.parent.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        record["wall_seconds"] = time.time() - start
        draft = args.json.with_suffix(".part")
        draft.write_text(json.dumps(record, indent=1))
        os.replace(draft, args.json)

    for name in args.models.split(","):
        if time.time() - start > args.budget:
            record["rows"][name] = {"skipped": "the time budget ended before it"}
            save()
            continue
        began = time.time()
        print(f"{name} at {began - start:.0f} s", flush=True)
        bench = None
        try:
            with torch.inference_mode():
                bench = Bench(ARCHITECTURES[name], args, clock, start + args.budget)
                record["rows"][name] = bench.row
                bench.row["build_seconds"] = time.time() - began
                bench.run(save)
        except Exception as error:  # one model must not lose the others
            record["rows"].setdefault(name, {})["failed"] = f"{type(error).__name__}: {error}"[:300]
            print(f"    failed: {error}", flush=True)
        del bench
        gc.collect()
        if clock.is_cuda:
            torch.cuda.empty_cache()
        if name in record["rows"]:
            record["rows"][name]["wall_seconds"] = time.time() - began
        save()
    print(table(record["rows"]))


if __name__ == "__main__":
    main()
