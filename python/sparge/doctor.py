"""``python -m sparge.doctor``: what is here, what works, and what to do about the rest."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
import time
from typing import Any, Callable

from ._build import build_info


def report() -> "dict[str, Any]":
    """Everything that is printed, as data."""
    info: dict[str, Any] = {"python": platform.python_version(), "sparge": build_info()}
    for name in ("numpy", "torch", "transformers", "diffusers"):
        try:
            info[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            info[name] = None
    info["checks"] = {name: _run(check) for name, check in _checks(info).items()}
    return info


def _checks(info: "dict[str, Any]") -> "dict[str, Callable[[], str]]":
    checks: dict[str, Callable[[], str]] = {}
    if info["numpy"]:
        checks["numpy on the CPU"] = _numpy
    if info["torch"]:
        checks["torch on the CPU"] = _torch
        checks["torch on CUDA"] = _cuda
    return checks


def _run(check: Callable[[], str]) -> "dict[str, Any]":
    try:
        return {"ok": True, "says": check()}
    except Exception as error:  # whatever it is, it is what the user wants to read
        return {"ok": False, "says": f"{type(error).__name__}: {error}"}


def _numpy() -> str:
    import numpy as np

    from ._api import attention

    x = np.random.default_rng(0).standard_normal((1, 2, 500, 64), dtype=np.float32)
    scores = np.einsum("bhid,bhjd->bhij", x, x) / 8
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    want = np.einsum("bhij,bhjd->bhid", weights / weights.sum(-1, keepdims=True), x)
    error = float(np.abs(attention(x, x, x, topk=1.0, pv_gap=np.inf) - want).max())
    if not error < 1e-4:
        raise ArithmeticError(f"differs from numpy by {error}")
    return f"agrees with numpy to {error:.0e}"


def _torch() -> str:
    import torch

    return _against_sdpa(torch.device("cpu"), torch.float32, 2048)


def _cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        return "torch sees no GPU; the CPU is used"
    said = _against_sdpa(torch.device("cuda"), torch.bfloat16, 16384)
    return f"{torch.cuda.get_device_name()}: {said}"


def _against_sdpa(device: Any, dtype: Any, length: int) -> str:
    import torch
    import torch.nn.functional as F

    from ._api import attention

    q = torch.randn(1, 8, length, 64, device=device, dtype=dtype)
    calls = {
        "SDPA": lambda: F.scaled_dot_product_attention(q, q, q),
        "all blocks": lambda: attention(q, q, q, topk=1.0),
        "half of them": lambda: attention(q, q, q, topk=0.5),
    }
    outs, times = {}, []
    with torch.inference_mode():
        for name, call in calls.items():
            outs[name] = call()
            begin = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(f"{name} {1e3 * (time.perf_counter() - begin):.1f} ms")
        want, got = outs["SDPA"].float(), outs["all blocks"].float()
        error = float((got - want).abs().sum() / want.abs().sum())
    if not error < 0.03:
        raise ArithmeticError(f"relative L1 to SDPA is {error:.3f}")
    return f"relative L1 to SDPA {error:.0e}; 8 heads × {length} × 64: {', '.join(times)}"


def main() -> int:
    """Prints the report; the exit code is 1 where a check failed."""
    parser = argparse.ArgumentParser(prog="python -m sparge.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args()
    info = report()
    if arguments.json:
        print(json.dumps(info, indent=2))
    else:
        build = info["sparge"]
        print(f"sparge {build['version']} ({build['target']}, {build['profile']})")
        print(f"  CPU kernels: {build['isa']} (of {', '.join(build['isas'])})")
        print(f"  Python {info['python']}")
        for name in ("numpy", "torch", "transformers", "diffusers"):
            print(f"  {name} {info[name] or '– not installed'}")
        for name, check in info["checks"].items():
            print(f"{'ok    ' if check['ok'] else 'FAILED'} {name}: {check['says']}")
    return 0 if all(check["ok"] for check in info["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
