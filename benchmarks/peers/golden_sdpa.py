"""Write the golden file of the attention tests: tiny cases computed by PyTorch in f64.

Each case has ``caseN.q``, ``.k``, ``.v`` (f32; exactly the values that were used),
``.mask`` where there is one (BOOL, true = attend; or F32, added to the scaled
scores), ``.o`` and ``.lse`` (natural log; computed in f64, rounded once to f32).
Layout is [batch, heads, tokens, dim]; lse is [batch, heads, tokens]; a mask is
[qo_len, kv_len] or [batch or 1, heads or 1, qo_len, kv_len]. A row with nothing to
attend to has o = 0 and lse = -inf.

The metadata has one entry, ``golden``, a JSON object: ``format``, ``seed``,
``torch``, and ``cases``, which maps each case's name to ``about``, ``causal``
(``none``, ``top-left``: key j ≤ query i; ``bottom-right``: j ≤ i + kv_len − qo_len),
``scale`` (null: 1/√d), ``mask`` (``none``, ``bool``, ``additive``), ``gqa``.
The causal triangle is not part of the stored mask; both apply.

Usage::

    python golden_sdpa.py crates/sparge/tests/data/sdpa.safetensors
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

FORMAT = "sparge-golden-sdpa-1"


@dataclass(frozen=True)
class Case:
    """Sizes and options of one case."""

    about: str
    b: int = 1
    h: int = 2
    h_kv: int = 2
    q: int = 9
    kv: int = 9
    d: int = 6
    dv: int = 6
    causal: str = "none"
    scale: float | None = None
    mask: str = "none"
    mask_shape: str = "qk"  # "qk", "b1qk", "1hqk" or "bhqk"
    empty_row: bool = False
    amplitude: float = 1.0


CASES = [
    Case("plain, two batches", b=2, q=5, kv=5),
    Case("one token, one dimension", h=1, h_kv=1, q=1, kv=1, d=1, dv=1),
    Case("grouped queries", h=4, q=7, kv=7),
    Case("causal top-left, equal lengths", q=13, kv=13, d=8, dv=8, causal="top-left"),
    Case("causal top-left, more keys than queries", q=5, kv=12, causal="top-left"),
    Case("causal top-left, more queries than keys", q=12, kv=5, causal="top-left"),
    Case("causal bottom-right, more keys than queries", q=5, kv=12, causal="bottom-right"),
    Case("causal bottom-right, more queries than keys: empty rows first", q=12, kv=5, causal="bottom-right"),
    Case("boolean mask over all heads, one row empty", q=8, kv=11, mask="bool", empty_row=True),
    Case("boolean mask per batch", b=2, q=5, kv=9, mask="bool", mask_shape="b1qk"),
    Case("additive mask per batch and head, some -inf, one row empty", b=2, q=5, kv=7,
         mask="additive", mask_shape="bhqk", empty_row=True),
    Case("additive mask per head", q=6, kv=6, mask="additive", mask_shape="1hqk"),
    Case("value dimension smaller", h=1, h_kv=1, q=6, kv=9, d=24, dv=10),
    Case("value dimension larger, odd", h=1, h_kv=1, q=6, kv=7, d=5, dv=19),
    Case("custom scale", q=7, kv=7, scale=0.7),
    Case("negative scale", q=5, kv=6, scale=-0.25),
    Case("scores of several hundred", q=6, kv=9, amplitude=8.0),
    Case("one query on a cache, grouped, d != dv", h=4, h_kv=1, q=1, kv=33, d=16, dv=9, causal="bottom-right"),
    Case("grouped, causal top-left, unequal", b=2, h=4, q=8, kv=6, d=5, dv=5, causal="top-left"),
    Case("everything: multi-query, bottom-right, boolean mask, scale, d != dv", b=2, h=3, h_kv=1,
         q=8, kv=19, d=7, dv=5, causal="bottom-right", scale=0.4, mask="bool", mask_shape="b1qk"),
    Case("everything: grouped, bottom-right, additive mask, scale, d != dv", h=4,
         q=11, kv=22, d=7, dv=5, causal="bottom-right", scale=0.5, mask="additive"),
]


def make_mask(case: Case, rng: torch.Generator) -> torch.Tensor | None:
    """The stored mask: boolean (75% kept) or additive (normal, 15% -inf)."""
    if case.mask == "none":
        return None
    lead = {"qk": (), "b1qk": (case.b, 1), "1hqk": (1, case.h), "bhqk": (case.b, case.h)}[case.mask_shape]
    size = (*lead, case.q, case.kv)
    chance = torch.rand(size, generator=rng)
    if case.mask == "bool":
        mask = chance < 0.75
        nothing: bool | float = False
    else:
        mask = torch.randn(size, generator=rng).masked_fill(chance < 0.15, -math.inf)
        nothing = -math.inf
    if case.empty_row:
        mask[..., case.q // 2, :] = nothing
    return mask


def triangle(case: Case) -> torch.Tensor:
    """True where the causal option lets query i see key j."""
    i = torch.arange(case.q)[:, None]
    j = torch.arange(case.kv)[None, :]
    if case.causal == "none":
        return torch.ones(case.q, case.kv, dtype=torch.bool)
    return j <= i + (case.kv - case.q if case.causal == "bottom-right" else 0)


def solve(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
          mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """o by PyTorch's operator in f64; lse by the definition, which also checks o."""
    q, k, v = q.double(), k.double(), v.double()
    bias = torch.zeros(case.q, case.kv, dtype=torch.float64).masked_fill(~triangle(case), -math.inf)
    if mask is not None and mask.dtype == torch.bool:
        bias = bias.expand(torch.broadcast_shapes(mask.shape, bias.shape)).masked_fill(~mask, -math.inf)
    elif mask is not None:
        bias = bias + mask.double()

    by_flag = case.causal == "top-left" and mask is None
    if by_flag or (case.causal == "none" and mask is None):
        torch_mask = None
    elif mask is None or mask.dtype == torch.bool:
        torch_mask = bias == 0
    else:
        torch_mask = bias
    with sdpa_kernel(SDPBackend.MATH):
        o = scaled_dot_product_attention(q, k, v, attn_mask=torch_mask, is_causal=by_flag,
                                         scale=case.scale, enable_gqa=case.h != case.h_kv)

    group = case.h // case.h_kv
    scale = 1 / math.sqrt(case.d) if case.scale is None else case.scale
    scores = scale * (q @ k.repeat_interleave(group, 1).mT) + bias
    lse = torch.logsumexp(scores, -1)
    weights = torch.where(lse[..., None] == -math.inf, 0.0, torch.exp(scores - lse[..., None]))
    by_hand = weights @ v.repeat_interleave(group, 1)
    torch.testing.assert_close(o, by_hand, rtol=1e-12, atol=1e-12)
    assert not o.isnan().any() and not lse.isnan().any(), case
    return o, lse


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the safetensors file to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rng = torch.Generator().manual_seed(args.seed)
    tensors: dict[str, torch.Tensor] = {}
    cases: dict[str, dict[str, object]] = {}
    for number, case in enumerate(CASES):
        name = f"case{number}"
        q = case.amplitude * torch.randn(case.b, case.h, case.q, case.d, generator=rng)
        k = case.amplitude * torch.randn(case.b, case.h_kv, case.kv, case.d, generator=rng)
        v = torch.randn(case.b, case.h_kv, case.kv, case.dv, generator=rng)
        mask = make_mask(case, rng)
        o, lse = solve(case, q, k, v, mask)
        tensors |= {f"{name}.q": q, f"{name}.k": k, f"{name}.v": v,
                    f"{name}.o": o.float(), f"{name}.lse": lse.float()}
        if mask is not None:
            tensors[f"{name}.mask"] = mask
        cases[name] = {"about": case.about, "causal": case.causal, "scale": case.scale,
                       "mask": case.mask, "gqa": case.h != case.h_kv}
    golden = {"format": FORMAT, "seed": args.seed, "torch": torch.__version__.split("+")[0], "cases": cases}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    # One metadata entry: safetensors writes several in no fixed order.
    save_file({name: t.contiguous() for name, t in tensors.items()}, args.out,
              metadata={"golden": json.dumps(golden)})
    print(f"{args.out}: {len(CASES)} cases, {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
