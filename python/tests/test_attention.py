"""`sparge.attention` on torch tensors: SDPA at keep-all, float64 everywhere else."""

from __future__ import annotations

import math
import warnings
from typing import Any, Optional

import pytest
import sparge
import torch
import torch.nn.functional as F
from common import awkward_keys, exact, expand, qkv, relative_l1, same_bits
from sparge import _cuda, _ops

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
    dtype: torch.dtype, heads: int, kv_heads: int, q_len: int, kv_len: int, dim: int, masking: str
) -> None:
    q, k, v = qkv(heads, kv_heads, q_len, kv_len, dim, batch=2, dtype=dtype)
    options: dict[str, Any] = {"is_causal": masking == "causal", "enable_gqa": True}
    if masking == "bool":
        options["attn_mask"] = torch.rand(2, heads, q_len, kv_len) < 0.7
        options["attn_mask"][..., 0] = True
    elif masking == "row":
        options["attn_mask"] = torch.rand(2, 1, 1, kv_len) < 0.7
        options["attn_mask"][..., 0] = True
    elif masking == "bias":
        options["attn_mask"] = torch.randn(1, heads, q_len, kv_len, dtype=dtype)
    elif masking == "broadcast":
        options["attn_mask"] = torch.randn(q_len, 1, dtype=dtype)
    want = F.scaled_dot_product_attention(q, k, v, **options)
    got = sparge.attention(q, k, v, **options, policy="dense")
    assert got.dtype == dtype and got.shape == want.shape
    assert relative_l1(got, want) < TOLERANCE[dtype]
    assert relative_l1(sparge.attention(q, k, v, **options, topk=1.0), want) < 0.01


@pytest.mark.parametrize("length", [64, 200, 300, 1000])
@pytest.mark.parametrize("causal", [False, True])
def test_the_default_is_exact_below_the_crossover(length: int, causal: bool) -> None:
    q, k, v = qkv(q_len=length)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    got = sparge.attention(q, k, v, is_causal=causal, enable_gqa=True)
    assert relative_l1(got, want) < 1e-5


@pytest.mark.parametrize("causal", [None, "top_left", "bottom_right"])
@pytest.mark.parametrize("lengths", [(1300, 1300), (700, 1500), (1500, 700)])
def test_sparse_is_float64_over_the_predicted_blocks(
    causal: Optional[str], lengths: tuple[int, int]
) -> None:
    q, k, v = qkv(q_len=lengths[0], kv_len=lengths[1])
    options: dict[str, Any] = {"is_causal": causal is not None}
    if causal:
        options["causal_alignment"] = causal
    blocks = sparge.predict(q, k, topk=0.4, **options)
    got, lse = sparge.attention(
        q, k, v, topk=0.4, pv_gap=math.inf, enable_gqa=True, return_lse=True, **options
    )
    want, want_lse = exact(q, k, v, blocks=blocks.tensor, causal=causal)
    assert relative_l1(got, want) < 1e-5
    finite = torch.isfinite(want_lse)
    assert torch.equal(torch.isfinite(lse), finite)
    assert (lse - want_lse)[finite].abs().max() < 1e-4


def test_the_default_skips_and_stays_close() -> None:
    q, k, v = qkv(q_len=3000)
    want, _ = exact(q, k, v, causal="top_left")
    got, stats = sparge.attention(q, k, v, is_causal=True, enable_gqa=True, return_stats=True)
    assert stats.qk_sparsity() > 0.1
    assert stats.pv_sparsity() >= stats.qk_sparsity() - 0.05
    assert relative_l1(got, want) < 0.05


