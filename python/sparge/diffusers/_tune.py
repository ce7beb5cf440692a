"""Calibration of a diffusion transformer: image queries of its own runs, tried with every setting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch

from .._api import attention
from .._calibration import Calibration
from .._config import DENSE, Config
from .._order import check_order
from .._sparge import SpargeError
from .._tune import Progress, Study
from .._types import Stats
from ._attend import Attend, dense
from ._handle import Enabled, transformers_of
from ._models import attention_modules, model_of
from ._steps import Passes

Tensor = torch.Tensor


def tune(
    pipe_or_transformer: Any,
    run: Callable[[], Any],
    *,
    l1: float = 0.05,
    l2: Optional[float] = None,
    by: str = "error",
    every: int = 1,
    order: str = "row",
    name: Optional[str] = None,
    source: str = "runs of the caller",
    progress: Progress = False,
    config: Optional[Config] = None,
    **knobs: Any,
) -> Calibration:
    """Finds what every head may skip within an error bound, while the model runs densely.

    >>> run = lambda: [pipe(prompt, generator=torch.Generator().manual_seed(0)) for prompt in prompts]
    >>> tuned = sparge.diffusers.tune(pipe, run, l1=0.05, l2=0.06, every=10)
    >>> tuned.save("tuned.json"); sparge.diffusers.enable(pipe, calibration=tuned)

    * ``run``: runs the pipeline or transformer on the samples (the paper: five prompts), at the size
      that will be used. It is called twice and should do the same each time (seed the noise inside).
    * ``every``: so many-th denoising steps' calls are tried, from the first on, by the pipeline's
      scheduler; of a bare transformer so many-th forward passes. Default 1: all. A call that is tried
      costs 23 sparse ones in the first run, 8 in the second.
    * ``l1``, ``l2``, ``progress``, ``config`` and knobs: see :func:`sparge.tune`. The bounds of the
      paper are (0.05, 0.06) for CogVideoX and Mochi, (0.07, 0.08) for Flux and SD3.5. Text is as
      :func:`enable` has it, its keys always kept, but its queries are left out: on a GPU, where
      ``enable`` puts them before the image's in one call, text whose length is no multiple of 128
      shifts the image's blocks from those that were tried.
      ``min_kv_len``: calls with fewer keys run dense, default 1024, or the shortest call.
    * ``by``: ``"error"``, the paper's rule: one bound for all layers. ``"effect"``: layers whose error
      moves what ``run`` returns (tensors, anyhow nested) more get a smaller bound, others a larger one
      (1/8 to 8 of the given, which is their geometric mean); ``run`` is called once more per layer.
    * ``order``: as :func:`enable` will be told: settings hold for the order they were found in.
    * ``name``, ``source``: what the file says of the model and the samples.

    Returns the :class:`sparge.Calibration`. The model is as it was afterwards, also where it raises.
    Raises ``SpargeError`` for models that `enable` does not support, by name.
    """
    if type(every) is not int or every < 1:
        raise SpargeError(f"every is {every!r}, expected an integer from 1 on")
    study = Study(l1, l2, by, config, knobs, progress)
    check_order(order)

    def attend_of(layer: int, passes: Passes) -> Attend:
        def attend(
            query: Tensor, key: Tensor, value: Tensor, *, config: Config, scale: Any, keep_keys: Any
        ) -> Tensor:
            want = dense(query, key, value, None, scale)
            steps = passes.steps
            at = steps.step if steps.has_scheduler else passes.count - 1 - begun[passes]
            if at % every:
                return want
            options = {"scale": scale, "keep_keys": keep_keys, "return_stats": True}

            def trial(config: Config) -> "tuple[Tensor, Stats]":
                return attention(query, key, value, config=config, **options)  # type: ignore[no-any-return]

            return study.call(layer, query, key, trial, want)

        begun[passes] = 0
        return attend

    # Forward passes before the running reading.
    begun: dict[Passes, int] = {}

    def read(_: bool) -> Any:
        begun.update((passes, passes.count) for passes in begun)
        return run()

    transformers = transformers_of(pipe_or_transformer)
    count = 1 + max(at for x in transformers for at, _ in attention_modules(x, model_of(x)))
    handle = Enabled(DENSE, 0, frozenset(), None, order, None, attend_of)
    handle._attach_all(pipe_or_transformer)
    with handle, torch.no_grad():
        study.run(read)
    name = name or getattr(transformers[0].config, "_name_or_path", "") or type(transformers[0]).__name__
    return study.calibration(name, source, count, False)
