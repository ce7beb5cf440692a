"""Switching a pipeline over, and back exactly."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Optional, Union

import torch

from .._calibration import Calibration, load_calibration
from .._config import Config, parsed
from .._order import check_order
from .._sparge import SpargeError
from . import _backend, _processors
from ._attend import Attend
from ._models import Model, attention_modules, model_of
from ._order import Ordered
from ._reuse import MaskCounts, Masks, Reuse
from ._steps import Passes, Steps, run_all

# Transformers that run sparse: their handle must be disabled before they are enabled again.
_enabled: "weakref.WeakSet[torch.nn.Module]" = weakref.WeakSet()


class Layer:
    """What one attention module needs to know during a forward pass."""

    def __init__(self, handle: "Enabled", index: int, model: Model, attend: Attend) -> None:
        self.handle = handle
        self.index = index
        self.model = model
        #: Computes the image queries; None: `sparge.attention`.
        self.attend = attend

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
        order: str,
        reuse: Optional[Reuse],
        attend: "Optional[Callable[[int, Passes], Attend]]" = None,
    ) -> None:
        self.text_len = 0
        #: What became of block masks; all zero without ``reuse_mask``.
        self.masks = MaskCounts()
        self._steps = Steps()
        self._config = config
        self._dense_steps = dense_steps
        # Noted once per pass: compiled blocks guard on what they read, and steps are many.
        self._is_dense_step = dense_steps > 0
        self._dense_layers = dense_layers
        self._calibration = calibration
        self._order = order
        self._reuse = reuse
        # What computes a layer's image queries instead.
        self._attend = attend
        self._undo: list[Callable[[], None]] = []
        self._settings: dict[int, Config] = {}

    @property
    def step(self) -> int:
        """Denoising steps done since the schedule began. Counted where there is a scheduler; set it
        yourself otherwise (setting it back begins another run)."""
        return self._steps.step

    @step.setter
    def step(self, value: int) -> None:
        self._steps.step = value

    def config_of(self, layer: int) -> Optional[Config]:
        """The settings of a layer at the current step; None where it is dense."""
        if self._is_dense_step or layer in self._dense_layers:
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
        failed = self._steps.release()
        failed = run_all(self._undo) or failed
        if failed is not None:
            raise failed

    def __enter__(self) -> "Enabled":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.disable()

    def _attach_all(self, pipe_or_transformer: Any) -> None:
        """Switches everything over, or nothing."""
        try:
            for transformer in transformers_of(pipe_or_transformer):
                self._attach(transformer)
            self._steps.watch(pipe_or_transformer)
        except BaseException:
            self.disable()
            raise

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
        passes = Passes(self._steps)
        self._watch(transformer, passes)
        if self._order != "row":
            self._undo += Ordered(transformer, model, self._order).attach()
        for index, module in modules:
            layer = Layer(self, index, model, self._attend_of(index, passes))
            if model.processor is not None:
                self._replace(module, _processors.of(model.processor, layer))
            else:
                self._dispatch(module, layer)

    def _attend_of(self, layer: int, passes: Passes) -> Attend:
        """What computes one module's image queries."""
        if self._attend is not None:
            return self._attend(layer, passes)
        if self._reuse is None:
            return None
        masks = Masks(self._reuse, passes, self.masks)
        self._undo.append(masks.forget)
        return masks.attention

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

    def _watch(self, transformer: Any, passes: Passes) -> None:
        """Notes that a forward pass begins and how many text tokens it has."""
        names = list(inspect.signature(transformer.forward).parameters)

        def note(_: Any, args: "tuple[Any, ...]", kwargs: "dict[str, Any]") -> None:
            given = dict(zip(names, args), **kwargs)
            text = given.get("encoder_hidden_states")
            self.text_len = 0 if text is None else int(text.shape[1])
            self._steps.follow()
            self._is_dense_step = self.step < self._dense_steps
            passes.begin()
            parallel = getattr(transformer, "_parallel_config", None)
            if getattr(parallel, "context_parallel_config", None) is not None:
                self._check_parallel()

        self._undo.append(transformer.register_forward_pre_hook(note, with_kwargs=True).remove)

    def _check_parallel(self) -> None:
        """A shard has some of the tokens, in no box, and other blocks than the whole."""
        asked = [f"order={self._order!r}"] if self._order != "row" else []
        asked += ["reuse_mask"] if self._reuse is not None else []
        if asked:
            raise SpargeError(
                f"{' and '.join(asked)} cannot be kept under context parallelism, where tokens are "
                "spread over devices; leave it out"
            )