def test_block_sparse_attention_computes_exactly_the_mask() -> None:
    q, k, v = qkv(q_len=500, kv_len=700)
    mask = torch.rand(1, 4, 4, 11) < 0.5
    mask[0, 1, 2] = False  # a row of blocks without keys
    got, lse = sparge.block_sparse_attention(
        q, k, v, mask, enable_gqa=True, pv_gap=math.inf, return_lse=True
    )
    want, _ = exact(q, k, v, blocks=mask)
    assert relative_l1(got, want) < 1e-5
    assert (got[0, 1, 256:384] == 0).all() and (lse[0, 1, 256:384] == -math.inf).all()
    wrapped = sparge.BlockMask(mask, 500, 700)
    assert torch.equal(
        got, sparge.block_sparse_attention(q, k, v, wrapped, enable_gqa=True, pv_gap=math.inf)
    )
    assert wrapped.density() == pytest.approx(float(mask.float().mean()))


def test_predict_paper_policy_is_the_papers_formula() -> None:
    """One mean per block, softmax of the pooled scores, the ⌈0.3·n⌉ largest, first block kept."""
    q, k, _ = qkv(heads=2, kv_heads=2, q_len=1280, kv_len=1280)
    got = sparge.predict(q, k, topk=0.3, policy="paper").tensor
    pooled_q = q.double().unflatten(2, (10, 128)).mean(3)
    pooled_k = k.double().unflatten(2, (20, 64)).mean(3)
    mass = torch.softmax(pooled_q @ pooled_k.transpose(-1, -2) / 8, -1)
    mass[..., 0] = 2.0
    want = torch.zeros_like(got).scatter(-1, mass.topk(6, -1).indices, True)
    assert torch.equal(got, want)


@pytest.mark.parametrize("policy", ["window:300", "random:0.4,seed=3", "xattention:0.9,stride=8"])
def test_other_methods_are_policies(policy: str) -> None:
    q, k, v = qkv(q_len=1300)
    options: dict[str, Any] = {"is_causal": True, "policy": policy}
    blocks = sparge.predict(q, k, **options).tensor
    got, stats = sparge.attention(
        q, k, v, enable_gqa=True, pv_gap=math.inf, return_stats=True, **options
    )
    want, _ = exact(q, k, v, blocks=blocks, causal="top_left")
    assert relative_l1(got, want) < 1e-5 and stats.qk_sparsity() > 0.1


