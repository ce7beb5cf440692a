"""Sparse, quantised attention: SpargeAttn (arXiv 2502.18137) for PyTorch, numpy and DLPack arrays.

``sparge.attention`` has the keywords and the semantics of
``torch.nn.functional.scaled_dot_product_attention`` and computes only the blocks of the attention
map that matter. Importing this package imports neither torch nor numpy; what is called decides.

>>> import numpy as np, sparge
>>> q = np.random.default_rng(0).standard_normal((1, 4, 2048, 64), dtype=np.float32)
>>> sparge.attention(q, q, q, is_causal=True, topk=0.5).shape
(1, 4, 2048, 64)
"""

from ._api import attention, block_sparse_attention, predict, quantize, tune
from ._build import build_info
from ._calibration import Calibration, load_calibration
from ._config import Config
from ._mask import BlockMask
from ._order import token_order
from ._sparge import SpargeError
from ._types import Quantized, Stats

__version__: str = build_info()["version"]

__all__ = [
    "BlockMask",
    "Calibration",
    "Config",
    "Quantized",
    "SpargeError",
    "Stats",
    "attention",
    "block_sparse_attention",
    "build_info",
    "load_calibration",
    "predict",
    "quantize",
    "token_order",
    "tune",
]
