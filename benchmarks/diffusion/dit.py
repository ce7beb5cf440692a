"""A small diffusion transformer for images and clips: N-dimensional RoPE, conditioned on a name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import sparge

Tensor = torch.Tensor
HEAD_DIM = 64
#: attend(layer, query, key, value) on [batch, heads, tokens, 64].
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """``grid``: tokens along (T, H, W), T = 1 for images; a token is ``patch`` × ``patch`` pixels."""

    grid: tuple[int, int, int]
    patch: int = 4
    width: int = 384
    depth: int = 8
    vocabulary: int = 1

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def patchify(pixels: Tensor, patch: int) -> Tensor:
    """``[n, T, H, W, 3]`` to ``[n, tokens, patch·patch·3]``, tokens row-major, W fastest."""
    n, t, h, w, c = pixels.shape
    x = pixels.view(n, t, h // patch, patch, w // patch, patch, c)
    return x.permute(0, 1, 2, 4, 3, 5, 6).reshape(n, -1, patch * patch * c)


def unpatchify(tokens: Tensor, shape: Shape) -> Tensor:
    t, h, w = shape.grid
    p = shape.patch
    x = tokens.view(-1, t, h, w, p, p, 3).permute(0, 1, 2, 4, 3, 5, 6)
    return x.reshape(-1, t, h * p, w * p, 3)


def rotations(grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """cos and sin ``[tokens, 32]``: half of a head's dimensions, shared out among the axes."""
    pairs = (8, 12, 12) if grid[0] > 1 else (0, 16, 16)
    places = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in grid), indexing="ij")
    angles = []
    for place, count in zip(places, pairs):
        frequencies = 100.0 ** -(torch.arange(count) / max(count, 1))
        angles.append(place.reshape(-1, 1) * frequencies)
    angle = torch.cat(angles, 1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(HEAD_DIM), nn.RMSNorm(HEAD_DIM)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        # Beside what all blocks share, so that a block adds little to it.
        self.modulation = nn.Parameter(torch.zeros(6, width))

    def forward(self, x: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor, attend: Any = None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation + self.modulation).to(x.dtype).unsqueeze(2).unbind(1)
        y = F.layer_norm(x, x.shape[-1:]) * (1 + scale1) + shift1
        q, k, v = self.qkv(y).unflatten(-1, (3, -1, HEAD_DIM)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = (rotate(norm(z), cos, sin).to(v.dtype) for norm, z in ((self.q_norm, q), (self.k_norm, k)))
        y = F.scaled_dot_product_attention(q, k, v) if attend is None else attend(q, k, v)
        x = x + gate1 * self.out(y.transpose(1, 2).flatten(2))
        y = F.layer_norm(x, x.shape[-1:]) * (1 + scale2) + shift2
        return x + gate2 * self.down(F.gelu(self.up(y), approximate="tanh"))


class DiT(nn.Module):
    """Predicts noise − data (flow matching) at time 0 (data) to 1 (noise)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        width, patch = shape.width, shape.patch**2 * 3
        self.embed = nn.Linear(patch, width)
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.names = nn.EmbeddingBag(shape.vocabulary, width, mode="sum", padding_idx=0)
        self.modulation = nn.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(shape.depth))
        self.last_modulation = nn.Linear(width, 2 * width)
        self.last = nn.Linear(width, patch)
        for layer in (self.modulation, self.last_modulation, self.last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        cos, sin = rotations(shape.grid)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        #: Tokens in another order inside the blocks: the result is the same to rounding.
        self.order: Tensor | None = None
        self.attend: Attend | None = None

    def for_sampling(self) -> "DiT":
        """In bf16, as saved and evaluated; the tables of positions stay float32."""
        tables = self.cos.clone(), self.sin.clone()
        self.bfloat16().eval().requires_grad_(False)
        self.cos, self.sin = tables
        return self

    def forward(self, x: Tensor, time: Tensor, names: Tensor) -> Tensor:
        """``x`` ``[batch, tokens, patch]``, ``time`` ``[batch]``, ``names`` ``[batch, code points]``."""
        frequencies = torch.exp(torch.arange(128, device=x.device) * (-math.log(1e4) / 128))
        angles = 1000 * time.float()[:, None] * frequencies
        wave = torch.cat([angles.cos(), angles.sin()], -1).to(self.embed.weight.dtype)
        condition = F.silu(self.time(wave) + self.names(names))
        modulation = self.modulation(condition).unflatten(-1, (6, -1))
        x = self.embed(x.to(self.embed.weight.dtype))
        cos, sin = self.cos, self.sin
        if self.order is not None:
            x, cos, sin = x[:, self.order], cos[self.order], sin[self.order]
        for at, block in enumerate(self.blocks):
            if self.attend is None:
                x = block(x, modulation, cos, sin)
            else:
                x = block(x, modulation, cos, sin, lambda q, k, v, at=at: self.attend(at, q, k, v))
        if self.order is not None:
            x = x[:, self.order.argsort()]
        shift, scale = self.last_modulation(condition).unflatten(-1, (2, 1, -1)).unbind(1)
        return self.last(F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift)


def shifted(time: Tensor, shift: float = 3.0) -> Tensor:
    """Times moved towards noise, where pictures of this size are decided."""
    return shift * time / (1 + (shift - 1) * time)


@torch.no_grad()
def sample(model: DiT, noise: Tensor, names: Tensor, steps: int, begin: Callable[[int], None] | None = None) -> Tensor:
    """Euler steps from noise to data; ``begin`` is told each step. Float32 tokens."""
    times = shifted(torch.linspace(1, 0, steps + 1, device=noise.device))
    x = noise.clone()
    for step in range(steps):
        if begin is not None:
            begin(step)
        velocity = model(x, times[step].expand(len(x)), names).float()
        x = x + (times[step + 1] - times[step]) * velocity
    return x


def orders(grid: tuple[int, int, int]) -> dict[str, Tensor]:
    """The orders to compare; each a permutation of row-major places."""
    names = ["row", "column", "hilbert", "random"] + (["time"] if grid[0] > 1 else [])
    return {name: torch.frombuffer(sparge.token_order(name, grid), dtype=torch.int64) for name in names}
