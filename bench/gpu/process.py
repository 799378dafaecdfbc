"""Running a command for at most so many seconds, with all that it starts."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from tempfile import TemporaryFile
from typing import NamedTuple

from bench.machine import ROOT


class Finished(NamedTuple):
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
        return ": ".join((f"exit code {self.code}", *(line.strip() for line in self.tail(1))))


def run(command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None) -> Finished:
    """Run in the repository and in a process group of its own, which is killed at the end: no worker is left behind.

    environment: variables beside this process's own.
    """
    began = time.monotonic()
    with TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        how = {"cwd": ROOT, "env": os.environ | (environment or {}), "stdin": subprocess.DEVNULL, "process_group": 0}
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, **how)  # noqa: S603
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
