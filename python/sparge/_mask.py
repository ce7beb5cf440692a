"""Block masks: which 128×64 blocks of the attention map are computed."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Any, Optional

BLOCK_Q = 128
BLOCK_KV = 64


@dataclass(frozen=True)
class BlockMask:
    """A ``[batch, heads, ceil(q_len / 128), ceil(kv_len / 64)]`` boolean tensor; True is computed.

    The geometry is the same on every device. ``tensor`` is torch's or numpy's, as the queries
    were; index it, edit it, save it as one. Where a 1 stands for batch or heads it broadcasts.
    """

    tensor: Any
    q_len: int
    kv_len: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(batch, heads, q_blocks, kv_blocks)``."""
        batch, heads, q_blocks, kv_blocks = (int(n) for n in self.tensor.shape)
        return batch, heads, q_blocks, kv_blocks

    def density(self) -> float:
        """Share of all blocks that are set (also of those that a causal row cannot see)."""
        count = 1
        for n in self.shape:
            count *= n
        return float(self.tensor.sum()) / count if count else 0.0

    def plot(
        self, path: Optional[str] = None, *, batch: int = 0, head: int = 0, pixels: int = 4
    ) -> bytes:
        """One head as a PNG picture: queries downwards, keys to the right, dark is computed.

        Key blocks are ``pixels`` wide and query blocks twice as high, so that a token has the same
        size in both directions. Writes to ``path`` where given; returns the file's bytes.
        """
        rows = self.tensor[batch, head].tolist()
        lines = []
        for row in rows:
            line = b"\0" + b"".join((b"\x1b" if x else b"\xf4") * pixels for x in row)
            lines.append(line * (2 * pixels))
        width, height = len(rows[0]) * pixels if rows else 0, len(rows) * 2 * pixels
        png = _png(width, height, b"".join(lines))
        if path is not None:
            with open(path, "wb") as file:
                file.write(png)
        return png

    def _repr_png_(self) -> bytes:
        return self.plot()


def _png(width: int, height: int, lines: bytes) -> bytes:
    """An 8-bit grey picture; each line starts with its filter byte."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body
