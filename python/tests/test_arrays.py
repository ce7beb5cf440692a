"""numpy and DLPack arrays, and a process that has no torch."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import sparge
import torch
from common import qkv


class Foreign:
    """An array of a framework this package has never heard of: DLPack and a namespace."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()

    def __array_namespace__(self) -> Any:
        return ForeignSpace


class ForeignSpace:
    @staticmethod
    def from_dlpack(array: Any) -> Foreign:
        return Foreign(torch.from_dlpack(array))


def _numpy(dtype: Any = np.float32, **options: Any) -> list[Any]:
    return [x.numpy().astype(dtype) for x in qkv(**options)]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_numpy_gives_the_bits_of_torch(dtype: Any) -> None:
    arrays = _numpy(dtype)
    tensors = [torch.from_numpy(x) for x in arrays]
    options: dict[str, Any] = {"topk": 0.4, "is_causal": True, "enable_gqa": True}
    out, lse, stats = sparge.attention(*arrays, **options, return_lse=True, return_stats=True)
    want, want_lse, want_stats = sparge.attention(
        *tensors, **options, return_lse=True, return_stats=True
    )
    assert isinstance(out, np.ndarray) and out.dtype == dtype
    assert (out == want.numpy()).all() and (lse == want_lse.numpy()).all()
    assert stats.qk_sparsity() == want_stats.qk_sparsity() > 0.3


def test_numpy_strides_masks_and_blocks() -> None:
    q, k, v = _numpy(q_len=300)
    options: dict[str, Any] = {"enable_gqa": True, "topk": 1.0}
    want = sparge.attention(q, k, v, **options)
    assert (sparge.attention(q[:, ::-1][:, ::-1], k, v, **options) == want).all()
    reversed_heads = sparge.attention(q[:, ::-1], k[:, ::-1], v[:, ::-1], **options)
    assert (reversed_heads[:, ::-1] == want).all()
    nhd = [np.ascontiguousarray(x.transpose(0, 2, 1, 3)) for x in (q, k, v)]
    assert (sparge.attention(*nhd, layout="NHD", **options).transpose(0, 2, 1, 3) == want).all()
    mask = np.random.default_rng(0).random((300, 300)) < 0.8
    torch_want = sparge.attention(
        *(torch.from_numpy(x) for x in (q, k, v)), attn_mask=torch.from_numpy(mask), **options
    )
    assert (sparge.attention(q, k, v, mask, **options) == torch_want.numpy()).all()
    blocks = sparge.predict(q, k, topk=0.4)
    assert isinstance(blocks.tensor, np.ndarray) and blocks.shape == (1, 4, 3, 5)
    sparse = sparge.block_sparse_attention(q, k, v, blocks, enable_gqa=True)
    assert (sparse == sparge.attention(q, k, v, topk=0.4, enable_gqa=True)).all()
    assert sparge.quantize(k).values.dtype == np.int8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dlpack_in_and_out(dtype: torch.dtype) -> None:
    tensors = qkv(q_len=400, dtype=dtype)
    foreign = [Foreign(x) for x in tensors]
    out = sparge.attention(*foreign, topk=0.5, enable_gqa=True)
    assert isinstance(out, Foreign)
    assert torch.equal(out.array, sparge.attention(*tensors, topk=0.5, enable_gqa=True))
    del foreign
    assert torch.isfinite(out.array.float()).all()  # the memory is the result's own


def test_refusals() -> None:
    q, k, v = _numpy(q_len=70)
    with pytest.raises(sparge.SpargeError, match="f64"):
        sparge.attention(*(x.astype(np.float64) for x in (q, k, v)), enable_gqa=True)
    with pytest.raises(sparge.SpargeError, match="enable_gqa"):
        sparge.attention(q, k, v)
    with pytest.raises(sparge.SpargeError, match="the same"):
        sparge.attention(q, k.astype(np.float16), v, enable_gqa=True)
    with pytest.raises(sparge.SpargeError, match="3 dimensions"):
        sparge.attention(q[0], k[0], v[0])
    with pytest.raises(TypeError, match="list"):
        sparge.attention([1], [2], [3])
    with pytest.raises(sparge.SpargeError, match="negative"):
        sparge.attention(q, k, v, enable_gqa=True, key_lengths=[-1])
    with pytest.raises(sparge.SpargeError, match="causal"):
        sparge.attention(q, k, v, np.ones((70, 70), bool), is_causal=True, enable_gqa=True)


