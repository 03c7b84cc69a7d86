"""How long the rest of a run will take, as its first updates suggest."""

import time

from fieldmark.runtime.log import duration, say
from fieldmark.training.loop import Step
from fieldmark.training.plan import Plan

FORECAST_STEPS = 5  # after the first one, which begins with reading and is slower


class Forecast:
    """Told once, a few updates after the one that a run or its resumption begins with."""

    def __init__(self, plan: Plan, start: int) -> None:
        self._plan, self._first, self._began = plan, start + 1, 0.0

    def see(self, step: Step) -> None:
        """Take an update in; of two of them the end is waited for, on their device."""
        if step.index == self._first:
            self._began = _end_of(step)
        elif step.index == self._first + FORECAST_STEPS:
            self._tell(_end_of(step) - self._began, step.index)

    def _tell(self, seconds: float, done: int) -> None:
        work, total = self._plan.work, self._plan.total
        left_s = seconds * (work(total) - work(done)) / (work(done) - work(done - FORECAST_STEPS))
        at = time.strftime("%H:%M", time.localtime(time.time() + left_s))
        say(
            f"about {duration(left_s)} to the last of {total} updates, at {at}, "
            "as the first ones suggest"
        )


def _end_of(step: Step) -> float:
    float(step.loss)
    return time.monotonic()
