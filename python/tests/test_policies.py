"""The compared methods' masks in torch operations, on CPU tensors and as CUDA calls make them: they are
the crate's but for ties that rounding decides."""

from __future__ import annotations

import math
from typing import Optional

import pytest
import sparge
import torch
from common import bound, qkv
from sparge import _ops, _policies

CAUSAL_ONLY = ("minference:v=40,s=150", "minference:v=5,s=60", "flexprefill:0.9,tau=0,min=128",
               "flexprefill:0.5,tau=1,min=256")  # fmt: skip
ESTIMATES = ("block-sparse:4", "xattention:0.7", "xattention:0.9,stride=64", *CAUSAL_ONLY)
BY_POSITION = ("dense", "window:300", "window:64,sinks=0", "a-shape:init=130,local=200",
               "random:0.3,seed=4")  # fmt: skip
FAR = 2**64 - 1


@pytest.fixture(params=["whole", "pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All heads and rows together, and a few at a time."""
    if request.param == "pieces":
        monkeypatch.setattr(_policies, "_BYTES", 300_000)



def differing(
    q: torch.Tensor,
    k: torch.Tensor,
    settings: str,
    attn_mask: Optional[torch.Tensor] = None,
    block_mask: Optional[torch.Tensor] = None,
    kv_lens: Optional[torch.Tensor] = None,
    device: str = "cpu",
) -> int:
    """Blocks that only one of the two masks keeps: the crate's, and that made on ``device``."""
    settings = f"layout=HND {settings}"
    want = _ops.predict(q, k, attn_mask, block_mask, kv_lens, settings)
    q, k, *masks = (x if x is None else x.to(device) for x in (q, k, attn_mask, block_mask))
    make = _policies.chosen if device == "cpu" else _ops.predict
    got = make(q, k, *masks, kv_lens, settings).cpu()
    assert got.shape == want.shape and got.dtype == torch.bool and want.any()
    return int((got != want).sum())


def allowed(device: str, name: str) -> int:
    """Of some 500 kept blocks that may differ: none where nothing is estimated."""
    return bound(device, 2, 10) if name in ESTIMATES else 0  # type: ignore[return-value]


def rows(q: torch.Tensor, k: torch.Tensor, settings: str) -> "list[list[int]]":
    """The kept blocks of each row of one head, which are the crate's."""
    assert differing(q, k, settings) == 0
    kept = _policies.chosen(q, k, None, None, None, f"layout=HND {settings}")[0, 0]
    return [row.nonzero().flatten().tolist() for row in kept]


def hot(length: int, **strength: float) -> "tuple[torch.Tensor, torch.Tensor]":
    """Queries that look along one direction; keys that lie there as much as is said: ``_3=40`` those of
    wide block 3."""
    q, k = torch.zeros(2, 1, 1, length, 8)
    q[..., 0] = 1.0
    for block, value in strength.items():
        start = int(block[1:]) * 128
        k[..., start : start + 128, 0] = value
    return q, k


def diagonal(length: int, offset: int) -> "tuple[torch.Tensor, torch.Tensor]":
    """Query i has its score's maximum at key i − ``offset``."""
    codes = torch.randn(1, 1, length + offset, 64)
    return 4 * codes[:, :, :length], codes[:, :, offset:]


def test_minference_finds_columns_and_diagonals() -> None:
    q, k = hot(2048)
    k[..., (700, 1300), 0] = 40.0
    got = rows(q, k, "causal=top_left policy=minference:v=32,s=50")
    assert got[15] == [0, 10, 20, 29, 30, 31] and got[4] == [0, 7, 8, 9]
    # The 100 nearest diagonals, and 768 = 12·64 keys back.
    got = rows(*diagonal(2048, 768), "causal=top_left policy=minference:v=30,s=101")
    assert got[15] == [0, 18, 19, 28, 29, 30, 31]


def test_block_sparse_takes_the_largest_means() -> None:
    q, k = hot(1024)
    k[..., 0] = -torch.arange(1024) / 1e4
    k[..., 320:384, 0] = 1.0
    got = rows(q, k, "causal=top_left policy=block-sparse:2")
    assert got[:4] == [[0, 1], [0, 1], [0, 1, 5], [0, 5]] and got[7] == [0, 5]


def test_flexprefill_covers_and_maps() -> None:
    # 95% of three flat blocks are 365 columns, so three blocks: the first (always) and two of them.
    hot_blocks = hot(4096, _3=40.0, _4=40.0, _5=40.0)
    got = rows(*hot_blocks, "causal=top_left policy=flexprefill:0.95,tau=0,min=128")
    for at in (6, 20, 31):
        assert {0, 1, 6, 7, 8, 9, 2 * at, 2 * at + 1} <= set(got[at])
    # Flat attention is query-aware, and so is each row of its map: short rows first.
    got = rows(*(torch.zeros(1, 1, 2048, 8),) * 2, "causal=top_left policy=flexprefill:0.5,min=128")
    assert all(got[at] == list(range(2 * at + 2)) for at in range(7))
    assert all(got[at] == [0, 1, 2 * at, 2 * at + 1] for at in range(9, 16))


def test_xattention_finds_a_hot_block() -> None:
    for name in ("xattention:0.9", "xattention:0.9,stride=16", "xattention:0.9,stride=64"):
        got = rows(*hot(2048, _3=40.0), f"causal=top_left policy={name}")
        assert all(got[at] == [0, 1, 6, 7, 2 * at, 2 * at + 1] for at in (4, 9, 15))
    assert rows(*hot(2048, _3=40.0), "policy=xattention")[12] == [6, 7]


def test_window_keeps_its_pairs() -> None:
    zeros = torch.zeros(1, 1, 1024, 8)
    assert rows(zeros, zeros, "policy=window:64,sinks=0")[4] == [7, 8, 9, 10]
    assert rows(zeros, zeros, "causal=top_left policy=a-shape:init=65,local=129")[4] == [0, 1, 6, 7, 8, 9]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(1024, 1024), (1300, 1300), (500, 1470), (1300, 700), (1, 900)])
