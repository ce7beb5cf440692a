"""`sparge.attention` on torch tensors: SDPA at keep-all, float64 everywhere else."""

from __future__ import annotations

import math
import warnings
from typing import Any, Optional

import pytest
import sparge
import torch
import torch.nn.functional as F
from common import HALF, alike, bound, exact, inputs, qkv, relative_l1
from sparge import _torch

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "q_len", "kv_len", "dim"),
    [
        (1, 1, 1, 1, 64),
        (2, 2, 1, 333, 64),
        (4, 2, 130, 130, 64),
        (3, 1, 257, 65, 128),
        (4, 4, 65, 257, 80),
        (6, 2, 300, 1100, 32),
    ],
)
@pytest.mark.parametrize("masking", ["none", "causal", "bool", "bias", "row", "broadcast"])
def test_keep_all_is_sdpa(
    dtype: torch.dtype, heads: int, kv_heads: int, q_len: int, kv_len: int, dim: int, masking: str,
    device: str,
) -> None:  # fmt: skip
    q, k, v = qkv(heads, kv_heads, q_len, kv_len, dim, batch=2, dtype=dtype, device=device)
    options: dict[str, Any] = {"is_causal": masking == "causal", "enable_gqa": True}
    if masking == "bool":
        options["attn_mask"] = torch.rand(2, heads, q_len, kv_len, device=device) < 0.7
        options["attn_mask"][..., 0] = True
    elif masking == "row":
        options["attn_mask"] = torch.rand(2, 1, 1, kv_len, device=device) < 0.7
        options["attn_mask"][..., 0] = True
    elif masking == "bias":
        options["attn_mask"] = torch.randn(1, heads, q_len, kv_len, dtype=dtype, device=device)
    elif masking == "broadcast":
        options["attn_mask"] = torch.randn(q_len, 1, dtype=dtype, device=device)
    whole = dict(options)
    if masking == "broadcast":  # one column is more than SDPA can take on a GPU
        whole["attn_mask"] = options["attn_mask"].expand(q_len, kv_len).contiguous()
    want = F.scaled_dot_product_attention(q, k, v, **whole)
    got = sparge.attention(q, k, v, **options, policy="dense")
    assert got.dtype == dtype and got.shape == want.shape
    assert relative_l1(got, want) < TOLERANCE[dtype]
    assert relative_l1(sparge.attention(q, k, v, **options, topk=1.0), want) < bound(device, 0.01)
    if device == "cuda":
        half = sparge.Config(topk=1.0, qk="half", pv_gap=math.inf)
        assert relative_l1(sparge.attention(q, k, v, **options, config=half), want) < HALF


@pytest.mark.parametrize("length", [64, 200, 300, 1000])
@pytest.mark.parametrize("causal", [False, True])
def test_the_default_is_exact_below_the_crossover(length: int, causal: bool, device: str) -> None:
    q, k, v = inputs(device, q_len=length)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    got = sparge.attention(q, k, v, is_causal=causal, enable_gqa=True)
    assert relative_l1(got, want) < 1e-5


@pytest.mark.parametrize("causal", [None, "top_left", "bottom_right"])
@pytest.mark.parametrize("lengths", [(1300, 1300), (700, 1500), (1500, 700)])
def test_sparse_is_float64_over_the_predicted_blocks(
    causal: Optional[str], lengths: tuple[int, int], device: str
) -> None:
    q, k, v = inputs(device, q_len=lengths[0], kv_len=lengths[1])
    options: dict[str, Any] = {"is_causal": causal is not None}
    if causal:
        options["causal_alignment"] = causal
    blocks = sparge.predict(q, k, topk=0.4, **options)
    got, lse = sparge.attention(
        q, k, v, topk=0.4, pv_gap=math.inf, enable_gqa=True, return_lse=True, **options
    )
    want, want_lse = exact(q, k, v, blocks=blocks.tensor, causal=causal)
    assert relative_l1(got, want) < bound(device, 1e-5)
    finite = torch.isfinite(want_lse)
    assert torch.equal(torch.isfinite(lse), finite)
    # int8 scores: an error of half a step in the largest of rows that see few keys.
    assert (lse - want_lse)[finite].abs().max() < bound(device, 1e-4, 0.15)


