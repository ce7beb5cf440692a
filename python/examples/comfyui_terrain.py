"""What ComfyUI does with the node *Sparge Attention*, played on the CPU with a trained diffusion model.

    pip install "sparge[torch]" numpy
    python python/examples/comfyui_terrain.py --size 256 --topk 0.4

ComfyUI itself is not needed: of it there is here, as its `comfy/model_patcher.py` and
`comfy/ldm/modules/attention.py` have it, a model that is cloned with its options, and an attention
function that asks those for an override before it computes. The node, the override and the model are real
(the U-Net of `terrain_unet.py`, fetched once); in ComfyUI the same clone goes into a KSampler.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path
from typing import Any, Optional

import torch
import torch.nn.functional as F
from sparge.comfyui import SpargeAttention
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks/diffusion"))
from terrain_net import TerrainNet, fetch, sample  # noqa: E402


def attention_pytorch(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Optional[Tensor] = None,
    attn_precision: Any = None, skip_reshape: bool = False, skip_output_reshape: bool = False,
    **kwargs: Any,
) -> Tensor:  # fmt: skip
    """ComfyUI's own."""
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=kwargs.get("scale"))
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def optimized_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, **kwargs: Any) -> Tensor:
    """ComfyUI's `wrap_attn`: an override gets the function and everything that it was called with."""
    override = kwargs["transformer_options"].get("optimized_attention_override")
    if override is None:
        return attention_pytorch(q, k, v, heads, **kwargs)
    return override(attention_pytorch, q, k, v, heads, **kwargs)  # type: ignore[no-any-return]


class Model:
    """ComfyUI's ModelPatcher: the network is shared by clones, the options are their own."""

    def __init__(self, net: TerrainNet, options: "dict[str, Any]") -> None:
        self.net = net
        self.model_options = options

    def clone(self) -> "Model":
        return Model(self.net, copy.copy(self.model_options))

    def apply_model(self, noise: Tensor, difficulty: Tensor) -> Tensor:
        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            options = {**self.model_options.get("transformer_options", {}), "block_index": layer}
            heads = q.shape[1]
            # Tokens before heads, heads and their dimensions in one: how ComfyUI's layers call.
            q, k, v = (x.transpose(1, 2).flatten(2) for x in (q, k, v))
            out = optimized_attention(q, k, v, heads, transformer_options=options)
            return out.unflatten(2, (heads, -1)).transpose(1, 2)

        return self.net(noise, difficulty, attend)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=256, help="of the map, a multiple of 16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--topk", type=float, default=0.4, help="share of the blocks to keep")
    parser.add_argument("--dense-layers", type=int, default=2)
    parser.add_argument("--model", type=Path, help="the ONNX file; downloaded where not given")
    arguments = parser.parse_args()
    model = Model(TerrainNet(fetch(arguments.model)), {})
    (patched,) = SpargeAttention().apply(
        model, topk=arguments.topk, dense_layers=arguments.dense_layers
    )
    noise, difficulty = sample(arguments.seed, arguments.size)
    maps = {}
    for name, one in (("ComfyUI's", model), ("Sparge", patched)):
        begin = time.perf_counter()
        with torch.inference_mode():
            maps[name] = one.apply_model(noise, difficulty)
        print(f"{name:9} {time.perf_counter() - begin:.1f} s for {arguments.size}×{arguments.size}")
    dense, sparse = maps.values()
    error = (sparse - dense).square().mean()
    extent = dense.max() - dense.min()
    print(f"PSNR of sparse against dense: {10 * torch.log10(extent**2 / error):.1f} dB")


if __name__ == "__main__":
    main()
