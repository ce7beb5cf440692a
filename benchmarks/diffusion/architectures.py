"""The full-size architectures with random weights, and the inputs of one step or prefill.

The configurations are the published ones (config.json of the named repositories, from memory: the
parameter counts that latency.py prints are the check). Resolutions are the pipelines' defaults.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

# Small stand-ins of each class for `--tiny`: every code path, no meaning.
TINY_TEXT = 32


@dataclass
class Architecture:
    """One row of the table.

    * ``kind``: the class, in diffusers or transformers; ``config`` its published configuration,
      ``tiny`` what ``--tiny`` changes in it.
    * ``inputs(batch, config, size, make)``: keyword arguments of forward.
    * ``size``, ``tiny_size``: latent frames, height, width, or the number of tokens.
    * ``batch``, ``about``: what runs, and how it differs from the pipeline's own call.
    * ``params``: the published number of parameters, in 10⁹.
    """

    kind: str
    source: str
    config: dict[str, Any]
    tiny: dict[str, Any]
    inputs: Callable[..., dict[str, Any]]
    size: tuple[int, ...]
    tiny_size: tuple[int, ...]
    about: str
    params: float
    batch: int = 1
    reps: int = 3
    paper: dict[str, Any] = field(default_factory=dict)


class Make:
    """Random inputs on the device, in the model's type."""

    def __init__(self, device: str, dtype: torch.dtype, text: int | None) -> None:
        self.device, self.dtype, self.text = device, dtype, text

    def noise(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def full(self, value: float, count: int) -> torch.Tensor:
        return torch.full((count,), value, device=self.device)

    def words(self, count: int) -> int:
        return self.text or count


def cogvideox(b: int, c: Any, size: tuple[int, ...], make: Make) -> dict[str, Any]:
    t, h, w = size
    return {
        "hidden_states": make.noise(b, t, c.in_channels, h, w),
        "encoder_hidden_states": make.noise(b, c.max_text_seq_length, c.text_embed_dim),
        "timestep": make.full(500, b).long(),
    }


def mochi(b: int, c: Any, size: tuple[int, ...], make: Make) -> dict[str, Any]:
    words = make.words(256)
    return {
        "hidden_states": make.noise(b, c.in_channels, *size),
        "encoder_hidden_states": make.noise(b, words, c.text_embed_dim),
        "timestep": make.full(500, b).long(),
        "encoder_attention_mask": torch.ones(b, words, dtype=torch.bool, device=make.device),
    }


def wan(b: int, c: Any, size: tuple[int, ...], make: Make) -> dict[str, Any]:
    return {
        "hidden_states": make.noise(b, c.in_channels, *size),
        "timestep": make.full(500, b).long(),
        "encoder_hidden_states": make.noise(b, make.words(512), c.text_dim),
    }


def hunyuan(b: int, c: Any, size: tuple[int, ...], make: Make) -> dict[str, Any]:
    words = make.words(256)
    return {
        "hidden_states": make.noise(b, c.in_channels, *size),
        "timestep": make.full(500, b).long(),
        "encoder_hidden_states": make.noise(b, words, c.text_embed_dim),
        "encoder_attention_mask": torch.ones(b, words, dtype=torch.bool, device=make.device),
        "pooled_projections": make.noise(b, c.pooled_projection_dim),
        "guidance": make.full(6000, b).to(make.dtype),
    }


def flux(b: int, c: Any, size: tuple[int, ...], make: Make) -> dict[str, Any]:
    h, w = size
    words = make.words(512)
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(h * w, 3)
    return {
        "hidden_states": make.noise(b, h * w, c.in_channels),
        "encoder_hidden_states": make.noise(b, words, c.joint_attention_dim),
        "pooled_projections": make.noise(b, c.pooled_projection_dim),
        "timestep": make.full(0.5, b).to(make.dtype),
        "img_ids": ids.to(make.device, make.dtype),
        "txt_ids": torch.zeros(words, 3, device=make.device, dtype=make.dtype),
        "guidance": make.full(3.5, b),
    }


def sd3(b: int, c: Any, size: tuple[int, ...], make: Make) -> dict[str, Any]:
    return {
        "hidden_states": make.noise(b, c.in_channels, *size),
        "encoder_hidden_states": make.noise(b, make.words(333), c.joint_attention_dim),
        "pooled_projections": make.noise(b, c.pooled_projection_dim),
        "timestep": make.full(500, b).long(),
    }


def llama(b: int, c: Any, size: tuple[int, ...], make: Make) -> dict[str, Any]:
    ids = torch.randint(c.vocab_size, (b, size[0]), device=make.device)
    return {"input_ids": ids, "use_cache": False, "logits_to_keep": 1}


LLAMA = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
LLAMA_TINY = {
    "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 64, "head_dim": 64,
}  # fmt: skip
WAN_TINY = {"num_attention_heads": 2, "ffn_dim": 64, "num_layers": 2, "text_dim": TINY_TEXT}
DUAL_TINY = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2}

