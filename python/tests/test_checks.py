"""What is refused is refused at every length, and by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import sparge
import torch
from common import qkv

# The default: SDPA itself up to a length, the operator from there on.
BELOW, BEYOND = 300, {"cpu": 2100, "cuda": 8300}


@pytest.fixture(params=["below", "beyond"])
def length(request: pytest.FixtureRequest, device: str) -> int:
    """One on either side of the device's crossover."""
    return BELOW if request.param == "below" else BEYOND[device]


def operands(device: str, length: int) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor]":
    return tuple(torch.randn(1, 2, length, 16, device=device) for _ in range(3))  # type: ignore[return-value]


def refused(match: str, *tensors: Any, **options: Any) -> None:
    for more in ({}, {"topk": 0.5}):
        with pytest.raises((sparge.SpargeError, NotImplementedError), match=match):
            sparge.attention(*tensors, **options, **more)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_types_and_sizes(length: int, layout: str, device: str) -> None:
    q, k, v = operands(device, length)
    cut = v[:, :, :-1]
    wide = torch.zeros(1, 2, length, 300, device=device)
    calls = (
        ("dtype is torch.float64", [x.double() for x in (q, k, v)]),
        ("must be the same", [q, k.half(), v]),
        (f"{length} tokens|kv_len differs", [q, k, cut]),
        ("head dim|head_dim", [wide, wide, v]),
        ("head dim|head_dim", [q, k, wide]),
        ("head dim|head_dim|key", [q, k[..., :8], v]),
    )
    for match, tensors in calls:
        if layout == "NHD":
            tensors = [x.transpose(1, 2) for x in tensors]
        refused(match, *tensors, layout=layout)
    three = torch.zeros(1, 3, length, 16, device=device)
    refused("multiple", three, k, v, enable_gqa=True)


def test_masks(length: int, device: str) -> None:
    q, k, v = operands(device, length)
    for mask in (
        torch.ones(length, length, dtype=torch.int64), torch.ones(length, length - 1, dtype=torch.bool),
        torch.zeros(3, 1, 1, length), torch.ones(1, 1, 1, 1, length, dtype=torch.bool),
        torch.ones(1, 3, 1, length, dtype=torch.bool),
    ):  # fmt: skip
        refused("mask", q, k, v, attn_mask=mask.to(device))
    # A float mask of another type means the same at every length.
    bias = torch.randn(1, 1, 1, length, device=device)
    dense = sparge.attention(q, k, v, bias)
    assert torch.allclose(sparge.attention(q, k, v, bias.double()), dense, atol=1e-4)


def test_words(length: int, device: str) -> None:
    q, k, v = operands(device, length)
    refused("causal_alignment", q, k, v, is_causal=True, causal_alignment="bogus")
    refused("causal_alignment", q, k, v, causal_alignment="bogus")
    for options in ({}, {"topk": 0.5}):
        with pytest.raises(ValueError, match="fallback"):
            sparge.attention(q, k, v, fallback="bogus", **options)


