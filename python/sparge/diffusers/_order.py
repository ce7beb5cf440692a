"""Tokens in another order for a whole forward pass: in on entering the first block, back at its end.

Between the first block and the output projection, everything but attention works on each token for
itself, and attention without a causal mask does not mind the order: it is exact to permute once, as
long as whatever belongs to a token by its place goes along: rotary tables, modulation per token,
residuals of a ControlNet. `_grids` says what that is in each architecture.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

import torch

from .._order import token_order
from .._sparge import SpargeError
from ._grids import LAYOUTS, Box, Inputs
from ._models import Model

Tensor = torch.Tensor

# What processors may be told besides: nothing of it belongs to single image tokens.
_PLAIN_OPTIONS = {"scale", "ip_adapter_image_embeds", "ip_hidden_states"}


@dataclass(frozen=True)
class Permutation:
    """``x.index_select(dim, indices)`` puts the tokens in order, ``inverse`` puts them back."""

    indices: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, order: str, boxes: "tuple[Box, ...]", device: torch.device) -> "Permutation":
        """Each box in the order, one after the other."""
        parts, start = [], 0
        for box in boxes:
            part = torch.frombuffer(token_order(order, box), dtype=torch.int64)
            parts.append(part + start)
            start += len(part)
        indices = torch.cat(parts)
        return cls(indices.to(device), indices.argsort().to(device))


class _Pass(threading.local):
    """A thread's running forward pass: its boxes and permutation; None outside."""

    boxes: "tuple[Box, ...]" = ()
    now: Optional[Permutation] = None


class Ordered:
    """Hooks on one transformer that put its tokens in ``order``, in dense steps too: what a cache keeps
    from one step to the next would otherwise be of two orders.
    """

    def __init__(self, transformer: Any, model: Model, order: str) -> None:
        kind = type(transformer).__name__
        if kind not in LAYOUTS:
            raise SpargeError(
                f"order={order!r} is not supported for {kind}, only for {', '.join(LAYOUTS)} "
                "themselves; leave order at 'row'"
            )
        self._order = order
        self._layout = LAYOUTS[kind]
        self._transformer = transformer
        self._names = list(inspect.signature(transformer.forward).parameters)
        self._first_list = model.blocks[0]
        self._known: dict[Any, Permutation] = {}
        self._pass = _Pass()
        self._hooked = self._modules()

    def attach(self) -> "list[Callable[[], None]]":
        """Registers the hooks; what removes them again."""
        transformer, modules = self._transformer, self._hooked
        hooks = [
            transformer.register_forward_pre_hook(self._begin, with_kwargs=True),
            transformer.register_forward_hook(self._end, always_call=True),
            modules["first block"].register_forward_pre_hook(self._enter, with_kwargs=True),
            modules["proj_out"].register_forward_hook(self._leave),
        ]
        if self._layout.rope is not None:
            hooks.append(modules[self._layout.rope.module].register_forward_hook(self._turn))
        return [hook.remove for hook in hooks]

    def _modules(self) -> "dict[str, torch.nn.Module]":
        """The modules at which tokens and tables are moved, as the transformer holds them now."""
        names = ["proj_out"] + ([] if self._layout.rope is None else [self._layout.rope.module])
        found = {name: getattr(self._transformer, name) for name in names}
        found["first block"] = getattr(self._transformer, self._first_list)[0]
        return found

    def _begin(self, _: Any, args: "tuple[Any, ...]", kwargs: Inputs) -> Any:
        """The permutation of this pass, and the inputs that go along."""
        self._pass.now = None
        given = dict(zip(self._names, args), **kwargs)
        self._check(given)
        boxes = self._pass.boxes = self._layout.boxes(self._transformer, given)
        about = (boxes, given["hidden_states"].device)
        if about not in self._known:
            if len(self._known) >= 8:
                self._known.clear()
            self._known[about] = Permutation.of(self._order, *about)
        self._pass.now = self._known[about]
        moved = {
            name: self._along(name, given[name], dim)
            for name, dim in self._layout.inputs.items()
            if given.get(name) is not None
        }
        args = tuple(moved.get(name, x) for name, x in zip(self._names, args))
        return args, {name: moved.get(name, x) for name, x in kwargs.items()}

    def _check(self, given: Inputs) -> None:
        """Refuses what would meet tokens at other places than it expects."""
        modules = self._modules()
        replaced = [name for name, module in self._hooked.items() if modules[name] is not module]
        if replaced:
            raise SpargeError(
                f"{' and '.join(replaced)} of {type(self._transformer).__name__} was replaced since "
                "enable (an adapter?): call disable() and enable again"
            )
        for options in ("attention_kwargs", "joint_attention_kwargs"):
            unknown = sorted((given.get(options) or {}).keys() - _PLAIN_OPTIONS)
            if unknown:
                raise SpargeError(
                    f"{options} has {', '.join(unknown)}, which may belong to tokens at their own "
                    "places; leave it out, or leave order at 'row'"
                )

    def _enter(self, _: Any, args: "tuple[Any, ...]", kwargs: Inputs) -> Any:
        if self._pass.now is None:
            return None
        if "hidden_states" in kwargs:
            tokens = self._placed("the first block's input", kwargs["hidden_states"], 1)
            return args, {**kwargs, "hidden_states": tokens}
        return (self._placed("the first block's input", args[0], 1), *args[1:]), kwargs

    def _turn(self, _: Any, args: Any, tables: "tuple[Tensor, ...]") -> Any:
        rope = self._layout.rope
        if self._pass.now is None or rope is None:
            return None
        turned = (self._placed("a rotary table", x, rope.dim) for x in tables[: rope.tables])
        return (*turned, *tables[rope.tables :])

    def _leave(self, _: Any, args: Any, out: Tensor) -> Any:
        """After the projection, which works on each token for itself: there is less to move."""
        now = self._pass.now
        return None if now is None else _take(out, 1, now.inverse)

    def _end(self, *_: Any) -> None:
        self._pass.now = None

    def _along(self, name: str, x: Any, dim: int) -> Any:
        """An input with what belongs to tokens in their order; what is one for all stays."""
        if isinstance(x, (list, tuple)):
            return type(x)([self._along(name, part, dim) for part in x])
        is_for_all = x.ndim <= (dim if dim >= 0 else -dim - 1) or x.shape[dim] == 1
        return x if is_for_all else self._placed(name, x, dim)

    def _placed(self, name: str, x: Tensor, dim: int) -> Tensor:
        now = self._pass.now
        assert now is not None
        if x.shape[dim] != len(now.indices):
            raise SpargeError(
                f"{name} has {x.shape[dim]} tokens (shape {tuple(x.shape)}), expected "
                f"{len(now.indices)}: boxes {', '.join(map(str, self._pass.boxes))} of (frames, "
                "rows, columns); leave order at 'row' for inputs of another layout"
            )
        return _take(x, dim, now.indices)


def _take(x: Tensor, dim: int, indices: Tensor) -> Tensor:
    """Offloading may run a module elsewhere than where the inputs of the forward pass were."""
    return x.index_select(dim, indices.to(x.device))
