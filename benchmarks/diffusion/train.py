#!/usr/bin/env python3
"""Trains a DiT on the emoji clips or images, then evaluates it dense against sparse, in one call.

    python benchmarks/diffusion/train.py video --data DIRECTORY/clips.npz --out OUT
    python benchmarks/diffusion/train.py image --data DIRECTORY/images.npz --out OUT

Writes OUT/KIND.json, contact sheets OUT/KIND-*.png and the weights in bf16, OUT/KIND-weights-*.
The model is small and sees a few hundred pictures many times: it could memorise them, given longer. What is measured is
how far sparse attention moves its samples, not how good they are. `--tiny --device cpu` tries every path.
"""

import argparse
import copy
import json
import math
import os
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

import evaluate
from dit import DiT, Shape, shifted
from emoji import Emoji, load, to_model

SHAPES = {"video": Shape(grid=(16, 16, 16)), "image": Shape(grid=(1, 64, 64))}
TINY = {"video": Shape(grid=(8, 8, 8), width=128, depth=2), "image": Shape(grid=(1, 32, 32), width=128, depth=2)}
SHARD_BYTES = 15 * 2**20


def loss_of(model: DiT, data: torch.Tensor, codes: torch.Tensor, device: str) -> torch.Tensor:
    time_ = shifted(torch.sigmoid(torch.randn(len(data), device=device)))
    noise = torch.randn(data.shape, device=device)
    at = time_[:, None, None]
    with torch.autocast(device, torch.bfloat16):
        velocity = model(data * (1 - at) + noise * at, time_, codes)
    return (velocity.float() - (noise - data)).square().mean()


def train(emoji: Emoji, shape: Shape, args, record: dict) -> DiT:
    """Trains until the minutes are over; the rate rises, then falls by a cosine of the time used."""
    torch.manual_seed(0)
    model = DiT(shape).to(args.device)
    average = copy.deepcopy(model).requires_grad_(False)
    tokens, codes = emoji.tokens.to(args.device), emoji.codes.to(args.device)
    is_cuda = args.device == "cuda"
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=is_cuda
    )
    budget = 60 * args.minutes
    start, step, losses = time.time(), 0, []
    if args.compile:
        for block in model.blocks:
            block.compile()
    while True:
        used = (time.time() - start) / budget
        if used >= 1 or step == args.max_steps:
            break
        scale = min(1.0, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, used)))
        for group in optimizer.param_groups:
            group["lr"] = args.rate * scale
        chosen = torch.randint(len(tokens), (args.batch,), device=args.device)
        try:
            loss = loss_of(model, to_model(tokens[chosen]), codes[chosen], args.device)
            loss.backward()
        except Exception as error:
            if not args.compile or step:
                raise
            # Said in the record: an eager run trains fewer steps in the same time.
            record["compile"] = f"failed: {type(error).__name__}: {error}"[:300]
            print("compile", record["compile"], flush=True)
            args.compile = False
            for block in model.blocks:
                block._compiled_call_impl = None
            optimizer.zero_grad(set_to_none=True)
            continue
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        losses.append(loss.detach())
        step += 1
        if step % 20 == 0 and is_cuda:
            torch.cuda.synchronize()  # so that the time used is the time of the work
        if step % 500 == 0:
            print(f"step {step} at {time.time() - start:.0f} s, loss {losses[-1].item():.4f}", flush=True)
    curve = torch.stack(losses).float().cpu()
    bins = curve.tensor_split(min(40, len(curve)))
    record["training"] = {
        "steps": step, "batch": args.batch, "seconds": time.time() - start, "items": len(tokens),
        "rate": args.rate, "passes": step * args.batch / len(tokens), "is_compiled": args.compile,
        "loss": [round(x.mean().item(), 5) for x in bins],
    }  # fmt: skip
    return average


def save_weights(model: DiT, prefix: Path) -> list[str]:
    """The bf16 weights in files of at most 15 MiB; safetensors' own names tell which tensor is where."""
    shards, size = [{}], 0
    for name, tensor in model.state_dict().items():
        bytes_ = tensor.numel() * tensor.element_size()
        if size + bytes_ > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous().cpu()
        size += bytes_
    paths = [Path(f"{prefix}-weights-{at}.safetensors") for at in range(len(shards))]
    for path, shard in zip(paths, shards):
        save_file(shard, path, {"shape": json.dumps(model.shape.as_dict())})
    return [path.name for path in paths]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=list(SHAPES))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=4.0, help="of training")
    parser.add_argument("--evaluation-minutes", type=float, default=3.0, help="no new row after that")
    parser.add_argument("--items", type=int, default=384, help="pictures or clips to train on")
    parser.add_argument("--frames", type=int, default=16, choices=(16, 32), help="32: 8192 tokens")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=8e-4)
    parser.add_argument("--sampling-steps", type=int, default=25)
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small model and few samples")
    args = parser.parse_args()
    start = time.time()
    args.out.mkdir(parents=True, exist_ok=True)
    shape = TINY[args.kind] if args.tiny else SHAPES[args.kind]
    if args.kind == "video" and args.frames == 32 and not args.tiny:
        shape = replace(shape, grid=(32, 16, 16))
    emoji = load(args.data, shape, args.items)
    shape = replace(shape, vocabulary=emoji.vocabulary)
    record = {
        "kind": args.kind, "tiny": args.tiny, "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "shape": shape.as_dict(), "tokens": shape.tokens, "data_seconds": time.time() - start,
    }  # fmt: skip
    path = args.out / f"{args.kind}.json"

    def save() -> None:
        record["wall_seconds"] = time.time() - start
        draft = path.with_suffix(".part")
        draft.write_text(json.dumps(record, indent=1))
        os.replace(draft, path)

    print(f"{len(emoji.names)} items of {shape.tokens} tokens at {time.time() - start:.0f} s", flush=True)
    model = train(emoji, shape, args, record)
    record["params"] = sum(p.numel() for p in model.parameters()) / 1e6
    model = model.for_sampling()
    save()
    record["weights"] = save_weights(model, args.out / args.kind)
    save()
    print(f"trained {record['training']['steps']} steps at {time.time() - start:.0f} s", flush=True)
    evaluate.run(model, emoji, args, record, save, time.time() + 60 * args.evaluation_minutes)
    save()
    print(evaluate.table(record))


if __name__ == "__main__":
    main()
