"""Small random language models, and what is asked of them."""

from __future__ import annotations

from typing import Any

import torch
import transformers

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
}


def llama(**options: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **options)).eval()


def mistral(window: int) -> Any:
    config = transformers.MistralConfig(**SIZES, head_dim=16, sliding_window=window)
    return transformers.MistralForCausalLM(config).eval()


def tokens(batch: int, length: int, device: str = "cpu") -> torch.Tensor:
    return torch.randint(1, 100, (batch, length)).to(device)


def logits(model: Any, implementation: str, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    model.set_attn_implementation(implementation)
    return model(ids, **options).logits  # type: ignore[no-any-return]