def test_keep_keys_are_attended_by_every_query() -> None:
    q, k, v = qkv(q_len=1500)
    blocks = sparge.predict(q, k, topk=0.2).tensor.clone()
    blocks[..., 600 // 64 : 11] = True
    want, _ = exact(q, k, v, blocks=blocks)
    got = sparge.attention(
        q, k, v, topk=0.2, pv_gap=math.inf, enable_gqa=True, keep_keys=((600, 700),)
    )
    assert relative_l1(got, want) < 1e-5


def test_how_many_keys_a_query_sees() -> None:
    from sparge._torch import _reach

    assert _reach(100, 400, None, None) == 400
    assert _reach(400, 400, "top_left", None) == _reach(400, 400, "bottom_right", None) == 200
    assert _reach(100, 400, "top_left", None) == 50
    assert _reach(100, 400, "bottom_right", None) == 350
    assert _reach(400, 400, None, (30, 9)) == 40 and _reach(400, 400, "top_left", (30, None)) == 31
    assert _reach(400, 400, None, (30, None)) == 400


def test_keep_queries_attend_everything() -> None:
    q, k, v = qkv(q_len=1500)
    config = sparge.Config(topk=0.2, pv_gap=math.inf)
    blocks = sparge.predict(q, k, is_causal=True, config=config).tensor.clone()
    blocks[:, :, 600 // 128 : 6] = True
    want, _ = exact(q, k, v, blocks=blocks, causal="top_left")
    kept = {"keep_queries": ((600, 700),), "config": config, "is_causal": True}
    got = sparge.attention(q, k, v, enable_gqa=True, **kept)
    assert relative_l1(got, want) < 1e-5
    got = sparge.attention(*(x.numpy() for x in (q, k, v)), enable_gqa=True, **kept)
    assert relative_l1(torch.from_numpy(got), want) < 1e-5
    with pytest.raises(sparge.SpargeError, match="keep_queries"):
        sparge.attention(q, k, v, enable_gqa=True, topk=0.2, keep_queries=((9, 3),))


def test_key_lengths_and_windows() -> None:
    q, k, v = qkv(batch=3, q_len=400)
    lengths = [400, 150, 1]
    got = sparge.attention(
        q, k, v, enable_gqa=True, key_lengths=lengths, window=(100, 20), policy="dense"
    )
    valid = torch.arange(400) < torch.tensor(lengths)[:, None, None, None]
    want, _ = exact(q, k, v, mask=valid, window=(100, 20))
    for at, length in enumerate(lengths):
        # The window's diagonal ends at the last valid key of each sequence.
        one, _ = exact(q[at : at + 1], k[at : at + 1, :, :length], v[at : at + 1, :, :length],
                       window=(100, 20))  # fmt: skip
        assert relative_l1(got[at : at + 1], one) < 1e-5
    assert relative_l1(got[:1], want[:1]) < 1e-5


@pytest.mark.parametrize("policy", [{"topk": 0.5}, {"policy": "dense"}])
def test_layouts_and_strides_do_not_matter(policy: dict[str, Any]) -> None:
    q, k, v = qkv(q_len=600, batch=2)
    want = sparge.attention(q, k, v, enable_gqa=True, **policy)
    nhd = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    got = sparge.attention(*nhd, enable_gqa=True, layout="NHD", **policy)
    assert got.shape == (2, 600, 4, 64)
    assert torch.equal(got.transpose(1, 2), want)
    views = [x.transpose(1, 2) for x in nhd]
    assert torch.equal(sparge.attention(*views, enable_gqa=True, **policy), want)
    wide = [F.pad(x, (0, 8))[..., :64] for x in (q, k, v)]
    assert torch.equal(sparge.attention(*wide, enable_gqa=True, **policy), want)
    turned = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v)]
    assert turned[0].stride(-1) != 1
    assert torch.equal(sparge.attention(*turned, enable_gqa=True, **policy), want)


def test_three_dimensions_and_broadcast_batch() -> None:
    q, k, v = qkv(1, 1, 600, batch=3)
    got = sparge.attention(q[:, 0], k[:, 0], v[:, 0], topk=0.5)
    assert torch.equal(got, sparge.attention(q, k, v, topk=0.5)[:, 0])
    shared = sparge.attention(q, k[:1], v[:1], topk=0.5)
    assert torch.equal(shared, sparge.attention(q, k[:1].repeat(3, 1, 1, 1),
                                                v[:1].repeat(3, 1, 1, 1), topk=0.5))  # fmt: skip


def test_per_head_knobs_and_config() -> None:
    q, k, v = qkv(q_len=1300)
    per_head = sparge.predict(q, k, topk=[0.2, 0.4, 0.6, 1.0]).tensor
    for head, topk in enumerate([0.2, 0.4, 0.6, 1.0]):
        assert torch.equal(per_head[:, head], sparge.predict(q, k, topk=topk).tensor[:, head])
    config = sparge.Config(topk=(0.2, 0.4, 0.6, 1.0), pooling="block")
    a = sparge.attention(q, k, v, enable_gqa=True, config=config)
    b = sparge.attention(q, k, v, enable_gqa=True, config=config, topk=0.5)
    assert not torch.equal(a, b)
    assert torch.equal(
        b, sparge.attention(q, k, v, enable_gqa=True, config=sparge.Config(topk=0.5, pooling="block"))
    )


def test_poolings_have_names() -> None:
    q, k, _ = qkv(q_len=1300)
    by_default = sparge.predict(q, k, topk=0.3).tensor
    found = {}
    for name, words in (
        ("mixed", "16x16+2rows"), ("second_order", "16x16+var"), ("sub_block", "16x16"),
        ("block", "128x64"),
    ):  # fmt: skip
        found[name] = sparge.predict(q, k, config=sparge.Config(topk=0.3, pooling=name)).tensor
        same = sparge.predict(q, k, config=sparge.Config(topk=0.3, pooling=words)).tensor
        assert torch.equal(found[name], same)
    assert torch.equal(found["mixed"], by_default)
    assert not torch.equal(found["mixed"], found["block"])


