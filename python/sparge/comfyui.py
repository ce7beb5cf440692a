"""ComfyUI: a node that makes a diffusion model's self-attention sparse.

With ``sparge`` installed in ComfyUI's Python, copy this file into ``ComfyUI/custom_nodes/`` as
``sparge_attention.py`` (any name but ``sparge.py``) and restart ComfyUI; the node is *Sparge Attention* under *model patches*. Or patch a model from code:

>>> from sparge.comfyui import patch
>>> model = patch(model, topk=0.5, dense_steps=2)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch

from sparge import Config, SpargeError, attention

Tensor = torch.Tensor

#: Sequences below it are left to ComfyUI's own attention.
MIN_TOKENS = 1024


class Override:
    """ComfyUI's ``optimized_attention_override``: called with its function and that one's arguments.

    Self-attention of at least ``MIN_TOKENS`` tokens without a mask becomes sparse; everything else
    (cross-attention, masks, short sequences, dense steps and layers, calls that ask for full
    precision) goes to ComfyUI's function unchanged. Where ComfyUI says which tokens of a joint sequence
    are the image's (``img_slice``: the single blocks of Flux and models like it), the others, text, attend
    everything and every query attends them. Elsewhere (double blocks) they compete with the image's, so
    leave room (a higher ``topk``) for them.

    ``dense_layers`` counts the double blocks, then the single ones, whose ``block_index`` begins anew.
    """

    def __init__(self, config: Config, dense_steps: int = 0, dense_layers: int = 0) -> None:
        self.config = config
        self.dense_steps = dense_steps
        self.dense_layers = dense_layers
        # Blocks of the first list, as ComfyUI said while they ran.
        self._doubles = 0

    def __call__(self, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        q, k, v, heads = args[:4] if len(args) >= 4 else _named(args, kwargs)
        options = kwargs.get("transformer_options") or {}
        layer = self._layer(options)
        mask = args[4] if len(args) > 4 else kwargs.get("mask")
        skip_reshape = kwargs.get("skip_reshape", False)
        tokens = 2 if skip_reshape else 1
        length = q.shape[tokens]
        is_ours = (
            mask is None
            # What this does not know of (a softcap, say) is for ComfyUI's function.
            and all(x is None or name in _KNOWN for name, x in kwargs.items())
            and length >= MIN_TOKENS
            and k.shape[tokens] == length
            and kwargs.get("low_precision_attention", True)
            and kwargs.get("attn_precision") != torch.float32
            and len(args) <= 5
            and not self._is_dense(options, layer)
        )
        if not is_ours:
            return func(*args, **kwargs)
        if not skip_reshape:
            q, k, v = (x.unflatten(-1, (-1, q.shape[-1] // heads)).transpose(1, 2) for x in (q, k, v))
        text = _text(options, length)
        out: Tensor = attention(
            q, k, v,
            scale=kwargs.get("scale"),
            enable_gqa=bool(kwargs.get("enable_gqa", False)) or k.shape[1] != q.shape[1],
            config=self.config,
            keep_keys=text,
            keep_queries=text,
            fallback="dense",
        )  # fmt: skip
        if kwargs.get("skip_output_reshape", False):
            return out
        return out.transpose(1, 2).flatten(2)

    def _layer(self, options: "dict[str, Any]") -> Optional[int]:
        """The block's place among all of the model's."""
        index = options.get("block_index")
        if index is None:
            return None
        if options.get("block_type") == "double":
            self._doubles = max(self._doubles, options.get("total_blocks") or index + 1)
        return int(index) + (self._doubles if options.get("block_type") == "single" else 0)

    def _is_dense(self, options: "dict[str, Any]", layer: Optional[int]) -> bool:
        if self.dense_layers:
            if layer is None:
                raise SpargeError(
                    "transformer_options has no block_index, so layers cannot be told apart; "
                    "set dense_layers to 0"
                )
            if layer < self.dense_layers:
                return True
        return bool(self.dense_steps) and _step(options) < self.dense_steps


_KNOWN = frozenset((
    "q", "k", "v", "heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape", "scale",
    "enable_gqa", "low_precision_attention", "transformer_options", "_inside_attn_wrapper",
))  # fmt: skip


def _named(args: "tuple[Any, ...]", kwargs: "dict[str, Any]") -> "tuple[Any, ...]":
    names = ("q", "k", "v", "heads")
    return tuple(args) + tuple(kwargs[name] for name in names[len(args) :])


def _text(options: "dict[str, Any]", length: int) -> "Optional[tuple[tuple[int, int], ...]]":
    """The ranges of tokens that are not the image's; None where ComfyUI does not say, or speaks of
    another sequence."""
    said = options.get("img_slice")
    if said is None or len(said) != 2 or not 0 <= said[0] < said[1] <= length:
        return None
    ranges = ((0, int(said[0])), (int(said[1]), length))
    return tuple((start, end) for start, end in ranges if start < end) or None


def _step(options: "dict[str, Any]") -> int:
    """The running step: where the present noise level stands in the schedule."""
    now, schedule = options.get("sigmas"), options.get("sample_sigmas")
    if now is None or schedule is None:
        raise SpargeError(
            "transformer_options has no sigmas and sample_sigmas, so steps cannot be counted; "
            "set dense_steps to 0"
        )
    return int((schedule[:-1] > now[0] + 1e-6).sum())


def patch(model: Any, dense_steps: int = 0, dense_layers: int = 0, **knobs: Any) -> Any:
    """A clone of a ComfyUI model whose self-attention is sparse; ``knobs`` as in ``sparge.Config``."""
    clone = model.clone()
    override = Override(Config(**knobs), dense_steps, dense_layers)
    options = clone.model_options.setdefault("transformer_options", {})
    if "optimized_attention_override" in options:
        raise SpargeError(
            "the model already has an attention override; remove the other patch first"
        )
    # The dictionary may be shared with the model that was cloned.
    clone.model_options["transformer_options"] = {
        **options,
        "optimized_attention_override": override,
    }
    return clone


class SpargeAttention:
    """The node."""

    CATEGORY = "model patches"
    FUNCTION = "apply"
    RETURN_TYPES = ("MODEL",)
    DESCRIPTION = "Sparse, quantised attention (SpargeAttn) for diffusion transformers."

    @classmethod
    def INPUT_TYPES(cls) -> "dict[str, Any]":
        share = {"default": 0.5, "min": 0.05, "max": 1.0, "step": 0.05}
        count = {"default": 0, "min": 0, "max": 100}
        return {
            "required": {
                "model": ("MODEL",),
                "topk": ("FLOAT", share),
                "dense_steps": ("INT", count),
                "dense_layers": ("INT", count),
            }
        }

    def apply(
        self, model: Any, topk: float, dense_steps: int = 0, dense_layers: int = 0
    ) -> "tuple[Any]":
        """Patches the model; a share of 1 leaves it as it is."""
        if topk >= 1.0:
            return (model,)
        return (patch(model, dense_steps, dense_layers, topk=topk),)


NODE_CLASS_MAPPINGS: "dict[str, Optional[type]]" = {"SpargeAttention": SpargeAttention}
NODE_DISPLAY_NAME_MAPPINGS = {"SpargeAttention": "Sparge Attention"}
