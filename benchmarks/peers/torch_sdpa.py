"""Time PyTorch's CPU ``scaled_dot_product_attention`` in f32.

One JSON line per shape on stdout. Floating-point operations are counted on the
reachable (query, key) pairs: 4·heads·dim·pairs, pairs = len² or, causal,
len·(len+1)/2; softmax is not counted. Inputs are [1, heads, len, dim],
contiguous, batch 1. Causal means ``is_causal=True`` (PyTorch skips the upper
triangle itself).

Usage::

    python torch_sdpa.py --threads 2 --shape 9x8192x64:causal --shape 8x4096x128
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class Shape:
    """One self-attention problem."""

    heads: int
    length: int
    dim: int
    causal: bool

    @staticmethod
    def parse(text: str) -> "Shape":
        """Read ``HEADSxLENxDIM`` with an optional ``:causal``."""
        size, _, option = text.partition(":")
        try:
            heads, length, dim = (int(part) for part in size.split("x"))
        except ValueError:
            heads = length = dim = 0
        if min(heads, length, dim) < 1 or option not in ("", "causal"):
            raise argparse.ArgumentTypeError(
                f"{text!r}: expected HEADSxLENxDIM or HEADSxLENxDIM:causal, as 9x8192x64:causal"
            )
        return Shape(heads, length, dim, option == "causal")

    def __str__(self) -> str:
        return f"{self.heads}x{self.length}x{self.dim}" + (":causal" if self.causal else "")

    def flops(self) -> int:
        """Multiplications and additions of QKᵀ and PV on the reachable pairs."""
        pairs = self.length * (self.length + 1) // 2 if self.causal else self.length**2
        return 4 * self.heads * self.dim * pairs


def smooth_walk(heads: int, length: int, dim: int, rng: torch.Generator, rho: float) -> torch.Tensor:
    """Stationary random walk along the tokens, unit variance.

    x₀ = e₀, xₜ = ρ·xₜ₋₁ + √(1−ρ²)·eₜ with e standard normal: neighbours resemble
    each other as neighbouring tokens do, over about 1/(1−ρ) tokens.
    """
    x = torch.randn(length, heads, dim, generator=rng)
    x[1:] *= math.sqrt(1 - rho * rho)
    for t in range(1, length):
        x[t] += rho * x[t - 1]
    return x.transpose(0, 1).contiguous()


def inputs(shape: Shape, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v of [1, heads, len, dim].

    q and k share one walk w (ρ = 0.99) and carry noise of their own, v has its own
    walk: q = 1.2·w + 0.6·e₁, k = 1.2·w + 0.6·e₂, v = w′ + 0.5·e₃. Dense time does
    not depend on the values; these keep the softmax in a realistic range.
    """
    rng = torch.Generator().manual_seed(seed)
    size = (shape.heads, shape.length, shape.dim)
    walk = smooth_walk(*size, rng, rho=0.99)
    q = 1.2 * walk + 0.6 * torch.randn(size, generator=rng)
    k = 1.2 * walk + 0.6 * torch.randn(size, generator=rng)
    v = smooth_walk(*size, rng, rho=0.99) + 0.5 * torch.randn(size, generator=rng)
    return q[None], k[None], v[None]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=Shape.parse, action="append", required=True,
                        metavar="HxLxD[:causal]", help="may be repeated")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--reps", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.set_num_interop_threads(1)
    for shape in args.shape:
        q, k, v = inputs(shape, args.seed)
        seconds = []
        with torch.inference_mode():
            for rep in range(args.warmup + args.reps):
                start = time.perf_counter()
                scaled_dot_product_attention(q, k, v, is_causal=shape.causal)
                elapsed = time.perf_counter() - start
                if rep >= args.warmup:
                    seconds.append(elapsed)
        median = statistics.median(seconds)
        print(json.dumps({
            "peer": "torch.sdpa",
            "shape": str(shape),
            "dtype": "f32",
            "threads": torch.get_num_threads(),
            "reps": args.reps,
            "median_s": round(median, 6),
            "min_s": round(min(seconds), 6),
            "max_s": round(max(seconds), 6),
            "gflops": round(shape.flops() / median / 1e9, 2),
            "version": torch.__version__,
        }), flush=True)


if __name__ == "__main__":
    main()