def test_frameworks_do_not_mix(length: int, device: str) -> None:
    q, k, v = operands(device, length)
    blocks = np.ones((1, 1, -(-length // 128), -(-length // 64)), bool)
    mask = np.ones((length, length), bool)
    for options in ({}, {"topk": 0.5}):
        with pytest.raises(TypeError, match="key numpy.ndarray"):
            sparge.attention(q, k.cpu().numpy(), v, **options)
        with pytest.raises(TypeError, match="key builtins.list"):
            sparge.attention(q, [1.0], v, **options)
        with pytest.raises(TypeError, match="value numpy.ndarray"):
            sparge.attention(q, k, v.cpu().numpy(), **options)
        with pytest.raises(TypeError, match="attn_mask builtins.list"):
            sparge.attention(q, k, v, [True], **options)
        with pytest.raises(TypeError, match="attn_mask numpy.ndarray"):
            sparge.attention(q, k, v, mask, **options)
        with pytest.raises(TypeError, match="key numpy.ndarray"):
            sparge.predict(q, k.cpu().numpy(), **options)
    with pytest.raises(TypeError, match="block_mask numpy.ndarray"):
        sparge.block_sparse_attention(q, k, v, blocks)


def test_settings_by_name(device: str) -> None:
    q, k, v = operands(device, 300)
    for call in (sparge.attention, lambda q, k, v, **options: sparge.predict(q, k, **options)):
        with pytest.raises(TypeError, match="config is dict"):
            call(q, k, v, config={"topk": 0.5})
    for name in ("keep_keys", "keep_queries"):
        with pytest.raises(sparge.SpargeError, match=f"{name} is .0, 100., expected token ranges"):
            sparge.attention(q, k, v, topk=0.5, **{name: (0, 100)})
    for pooling in ("x", "16x", "16x16+rows", "bogus"):
        with pytest.raises(sparge.SpargeError, match=f'pooling is "{pooling}"'.replace("+", ".")):
            sparge.attention(q, k, v, config=sparge.Config(topk=0.5, pooling=pooling))


def test_arrays_without_a_way_back_are_refused_before_anything_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Foreign:
        def __init__(self, array: Any) -> None:
            self.array = array

        def __dlpack__(self, **options: Any) -> Any:
            return self.array.__dlpack__()

        def __dlpack_device__(self) -> Any:
            return self.array.__dlpack_device__()

    def computed(*arguments: Any) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr(sparge._sparge, "attend", computed)
    arrays = [Foreign(x.numpy()) for x in qkv(2, 2, q_len=100, dim=16)]
    with pytest.raises(TypeError, match="__array_namespace__"):
        sparge.attention(*arrays)


def test_another_default_device_changes_nothing() -> None:
    pytest.importorskip("diffusers")
    from sparge.diffusers import _grids

    q, k, v = qkv(2, 2, q_len=300, dim=16, batch=2)
    want = sparge.attention(q, k, v, key_lengths=[300, 100], topk=0.5)
    places = torch.cartesian_prod(torch.arange(1), torch.arange(4), torch.arange(6))
    with torch.device("meta"):
        got = sparge.attention(q, k, v, key_lengths=[300, 100], topk=0.5)
        boxes = _grids._boxes_of(places)
    assert torch.equal(got, want) and boxes == ((1, 4, 6),)


def test_exact_attention_takes_over_no_wrong_words() -> None:
    q, k, v = (x.double() for x in qkv(q_len=200))
    wrong: "list[tuple[dict[str, Any], str]]" = [
        ({"layout": "BSHD"}, "layout is 'BSHD'"),
        ({"key_lengths": [9999]}, "from 0 to 200"),
        ({"key_lengths": [1, 2, 3]}, "one length per batch entry"),
        ({"topk": 1.5}, "top_k is 1.5"),
        ({"policy": "magic"}, "magic"),
        ({"cdf": (0.5, 0.6, 0.7)}, "has 3 entries"),
        ({"keep_keys": ((9, 3),)}, "from below to"),
    ]
    for given, words in wrong:
        with pytest.raises(sparge.SpargeError, match=words):
            sparge.attention(q, k, v, enable_gqa=True, fallback="dense", **given)


@pytest.mark.parametrize("length", [300, 2100])
def test_wrong_values_are_refused_at_every_length(length: int) -> None:
    q, k, v = qkv(q_len=length)
    for given in ({"keep_keys": ((9, 3),)}, {"scale": float("nan")}, {"scale": float("inf")}):
        with pytest.raises(sparge.SpargeError):
            sparge.attention(q, k, v, enable_gqa=True, **given)
    with pytest.raises(sparge.SpargeError):
        sparge.attention(q[:0], k[:0], v[:0], enable_gqa=True)
    with pytest.raises(sparge.SpargeError, match="0 dimensions"):
        sparge.attention(q, k, v, torch.tensor(True), enable_gqa=True)
    row = torch.rand(length) < 0.7
    want = sparge.attention(q, k, v, row[None], enable_gqa=True)
    assert torch.equal(sparge.attention(q, k, v, row, enable_gqa=True), want)


@pytest.mark.parametrize("length", [300, 2100])
def test_a_scale_in_a_tensor_is_a_value(length: int) -> None:
    q, k, v = qkv(q_len=length)
    scale = torch.tensor(0.1)
    first = sparge.attention(q, k, v, scale=scale, enable_gqa=True)
    scale.fill_(0.5)
    second = sparge.attention(q, k, v, scale=scale, enable_gqa=True)
    assert torch.equal(second, sparge.attention(q, k, v, scale=0.5, enable_gqa=True))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("length", [300, 2100])
def test_autocast_decides_the_type_at_every_length(length: int) -> None:
    q, k, v = qkv(q_len=length)
    with torch.autocast("cpu", torch.bfloat16):
        got = sparge.attention(q, k, v.bfloat16(), enable_gqa=True)
        assert sparge.attention(q, k, v, enable_gqa=True).dtype == torch.bfloat16
    assert got.dtype == torch.bfloat16


def test_auto_over_a_config_is_the_default() -> None:
    q, k, v = qkv(q_len=1500)
    config = sparge.Config(topk=0.5)
    got = sparge.attention(q, k, v, enable_gqa=True, config=config, policy="auto")
    assert torch.equal(got, sparge.attention(q, k, v, enable_gqa=True))
    assert sparge.predict(q, k, config=config, policy="auto").density() == 1.0
    with pytest.raises(sparge.SpargeError, match="policy is ''"):
        sparge.Config(policy="")
    with pytest.raises(TypeError, match="target_l1 is list"):
        sparge.Config(target_l1=[0.1])  # type: ignore[arg-type]
