"""Running a command for at most so many seconds, with all that it starts."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from tempfile import TemporaryFile

from bench.machine import ROOT


@dataclass(frozen=True)
class Finished:
    """code: the exit code, None if it was stopped when its time was over. output: stdout and stderr together."""

    code: int | None
    seconds: float
    output: str

    def tail(self, lines: int) -> list[str]:
        """The last lines of the output that are not empty."""
        return [line for line in self.output.splitlines() if line.strip()][-lines:]

    def ending(self) -> str:
        """How it ended, in a few words."""
        if self.code is None:
            return f"stopped after {self.seconds:.0f} s"
        last = self.tail(1)
        return f"exit code {self.code}{f': {last[0].strip()}' if last else ''}"


def run(command: Sequence[str], seconds: float, environment: dict[str, str] | None = None) -> Finished:
    """Run in the repository and in a process group of its own, which is killed at the end: no worker is left behind.

    environment: variables beside this process's own.
    """
    began = time.monotonic()
    with TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(  # noqa: S603
            command,
            cwd=ROOT,
            env=os.environ | (environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        try:
            code = process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        return Finished(code, round(time.monotonic() - began, 1), log.read())
