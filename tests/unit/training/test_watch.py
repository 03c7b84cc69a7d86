"""What lines of metrics say of a run: a pure function, so that resumed runs find the same."""

from typing import Any

import pytest

from fieldmark.training.watch import HISTORY, MAX_BAD_INPUTS, examine


def line(step: int, loss: float | None = 1.0, skipped: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {"step": step, "loss": loss, "grad_norm": 1.0}
    return found | ({"skipped": skipped} if skipped else {})


CALM = [line(step, 1 + 0.1 * (step % 3)) for step in range(1, 41)]


def verdict(lines: list[dict[str, Any]], before: list[dict[str, Any]] = CALM) -> Any:
    return examine(before, lines, bad_updates=3, spike_factor=3.0)


def test_three_in_a_row_are_a_fault_and_two_are_not() -> None:
    bad = [line(41 + i, None, "non-finite") for i in range(3)]
    assert verdict(bad[:2]).fault is None
    assert not verdict(bad[:2]).is_calm
    found = verdict(bad).fault
    assert (found.step, found.kind, found.count) == (41, "non-finite", 3)
    assert verdict([bad[0], line(42), bad[1], bad[2]]).fault is None


def test_a_streak_goes_on_over_readings_and_is_reported_once() -> None:
    bad = [line(41 + i, None, "non-finite") for i in range(3)]
    assert verdict(bad[2:], [*CALM, *bad[:2]]).fault.step == 41
    assert verdict([line(44)], [*CALM, *bad]).fault is None


def test_a_spike_is_more_than_the_factor_times_the_largest_recent_loss() -> None:
    high = [line(41 + i, 3.7) for i in range(3)]
    assert verdict(high).fault.kind == "spike"
    assert verdict([line(41 + i, 3.5) for i in range(3)]).fault is None
    assert examine(CALM, high, bad_updates=3, spike_factor=0).fault is None
    # At the very start a rising loss is no news: a warm-up begins so.
    assert verdict(high, CALM[:10]).fault is None


def test_a_spike_is_not_taken_into_what_is_usual() -> None:
    assert verdict([line(41, 9.0), line(42), line(43, 9.0)]).is_calm is False


def test_only_recent_losses_count() -> None:
    early = [line(step, 30.0) for step in range(1, 30)]
    late = [line(step) for step in range(30, 30 + HISTORY)]
    high = [line(200 + i, 5.0) for i in range(3)]
    assert verdict(high, early + late).fault is not None
    assert verdict(high, early + late[:50]).fault is None


def test_bad_images_are_only_skipped_until_there_are_too_many() -> None:
    bad = [line(41 + i, None, "input") for i in range(MAX_BAD_INPUTS)]
    assert verdict(bad[:-1]).fault is None
    assert verdict(bad).fault.kind == "input"


def test_the_search_for_a_loss_scale_is_no_fault() -> None:
    assert verdict([line(41 + i, 1.0, "scale") for i in range(9)]).is_calm


@pytest.mark.parametrize("cut", range(1, 6))
def test_how_lines_are_read_does_not_matter(cut: int) -> None:
    """A resumed run reads its lines in other portions."""
    lines = [line(41), *[line(42 + i, 9.0) for i in range(3)], line(45)]
    first = examine(CALM, lines[:cut], bad_updates=3, spike_factor=3.0).fault
    second = examine([*CALM, *lines[:cut]], lines[cut:], bad_updates=3, spike_factor=3.0).fault
    assert (first or second) == verdict(lines).fault
