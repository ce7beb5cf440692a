"""The knobs, what their masks look like, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import sparge
import torch
from common import alike, awkward_keys, bound, expand, inputs, qkv, same_bits
from sparge import _cuda, _ops


def test_predict_paper_policy_is_the_papers_formula(device: str) -> None:
    """One mean per block, softmax of the pooled scores, the ⌈0.3·n⌉ largest, first block kept."""
    q, k, _ = qkv(heads=2, kv_heads=2, q_len=1280, kv_len=1280, device=device)
    got = sparge.predict(q, k, topk=0.3, policy="paper").tensor
    pooled_q = q.double().unflatten(2, (10, 128)).mean(3)
    pooled_k = k.double().unflatten(2, (20, 64)).mean(3)
    mass = torch.softmax(pooled_q @ pooled_k.transpose(-1, -2) / 8, -1)
    mass[..., 0] = 2.0
    want = torch.zeros_like(got).scatter(-1, mass.topk(6, -1).indices, True)
    assert int((got != want).sum()) <= bound(device, 0, 2)  # a near-tie of another rounding


def test_per_head_knobs_and_config(device: str) -> None:
    q, k, v = inputs(device, q_len=1300)
    per_head = sparge.predict(q, k, topk=[0.2, 0.4, 0.6, 1.0]).tensor
    for head, topk in enumerate([0.2, 0.4, 0.6, 1.0]):
        assert torch.equal(per_head[:, head], sparge.predict(q, k, topk=topk).tensor[:, head])
    config = sparge.Config(topk=(0.2, 0.4, 0.6, 1.0), pooling="block")
    a = sparge.attention(q, k, v, enable_gqa=True, config=config)
    b = sparge.attention(q, k, v, enable_gqa=True, config=config, topk=0.5)
    assert not torch.equal(a, b)
    config = sparge.Config(topk=0.5, pooling="block")
    assert alike(b, sparge.attention(q, k, v, enable_gqa=True, config=config))


def test_poolings_have_names(device: str) -> None:
    q, k, _ = inputs(device, q_len=1300)
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


def test_quantize(device: str) -> None:
    _, k, _ = qkv(q_len=300, device=device)
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


def test_plot_is_a_png_of_the_mask(tmp_path: Any, device: str) -> None:
    q, k, _ = inputs(device, q_len=1300)
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
def test_refusals_say_what_was_wrong(arguments: dict[str, Any], words: str, device: str) -> None:
    full: dict[str, Any] = {"query": Q, "key": K, "value": V, "enable_gqa": True, **arguments}
    for name, x in full.items():
        if isinstance(x, torch.Tensor) and not x.is_meta:
            full[name] = x.to(device)
    full.setdefault("topk", None)
    if full["topk"] is None and "key" in arguments:
        full["topk"] = 0.5
    with pytest.raises(sparge.SpargeError, match=words):
        sparge.attention(**full)


def test_gradients_are_refused_by_name(device: str) -> None:
    q, k, v = (x.to(device, copy=True) for x in (Q, K, V))
    q.requires_grad_()
    with torch.enable_grad(), pytest.raises(sparge.SpargeError, match="no_grad"):
        sparge.attention(q, k, v, enable_gqa=True, topk=0.5)
    sparge.attention(q, k, v, enable_gqa=True, topk=0.5)  # fine without a graph


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


def test_every_field_counts_as_asked_for() -> None:
    assert sparge.Config().is_default() and sparge.Config(policy="auto").is_default()
    for name in sparge.Config.__dataclass_fields__:
        words = {"qk": "int8", "isa": "scalar", "policy": "paper", "pooling": "block"}
        given = {**words, "target_l1": 0.5}.get(name, 1)
        assert not sparge.Config(**{name: given}).is_default(), name


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


def test_nobody_is_run_over_by_expand() -> None:
    """The helper of these tests, checked by hand."""
    blocks = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    blocks[0, 0, 1, 1] = True
    wide = expand(blocks, 130, 70)
    assert wide.shape == (1, 1, 130, 70) and int(wide.sum()) == 2 * 6 and bool(wide[0, 0, 129, 69])


def test_target_l1_is_the_mass_that_may_be_lost() -> None:
    q, k, v = qkv(q_len=600)
    config = sparge.Config(target_l1=0.25, theta=0.1)
    assert config.text() == "theta=0.1 cdf=0.75"
    got = sparge.attention(q, k, v, enable_gqa=True, config=config)
    assert torch.equal(got, sparge.attention(q, k, v, enable_gqa=True, cdf=0.75, theta=0.1))
    assert config.override(cdf=0.9) == sparge.Config(cdf=0.9, theta=0.1)
    assert sparge.Config(topk=0.5).override(target_l1=0.1) == sparge.Config(target_l1=0.1)
    for bad in (0, 1, -0.1, math.nan):
        with pytest.raises(sparge.SpargeError, match="above 0 and below 1"):
            sparge.Config(target_l1=bad)
    with pytest.raises(sparge.SpargeError, match="target_l1 is given beside topk"):
        sparge.Config(target_l1=0.1, topk=0.5)
    with pytest.raises(sparge.SpargeError, match="cannot be combined with target_l1"):
        sparge.Config(target_l1=0.1, policy="dense")
