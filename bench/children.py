"""Processes that measure: each in a group of its own, which ends with it, and none longer than allowed.

How one ended is told with whose it was and with what it was doing (see `bench.status`).
"""

import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from bench import status, store
from ddpm.command_line import BAD_INPUT, FAILED, debugging
from ddpm.errors import BadInput, WorkFailed
from ddpm.progress import Bar

# Without the working directory before PYTHONPATH: it may have a folder bench/ of its own.
PYTHON = (sys.executable, "-P")
# glibc's allocator: give nothing back to the system. Other allocators ignore it.
KEPT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 33), "MALLOC_TOP_PAD_": str(1 << 26)}
# Seconds a process may take unless told otherwise: the longest suite of ours, with all that it compiles, takes a third.
TIMEOUT = 3600.0
# Seconds from SIGTERM, after which a process removes what it has half written, to SIGKILL; and between looks at it.
GRACE, LOOK = 3.0, 0.1

# How our own messages begin on stderr: those of a command, and those of a traceback.
OURS = re.compile(r"error: |ddpm\.errors\.(?:(?P<bad>BadInput)|WorkFailed): ")

OnRow = Callable[[str], None]


class Running:
    """Shows beside a bar, at once, what the processes are doing: the first is long in coming to its end."""

    def __init__(self, bar: Bar) -> None:
        self.bar, self.done, self._shown = bar, 0, set()

    def of(self, side: str = "") -> OnRow:
        """The `on_row` of a process."""

        def on_row(doing: str) -> None:
            text = f"{side} {doing}".strip()
            self.bar.update(self.done, text)
            if self.bar.lines and text not in self._shown:  # once, for logs
                print(f"{self.bar.label}: {text}", file=sys.stderr, flush=True)
            self._shown.add(text)

        return on_row

    def ended(self, side: str = "") -> None:
        """A process has ended well."""
        self.done += 1
        self.bar.update(self.done, side)


def environment(paths: Sequence[Path], threads: int = 1, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This environment with these folders before all others in PYTHONPATH, so many threads, and `extra`.

    One thread, because processor time of several counts those that spin while they wait for one that lost its
    processor; wall times, as the figures of `step` and the ladder are, may take more. With one, memory stays with the
    process, for which the page faults of operators with large temporaries do not vary: the gating ratio of q_sample
    spread by 6% over six processes instead of 38%, that of solver_step by 5% instead of 28%.
    """
    count = str(threads)
    kept = KEPT if threads == 1 else {}
    folders = [*map(str, paths), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    # As users run it: a benchmark of Triton's interpreter is of no use to anybody.
    fixed = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "TRITON_INTERPRET": "0", "PYTHONFAULTHANDLER": "1"}
    return os.environ | kept | fixed | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(folders))} | (extra or {})


def time_limit(asked: float | None, configured: float | None) -> float:
    """Seconds a process may take, by --timeout or else the configuration. Raises BadInput where that is no limit."""
    if asked is not None and not asked < math.inf:
        raise BadInput(f"--timeout: got {asked}, needs seconds > 0")
    return asked or configured or TIMEOUT


class Ended(NamedTuple):
    """How a process ended: its exit code, what it was doing and what it wrote."""

    code: int
    doing: str
    output: str
    errors: str

    def error(self, side: str = "") -> BadInput | WorkFailed:
        """Why it failed, from the last line that it wrote to stderr. side: whose it was."""
        lines = [line.strip() for line in self.errors.splitlines() if line.strip()]
        said = OURS.match(lines[-1]) if lines else None
        if said is None:
            text = f"exit code {self.code} without a result {self.doing}" + (f" ({lines[-1]})" if lines else "")
        else:  # a message of ours, which says where
            text = lines[-1][said.end() :]
        kind = BadInput if self.code == BAD_INPUT or (said and said["bad"]) else WorkFailed
        return kind(f"{side}: {text}" if side else text)


def end(process: subprocess.Popen) -> None:
    """End a process and all that it started and left in its group, which may be more than itself."""

    def signalled(number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)

    try:
        if process.poll() is None:
            signalled(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
    finally:
        signalled(signal.SIGKILL)
        process.wait()


def _killed_by(number: int) -> str:
    with suppress(ValueError):
        name = signal.Signals(number).name
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"killed by signal {number}"


def python(
    arguments: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    *,
    timeout: float | None = None,
    on_row: OnRow | None = None,
    side: str = "",
) -> Ended:
    """Run Python with these arguments; see `run_child` for the rest.

    Raises WorkFailed, saying what it was doing, if it was killed or took too long.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ddpm-bench-") as temporary:
        told, output, errors = (Path(temporary) / name for name in ("status", "output", "errors"))
        with output.open("wb") as out, errors.open("wb") as err:
            how = {"cwd": folder, "env": {**environment, status.VARIABLE: str(told)}, "stdin": subprocess.DEVNULL}
            process = subprocess.Popen([*PYTHON, *arguments], stdout=out, stderr=err, process_group=0, **how)  # noqa: S603
            try:
                late = False
                while process.poll() is None and not late:
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(LOOK)
                    doing = status.heard(told)
                    if on_row is not None and doing:
                        on_row(doing)
                    late = timeout is not None and time.monotonic() - began > timeout and process.poll() is None
            finally:
                end(process)
        doing = status.heard(told) or "at its start"
        ended = Ended(process.returncode, doing, *(file.read_text(errors="replace") for file in (output, errors)))
    if debugging():
        sys.stderr.write(ended.errors)
    whose = f"{side}: " if side else ""
    if late:
        raise WorkFailed(f"{whose}no end after {timeout:g} s (--timeout) {doing}")
    if ended.code < 0:
        raise WorkFailed(f"{whose}{_killed_by(-ended.code)} {doing}")
    if ended.code not in (0, FAILED, BAD_INPUT):
        raise ended.error(side)
    return ended


def run_child(
    folder: Path,
    process: int,
    arguments: list[str],
    *,
    paths: Sequence[Path],
    extra: Mapping[str, str] | None = None,
    threads: int = 1,
    timeout: float | None = None,
    on_row: OnRow | None = None,
    side: str = "",
) -> store.Content:
    """`ddpm-bench run` in a process of its own, in this folder.

    paths, extra: see `environment`. timeout: seconds. on_row: is told, again and again, what the process is doing
    ("in row softmax/300 mine of speed.py"). side: "base" or "head", which errors begin with. Its records are numbered
    `process`; what it writes to stderr is shown under --debug. Raises BadInput for its exit code 2 and WorkFailed if it
    ended without a file: a crashed process is never silent.
    """
    with tempfile.TemporaryDirectory(prefix="ddpm-bench-") as temporary:
        out = Path(temporary) / "run.json"
        line = ["-m", "bench", "run", *arguments, "--quiet", "--out", str(out)]
        own = environment(paths, threads, extra)
        ended = python(line, folder, own, timeout=timeout, on_row=on_row, side=side)
        if ended.code == BAD_INPUT or not out.is_file():
            raise ended.error(side)
        content = store.load(out)
    for record in content["records"]:
        record["process"] = process
    return content
