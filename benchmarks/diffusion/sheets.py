"""Contact sheets: samples as rows, ways as groups of columns."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw

Tensor = torch.Tensor
#: Differences are shown this many times as large, from black.
GAIN = 4
GAP, HEADER = 6, 16


def difference(a: Tensor, b: Tensor) -> Tensor:
    return ((a - b).abs() * GAIN).clamp(0, 1)


def strip(sample: Tensor, frames: int, scale: int) -> Image.Image:
    """Some frames of ``[frames, height, width, 3]`` side by side."""
    chosen = [at * len(sample) // frames for at in range(min(frames, len(sample)))]
    picture = torch.cat([sample[at] for at in chosen], 1)
    image = Image.fromarray((picture.float() * 255).round().byte().cpu().numpy())
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def write(path: Path, groups: dict[str, Tensor], rows: int) -> None:
    """``groups``: title to pixels ``[n, frames, height, width, 3]``."""
    first = next(iter(groups.values()))
    rows = min(rows, len(first))
    scale = 2 if first.shape[2] <= 64 else 1
    cells = {title: [strip(pixels[at], 4, scale) for at in range(rows)] for title, pixels in groups.items()}
    width, height = next(iter(cells.values()))[0].size
    sheet = Image.new("RGB", ((width + GAP) * len(groups) - GAP, HEADER + (height + GAP) * rows - GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (title, pictures) in enumerate(cells.items()):
        draw.text((column * (width + GAP) + 2, 2), title, fill="black")
        for row, picture in enumerate(pictures):
            sheet.paste(picture, (column * (width + GAP), HEADER + row * (height + GAP)))
    # A palette halves the file; differences of a level do not show anyway.
    sheet.quantize(256).save(path, optimize=True)
