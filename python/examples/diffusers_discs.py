"""A diffusion transformer of diffusers' Flux class draws discs, dense and sparse.

    pip install "sparge[diffusers]" numpy
    python examples/diffusers_discs.py

No trained diffusion transformer is small enough for an example, so this one is trained here: about
two minutes on two cores, on pictures of coloured discs (48×48 tokens). Then the same noise is turned
into pictures by dense and by sparse attention, and both are written. It shows that the two agree,
and how to switch; it says nothing about large models.
"""

from __future__ import annotations

import argparse
import time

import diffusers
import sparge.diffusers
import torch
from torch import Tensor

SIDE = 48


def discs(count: int) -> Tensor:
    """`[count, SIDE·SIDE, 3]` in −1..1: three discs on a ground."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, SIDE), torch.linspace(-1, 1, SIDE), indexing="ij")
    images = torch.rand(count, 3, 1, 1).expand(-1, -1, SIDE, SIDE) * 0.6 - 1
    for _ in range(3):
        middle, radius = torch.rand(count, 2, 1, 1) * 1.6 - 0.8, torch.rand(count, 1, 1) * 0.3 + 0.15
        inside = (x - middle[:, 0]) ** 2 + (y - middle[:, 1]) ** 2 < radius**2
        images = torch.where(inside[:, None], torch.rand(count, 3, 1, 1) * 2 - 1, images)
    return images.flatten(2).transpose(1, 2)


class Model:
    """The velocity of a rectified flow: x_t = (1 − t)·image + t·noise."""

    def __init__(self) -> None:
        self.net = diffusers.FluxTransformer2DModel(
            in_channels=3, num_layers=1, num_single_layers=3, attention_head_dim=32,
            num_attention_heads=3, joint_attention_dim=8, pooled_projection_dim=8,
            axes_dims_rope=(4, 14, 14),
        )  # fmt: skip
        grid = torch.meshgrid(torch.arange(1), torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
        self.places = torch.stack(grid, -1).reshape(-1, 3).float()

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        velocity: Tensor = self.net(
            hidden_states=x,
            encoder_hidden_states=torch.zeros(len(x), 4, 8),
            pooled_projections=torch.zeros(len(x), 8),
            timestep=t,
            img_ids=self.places,
            txt_ids=torch.zeros(4, 3),
            return_dict=False,
        )[0]
        return velocity

    def train(self, steps: int) -> None:
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        for step in range(steps):
            images, t = discs(2), torch.rand(2)
            noise, share = torch.randn_like(images), t[:, None, None]
            velocity = self((1 - share) * images + share * noise, t)
            loss = (velocity - (noise - images)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 25 == 0 or step == steps - 1:
                print(f"step {step}: loss {loss:.3f}", flush=True)

    @torch.inference_mode()
    def draw(self, noise: Tensor, steps: int) -> Tensor:
        x, times = noise, torch.linspace(1, 0, steps + 1)
        for now, then in zip(times, times[1:]):
            x = x + (then - now) * self(x, now.repeat(len(x)))
        return x


def write(path: str, images: Tensor) -> None:
    """Pictures side by side, as PPM."""
    rows = images.view(len(images), SIDE, SIDE, 3).clamp(-1, 1).add(1).mul(127.5).byte()
    wide = torch.cat(list(rows), 1).repeat_interleave(4, 0).repeat_interleave(4, 1)
    with open(path, "wb") as file:
        file.write(b"P6 %d %d 255\n" % (wide.shape[1], wide.shape[0]) + wide.numpy().tobytes())
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train-steps", type=int, default=150)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--topk", type=float, default=0.4)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = Model()
    model.train(arguments.train_steps)
    model.net.eval()
    noise = torch.randn(3, SIDE * SIDE, 3)

    begin = time.perf_counter()
    dense = model.draw(noise, arguments.steps)
    print(f"dense  {time.perf_counter() - begin:.1f} s")
    with sparge.diffusers.enable(model.net, topk=arguments.topk):
        begin = time.perf_counter()
        sparse = model.draw(noise, arguments.steps)
        print(f"sparse {time.perf_counter() - begin:.1f} s (topk {arguments.topk})")
    error = (sparse - dense).square().mean()
    print(f"PSNR of sparse against dense: {10 * torch.log10(4 / error):.1f} dB")
    write("dense.ppm", dense)
    write("sparse.ppm", sparse)


if __name__ == "__main__":
    main()