@pytest.mark.usefixtures("pieces")
def test_masks_are_those_of_the_crate(
    lengths: "tuple[int, int]", dtype: torch.dtype, device: str
) -> None:
    q, k, _ = qkv(heads=6, kv_heads=2, q_len=lengths[0], kv_len=lengths[1], dtype=dtype)
    for name in ESTIMATES + BY_POSITION:
        for causal in ("causal=top_left ", "causal=bottom_right ", ""):
            if not causal and name in CAUSAL_ONLY:
                continue
            for window in ("", "window=200,0 sink_blocks=1 "):
                found = differing(q, k, f"{causal}{window}policy={name}", device=device)
                assert found <= allowed(device, name), (name, causal, window)


@pytest.mark.usefixtures("pieces")
def test_masks_and_lengths_of_the_call_count(device: str) -> None:
    q, k, _ = qkv(batch=3, q_len=700, kv_len=900)
    lens = torch.tensor([900, 0, 333])
    blocks = torch.rand(1, 4, 6, 15) < 0.6
    element = torch.rand(3, 1, 700, 900) < 0.0005
    bias = torch.zeros(1, 4, 700, 900).masked_fill(torch.rand(1, 4, 700, 900) < 0.9995, -torch.inf)
    for name in ESTIMATES + BY_POSITION:
        settings = f"causal=bottom_right policy={name} keep_local=1"
        few = allowed(device, name)
        assert differing(q, k, settings, block_mask=blocks, device=device) <= few
        assert differing(q, k, settings, kv_lens=lens, device=device) <= few
        if name in BY_POSITION:
            assert differing(q, k, settings, element, blocks, lens, device) == 0
            assert differing(q, k, settings, bias, device=device) == 0


