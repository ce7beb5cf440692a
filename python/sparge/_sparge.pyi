from typing import Any, Optional, TypedDict, final

__all__ = [
    "Array",
    "CudaCall",
    "Settings",
    "SpargeError",
    "attend",
    "info",
    "predict",
    "quantize",
    "token_order",
]

_Four = tuple[int, int, int, int]
_Raw = tuple[int, _Four, _Four]

class SpargeError(ValueError): ...

class _Extra(TypedDict):
    bool_mask: Optional[_Raw]
    bias: Optional[_Raw]
    block_mask: Optional[_Raw]
    kv_lens: Optional[list[int]]
    lse: int
    mask_out: int
    counts: int

@final
class Settings:
    def __new__(cls, text: str) -> Settings: ...
    @property
    def policy(self) -> Optional[tuple[str, dict[str, Any]]]: ...
    def check_policy(self, has_element_mask: bool) -> None: ...
    @property
    def visibility(self) -> tuple[bool, Optional[int], Optional[int], int]: ...
    @property
    def scale(self) -> Optional[float]: ...

_Masks = Optional[tuple[Optional[_Raw], Optional[_Raw]]]

@final
class CudaCall:
    def __new__(
        cls,
        ordinal: int,
        nvrtc_dirs: list[str],
        dtype: str,
        shapes: tuple[_Four, _Four, _Four],
        settings: Settings,
        precision: str,
        kv_lens: Optional[list[int]],
        element_mask: Optional[tuple[str, bool]],
        block_mask: bool,
    ) -> CudaCall: ...
    @property
    def workspace_bytes(self) -> int: ...
    @property
    def mask_shape(self) -> list[int]: ...
    @property
    def predicts(self) -> bool: ...
    @property
    def is_fast(self) -> bool: ...
    def forward(
        self,
        stream: int,
        q: _Raw,
        k: _Raw,
        v: _Raw,
        out: _Raw,
        lse: int,
        stats: int,
        masks: _Masks,
        workspace: int,
    ) -> None: ...
    def select(
        self, stream: int, q: _Raw, k: _Raw, v: _Raw, masks: _Masks, mask: int, workspace: int
    ) -> None: ...
    def attend(
        self,
        stream: int,
        q: _Raw,
        k: _Raw,
        v: _Raw,
        out: _Raw,
        lse: int,
        stats: int,
        masks: _Masks,
        mask: int,
        workspace: int,
    ) -> None: ...

@final
class Array:
    @staticmethod
    def take(array: Any) -> Array: ...
    @staticmethod
    def zeros(shape: list[int], dtype: str) -> Array: ...
    def copied(self, columns: Optional[int] = None) -> Array: ...
    @property
    def address(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def strides(self) -> tuple[int, ...]: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    def __dlpack__(self, **options: Any) -> Any: ...

def attend(
    settings: Settings,
    dtype: str,
    threads: int,
    q: _Raw,
    k: _Raw,
    v: _Raw,
    out: int,
    extra: Optional[_Extra] = None,
) -> tuple[float, float]: ...
def predict(
    settings: Settings, dtype: str, threads: int, q: _Raw, k: _Raw, extra: _Extra
) -> None: ...
def quantize(
    dtype: str, layout: str, threads: int, k: _Raw, out: tuple[int, int, int]
) -> None: ...
def info() -> dict[str, Any]: ...
def token_order(order: str, shape: tuple[int, int, int]) -> bytearray: ...
