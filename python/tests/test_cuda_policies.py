"""The compared methods on a GPU: attention over their masks (which `test_policies.py` compares with the
crate's), no waiting, graphs, memory."""

from __future__ import annotations

import functools
from typing import Any

import common
import pytest
import sparge
import torch
from common import HALF, QUANTIZED, exact, relative_l1
from sparge import _ops, _policies

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]

CAUSAL_ONLY = ("minference:v=40,s=150", "flexprefill:0.9,tau=0,min=128", "flexprefill:0.5,tau=1,min=256")
ESTIMATES = ("block-sparse:4", "xattention:0.7", "xattention:0.9,stride=64", *CAUSAL_ONLY)
BY_POSITION = ("window:300", "a-shape:init=130,local=200", "random:0.3,seed=4")

inputs = functools.partial(common.inputs, "cuda")


def differing(gpu: torch.Tensor, cpu: torch.Tensor) -> float:
    """The share of the kept blocks that only one of two masks has."""
    assert gpu.is_cuda and gpu.shape == cpu.shape and gpu.dtype == torch.bool
    return float((gpu.cpu() != cpu).sum() / cpu.sum())


@pytest.mark.parametrize("dim", [64, 80])  # the fast path of an H100, and the general one
@pytest.mark.parametrize("policy", ESTIMATES + BY_POSITION)
def test_attention_is_over_the_policys_blocks(policy: str, dim: int) -> None:
    q, k, v = inputs(q_len=2100, dim=dim)
    options: dict[str, Any] = {"is_causal": True, "policy": policy}
    blocks = sparge.predict(q, k, **options).tensor
    got, lse, stats = sparge.attention(
        q, k, v, enable_gqa=True, return_lse=True, return_stats=True, **options
    )
    want, want_lse = exact(q, k, v, blocks=blocks, causal="top_left")
    assert relative_l1(got, want) < QUANTIZED and (lse - want_lse).abs().max() < 0.15
    cpu, cpu_stats = sparge.attention(
        *(x.cpu() for x in (q, k, v)), enable_gqa=True, return_stats=True, **options
    )
    assert relative_l1(got.cpu(), cpu) < QUANTIZED
    assert stats.qk_sparsity() == pytest.approx(cpu_stats.qk_sparsity(), abs=0.005)
    assert stats.qk_sparsity() > 0.1
    nhd = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    turned = sparge.attention(*nhd, layout="NHD", enable_gqa=True, **options)
    assert relative_l1(turned.transpose(1, 2), got) < 1e-3


@pytest.mark.parametrize("policy", ["block-sparse:3", "random:0.2", "window:200"])
def test_what_is_kept_anyway_joins_what_is_chosen(policy: str) -> None:
    q, k, v = inputs(heads=4, kv_heads=4, q_len=1500)
    blocks = sparge.predict(q, k, policy=policy).tensor.clone()
    blocks[..., 600 // 64 : 11] = True
    blocks[:, :, 1400 // 128 :] = True
    got = sparge.attention(
        q, k, v, policy=policy, keep_keys=((600, 700),), keep_queries=((1400, 1500),)
    )
    assert relative_l1(got, exact(q, k, v, blocks=blocks)[0]) < QUANTIZED


@pytest.mark.parametrize("policy", ["dense", *BY_POSITION])
def test_element_and_block_masks(policy: str) -> None:
    q, k, v = inputs(q_len=700, batch=2)
    element = torch.rand(1, 4, 700, 700, device="cuda") < 0.001
    element[..., 0] = True
    blocks = torch.rand(2, 1, 6, 11, device="cuda") < 0.6
    blocks[..., 0] = True
    bias = torch.zeros(1, 4, 700, 700, device="cuda").masked_fill(~element, -torch.inf)
    settings = f"layout=HND policy={policy}"
    for mask in (element, bias, bias.half()):
        gpu = _ops.predict(q, k, mask, blocks, None, settings)
        given = mask.cpu() if mask.dtype == torch.bool else mask.cpu().float()
        cpu = _ops.predict(q.cpu(), k.cpu(), given, blocks.cpu(), None, settings)
        assert differing(gpu, cpu) == 0
    got = _ops.attention(q, k, v, element, blocks, None, settings + " qk=half")
    assert relative_l1(got, exact(q, k, v, mask=element, blocks=gpu)[0]) < HALF


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("policy", [*ESTIMATES, "window:300"])
def test_a_policy_does_not_wait_for_the_device(policy: str) -> None:
    q, k, v = inputs(q_len=1200)

    def call() -> None:
        sparge.attention(q, k, v, is_causal=True, enable_gqa=True, policy=policy)
        sparge.attention(q, k, v, is_causal=True, enable_gqa=True, policy=policy, key_lengths=[900])

    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("policy", [*ESTIMATES, "window:300"])
def test_cuda_graph_replays_on_new_inputs(policy: str) -> None:
    q, k, v = inputs(q_len=1500)

    def call() -> torch.Tensor:
        return sparge.attention(q, k, v, is_causal=True, enable_gqa=True, policy=policy)  # type: ignore[no-any-return]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for to, new in zip((q, k, v), inputs(q_len=1500, seed=1)):
        to.copy_(new)
    graph.replay()
    assert torch.equal(out, call())


# Inductor's own first capture is of nothing.
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
def test_opcheck_and_compile() -> None:
    q, k, v = inputs(q_len=1500)
    settings = "layout=HND causal=top_left policy=xattention:0.7"
    torch.library.opcheck(_ops.attention, (q, k, v, None, None, None, settings))
    torch.library.opcheck(_ops.predict, (q, k, None, None, None, settings))

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = sparge.attention(q * 1.5, k, v, policy="xattention:0.7", is_causal=True, enable_gqa=True)
        return out + 1

    want = model(q, k, v)
    compiled = torch.compile(model, fullgraph=True)
    for _ in range(2):
        assert relative_l1(compiled(q, k, v), want) < 1e-3


@pytest.mark.parametrize("policy", ["window", "minference", "block-sparse", "flexprefill", "xattention"])
def test_128k_tokens_in_bounded_memory(policy: str) -> None:
    q = torch.randn(1, 32, 131072, 128, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(1, 8, 131072, 128, device="cuda", dtype=torch.bfloat16)
    settings = f"layout=HND causal=top_left policy={policy}"
    short = (x[:, :, :2048] for x in (q, k))
    _policies.chosen(*short, None, None, None, settings)  # what libraries allocate once
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    blocks = _policies.chosen(q, k, None, None, None, settings)
    peak = torch.cuda.max_memory_allocated() - before - blocks.numel()
    assert peak < 512 << 20, f"{peak / 2**20:.0f} MB"
    assert blocks[0, :, -1].any(-1).all() and blocks.float().mean() < 0.6
