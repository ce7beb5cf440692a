"""Small random diffusion transformers of each class: keep-all equals native, sparse runs, undone."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, Callable

import diffusers
import pytest
import sparge
import sparge.diffusers
import torch
from common import HALF, alike, bound, exact, inputs, qkv, relative_l1
from diffusers.models import attention_dispatch as dispatch
from sparge.diffusers import _backend, _processors
from sparge.diffusers._attend import Text, sparse

HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 32}
Case = tuple[torch.nn.Module, dict[str, Any]]


def _rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def cogvideox() -> Case:
    model = diffusers.CogVideoXTransformer3DModel(
        **HEADS, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=16, num_layers=2,
        sample_width=32, sample_height=24, sample_frames=9, max_text_seq_length=20,
        use_rotary_positional_embeddings=True,
    )  # fmt: skip
    tokens = 3 * 12 * 16
    angles = torch.rand(tokens, 32)
    return model, {
        "hidden_states": _rand(2, 3, 4, 24, 32),
        "encoder_hidden_states": _rand(2, 20, 16),
        "timestep": torch.tensor([5, 5]),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def mochi() -> Case:
    model = diffusers.MochiTransformer3DModel(
        **HEADS, num_layers=2, pooled_projection_dim=16, in_channels=4, text_embed_dim=16,
        time_embed_dim=8, max_sequence_length=24,
    )  # fmt: skip
    mask = torch.ones(2, 24, dtype=torch.bool)
    mask[0, 10:] = False
    mask[1, 3:7] = False
    return model, {
        "hidden_states": _rand(2, 4, 3, 24, 32),
        "encoder_hidden_states": _rand(2, 24, 16),
        "timestep": torch.tensor([5, 5]),
        "encoder_attention_mask": mask,
    }


def sd3() -> Case:
    model = diffusers.SD3Transformer2DModel(
        sample_size=64, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=32,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=64,
        pooled_projection_dim=16, out_channels=4, pos_embed_max_size=32,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    return model, {
        "hidden_states": _rand(2, 4, 48, 48),
        "encoder_hidden_states": _rand(2, 30, 16),
        "pooled_projections": _rand(2, 16),
        "timestep": torch.tensor([5, 5]),
    }


def flux() -> Case:
    model = diffusers.FluxTransformer2DModel(
        **HEADS, in_channels=8, num_layers=2, num_single_layers=2, joint_attention_dim=16,
        pooled_projection_dim=16, axes_dims_rope=(4, 12, 16),
    )  # fmt: skip
    places = torch.stack(torch.meshgrid(*[torch.arange(n) for n in (1, 24, 24)], indexing="ij"), -1)
    return model, {
        "hidden_states": _rand(1, 576, 8),
        "encoder_hidden_states": _rand(1, 30, 16),
        "pooled_projections": _rand(1, 16),
        "timestep": torch.tensor([0.5]),
        "img_ids": places.reshape(-1, 3).float(),
        "txt_ids": torch.zeros(30, 3),
    }


def wan() -> Case:
    model = diffusers.WanTransformer3DModel(
        **HEADS, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=64, num_layers=2,
        rope_max_seq_len=32,
    )  # fmt: skip
    return model, {
        "hidden_states": _rand(1, 4, 3, 24, 32),
        "timestep": torch.tensor([5]),
        "encoder_hidden_states": _rand(1, 20, 16),
    }


def hunyuan_video() -> Case:
    model = diffusers.HunyuanVideoTransformer3DModel(
        **HEADS, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=8,
        rope_axes_dim=(8, 12, 12),
    )  # fmt: skip
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, 7:] = 0
    return model, {
        "hidden_states": _rand(2, 4, 3, 24, 32),
        "timestep": torch.tensor([5, 5]),
        "encoder_hidden_states": _rand(2, 20, 16),
        "encoder_attention_mask": mask,
        "pooled_projections": _rand(2, 8),
        "guidance": torch.tensor([6.0, 6.0]),
    }


def ltx() -> Case:
    model = diffusers.LTXVideoTransformer3DModel(
        **HEADS, in_channels=4, out_channels=4, cross_attention_dim=64, num_layers=2,
        caption_channels=16,
    )  # fmt: skip
    return model, {
        "hidden_states": _rand(1, 3 * 14 * 14, 4),
        "encoder_hidden_states": _rand(1, 20, 16),
        "timestep": torch.tensor([5]),
        "encoder_attention_mask": torch.ones(1, 20),
        "num_frames": 3,
        "height": 14,
        "width": 14,
    }


def qwen_image() -> Case:
    model = diffusers.QwenImageTransformer2DModel(
        **HEADS, patch_size=2, in_channels=8, out_channels=2, num_layers=2, joint_attention_dim=16,
        axes_dims_rope=(4, 12, 16),
    )  # fmt: skip
    mask = torch.ones(1, 20, dtype=torch.bool)
    mask[0, 12:] = False  # padding between text and image
    return model, {
        "hidden_states": _rand(1, 576, 8),
        "encoder_hidden_states": _rand(1, 20, 16),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 24, 24)]],
    }


CASES: list[Callable[[], Case]] = [
    cogvideox, mochi, sd3, flux, wan, hunyuan_video, ltx, qwen_image,
]  # fmt: skip


def made(case: Callable[[], Case], device: str) -> Case:
    """The model and its inputs there."""

    def there(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return x.to(device)
        return type(x)(there(y) for y in x) if isinstance(x, (tuple, list)) else x

    model, given = case()
    return model.eval().to(device), {name: there(x) for name, x in given.items()}


def run(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    torch.manual_seed(1)
    return model(**inputs, return_dict=False)[0]  # type: ignore[no-any-return]


def _sharpen(model: torch.nn.Module) -> None:
    """Random weights attend almost evenly: larger projections give the masks work to do."""
    for name, weight in model.named_parameters():
        if any(part in name for part in (".to_q.", ".to_k.", "norm_q", "norm_k")):
            weight.mul_(3)


# Mochi's own rotary code opens a float32 autocast region, which torch warns about on the CPU.
@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize("case", CASES)
def test_keep_all_is_native_and_sparse_is_near(case: Callable[[], Case], device: str) -> None:
    model, inputs = made(case, device)
    _sharpen(model)
    native = run(model, inputs)
    before = [type(m.processor) for m in model.modules() if hasattr(m, "processor")]
    with sparge.diffusers.enable(model, topk=1.0, pv_gap=math.inf):
        assert relative_l1(run(model, inputs), native) < bound(device, 2e-5)
    with sparge.diffusers.enable(model, topk=0.4, keep_first=0):
        sparse = run(model, inputs)
    assert 1e-5 < relative_l1(sparse, native) < 0.5  # it skipped, and it is still the same model
    with sparge.diffusers.enable(model, topk=0.4, dense_layers=10):
        assert alike(run(model, inputs), native)
    with sparge.diffusers.enable(model, topk=0.4, dense_steps=2) as handle:
        assert alike(run(model, inputs), native)
        handle.step = 2
        assert relative_l1(run(model, inputs), native) > 1e-5
    assert alike(run(model, inputs), native)
    assert before == [type(m.processor) for m in model.modules() if hasattr(m, "processor")]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for module in model.modules():
        backend = getattr(getattr(module, "processor", None), "_attention_backend", None)
        assert backend != _backend.NAME


def test_text_queries_are_exact_and_text_keys_attended() -> None:
    q, k, v = qkv(4, 4, q_len=1000)
    config = sparge.Config(topk=0.2, keep_first=0, pv_gap=math.inf)
    for place in ("first", "last"):
        text = Text.at(place, 90, 1000)
        assert text is not None
        got = sparse(q, k, v, text, config)
        rows = slice(text.start, text.end)
        assert relative_l1(got[:, :, rows], exact(q[:, :, rows], k, v)[0]) < 1e-5
        image = slice(90, None) if place == "first" else slice(0, 910)
        blocks = sparge.predict(q[:, :, image], k, config=config).tensor.clone()
        blocks[..., text.start // 64 : -(-text.end // 64)] = True
        want, _ = exact(q[:, :, image], k, v, blocks=blocks)
        assert relative_l1(got[:, :, image], want) < 1e-5


def test_key_masks_leave_keys_out(device: str) -> None:
    q, k, v = inputs(device, heads=2, kv_heads=2, q_len=700, batch=2)
    mask = torch.ones(2, 1, 1, 700, dtype=torch.bool, device=device)
    mask[0, ..., 650:] = False  # a run: sliced
    mask[1, ..., 10:40] = False  # a hole: gathered
    config = sparge.Config(topk=1.0, pv_gap=math.inf)
    got = sparse(q, k, v, Text(0, 60), config, None, mask)
    assert relative_l1(got, exact(q, k, v, mask=mask)[0]) < bound(device, 1e-5)
    with pytest.raises(sparge.SpargeError, match="without any key"):
        sparse(q, k, v, None, config, None, torch.zeros_like(mask))


def test_ring_shards_merge_by_their_log_sum_exp(device: str) -> None:
    """What ring context parallelism does with the backend's second result."""
    q, k, v = (x.transpose(1, 2) for x in inputs(device, heads=4, kv_heads=4, q_len=600))
    parts = [
        _backend._ring_step(None, q, k[:, shard], v[:, shard], return_lse=True)
        for shard in (slice(0, 350), slice(350, 600))
    ]
    (out, lse), (other, other_lse) = parts
    assert lse.shape == (1, 600, 4)
    share = torch.sigmoid(other_lse - lse)[..., None]
    merged = out - share * (out - other)
    want, _ = exact(*(x.transpose(1, 2) for x in (q, k, v)))
    assert relative_l1(merged.transpose(1, 2), want) < bound(device, 1e-4, HALF)


