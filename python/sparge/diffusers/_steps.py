"""Where a generation is: runs, denoising steps, and the forward passes of a step."""

from __future__ import annotations

import functools
from typing import Any, Callable, Optional


class Steps:
    """Denoising steps, counted by a pipeline's scheduler where there is one."""

    def __init__(self) -> None:
        #: Schedules begun.
        self.run = 0
        self._step = 0
        self._pipe: Any = None
        self._scheduler: Any = None
        self._undo: list[Callable[[], None]] = []

    @property
    def has_scheduler(self) -> bool:
        """Whether steps are counted; otherwise someone has to set them."""
        return self._scheduler is not None

    @property
    def step(self) -> int:
        """Steps done since the schedule began. Setting it back begins another run."""
        return self._step

    @step.setter
    def step(self, value: int) -> None:
        if value < self._step:
            self.run += 1
        self._step = value

    def watch(self, pipe: Any) -> None:
        """Counts by this pipeline's scheduler from now on."""
        self._pipe = pipe
        self.follow()

    def follow(self) -> None:
        """Takes up the pipeline's scheduler, also one that has replaced another."""
        scheduler = getattr(self._pipe, "scheduler", None)
        if scheduler is self._scheduler:
            return
        run_all(self._undo)
        self._begin()
        self._scheduler = scheduler
        if scheduler is None:
            return
        for name, note in (("step", self._count), ("set_timesteps", self._begin)):
            self._undo.append(_Noted(scheduler, name, note).restore)

    def release(self) -> Optional[BaseException]:
        """Restores the scheduler; what went wrong."""
        self._pipe = self._scheduler = None
        return run_all(self._undo)

    def _count(self) -> None:
        self._step += 1

    def _begin(self) -> None:
        self.run += 1
        self._step = 0


class Passes:
    """Forward passes of one transformer: which of its step's the running one is. Guidance makes
    several, always in one order, so that each has its own counterpart in the step before."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        #: Of the running pass in its step.
        self.index = -1
        #: Passes so far.
        self.count = 0
        self._at = (-1, -1)

    def begin(self) -> None:
        """Notes that a pass begins."""
        at = (self.steps.run, self.steps.step)
        self.index = self.index + 1 if at == self._at else 0
        self._at = at
        self.count += 1


class _Noted:
    """A method of ``owner`` with ``note`` called before it, until :meth:`restore`."""

    def __init__(self, owner: Any, name: str, note: Callable[[], None]) -> None:
        self._owner, self._name, self._note = owner, name, note
        self._own, method = vars(owner).get(name), getattr(owner, name)
        self._is_live = True

        @functools.wraps(method)
        def noted(*args: Any, **kwargs: Any) -> Any:
            if self._is_live:
                self._note()
            return method(*args, **kwargs)

        marked: Any = noted
        marked.by = self
        setattr(owner, name, marked)

    def restore(self) -> None:
        """Puts the method back, and all below it that were to be put back while this one lay above."""
        self._is_live = False
        own = vars(self._owner).get(self._name)
        while isinstance(by := getattr(own, "by", None), _Noted) and not by._is_live:
            own = by._own
        if own is None:
            vars(self._owner).pop(self._name, None)
        else:
            setattr(self._owner, self._name, own)


def run_all(undo: "list[Callable[[], None]]") -> Optional[BaseException]:
    """Runs every one and empties the list, the latest first; the first failure."""
    failed: Optional[BaseException] = None
    while undo:
        try:
            undo.pop()()
        except Exception as error:  # the others still have to be undone
            failed = failed or error
    return failed
