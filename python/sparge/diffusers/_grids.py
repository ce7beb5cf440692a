"""How each architecture's tokens lie, and which of its inputs go along with them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

import torch

from .._sparge import SpargeError

Tensor = torch.Tensor
Box = tuple[int, int, int]
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Rope:
    """A module that makes rotary tables: which dimension counts tokens, how many tables do."""

    module: str
    dim: int
    tables: int = 2


@dataclass(frozen=True)
class Layout:
    """One architecture.

    * ``boxes``: the image's boxes ``(frames, rows, columns)``, one after the other, from the
      transformer and the inputs of its forward pass. A box keeps its place; tokens move within.
    * ``rope``: where the rotary tables are made; None: they are an input, or there are none.
    * ``inputs``: arguments that may hold something per image token, and in which dimension
      (modulation by time steps, residuals of a ControlNet, positions).
    """

    boxes: "Callable[[Any, Inputs], tuple[Box, ...]]"
    rope: Optional[Rope] = None
    inputs: Mapping[str, int] = field(default_factory=dict)


def _cogvideox(model: Any, inputs: Inputs) -> "tuple[Box, ...]":
    _, frames, _, height, width = inputs["hidden_states"].shape
    p, p_t = model.config.patch_size, model.config.patch_size_t or 1
    return ((-(-frames // p_t), height // p, width // p),)


def _mochi(model: Any, inputs: Inputs) -> "tuple[Box, ...]":
    frames, height, width = inputs["hidden_states"].shape[2:]
    p = model.config.patch_size
    return ((frames, height // p, width // p),)


def _wan(model: Any, inputs: Inputs) -> "tuple[Box, ...]":
    frames, height, width = inputs["hidden_states"].shape[2:]
    p_t, p_h, p_w = model.config.patch_size
    return ((frames // p_t, height // p_h, width // p_w),)


def _hunyuan(model: Any, inputs: Inputs) -> "tuple[Box, ...]":
    frames, height, width = inputs["hidden_states"].shape[2:]
    p, p_t = model.config.patch_size, model.config.patch_size_t
    frames, height, width = frames // p_t, height // p, width // p
    if model.config.image_condition_type == "token_replace" and frames > 1:
        # Image to video: every block treats the first frame's tokens apart, by their places.
        return ((1, height, width), (frames - 1, height, width))
    return ((frames, height, width),)


def _ltx(model: Any, inputs: Inputs) -> "tuple[Box, ...]":
    if inputs.get("video_coords") is not None:
        raise SpargeError(
            "order cannot be kept with video_coords: they place tokens freely, expected a box of "
            "num_frames, height and width; leave order at 'row'"
        )
    frames, height, width = (inputs.get(name) for name in ("num_frames", "height", "width"))
    if frames is None or height is None or width is None:
        raise SpargeError(
            f"num_frames, height and width are {frames}, {height} and {width}, expected the "
            "latent's; pass all three, or leave order at 'row'"
        )
    return ((int(frames), int(height), int(width)),)


def _sd3(model: Any, inputs: Inputs) -> "tuple[Box, ...]":
    if 0 in (inputs.get("skip_layers") or ()):
        raise SpargeError(
            "skip_layers has 0, the block on whose entry tokens are put in order; skip other "
            "blocks, or leave order at 'row'"
        )
    height, width = inputs["hidden_states"].shape[-2:]
    p = model.config.patch_size
    return ((1, height // p, width // p),)


_last: "tuple[Optional[weakref.ref[Tensor]], int, tuple[Box, ...]]" = (None, -1, ())


def _flux(model: Any, inputs: Inputs) -> "tuple[Box, ...]":
    """From the positions of the tokens, read once per run: it makes the host wait for a GPU. (An
    inference tensor has no version that tells of changes: it is read by every forward pass.)"""
    global _last
    ids = inputs["img_ids"]
    version = -1 if ids.is_inference() else ids._version
    reference, seen, known = _last
    if version >= 0 and version == seen and reference is not None and reference() is ids:
        return known
    known = _boxes_of(ids if ids.ndim == 2 else ids[0])
    if version >= 0:
        _last = (weakref.ref(ids), version, known)
    return known


def _boxes_of(ids: Tensor) -> "tuple[Box, ...]":
    """Runs of one image each (the first column), row by row."""
    places = ids.cpu().to(torch.int64)
    _, lengths = places[:, 0].unique_consecutive(return_counts=True)
    boxes = []
    for image in places[:, 1:3].split(lengths.tolist()):
        height, width = (int(n) for n in image[-1] - image[0] + 1)
        sides = (torch.arange(n, device="cpu") for n in (height, width))
        grid = torch.cartesian_prod(*sides).view(-1, 2)
        if not torch.equal(image - image[0], grid):
            raise SpargeError(
                "img_ids are not (image, row, column) of whole images row by row, which order needs; "
                "leave order at 'row'"
            )
        boxes.append((1, height, width))
    return tuple(boxes)


def _qwen_image(model: Any, inputs: Inputs) -> "tuple[Box, ...]":
    shapes = inputs["img_shapes"]
    first = shapes[0] if isinstance(shapes, list) else shapes
    if isinstance(shapes, list) and any(other != first for other in shapes):
        raise SpargeError(
            f"img_shapes differ within the batch ({shapes}), expected one for all: order moves the "
            "tokens of all entries alike; run them one by one, or leave order at 'row'"
        )
    images = first if isinstance(first, list) else [first]
    return tuple((int(t), int(h), int(w)) for t, h, w in images)


#: By the class name of the transformer.
LAYOUTS: "dict[str, Layout]" = {
    "CogVideoXTransformer3DModel": Layout(_cogvideox, None, {"image_rotary_emb": 0}),
    "MochiTransformer3DModel": Layout(_mochi, Rope("rope", 0)),
    "WanTransformer3DModel": Layout(_wan, Rope("rope", 1), {"timestep": 1}),
    "HunyuanVideoTransformer3DModel": Layout(_hunyuan, Rope("rope", 0)),
    "LTXVideoTransformer3DModel": Layout(_ltx, Rope("rope", 1), {"timestep": 1}),
    "FluxTransformer2DModel": Layout(
        _flux,
        None,
        {"img_ids": -2, "controlnet_block_samples": 1, "controlnet_single_block_samples": 1},
    ),
    "SD3Transformer2DModel": Layout(_sd3, None, {"block_controlnet_hidden_states": 1}),
    "QwenImageTransformer2DModel": Layout(
        _qwen_image, Rope("pos_embed", 0, tables=1), {"controlnet_block_samples": 1}
    ),
}
