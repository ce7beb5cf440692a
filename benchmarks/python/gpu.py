"""What `sparge.attention` costs on a GPU beside its kernels, and where it stands against SDPA.

    python benchmarks/python/gpu.py --out benchmarks/record/DATE-python-DEVICE.jsonl

Prints tables and writes a JSON object a row; `--quick` stays below a minute once the kernels are
compiled. Times are medians.

overhead: µs a call. `host`: enqueuing alone, the queue never full; `eager`: a stream of calls, one
    wait at the end; `graph`: the same kernels replayed as a CUDA graph; `over`: eager less graph.
    `alone`, `alone_over`: a call and the wait for it, and that less a replay and the wait for that.
sync: whether a call waits for a busy device: `waited` by the clock, `refused` where PyTorch's sync
    debug mode saw it.
short: the default call, and one with `cdf=0.98`, against SDPA with cuDNN preferred, in turns. Ratios
    of times in the same round, below 1: sparge is faster. `default`, `forced`: on the device, launches
    hidden; `default_wall`, `forced_wall`: a call and the wait for it. `smooth` inputs are as a
    model's, `noise` offers nothing to skip.
long: 128K tokens, causal, 32/8 heads, topk=0.5: eager and as a CUDA graph, and whether bits agree.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Callable, Optional, TextIO

import sparge
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))
import bench  # noqa: E402

Call = Callable[[], Any]
Row = dict[str, Any]

CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
BUSY = 200_000_000  # cycles, about 0.1 s


class Notes:
    """Rows: lines of a table, and in a file as JSON."""

    def __init__(self, file: Optional[TextIO]) -> None:
        self.file = file
        self.columns: list[str] = []

    def __call__(self, **row: Any) -> None:
        row = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        texts = {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items()}
        if self.columns != list(row):
            self.columns = list(row)
            print("\n" + " ".join(f"{k:>{self.width(k)}}" for k in row))
        print(" ".join(f"{text:>{self.width(k)}}" for k, text in texts.items()), flush=True)
        if self.file:
            print(json.dumps(row), file=self.file, flush=True)

    def width(self, column: str) -> int:
        return max(len(column), 17 if column == "call" else 8)


def inputs(
    heads: int, kv_heads: int, length: int, dim: int, kind: str = "smooth"
) -> list[torch.Tensor]:
    """bf16 q, k, v, `[1, heads, length, dim]`."""
    if kind == "smooth":
        made = bench.inputs((1, heads, kv_heads, length, dim, False), seed=0)
        return [x.transpose(1, 2).contiguous() for x in made]
    sizes = [(1, h, length, dim) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(size, device="cuda", dtype=torch.bfloat16) for size in sizes]


def wall(call: Call, calls: int, rounds: int, waits: bool = True) -> float:
    """µs of one of so many calls, with the wait for the last of them or without."""
    call()
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        if waits:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) / calls)
    torch.cuda.synchronize()
    return 1e6 * statistics.median(times)


def captured(call: Call, calls: int) -> torch.cuda.CUDAGraph:
    """So many calls as one graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return graph


def turns(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """ms on the device of every call in every round."""
    for _ in range(3):
        for call in calls.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(200_000)  # hides the host's part of the launch
            begin.record()
            call()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end))
    return times