def test_import_costs_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, sparge\n"
        "loaded = {'torch', 'numpy', 'transformers', 'diffusers'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
        "import numpy as np\n"
        "x = np.ones((1, 1, 200, 64), np.float32)\n"
        "assert abs(sparge.attention(x, x, x, topk=0.5) - 1).max() < 1e-5\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_fork_gets_its_own_threads() -> None:
    """A worker process forked after a call must not wait for its parent's threads."""
    code = (
        "import os, numpy as np, sparge\n"
        "x = np.random.default_rng(0).random((1, 4, 600, 64), np.float32)\n"
        "want = sparge.attention(x, x, x, topk=0.5)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    same = (sparge.attention(x, x, x, topk=0.5) == want).all()\n"
        "    os._exit(0 if same else 1)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_build_info() -> None:
    info = sparge.build_info()
    assert info["block"] == (128, 64) and info["isa"] in info["isas"]
    assert sparge.__version__ == info["version"]


def test_masks_of_any_strides() -> None:
    q, k, v = _numpy(heads=2, kv_heads=2, q_len=300)
    generator = np.random.default_rng(0)
    column = generator.standard_normal((300, 1)).astype(np.float32)
    wide = np.ascontiguousarray(np.broadcast_to(column, (300, 300)))
    turned = np.asfortranarray(generator.random((300, 300)) < 0.7)
    lines = [np.asfortranarray(x) for x in (q, k, v)]
    assert lines[0].strides[-1] != 4
    for of in (lambda x: x, lambda x: Foreign(torch.from_numpy(x))):
        back = lambda x: x.array.numpy() if isinstance(x, Foreign) else x  # noqa: E731
        call = lambda *a: back(sparge.attention(*(of(x) for x in a), topk=1.0))  # noqa: E731
        assert (call(q, k, v, column) == call(q, k, v, wide)).all()
        assert (call(q, k, v, turned) == call(q, k, v, np.ascontiguousarray(turned))).all()
        assert (call(*lines) == call(q, k, v)).all()


def test_block_masks_of_any_strides() -> None:
    q, k, v = _numpy(heads=2, kv_heads=2, q_len=300, batch=2)
    row = np.array([True, False, True, True, False])
    one = np.ones((2, 1, 3, 5), bool)
    one[1, :, 1, 2:] = False
    for blocks in (
        np.broadcast_to(row, (2, 2, 3, 5)),
        np.broadcast_to(one, (2, 2, 3, 5)),
        np.broadcast_to(np.ones(1, bool), (2, 2, 3, 1)).repeat(5, 3)[..., ::-1],
        np.ones((2, 9, 3, 5), bool)[:, :1],
        np.ones((2, 2, 3, 9), bool)[..., :5],
    ):
        want = sparge.block_sparse_attention(q, k, v, np.array(blocks, order="C"))
        assert (sparge.block_sparse_attention(q, k, v, blocks) == want).all()
        foreign = [Foreign(torch.from_numpy(x)) for x in (q, k, v)]
        mask = torch.from_numpy(np.array(blocks, order="C"))
        turned = mask.transpose(2, 3).contiguous().transpose(2, 3)
        got = sparge.block_sparse_attention(*foreign, Foreign(turned))
        assert (got.array.numpy() == want).all()


def test_what_numpy_can_hold_and_we_refuse() -> None:
    q, k, v = _numpy(heads=2, kv_heads=2, q_len=70)
    with pytest.raises(sparge.SpargeError, match="MaskedArray"):
        sparge.attention(np.ma.masked_array(q), k, v)
    with pytest.raises(sparge.SpargeError, match="expected integers"):
        sparge.attention(q, k, v, key_lengths=[3.5], topk=0.5)
    with pytest.raises(sparge.SpargeError, match="multiple of 4"):
        raw = bytearray(4 * q.size + 1)
        view = torch.frombuffer(raw, dtype=torch.uint8)[1:].view(torch.uint8)
        address = view.data_ptr()
        settings = sparge._sparge.Settings("layout=HND")
        odd = (address, q.shape, (70 * 64 * 2, 70 * 64, 64, 1))
        out = np.zeros_like(q)
        sparge._sparge.attend(settings, "f32", 1, odd, odd, odd, out.ctypes.data)
