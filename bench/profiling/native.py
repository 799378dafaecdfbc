"""The native engine under the profile: its program's own clock, written down as the trace of one step."""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch

from bench.profiling.trace import MODULE, OPERATOR, RANGE, STEP
from ddpm.inference import NATIVE, kept_form
from ddpm.trajectory import Trajectory

NAMESPACE = "fused_ddpm::"
SOLVER = ("solver_step", "guidance_rescale")  # others without weights (a canvas, shifts) are the network's


def _shapes(operator: str, call: Sequence[int]) -> dict[str, list[Any]]:
    """Of a convolution's tensors, as the profiler writes them down: flops and bytes are counted from them."""
    if operator != "convolution":
        return {}
    n, height, width, channels, of_skip, columns, taps = call[9:16]  # see native/convolution.h
    side = math.isqrt(taps)
    pairs = [[[n, c, height, width], [columns, c, side, side]] if c else [[], []] for c in (channels, of_skip)]
    dims = [*pairs[0], [], *pairs[1], *[[]] * 5]
    return {
        "Input Dims": dims,
        "Input type": ["float" if shape else "" for shape in dims],
        "Concrete Inputs": [""] * 10,
    }


def clocked(trajectory: Trajectory, *call: Any, **more: Any) -> dict[str, Any]:
    """A Chrome trace of one step, the mean of a whole trajectory's: a module is whose weights an operator reads.

    call, more: of the trajectory, without a callback. Nothing is measured but what always is, so a step takes as long.
    """
    form = kept_form(trajectory.model, torch.float32, NATIVE)
    trajectory(*call, **more)  # by now it is recorded, and the last of the states
    program = next(reversed(form.states.values())).program
    before, began = list(program.nanoseconds), time.perf_counter()
    trajectory(*call, **more)
    steps = len(trajectory.table)
    whole = (time.perf_counter() - began) * 1e6 / steps
    modules = {tensor.data_ptr(): path.rpartition(".")[0] for path, tensor in form.named_buffers()}
    at, events = 0.0, []

    def span(name: str, category: str, begin: float, end: float) -> dict[str, Any]:
        place = {"ph": "X", "pid": 1, "tid": 1, "args": {}}
        return place | {"cat": category, "name": name, "ts": begin, "dur": end - begin}

    for (source, arguments), spent, earlier in zip(program.calls, program.nanoseconds, before, strict=True):
        begin, at = at, at + (spent - earlier) / steps / 1e3
        path = next((modules[address] for address in arguments if address in modules), None)
        kind = "" if path is None else type(form.get_submodule(path)).__name__
        around = "solver" if source.stem in SOLVER else f"{MODULE}{path or source.stem}|{kind}"
        operator = span(NAMESPACE + source.stem, OPERATOR, begin, at) | {"args": _shapes(source.stem, arguments)}
        events += [span(around, RANGE, begin, at), operator]
    return {"traceEvents": [span(f"{STEP}0", RANGE, 0.0, max(at, whole)), *events]}