def test_the_default_skips_and_stays_close(device: str) -> None:
    # Beyond the crossover of either device.
    q_len, kv_len = (3000, 3000) if device == "cpu" else (1000, 9000)
    q, k, v = inputs(device, q_len=q_len, kv_len=kv_len)
    want, _ = exact(q, k, v, causal="bottom_right")
    got, stats = sparge.attention(
        q, k, v, is_causal=True, causal_alignment="bottom_right", enable_gqa=True, return_stats=True
    )
    assert stats.qk_sparsity() > 0.1
    assert stats.pv_sparsity() >= stats.qk_sparsity() - 0.05
    # 95% is skipped: few keys are left to average the rounding of e4m3 over.
    assert relative_l1(got, want) < bound(device, 0.05, 0.08)


def test_block_sparse_attention_computes_exactly_the_mask(device: str) -> None:
    q, k, v = inputs(device, q_len=500, kv_len=700)
    mask = torch.rand(1, 4, 4, 11, device=device) < 0.5
    mask[0, 1, 2] = False  # a row of blocks without keys
    got, lse = sparge.block_sparse_attention(
        q, k, v, mask, enable_gqa=True, pv_gap=math.inf, return_lse=True
    )
    want, _ = exact(q, k, v, blocks=mask)
    assert relative_l1(got, want) < bound(device, 1e-5)
    assert (got[0, 1, 256:384] == 0).all() and (lse[0, 1, 256:384] == -math.inf).all()
    wrapped = sparge.BlockMask(mask, 500, 700)
    again = sparge.block_sparse_attention(q, k, v, wrapped, enable_gqa=True, pv_gap=math.inf)
    assert alike(again, got)
    assert wrapped.density() == pytest.approx(float(mask.float().mean()))


@pytest.mark.parametrize("policy", ["window:300", "random:0.4,seed=3", "xattention:0.9,stride=8"])
def test_other_methods_are_policies(policy: str, device: str) -> None:
    q, k, v = inputs(device, q_len=1300)
    options: dict[str, Any] = {"is_causal": True, "policy": policy}
    blocks = sparge.predict(q, k, **options).tensor
    got, stats = sparge.attention(
        q, k, v, enable_gqa=True, pv_gap=math.inf, return_stats=True, **options
    )
    want, _ = exact(q, k, v, blocks=blocks, causal="top_left")
    assert relative_l1(got, want) < bound(device, 1e-5) and stats.qk_sparsity() > 0.1


