"""The packed emoji sets of prepare.py as tensors."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dit import Shape, patchify
from prepare import CLIP_SIZE, FRAMES, SHEET_COLUMNS


@dataclass
class Emoji:
    """``tokens`` uint8 ``[n, tokens, patch]``; ``codes`` ``[n, code points]``, 0 for none; ``names``."""

    tokens: torch.Tensor
    codes: torch.Tensor
    names: list[str]
    vocabulary: int


def load(path: Path, shape: Shape, count: int, seed: int = 0) -> Emoji:
    """``count`` pictures or clips chosen at random, in the grid's size; frames evenly apart."""
    with np.load(path) as file:
        names, ends, data = file["names"], file["ends"], file["data"]
    starts = np.concatenate([[0], ends[:-1]])
    chosen = np.random.default_rng(seed).permutation(len(names))[:count]
    frames, height, width = shape.grid[0], shape.grid[1] * shape.patch, shape.grid[2] * shape.patch

    def decode(at: int) -> np.ndarray:
        picture = Image.open(io.BytesIO(data[starts[at] : ends[at]].tobytes())).convert("RGB")
        if frames == 1:
            return np.asarray(picture.resize((width, height), Image.Resampling.BOX))[None]
        sheet = np.asarray(picture).reshape(-1, CLIP_SIZE, SHEET_COLUMNS, CLIP_SIZE, 3)
        clip = sheet.swapaxes(1, 2).reshape(FRAMES, CLIP_SIZE, CLIP_SIZE, 3)
        step = CLIP_SIZE // height
        return clip[:: FRAMES // frames][:frames, ::step, ::step]

    with ThreadPoolExecutor() as pool:
        pixels = torch.from_numpy(np.stack(list(pool.map(decode, chosen))))
    kept = [str(names[at]) for at in chosen]
    points = sorted({point for name in names for point in str(name).split("-")})
    index = {point: at + 1 for at, point in enumerate(points)}
    longest = max(len(name.split("-")) for name in kept)
    codes = torch.zeros(len(kept), longest, dtype=torch.long)
    for row, name in enumerate(kept):
        parts = [index[point] for point in name.split("-")]
        codes[row, : len(parts)] = torch.tensor(parts)
    return Emoji(patchify(pixels, shape.patch), codes, kept, len(points) + 1)


def to_model(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.float() / 127.5 - 1


def to_pixels(tokens: torch.Tensor) -> torch.Tensor:
    """Sampled tokens as values of pixels, 0 to 1."""
    return (tokens / 2 + 0.5).clamp(0, 1)
