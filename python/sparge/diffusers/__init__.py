"""diffusers pipelines and transformers: ``sparge.diffusers.enable(pipe)``.

>>> import sparge.diffusers
>>> handle = sparge.diffusers.enable(pipe, topk=0.5, dense_steps=2, dense_layers=1)
>>> video = pipe(prompt).frames
>>> handle.disable()                     # the pipeline is as it was

``sparge.diffusers.tune(pipe, run)`` finds what each head may skip, for ``enable(calibration=)``.
``order="hilbert"`` puts image tokens along a Hilbert curve, once per forward pass, so that blocks are
compact and more of them can be skipped; ``reuse_mask=4`` predicts in every fourth step.

Models: CogVideoX, Mochi, SD3 (through processors of this package); Flux, Wan, HunyuanVideo, LTX,
Qwen-Image (through diffusers' attention dispatcher). Self-attention over image tokens becomes
sparse. Text queries attend everything (on the CPU and with ``reuse_mask`` by SDPA, else in the one call of a
GPU), and every image query attends all text keys. Attention to a
separate text encoder's output is untouched.
"""

from ._handle import Enabled, enable
from ._models import MODELS
from ._reuse import MaskCounts, Reuse
from ._tune import tune

__all__ = ["MODELS", "Enabled", "MaskCounts", "Reuse", "enable", "tune"]
