"""What only a GPU has: its arithmetic, streams, graphs, long sequences. What it shares with the CPU is in
the other files, whose tests run on both devices."""

from __future__ import annotations

import functools
import math
import threading
import time
from typing import Any, Optional

import common
import pytest
import sparge
import torch
import torch.nn.functional as F
from common import HALF, QUANTIZED, awkward_keys, exact, expand, relative_l1, same_bits
from sparge import _ops

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]

inputs = functools.partial(common.inputs, "cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [64, 128, 80])
@pytest.mark.parametrize("causal", [None, "top_left", "bottom_right"])
def test_keep_all_is_exact(dtype: torch.dtype, dim: int, causal: Optional[str]) -> None:
    q, k, v = inputs(q_len=700, kv_len=900, dim=dim, dtype=dtype, batch=2)
    options: dict[str, Any] = {"is_causal": causal is not None, "enable_gqa": True}
    if causal:
        options["causal_alignment"] = causal
    want, want_lse = exact(q, k, v, causal=causal)
    got, lse = sparge.attention(q, k, v, topk=1.0, return_lse=True, **options)
    assert got.dtype == dtype and relative_l1(got, want) < QUANTIZED
    # int8 scores: an error of half a step in the largest of rows that see few keys.
    assert (lse - want_lse).abs().max() < 0.15
    config = sparge.Config(topk=1.0, qk="half", pv_gap=math.inf)
    assert relative_l1(sparge.attention(q, k, v, config=config, **options), want) < HALF


@pytest.mark.parametrize("pooling", ["block", "sub_block", "second_order"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_masks_agree_with_the_cpu(pooling: str, is_causal: bool) -> None:
    q, k, _ = inputs(heads=2, kv_heads=1, q_len=2000)
    config = sparge.Config(topk=0.3, pooling=pooling)
    gpu = sparge.predict(q, k, is_causal=is_causal, config=config).tensor.cpu()
    cpu = sparge.predict(q.cpu(), k.cpu(), is_causal=is_causal, config=config).tensor
    assert gpu.shape == cpu.shape
    # Scores are summed in another order and precision: near-ties may fall the other way.
    assert (gpu != cpu).float().mean() < 0.02
    if is_causal:
        everything = sparge.predict(q, k, is_causal=True, topk=1.0).tensor
        assert not (gpu.to("cuda") & ~everything).any()


def test_what_is_dense_anyway_is_sdpa() -> None:
    from sparge._config import DENSE

    q, k, v = inputs(heads=4, kv_heads=4, q_len=9000, dim=64)
    want = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(sparge.attention(q, k, v, config=DENSE), want)  # a schedule's dense layer
    assert torch.equal(sparge.attention(q, k, v, policy="dense"), want)
    short = [x[:, :, :3000] for x in (q, k, v)]
    kept = sparge.attention(*short, keep_keys=((0, 100),), keep_queries=((0, 100),))
    assert torch.equal(kept, F.scaled_dot_product_attention(*short))


# Inductor's own first capture is of nothing.
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
def test_opcheck_and_compile() -> None:
    q, k, v = inputs(q_len=1500)
    for settings in ("layout=HND topk=0.5", "layout=HND causal=bottom_right select=all"):
        torch.library.opcheck(_ops.attention, (q, k, v, None, None, None, settings))
        torch.library.opcheck(_ops.attention_full, (q, k, v, None, None, None, settings))
        torch.library.opcheck(_ops.predict, (q, k, None, None, None, settings))

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sparge.attention(q * 1.5, k, v, topk=0.5, is_causal=True, enable_gqa=True) + 1

    want = model(q, k, v)
    for mode in ("default", "reduce-overhead"):  # the second one captures CUDA graphs
        compiled = torch.compile(model, fullgraph=True, mode=mode)
        for _ in range(3):
            got = compiled(q, k, v)
        assert relative_l1(got, want) < 1e-3


def test_cuda_graph_replays_on_new_inputs() -> None:
    q, k, v = inputs(q_len=5000)

    def call() -> torch.Tensor:
        return sparge.attention(q, k, v, topk=0.4, is_causal=True, enable_gqa=True)  # type: ignore[no-any-return]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for seed in (1, 2):
        for to, new in zip((q, k, v), inputs(q_len=5000, seed=seed)):
            to.copy_(new)
        graph.replay()
        assert torch.equal(out, call())


def test_streams_and_threads() -> None:
    """Eight threads on streams of their own, each checking its own inputs' results."""
    work = [inputs(q_len=2500, seed=seed) for seed in range(8)]
    want = [sparge.attention(*x, topk=0.5, enable_gqa=True) for x in work]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def run(at: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(20):
                got = sparge.attention(*work[at], topk=0.5, enable_gqa=True)
            stream.synchronize()
            if not torch.equal(got, want[at]):
                wrong.append(at)

    threads = [threading.Thread(target=run, args=(at,)) for at in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_another_device_than_the_current_one() -> None:
    q, k, v = (x.to("cuda:1") for x in inputs(q_len=1200))
    got = sparge.attention(q, k, v, topk=0.5, enable_gqa=True)
    assert got.device.index == 1 and torch.cuda.current_device() == 0
    assert torch.equal(got.cpu(), sparge.attention(*(x.to("cuda:0") for x in (q, k, v)), topk=0.5,
                                                   enable_gqa=True).cpu())  # fmt: skip


@pytest.mark.parametrize("asked", ["out", "lse", "lengths", "keep_keys", "mask", "blocks", "predict"])
def test_a_call_does_not_wait_for_the_device(asked: str) -> None:
    q, k, v = inputs(q_len=1200)
    blocks = sparge.predict(q, k, topk=0.5)
    options: dict[str, Any] = {
        "lse": {"return_lse": True, "return_stats": True},
        "lengths": {"key_lengths": [1000]},
        "keep_keys": {"keep_keys": ((300, 400),)},
        "mask": {"attn_mask": torch.rand(1200, 1200, device="cuda") < 0.9},
    }.get(asked, {})

    def call() -> Any:
        if asked == "predict":
            return sparge.predict(q, k, topk=0.5)
        if asked == "blocks":
            return sparge.block_sparse_attention(q, k, v, blocks, enable_gqa=True)
        return sparge.attention(q, k, v, topk=0.5, enable_gqa=True, **options)

    call()
    torch.cuda.synchronize()
    torch.cuda._sleep(400_000_000)  # about 0.2 s of busy device
    begin = time.perf_counter()
    call()
    passed = time.perf_counter() - begin
    assert not torch.cuda.current_stream().query() and passed < 0.05
    torch.cuda.synchronize()


def test_128k_tokens() -> None:
    q, k, v = inputs(heads=4, kv_heads=1, q_len=131072, dim=128)
    got, stats = sparge.attention(
        q, k, v, is_causal=True, topk=0.3, enable_gqa=True, return_stats=True
    )
    assert torch.isfinite(got).all() and 0.6 < stats.qk_sparsity() < 0.75
    # The last rows by the book, over the blocks the prediction gives them.
    blocks = sparge.predict(q, k, is_causal=True, topk=0.3).tensor[:, :, -1:]
    keep = expand(blocks, 128, 131072)
    want, _ = exact(q[:, :, -128:], k, v, mask=keep, causal="bottom_right")
    assert relative_l1(got[:, :, -128:], want) < QUANTIZED


def test_refusals() -> None:
    q, k, v = inputs(q_len=300)
    with pytest.raises(sparge.SpargeError, match="one device"):
        sparge.attention(q, k.cpu(), v, topk=0.5, enable_gqa=True)
    with pytest.raises(NotImplementedError, match="head_dim"):
        odd = [x[..., :60] for x in (q, k, v)]
        sparge.attention(*odd, topk=0.5, enable_gqa=True)
    with pytest.raises(sparge.SpargeError, match="isa"):
        config = sparge.Config(topk=0.5, isa="avx2")
        sparge.attention(q, k, v, config=config, enable_gqa=True)
    with pytest.raises(sparge.SpargeError, match="float64"):
        sparge.quantize(k.double())
    with pytest.raises(sparge.SpargeError, match="head_dim up to 256"):
        sparge.quantize(k.repeat(1, 1, 1, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_quantize_gives_the_bits_of_the_cpu(dtype: torch.dtype, layout: str) -> None:
    k = awkward_keys(dtype)
    k = k if layout == "HND" else k.transpose(1, 2)
    on_gpu = k.cuda()
    got, want = (sparge.quantize(x, layout=layout) for x in (on_gpu, k))
    for name in ("values", "scales", "means"):
        assert getattr(got, name).is_cuda
        assert same_bits(getattr(got, name).cpu(), getattr(want, name))
    torch.library.opcheck(_ops.quantize, (inputs(q_len=200)[1], layout))
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = _ops.quantize(mode.from_tensor(on_gpu), layout)
    assert [x.shape for x in fakes] == [got.values.shape, got.scales.shape, got.means.shape]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_quantize_does_not_wait_for_the_device() -> None:
    _, k, _ = inputs(q_len=1000)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sparge.quantize(k)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_tensors_on_another_device_are_refused() -> None:
    q, k, v = inputs(q_len=300)
    mask = torch.ones(300, 300, dtype=torch.bool)
    blocks = torch.ones(1, 1, 3, 5, dtype=torch.bool)
    with pytest.raises(sparge.SpargeError, match="attn_mask on cpu"):
        sparge.attention(q, k, v, mask, topk=0.5, enable_gqa=True)
    with pytest.raises(sparge.SpargeError, match="block_mask on cpu"):
        sparge.block_sparse_attention(q, k, v, blocks, enable_gqa=True)
    with pytest.raises(sparge.SpargeError, match="one device"):
        sparge.predict(q, k.cpu(), topk=0.5)
    for change in ({"attn_mask": mask[None, None]}, {"block_mask": blocks}, {"key": k.cpu()}):
        call: dict[str, Any] = {
            "query": q, "key": k, "value": v, "attn_mask": None, "block_mask": None,
            "kv_lens": None, "settings": "layout=HND topk=0.5", **change,
        }  # fmt: skip
        with pytest.raises(sparge.SpargeError, match="one GPU"):
            _ops.attention(**call)


@pytest.mark.parametrize("asked", ["lse", "lengths", "window", "bottom_right", "keep_keys", "nhd"])
def test_the_short_default_is_exact_however_it_is_asked_for(asked: str) -> None:
    q, k, v = inputs(q_len=600, kv_len=900, batch=2, dtype=torch.float16)
    call: dict[str, Any] = {"enable_gqa": True}
    book: dict[str, Any] = {}
    if asked == "lse":
        call["return_lse"] = True
    elif asked == "lengths":
        call["key_lengths"] = torch.tensor([900, 300], device="cuda")
        book["mask"] = torch.arange(900, device="cuda") < call["key_lengths"][:, None, None, None]
    elif asked == "window":
        call["window"] = book["window"] = (200, 50)
    elif asked == "bottom_right":
        call.update(is_causal=True, causal_alignment="bottom_right")
        book["causal"] = "bottom_right"
    elif asked == "keep_keys":
        call["keep_keys"] = ((10, 20),)
    want, want_lse = exact(q, k, v, **book)
    if asked == "nhd":
        got = sparge.attention(*(x.transpose(1, 2) for x in (q, k, v)), layout="NHD", **call)
        got = got.transpose(1, 2)
    else:
        got = sparge.attention(q, k, v, **call)
    if asked == "lse":
        got, lse = got
        assert (lse - want_lse).abs().max() < 0.02
    assert relative_l1(got, want) < HALF / 2  # int8 is at about 0.02
    options = {x: call[x] for x in ("is_causal", "causal_alignment", "window", "key_lengths") if x in call}
    blocks = sparge.predict(q, k, **options).tensor
    everything = sparge.predict(q, k, topk=1.0, **options).tensor
    assert torch.equal(blocks, everything)


def test_predicting_nothing_still_heeds_masks() -> None:
    q, k, _ = inputs(q_len=300, batch=2)
    mask = torch.ones(2, 1, 300, 300, dtype=torch.bool, device="cuda")
    mask[1, ..., 128:] = False
    for policy in ("dense", None):
        got = sparge.predict(q, k, mask, policy=policy).tensor
        cpu = sparge.predict(q.cpu(), k.cpu(), mask.cpu(), policy=policy).tensor
        assert got.is_cuda and torch.equal(got.cpu(), cpu) and not got[1, ..., 2:].any()
    blocks = torch.rand(1, 4, 3, 5, device="cuda") < 0.5
    got = _ops.predict(q, k, None, blocks, None, "layout=HND select=all pv_gap=inf")
    assert torch.equal(got, blocks.expand(2, 4, 3, 5))
    with pytest.raises(sparge.SpargeError, match="batch is 0"):
        _ops.predict(q[:0], k[:0], None, None, None, "layout=HND select=all")


def test_compiles_with_masks_and_lengths() -> None:
    q, k, v = inputs(q_len=700, batch=2)
    mask = torch.rand(2, 1, 700, 700, device="cuda") < 0.8
    blocks = torch.rand(1, 4, 6, 11, device="cuda") < 0.7

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        a = sparge.attention(q, k, v, mask, topk=0.5, enable_gqa=True)
        b = sparge.attention(q, k, v, topk=0.5, enable_gqa=True, key_lengths=[700, 300])
        c = sparge.block_sparse_attention(q, k, v, blocks, enable_gqa=True)
        d, lse = sparge.attention(q, k, v, enable_gqa=True, return_lse=True)
        return a + b + c + d + lse[..., None].to(d.dtype)

    want = model(q, k, v)
    assert relative_l1(torch.compile(model, fullgraph=True)(q, k, v), want) < 1e-2
    lengths = torch.tensor([700, 300])
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (q, k, v)]
        out = _ops.attention(*fakes, None, None, mode.from_tensor(lengths), "layout=HND topk=0.5")
    assert out.shape == q.shape and out.is_cuda
