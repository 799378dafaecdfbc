"""Progress on stderr: a live bar on a terminal, a line every tenth of the way elsewhere."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

REFRESH_SECONDS = 0.5


class Bar:
    """`with Bar("train", total, "images/s", per_step=100) as bar: bar.update(done, "loss 0.05")`, on stderr."""

    def __init__(
        self, label: str, total: int, unit: str, per_step: int = 1, start: int = 0, quiet: bool = False
    ) -> None:
        self.label, self.total, self.unit, self.per_step, self.start = label, total, unit, per_step, start
        self.live = not quiet and sys.stderr.isatty()
        self.lines = not quiet and not self.live
        self.began = self.shown = time.monotonic()
        self.tenth = self._parts(start, 10)
        if self.live:
            count, left = TextColumn("{task.completed}/{task.total}  {task.fields[text]}"), TextColumn("left")
            columns = TextColumn("{task.description}"), BarColumn(), count, TimeElapsedColumn(), left
            self.rich = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self.task = self.rich.add_task(label, total=total, completed=start, text="")

    def __enter__(self) -> "Bar":
        if self.live:
            self.rich.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live:
            self.rich.stop()

    def _parts(self, done: int, of: int) -> int:
        """How many of so many equal parts of the total are done."""
        return of * min(done, self.total) // self.total if self.total > 0 else of

    def due(self, done: int) -> bool:
        """Whether an update would show: reading a loss from a device is worth it only then."""
        if self.live:
            return done == self.total or time.monotonic() - self.shown >= REFRESH_SECONDS
        return self.lines and self._parts(done, 10) > self.tenth

    def update(self, done: int, text: str = "") -> None:
        """`done` steps of the total are finished."""
        if not self.due(done):
            return
        self.shown = time.monotonic()
        elapsed, fresh = self.shown - self.began, done - self.start
        text = f"{text}  {fresh * self.per_step / max(elapsed, 1e-9):.4g} {self.unit}".strip()
        if self.live:
            self.rich.update(self.task, completed=done, text=text)
            return
        self.tenth = self._parts(done, 10)
        left = elapsed * max(self.total - done, 0) / max(fresh, 1)
        line = f"{self.label} {self._parts(done, 100):3d}%  {done}/{self.total}  {text}  {left:.0f} s left"
        print(line, file=sys.stderr, flush=True)
