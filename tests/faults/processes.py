"""Processes that are forked from this one, in a folder of their own: what they said, how they ended, what they took.

A fork has everything imported already, so a command costs what it does and not what its start does. The process that
forks keeps to one thread.
"""

import ctypes
import hashlib
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ddpm.commands import main as ddpm
from export.__main__ import main as ddpm_export

PROGRAMS = {"ddpm": ddpm, "ddpm-export": ddpm_export}
LIMIT = 120  # seconds after which a command hangs: the longest takes five
REFUSED = {"ddpm": (1, 2), "ddpm-export": (1, 2, 3)}  # 3: a file that is not what `ddpm-export onnx` wrote
POLL = 0.002
PR_SET_PDEATHSIG = 1  # prctl(2)


class Lost(AssertionError):
    """What must hold did not."""


@dataclass(frozen=True)
class Ended:
    """A process that has ended: its exit code (-N: killed by signal N), its streams, and its peak of memory in MB."""

    what: str
    code: int
    out: str
    err: str
    seconds: float
    peak: int

    def need(self, code: int = 0) -> "Ended":
        """Itself, if it ended with this code. Raises Lost."""
        if self.code != code:
            raise Lost(f"{self.what}: ended with {self.code}, needs {code}; said: {self.last()}")
        return self

    def last(self) -> str:
        return (self.err.strip().splitlines() or self.out.strip().splitlines() or ["nothing"])[-1][:300]

    def refusal(self, *named: str) -> str:
        """Its one line of error, which names one of these. Raises Lost if it is anything else than refused."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        if self.code not in REFUSED[self.what.split()[0]] or len(lines) != 1 or "Traceback" in self.err:
            raise Lost(f"{self.what}: ended with {self.code}, needs a result or one line of error; said: {self.last()}")
        if named and not any(name in lines[0] for name in named):
            raise Lost(f"{self.what}: the error names none of {', '.join(named)}: {lines[0]}")
        return lines[0]


class Child:
    """A fork of this process that works in `folder`, in a process group of its own.

    It speaks into pipes: files would be subject to the limits that are tried on it.
    """

    def __init__(self, folder: Path, work: Callable[[], object], what: str) -> None:
        self.what, self.began = what, time.monotonic()
        pipes = [os.pipe(), os.pipe()]
        self.said = {end: bytearray() for end, _ in pipes}
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._become(folder, work, [into for _, into in pipes])
        for end, into in pipes:
            os.close(into)
            os.set_blocking(end, False)

    def _become(self, folder: Path, work: Callable[[], object], streams: Sequence[int]) -> None:
        code = 70
        try:
            os.setpgid(0, 0)
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nothing outlives the one that waits for it
            os.chdir(folder)
            for number, into in enumerate(streams, 1):
                os.dup2(into, number)
                os.close(into)
            sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
            # As a shell starts a program; one in the background would ignore Ctrl-C.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            code = work()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)  # the command is over
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 0)

    def _listen(self) -> None:
        for end, said in self.said.items():
            with suppress(BlockingIOError):  # nothing more for now
                while chunk := os.read(end, 1 << 16):
                    said += chunk

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def halted(self, limit: float = LIMIT) -> bool:
        """Wait until it has stopped itself (True) or ended (False)."""
        end = time.monotonic() + limit
        while time.monotonic() < end:
            found = os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT | os.WNOHANG)
            if found is not None:
                return found.si_code == os.CLD_STOPPED
            self._listen()
            time.sleep(POLL)
        raise Lost(f"{self.what}: neither stopped nor ended in {limit:.0f} s")

    def wait(self, limit: float = LIMIT) -> Ended:
        """What it was. Raises Lost if it does not end within so many seconds."""
        end = time.monotonic() + limit
        while True:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > end:
                os.killpg(self.pid, signal.SIGKILL)
                os.wait4(self.pid, 0)
                raise Lost(f"{self.what}: no end in {limit:.0f} s")
            self._listen()
            time.sleep(POLL)
        self._listen()
        for end in self.said:
            os.close(end)
        out, err = (said.decode("utf-8", "replace") for said in self.said.values())
        code, seconds = os.waitstatus_to_exitcode(status), time.monotonic() - self.began
        return Ended(self.what, code, out, err, seconds, usage.ru_maxrss >> 10)


def start(folder: Path, words: Sequence[str], prepare: Callable[[], object] | None = None) -> Child:
    """A command of ours in a process; `prepare` runs in it before."""

    def work() -> object:
        if prepare is not None:
            prepare()
        return PROGRAMS[words[0]](list(words[1:]))

    return Child(folder, work, " ".join(words))


def call(
    folder: Path, words: Sequence[str], prepare: Callable[[], object] | None = None, limit: float = LIMIT
) -> Ended:
    """`start` and `wait`."""
    return start(folder, words, prepare).wait(limit)


def digest(path: Path, name: str) -> str:
    """Of a file's content under this name; of a manifest without the seconds that it took to open files."""
    content = path.read_bytes()
    if Path(name).name == "manifest.json":
        content = re.sub(rb'"open_s": [0-9.e-]+', b'"open_s": 0', content)
    return hashlib.sha256(content).hexdigest()[:16]


def content(folder: Path) -> dict[str, str]:
    """{name: digest} of every file below a folder."""
    names = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: digest(path, name) for name, path in names.items()}


def differences(found: dict[str, str], wanted: dict[str, str]) -> str:
    """In words; empty if there are none."""
    words = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    words += [f"{name} is left over" for name in found.keys() - wanted.keys()]
    words += [f"{name} has other bytes" for name in found.keys() & wanted.keys() if found[name] != wanted[name]]
    return ", ".join(sorted(words))
