"""Processors for the models whose stock ones call SDPA directly: CogVideoX, Mochi, SD3.

They read the attention module's own layers, so weights, norms and dtypes stay the model's.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Optional

import torch

from .._sparge import SpargeError
from ._attend import Text, dense, sparse
from ._models import Model

if TYPE_CHECKING:
    from ._handle import Layer

Tensor = torch.Tensor


def check(module: Any, model: Model) -> None:
    """Refuses modules whose processor is not the one that is replaced or dispatched."""
    processor = module.processor
    name = type(processor).__name__
    if model.processor is None:
        if not hasattr(processor, "_attention_backend"):
            raise SpargeError(
                f"the processor {name} does not use diffusers' attention dispatcher; "
                "restore the model's own processors first"
            )
    elif name != model.processor:
        raise SpargeError(
            f"the processor {name} cannot be replaced, expected {model.processor}; "
            "unfuse projections, unload adapters or restore the model's own processors first"
        )


def of(stock: str, layer: "Layer") -> Any:
    """Our processor for a stock one."""
    kinds = {
        "CogVideoXAttnProcessor2_0": CogVideoXProcessor,
        "MochiAttnProcessor2_0": MochiProcessor,
        "JointAttnProcessor2_0": SD3Processor,
    }
    return kinds[stock](layer)


class _Processor:
    def __init__(self, layer: "Layer") -> None:
        self.layer = layer

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, text_len: int, mask: Optional[Tensor] = None
    ) -> Tensor:
        """``[batch, heads, tokens, dim]`` in and out, text where the model has it."""
        config = self.layer.config()
        if config is None or mask is not None:
            return dense(query, key, value, mask, None)
        text = Text.at(self.layer.model.text, text_len, query.shape[2])
        return sparse(query, key, value, text, config, attend=self.layer.attend)


def _heads(x: Tensor, heads: int) -> Tensor:
    """``[batch, tokens, heads·dim]`` to ``[batch, heads, tokens, dim]``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _project(attn: Any, x: Tensor, names: str, norms: str) -> "list[Tensor]":
    """q, k, v of one stream, with heads apart; q and k normalised where the model does that."""
    projected = [_heads(getattr(attn, names.format(part))(x), attn.heads) for part in "qkv"]
    for at, part in enumerate("qk"):
        norm = getattr(attn, norms.format(part), None)
        if norm is not None:
            projected[at] = norm(projected[at])
    return projected


class CogVideoXProcessor(_Processor):
    """One joint sequence, text first; rotary embeddings on the video tokens."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Optional[Tensor] = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        from diffusers.models.embeddings import apply_rotary_emb

        text_len = encoder_hidden_states.shape[1]
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        batch, length, _ = joint.shape
        if attention_mask is not None:
            mask = attn.prepare_attention_mask(attention_mask, length, batch)
            attention_mask = mask.view(batch, attn.heads, -1, mask.shape[-1])
        query, key, value = _project(attn, joint, "to_{}", "norm_{}")
        if image_rotary_emb is not None:
            for x in (query, key):
                turned: Any = apply_rotary_emb(x[:, :, text_len:], image_rotary_emb)
                x[:, :, text_len:] = turned
        out = self.attend(query, key, value, text_len, attention_mask)
        out = out.transpose(1, 2).flatten(2)
        out = attn.to_out[1](attn.to_out[0](out))
        return out[:, text_len:], out[:, :text_len]


class SD3Processor(_Processor):
    """Image first, then text; without text (the second attention of SD3.5 medium) image alone."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Optional[Tensor] = None,
        attention_mask: Optional[Tensor] = None,
        **unknown: Any,
    ) -> Any:
        if attention_mask is not None or unknown:
            raise SpargeError(
                f"SD3 attention got {', '.join(unknown) or 'attention_mask'}, which its stock "
                "processor ignores; leave it out"
            )
        query, key, value = _project(attn, hidden_states, "to_{}", "norm_{}")
        text_len = 0
        if encoder_hidden_states is not None:
            text = _project(attn, encoder_hidden_states, "add_{}_proj", "norm_added_{}")
            text_len = encoder_hidden_states.shape[1]
            query, key, value = (
                torch.cat([x, t], dim=2) for x, t in zip((query, key, value), text)
            )
        out = self.attend(query, key, value, text_len)
        out = out.transpose(1, 2).flatten(2).to(query.dtype)
        if encoder_hidden_states is None:
            return attn.to_out[1](attn.to_out[0](out))
        image, words = out[:, : hidden_states.shape[1]], out[:, hidden_states.shape[1] :]
        if not attn.context_pre_only:
            words = attn.to_add_out(words)
        return attn.to_out[1](attn.to_out[0](image)), words


class MochiProcessor(_Processor):
    """Video first, then the valid text tokens of each batch entry."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        query, key, value = _project(attn, hidden_states, "to_{}", "norm_{}")
        text = _project(attn, encoder_hidden_states, "add_{}_proj", "norm_added_{}")
        if image_rotary_emb is not None:
            cos, sin = image_rotary_emb
            query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        image_len, text_len = hidden_states.shape[1], encoder_hidden_states.shape[1]
        # Tokens before heads in memory: what is projected is a view.
        out = query.new_zeros((query.shape[0], image_len + text_len, *query.shape[1::2]))
        for at, valid in enumerate(_valid_text(attention_mask)):
            one = slice(at, at + 1)
            q, k, v = (
                torch.cat([x[one], t[one].index_select(2, valid)], dim=2)
                for x, t in zip((query, key, value), text)
            )
            part = self.attend(q, k, v, len(valid)).transpose(1, 2)
            out[one, : part.shape[1]] = part
        out = out.flatten(2)
        image, words = out[:, :image_len], out[:, image_len:]
        image = attn.to_out[1](attn.to_out[0](image))
        if hasattr(attn, "to_add_out"):
            words = attn.to_add_out(words)
        return image, words


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Mochi's rotary embedding: pairs of neighbours, tables ``[tokens, heads, dim / 2]``."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    cos, sin = cos.transpose(0, 1), sin.transpose(0, 1)
    pairs = (even * cos - odd * sin, even * sin + odd * cos)
    return torch.stack(pairs, dim=-1).flatten(-2).to(x.dtype)


_last: "tuple[Optional[weakref.ref[Tensor]], int, list[Tensor]]" = (None, -1, [])


def _valid_text(mask: Tensor) -> "list[Tensor]":
    """Indices of the valid text tokens, looked up once per forward pass: it makes the host wait."""
    global _last
    version = -1 if mask.is_inference() else mask._version
    reference, seen, known = _last
    if version >= 0 and version == seen and reference is not None and reference() is mask:
        return known
    known = [row.nonzero().flatten() for row in mask]
    if version >= 0:
        _last = (weakref.ref(mask), version, known)
    return known
