"""The authors' names, ComfyUI's contract, and the doctor."""

from __future__ import annotations

import inspect
import json
import math
import subprocess
import sys
from typing import Any

import pytest
import sparge
import torch
import torch.nn.functional as F
from common import alike, bound, exact, inputs, qkv, relative_l1
from sparge import comfyui
from sparge.spas_sage_attn import (
    block_sparse_sage2_attn_cuda,
    spas_sage2_attn_meansim_cuda,
    spas_sage2_attn_meansim_topk_cuda,
    spas_sage_attn_meansim_cuda,
    spas_sage_attn_meansim_topk_cuda,
)


def test_authors_names_are_our_calls(device: str) -> None:
    q, k, v = inputs(device, heads=4, kv_heads=4, q_len=1300)
    got, sparsity = spas_sage2_attn_meansim_topk_cuda(
        q, k, v, is_causal=True, topk=0.4, return_sparsity=True
    )
    config = sparge.Config(
        topk=0.4, theta=0.0, pv_gap=50 * math.log(2), pooling="block", keep_local=0
    )
    want, stats = sparge.attention(q, k, v, is_causal=True, return_stats=True, config=config)
    assert alike(got, want) and sparsity == stats.qk_sparsity() > 0.3

    thresholds = torch.tensor([0.5, 0.9, 0.97, 0.3])
    got = spas_sage2_attn_meansim_cuda(q, k, v, simthreshd1=0.1, cdfthreshd=thresholds)
    config = sparge.Config(
        cdf=tuple(thresholds.tolist()), theta=0.1, pv_gap=50 * math.log(2), pooling="block"
    )
    assert alike(got, sparge.attention(q, k, v, config=config))

    mask = torch.rand(1, 4, 11, 21, device=device) < 0.5
    nhd = [x.transpose(1, 2) for x in (q, k, v)]
    got = block_sparse_sage2_attn_cuda(*nhd, mask.to(torch.int8), tensor_layout="NHD")
    assert relative_l1(got.transpose(1, 2), exact(q, k, v, blocks=mask)[0]) < bound(device, 1e-5)
    half = block_sparse_sage2_attn_cuda(q, k, v, output_dtype=torch.float16)
    assert half.dtype == torch.float16
    assert relative_l1(half, F.scaled_dot_product_attention(q, k, v)) < bound(device, 1e-3)


def test_authors_older_names_are_the_newer_functions() -> None:
    assert spas_sage_attn_meansim_cuda is spas_sage2_attn_meansim_cuda
    assert spas_sage_attn_meansim_topk_cuda is spas_sage2_attn_meansim_topk_cuda


def test_authors_silent_arguments_are_refused() -> None:
    q, k, v = qkv(2, 2, q_len=200)
    with pytest.raises(sparge.SpargeError, match="attn_mask"):
        spas_sage2_attn_meansim_topk_cuda(q, k, v, attn_mask=torch.ones(200, 200))
    with pytest.raises(sparge.SpargeError, match="dropout_p"):
        spas_sage2_attn_meansim_cuda(q, k, v, dropout_p=0.1)


class ComfyModel:
    """What the node sees of a ComfyUI ModelPatcher."""

    def __init__(self, options: "dict[str, Any] | None" = None) -> None:
        self.model_options: dict[str, Any] = {} if options is None else options

    def clone(self) -> "ComfyModel":
        return ComfyModel(dict(self.model_options))


