#!/usr/bin/env python3
"""Which prediction ranks blocks best, layer by layer: relative L1 at equal sparsity of every layer.

    python benchmarks/diffusion/terrain_layers.py --side 256

writes records/terrain-SIDE-layers.json, on a dense pass of the first tuning seed, on the CPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import terrain_methods as methods
import torch
from terrain import TUNING_SEED, recorded, stamp, write
from terrain_methods import FAMILIES, skipped
from terrain_net import TerrainNet, dense, fetch

COMPARED = ("SpargeAttn, τ", "paper's pooling, τ", "FlexPrefill, query-aware", "XAttention")
SPARSITY = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--side", type=int, choices=(128, 256), required=True)
    parser.add_argument("--model", type=Path, help="the ONNX file; downloaded where not given")
    parser.set_defaults(device="cpu")
    args = parser.parse_args()
    torch.set_num_threads(2)
    net, rows = TerrainNet(fetch(args.model)), []
    for layer, qkv in recorded(net, [TUNING_SEED], args.side, "cpu").items():
        exact = dense(layer, *qkv)
        for name in COMPARED:
            x = methods.matched(name, SPARSITY, {layer: qkv})
            out, counts = FAMILIES[name][2](x)(layer, *qkv)
            error = ((out - exact).abs().sum() / exact.abs().sum()).item()
            share = round(skipped([counts]), 4)
            row = {"layer": layer, "tokens": qkv[0].shape[2], "name": name, "qk_sparsity": share}
            rows.append({**row, "rel_l1": round(error, 5)})
            print(f"layer {layer:2} {name:24} {100 * share:.1f}% {error:.4f}", flush=True)
    command = f"terrain_layers.py --side {args.side}"
    record = {**stamp(args, ""), "command": f"python benchmarks/diffusion/{command}"}
    write(f"terrain-{args.side}-layers.json", {**record, "rows": rows})


if __name__ == "__main__":
    main()