def test_a_mask_under_ring_parallelism_is_refused() -> None:
    q, k, v = (x.transpose(1, 2) for x in qkv(4, 4, q_len=300))
    parallel = SimpleNamespace(context_parallel_config=SimpleNamespace(ring_degree=2))
    mask = torch.ones(1, 300, dtype=torch.bool)
    with pytest.raises(sparge.SpargeError, match="ring"):
        _backend._ring_step(None, q, k, v, mask, return_lse=True, _parallel_config=parallel)


def test_the_dispatcher_knows_the_backend(device: str) -> None:
    q, k, v = (x.transpose(1, 2) for x in inputs(device, heads=2, kv_heads=2, q_len=1100))
    assert "sparge" in {name.value for name in dispatch.AttentionBackendName}
    with dispatch.attention_backend("sparge"):
        got = dispatch.dispatch_attention_fn(q, k, v)
    assert alike(got, sparge.attention(q, k, v, layout="NHD"), HALF)
    got, lse = dispatch.dispatch_attention_fn(
        q, k, v, backend=_backend.NAME, attention_kwargs={"return_lse": True}
    )
    assert lse.shape == (1, 1100, 2)
    with pytest.raises(sparge.SpargeError, match="dropout"):
        dispatch.dispatch_attention_fn(q, k, v, dropout_p=0.1, backend=_backend.NAME)