def comfy_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask: Any = None,
    attn_precision: Any = None, skip_reshape: bool = False, skip_output_reshape: bool = False,
    **kwargs: Any,
) -> torch.Tensor:  # fmt: skip
    """ComfyUI's attention_pytorch, as its documented contract has it."""
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=kwargs.get("scale"))
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("skip_reshape", [False, True])
@pytest.mark.parametrize("skip_output_reshape", [False, True])
def test_comfyui_override(skip_reshape: bool, skip_output_reshape: bool, device: str) -> None:
    (model,) = comfyui.SpargeAttention().apply(ComfyModel(), topk=0.4, dense_steps=1, dense_layers=2)
    override = model.model_options["transformer_options"]["optimized_attention_override"]
    q, k, v = inputs(device, heads=4, kv_heads=4, q_len=1200, dim=32)
    want = sparge.attention(q, k, v, topk=0.4)
    if not skip_reshape:
        q, k, v = (x.transpose(1, 2).flatten(2) for x in (q, k, v))
    flags = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
    schedule = torch.tensor([14.0, 7.0, 2.0, 0.0], device=device)
    options = {
        "block_index": 5, "sigmas": torch.tensor([7.0], device=device), "sample_sigmas": schedule,
    }  # fmt: skip
    got = override(comfy_attention, q, k, v, 4, transformer_options=options, **flags)
    assert alike(got, want if skip_output_reshape else want.transpose(1, 2).flatten(2))
    dense = comfy_attention(q, k, v, 4, **flags)
    for change in (
        {"transformer_options": {**options, "block_index": 1}},
        {"transformer_options": {**options, "sigmas": schedule[:1]}},
        {"transformer_options": options, "low_precision_attention": False},
        {"transformer_options": options, "mask": torch.ones(1200, 1200, dtype=torch.bool, device=device)},
    ):
        got = override(comfy_attention, q, k, v, 4, **flags, **change)
        assert relative_l1(got, dense) < bound(device, 1e-6, 1e-3)
    with pytest.raises(sparge.SpargeError, match="sigmas"):
        override(comfy_attention, q, k, v, 4, transformer_options={"block_index": 5}, **flags)


def test_comfyui_leaves_cross_attention_and_the_original_alone() -> None:
    original = ComfyModel({"transformer_options": {"other": 1}})
    patched = comfyui.patch(original, topk=0.4)
    assert "optimized_attention_override" not in original.model_options["transformer_options"]
    override = patched.model_options["transformer_options"]["optimized_attention_override"]
    q, _, _ = qkv(4, 4, q_len=1200, dim=32)
    _, k, v = qkv(4, 4, q_len=77, dim=32)
    got = override(comfy_attention, q, k, v, 4, skip_reshape=True)
    assert torch.equal(got, comfy_attention(q, k, v, 4, skip_reshape=True))
    with pytest.raises(sparge.SpargeError, match="already has"):
        comfyui.patch(patched, topk=0.4)
    assert set(comfyui.NODE_CLASS_MAPPINGS) == set(comfyui.NODE_DISPLAY_NAME_MAPPINGS)
    assert comfyui.SpargeAttention.INPUT_TYPES()["required"]["model"] == ("MODEL",)


def test_doctor_runs_and_says_ok() -> None:
    command = [sys.executable, "-m", "sparge.doctor", "--json"]
    said = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert said["sparge"]["version"] == sparge.__version__
    assert all(check["ok"] for check in said["checks"].values()) and "torch on the CPU" in said["checks"]


def test_authors_lists_and_smoothing() -> None:
    q, k, v = qkv(2, 2, q_len=600)
    want = spas_sage2_attn_meansim_cuda(q, k, v, cdfthreshd=torch.tensor([0.5, 0.9]),
                                        pvthreshd=torch.tensor([20.0, 30.0]))  # fmt: skip
    got = spas_sage2_attn_meansim_cuda(q, k, v, cdfthreshd=[0.5, 0.9], pvthreshd=[20, 30])
    assert relative_l1(got, want) < 1e-3
    for call in (spas_sage2_attn_meansim_topk_cuda, spas_sage2_attn_meansim_cuda,
                 block_sparse_sage2_attn_cuda):  # fmt: skip
        with pytest.raises(sparge.SpargeError, match="smooth_k"):
            call(q, k, v, smooth_k=False)


def test_comfyui_needs_to_know_layers_and_keeps_full_precision() -> None:
    q, k, v = qkv(4, 4, q_len=1200, dim=32)
    layered = comfyui.Override(sparge.Config(topk=0.4), dense_layers=2)
    with pytest.raises(sparge.SpargeError, match="block_index"):
        layered(comfy_attention, q, k, v, 4, skip_reshape=True)
    override = comfyui.Override(sparge.Config(topk=0.4))
    options = {"skip_reshape": True, "attn_precision": torch.float32}
    got = override(comfy_attention, q, k, v, 4, **options)
    assert torch.equal(got, comfy_attention(q, k, v, 4, **options))


