"""What a process is about to do to files: something happens to it before the k-th such call.

Python tells of most calls by its audit events, whoever makes them; fsync, stat and the reader of safetensors, which
have none, are wrapped.
"""

import fcntl
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import safetensors

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGING = ("open to write", "fsync", "os.rename", "os.remove", "os.link", "os.truncate", "os.mkdir", "os.rmdir")
ALL = (*CHANGING, "open", "fcntl.flock", "stat", "safe_open")
Reach = Callable[[str, str, tuple[object, ...]], None]


def on_file_calls(reach: Reach, kinds: tuple[str, ...]) -> None:
    """reach(kind, name, arguments) before every call of these kinds on what is below the working folder, for good."""
    root, busy = Path.cwd(), False

    def name_of(target: object) -> str | None:
        if isinstance(target, int):
            target = Path(f"/proc/self/fd/{target}").readlink()
        if not isinstance(target, str | bytes | os.PathLike):
            return None
        path = os.path.abspath(os.fsdecode(target))  # noqa: PTH100 (follows no links)
        return os.path.relpath(path, root) if path == str(root) or path.startswith(f"{root}/") else None

    def tell(kind: str, target: object, arguments: tuple[object, ...]) -> None:
        nonlocal busy
        if busy or kind not in kinds:
            return
        busy = True
        try:
            name = name_of(target)
            if name is not None:
                reach(kind, name, arguments)
        finally:
            busy = False

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open":
            writes = isinstance(arguments[2], int) and arguments[2] & WRITES
            tell("open to write" if writes else "open", arguments[0], arguments)
        elif event == "fcntl.flock" and arguments[1] == fcntl.LOCK_UN:
            return
        elif event in ALL:
            tell(event, arguments[0], arguments)

    def wrapped(kind: str, function: Callable) -> Callable:
        def call(target: object, *more: object, **named: object) -> object:
            tell(kind, target, (target, *more))
            return function(target, *more, **named)

        return call

    os.fsync, os.fdatasync = wrapped("fsync", os.fsync), wrapped("fsync", os.fdatasync)
    os.stat = wrapped("stat", os.stat)
    safetensors.safe_open = wrapped("safe_open", safetensors.safe_open)
    sys.addaudithook(audit)


def at_call(number: int, happens: Callable[[], None], kinds: tuple[str, ...]) -> Callable[[], None]:
    """For `start(prepare=)`: `happens` before the number-th call, from 0."""

    def prepare() -> None:
        left = number

        def reach(*_: object) -> None:
            nonlocal left
            left -= 1
            if left == -1:
                happens()

        on_file_calls(reach, kinds)

    return prepare


def signals_itself(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


kills_itself = signals_itself(signal.SIGKILL)
halts_itself = signals_itself(signal.SIGSTOP)


class Disk:
    """What a power cut would leave: files that were written and not fsynced since are cut to half."""

    def __init__(self) -> None:
        self.synced: dict[int, int] = {}

    def watch(self, happens_at: int | None) -> Callable[[], None]:
        """For `start(prepare=)`: a power cut before the call of this number, or after the last one."""

        def prepare() -> None:
            left = -1 if happens_at is None else happens_at
            for path in self._files():
                self._sync(path.stat())

            def reach(kind: str, name: str, arguments: tuple[object, ...]) -> None:
                nonlocal left
                if left == 0:
                    self.cut()
                    kills_itself()
                left -= 1
                if kind == "fsync":
                    self._sync(os.fstat(arguments[0]))

            on_file_calls(reach, CHANGING)

        return prepare

    def _files(self) -> list[Path]:
        return [path for path in Path.cwd().rglob("*") if path.is_file()]

    def _sync(self, status: os.stat_result) -> None:
        self.synced[status.st_ino] = status.st_mtime_ns

    def cut(self) -> None:
        for path in self._files():
            status = path.stat()
            if self.synced.get(status.st_ino) != status.st_mtime_ns:
                os.truncate(path, status.st_size // 2)
