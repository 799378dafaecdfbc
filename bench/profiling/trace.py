"""A profile read from its Chrome trace: steps, operators, kernels, modules and memory.

The trace file is the one source: what the report says can be checked in Perfetto. Times are microseconds.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.profiling.operators import Work, work_of
from bench.profiling.ranges import MODULE, OPERATORS, OTHER, PARTS, STEP, part_of

RANGE, OPERATOR = "user_annotation", "cpu_op"
KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
# A compiled region is not an operator: what it calls is, and the rest of it is code that the compiler made.
COMPILED = ("Torch-Compiled Region", "## Call CompiledFxGraph")
COMPILED_CODE = "compiled code"


@dataclass
class Span:
    """A range or an operator call, with what happened inside it, in order."""

    name: str
    category: str
    begin: float
    end: float
    args: dict[str, Any]
    children: list["Span"] = field(default_factory=list)

    @property
    def time(self) -> float:
        return self.end - self.begin

    def walk(self) -> Iterator["Span"]:
        """This span and all below it."""
        yield self
        for child in self.children:
            yield from child.walk()


@dataclass(frozen=True)
class Call:
    """One outermost operator call of a step. time: on the CPU its own, on CUDA that of the kernels it launched."""

    name: str
    part: str
    module: str
    time: float
    dims: Sequence[Any]
    work: Work | None


def slim(trace: Mapping[str, Any]) -> dict[str, Any]:
    """The trace without what names a machine or a file, its times from 0: smaller, and fit to be shown around."""
    events = [event for event in trace["traceEvents"] if event.get("ph") in ("X", "i", "M", "s", "f")]
    start = min((event["ts"] for event in events if event["ph"] == "X"), default=0)
    for event in events:
        if "ts" in event:
            event["ts"] = round(event["ts"] - start, 3)
        for key in ("Record function id", "Ev Idx", "Addr", "Input Strides", "finished"):
            event.get("args", {}).pop(key, None)
    kept = ("schemaVersion", "deviceProperties", "displayTimeUnit")
    return {key: trace[key] for key in kept if key in trace} | {"traceEvents": events}


def steps_of(trace: Mapping[str, Any]) -> list[Span]:
    """The step ranges of the trace, each a tree of ranges and operators of its thread."""
    events = [
        event
        for event in trace["traceEvents"]
        if event.get("ph") == "X" and event.get("cat") in (RANGE, OPERATOR) and "dur" in event
    ]
    threads = {(event["pid"], event["tid"]) for event in events if event["name"].startswith(STEP)}
    events = [event for event in events if (event["pid"], event["tid"]) in threads]
    steps: list[Span] = []
    stack: list[Span] = []
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        begin = event["ts"]
        span = Span(event["name"], event["cat"], begin, begin + event["dur"], event.get("args", {}))
        while stack and stack[-1].end <= begin:
            stack.pop()
        if stack:
            stack[-1].children.append(span)
        elif span.name.startswith(STEP):
            steps.append(span)
        else:
            continue
        stack.append(span)
    return steps


def kernels_of(trace: Mapping[str, Any]) -> list[tuple[float, float, int | None]]:
    """(begin, end, id of the operator that launched it) of everything that ran on the GPU; empty on a CPU."""
    return sorted(
        (event["ts"], event["ts"] + event["dur"], event.get("args", {}).get("External id"))
        for event in trace["traceEvents"]
        if event.get("ph") == "X" and event.get("cat") in KERNELS
    )


def union(intervals: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals (begin, end)."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def calls_of(step: Span, launched: Mapping[int, float] | None) -> list[Call]:
    """The outermost operator calls of a step, with the part that each belongs to.

    A call belongs to the innermost range around it that is a part or a module. Outside of both it is the solver's if
    the network has already returned, else `other`. launched: on CUDA, operator id -> microseconds of its kernels.
    """
    calls: list[Call] = []
    returned = False

    def visit(span: Span, part: str | None, module: str) -> None:
        nonlocal returned
        if span.category == RANGE:
            if span.name in PARTS:
                part = span.name
            elif span.name.startswith(MODULE):
                module = span.name.removeprefix(MODULE).split("|")[0]
                part = part_of(module)
        compiled = span.name.startswith(COMPILED)
        if span.category == OPERATOR and not compiled:
            part = OPERATORS.get(span.name, part) or ("solver" if returned else OTHER)
            calls.append(_call(span, part, module, launched))
            return
        for child in span.children:
            visit(child, part, module)
        if compiled and launched is None:
            left = span.time - sum(child.time for child in span.children)
            calls.append(Call(COMPILED_CODE, part or OTHER, module, left, [], None))
        if span.name.startswith(f"{MODULE}|"):
            returned = True

    for child in step.children:
        visit(child, None, "")
    return calls


def _call(span: Span, part: str, module: str, launched: Mapping[int, float] | None) -> Call:
    dims = span.args.get("Input Dims", [])
    work = work_of(span.name, dims, span.args.get("Input type", []), span.args.get("Concrete Inputs", []))
    time = span.time
    if launched is not None:
        time = sum(launched.get(inner.args.get("External id", -1), 0.0) for inner in span.walk())
    return Call(span.name, part, module, time, dims, work)


def icicle(steps: Sequence[Span]) -> dict[str, Any]:
    """Nested wall time of the modules, milliseconds per step: {name, path, kind, part, ms, children}.

    Beside the network stand the noise and the solver. On CUDA these are the times of the launching thread.
    """
    root = _node("step", "", "step", OTHER)
    for step in steps:
        root["ms"] += step.time
        _merge(root, step.children, "")
        network = [span for span in step.children if span.name.startswith(MODULE)]
        if network:
            node = _child(root, "solver", "", "operators", "solver")
            last = network[-1].end
            node["ms"] += sum(s.time for s in step.children if s.category == OPERATOR and s.begin >= last)
    _scale(root, 1e-3 / max(1, len(steps)))
    return root


def _node(name: str, path: str, kind: str, part: str) -> dict[str, Any]:
    return {"name": name, "path": path, "kind": kind, "part": part, "ms": 0.0, "children": []}


def _child(parent: dict[str, Any], name: str, path: str, kind: str, part: str) -> dict[str, Any]:
    found = next((node for node in parent["children"] if node["name"] == name), None)
    if found is None:
        found = _node(name, path, kind, part)
        parent["children"].append(found)
    return found


def _merge(parent: dict[str, Any], spans: Sequence[Span], above: str) -> None:
    for span in spans:
        if span.category != RANGE:
            continue
        if span.name in PARTS:
            node = _child(parent, span.name, "", "range", span.name)
            path = above
        elif span.name.startswith(MODULE):
            path, _, kind = span.name.removeprefix(MODULE).partition("|")
            name = path.removeprefix(f"{above}.") if path else "network"
            node = _child(parent, name, path, kind, part_of(path) if path else OTHER)
        else:
            node, path = parent, above
        if node is not parent:
            node["ms"] += span.time
        _merge(node, span.children, path)


def _scale(node: dict[str, Any], factor: float) -> None:
    node["ms"] = round(node["ms"] * factor, 4)
    for child in node["children"]:
        _scale(child, factor)


def memory_of(trace: Mapping[str, Any], step: Span, cuda: bool) -> list[tuple[float, float]]:
    """(milliseconds since the step's start, bytes held above what the step started with), by allocator event."""
    events = sorted(
        (event["ts"], event["args"]["Total Allocated"], event["args"]["Bytes"])
        for event in trace["traceEvents"]
        if event["name"] == "[memory]" and (event["args"]["Device Type"] == 1) == cuda
    )
    inside = [event for event in events if step.begin <= event[0] <= step.end]
    if not inside:
        return []
    base = inside[0][1] - inside[0][2]
    points = [(round((time - step.begin) / 1e3, 4), total - base) for time, total, _ in inside]
    return [(0.0, 0), *points]


def module_at(step: Span, milliseconds: float) -> str | None:
    """The innermost module, by its path, that runs at this time after the step's start."""
    time = step.begin + milliseconds * 1e3
    found = [span.name for span in step.walk() if span.begin <= time <= span.end and span.name.startswith(MODULE)]
    return (found[-1].removeprefix(MODULE).split("|")[0] or "network") if found else None
