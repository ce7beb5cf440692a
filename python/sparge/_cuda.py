"""The operators on CUDA tensors: sparge-cuda on torch's streams, with memory from torch's allocator.

Nothing here waits for the device or copies from the host once a kind of call has been made, so calls
can be captured in CUDA graphs (run each kind once before capturing: its kernels are compiled then).
Three do wait: key lengths on a GPU, a prediction that leaves nothing out, and `policy="random"`
(`_policies.on_the_host`).
"""

from __future__ import annotations

import contextlib
import math
import os
from typing import Any, Optional

import torch

from . import _sparge
from ._config import parsed
from ._mask import BLOCK_KV
from ._ops_shapes import DTYPES, MAX_DIM, check_dtype, heads_and_lens, mask_shape, out_shape
from ._policies import chosen, on_the_host
from ._sparge import SpargeError

Tensor = torch.Tensor

_calls: "dict[Any, _sparge.CudaCall]" = {}


def nvrtc_dirs() -> "list[str]":
    """Where this torch's own NVRTC is; nothing where the user has said which one to take."""
    if os.environ.get("SPARGE_NVRTC"):
        return []
    site = os.path.dirname(os.path.dirname(torch.__file__))
    places = [os.path.join(site, "nvidia", p, "lib") for p in ("cu13", "cuda_nvrtc")]
    places.append(os.path.join(os.path.dirname(torch.__file__), "lib"))
    return [place for place in places if os.path.isdir(place)]


def _raw(tensor: Tensor) -> "tuple[Tensor, _sparge._Raw]":
    """A tensor the kernels can read (16-byte steps), and its address, sizes and strides."""
    strides = tensor.stride()
    address = tensor.data_ptr()
    a, b, c, last = strides
    # All are multiples of a power of two if their bits together are one.
    if last != 1 or address % 16 or (a | b | c) * tensor.element_size() % 16:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        strides, address = tensor.stride(), tensor.data_ptr()
    return tensor, (address, tensor.shape, strides)  # type: ignore[return-value]


class _Call:
    """One call: its kind, its tensors, the current stream of its device."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Optional[Tensor],
        block_mask: Optional[Tensor],
        kv_lens: Optional[Tensor],
        settings: str,
    ) -> None:
        self.device = device = query.device
        # Kernels get addresses: nothing below would notice.
        if not (
            query.is_cuda
            and key.device == device
            and value.device == device
            and (attn_mask is None or attn_mask.device == device)
            and (block_mask is None or block_mask.device == device)
        ):
            raise _not_on_one_gpu(query, key, value, attn_mask, block_mask)
        lens = None if kv_lens is None else _host_lens(kv_lens)
        element = None
        if attn_mask is not None:
            if attn_mask.ndim != 4:
                raise SpargeError(f"attn_mask has {attn_mask.ndim} dimensions, expected 4")
            kind = "bool" if attn_mask.dtype == torch.bool else DTYPES.get(attn_mask.dtype)
            if kind is None:
                raise SpargeError(f"attn_mask is {attn_mask.dtype}, expected bool or float32")
            element = (kind, attn_mask.shape[1] > 1)
        self.kind = _kind(
            device, query, key, value, settings, lens, element, block_mask is not None
        )
        self.query, self.q = _raw(query)
        self.key, self.k = _raw(key)
        self.value, self.v = _raw(value)
        self.masks = None
        self.held: list[Tensor] = []
        if attn_mask is not None or block_mask is not None:
            kv_blocks = mask_shape(query, key, settings)[3]
            self.masks = (
                self._element(attn_mask, query, key, settings),
                self._blocks(block_mask, kv_blocks),
            )
        # What another method chooses, bool; None: the operator's own prediction.
        self.chosen: Optional[Tensor] = None
        if " policy=" in settings:
            host = None if lens is None else torch.tensor(lens, device="cpu")
            self.chosen = chosen(query, key, attn_mask, block_mask, host, settings)
        self.stream = torch._C._cuda_getCurrentRawStream(device.index)
        # Freed to the allocator right after the launch: what reuses it runs later on this stream.
        self.workspace = query.new_empty(self.kind.workspace_bytes, dtype=torch.uint8)

    def _element(
        self, mask: Optional[Tensor], query: Tensor, key: Tensor, settings: str
    ) -> "Optional[_sparge._Raw]":
        if mask is None:
            return None
        batch, heads, q_len, kv_len = heads_and_lens(query, key, settings)
        fits = mask.shape[0] in (1, batch) and mask.shape[1] in (1, heads)
        if not fits or mask.shape[2:] != (q_len, kv_len):
            raise SpargeError(
                f"attn_mask has shape {tuple(mask.shape)}, expected "
                f"[{batch} or 1, {heads} or 1, {q_len}, {kv_len}]"
            )
        if mask.stride(3) != 1:
            mask = mask.contiguous()
        self.held.append(mask)
        return mask.data_ptr(), mask.shape, mask.stride()  # type: ignore[return-value]

    def _blocks(self, mask: Optional[Tensor], kv_blocks: int) -> "Optional[_sparge._Raw]":
        if mask is None:
            return None
        batch, heads, q_blocks, words = self.kind.mask_shape
        fits = mask.ndim == 4 and mask.shape[0] in (1, batch) and mask.shape[1] in (1, heads)
        if mask.dtype != torch.bool or not fits or mask.shape[2:] != (q_blocks, kv_blocks):
            raise SpargeError(
                f"block_mask has shape {tuple(mask.shape)} and type {mask.dtype}, expected bool "
                f"[{batch} or 1, {heads} or 1, {q_blocks}, {kv_blocks}]"
            )
        packed = pack(mask, words)
        self.held.append(packed)
        return packed.data_ptr(), packed.shape, packed.stride()  # type: ignore[return-value]

    def run(self, out: Tensor, lse: int, stats: int, settings: str) -> None:
        """Enqueues the operator, and between its two stages what `keep_keys`, `keep_queries` and other
        methods' choices ask for."""
        at: Any = (out.data_ptr(), out.shape, out.stride())
        tensors = (self.stream, self.q, self.k, self.v)
        with _on(self.device):
            if self.chosen is None and not (_keeps_more(settings) and self.kind.predicts):
                self.kind.forward(*tensors, at, lse, stats, self.masks, self.workspace.data_ptr())
                return
            words = self.select()  # predicts nothing where something is chosen, but quantises
            if self.chosen is not None:
                words = pack(self.chosen, words.shape[3])
            _keep_more(words, settings)
            self.kind.attend(
                *tensors, at, lse, stats, self.masks, words.data_ptr(), self.workspace.data_ptr()
            )

    def select(self) -> Tensor:
        """Enqueues stage 1; the mask's words, int32."""
        words = self.query.new_empty(self.kind.mask_shape, dtype=torch.int32)
        with _on(self.device):
            self.kind.select(
                self.stream, self.q, self.k, self.v, self.masks, words.data_ptr(),
                self.workspace.data_ptr(),
            )  # fmt: skip
        return words


_here = contextlib.nullcontext()


def _on(device: torch.device) -> "contextlib.AbstractContextManager[Any]":
    """Makes a device current where it is not: the launch leaves its context current."""
    is_current = torch._C._cuda_getDevice() == device.index
    return _here if is_current else torch.cuda.device(device)


def _not_on_one_gpu(query: Tensor, *others: Optional[Tensor]) -> SpargeError:
    """Which tensor is where."""
    names = ("query", "key", "value", "attn_mask", "block_mask")
    for name, tensor in zip(names, (query, *others)):
        if tensor is not None and (tensor.device != query.device or not tensor.is_cuda):
            return SpargeError(
                f"{name} is on {tensor.device} and query on {query.device}; "
                "they must be on one GPU"
            )
    raise AssertionError("all are on one GPU")


def _kind(
    device: torch.device,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    settings: str,
    lens: Optional[tuple[int, ...]],
    element: Optional[tuple[str, bool]],
    has_blocks: bool,
) -> "_sparge.CudaCall":
    """The prepared call of this kind, kept: making it costs a validation, at first a compilation."""
    about = (
        device.index, query.dtype, key.dtype, value.dtype, query.shape, key.shape, value.shape,
        settings, lens, element, has_blocks,
    )  # fmt: skip
    kind = _calls.get(about)
    if kind is None:
        dtype = check_dtype(query, key, value)
        if len(_calls) > 1024:
            _calls.clear()
        text, precision = _for_cuda(settings)
        with _on(device):
            kind = _sparge.CudaCall(
                device.index,
                nvrtc_dirs(),
                dtype,
                (tuple(query.shape), tuple(key.shape), tuple(value.shape)),  # type: ignore[arg-type]
                parsed(text),
                precision,
                None if lens is None else list(lens),
                element,
                has_blocks,
            )
        _calls[about] = kind
    return kind


def _host_lens(kv_lens: Tensor) -> tuple[int, ...]:
    """The lengths, which decide the shape of the work: on a GPU tensor this waits for the device."""
    if kv_lens.dtype != torch.int64 or kv_lens.ndim != 1:
        raise SpargeError(
            f"kv_lens is {kv_lens.dtype} with {kv_lens.ndim} dimensions, expected int64 with 1"
        )
    lens: tuple[int, ...] = tuple(kv_lens.tolist())
    if any(n < 0 for n in lens):
        raise SpargeError(f"kv_lens has the negative length {min(lens)}")
    return lens


def _for_cuda(settings: str) -> tuple[str, str]:
    """The settings and the arithmetic on a GPU. What asks for everything and no stage 2 wants
    exactness, so it gets 16-bit products."""
    words = settings.split()
    if any(word.startswith("isa=") for word in words):
        raise SpargeError("isa is a setting of the CPU; leave it out on CUDA tensors")
    if "qk=f32" in words:
        raise NotImplementedError("qk='f32' is not available on the GPU: leave it out, or 'half'")
    exact = "select=all" in words and "pv_gap=inf" in words
    precision = "half" if exact or "qk=half" in words else "quantized"
    words = [word for word in words if not word.startswith("qk=")]
    # What other methods choose is chosen before the call.
    words = ["topk=1.0" if word.startswith("policy=") else word for word in words]
    return " ".join(words), precision


_bits: dict[Any, Tensor] = {}


def _byte(device: torch.device) -> Tensor:
    """The bits of a byte, the lowest first, kept on the device."""
    found = _bits.get(device)
    if found is None:
        found = _bits[device] = torch.tensor(
            [1 << bit for bit in range(8)], dtype=torch.uint8, device=device
        )
    return found


def pack(mask: Tensor, words: int) -> Tensor:
    """A bool block mask as 32-bit words, the lowest bit first."""
    missing = words * 32 - mask.shape[3]
    if missing:
        mask = torch.nn.functional.pad(mask, (0, missing))
    bits = mask.view(torch.uint8).unflatten(3, (words * 4, 8)) * _byte(mask.device)
    return bits.sum(-1, dtype=torch.uint8).contiguous().view(torch.int32)


def unpack(words: Tensor, kv_blocks: int) -> Tensor:
    """32-bit words as a bool block mask."""
    bits = words.view(torch.uint8)[..., None] & _byte(words.device)
    return bits.flatten(3)[..., :kv_blocks] != 0


# Never cleared: captured graphs hold their addresses. A row of words each.
_kept: dict[Any, Tensor] = {}


def _keeps_more(settings: str) -> bool:
    return " keep_keys=" in settings or " keep_queries=" in settings


def _keep_more(words: Tensor, settings: str) -> None:
    """Sets, in a mask's words, the blocks that the settings keep whatever is predicted: those of
    ``from:to,…`` keys in every row, all in the rows of ``from:to,…`` queries."""
    keys = _setting(settings, "keep_keys=")
    if keys:
        about = (words.device.index, words.shape[3], keys)
        found = _kept.get(about)
        if found is None:
            kept = torch.zeros(1, 1, 1, words.shape[3] * 32, dtype=torch.bool, device="cpu")
            for start, end in _ranges(keys):
                kept[..., start // 64 : -(-end // 64)] = True
            found = _kept[about] = pack(kept, words.shape[3]).to(words.device)
        words |= found
    for start, end in _ranges(_setting(settings, "keep_queries=")):
        words[:, :, start // 128 : -(-end // 128)] = -1


def _ranges(text: str) -> "list[tuple[int, int]]":
    pairs = (part.split(":") for part in text.split(",") if part)
    return [(int(start), int(end)) for start, end in pairs]


def _setting(settings: str, name: str) -> str:
    at = settings.find(" " + name)
    return settings[at + 1 + len(name) :].split(" ", 1)[0] if at >= 0 else ""


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Optional[Tensor],
    block_mask: Optional[Tensor],
    kv_lens: Optional[Tensor],
    settings: str,
) -> Tensor:
    """``sparge::attention`` on CUDA."""
    call = _Call(query, key, value, attn_mask, block_mask, kv_lens, settings)
    out = query.new_empty(out_shape(query, value))
    call.run(out, 0, 0, settings)
    return out


def attention_full(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Optional[Tensor],
    block_mask: Optional[Tensor],
    kv_lens: Optional[Tensor],
    settings: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``sparge::attention_full`` on CUDA."""
    call = _Call(query, key, value, attn_mask, block_mask, kv_lens, settings)
    batch, heads, q_len, _ = heads_and_lens(query, key, settings)
    out = query.new_empty(out_shape(query, value))
    lse = query.new_empty((batch, heads, q_len), dtype=torch.float32)
    counts = query.new_empty((batch, heads, 4), dtype=torch.int64)
    call.run(out, lse.data_ptr(), counts.data_ptr(), settings)
    return out, lse, counts


def predict(
    query: Tensor,
    key: Tensor,
    attn_mask: Optional[Tensor],
    block_mask: Optional[Tensor],
    kv_lens: Optional[Tensor],
    settings: str,
) -> Tensor:
    """``sparge::predict`` on CUDA."""
    call = _Call(query, key, key, attn_mask, block_mask, kv_lens, settings)
    if call.chosen is not None:
        if not _keeps_more(settings):
            return call.chosen
        found = pack(call.chosen, call.kind.mask_shape[3])
    elif call.kind.predicts:
        found = call.select()
    else:
        return on_the_host(query, key, attn_mask, block_mask, kv_lens, settings)
    _keep_more(found, settings)
    return unpack(found, mask_shape(query, key, settings)[3])


def quantize(key: Tensor, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """``sparge::quantize`` in plain torch operations: what the kernels keep (tiles of their own order,
    less the mean of all keys) is another thing than what `Quantized` says.

    Each step is the CPU's, sums in its order too, so the results are equal bit for bit.
    """
    check_dtype(key, key, key)
    if 0 in key.shape or key.shape[3] > MAX_DIM:
        raise SpargeError(
            f"key has shape {tuple(key.shape)}, expected no size of 0 and a head_dim up to {MAX_DIM}"
        )
    rows = key.detach().float()
    if layout == "NHD":
        rows = rows.transpose(1, 2)
    length = rows.shape[2]
    padded = torch.nn.functional.pad(rows, (0, 0, 0, -length % BLOCK_KV))
    blocks = padded.unflatten(2, (-1, BLOCK_KV))
    means = torch.zeros_like(blocks[:, :, :, 0])
    for token in range(BLOCK_KV):
        means = means + blocks[:, :, :, token]
    # Divisors are tensors: by a number a GPU multiplies with the reciprocal, which rounds otherwise.
    starts = torch.arange(0, length, BLOCK_KV, device=key.device)
    means = means / (length - starts).clamp(max=BLOCK_KV).float()[:, None]
    rows = (blocks - means[:, :, :, None]).flatten(2, 3)[:, :, :length]
    largest = rows.abs().amax(-1)
    most = torch.full_like(largest, 127.0)
    # Infinite where the largest is 0 or so small that 127/largest overflows: conversions saturate.
    scaled = (rows * (most / largest)[..., None]).round().nan_to_num(0.0, 127.0, -128.0)
    is_finite = rows.isfinite().all(-1)
    values = torch.where(is_finite[..., None], scaled, 0.0).to(torch.int8)
    scales = torch.where(is_finite, largest / most, math.nan)
    return values.contiguous(), scales.contiguous(), means.contiguous()
