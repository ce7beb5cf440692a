"""Switching a pipeline over, and back exactly."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Iterable
from typing import Any, Optional, Union

import torch

from .._calibration import Calibration, load_calibration
from .._config import Config, parsed
from .._sparge import SpargeError
from . import _backend, _processors
from ._models import Model, attention_modules, model_of


# Transformers that run sparse: their handle must be disabled before they are enabled again.
_enabled: "weakref.WeakSet[torch.nn.Module]" = weakref.WeakSet()


class Layer:
    """What one attention module needs to know during a forward pass."""

    def __init__(self, handle: "Enabled", index: int, model: Model) -> None:
        self.handle = handle
        self.index = index
        self.model = model

    def config(self) -> Optional[Config]:
        """The settings now; None while this layer or step is dense."""
        return self.handle.config_of(self.index)

    def text_len(self) -> int:
        """Text tokens of the joint sequence in the running forward pass."""
        return self.handle.text_len


class Enabled:
    """A pipeline or transformer that runs sparse, until :meth:`disable`."""

    def __init__(
        self,
        config: Config,
        dense_steps: int,
        dense_layers: frozenset[int],
        calibration: Optional[Calibration],
    ) -> None:
        #: Denoising steps done since the schedule began. Counted where there is a scheduler;
        #: set it yourself otherwise.
        self.step = 0
        self.text_len = 0
        self._config = config
        self._dense_steps = dense_steps
        self._dense_layers = dense_layers
        self._calibration = calibration
        self._undo: list[Any] = []
        self._pipe: Any = None
        self._scheduler: Any = None
        self._uncount: list[Any] = []
        self._settings: dict[int, Config] = {}

    def config_of(self, layer: int) -> Optional[Config]:
        """The settings of a layer at the current step; None where it is dense."""
        if self.step < self._dense_steps or layer in self._dense_layers:
            return None
        if self._calibration is None:
            return self._config
        found = self._settings.get(layer)
        if found is None:
            found = self._calibration.layer(layer).override(**self._config.given())
            self._settings[layer] = found
        return found

    def disable(self) -> None:
        """Restores everything that `enable` changed, also where one part fails: the first failure is
        raised at the end."""
        self._pipe = self._scheduler = None
        failed = _run_all(self._uncount + self._undo)
        self._uncount, self._undo = [], []
        if failed is not None:
            raise failed

    def __enter__(self) -> "Enabled":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.disable()

    def _attach(self, transformer: torch.nn.Module) -> None:
        if transformer in _enabled:
            raise SpargeError(
                f"this {type(transformer).__name__} is enabled already; call disable() of the handle "
                "that enable() returned first"
            )
        model = model_of(transformer)
        modules = list(attention_modules(transformer, model))
        if not modules:
            raise SpargeError(f"{type(transformer).__name__} has no attention layers")
        for _, module in modules:
            _processors.check(module, model)
        _enabled.add(transformer)
        self._undo.append(lambda: _enabled.discard(transformer))
        self._watch_text(transformer)
        for index, module in modules:
            layer = Layer(self, index, model)
            if model.processor is not None:
                self._replace(module, _processors.of(model.processor, layer))
            else:
                self._dispatch(module, layer)

    def _replace(self, module: Any, processor: Any) -> None:
        before = module.processor
        module.processor = processor
        self._undo.append(lambda: setattr(module, "processor", before))

    def _dispatch(self, module: Any, layer: Layer) -> None:
        """The stock processor, told to use our backend, with the layer announced around it."""
        processor = module.processor
        had, before = "_attention_backend" in vars(processor), processor._attention_backend

        def restore() -> None:
            if had:
                processor._attention_backend = before
            else:
                del processor._attention_backend

        processor._attention_backend = _backend.NAME
        self._undo.append(restore)
        enter = module.register_forward_pre_hook(lambda *_: _backend.enter(layer))
        leave = module.register_forward_hook(lambda *_: _backend.leave(), always_call=True)
        self._undo += [enter.remove, leave.remove]

    def _watch_text(self, transformer: torch.nn.Module) -> None:
        """Notes how many text tokens each forward pass has."""
        names = list(inspect.signature(transformer.forward).parameters)

        def note(_: Any, args: "tuple[Any, ...]", kwargs: "dict[str, Any]") -> None:
            given = dict(zip(names, args), **kwargs)
            text = given.get("encoder_hidden_states")
            self.text_len = 0 if text is None else int(text.shape[1])
            self._count_steps()

        self._undo.append(transformer.register_forward_pre_hook(note, with_kwargs=True).remove)

    def _count_steps(self) -> None:
        """Watches the pipeline's scheduler, also one that has replaced another."""
        scheduler = getattr(self._pipe, "scheduler", None)
        if scheduler is self._scheduler:
            return
        _run_all(self._uncount)
        self._scheduler, self.step = scheduler, 0
        if scheduler is None:
            return
        before = {name: vars(scheduler).get(name) for name in ("step", "set_timesteps")}
        step, begin = scheduler.step, scheduler.set_timesteps

        @functools.wraps(step)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.step += 1
            return step(*args, **kwargs)

        @functools.wraps(begin)
        def begun(*args: Any, **kwargs: Any) -> Any:
            self.step = 0
            return begin(*args, **kwargs)

        def restore() -> None:
            for name, value in before.items():
                if value is None:
                    vars(scheduler).pop(name, None)
                else:
                    setattr(scheduler, name, value)

        scheduler.step, scheduler.set_timesteps = counted, begun
        self._uncount.append(restore)


