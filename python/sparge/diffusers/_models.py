"""Where attention sits in each architecture, and where its text tokens are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Optional

import torch

from .._sparge import SpargeError


@dataclass(frozen=True)
class Model:
    """One architecture.

    * ``blocks``: the lists of blocks, in the order they run.
    * ``attention``: a block's self-attention modules.
    * ``text``: ``"first"``, ``"last"`` or None: where text stands in the joint sequence.
    * ``processor``: the stock processor that ours replaces; None: the dispatcher is used.
    """

    blocks: tuple[str, ...]
    attention: tuple[str, ...]
    text: Optional[str] = None
    processor: Optional[str] = None


#: By the class name of the transformer.
MODELS: "dict[str, Model]" = {
    "CogVideoXTransformer3DModel": Model(
        ("transformer_blocks",), ("attn1",), "first", "CogVideoXAttnProcessor2_0"
    ),
    "MochiTransformer3DModel": Model(
        ("transformer_blocks",), ("attn1",), "last", "MochiAttnProcessor2_0"
    ),
    "SD3Transformer2DModel": Model(
        ("transformer_blocks",), ("attn", "attn2"), "last", "JointAttnProcessor2_0"
    ),
    "FluxTransformer2DModel": Model(
        ("transformer_blocks", "single_transformer_blocks"), ("attn",), "first"
    ),
    "QwenImageTransformer2DModel": Model(("transformer_blocks",), ("attn",), "first"),
    "HunyuanVideoTransformer3DModel": Model(
        ("transformer_blocks", "single_transformer_blocks"), ("attn",), "last"
    ),
    "WanTransformer3DModel": Model(("blocks",), ("attn1",)),
    "LTXVideoTransformer3DModel": Model(("transformer_blocks",), ("attn1",)),
}


def model_of(transformer: torch.nn.Module) -> Model:
    """The architecture of a transformer."""
    for kind in type(transformer).__mro__:
        if kind.__name__ in MODELS:
            return MODELS[kind.__name__]
    raise SpargeError(
        f"{type(transformer).__name__} is not supported; supported are {', '.join(MODELS)}"
    )


def attention_modules(
    transformer: torch.nn.Module, model: Model
) -> Iterator[tuple[int, torch.nn.Module]]:
    """(layer, module) of every self-attention, layers counted over all lists of blocks."""
    layer = 0
    for name in model.blocks:
        for block in getattr(transformer, name, ()):
            for attribute in model.attention:
                module = getattr(block, attribute, None)
                if module is not None:
                    yield layer, module
            layer += 1