def test_thread_count_does_not_change_the_result() -> None:
    q, k, v = qkv(q_len=700)
    want = sparge.attention(q, k, v, topk=0.5, enable_gqa=True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(sparge.attention(q, k, v, topk=0.5, enable_gqa=True), want)
    finally:
        torch.set_num_threads(before)


def test_quantize() -> None:
    _, k, _ = qkv(q_len=300)
    got = sparge.quantize(k)
    back = got.values * got.scales[..., None] + got.means.repeat_interleave(64, 2)[:, :, :300]
    assert got.values.dtype == torch.int8
    assert ((back - k).abs() <= got.scales[..., None] * 0.5001).all()
    nhd = sparge.quantize(k.transpose(1, 2).contiguous(), layout="NHD")
    assert torch.equal(nhd.values, got.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_what_quantizes_on_a_gpu_gives_the_same_bits(dtype: torch.dtype, layout: str) -> None:
    """It is plain torch, so it can be run here."""
    k = awkward_keys(dtype)
    for length in (300, 256, 64, 1):
        keys = k[:, :, :length] if layout == "HND" else k[:, :, :length].transpose(1, 2)
        for got, want in zip(_cuda.quantize(keys, layout), _ops.quantize(keys, layout)):
            assert same_bits(got, want)
    for wrong in (k[:0], k[:, :0], k[:, :, :0], k[..., :0], k.repeat(1, 1, 1, 7), k.double(), k[0]):
        for quantize in (_cuda.quantize, _ops.quantize):
            with pytest.raises(sparge.SpargeError):
                quantize(wrong, layout)


def test_plot_is_a_png_of_the_mask(tmp_path: Any) -> None:
    q, k, _ = qkv(q_len=1300)
    path = tmp_path / "mask.png"
    data = sparge.predict(q, k, topk=0.3, is_causal=True).plot(str(path), head=1, pixels=2)
    assert path.read_bytes() == data and data.startswith(b"\x89PNG")
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    assert (width, height) == (21 * 2, 11 * 4)


Q, K, V = qkv(q_len=64)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dropout_p": 0.1}, "dropout_p is 0.1, expected 0"),
        ({"enable_gqa": False}, "enable_gqa=True"),
        ({"is_causal": True, "attn_mask": torch.ones(64, 64, dtype=torch.bool)}, "is_causal"),
        ({"attn_mask": torch.ones(63, 64, dtype=torch.bool), "topk": 0.5}, "63×64"),
        ({"attn_mask": torch.ones(64, 64, dtype=torch.int32), "topk": 0.5}, "int32"),
        ({"layout": "BSHD"}, "BSHD"),
        ({"topk": 1.5}, "above 0 and at most 1"),
        ({"cdf": [0.5, 0.5]}, "one per query head"),
        ({"theta": 1.0}, "theta"),
        ({"pv_gap": -1.0}, "lambda"),
        ({"policy": "magic"}, "magic"),
        ({"policy": "dense", "topk": 0.5}, "dense"),
        ({"policy": "random:0.5", "topk": 0.5}, "random"),
        ({"window": 5, "topk": 0.5}, "window"),
        ({"is_causal": True, "causal_alignment": "middle", "topk": 0.5}, "middle"),
        ({"key_lengths": [65], "topk": 0.5}, "65 keys"),
        ({"key": K.double()}, "float64"),
        ({"key": K.half(), "topk": 0.5}, "float16"),
        ({"query": Q.double(), "key": K.double(), "value": V.double(), "topk": 0.5}, "float64"),
        ({"query": Q[0, 0], "topk": 0.5}, "dimensions"),
        ({"key": K.to("meta"), "topk": 0.5}, "one device"),
    ],
)
def test_refusals_say_what_was_wrong(arguments: dict[str, Any], words: str) -> None:
    full: dict[str, Any] = {"query": Q, "key": K, "value": V, "enable_gqa": True, **arguments}
    full.setdefault("topk", None)
    if full["topk"] is None and "key" in arguments:
        full["topk"] = 0.5
    with pytest.raises(sparge.SpargeError, match=words):
        sparge.attention(**full)