def wall_turns(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """µs of every call and the wait for it in every round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            torch.cuda.synchronize()
            begin = time.perf_counter()
            call()
            torch.cuda.synchronize()
            times[name].append(1e6 * (time.perf_counter() - begin))
    return times


def ratio(times: dict[str, list[float]], name: str, to: str) -> float:
    return statistics.median(a / b for a, b in zip(times[name], times[to]))


def overhead(note: Notes, quick: bool) -> None:
    rounds = 10 if quick else 30
    for length in (128, 2048, 4096):
        q, k, v = inputs(8, 8, length, 128)
        blocks = sparge.predict(q, k, topk=0.5)
        calls: dict[str, Call] = {
            "topk": lambda: sparge.attention(q, k, v, topk=0.5),
            "topk causal": lambda: sparge.attention(q, k, v, topk=0.5, is_causal=True),
            "cdf": lambda: sparge.attention(q, k, v, cdf=0.98),
            "topk lse": lambda: sparge.attention(q, k, v, topk=0.5, return_lse=True),
            "block mask": lambda: sparge.block_sparse_attention(q, k, v, blocks),
            "predict": lambda: sparge.predict(q, k, topk=0.5),
            "SDPA": lambda: F.scaled_dot_product_attention(q, k, v),
        }
        for name, call in calls.items():
            several, one = captured(call, 20), captured(call, 1)
            graph = wall(several.replay, 1, rounds) / 20
            eager = wall(call, 200, max(3, rounds // 3))
            alone = wall(call, 1, 10 * rounds)
            note(
                what="overhead", call=name, heads=8, length=length, dim=128,
                host_us=wall(call, 40, rounds, waits=False), eager_us=eager, graph_us=graph,
                over_us=eager - graph, alone_us=alone,
                alone_over_us=alone - wall(one.replay, 1, 10 * rounds),
            )  # fmt: skip


def sync(note: Notes) -> None:
    length = 2048
    q, k, v = inputs(8, 8, length, 128)
    lengths = torch.tensor([length - 100], device="cuda")
    mask = torch.rand(1, 1, length, length, device="cuda") < 0.9
    blocks = sparge.predict(q, k, topk=0.5)
    tau: Row = {"topk": 0.5}
    calls: dict[str, Call] = {
        "attention": lambda: sparge.attention(q, k, v, **tau),
        "default": lambda: sparge.attention(q, k, v),
        "lse": lambda: sparge.attention(q, k, v, **tau, return_lse=True),
        "lse, stats": lambda: sparge.attention(q, k, v, **tau, return_lse=True, return_stats=True),
        "key_lengths, list": lambda: sparge.attention(q, k, v, **tau, key_lengths=[length - 100]),
        "key_lengths, GPU": lambda: sparge.attention(q, k, v, **tau, key_lengths=lengths),
        "keep_keys": lambda: sparge.attention(q, k, v, **tau, keep_keys=((300, 500),)),
        "element mask": lambda: sparge.attention(q, k, v, mask, **tau),
        "block mask": lambda: sparge.block_sparse_attention(q, k, v, blocks),
        "predict": lambda: sparge.predict(q, k, **tau),
        "predict all": lambda: sparge.predict(q, k, topk=1.0),
        "quantize": lambda: sparge.quantize(k),
    }
    for name, call in calls.items():
        call()
        torch.cuda.synchronize()
        torch.cuda._sleep(BUSY)
        begin = time.perf_counter()
        call()
        host_ms = 1e3 * (time.perf_counter() - begin)
        waited = host_ms > 50
        torch.cuda.synchronize()
        refused = False
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            refused = True
        finally:
            torch.cuda.set_sync_debug_mode("default")
        note(what="sync", call=name, waited=waited, refused=refused, host_ms=host_ms)


def short(note: Notes, quick: bool) -> None:
    lengths = (512, 1024, 2048, 3072, 4096, 6144, 8192, 16384)
    for dim in (128,) if quick else (64, 128):
        for length in lengths[1::2] if quick else lengths:
            for kind in ("smooth", "noise"):
                q, k, v = inputs(24, 24, length, dim, kind)
                for causal in (False, True):
                    options: Row = {"is_causal": causal}
                    calls: dict[str, Call] = {
                        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v, **options),
                        "default": lambda: sparge.attention(q, k, v, **options),
                        "forced": lambda: sparge.attention(q, k, v, cdf=0.98, **options),
                    }
                    # Around both: where sparge is SDPA it is the same one.
                    with sdpa_kernel(CUDNN_FIRST, set_priority=True):
                        device = turns(calls, 11 if quick else 25)
                        walls = wall_turns(calls, 11 if quick else 25)
                    note(
                        what="short", inputs=kind, heads=24, length=length, dim=dim, causal=causal,
                        sdpa_ms=statistics.median(device["sdpa"]),
                        default=ratio(device, "default", "sdpa"),
                        forced=ratio(device, "forced", "sdpa"),
                        default_wall=ratio(walls, "default", "sdpa"),
                        forced_wall=ratio(walls, "forced", "sdpa"),
                    )  # fmt: skip


def long(note: Notes, quick: bool) -> None:
    length = 131072
    q, k, v = inputs(32, 8, length, 128)
    options: Row = {"is_causal": True, "enable_gqa": True}
    kept: list[torch.Tensor] = []

    def call() -> None:
        kept[:] = [sparge.attention(q, k, v, topk=0.5, **options)]

    call()
    first = kept[0]
    call()
    repeats = torch.equal(kept[0], first)
    graph = captured(call, 1)
    (out,) = kept
    out.fill_(float("nan"))
    graph.replay()
    agree = torch.equal(out, first)
    with sdpa_kernel(CUDNN_FIRST, set_priority=True):
        times = turns(
            {
                "eager": lambda: sparge.attention(q, k, v, topk=0.5, **options),
                "graph": graph.replay,
                "sdpa": lambda: F.scaled_dot_product_attention(q, k, v, **options),
            },
            3 if quick else 9,
        )
    note(
        what="long", heads=32, kv_heads=8, length=length, dim=128, topk=0.5,
        eager_repeats=repeats, graph_agrees=agree,
        eager_ms=statistics.median(times["eager"]), graph_ms=statistics.median(times["graph"]),
        sdpa_ms=statistics.median(times["sdpa"]), ratio=ratio(times, "eager", "sdpa"),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default="overhead,sync,short,long")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", help="write the rows here, as JSON")
    arguments = parser.parse_args()
    parts: dict[str, Call] = {
        "overhead": lambda: overhead(note, arguments.quick),
        "sync": lambda: sync(note),
        "short": lambda: short(note, arguments.quick),
        "long": lambda: long(note, arguments.quick),
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        file = stack.enter_context(open(arguments.out, "w")) if arguments.out else None
        note = Notes(file)
        note(
            what="machine", date=str(datetime.date.today()), gpu=torch.cuda.get_device_name(),
            torch=torch.__version__, sparge=sparge.build_info()["version"],
            command=" ".join(["python", "benchmarks/python/gpu.py", *sys.argv[1:]]),
        )  # fmt: skip
        for part in arguments.parts.split(","):
            begin = time.perf_counter()
            parts[part]()
            note(what="took", part=part, seconds=time.perf_counter() - begin)


if __name__ == "__main__":
    main()
