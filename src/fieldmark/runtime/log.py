"""Progress and messages on stderr: bars on a terminal, plain lines elsewhere.

stdout is kept for results, so that `--json` output can be piped.
"""

import contextlib
import datetime as dt
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

T = TypeVar("T")


class _Stderr(Console):
    """A console whose reader may go away: what it would have read is lost, not the work."""

    def on_broken_pipe(self) -> None:
        self.quiet = True  # instead of ending the process, as rich would


console = _Stderr(stderr=True, highlight=False, soft_wrap=True)
PLAIN_EVERY_S = 10.0
_is_json = False


def use_json(yes: bool = True) -> None:
    """Print messages as JSON, an object a line, and events too."""
    global _is_json
    _is_json = yes


def event(name: str, **facts: Any) -> None:
    """Print what happened, for machines: nothing without `use_json`. Facts of None are left out."""
    if _is_json:
        _print_json("info", event=name, **facts)


def say(text: str) -> None:
    """Print one line for the person who is waiting."""
    if _is_json:
        _print_json("info", message=text)
        return
    with contextlib.suppress(OSError):  # a terminal that was closed, a log on a full disk
        console.print(text, markup=False)


def warn(text: str) -> None:
    """Print one line that should not be overlooked."""
    if _is_json:
        _print_json("warning", message=text)
        return
    with contextlib.suppress(OSError):
        console.print(f"note: {text}", markup=False, style="yellow")


def _print_json(level: str, **facts: Any) -> None:
    now = dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds")
    known = {name: value for name, value in facts.items() if value is not None}
    line = json.dumps({"time": now, "level": level, **known})
    with contextlib.suppress(OSError):
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


class Bar:
    """Progress of known length: a live bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(
        self, title: str, total: int, unit: str, work: Callable[[int], float] = float
    ) -> None:
        """Make a bar that has not started.

        Args:
            work: what the first n units cost, in any measure, where they do not cost alike.
        """
        self.title, self.total, self.unit, self._work = title, total, unit, work
        self.done = 0
        self._started = self._spoke = time.monotonic()
        self._at_start = 0
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]} left"),
                console=console,
                transient=True,
            )
            self._task = self._progress.add_task(title, total=total, note="", rate="", left="?")

    def start(self, done: int = 0) -> None:
        """Begin at `done`: what was done before does not count in the rate."""
        self.done = self._at_start = done
        self._started = self._spoke = time.monotonic()
        if self._progress:
            self._progress.start()
            self._progress.update(self._task, completed=done)

    def advance(self, count: int = 1, note: str = "") -> None:
        """Add `count`; `note` is shown beside the bar."""
        self.done += count
        now = time.monotonic()
        rate = (self.done - self._at_start) / max(now - self._started, 1e-9)
        left = duration(self._left_s(now - self._started))
        if self._progress:
            shown = f"{rate:.1f} {self.unit}/s"
            self._progress.update(self._task, completed=self.done, note=note, rate=shown, left=left)
        elif now - self._spoke >= PLAIN_EVERY_S:
            self._spoke = now
            say(
                f"{self.title}: {self.done}/{self.total} {self.unit}  {note}  "
                f"{rate:.1f} {self.unit}/s  {left} left"
            )

    def _left_s(self, seconds: float) -> float:
        """Return the time left, as the time since the start and the work of the rest suggest."""
        done = self._work(self.done)
        made = done - self._work(self._at_start)
        return seconds * (self._work(self.total) - done) / made if made > 0 else 0.0

    def stop(self) -> None:
        """Remove the bar; printed lines stay."""
        if self._progress:
            self._progress.stop()


@contextmanager
def progress(title: str, total: int, unit: str) -> Iterator[Bar]:
    """Show progress while the block runs."""
    bar = Bar(title, total, unit)
    bar.start()
    try:
        yield bar
    finally:
        bar.stop()


def track(items: Iterable[T], title: str, total: int, unit: str = "batches") -> Iterator[T]:
    """Yield from `items`, showing progress."""
    with progress(title, total, unit) as bar:
        for item in items:
            yield item
            bar.advance()


def table(columns: Sequence[str], rows: Iterable[Iterable[Any]], title: str = "") -> None:
    """Print a small table on stdout; the first column is text, the others are right-aligned."""
    from rich.table import Table

    grid = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        grid.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        grid.add_row(*(str(cell) for cell in row))
    _stdout().print(grid)


def facts(rows: Iterable[tuple[str, str]]) -> None:
    """Print names and values on stdout, values aligned and wrapped under themselves."""
    from rich.table import Table

    grid = Table(show_header=False, box=None, pad_edge=False)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(name, value)
    _stdout().print(grid)


def _stdout() -> Console:
    # Made anew, because tests and callers replace sys.stdout; paths are not markup.
    return Console(file=sys.stdout, highlight=False, markup=False, emoji=False)


def duration(seconds: float) -> str:
    """Return seconds as text a person reads: 42 s, 3 min 20 s, 2 h 5 min."""
    seconds = max(0.0, seconds)
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(int(round(seconds)), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