def test_keep_keys_are_attended_by_every_query(device: str) -> None:
    q, k, v = inputs(device, q_len=1500)
    blocks = sparge.predict(q, k, topk=0.2).tensor.clone()
    blocks[..., 600 // 64 : 11] = True
    want, _ = exact(q, k, v, blocks=blocks)
    got = sparge.attention(
        q, k, v, topk=0.2, pv_gap=math.inf, enable_gqa=True, keep_keys=((600, 700),)
    )
    assert relative_l1(got, want) < bound(device, 1e-5)


def test_how_many_keys_a_query_sees() -> None:
    _reach = _torch._reach
    assert _reach(100, 400, None, None) == 400
    assert _reach(400, 400, "top_left", None) == _reach(400, 400, "bottom_right", None) == 200
    assert _reach(100, 400, "top_left", None) == 50
    assert _reach(100, 400, "bottom_right", None) == 350
    assert _reach(400, 400, None, (30, 9)) == 40 and _reach(400, 400, "top_left", (30, None)) == 31
    assert _reach(400, 400, None, (30, None)) == 400


def test_keep_queries_attend_everything(device: str) -> None:
    q, k, v = inputs(device, q_len=1500)
    config = sparge.Config(topk=0.2, pv_gap=math.inf)
    blocks = sparge.predict(q, k, is_causal=True, config=config).tensor.clone()
    blocks[:, :, 600 // 128 : 6] = True
    want, _ = exact(q, k, v, blocks=blocks, causal="top_left")
    kept = {"keep_queries": ((600, 700),), "config": config, "is_causal": True}
    got = sparge.attention(q, k, v, enable_gqa=True, **kept)
    assert relative_l1(got, want) < bound(device, 1e-5)
    if device == "cpu":
        got = sparge.attention(*(x.numpy() for x in (q, k, v)), enable_gqa=True, **kept)
        assert relative_l1(torch.from_numpy(got), want) < 1e-5
    both = {**kept, "keep_keys": ((0, 64), (900, 1000)), "keep_queries": ((600, 700), (1400, 1500))}
    blocks[:, :, 1400 // 128 :] = True
    blocks[..., 0] = blocks[..., 900 // 64 : 16] = True
    got = sparge.attention(q, k, v, enable_gqa=True, **both)
    assert relative_l1(got, exact(q, k, v, blocks=blocks, causal="top_left")[0]) < bound(device, 1e-5)
    with pytest.raises(sparge.SpargeError, match="keep_queries"):
        sparge.attention(q, k, v, enable_gqa=True, topk=0.2, keep_queries=((9, 3),))


def test_key_lengths_and_windows(device: str) -> None:
    q, k, v = inputs(device, batch=3, q_len=400)
    lengths = [400, 150, 1]
    got = sparge.attention(
        q, k, v, enable_gqa=True, key_lengths=lengths, window=(100, 20), policy="dense"
    )
    ends = torch.tensor(lengths, device=device)
    valid = torch.arange(400, device=device) < ends[:, None, None, None]
    want, _ = exact(q, k, v, mask=valid, window=(100, 20))
    for at, length in enumerate(lengths):
        # The window's diagonal ends at the last valid key of each sequence.
        one, _ = exact(q[at : at + 1], k[at : at + 1, :, :length], v[at : at + 1, :, :length],
                       window=(100, 20))  # fmt: skip
        assert relative_l1(got[at : at + 1], one) < bound(device, 1e-5, HALF)
    assert relative_l1(got[:1], want[:1]) < bound(device, 1e-5, HALF)
    got = sparge.attention(q, k, v, enable_gqa=True, key_lengths=ends, topk=1.0)
    assert relative_l1(got, exact(q, k, v, mask=valid)[0]) < bound(device, 0.01)


@pytest.mark.parametrize("policy", [{"topk": 0.5}, {"policy": "dense"}])
def test_layouts_and_strides_do_not_matter(policy: dict[str, Any], device: str) -> None:
    q, k, v = inputs(device, q_len=600, batch=2)
    near = 1e-3 if "topk" in policy else HALF  # dense is SDPA on a GPU
    want = sparge.attention(q, k, v, enable_gqa=True, **policy)
    nhd = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    got = sparge.attention(*nhd, enable_gqa=True, layout="NHD", **policy)
    assert got.shape == (2, 600, 4, 64)
    assert alike(got.transpose(1, 2), want, near)
    views = [x.transpose(1, 2) for x in nhd]
    assert alike(sparge.attention(*views, enable_gqa=True, **policy), want, near)
    wide = [F.pad(x, (0, 8))[..., :64] for x in (q, k, v)]
    assert alike(sparge.attention(*wide, enable_gqa=True, **policy), want, near)
    turned = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v)]
    assert turned[0].stride(-1) != 1
    assert alike(sparge.attention(*turned, enable_gqa=True, **policy), want, near)


def test_three_dimensions_and_broadcast_batch(device: str) -> None:
    q, k, v = inputs(device, heads=1, kv_heads=1, q_len=600, batch=3)
    got = sparge.attention(q[:, 0], k[:, 0], v[:, 0], topk=0.5)
    assert alike(got, sparge.attention(q, k, v, topk=0.5)[:, 0])
    shared = sparge.attention(q, k[:1], v[:1], topk=0.5)
    repeated = [x[:1].repeat(3, 1, 1, 1) for x in (k, v)]
    assert alike(shared, sparge.attention(q, *repeated, topk=0.5))


def test_thread_count_does_not_change_the_result() -> None:
    q, k, v = qkv(q_len=700)
    want = sparge.attention(q, k, v, topk=0.5, enable_gqa=True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(sparge.attention(q, k, v, topk=0.5, enable_gqa=True), want)
    finally:
        torch.set_num_threads(before)


def test_fallback_is_exact_and_warns_once(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_torch, "_warned", set())
    q, k, v = (x.double() for x in inputs(device, q_len=200, kv_len=300))
    options: dict[str, Any] = {
        "is_causal": True,
        "causal_alignment": "bottom_right",
        "enable_gqa": True,
        "topk": 0.5,
        "fallback": "dense",
    }
    with pytest.warns(UserWarning, match="float64"):
        got = sparge.attention(q, k, v, **options)
    want, _ = exact(q, k, v, causal="bottom_right")
    assert relative_l1(got, want) < bound(device, 1e-12, 1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparge.attention(q, k, v, **options)
    with pytest.raises(ValueError, match="fallback"):
        sparge.attention(q, k, v, fallback="eager")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(130, 130), (700, 1500)])
def test_our_own_kernel_at_keep_all_is_exact(
    causal: bool, lengths: tuple[int, int], device: str
) -> None:
    """`topk=1.0` is a knob: no SDPA, prediction and all."""
    q, k, v = inputs(device, q_len=lengths[0], kv_len=lengths[1])
    got, stats = sparge.attention(
        q, k, v, is_causal=causal, enable_gqa=True, topk=1.0, pv_gap=math.inf, return_stats=True
    )
    want, _ = exact(q, k, v, causal="top_left" if causal else None)
    assert relative_l1(got, want) < bound(device, 1e-5)
    assert stats.qk_sparsity() == stats.pv_sparsity() == 0


def test_fallback_aligns_with_key_lengths(device: str) -> None:
    q, k, v = inputs(device, batch=2, q_len=90, kv_len=150)
    for options in ({"is_causal": True, "causal_alignment": "bottom_right"}, {"window": (20, 5)}):
        more = {"enable_gqa": True, "key_lengths": [150, 100], **options}
        want = sparge.attention(q, k, v, policy="dense", **more)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = sparge.attention(*(x.double() for x in (q, k, v)), fallback="dense", **more)
        assert relative_l1(got, want) < bound(device, 1e-5, HALF)


def test_a_gap_alone_counts_at_any_length(device: str) -> None:
    # float32: the fast path of an H100 has no stage 2.
    q, k, v = qkv(q_len=600, device=device)
    for knobs in ({"pv_gap": 0.5}, {"policy": "paper"}, {"theta": 0.1}):
        _, stats = sparge.attention(q, k, v, enable_gqa=True, return_stats=True, **knobs)
        assert stats.pv_sparsity() > 0.05, knobs


def test_queries_broadcast_over_the_batch(device: str) -> None:
    q, k, v = inputs(device, heads=1, kv_heads=1, q_len=300, batch=3)
    got = sparge.attention(q[:1], k, v, topk=0.5)
    assert alike(got, sparge.attention(q[:1].repeat(3, 1, 1, 1), k, v, topk=0.5))
    assert sparge.predict(q[:1], k, topk=0.5).shape[0] == 3
    with pytest.raises(sparge.SpargeError, match="2, 3 and 3 batch entries"):
        sparge.attention(q[:2], k, v, topk=0.5)


def test_bools_that_are_not_0_or_1(device: str) -> None:
    q, k, v = inputs(device, q_len=200)
    mask = torch.rand(200, 200, device=device) < 0.7
    odd = (mask.to(torch.uint8) * 255).view(torch.bool)
    want = sparge.attention(q, k, v, mask, topk=1.0, enable_gqa=True)
    assert alike(sparge.attention(q, k, v, odd, topk=1.0, enable_gqa=True), want)
