"""`torch.ops.sparge.*`: opcheck, compiled graphs, fake tensors, bad direct calls."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import sparge
import torch
from common import bound, qkv, relative_l1
from sparge import _cuda, _ops

HND = "layout=HND topk=0.5"

# torch.compile's own deprecations are not ours to fix.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")


def _operands(**options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return qkv(heads=2, kv_heads=1, q_len=200, dim=32, **options)


@pytest.mark.parametrize("settings", [HND, "layout=NHD causal=bottom_right select=all"])
@pytest.mark.parametrize("masks", ["none", "element", "blocks", "lengths"])
def test_opcheck(settings: str, masks: str, device: str) -> None:
    q, k, v = _operands(device=device)
    if settings.startswith("layout=NHD"):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    element = torch.rand(1, 1, 200, 200, device=device) < 0.8 if masks == "element" else None
    blocks = torch.rand(1, 2, 2, 4, device=device) < 0.8 if masks == "blocks" else None
    lengths = torch.tensor([150]) if masks == "lengths" else None
    more = (element, blocks, lengths, settings)
    torch.library.opcheck(_ops.attention, (q, k, v, *more))
    torch.library.opcheck(_ops.attention_full, (q, k, v, *more))
    torch.library.opcheck(_ops.predict, (q, k, *more))
    torch.library.opcheck(_ops.quantize, (k, settings[7:10]))


def test_words_of_block_masks(device: str) -> None:
    lying = (torch.rand(2, 77, 3, 5, device=device) < 0.5).permute(0, 2, 3, 1)
    for mask in (lying, lying[:1, :, :1, :64].expand(2, 3, 4, 64)):
        words = _cuda.pack(mask, 4)
        assert words.dtype == torch.int32 and words.is_contiguous()
        number = sum((int(x) & 0xFFFFFFFF) << (32 * i) for i, x in enumerate(words[1, 2, 3]))
        assert number == sum(1 << i for i, bit in enumerate(mask[1, 2, 3]) if bit)
        back = _cuda.unpack(words, mask.shape[3])
        assert back.is_contiguous() and torch.equal(back, mask)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic: bool, device: str) -> None:
    config = sparge.Config(cdf=0.9, pooling="sub_block")

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        a = sparge.attention(q, k, v, is_causal=True, enable_gqa=True, topk=0.5)
        b, lse = sparge.attention(q, k, v, enable_gqa=True, config=config, return_lse=True)
        c = sparge.attention(q * 2, k, v, enable_gqa=True)  # the default, below and above 1024
        blocks = sparge.predict(q, k, topk=0.3)
        d = sparge.block_sparse_attention(q, k, v, blocks, enable_gqa=True)
        return a + b + c + d + lse[..., None]

    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (200, 1100):
        operands = qkv(heads=2, kv_heads=1, q_len=length, dim=32, device=device)
        assert relative_l1(compiled(*operands), model(*operands)) < bound(device, 1e-6, 1e-2)


@pytest.mark.filterwarnings("ignore:Skipping serialization:UserWarning")  # torch 2.6 itself
def test_compiles_with_inductor() -> None:
    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sparge.attention(q.sin(), k, v, topk=0.5, enable_gqa=True).cos()

    operands = _operands()
    got = torch.compile(model, fullgraph=True)(*operands)
    assert torch.allclose(got, model(*operands), atol=1e-5)


def test_meta_tensors_have_shapes() -> None:
    q, k, v = (x.to("meta") for x in _operands())
    out, lse = sparge.attention(q, k, v, topk=0.5, enable_gqa=True, return_lse=True)
    assert out.shape == (1, 2, 200, 32) and lse.shape == (1, 2, 200) and out.is_meta


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query": torch.zeros(1, 2, 200, 33)}, "head_dim"),
        ({"key": torch.zeros(1, 1, 199, 32)}, "kv_len"),
        ({"key": torch.zeros(1, 1, 200, 32).half()}, "must be the same"),
        ({"value": torch.zeros(200, 32)}, "4 each"),
        ({"query": torch.zeros(1, 2, 0, 32)}, "qo_len is 0"),
        ({"attn_mask": torch.zeros(1, 1, 200, 200, dtype=torch.float64)}, "float64"),
        ({"attn_mask": torch.zeros(1, 3, 200, 200)}, "attn_mask has shape"),
        ({"block_mask": torch.zeros(1, 2, 2, 3, dtype=torch.bool)}, "block_mask has shape"),
        ({"block_mask": torch.zeros(1, 2, 2, 4)}, "expected bool"),
        ({"kv_lens": torch.tensor([1, 2])}, "kv_lens"),
        ({"kv_lens": torch.tensor([-1])}, "negative"),
        ({"settings": "topk"}, "key=value"),
        ({"settings": "layout=HND colour=red"}, "colour"),
        ({"settings": "layout=HND topk=a"}, "number"),
        ({"settings": "layout=HND pooling=5x5"}, "divisor"),
        ({"settings": "layout=HND keep_keys=9:3"}, "from below to"),
    ],
)
def test_bad_direct_calls_are_refused(change: dict[str, Any], words: str, device: str) -> None:
    q, k, v = _operands(device=device)
    # Lengths are on the host.
    change = {
        name: x.to(device) if isinstance(x, torch.Tensor) and name != "kv_lens" else x
        for name, x in change.items()
    }
    call: dict[str, Any] = {
        "query": q, "key": k, "value": v, "attn_mask": None, "block_mask": None, "kv_lens": None,
        "settings": HND, **change,
    }  # fmt: skip
    # Known already: what is kept of a right call must not hide what is wrong with this one.
    right = {**call, **dict.fromkeys(change), "query": q, "key": k, "value": v, "settings": HND}
    _ops.attention(**right)
    _ops.attention_full(**right)
    with pytest.raises(sparge.SpargeError, match=words):
        _ops.attention(**call)
    with pytest.raises(sparge.SpargeError, match=words):
        _ops.attention_full(**call)


def test_a_machine_without_what_the_kernels_need_is_served_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(4, 4, q_len=300)

    def on_no_gpu(q: Any, k: Any, v: Any, mask: Any, blocks: Any, lens: Any, settings: str) -> Any:
        return _cuda._kind(torch.device("cuda", 99), q, k, v, settings, lens, None, False)

    monkeypatch.setattr(_cuda, "_on", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(_ops, "attention", on_no_gpu)
    with pytest.raises(NotImplementedError, match="no GPU 99|no NVIDIA driver"):
        sparge.attention(q, k, v, topk=0.5)
    with pytest.warns(UserWarning, match="no GPU 99|no NVIDIA driver"):
        got = sparge.attention(q, k, v, topk=0.5, fallback="dense")
    assert torch.equal(got, torch.nn.functional.scaled_dot_product_attention(q, k, v))