def test_a_pipeline_counts_steps(device: str) -> None:
    model, inputs = made(flux, device)

    class Pipeline:
        transformer = model
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()

    pipe = Pipeline()
    with sparge.diffusers.enable(pipe, topk=0.3, dense_steps=1) as handle:
        pipe.scheduler.set_timesteps(3)
        native = run(model, inputs)
        pipe.scheduler.step(_rand(1, 4), pipe.scheduler.timesteps[0], _rand(1, 4))
        assert handle.step == 1 and not torch.equal(run(model, inputs), native)
        pipe.scheduler.set_timesteps(3)
        assert handle.step == 0 and alike(run(model, inputs), native)
    assert "step" not in vars(pipe.scheduler)


def test_refusals_by_name() -> None:
    with pytest.raises(sparge.SpargeError, match="UNet2DModel is not supported"):
        sparge.diffusers.enable(
            diffusers.UNet2DModel(sample_size=8, block_out_channels=(32,), layers_per_block=1,
                                  down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
        )  # fmt: skip
    with pytest.raises(sparge.SpargeError, match="no transformer"):
        sparge.diffusers.enable(object())
    model, _ = cogvideox()
    model.fuse_qkv_projections()
    with pytest.raises(sparge.SpargeError, match="FusedCogVideoX"):
        sparge.diffusers.enable(model, topk=0.5)
    with pytest.raises(sparge.SpargeError, match="magic"):
        sparge.diffusers.enable(model, policy="magic")


def test_enabling_twice_is_refused_and_undone_once() -> None:
    for case in (flux, sd3):
        model, inputs = case()
        model.eval()
        native = run(model, inputs)
        handle = sparge.diffusers.enable(model, topk=0.4)
        with pytest.raises(sparge.SpargeError, match="enabled already"):
            sparge.diffusers.enable(model, topk=0.5)
        assert not torch.equal(run(model, inputs), native)  # the first one is still there
        handle.disable()
        assert torch.equal(run(model, inputs), native)
        with sparge.diffusers.enable(model, topk=0.4):
            pass


def test_disable_undoes_what_it_can() -> None:
    model, inputs = flux()
    model.eval()
    native = run(model, inputs)
    handle = sparge.diffusers.enable(model, topk=0.4)

    def fail() -> None:
        raise RuntimeError("a part that cannot be restored")

    handle._undo.append(fail)
    with pytest.raises(RuntimeError, match="cannot be restored"):
        handle.disable()
    assert torch.equal(run(model, inputs), native)


def test_a_new_scheduler_counts_too() -> None:
    model, inputs = flux()
    model.eval()

    class Pipeline:
        transformer = model

    pipe: Any = Pipeline()
    old = pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with sparge.diffusers.enable(pipe, topk=0.3, dense_steps=1) as handle:
        new = pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        new.set_timesteps(3)
        run(model, inputs)
        new.step(_rand(1, 4), new.timesteps[0], _rand(1, 4))
        assert handle.step == 1
        assert "step" not in vars(old)
    assert "step" not in vars(new) and "set_timesteps" not in vars(new)


def test_key_masks_that_change(device: str) -> None:
    q, k, v = inputs(device, heads=2, kv_heads=2, q_len=200, batch=2)
    config = sparge.Config(topk=1.0, pv_gap=math.inf)
    mask = torch.ones(1, 1, 1, 200, dtype=torch.bool, device=device)
    for batch in (1, 2):  # one mask for batches of other sizes
        got = sparse(q[:batch], k[:batch], v[:batch], None, config, None, mask)
        assert relative_l1(got, exact(q[:batch], k[:batch], v[:batch])[0]) < bound(device, 1e-5)
    mask[..., 120:] = False
    got = sparse(q, k, v, None, config, None, mask)
    assert relative_l1(got, exact(q, k, v, mask=mask)[0]) < bound(device, 1e-5)
    text = torch.ones(1, 6, dtype=torch.bool, device=device)
    assert len(_processors._valid_text(text)[0]) == 6
    text[0, 4:] = False
    assert len(_processors._valid_text(text)[0]) == 4


def test_ulysses_alone_is_an_ordinary_call(device: str) -> None:
    q, k, v = (x.transpose(1, 2) for x in inputs(device, heads=2, kv_heads=2, q_len=1100))
    parallel = SimpleNamespace(context_parallel_config=SimpleNamespace(ring_degree=1))
    model = SimpleNamespace(text="first")
    config = sparge.Config(topk=0.3, keep_first=0)
    _backend.enter(SimpleNamespace(model=model, config=lambda: config, text_len=lambda: 90, attend=None))
    try:
        got = _backend._ring_step(None, q, k, v, _parallel_config=parallel)
    finally:
        _backend.leave()
    want = sparse(*(x.transpose(1, 2) for x in (q, k, v)), Text(0, 90), config)
    assert alike(got.transpose(1, 2), want)
