"""A program: calls of operators in C++, recorded once as a flat list, run any number of times without Python.

    recorder = Recorder(table)             table [S, ...]: its first row is what the calls below are given
    with recorder:
        solver_step(x, form(x, table[:1]), ...)
    for done in recorder.program().run(50): ...

While it records, operators run as ever but that `launch_native` notes their calls instead of making them; outputs get
memory that is taken again when they are gone. A mode of PyTorch's dispatcher sees every other operator: views pass, all
else is an error, so that nothing is left out of the program. In pass k of a run the addresses within a table are those
of its row k.
"""

import ctypes
import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import backend, native

SOURCE = native.source_of("program")
# How long C++ runs until Python may look for interrupts and show how far it is.
SLICE_NS = 50_000_000
MOST_ARGUMENTS = 64  # of a call, as in program.cpp
LINE = 16  # floats of a cache's line
EMPTY = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}
Call = tuple[Path, tuple[int, ...]]


class Unrecorded(RuntimeError):
    """A network calls what a program cannot have."""


def _integers(values: Sequence[int]) -> ctypes.Array:
    return (ctypes.c_int64 * len(values))(*values)


class Recorder(TorchDispatchMode):
    """Records this thread's calls while it is entered. tables: [S, ...], of which the calls are given first rows."""

    def __init__(self, *tables: Tensor) -> None:
        super().__init__()
        self.tables = tables
        self.calls: list[Call] = []
        self.blocks: list[torch.UntypedStorage] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch else wraps __torch_dispatch__ in what imports torch._dynamo: 1.4 s of the first sample (one core)."""
        return False

    def __enter__(self) -> "Recorder":
        self._noting = backend.recording_native(lambda source, call: self.calls.append((source, tuple(call))))
        self._noting.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._noting.__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if run := backend.IMPLEMENTATIONS.get(function.name().removeprefix("fused_ddpm::")):
            super().__enter__()  # what it calls is seen as well
            try:
                return run(*args)
            finally:
                super().__exit__(None, None, None)
        out = function(*args, **kwargs or {}) if function in EMPTY or function.is_view else None
        if out is None:
            raise Unrecorded(f"{function} on a buffer of the program: not an operator of ours in C++")
        return self._placed(out) if function in EMPTY else out

    def _placed(self, like: Tensor) -> Tensor:
        """Such a tensor in the smallest block that is free, or in a new one."""
        size = max(like.untyped_storage().nbytes(), 1)
        free = [block for block in self.blocks if torch._C._storage_Use_Count(block._cdata) == 1]
        block = min((block for block in free if block.nbytes() >= size), key=lambda block: block.nbytes(), default=None)
        if block is None:
            block = torch.UntypedStorage(size)
            self.blocks.append(block)
        return torch.empty(0, dtype=like.dtype).set_(block, 0, like.shape, like.stride())

    def program(self) -> "Program":
        """Of the calls recorded."""
        return Program(self.calls, self.tables, self.blocks)


# A team's threads go from call to call together; it belongs to the process that made it, and to one run at a time.
_idle: dict[tuple[int, int], list[int]] = {}


@cache
def _library() -> ctypes.CDLL:
    library = native.load(SOURCE)
    library.program_team.restype, library.program_team.argtypes = ctypes.c_void_p, [ctypes.c_int64]
    library.program.restype = ctypes.c_int64
    library.program.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 3 + [ctypes.c_int]
    return library


class Program:
    """Calls in their order. Inputs and weights are kept alive by whoever made the calls.

    blocks: memory of what is between them. scratch: of the threads, within a call. nanoseconds: of each call, summed
    over all passes so far.
    """

    def __init__(self, calls: Sequence[Call], tables: Sequence[Tensor], blocks: Sequence[torch.UntypedStorage]) -> None:
        self.calls, self._tables, self.blocks = list(calls), tables, blocks
        ranges = [(t.data_ptr(), t.data_ptr() + t.nbytes, t.stride(0) * t.element_size()) for t in tables]
        entries: list[int] = []
        arguments: list[int] = []
        moving: list[int] = []
        for source, call in self.calls:
            if len(call) > MOST_ARGUMENTS:
                raise ValueError(f"{source.stem}: a call of {len(call)} fields, needs at most {MOST_ARGUMENTS}")
            moves = [(k, step) for k, value in enumerate(call) for low, high, step in ranges if low <= value < high]
            share = ctypes.cast(getattr(native.load(source), f"{source.stem}_share"), ctypes.c_void_p).value
            entries += (share, len(arguments), len(call), len(moving) // 2, len(moves))
            arguments += call
            moving += [number for pair in moves for number in pair]
        self._arrays = tuple(map(_integers, (entries, arguments, moving)))
        self.nanoseconds = _integers([0] * len(self.calls))
        self.threads, self.scratch = 0, torch.empty(0)

    def _prepare(self, threads: int) -> None:
        """Memory for so many threads."""
        floats = LINE
        for source, call in self.calls:
            needs = getattr(native.load(source), f"{source.stem}_scratch")
            needs.restype = ctypes.c_int64
            floats = max(floats, needs(_integers(call), ctypes.c_int64(threads)))
        stride = -(-floats // LINE) * LINE
        self.scratch = torch.empty(threads * stride, dtype=torch.float32, device="cpu")  # begins at a line
        entries, arguments, moving = map(ctypes.addressof, self._arrays)
        fields = (entries, len(self.calls), arguments, moving, self.scratch.data_ptr(), stride)
        self._fields = _integers((*fields, ctypes.addressof(self.nanoseconds)))
        self.threads = threads

    def run(self, passes: int, singly: bool = False, threads: int | None = None) -> Iterator[int]:
        """So many passes by as many threads as PyTorch has, or as given. Yields how many are done, now and then, after
        the last, and after each where `singly`."""
        threads = threads or torch.get_num_threads()
        if threads != self.threads:
            self._prepare(threads)
        count, position, done = len(self.calls), 0, 0
        while done < passes:
            end = ((done + 1) if singly else passes) * count
            position = self._some(threads, position, end)
            if position // count > done:
                done = position // count
                yield done

    def _some(self, threads: int, position: int, end: int) -> int:
        process = os.getpid()
        idle = _idle.setdefault((process, threads), [])
        try:
            team = idle.pop()
        except IndexError:
            team = _library().program_team(threads)
        try:
            return _library().program(self._fields, team, position, end, SLICE_NS, process != native.PROCESS)
        finally:
            idle.append(team)
