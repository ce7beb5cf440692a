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
        before = {name: vars(scheduler).get(name) for name in ("step", "set_timesteps")}
        step, begin = scheduler.step, scheduler.set_timesteps

        @functools.wraps(step)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._step += 1
            return step(*args, **kwargs)

        @functools.wraps(begin)
        def begun(*args: Any, **kwargs: Any) -> Any:
            self._begin()
            return begin(*args, **kwargs)

        def restore() -> None:
            for name, value in before.items():
                if value is None:
                    vars(scheduler).pop(name, None)
                else:
                    setattr(scheduler, name, value)

        scheduler.step, scheduler.set_timesteps = counted, begun
        self._undo.append(restore)

    def release(self) -> Optional[BaseException]:
        """Restores the scheduler; what went wrong."""
        self._pipe = self._scheduler = None
        return run_all(self._undo)

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


def run_all(undo: "list[Callable[[], None]]") -> Optional[BaseException]:
    """Runs every one and empties the list, the latest first; the first failure."""
    failed: Optional[BaseException] = None
    while undo:
        try:
            undo.pop()()
        except Exception as error:  # the others still have to be undone
            failed = failed or error
    return failed
