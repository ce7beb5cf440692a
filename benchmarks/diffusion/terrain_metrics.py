"""How far a map is from the dense one: PSNR and SSIM.

Both take the range of the dense map, its largest less its smallest value, as the range of the
picture. The maps fill a part of −1..1 only, so this is stricter than the full range would be.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def compare(map_: Tensor, exact: Tensor) -> tuple[float, float]:
    """PSNR in dB and SSIM of one map `[1, 1, height, width]`."""
    map_, exact = map_.double().cpu(), exact.double().cpu()
    extent = (exact.max() - exact.min()).item()
    error = (map_ - exact).square().mean().item()
    psnr = 10 * math.log10(extent**2 / error) if error else math.inf
    return psnr, _ssim(map_, exact, extent)


def _ssim(a: Tensor, b: Tensor, extent: float) -> float:
    """Wang et al. 2004: Gaussian window of 11×11, σ 1.5, K1 0.01, K2 0.03; where it fits whole."""
    line = torch.exp(-((torch.arange(11, dtype=a.dtype) - 5) ** 2) / (2 * 1.5**2))
    line = line / line.sum()

    def smooth(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, line.view(1, 1, 1, 11)), line.view(1, 1, 11, 1))

    c1, c2 = (0.01 * extent) ** 2, (0.03 * extent) ** 2
    mean_a, mean_b = smooth(a), smooth(b)
    var_a, var_b = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2
    both = smooth(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * both + c2) / (var_a + var_b + c2)
    return (luminance * structure).mean().item()
