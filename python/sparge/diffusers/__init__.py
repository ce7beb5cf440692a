"""diffusers pipelines and transformers: ``sparge.diffusers.enable(pipe)``.

>>> import sparge.diffusers
>>> handle = sparge.diffusers.enable(pipe, topk=0.5, dense_steps=2, dense_layers=1)
>>> video = pipe(prompt).frames
>>> handle.disable()                     # the pipeline is as it was

Models: CogVideoX, Mochi, SD3 (through processors of this package); Flux, Wan, HunyuanVideo, LTX,
Qwen-Image (through diffusers' attention dispatcher). Self-attention over image tokens becomes
sparse. Text queries stay exact (SDPA), and every image query attends all text keys. Attention to a
separate text encoder's output is untouched.
"""

from ._handle import Enabled, enable
from ._models import MODELS

__all__ = ["MODELS", "Enabled", "enable"]