def _run_all(undo: "list[Any]") -> Optional[BaseException]:
    """Runs every one, the latest first; the first failure."""
    failed: Optional[BaseException] = None
    while undo:
        try:
            undo.pop()()
        except Exception as error:  # the others still have to be undone
            failed = failed or error
    return failed


def enable(
    pipe_or_transformer: Any,
    *,
    config: Optional[Config] = None,
    dense_steps: int = 0,
    dense_layers: Union[int, Iterable[int]] = 0,
    calibration: Union[str, "dict[str, Any]", Calibration, None] = None,
    **knobs: Any,
) -> Enabled:
    """Makes the self-attention of a diffusers pipeline or transformer sparse.

    * ``topk``, ``cdf``, ``theta``, ``pv_gap``, ``policy``, …: the fields of ``sparge.Config``, or a
      whole ``config``. Left to the defaults, sequences below 1024 tokens stay exact.
    * ``dense_steps``: denoising steps at the start that stay dense. A pipeline counts them by its
      scheduler; with a bare transformer set ``handle.step``.
    * ``dense_layers``: the first so many blocks, or the indices of blocks, that stay dense.
    * ``calibration``: a calibration file's path or parsed JSON.

    Returns the handle whose ``disable()`` restores the model; it is a context manager too.
    Raises ``SpargeError`` for models and processors that are not supported, by name, and for a
    transformer that is enabled already.
    """
    layers = range(dense_layers) if isinstance(dense_layers, int) else dense_layers
    config = (config or Config()).override(**knobs)
    parsed(config.text())  # refuses bad settings here rather than in the middle of a forward pass
    handle = Enabled(
        config,
        dense_steps,
        frozenset(layers),
        None if calibration is None else load_calibration(calibration),
    )
    transformers = [
        x
        for name in ("transformer", "transformer_2")
        if isinstance(x := getattr(pipe_or_transformer, name, None), torch.nn.Module)
    ]
    if isinstance(pipe_or_transformer, torch.nn.Module):
        transformers = [pipe_or_transformer]
    if not transformers:
        raise SpargeError(
            f"{type(pipe_or_transformer).__name__} has no transformer; pass a pipeline of a "
            "diffusion transformer, or the transformer itself"
        )
    try:
        for transformer in transformers:
            handle._attach(transformer)
        handle._pipe = pipe_or_transformer
        handle._count_steps()
    except BaseException:
        handle.disable()
        raise
    return handle


__all__ = ["Enabled", "enable"]
