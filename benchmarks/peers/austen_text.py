"""Extract one Jane Austen novel from Debian's ``r-cran-janeaustenr`` package.

The package (public-domain text) keeps six novels in ``Rdata.rdb``: blocks of a
4-byte big-endian length and a zlib stream, each a serialised R (version 2 or 3,
XDR) character vector with one string per printed line. The lines are joined
with ``\\n`` and written as UTF-8.

Usage::

    apt-get download r-cran-janeaustenr
    python austen_text.py r-cran-janeaustenr_*.deb --out emma.txt
"""

from __future__ import annotations

import argparse
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

RDB = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
# First line of each novel as printed in the package.
TITLES = {
    "emma": "EMMA",
    "mansfield-park": "MANSFIELD PARK",
    "northanger-abbey": "NORTHANGER ABBEY",
    "persuasion": "Persuasion",
    "pride-and-prejudice": "PRIDE AND PREJUDICE",
    "sense-and-sensibility": "SENSE AND SENSIBILITY",
}

STRSXP, CHARSXP = 16, 9


def blocks(data: bytes) -> Iterator[bytes]:
    """Yield the decompressed blocks of an R lazy-load database."""
    at = 0
    while at + 4 <= len(data):
        (raw_len,) = struct.unpack_from(">I", data, at)
        stream = zlib.decompressobj()
        raw = stream.decompress(data[at + 4 :]) + stream.flush()
        if len(raw) != raw_len:
            raise ValueError(f"block at {at}: {len(raw)} bytes, header says {raw_len}")
        yield raw
        at = len(data) - len(stream.unused_data)


def character_vector(raw: bytes) -> list[str] | None:
    """Decode a serialised character vector; None if ``raw`` is something else."""
    if raw[:2] != b"X\n":
        return None
    at = 2

    def integer() -> int:
        nonlocal at
        (value,) = struct.unpack_from(">i", raw, at)
        at += 4
        return value

    version = integer()
    at += 8  # writer version, lowest reader version
    if version == 3:
        name_length = integer()  # of the native encoding
        at += name_length
    if integer() & 0xFF != STRSXP:
        return None
    lines = []
    for _ in range(integer()):
        if integer() & 0xFF != CHARSXP:
            raise ValueError("a string was expected inside the character vector")
        length = integer()
        lines.append("" if length < 0 else raw[at : at + length].decode("utf-8"))
        at += max(length, 0)
    return lines


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, help="the .deb file, or Rdata.rdb itself")
    parser.add_argument("--novel", choices=sorted(TITLES), default="emma")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    if args.package.suffix == ".deb":
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["dpkg-deb", "-x", args.package, folder], check=True)
            data = (Path(folder) / RDB).read_bytes()
    else:
        data = args.package.read_bytes()

    first_lines = []
    for raw in blocks(data):
        lines = character_vector(raw)
        if not lines:
            continue
        first_lines.append(lines[0])
        if lines[0].strip() == TITLES[args.novel]:
            text = "\n".join(lines)
            args.out.write_text(text, encoding="utf-8", newline="\n")
            print(f"{args.out}: {len(text)} characters", file=sys.stderr)
            return 0
    print(f"{args.novel} not found; first lines seen: {first_lines}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
