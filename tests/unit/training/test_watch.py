"""What lines of metrics say of a run: of the lines alone, so that resumed runs find the same."""

from collections.abc import Sequence
from typing import Any

import pytest

from fieldmark.training.watch import HISTORY, MAX_BAD_INPUTS, MAX_OFTEN, Fault, Watch


def line(step: int, loss: float | None = 1.0, skipped: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {"step": step, "loss": loss, "grad_norm": 1.0}
    return found | ({"skipped": skipped} if skipped else {})


def lines(*losses: float) -> list[dict[str, Any]]:
    return [line(step, loss) for step, loss in enumerate(losses, 1)]


CALM = lines(*[1 + 0.1 * (step % 3) for step in range(40)])


def watch(spike_factor: float = 3.0, bad_updates: int = 3) -> Watch:
    return Watch(bad_updates=bad_updates, spike_factor=spike_factor)


def faults(found: Sequence[dict[str, Any]], watched: Watch | None = None) -> list[Fault]:
    watched = watched or watch()
    return [fault for fault in map(watched.take, found) if fault is not None]


def test_three_in_a_row_are_a_fault_and_two_are_not() -> None:
    bad = [line(41 + i, None, "non-finite") for i in range(3)]
    watched = watch()
    assert not faults([*CALM, *bad[:2]], watched)
    assert not watched.is_calm
    assert faults(bad[2:], watched) == [Fault(41, "non-finite", 3)]
    assert not faults([*CALM, bad[0], line(42), *bad[1:]])


def test_a_longer_streak_is_told_once() -> None:
    assert len(faults([*CALM, *[line(41 + i, None, "non-finite") for i in range(9)]])) == 1


def test_updates_that_go_wrong_often_are_a_fault_though_never_in_a_row() -> None:
    def every(gap: int, count: int) -> list[dict[str, Any]]:
        steps = range(41, 41 + count)
        return [line(s, None, "non-finite") if s % gap == 0 else line(s) for s in steps]

    [fault] = faults([*CALM, *every(3, 99)])
    assert fault == Fault(42 + 3 * 29, "often", MAX_OFTEN)
    assert "not finite in 30 of the last 100 updates up to 129" in fault.sentence()
    assert not faults([*CALM, *every(4, 400)])
    assert len(faults([*CALM, *every(2, 130)])) == 2  # and it is told again when it goes on
    # Gone back to 120, what was before does not count: 29 more are no fault yet, and 30 are.
    after = Watch(bad_updates=3, spike_factor=3.0, forgiven_to=120)
    assert not faults([*CALM, *every(3, 80), *every(3, 80 + 89)[80:]], after)
    assert faults(every(3, 80 + 92)[80 + 89 :], after)
    bad_images = [line(s, None, "input" if s % 2 else "") for s in range(41, 241)]
    assert not faults([*CALM, *[b if b.get("skipped") else line(b["step"]) for b in bad_images]])


def test_a_streak_may_be_as_long_as_it_is_asked_for() -> None:
    bad = [line(41 + i, None, "non-finite") for i in range(400)]
    assert faults([*CALM, *bad], watch(bad_updates=400))[0].count == 400


def test_a_spike_is_more_than_the_factor_times_the_largest_recent_loss() -> None:
    high = [line(41 + i, 3.7) for i in range(3)]
    assert faults([*CALM, *high])[0].kind == "spike"
    assert not faults([*CALM, *[line(41 + i, 3.5) for i in range(3)]])
    assert not faults([*CALM, *high], watch(spike_factor=0))
    # At the very start a rising loss is no news: a warm-up begins so.
    assert not faults([*CALM[:10], *high])


def test_a_loss_near_zero_may_treble() -> None:
    learned = lines(*[2.3] * 20, *[1e-3] * 150)
    assert not faults([*learned, *[line(171 + i, 0.5) for i in range(5)]])
    assert faults([*learned, *[line(171 + i, 1.5) for i in range(3)]])


def test_a_spike_is_not_taken_into_what_is_usual() -> None:
    watched = watch()
    assert not faults([*CALM, line(41, 9.0), line(42), line(43, 9.0)], watched)
    assert not watched.is_calm


def test_only_recent_losses_count() -> None:
    fallen = lines(*[4.0] * 30, *[1.0] * HISTORY)
    high = [line(200 + i, 5.0) for i in range(3)]
    assert faults([*fallen, *high])
    assert not faults([*fallen[:80], *high])


def test_a_loss_that_stays_high_is_a_fault_although_it_never_jumped() -> None:
    """What was learned is lost: from 1.1 to 2.2, less than the factor."""
    watched = watch()
    calm = lines(*[1 + 0.1 * (step % 3) for step in range(HISTORY)])
    high = [line(101 + i, 2.2) for i in range(20)]
    assert not faults([*calm, *high[:4]], watched)
    assert watched.is_calm
    assert not faults(high[4:19], watched)
    assert not watched.is_calm
    assert faults(high[19:], watched) == [Fault(101, "rise", 20)]
    falls = [*high[:10], line(111, 1.0), *[line(112 + i, 2.3) for i in range(19)]]
    assert not faults([*calm, *falls])
    # A warm-up may have its worst losses after its first ones.
    assert not faults([*calm[:60], *high])


def test_larger_images_begin_anew() -> None:
    told = [*CALM, *[line(41 + i, 4.0) for i in range(60)]]
    assert faults(told)
    fresh = Watch(bad_updates=3, spike_factor=3.0, fresh_starts=(41,))
    assert not faults(told, fresh)
    assert faults([line(101 + i, 13.0) for i in range(3)], fresh)


def test_bad_images_are_only_skipped_until_there_are_too_many() -> None:
    bad = [line(41 + i, None, "input") for i in range(MAX_BAD_INPUTS)]
    watched = watch()
    assert not faults([*CALM, *bad[:-1]], watched)
    assert watched.is_calm  # they change nothing: the state is as good as before
    assert faults(bad[-1:], watched)[0].kind == "input"


def test_the_search_for_a_loss_scale_is_no_fault_while_it_may_succeed() -> None:
    watched = watch()
    assert not faults([*CALM, *[line(41 + i, 1.0, "scale") for i in range(30)]], watched)
    assert watched.is_calm
    assert faults([line(71 + i, 1.0, "scale") for i in range(3)], watched)[0].kind == "non-finite"


def test_the_search_for_a_loss_scale_ends_no_streak() -> None:
    bad = [line(41 + i, None, "non-finite") for i in range(3)]
    assert faults([*CALM, bad[0], line(42, 1.0, "scale"), *bad[1:]])


HARD = [
    # A spike long before: it must not count as usual, wherever the lines are cut.
    (lines(*[1.0] * 214, 9.0, *[1.0] * 90, 5.0, 5.0, 5.0), 1),
    # High losses that are still among the last hundred sound ones, beyond many skipped updates.
    (
        [
            *lines(*[1.0] * 169, *[2.5, 1.0] * 15),
            *[line(200 + i, None, "input") for i in range(40)],
            *[line(240 + i) for i in range(60)],
            *[line(300 + i, 5.0) for i in range(3)],
        ],
        0,
    ),
]


@pytest.mark.parametrize(("told", "num_faults"), HARD)
@pytest.mark.parametrize("cut", [0, 100, 216, 280, 300])
def test_a_resumed_run_finds_what_the_undisturbed_one_finds(
    told: list[dict[str, Any]], num_faults: int, cut: int
) -> None:
    """It replays all lines up to its checkpoint, and goes on."""
    watched = watch()
    before = faults(told[:cut], watched)
    assert before + faults(told[cut:], watched) == faults(told)
    assert len(faults(told)) == num_faults