def enable(
    pipe_or_transformer: Any,
    *,
    config: Optional[Config] = None,
    dense_steps: int = 0,
    dense_layers: Union[int, Iterable[int]] = 0,
    calibration: Union[str, "dict[str, Any]", Calibration, None] = None,
    order: str = "row",
    reuse_mask: Union[int, Reuse, None] = None,
    **knobs: Any,
) -> Enabled:
    """Makes the self-attention of a diffusers pipeline or transformer sparse.

    * ``topk``, ``cdf``, ``theta``, ``pv_gap``, ``policy``, …: the fields of ``sparge.Config``, or a
      whole ``config``. Left to the defaults, short sequences (2048 tokens on the CPU, 7168 on a
      GPU, 8192 at head dimensions up to 64) stay exact.
    * ``dense_steps``: denoising steps at the start that stay dense. A pipeline counts them by its
      scheduler; with a bare transformer set ``handle.step``.
    * ``dense_layers``: the first so many blocks, or the indices of blocks, that stay dense.
    * ``calibration``: a calibration (:func:`tune`), a calibration file's path or parsed JSON.
    * ``order``: how image tokens run through the blocks: ``"row"`` (default: the model's own,
      nothing is moved), ``"hilbert"``, ``"time"``, ``"column"``, ``"random"``: see
      :func:`sparge.token_order`. Tokens and what belongs to them are put in order once per forward
      pass and back at its end; text stays. The default moves nothing because settings and
      calibrations hold for the order they were found in; ``"hilbert"`` makes blocks compact, so that
      more can be skipped at the same error. Dense steps are in order too.
    * ``reuse_mask``: denoising steps that one prediction of the blocks serves, or a :class:`Reuse`,
      which also says when a mask is made anew before. Default: every step predicts. It decides on
      the host: compiled models break their graph at each attention call, and CUDA graphs are refused.
      One pass of a transformer at a time. A mask takes
      batch · heads · tokens² / 8192 bytes for each layer and each forward pass of a step.

    Returns the handle whose ``disable()`` restores the model; it is a context manager too.
    Raises ``SpargeError`` for models and processors that are not supported, by name, and for a
    transformer that is enabled already. With ``order`` or ``reuse_mask``, forward passes raise it
    for inputs whose tokens cannot be followed, by name, and under context parallelism.
    """
    layers = range(dense_layers) if isinstance(dense_layers, int) else dense_layers
    config = (config or Config()).override(**knobs)
    parsed(config.text())  # refuses bad settings here rather than in the middle of a forward pass
    check_order(order)
    handle = Enabled(
        config,
        dense_steps,
        frozenset(layers),
        None if calibration is None else load_calibration(calibration),
        order,
        Reuse.of(reuse_mask, config),
    )
    handle._attach_all(pipe_or_transformer)
    return handle


def transformers_of(pipe_or_transformer: Any) -> "list[torch.nn.Module]":
    """The transformers of a pipeline, or the one that was given."""
    if isinstance(pipe_or_transformer, torch.nn.Module):
        return [pipe_or_transformer]
    found = [
        x
        for name in ("transformer", "transformer_2")
        if isinstance(x := getattr(pipe_or_transformer, name, None), torch.nn.Module)
    ]
    if not found:
        raise SpargeError(
            f"{type(pipe_or_transformer).__name__} has no transformer; pass a pipeline of a "
            "diffusion transformer, or the transformer itself"
        )
    return found


__all__ = ["Enabled", "enable", "transformers_of"]