def test_gradients_are_refused_by_name() -> None:
    q = Q.clone().requires_grad_()
    with torch.enable_grad(), pytest.raises(sparge.SpargeError, match="no_grad"):
        sparge.attention(q, K, V, enable_gqa=True, topk=0.5)
    sparge.attention(q, K, V, enable_gqa=True, topk=0.5)  # fine without a graph


def test_fallback_is_exact_and_warns_once() -> None:
    q, k, v = (x.double() for x in qkv(q_len=200, kv_len=300))
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
    assert relative_l1(got, want) < 1e-12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparge.attention(q, k, v, **options)
    with pytest.raises(ValueError, match="fallback"):
        sparge.attention(q, k, v, fallback="eager")


def test_nobody_is_run_over_by_expand() -> None:
    """The helper of these tests, checked by hand."""
    blocks = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    blocks[0, 0, 1, 1] = True
    wide = expand(blocks, 130, 70)
    assert wide.shape == (1, 1, 130, 70) and int(wide.sum()) == 2 * 6 and bool(wide[0, 0, 129, 69])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(130, 130), (700, 1500)])
def test_our_own_kernel_at_keep_all_is_exact(causal: bool, lengths: tuple[int, int]) -> None:
    """`topk=1.0` is a knob: no SDPA, prediction and all."""
    q, k, v = qkv(q_len=lengths[0], kv_len=lengths[1])
    got, stats = sparge.attention(
        q, k, v, is_causal=causal, enable_gqa=True, topk=1.0, pv_gap=math.inf, return_stats=True
    )
    want, _ = exact(q, k, v, causal="top_left" if causal else None)
    assert relative_l1(got, want) < 1e-5 and stats.qk_sparsity() == stats.pv_sparsity() == 0


def test_fallback_aligns_with_key_lengths() -> None:
    q, k, v = qkv(batch=2, q_len=90, kv_len=150)
    for options in ({"is_causal": True, "causal_alignment": "bottom_right"}, {"window": (20, 5)}):
        more = {"enable_gqa": True, "key_lengths": [150, 100], **options}
        want = sparge.attention(q, k, v, policy="dense", **more)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = sparge.attention(*(x.double() for x in (q, k, v)), fallback="dense", **more)
        assert relative_l1(got, want) < 1e-5


def test_a_gap_alone_counts_at_any_length() -> None:
    q, k, v = qkv(q_len=600)
    for knobs in ({"pv_gap": 0.5}, {"policy": "paper"}, {"theta": 0.1}):
        _, stats = sparge.attention(q, k, v, enable_gqa=True, return_stats=True, **knobs)
        assert stats.pv_sparsity() > 0.05, knobs


def test_a_knob_replaces_what_a_lower_level_chooses_by() -> None:
    low = sparge.Config(cdf=(0.5, 0.9), theta=0.2, pv_gap=4.0, pooling="block", keep_first=2)
    assert low.override(topk=0.3) == sparge.Config(
        topk=0.3, theta=0.2, pv_gap=4.0, pooling="block", keep_first=2
    )
    assert low.override(topk=0.3, cdf=0.8).cdf == 0.8
    assert low.override(policy="dense") == sparge.Config(policy="dense", keep_first=2)
    assert low.override(policy="window:64").cdf is None
    assert low.override(policy="paper").given() == {"theta": 0.2, "policy": "paper", "keep_first": 2}
    assert sparge.Config(policy="dense").override(topk=0.3) == sparge.Config(topk=0.3)
    assert sparge.Config(policy="paper").override(topk=0.3).policy == "paper"
    q, k, v = qkv(q_len=600)
    exactly = sparge.attention(q, k, v, enable_gqa=True, policy="dense")
    config = sparge.Config(topk=0.2, theta=0.1)
    got = sparge.attention(q, k, v, enable_gqa=True, config=config, policy="dense")
    assert torch.equal(got, exactly)


