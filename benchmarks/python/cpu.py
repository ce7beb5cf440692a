"""What `sparge.attention` costs on a CPU: its overhead, and where it stands against SDPA at short lengths.

    python benchmarks/python/cpu.py > benchmarks/record/DATE-DEVICE-python.jsonl
    python benchmarks/python/cpu.py 1 short > …   # 1 s a row; of the parts overhead, short and crossover

One JSON object a line; times are medians. `overhead_us` is a public call of one small block less the
same call of the extension on ready addresses. `short` is the default where SDPA serves it, asked for in three
ways: as SDPA is, causal, and as diffusers does (tokens before heads, a config); `call_us` is what a call of
next to nothing costs more than SDPA's.
"""

from __future__ import annotations

import datetime
import json
import platform
import sys
import time
from typing import Any, Callable

import sparge
import torch
import torch.nn.functional as F
from sparge import _ops, _sparge
from sparge._config import parsed


def median(call: Callable[[], Any], budget: float = 0.5, least: int = 5) -> float:
    """Seconds."""
    call(), call()
    times: list[float] = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < budget or len(times) < least:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def pair(a: Callable[[], Any], b: Callable[[], Any], budget: float) -> tuple[float, float, float]:
    """Seconds of both, and the median of b/a over neighbouring runs: the machine drifts."""
    a(), b()
    times: list[tuple[float, float]] = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < budget or len(times) < 7:
        start = time.perf_counter()
        a()
        middle = time.perf_counter()
        b()
        times.append((middle - start, time.perf_counter() - middle))
    at = len(times) // 2
    ratios = sorted(y / x for x, y in times)
    return sorted(x for x, _ in times)[at], sorted(y for _, y in times)[at], ratios[at]


def note(**row: Any) -> None:
    print(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}))
    sys.stdout.flush()


def overhead() -> None:
    x = torch.randn(1, 1, 16, 64)
    text = "layout=HND topk=1.0"
    settings, out = parsed(text), torch.empty_like(x)
    raw = (x.data_ptr(), x.shape, x.stride())
    alone = median(lambda: _sparge.attend(settings, "f32", 2, raw, raw, raw, out.data_ptr()), 1.0)
    op = median(lambda: _ops.attention(x, x, x, None, None, None, text), 1.0)
    public = median(lambda: sparge.attention(x, x, x, topk=1.0), 1.0)
    sdpa = median(lambda: F.scaled_dot_product_attention(x, x, x), 1.0)
    note(
        what="overhead",
        extension_us=1e6 * alone,
        op_us=1e6 * op,
        public_us=1e6 * public,
        overhead_us=1e6 * (public - alone),
        sdpa_us=1e6 * sdpa,
    )


def short(budget: float) -> None:
    ways: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "plain": ({}, {}),
        "causal": ({"is_causal": True}, {"is_causal": True}),
        "nhd": ({}, {"layout": "NHD", "config": sparge.Config()}),
    }
    for way, (theirs, mine) in ways.items():

        def both(q: torch.Tensor) -> tuple[Callable[[], Any], Callable[[], Any]]:
            nhd = q.transpose(1, 2) if way == "nhd" else q
            return (
                lambda: F.scaled_dot_product_attention(q, q, q, **theirs),
                lambda: sparge.attention(nhd, nhd, nhd, **mine),
            )

        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # waking a second one costs more than all that is measured here
        sdpa, ours = (median(x, budget) for x in both(torch.randn(1, 2, 8, 16)))
        torch.set_num_threads(threads)
        note(what="a short call", way=way, sdpa_us=1e6 * sdpa, call_us=1e6 * (ours - sdpa))
        for dim in (64, 128):
            for length in (64, 256, 512, 1024):
                sdpa, ours, ratio = pair(*both(torch.randn(1, 24, length, dim)), budget)
                note(
                    what="short", way=way, heads=24, dim=dim, length=length,
                    sdpa_us=1e6 * sdpa, sparge_us=1e6 * ours, ratio=ratio,
                )  # fmt: skip


def crossover(budget: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for heads, kv_heads, dim in ((8, 8, 64), (9, 3, 64), (8, 8, 128)):
            for length in (32, 128, 256, 512, 1000, 1024, 2048, 4096):
                q = torch.randn(1, heads, length, dim, dtype=dtype)
                k = torch.randn(1, kv_heads, length, dim, dtype=dtype)
                for causal in (True, False):
                    options: dict[str, Any] = {"is_causal": causal, "enable_gqa": True}
                    sdpa, ours, ratio = pair(
                        lambda: F.scaled_dot_product_attention(q, k, k, **options),
                        lambda: sparge.attention(q, k, k, **options),
                        budget,
                    )
                    note(
                        what="default against SDPA", dtype=str(dtype)[6:], heads=heads,
                        kv_heads=kv_heads, dim=dim, length=length, causal=causal,
                        sdpa_ms=1e3 * sdpa, sparge_ms=1e3 * ours, ratio=ratio,
                    )  # fmt: skip


def main() -> None:
    info = sparge.build_info()
    note(
        date=str(datetime.date.today()),
        machine=platform.machine(),
        isa=info["isa"],
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        sparge=info["version"],
        command=" ".join(["python benchmarks/python/cpu.py", *sys.argv[1:]]),
    )
    budget = float(sys.argv[1]) if len(sys.argv) > 1 else 0.5
    parts = sys.argv[2:] or ["overhead", "short", "crossover"]
    with torch.inference_mode():
        if "overhead" in parts:
            overhead()
        if "short" in parts:
            short(budget)
        if "crossover" in parts:
            crossover(budget)


if __name__ == "__main__":
    main()