def test_settings_beyond_every_length(device: str) -> None:
    q, k, _ = qkv(q_len=700)
    for name in (f"minference:v={FAR},s={FAR}", f"window:{FAR},sinks={FAR}", f"flexprefill:0.9,min={FAR}",
                 f"a-shape:init={FAR},local={FAR}", f"block-sparse:{FAR}"):  # fmt: skip
        settings = f"layout=HND causal=top_left window={FAR},0 policy={name}"
        everything = _ops.predict(q, k, None, None, None, "layout=HND causal=top_left select=all")
        got = _policies.chosen(q.to(device), k.to(device), None, None, None, settings)
        assert torch.equal(got.cpu(), everything)


def test_layouts_scales_and_autocast(device: str) -> None:
    q, k, _ = qkv(q_len=1100)
    there = [x.to(device) for x in (q, k)]
    nhd = [x.transpose(1, 2).contiguous() for x in there]
    for name in ESTIMATES:
        settings = f"causal=top_left scale=0.3 policy={name}"
        want = _policies.chosen(*there, None, None, None, f"layout=HND {settings}")
        assert differing(q, k, settings, device=device) <= allowed(device, name)
        with torch.autocast(device, dtype=torch.bfloat16):
            got = _policies.chosen(*nhd, None, None, None, f"layout=NHD {settings}")
        assert int((got != want).sum()) <= bound(device, 0, 2)


def test_what_has_no_meaning_is_refused_in_the_same_words(device: str) -> None:
    q, k, _ = qkv(q_len=300)
    mask = torch.ones(1, 1, 300, 300, dtype=torch.bool)
    for name, causal, given in (
        ("minference", "", None), ("flexprefill", "window=9,9", None), ("window:0", "", None),
        ("block-sparse:0", "", None), ("random:1.5", "", None), ("flexprefill:0", "causal=top_left", None),
        ("xattention:0.9,stride=12", "", None), ("xattention", "", mask), ("block-sparse", "", mask),
        ("minference", "causal=top_left", mask),
    ):  # fmt: skip
        refusals = []
        for call, at in ((_ops.predict, "cpu"), (_policies.chosen, "cpu"), (_ops.predict, device)):
            operands = (x if x is None else x.to(at) for x in (q, k, given))
            with pytest.raises(sparge.SpargeError) as refused:
                call(*operands, None, None, f"layout=HND {causal} policy={name}")
            refusals.append(str(refused.value))
        assert len(set(refusals)) == 1


def test_random_draws_as_attention_does_also_where_more_is_kept() -> None:
    q, k, v = qkv(q_len=1300)
    config = sparge.Config(policy="random:0.2", keep_local=3)
    blocks = sparge.predict(q, k, is_causal=True, config=config)
    less = sparge.predict(q, k, is_causal=True, policy="random:0.2")
    _, stats = sparge.attention(
        q, k, v, is_causal=True, enable_gqa=True, config=config, return_stats=True
    )
    everything = sparge.predict(q, k, is_causal=True, policy="dense").tensor.sum()
    assert stats.qk_sparsity() == pytest.approx(1 - float(blocks.tensor.sum() / everything))
    assert blocks.density() > less.density()


@pytest.mark.parametrize("where", ["query", "key"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.usefixtures("pieces")
def test_what_is_not_a_number_is_not_left_out(value: float, where: str, device: str) -> None:
    q, k, _ = qkv(q_len=1300)
    (q if where == "query" else k)[:, 0, 700, 3] = value
    for name in ESTIMATES:
        for causal in ("causal=top_left ", ""):
            if causal or name not in CAUSAL_ONLY:
                found = differing(q, k, f"{causal}policy={name}", device=device)
                assert found <= allowed(device, name), name
    if math.isnan(value) and where == "key":
        settings = "layout=HND policy=xattention:0.5"
        kept = _policies.chosen(q.to(device), k.to(device), None, None, None, settings)
        assert kept[:, :2].all() and not kept[:, 2:].all()  # of the key's own two query heads


def test_zeros_are_the_crates() -> None:
    zeros = torch.zeros(1, 2, 1300, 64)
    for name in ESTIMATES:
        assert differing(zeros, zeros, f"causal=top_left policy={name}") == 0