def test_per_head_knobs_are_values_whatever_holds_them() -> None:
    shares = torch.tensor([0.2, 0.4, 0.6, 1.0], dtype=torch.float64)
    want = sparge.Config(topk=(0.2, 0.4, 0.6, 1.0))
    for held in (shares, shares.numpy(), shares.tolist()):
        config = sparge.Config(topk=held)
        assert config == want and hash(config) == hash(want)
    assert sparge.Config(topk=torch.tensor(0.5)).topk == 0.5
    q, k, v = qkv(q_len=1300)
    first = sparge.attention(q, k, v, topk=shares, enable_gqa=True)
    shares.fill_(1.0)  # the same tensor, other values
    second = sparge.attention(q, k, v, topk=shares, enable_gqa=True)
    assert not torch.equal(first, second)
    with pytest.raises(TypeError, match="topk is dict"):
        sparge.Config(topk={"a": 1})


def test_queries_broadcast_over_the_batch() -> None:
    q, k, v = qkv(1, 1, 300, batch=3)
    got = sparge.attention(q[:1], k, v, topk=0.5)
    assert torch.equal(got, sparge.attention(q[:1].repeat(3, 1, 1, 1), k, v, topk=0.5))
    assert sparge.predict(q[:1], k, topk=0.5).shape[0] == 3
    with pytest.raises(sparge.SpargeError, match="2, 3 and 3 batch entries"):
        sparge.attention(q[:2], k, v, topk=0.5)


def test_what_is_refused_and_was_not() -> None:
    with pytest.raises(sparge.SpargeError, match="int4"):
        sparge.Config(qk="int4")
    with pytest.raises(sparge.SpargeError, match="half"):
        sparge.attention(Q, K, V, enable_gqa=True, config=sparge.Config(qk="half", topk=0.5))
    bias = torch.zeros(64, 64, requires_grad=True)
    with torch.enable_grad(), pytest.raises(sparge.SpargeError, match="attn_mask requires"):
        sparge.attention(Q, K, V, bias, enable_gqa=True, topk=0.5)
    mask = torch.ones(64, 64, dtype=torch.bool, device="meta")
    for knobs in ({}, {"topk": 0.5}):
        with pytest.raises(sparge.SpargeError, match="attn_mask on meta"):
            sparge.attention(Q, K, V, mask, enable_gqa=True, **knobs)
    with pytest.raises(sparge.SpargeError, match="attn_mask on meta"):
        sparge.predict(Q, K, mask)
    with pytest.raises(sparge.SpargeError, match="one device"):
        sparge.predict(Q, K.to("meta"))
    blocks = torch.ones(1, 1, 1, 1, dtype=torch.bool, device="meta")
    with pytest.raises(sparge.SpargeError, match="block_mask on meta"):
        sparge.block_sparse_attention(Q, K, V, blocks, enable_gqa=True)
    for lengths in ([3.5], torch.tensor([3.0])):
        with pytest.raises(sparge.SpargeError, match="expected integers"):
            sparge.attention(Q, K, V, enable_gqa=True, topk=0.5, key_lengths=lengths)


def test_bools_that_are_not_0_or_1() -> None:
    q, k, v = qkv(q_len=200)
    mask = torch.rand(200, 200) < 0.7
    odd = (mask.to(torch.uint8) * 255).view(torch.bool)
    want = sparge.attention(q, k, v, mask, topk=1.0, enable_gqa=True)
    assert torch.equal(sparge.attention(q, k, v, odd, topk=1.0, enable_gqa=True), want)
