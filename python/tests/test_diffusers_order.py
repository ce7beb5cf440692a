"""Tokens in order once per forward pass: dense output unchanged, sparse as if ordered in each call."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import sparge
import sparge.diffusers
import test_diffusers as models
import torch
from common import alike, bound, relative_l1
from sparge.diffusers import _attend, _grids
from test_diffusers import HEADS, Case, run

# Mochi's own rotary code opens a float32 autocast region, which torch warns about on the CPU.
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")

# What the inputs of `test_diffusers` are after patchifying, and where their text stands.
CASES: "list[tuple[Callable[[], Case], tuple[int, int, int], bool]]" = [
    (models.cogvideox, (3, 12, 16), True),
    (models.mochi, (3, 12, 16), False),
    (models.wan, (3, 12, 16), False),
    (models.hunyuan_video, (3, 12, 16), False),
    (models.ltx, (3, 14, 14), False),
    (models.flux, (1, 24, 24), True),
    (models.sd3, (1, 24, 24), False),
    (models.qwen_image, (1, 24, 24), True),
]


def made(case: Callable[[], Case], device: str = "cpu") -> Case:
    model, inputs = models.made(case, device)
    models._sharpen(model)
    if hasattr(model, "pos_frequencies"):  # Mochi learns them, from zero: no position has a meaning
        model.pos_frequencies.normal_()
    return model, inputs


def indices_of(order: str, *boxes: "tuple[int, int, int]") -> torch.Tensor:
    parts, start = [], 0
    for box in boxes:
        part = torch.tensor(sparge.token_order(order, box).tolist())
        parts.append(part + start)
        start += len(part)
    return torch.cat(parts)


def test_token_order() -> None:
    shape = (3, 5, 7)
    assert sparge.token_order("row", shape).tolist() == list(range(105))
    places = torch.cartesian_prod(*(torch.arange(n) for n in shape))
    for order, axis in (("column", 1), ("time", 0)):  # the axis that runs fastest
        steps = places[indices_of(order, shape)].diff(dim=0)
        assert (steps[0] == torch.eye(3, dtype=torch.int64)[axis]).all()
    hilbert = torch.frombuffer(sparge.token_order("hilbert", shape), dtype=torch.int64)
    assert (places[hilbert].diff(dim=0).abs().sum(1) == 1).all()
    assert sorted(hilbert.tolist()) == list(range(105))
    shuffles = [sparge.token_order(x, shape).tolist() for x in ("random:1", "random:2", "random:1")]
    assert shuffles[0] == shuffles[2] != shuffles[1] and sorted(shuffles[1]) == list(range(105))
    for order in ("snake", "hilbert:3", "random:", "random:-1", "row-major"):
        with pytest.raises(sparge.SpargeError, match="expected one of row, column, time, hilbert"):
            sparge.token_order(order, shape)
    for bad in ((0, 2, 2), (2, 2), (1, -1, 4)):
        with pytest.raises(sparge.SpargeError, match="integers of at least 1"):
            sparge.token_order("row", bad)  # type: ignore[arg-type]


def _variants() -> "list[Callable[[], Case]]":
    """Options whose per-token inputs, or slices by place, have to go along."""

    def wan_per_token() -> Case:
        model, inputs = models.wan()
        return model, {**inputs, "timestep": torch.randint(0, 900, (1, 3 * 12 * 16))}

    def ltx_per_token() -> Case:
        model, inputs = models.ltx()
        steps = torch.full((1, 3 * 14 * 14), 700)
        steps[:, : 14 * 14] = 0  # image to video: the first frame is clean
        return model, {**inputs, "timestep": steps}

    def hunyuan_first_frame() -> Case:
        model = diffusers.HunyuanVideoTransformer3DModel(
            **HEADS, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1,
            num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=8,
            rope_axes_dim=(8, 12, 12), image_condition_type="token_replace",
        )  # fmt: skip
        return model, models.hunyuan_video()[1]

    def cogvideox_pairs_of_frames() -> Case:
        model = diffusers.CogVideoXTransformer3DModel(
            **HEADS, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=16,
            num_layers=2, sample_width=32, sample_height=24, sample_frames=9,
            max_text_seq_length=20, patch_size_t=2, use_rotary_positional_embeddings=True,
        )  # fmt: skip
        inputs = {**models.cogvideox()[1], "hidden_states": torch.randn(2, 4, 4, 24, 32)}
        angles = torch.rand(2 * 12 * 16, 32)
        return model, {**inputs, "image_rotary_emb": (angles.cos(), angles.sin())}

    def cogvideox_sines() -> Case:
        model = diffusers.CogVideoXTransformer3DModel(
            **HEADS, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=16,
            num_layers=2, sample_width=32, sample_height=24, sample_frames=9, max_text_seq_length=20,
        )  # fmt: skip
        return model, {**models.cogvideox()[1], "image_rotary_emb": None}

    def flux_controlnet() -> Case:
        model, inputs = models.flux()
        samples = {
            f"controlnet_{name}_samples": [torch.randn(1, 576, 64)] * 2
            for name in ("block", "single_block")
        }
        return model, {**inputs, **samples}

    def flux_two_images() -> Case:
        model, inputs = models.flux()
        other = torch.cartesian_prod(torch.tensor([1]), torch.arange(12), torch.arange(16)).float()
        ids = torch.cat([inputs["img_ids"], other])
        return model, {**inputs, "hidden_states": torch.randn(1, len(ids), 8), "img_ids": ids}

    def sd3_controlnet() -> Case:
        model, inputs = models.sd3()
        return model, {**inputs, "block_controlnet_hidden_states": [torch.randn(2, 576, 64)]}

    return [
        wan_per_token, ltx_per_token, hunyuan_first_frame, cogvideox_pairs_of_frames,
        cogvideox_sines, flux_controlnet, flux_two_images, sd3_controlnet,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "case", [case for case, *_ in CASES] + _variants(), ids=lambda case: case.__name__
)
def test_dense_output_is_the_models_own(case: Callable[[], Case], device: str) -> None:
    model, inputs = made(case, device)
    near = bound(device, 2e-5, 1e-3)
    native = run(model, inputs)
    for order in ("hilbert", "random"):
        with sparge.diffusers.enable(model, policy="dense", order=order):
            assert relative_l1(run(model, inputs), native) < near
    with sparge.diffusers.enable(model, topk=0.4, order="hilbert", dense_steps=1):
        assert relative_l1(run(model, inputs), native) < near


@pytest.mark.parametrize("case, box, text_first", CASES, ids=lambda x: getattr(x, "__name__", ""))
def test_sparse_output_is_that_of_ordering_in_every_call(
    case: Callable[[], Case], box: "tuple[int, int, int]", text_first: bool, monkeypatch: Any
) -> None:
    model, inputs = made(case)
    indices = indices_of("hilbert", box)

    def ordered_here(q: Any, k: Any, v: Any, **options: Any) -> torch.Tensor:
        assert q.shape[2] == len(indices)
        text = torch.arange(k.shape[2] - len(indices))
        keys = [text, indices + len(text)] if text_first else [indices, text + len(indices)]
        k, v = (x.index_select(2, torch.cat(keys)) for x in (k, v))
        out = sparge.attention(q.index_select(2, indices), k, v, **options)
        return out.index_select(2, indices.argsort())  # type: ignore[no-any-return]

    knobs: dict[str, Any] = {"topk": 0.4, "keep_first": 0}
    with sparge.diffusers.enable(model, **knobs):
        in_rows = run(model, inputs)
        monkeypatch.setattr(_attend, "attention", ordered_here)
        want = run(model, inputs)
        monkeypatch.undo()
    with sparge.diffusers.enable(model, order="hilbert", **knobs):
        got = run(model, inputs)
    assert relative_l1(got, want) < 2e-5
    assert relative_l1(in_rows, want) > 1e-4  # the order does matter here


def _state(model: torch.nn.Module) -> "list[Any]":
    """All that `enable` may touch."""
    return [
        [
            {name: dict(x) for name, x in vars(module).items() if "hook" in name and x is not None},
            vars(module).keys(),
            getattr(module, "processor", None),
            dict(vars(getattr(module, "processor", None) or SimpleNamespace())),
        ]
        for module in model.modules()
    ]


@pytest.mark.parametrize("case", [case for case, *_ in CASES], ids=lambda case: case.__name__)
def test_disable_restores_everything(case: Callable[[], Case], device: str) -> None:
    model, inputs = made(case, device)
    pipe = SimpleNamespace(
        transformer=model, scheduler=diffusers.FlowMatchEulerDiscreteScheduler()
    )
    native, before = run(model, inputs), _state(model)
    scheduler = dict(vars(pipe.scheduler))
    handle = sparge.diffusers.enable(pipe, topk=0.4, order="hilbert", reuse_mask=2)
    assert _state(model) != before
    assert not torch.equal(run(model, inputs), native)
    handle.disable()
    assert _state(model) == before and vars(pipe.scheduler) == scheduler
    assert alike(run(model, inputs), native)


def test_a_pass_that_fails_leaves_nothing_behind() -> None:
    model, inputs = made(models.wan)
    native = run(model, inputs)
    with sparge.diffusers.enable(model, policy="dense", order="hilbert"):
        with pytest.raises(Exception):
            run(model, {**inputs, "encoder_hidden_states": torch.randn(1, 20, 3)})
        block: Any = model.blocks[0]
        hooks = list(block._forward_pre_hooks.values())
        assert all(hook(block, (torch.zeros(1, 4, 64),), {}) is None for hook in hooks)
        assert relative_l1(run(model, inputs), native) < 2e-5


def _refused(case: Callable[[], Case], match: str, **changed: Any) -> None:
    model, inputs = made(case)
    with sparge.diffusers.enable(model, topk=0.4, order="hilbert"):
        with pytest.raises(sparge.SpargeError, match=match):
            run(model, {**inputs, **changed})


def test_refused_inputs_by_name() -> None:
    _refused(models.ltx, "video_coords", video_coords=torch.zeros(1, 3, 588), num_frames=None)
    _refused(models.ltx, "num_frames, height and width are None, 14", num_frames=None)
    _refused(models.ltx, "rotary table has 392 tokens.*expected 392|input has 588 tokens", num_frames=2)
    _refused(models.sd3, "skip_layers", skip_layers=[0, 1])
    columns = torch.cartesian_prod(torch.arange(1), torch.arange(24), torch.arange(24))[:, [0, 2, 1]]
    _refused(models.flux, "img_ids are not .* row by row", img_ids=columns.float())
    _refused(models.flux, "img_ids are not .* row by row", img_ids=torch.rand(576, 3))
    _refused(models.flux, "attention_mask", joint_attention_kwargs={"attention_mask": None})
    controls = [torch.randn(1, 144, 64)]
    _refused(models.flux, "controlnet_block_samples has 144", controlnet_block_samples=controls)
    _refused(models.wan, "timestep has 9 tokens", timestep=torch.zeros(1, 9))
    shapes = [[(1, 24, 24)], [(1, 12, 48)]]
    _refused(models.qwen_image, "img_shapes differ", img_shapes=shapes)
    angles = torch.rand(576 + 20, 32)
    _refused(models.cogvideox, "image_rotary_emb has 596", image_rotary_emb=(angles, angles))


def test_refused_models_and_orders_by_name() -> None:
    class Other(diffusers.WanTransformer3DModel):  # type: ignore[misc]
        """Its forward pass may be anything."""

    other = Other(**{**models.wan()[0].config})
    with pytest.raises(sparge.SpargeError, match="order='hilbert' is not supported for Other"):
        sparge.diffusers.enable(other, topk=0.4, order="hilbert")
    model, inputs = made(models.flux)
    with pytest.raises(sparge.SpargeError, match="order is 'snake'"):
        sparge.diffusers.enable(model, topk=0.4, order="snake")
    with sparge.diffusers.enable(model, topk=0.4, order="hilbert"):
        projection = model.proj_out
        model.proj_out = torch.nn.Sequential(projection)  # as an adapter would
        with pytest.raises(sparge.SpargeError, match="proj_out of FluxTransformer2DModel was replaced"):
            run(model, inputs)
        model.proj_out = projection
        run(model, inputs)
    model._parallel_config = SimpleNamespace(context_parallel_config=object())
    for options in ({"order": "hilbert"}, {"reuse_mask": 2}):
        with sparge.diffusers.enable(model, topk=0.4, **options):
            with pytest.raises(sparge.SpargeError, match="context parallelism"):
                run(model, inputs)
    model._parallel_config = None


def test_positions_are_read_once_and_again_when_they_change() -> None:
    ids = torch.cartesian_prod(torch.arange(1), torch.arange(4), torch.arange(6))
    assert _grids._flux(None, {"img_ids": ids}) == ((1, 4, 6),)
    assert _grids._last[0] is not None and _grids._last[0]() is ids
    ids[12:, 0] = 1
    ids[12:, 1] -= 2
    assert _grids._flux(None, {"img_ids": ids[None]}) == ((1, 2, 6), (1, 2, 6))
    assert _grids._flux(None, {"img_ids": ids}) == ((1, 2, 6), (1, 2, 6))


def test_caches_keep_one_order() -> None:
    """What a cache carries over from a dense step is used in a sparse one."""
    outputs = {}
    for order in ("row", "hilbert"):
        model, inputs = made(models.wan)
        model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=100.0))
        knobs: Any = {"topk": 1.0, "pv_gap": math.inf, "order": order, "dense_steps": 1}
        with sparge.diffusers.enable(model, **knobs) as handle, model.cache_context("cond"):
            outputs[order] = []
            for handle.step in range(3):
                outputs[order].append(run(model, inputs))
        torch.manual_seed(0)
    for row, hilbert in zip(outputs["row"], outputs["hilbert"]):
        assert relative_l1(hilbert, row) < 2e-5


def test_threads_have_their_own_pass() -> None:
    model, inputs = made(models.wan)
    with sparge.diffusers.enable(model, policy="dense", order="hilbert"):
        want = run(model, inputs)
        wrong: list[int] = []

        def work() -> None:
            with torch.no_grad():
                for at in range(12):
                    if relative_l1(run(model, inputs), want) > 2e-5:
                        wrong.append(at)

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


def test_compiled_blocks_outlast_many_steps() -> None:
    model, inputs = made(models.wan)
    with sparge.diffusers.enable(model, topk=0.4, order="hilbert", dense_steps=2) as handle:
        want = []
        for handle.step in (0, 5):
            want.append(run(model, inputs))
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
        for handle.step in range(12):
            assert relative_l1(run(model, inputs), want[handle.step > 1]) < 2e-5
    torch._dynamo.reset()


def test_one_scheduler_of_two_handles_is_restored_in_any_order() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    before = dict(vars(scheduler))
    pipes = [
        SimpleNamespace(transformer=made(case)[0], scheduler=scheduler)
        for case in (models.wan, models.flux)
    ]
    first, second = (sparge.diffusers.enable(pipe, topk=0.4) for pipe in pipes)
    scheduler.set_timesteps(3)
    latent = torch.randn(1, 4)
    first.disable()
    scheduler.step(latent, scheduler.timesteps[0], latent)
    assert (first.step, second.step) == (0, 1)
    second.disable()
    assert set(vars(scheduler)) - set(before) <= {"num_inference_steps", "timesteps", "sigmas"}


def test_compiled_blocks_keep_the_order() -> None:
    model, inputs = made(models.wan)
    with sparge.diffusers.enable(model, topk=0.4, order="hilbert", reuse_mask=2) as handle:
        want = run(model, inputs)
        handle.step = 1
        again = run(model, inputs)
        handle.step = 0
        model.compile(backend="eager")
        assert relative_l1(run(model, inputs), want) < 2e-5
        handle.step = 1
        assert relative_l1(run(model, inputs), again) < 2e-5
    model._compiled_call_impl = None
    torch._dynamo.reset()
