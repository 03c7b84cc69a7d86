"""What a run reports, in lines on disk, and what these say of how it is going."""

from collections.abc import Callable, Collection

from fieldmark.runtime.log import warn
from fieldmark.training.loop import Step
from fieldmark.training.run_folder import RunFolder
from fieldmark.training.watch import Fault, Line, Watch, read_steps

FLUSH_STEPS = 20  # losses are read, checked and written this often: each reading waits for the GPU


class Journal:
    """Collects updates, and reads and writes them a few at a time."""

    def __init__(
        self,
        run: RunFolder,
        *,
        steps_per_epoch: int,
        lr: float,
        is_scaled: bool,
        bad_updates: int,
        spike_factor: float,
        fresh_starts: Collection[int],
        forgiven_to: Callable[[], int],
    ) -> None:
        self._run, self._steps_per_epoch, self._lr = run, steps_per_epoch, lr
        self._is_scaled = is_scaled
        self._new_watch = lambda: Watch(
            bad_updates=bad_updates,
            spike_factor=spike_factor,
            fresh_starts=fresh_starts,
            forgiven_to=forgiven_to(),
        )
        self._watch = self._new_watch()
        self._pending: list[Step] = []
        self.note = ""  # what the progress bar shows of the last update that was read

    @property
    def is_calm(self) -> bool:
        """Whether the state after the last update that was read is one to go back to."""
        return self._watch.is_calm

    def add(self, step: Step) -> Fault | None:
        """Take an update in; return what is wrong, if it was time to look and something is."""
        self._pending.append(step)
        return self.flush() if step.index % FLUSH_STEPS == 0 else None

    def flush(self) -> Fault | None:
        """Read the pending updates' tensors, write their lines; return what is wrong, if it is."""
        if not self._pending:
            return None
        lines = read_steps(
            self._pending,
            per_epoch=self._steps_per_epoch,
            lr=self._lr,
            is_scaled=self._is_scaled,
        )
        self._pending.clear()
        faults = [self._watch.take(line) for line in lines]
        self._run.append_metrics(lines)
        self._run.exchange()
        skipped = [line for line in lines if line.get("skipped") in ("non-finite", "input")]
        if skipped:
            part = "images" if skipped[0]["skipped"] == "input" else "loss or gradient"
            warn(
                f"{len(skipped)} of {len(lines)} updates up to {lines[-1]['step']} changed "
                f"nothing: their {part} had values that are not finite"
            )
        loss = lines[-1]["loss"]
        self.note = f"loss {'-' if loss is None else f'{loss:.3f}'}  lr {lines[-1]['lr']:.3g}"
        return next((fault for fault in faults if fault is not None), None)

    def rewind(self, step: int) -> None:
        """Forget what came after update `step`, on disk too: it will come again."""
        self._run.rewind_metrics(step)
        self._pending.clear()
        self._watch = self._new_watch()
        for line in self._run.train_metrics():
            self._watch.take(line)

    def validated(self, line: Line) -> None:
        """Add the line of a validation."""
        self._run.append_metrics([line])
