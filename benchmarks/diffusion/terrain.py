#!/usr/bin/env python3
"""Losslessness on a trained diffusion model: the terrain U-Net with its attention replaced.

    pip install -r benchmarks/diffusion/terrain_requirements.txt      # and this package
    python benchmarks/diffusion/terrain.py check                      # torch against onnxruntime
    python benchmarks/diffusion/terrain.py record --side 128 --folder target/terrain
    benchmarks/diffusion/terrain_tune target/terrain                  # sparge tune
    python benchmarks/diffusion/terrain.py measure --side 128 --folder target/terrain
    python benchmarks/diffusion/terrain_layers.py --side 128          # which prediction, by layer
    python benchmarks/diffusion/terrain_pictures.py --side 128 --folder target/terrain
    python benchmarks/diffusion/terrain_report.py                     # docs/results/terrain.md, .png

The same for --side 256. `measure` leaves records/terrain-SIDE-DEVICE.json; with --device cuda it needs no
network where --model gives the ONNX file, and of the folder only the calibrations. The seeds that
settings are tuned on (from 1000) are not among those that are measured (from 0). On a machine that
others use too, OMP_WAIT_POLICY=PASSIVE makes it several times faster.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from pathlib import Path

import sparge
import terrain_methods as methods
import torch
from sparge import Config
from terrain_metrics import compare
from terrain_methods import FAMILIES, MIN_TOKENS, Recorded, Sparse, skipped
from terrain_net import SIGMA, TerrainNet, dense, fetch, sample
from terrain_tuned import BOUNDS, DENSE, Tuned
from torch import Tensor

HERE = Path(__file__).parent
TUNING_SEED = 1000
TOLERANCE = 1e-4


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    cores = len(os.sched_getaffinity(0))
    return f"{name}, {cores} cores, {platform.system()} {platform.machine()}"


def write(name: str, record: dict) -> None:
    path = HERE / "records" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    print(f"wrote {path}")


def check(args: argparse.Namespace) -> None:
    """The evaluator against onnxruntime, at 128 as the file is and at 256 with its sizes rewritten."""
    from terrain_onnxruntime import session

    path = fetch(args.model)
    net, rows = TerrainNet(path), []
    for side in (128, 256):
        reference = session(path, side)
        for seed in range(args.seeds):
            noise, difficulty = sample(seed, side)
            ours = net(noise, difficulty)
            feeds = {"noisy": noise * SIGMA, "sigma": torch.tensor([SIGMA]), "difficulty": difficulty}
            (theirs,) = reference.run(None, {name: x.numpy() for name, x in feeds.items()})
            difference = (ours - torch.from_numpy(theirs)).abs().max().item()
            rows.append({"side": side, "seed": seed, "max_abs": difference, "std": ours.std().item()})
            print(f"{side}², seed {seed}: largest difference {difference:.1e}", flush=True)
    write("terrain-check.json", {**stamp(args, "check"), "tolerance": TOLERANCE, "rows": rows})
    if max(row["max_abs"] for row in rows) > TOLERANCE:
        raise SystemExit(f"torch and onnxruntime differ by more than {TOLERANCE}")


def stamp(args: argparse.Namespace, command: str) -> dict:
    return {
        "date": datetime.date.today().isoformat(),
        "device": device_name(args.device),
        "command": f"python benchmarks/diffusion/terrain.py {command}",
        "torch": torch.__version__,
        "sparge": sparge.__version__,
    }


def recorded(net: TerrainNet, seeds: list[int], side: int, device: str) -> Recorded:
    """q, k and v of every layer that has enough tokens, in a dense pass over these seeds."""
    layers: Recorded = {}

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[2] >= MIN_TOKENS:
            layers[layer] = q, k, v
        return dense(layer, q, k, v)

    samples = [sample(seed, side, device) for seed in seeds]
    net(*(torch.cat(parts) for parts in zip(*samples)), attend)
    return layers


def record(args: argparse.Namespace) -> None:
    """Tensors for `sparge tune`: a file for each sample and length, in both orders of tokens."""
    from safetensors.torch import save_file

    args.folder.mkdir(parents=True, exist_ok=True)
    net = TerrainNet(fetch(args.model))
    for seed in range(TUNING_SEED, TUNING_SEED + args.samples):
        layers = recorded(net, [seed], args.side, "cpu")
        for tokens in sorted({q.shape[2] for q, _, _ in layers.values()}):
            same = [qkv for qkv in layers.values() if qkv[0].shape[2] == tokens]
            order = methods.hilbert(round(tokens**0.5))
            for name, index in (("row", torch.arange(tokens)), ("hilbert", order)):
                tensors = {
                    f"layers.{i}.{kind}": x[:, :, index].contiguous()
                    for i, qkv in enumerate(same)
                    for kind, x in zip("qkv", qkv)
                }
                save_file(tensors, args.folder / f"{args.side}-{tokens}-{name}-{seed}.safetensors")


def settings(net: TerrainNet, args: argparse.Namespace) -> tuple[list[dict], dict]:
    """What is measured (name, method, order of tokens, parameter), and what single layers do."""
    seeds = [TUNING_SEED + i for i in range(args.probes)]
    row = recorded(net, seeds, args.side, args.device)
    layers = {"row": row, "hilbert": methods.along_hilbert(row)}
    samples = [sample(seed, args.side, args.device) for seed in seeds]
    tuned, effects = {}, {}
    for order in layers:
        tuned[order] = Tuned(args.folder, args.side, order, layers[order])
        effects[order] = tuned[order].effects(net, samples, order)
        print(order, {i: round(x, 1) for i, x in effects[order].items()}, flush=True)

    exact = methods.own(lambda layer: DENSE)
    listed: list[dict] = [
        {"name": "nothing skipped", "method": exact},
        {"name": "nothing skipped, bf16", "method": methods.in_bf16(exact)},
    ]
    # The arithmetic that is not the device's default.
    qk, name = ("int8", "int8 Q·Kᵀ") if args.device == "cpu" else ("half", "16-bit products")
    other = methods.own(lambda layer: DENSE.override(qk=qk))
    listed.append({"name": f"nothing skipped, {name}", "method": other})
    # One threshold for all heads, at any length.
    fixed = methods.own(lambda layer: Config(cdf=0.99))
    listed += [{"name": "τ = 0.99", "method": fixed, "order": order} for order in layers]
    for bound in args.bounds:
        method = tuned["row"].at(bound)
        target = skipped([method(layer, *qkv)[1] for layer, qkv in row.items()])
        at = {"target": round(target, 4), "bound": bound}
        for order in layers:
            listed.append({"name": "tuned", "method": tuned[order].at(bound), "order": order, **at})
            bounds = tuned[order].by_effect(effects[order], target, layers[order])
            method = tuned[order].of_each(bounds)
            each = {"name": "tuned by effect", "method": method, "order": order, "bounds": bounds}
            listed.append({**each, **at})
        for family, (_, _, make) in FAMILIES.items():
            for order in layers if family.startswith("SpargeAttn") else ("row",):
                x = methods.matched(family, target, layers[order])
                one = {"name": family, "method": make(x), "order": order, "parameter": round(x, 4)}
                listed.append({**one, **at})
        print(f"matched at {target:.3f}", flush=True)
    return listed, effects


def measure(args: argparse.Namespace) -> None:
    torch.backends.cudnn.allow_tf32 = False
    net = TerrainNet(fetch(args.model), args.device)
    begin = time.perf_counter()
    listed, effects = settings(net, args)
    samples = [sample(seed, args.side, args.device) for seed in range(args.seeds)]
    exact = [net(*one) for one in samples]
    rows = []
    for setting in listed:
        attend = Sparse(setting.pop("method"), setting.setdefault("order", "row"))
        count = args.seeds if setting["name"].startswith(("τ = 0.99", "tuned")) else args.few
        pairs = [compare(net(*samples[i], attend), exact[i]) for i in range(count)]
        counts = list(attend.counts.values())
        rows.append({
            **setting,
            "qk_sparsity": round(skipped(counts), 4),
            "pv_sparsity": round(skipped(counts, 3, 2), 4),
            "psnr": [round(psnr, 2) for psnr, _ in pairs],
            "ssim": [round(ssim, 5) for _, ssim in pairs],
            "layers": {
                layer: [round(skipped([head]), 3) for head in x] for layer, x in attend.counts.items()
            },
        })  # fmt: skip
        mean = sum(rows[-1]["psnr"]) / count
        share = 100 * rows[-1]["qk_sparsity"]
        print(f"{setting['name']:26} {setting['order']:7} {share:.1f}% {mean:.2f} dB", flush=True)
    bounds = " ".join(args.bounds)
    command = (
        f"measure --side {args.side} --device {args.device} --folder target/terrain "
        f"--seeds {args.seeds} --few {args.few} --probes {args.probes} --bounds {bounds}"
    )
    others = [compare(exact[i], exact[i - 1]) for i in range(len(exact))]
    write(f"terrain-{args.side}-{args.device}.json", {
        **stamp(args, command),
        "seconds": round(time.perf_counter() - begin),
        "side": args.side,
        # The worst PSNR on the tuning samples where one layer alone is sparse.
        "effects": {
            order: {layer: round(x, 2) for layer, x in of.items()} for order, of in effects.items()
        },
        "another_seed": {
            "psnr": [round(psnr, 2) for psnr, _ in others],
            "ssim": [round(ssim, 5) for _, ssim in others],
        },
        "rows": rows,
    })  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    commands = parser.add_subparsers(required=True)
    for command, seeds in ((check, 4), (record, 0), (measure, 32)):
        sub = commands.add_parser(command.__name__, help=(command.__doc__ or "").split("\n")[0])
        sub.set_defaults(command=command, device="cpu")
        sub.add_argument("--model", type=Path, help="the ONNX file; downloaded where not given")
        if seeds:
            sub.add_argument("--seeds", type=int, default=seeds)
        if command is not check:
            sub.add_argument("--side", type=int, choices=(128, 256), required=True)
            sub.add_argument("--folder", type=Path, required=True, help="tensors and calibrations")
        if command is record:
            sub.add_argument("--samples", type=int, default=5)
        if command is measure:
            sub.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
            sub.add_argument("--few", type=int, default=32, help="seeds for the methods side by side")
            sub.add_argument("--probes", type=int, default=3, help="tuning seeds to match settings on")
            sub.add_argument("--bounds", nargs="+", choices=BOUNDS, default=["0.05", "0.2"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.command(args)


if __name__ == "__main__":
    main()
