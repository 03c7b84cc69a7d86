"""forecast.py: what the first updates say of the rest, the very first one apart."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fieldmark.training import forecast
from fieldmark.training.forecast import FORECAST_STEPS, Forecast


@pytest.mark.parametrize("start", [0, 40])
def test_the_slow_first_update_is_left_out_and_later_work_weighed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], start: int
) -> None:
    now = [0.0]
    monkeypatch.setattr(forecast.time, "monotonic", lambda: now[0])
    # From update 100 on each is twice the work, as of larger images.
    plan: Any = SimpleNamespace(total=200, work=lambda done: done + max(0, done - 100))
    seen = Forecast(plan, start)
    for index in range(start + 1, start + 20):
        now[0] += 500.0 if index == start + 1 else 2.0  # seconds
        step: Any = SimpleNamespace(index=index, loss=torch.tensor(1.0))
        seen.see(step)
    left = 300 - (start + 1 + FORECAST_STEPS)
    told = capsys.readouterr().err
    assert told.count("as the first ones suggest") == 1
    assert f"about {forecast.duration(2.0 * left)} to the last of 200 updates" in told