#: In the order in which they run: what the paper has first.
ARCHITECTURES: dict[str, Architecture] = {
    "mochi": Architecture(
        "MochiTransformer3DModel", "genmo/mochi-1-preview",
        {
            "patch_size": 2, "num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 48,
            "pooled_projection_dim": 1536, "in_channels": 12, "qk_norm": "rms_norm",
            "text_embed_dim": 4096, "time_embed_dim": 256, "activation_fn": "swiglu",
            "max_sequence_length": 256,
        },
        {"num_layers": 2, "num_attention_heads": 2, "text_embed_dim": TINY_TEXT, "pooled_projection_dim": 32},
        mochi, (14, 60, 106), (2, 32, 32), "84 frames of 848x480; the pipeline runs a batch of 2 (guidance)",
        10.0, paper={"gpu": "L40", "original": 1897, "sage": 1544, "sparge": 1037},
    ),
    "cogvideox-2b": Architecture(
        "CogVideoXTransformer3DModel", "THUDM/CogVideoX-2b",
        {
            "num_attention_heads": 30, "attention_head_dim": 64, "in_channels": 16, "out_channels": 16,
            "time_embed_dim": 512, "text_embed_dim": 4096, "num_layers": 30, "sample_width": 90,
            "sample_height": 60, "sample_frames": 49, "patch_size": 2, "max_text_seq_length": 226,
            "spatial_interpolation_scale": 1.875, "use_rotary_positional_embeddings": False,
        },
        {
            "num_attention_heads": 2, "num_layers": 2, "text_embed_dim": TINY_TEXT, "sample_width": 32,
            "sample_height": 32, "sample_frames": 5, "time_embed_dim": 32, "max_text_seq_length": 16,
        },
        cogvideox, (13, 60, 90), (2, 32, 32), "49 frames of 720x480, batch 2 as in the pipeline (guidance)",
        1.69, batch=2, paper={"gpu": "L40", "original": 87, "sage": 68, "sparge": 53},
    ),
    "llama-24k": Architecture(
        "LlamaForCausalLM", "meta-llama/Llama-3.1-8B", LLAMA, LLAMA_TINY, llama, (24576,), (1024,),
        "prefill of 24,576 tokens, logits of the last one", 8.03,
        paper={"gpu": "RTX 4090", "original": 4.01, "sage": 3.53, "sparge": 2.6},
    ),
    "llama-128k": Architecture(
        "LlamaForCausalLM", "meta-llama/Llama-3.1-8B", LLAMA, LLAMA_TINY, llama, (131072,), (2048,),
        "prefill of 131,072 tokens, logits of the last one", 8.03, reps=1,
        paper={"gpu": "L40", "original": 52, "sage": 42, "sparge": 29.98},
    ),
    "flux-dev": Architecture(
        "FluxTransformer2DModel", "black-forest-labs/FLUX.1-dev",
        {
            "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38,
            "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096,
            "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": (16, 56, 56),
        },
        {**DUAL_TINY, "joint_attention_dim": TINY_TEXT, "pooled_projection_dim": 32},
        flux, (64, 64), (32, 32), "1024x1024, batch 1 as in the pipeline (guidance is distilled)",
        11.9, reps=7,
    ),
    "sd3.5-large": Architecture(
        "SD3Transformer2DModel", "stabilityai/stable-diffusion-3.5-large",
        {
            "sample_size": 128, "patch_size": 2, "in_channels": 16, "num_layers": 38,
            "attention_head_dim": 64, "num_attention_heads": 38, "joint_attention_dim": 4096,
            "caption_projection_dim": 2432, "pooled_projection_dim": 2048, "out_channels": 16,
            "pos_embed_max_size": 192, "qk_norm": "rms_norm",
        },
        {
            "num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 128,
            "joint_attention_dim": TINY_TEXT, "pooled_projection_dim": 32, "sample_size": 64,
            "pos_embed_max_size": 32,
        },
        sd3, (128, 128), (64, 64), "1024x1024, batch 2 as in the pipeline (guidance)", 8.06, batch=2, reps=7,
    ),
    "wan2.1-1.3b": Architecture(
        "WanTransformer3DModel", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30, "text_dim": 4096}, WAN_TINY,
        wan, (21, 60, 104), (2, 32, 32), "81 frames of 832x480; the pipeline runs it twice (guidance)", 1.42,
    ),
    "wan2.1-14b": Architecture(
        "WanTransformer3DModel", "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40, "text_dim": 4096}, WAN_TINY,
        wan, (21, 60, 104), (2, 32, 32), "81 frames of 832x480; the pipeline runs it twice (guidance)", 14.3,
        reps=1,
    ),
    "hunyuanvideo": Architecture(
        "HunyuanVideoTransformer3DModel", "hunyuanvideo-community/HunyuanVideo",
        {
            "in_channels": 16, "out_channels": 16, "num_attention_heads": 24, "attention_head_dim": 128,
            "num_layers": 20, "num_single_layers": 40, "num_refiner_layers": 2, "mlp_ratio": 4.0,
            "patch_size": 2, "patch_size_t": 1, "qk_norm": "rms_norm", "guidance_embeds": True,
            "text_embed_dim": 4096, "pooled_projection_dim": 768, "rope_theta": 256.0,
            "rope_axes_dim": (16, 56, 56),
        },
        {**DUAL_TINY, "text_embed_dim": TINY_TEXT, "pooled_projection_dim": 32, "num_refiner_layers": 1},
        hunyuan, (33, 90, 160), (2, 32, 32), "129 frames of 1280x720, batch 1 as in the pipeline "
        "(guidance is distilled)", 12.8, reps=1,
    ),
}  # fmt: skip


def build(arch: Architecture, device: str, is_tiny: bool) -> torch.nn.Module:
    """The model with its layers' own random initialisation, made on the device in bf16.

    Made in place rather than on the meta device: position tables are computed on the way.
    """
    config = {**arch.config, **(arch.tiny if is_tiny else {})}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            if arch.kind == "LlamaForCausalLM":
                import transformers

                model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
                model.set_attn_implementation("sdpa")
            else:
                import diffusers

                model = getattr(diffusers, arch.kind)(**config)
    finally:
        torch.set_default_dtype(before)
    # What from_pretrained leaves in float32: the time embedding and some norms of Wan.
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    for name, parameter in model.named_parameters():
        is_kept = any(part in kept for part in name.split("."))
        parameter.data = parameter.data.to(torch.float32 if is_kept else torch.bfloat16)
    model = model.eval().requires_grad_(False)
    return model


def inputs(arch: Architecture, model: torch.nn.Module, device: str, is_tiny: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    make = Make(device, torch.bfloat16, 16 if is_tiny else None)
    size = arch.tiny_size if is_tiny else arch.size
    return arch.inputs(arch.batch, model.config, size, make)
