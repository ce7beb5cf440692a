"""How near one sample is to another: pixels in 0 to 1, ``[n, frames, height, width, 3]``."""

from __future__ import annotations

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Per sample, in dB; equal samples are 100."""
    error = (a.float() - b.float()).square().flatten(1).mean(1)
    return (-10 * error.clamp(min=1e-10).log10()).cpu()


def temporal_psnr(a: Tensor, b: Tensor) -> Tensor:
    """PSNR of the differences of neighbouring frames: flicker that frames alone do not show."""
    return psnr(a.diff(dim=1), b.diff(dim=1))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Per sample: the usual 11x11 Gaussian window (σ 1.5), mean over colours and frames."""
    x = torch.arange(11, dtype=torch.float32, device=a.device) - 5
    line = torch.exp(-x.square() / (2 * 1.5**2))
    kernel = torch.outer(line, line) / line.sum() ** 2

    def blur(z: Tensor) -> Tensor:
        return F.conv2d(z, kernel[None, None])

    n = len(a)
    a, b = (z.float().permute(0, 1, 4, 2, 3).reshape(-1, 1, *z.shape[2:4]) for z in (a, b))
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    cov = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    index = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return index.view(n, -1).mean(1).cpu()


def relative_l1(got: Tensor, want: Tensor) -> float:
    return ((got.float() - want.float()).abs().sum() / want.float().abs().sum()).item()
