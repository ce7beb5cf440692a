"""Dense against sparse attention in a trained DiT: agreement of samples from the same noise."""

from __future__ import annotations

import math
import time
from functools import partial
from typing import Any

import torch

import masks
import quality
import sheets
import sparge
from dit import DiT, orders, sample, unpatchify
from emoji import Emoji, to_model, to_pixels
from recorded import BOUNDS, Calls, exact, permuted, self_similarity
from ways import Capture, Dense, Masked, Reused, Sparge, Way

Tensor = torch.Tensor


class Evaluation:
    """Samples with one noise; every experiment adds rows to the record and saves them."""

    def __init__(self, model: DiT, emoji: Emoji, args: Any, record: dict, save: Any, deadline: float) -> None:
        self.model, self.args, self.record, self.save, self.deadline = model, args, record, save, deadline
        self.steps, self.count = args.sampling_steps, 2 if args.tiny else 16
        self.device = args.device
        codes = emoji.codes.to(self.device)
        self.codes, self.tuning_codes = codes[: self.count], codes[self.count : self.count + 5]
        generator = torch.Generator().manual_seed(1)
        shape = (self.count + 5, *emoji.tokens.shape[1:])
        noise = torch.randn(shape, generator=generator).to(self.device)
        self.noise, self.tuning_noise = noise[: self.count], noise[self.count :]
        self.data = self.pixels(to_model(emoji.tokens[: self.count].to(self.device)))
        self.kept_pixels: dict[str, Tensor] = {}
        self.tuned: list[sparge.Config] = []
        record["evaluation"] = {"samples": self.count, "steps": self.steps, "bounds": BOUNDS[args.kind]}

    def pixels(self, tokens: Tensor) -> Tensor:
        return to_pixels(unpatchify(tokens, self.model.shape))

    def generate(self, way: Way, is_tuning: bool = False) -> tuple[Tensor, float]:
        """Tokens, and the wall seconds they took."""
        noise, codes = (self.tuning_noise, self.tuning_codes) if is_tuning else (self.noise, self.codes)
        self.model.attend = way
        self.sync()
        start = time.perf_counter()
        tokens = sample(self.model, noise, codes, self.steps, way.begin)
        self.sync()
        return tokens, time.perf_counter() - start

    def sync(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def captured(self, is_tuning: bool) -> Calls:
        """Five calls of every layer, from five steps and five samples."""
        count = 2 if self.args.tiny else 5
        last = self.steps - 1
        wanted = {round(at * last / (count - 1)): at % self.count for at in range(count)}
        way = Capture(wanted)
        self.generate(way, is_tuning)
        return way.calls

    def reference(self) -> None:
        self.generate(Dense())  # warms up
        self.dense, seconds = self.generate(Dense())
        self.dense_pixels = self.pixels(self.dense)
        self.calls, self.tuning_calls = self.captured(False), self.captured(True)
        self.wanted = {layer: [exact(*c) for c in calls] for layer, calls in self.calls.items()}
        self.record["dense"] = {
            "seconds": seconds,
            "psnr_to_training_data": quality.psnr(self.dense_pixels, self.data).mean().item(),
            "ssim_to_training_data": quality.ssim(self.dense_pixels, self.data).mean().item(),
            "k_self_similarity": self.similarity(self.calls),
        }

    def tuning(self) -> None:
        self.tuned = self.tuned_on(self.tuning_calls)
        self.record["tuned"] = [{"cdf": c.cdf, "pv_gap": [str(g) for g in c.pv_gap]} for c in self.tuned]

    def tuned_on(self, calls: Calls) -> list[sparge.Config]:
        """One configuration per layer. What is chosen was tested on these calls, 8-bit arithmetic included."""
        l1, l2 = BOUNDS[self.args.kind]
        return list(sparge.tune(calls, l1=l1, l2=l2, name=f"DiT, {self.args.kind}").layers)

    def similarity(self, calls: Calls) -> float:
        found = [self_similarity(k) for layer in calls.values() for _, k, _ in layer]
        return sum(found) / len(found)

    def attention_l1(self, way: Way) -> float:
        """Mean relative L1 of the attention calls that were captured from the dense run."""
        found = [
            quality.relative_l1(way(layer, *call), want)
            for layer, calls in self.calls.items()
            for call, want in zip(calls, self.wanted[layer])
        ]
        return sum(found) / len(found)

    def row(self, table: str, name: str, make: Any, **about: Any) -> dict | None:
        """One way, sampled and compared; what fails is recorded by name."""
        row: dict[str, Any] = {"name": name, **about}
        self.record.setdefault(table, []).append(row)
        if time.time() > self.deadline:
            row["failed"] = "the time budget ended before it"
            return None
        try:
            way = make()
            row["attention_l1"] = self.attention_l1(way) if way.is_alike_in_all_steps else None
            way.reset()
            tokens, row["seconds"] = self.generate(way)
            pixels = self.pixels(tokens)
            row |= {
                "density": way.density(),
                "psnr": quality.psnr(pixels, self.dense_pixels).tolist(),
                "ssim": quality.ssim(pixels, self.dense_pixels).tolist(),
                "l1": quality.relative_l1(tokens, self.dense),
            }
            if self.model.shape.grid[0] > 1:
                row["temporal_psnr"] = quality.temporal_psnr(pixels, self.dense_pixels).tolist()
            self.kept_pixels[name] = pixels.half()
            self.save()
            return {"way": way, **row}
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {error}"[:300]
            print(f"  {table}, {name}: failed: {row['failed']}", flush=True)
            self.save()
            return None

    def agreement(self) -> None:
        """The main table: how much arithmetic alone moves samples, ours, and others at equal sparsity."""
        row = partial(self.row, "agreement")
        kernels = torch.nn.attention.SDPBackend
        other = kernels.MATH if self.device == "cpu" else kernels.EFFICIENT_ATTENTION
        row("dense, another SDPA kernel", lambda: Dense(other), group="arithmetic")
        row("sparge, nothing skipped, 16 bits", lambda: Sparge(sparge.Config(policy="dense")), group="arithmetic")
        full = sparge.Config(topk=1.0, pv_gap=math.inf)
        row("sparge, nothing skipped, 8 bits", lambda: Sparge(full), group="arithmetic")
        found = row("tuned", lambda: Sparge(self.tuned), group="ours")
        density = 0.5
        if found is not None:
            density = found["density"]
            self.breakdown(found["way"])
        row("untuned, cdf 0.99", lambda: Sparge(sparge.Config(cdf=0.99)), group="ours")
        row("untuned, cdf 0.95", lambda: Sparge(sparge.Config(cdf=0.95)), group="ours")
        dense_steps = max(1, self.steps // 5)
        row(f"tuned, first {dense_steps} steps dense", lambda: Sparge(self.tuned, dense_steps), group="ours")
        row("tuned, masks reused for 4 steps", lambda: Reused(self.tuned, 4), group="ours")
        for share in (density, 0.5, 0.3):
            label = "tuned density" if share == density else f"density {share:g}"
            about = {"group": "equal sparsity", "target": share, "label": label}
            ours = row(f"topk, {label}", lambda: Sparge(sparge.Config(topk=share, pv_gap=math.inf)), **about)
            # A share of a row's blocks is rounded up: the others get as many.
            equal = share if ours is None else ours["density"]
            row(
                f"paper's pooling, topk, {label}",
                lambda: Sparge(sparge.Config(topk=share, pv_gap=math.inf, pooling="block")), **about,
            )  # fmt: skip
            for name, mask in masks.METHODS.items():
                row(f"{name}, {label}", lambda: Masked(partial(mask, density=equal)), **about)

    def breakdown(self, way: Way) -> None:
        """Sparsity of the tuned run by step, layer, head and sample."""
        layers = self.model.shape.depth
        kept = torch.stack([
            torch.stack([way.kept[step, layer] for layer in range(layers)]) for step in range(self.steps)
        ])  # fmt: skip
        sparsity = 1 - kept.float().cpu()  # [steps, layers, samples, heads]
        rounded = lambda x: [round(y, 4) for y in x.tolist()]
        self.record["breakdown"] = {
            "by_step": rounded(sparsity.mean((1, 2, 3))),
            "by_layer": rounded(sparsity.mean((0, 2, 3))),
            "by_sample": rounded(sparsity.mean((0, 1, 3))),
            "by_layer_head": [rounded(x) for x in sparsity.mean((0, 2))],
            "by_step_layer": [rounded(x) for x in sparsity.mean((2, 3))],
        }

    def judge(self) -> None:
        """The self-similarity judge with the paper's pooling, and with ours."""
        for pooling in ("block", "sub_block"):
            for cdf in (0.9, 0.95):
                for theta in (0.0, 0.2, 0.4, 0.6):
                    config = partial(sparge.Config, cdf=cdf, theta=theta, pooling=pooling, pv_gap=math.inf)
                    name = f"{pooling}, cdf {cdf:g}, theta {theta:g}"
                    self.row("judge", name, lambda: Sparge(config()), pooling=pooling, cdf=cdf, theta=theta)

    def order(self) -> None:
        """The order of tokens: tuned anew for each, so that sparsities are at equal error."""
        calls = self.calls
        for name, order in orders(self.model.shape.grid).items():
            order = order.to(self.device)
            similarity = self.similarity(permuted(calls, order))
            self.model.order = order

            def tuned(order: Tensor = order) -> Sparge:
                return Sparge(self.tuned_on(permuted(self.tuning_calls, order)))

            self.calls = permuted(calls, order)
            wanted, self.wanted = self.wanted, {n: [x[:, :, order] for x in w] for n, w in self.wanted.items()}
            self.row("order", name, tuned, k_self_similarity=similarity)
            self.calls, self.wanted, self.model.order = calls, wanted, None

    def pictures(self) -> None:
        kind, dense = self.args.kind, self.dense_pixels
        tuned = self.kept_pixels.get("tuned")
        if tuned is not None:
            groups = {"dense": dense, "sparge, tuned": tuned}
            groups[f"difference x{sheets.GAIN}"] = sheets.difference(dense, tuned)
            sheets.write(self.args.out / f"{kind}-tuned.png", groups, 6)
        names = [f"{n}, density 0.3" for n in ("topk", "MInference-style", "FlexPrefill-style", "random")]
        groups = {"dense": dense} | {n: self.kept_pixels[n] for n in names if n in self.kept_pixels}
        sheets.write(self.args.out / f"{kind}-methods.png", groups, 6)
        sheets.write(self.args.out / f"{kind}-memory.png", {"training data": self.data, "dense sample": dense}, 6)


def run(model: DiT, emoji: Emoji, args: Any, record: dict, save: Any, deadline: float) -> None:
    """All experiments, each kept apart from the failures of the others."""
    with torch.inference_mode():
        evaluation = Evaluation(model, emoji, args, record, save, deadline)
        for name in ("reference", "tuning", "agreement", "pictures", "order", "judge"):
            start = time.time()
            try:
                getattr(evaluation, name)()
            except Exception as error:
                record.setdefault("failed", {})[name] = f"{type(error).__name__}: {error}"[:300]
                print(f"  {name}: failed: {error}", flush=True)
            record.setdefault("phase_seconds", {})[name] = time.time() - start
            print(f"{name}: {time.time() - start:.0f} s", flush=True)
            save()


def table(record: dict) -> str:
    mean = lambda x: sum(x) / len(x)
    dense = record.get("dense", {}).get("psnr_to_training_data", math.nan)
    lines = [f"{record['kind']}: {record['training']['steps']} steps, loss {record['training']['loss'][-1]}, "
             f"dense to training data {dense:.1f} dB"]  # fmt: skip
    lines += [f"{name}: failed: {error}" for name, error in record.get("failed", {}).items()]
    for part in ("agreement", "order", "judge"):
        for row in record.get(part, []):
            if "failed" in row:
                lines.append(f"{part:10} {row['name']:44} failed: {row['failed'][:80]}")
                continue
            flicker = f"{mean(row['temporal_psnr']):6.1f}" if "temporal_psnr" in row else ""
            l1 = f"{row['attention_l1']:.4f}" if row.get("attention_l1") is not None else "  -   "
            lines.append(
                f"{part:10} {row['name']:44} density {row['density']:.3f} attention L1 {l1} PSNR "
                f"{mean(row['psnr']):5.1f} SSIM {mean(row['ssim']):.4f} {flicker} {row['seconds']:6.2f} s"
            )
    return "\n".join(lines)