def test_authors_positional_calls_mean_the_same() -> None:
    q, k, v = qkv(2, 2, q_len=600)
    common = ("q", "k", "v", "attn_mask", "dropout_p", "is_causal", "scale", "smooth_k", "simthreshd1")
    last = ("pvthreshd", "attention_sink", "tensor_layout", "output_dtype", "return_sparsity", "return_lse")
    for call, places in (
        (spas_sage2_attn_meansim_topk_cuda, (*common, "cdfthreshd", "topk", *last)),
        (spas_sage2_attn_meansim_cuda, (*common, "cdfthreshd", *last)),
        (block_sparse_sage2_attn_cuda,
         ("q", "k", "v", "mask_id", "dropout_p", "scale", "smooth_k", *last)),
    ):  # fmt: skip
        assert tuple(inspect.signature(call).parameters) == places
    want, lse = spas_sage2_attn_meansim_topk_cuda(q, k, v, is_causal=True, topk=0.4, pvthreshd=20,
                                                  return_lse=True)  # fmt: skip
    got = spas_sage2_attn_meansim_topk_cuda(q, k, v, None, 0.0, True, None, True, -0.1, None, 0.4, 20)
    assert torch.equal(got, want) and lse.shape == (1, 2, 600)
    with pytest.raises(sparge.SpargeError, match="cdfthreshd"):
        spas_sage2_attn_meansim_topk_cuda(q, k, v, None, 0.0, True, None, True, -0.1, 0.9)


def test_authors_log_sum_exp(device: str) -> None:
    q, k, v = inputs(device, heads=2, kv_heads=2, q_len=600)
    nhd = [x.transpose(1, 2) for x in (q, k, v)]
    out, lse = block_sparse_sage2_attn_cuda(*nhd, tensor_layout="NHD", output_dtype=torch.float16,
                                            return_lse=True)  # fmt: skip
    assert out.dtype == torch.float16 and lse.dtype == torch.float32
    assert (lse - exact(q, k, v)[1]).abs().max() < bound(device, 1e-4, 0.15)
    _, sparsity = block_sparse_sage2_attn_cuda(q, k, v, return_sparsity=True, return_lse=True)
    assert sparsity == 0.0


def test_comfyui_keeps_the_text_that_it_is_told_of(device: str) -> None:
    q, k, v = inputs(device, heads=4, kv_heads=4, q_len=1200, dim=32)
    override = comfyui.Override(sparge.Config(topk=0.3))
    flags = {"skip_reshape": True, "skip_output_reshape": True}
    plain = sparge.attention(q, k, v, topk=0.3)
    for img_slice, text in (
        ([200, 1200], ((0, 200),)), ([0, 1000], ((1000, 1200),)), ([0, 1200], None),
        ([200, 1300], None), (None, None),
    ):  # fmt: skip
        options = {"block_type": "single", "block_index": 0, "img_slice": img_slice}
        got = override(comfy_attention, q, k, v, 4, transformer_options=options, **flags)
        want = sparge.attention(q, k, v, topk=0.3, keep_keys=text, keep_queries=text)
        assert alike(got, want) and torch.equal(got, plain) == (text is None)


def test_comfyui_counts_blocks_across_both_lists() -> None:
    q, k, v = qkv(4, 4, q_len=1200, dim=32)
    flags = {"skip_reshape": True, "skip_output_reshape": True}
    dense, sparse = comfy_attention(q, k, v, 4, **flags), sparge.attention(q, k, v, topk=0.3)

    def is_dense(override: comfyui.Override, kind: str, index: int, total: int) -> bool:
        options = {"block_type": kind, "block_index": index, "total_blocks": total}
        got = override(comfy_attention, q, k, v, 4, transformer_options=options, **flags)
        assert torch.equal(got, dense) or torch.equal(got, sparse)
        return torch.equal(got, dense)

    override = comfyui.Override(sparge.Config(topk=0.3), dense_layers=4)
    blocks = [("double", i, 3) for i in range(3)] + [("single", i, 6) for i in range(6)]
    for _ in range(2):  # steps
        assert [is_dense(override, *block) for block in blocks] == [True] * 4 + [False] * 5
    # A model with one list alone.
    override = comfyui.Override(sparge.Config(topk=0.3), dense_layers=2)
    assert [is_dense(override, "single", i, 6) for i in range(3)] == [True, True, False]
