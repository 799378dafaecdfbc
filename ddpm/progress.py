"""Progress on stderr: a live bar on a terminal, a line every tenth of the way elsewhere."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

REFRESH_SECONDS = 0.5


class Bar:
    """`with Bar("train", total, "images/s", per_step=100) as bar: bar.update(done, "loss 0.05")`."""

    def __init__(
        self, label: str, total: int, unit: str, per_step: int = 1, start: int = 0, quiet: bool = False
    ) -> None:
        self.label, self.total, self.unit, self.per_step = label, total, unit, per_step
        self.start = start
        self.live = not quiet and sys.stderr.isatty()
        self.lines = not quiet and not self.live
        self.began = self.shown = time.monotonic()
        self.tenth = start * 10 // total
        if self.live:
            self.rich = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}  {task.fields[text]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self.task = self.rich.add_task(label, total=total, completed=start, text="")

    def __enter__(self) -> "Bar":
        if self.live:
            self.rich.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.rich.stop()

    def due(self, done: int) -> bool:
        """Whether an update would show: reading a loss from a device is worth it only then."""
        if self.live:
            return done == self.total or time.monotonic() - self.shown >= REFRESH_SECONDS
        return self.lines and (done * 10 // self.total > self.tenth or done == self.total)

    def update(self, done: int, text: str = "") -> None:
        """`done` steps of the total are finished."""
        if not self.due(done):
            return
        self.shown = time.monotonic()
        elapsed = self.shown - self.began
        rate = (done - self.start) * self.per_step / max(elapsed, 1e-9)
        text = f"{text}  {rate:.4g} {self.unit}".strip()
        if self.live:
            self.rich.update(self.task, completed=done, text=text)
            return
        self.tenth = done * 10 // self.total
        left = elapsed * (self.total - done) / max(done - self.start, 1)
        print(
            f"{self.label} {100 * done // self.total:3d}%  {done}/{self.total}  {text}  {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )
