"""A profile read from its Chrome trace: parts of a step, operators, modules and memory.

The trace file is the one source: what the report says can be checked in Perfetto. Its times are microseconds. A range
`module:PATH|CLASS` is a module's forward (the root's PATH is empty); an engine whose network is not called module by
module may emit ranges named like PARTS itself.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, NamedTuple

from bench.profiling.operators import work_of
from kernels.backend import Cost

MODULE = "module:"
STEP, WARM_UP = "step ", "warm-up "
PARTS = ("encoder", "bottleneck", "decoder", "head", "embeddings", "solver", "noise")
OTHER, GAPS = "other", "gaps"
AHEAD = "noise ahead"  # of several steps: what happens inside belongs to all of them, not to the step around it

# Part -> first component of a module's path, without its number, of the networks in ddpm/networks/ and of the inference
# form. What the root itself does (gates, concatenations) happens around the up stages.
COMPONENTS = {
    "encoder": ("init_conv", "down", "inp", "initial", "shortcut", "downs"),
    "bottleneck": ("to_vec", "up0", "bottleneck"),
    "decoder": ("up", "blocks", "upsamplings", "ups", ""),
    "head": ("out", "head", "normalisation", "last"),
    "embeddings": ("timeembed", "contextembed", "embed", "embeddings"),
}
PART_OF = {component: part for part, components in COMPONENTS.items() for component in components}
# Operators of the inference form, for compiled code, which has no modules.
OPERATORS = {"fused_ddpm::bottleneck": "bottleneck", "fused_ddpm::group_norm_relu": "head"}
RANGE, OPERATOR = "user_annotation", "cpu_op"
KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
# A compiled region is not an operator: what it calls is, and the rest of it is code that the compiler made.
COMPILED = ("Torch-Compiled Region", "## Call CompiledFxGraph")
COMPILED_CODE = "compiled code"


def part_of(path: str) -> str:
    """The part that a module belongs to; `other` for a network that is not known here."""
    first = path.split(".", 1)[0]
    return PART_OF.get(first) or PART_OF.get(first.rstrip("0123456789"), OTHER)


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


class Call(NamedTuple):
    """An outermost operator call. time: on the CPU its own, on CUDA of the kernels launched. number: how many it is."""

    name: str
    dims: Any
    part: str
    time: float
    work: Cost | None = None
    number: float = 1


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
    timed = [event for event in trace["traceEvents"] if event.get("ph") == "X" and "dur" in event]
    events = [event for event in timed if event.get("cat") in (RANGE, OPERATOR)]
    threads = {(event["pid"], event["tid"]) for event in events if event["name"].startswith(STEP)}
    steps: list[Span] = []
    stack: list[Span] = []
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        begin = event["ts"]
        span = Span(event["name"], event["cat"], begin, begin + event["dur"], event.get("args", {}))
        while stack and stack[-1].end <= begin:
            stack.pop()
        if (event["pid"], event["tid"]) not in threads or not (stack or span.name.startswith(STEP)):
            continue
        (stack[-1].children if stack else steps).append(span)
        stack.append(span)
    return steps


def union(intervals: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals (begin, end)."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def _add(parent: dict[str, Any], time: float, name: str, path: str, kind: str, part: str) -> dict[str, Any]:
    """Add time to the child of this name of a module's node, made if it is not there, and return it."""
    found = next((node for node in parent["children"] if node["name"] == name), None)
    if found is None:
        found = {"name": name, "path": path, "kind": kind, "part": part, "ms": 0.0, "children": []}
        parent["children"].append(found)
    found["ms"] += time
    return found


class _Reading:
    """The steps of a trace, read: operator `calls`, and `root`, the nested times of modules.

    A call belongs to the innermost range around it that is a part or a module. Outside of both it is the solver's if
    the network has already returned, else `other`. launched: on CUDA, operator id -> microseconds of its kernels.
    ahead: the time of noise drawn ahead, which is in neither.
    """

    def __init__(self, steps: Sequence[Span], launched: Mapping[int, float] | None) -> None:
        self.launched, self.ahead = launched, 0.0
        self.calls: list[Call] = []
        self.root = _add({"children": []}, 0.0, "step", "", "step", OTHER)
        for step in steps:
            self.root["ms"] += step.time
            self.returned = False
            for child in step.children:
                self._visit(child, None, "", self.root)

    def _visit(self, span: Span, part: str | None, module: str, node: dict[str, Any]) -> None:
        compiled = span.name.startswith(COMPILED)
        if span.name == AHEAD:
            self.ahead += span.time
            return
        if span.category == RANGE and span.name in PARTS:
            part, node = span.name, _add(node, span.time, span.name, "", "range", span.name)
        elif span.category == RANGE and span.name.startswith(MODULE):
            path, _, kind = span.name.removeprefix(MODULE).partition("|")
            part, name = part_of(path), path.removeprefix(f"{module}.") if path else "network"
            module, node = path, _add(node, span.time, name, path, kind, part if path else OTHER)
        elif span.category == OPERATOR and not compiled:
            self._call(span, OPERATORS.get(span.name, part))
            return
        for child in span.children:
            self._visit(child, part, module, node)
        if compiled and self.launched is None:
            own = span.time - sum(child.time for child in span.children)
            self.calls.append(Call(COMPILED_CODE, (), part or OTHER, own))
        self.returned |= span.name.startswith(f"{MODULE}|")

    def _call(self, span: Span, part: str | None) -> None:
        if part is None and self.returned:
            part = "solver"
            _add(self.root, span.time, part, "", "operators", part)
        time = span.time
        if self.launched is not None:
            time = sum(self.launched.get(inner.args.get("External id", -1), 0.0) for inner in span.walk())
        written = [span.args.get(key, []) for key in ("Input Dims", "Input type", "Concrete Inputs")]
        self.calls.append(Call(span.name, written[0], part or OTHER, time, work_of(span.name, *written)))


def breakdown(trace: Mapping[str, Any], ahead: Sequence[tuple[int, float]] = ()) -> dict[str, Any]:
    """What a step consists of: parts, operators, modules and memory, in milliseconds (bytes, flops) per step.

    ahead: (steps, seconds) of draws of noise for several steps at once: each step has the mean, whichever it was that
    drew. parts: time in which an operator (on CUDA a kernel) ran for that part; `gaps` is the rest of the step:
    Python, dispatch and launches. They add up to profiler.step_ms. modules: wall time, on CUDA of the launching thread.
    """
    steps = steps_of(trace)
    ran = [event for event in trace["traceEvents"] if event.get("ph") == "X" and event.get("cat") in KERNELS]
    launched = _sums((event.get("args", {}).get("External id"), event["dur"]) for event in ran)
    count = len(steps)
    reading = _Reading(steps, launched if ran else None)
    root, calls, drawn = reading.root, reading.calls, 0.0
    if ahead:
        rows, seconds = map(sum, zip(*ahead, strict=True))
        drawn = seconds / rows * 1e6 * count
        calls.append(Call("noise, drawn ahead", (), "noise", drawn, number=count * len(ahead) / rows))
        _add(root, drawn, "noise", "", "range", "noise")
    root["ms"] += drawn - reading.ahead
    nodes = [root]
    for node in nodes:
        node["ms"] *= 1e-3 / count
        nodes += node["children"]
    times = _sums((call.part, call.time) for call in calls)
    # Kernels of several streams may overlap: the parts share the time in which the device was busy.
    busy = union([(event["ts"], event["ts"] + event["dur"]) for event in ran]) if ran else times.total()
    scale = busy / times.total() / count / 1e3 if times else 0.0
    step_ms = (steps[-1].end - steps[0].begin + drawn - reading.ahead) / count / 1e3
    parts = {name: scale * times[name] for name in (*PARTS, OTHER)}
    parts[GAPS] = max(0.0, step_ms - sum(parts.values()))
    whole = sum(parts.values())
    groups = defaultdict(list)
    for call in calls:
        groups[call.name, str(call.dims)].append(call)
    operators = sorted((_row(group, count, whole) for group in groups.values()), key=lambda row: -row["ms"])
    counted = sum(row["ms"] for row in operators if row["bytes"] is not None)
    share = counted / (sum(row["ms"] for row in operators) or 1.0)
    return {
        "parts": [{"name": name, "ms": ms, "share": ms / whole} for name, ms in parts.items() if ms > 0],
        "operators": operators,
        "modules": root,
        "profiler": {"steps": count, "step_ms": step_ms, "counted": share},
        "memory": _memory(trace, steps[count // 2], bool(ran)),
    }


def _sums(pairs: Iterable[tuple[Any, float]]) -> Counter[Any]:
    sums: Counter[Any] = Counter()
    for key, value in pairs:
        sums[key] += value
    return sums


def _row(group: Sequence[Call], count: int, step_ms: float) -> dict[str, Any]:
    """The figures per step, of `count` steps, of calls of one name and shapes."""
    times, works = _sums((call.part, call.time) for call in group), [call.work for call in group]
    ms, counted = times.total() / count / 1e3, None not in works
    flops, moved = (sum(getattr(w, key) for w in works) / count if counted else None for key in ("flops", "bytes"))
    return {
        "name": group[0].name.removeprefix("aten::"),
        "shapes": [shape for shape in group[0].dims if shape],
        "parts": [part for part, _ in times.most_common()],
        "calls": sum(call.number for call in group) / count,
        "ms": ms,
        "share": ms / step_ms,
        "flops": flops,
        "bytes": moved,
        "gflop_per_s": flops / ms / 1e6 if counted and ms else None,
        "gb_per_s": moved / ms / 1e6 if counted and ms else None,
    }


def _memory(trace: Mapping[str, Any], step: Span, cuda: bool) -> dict[str, Any]:
    """step: (milliseconds since its start, bytes held above it); step_peak_in: path of the innermost module at most."""
    events = sorted(
        (event["ts"], event["args"]["Total Allocated"], event["args"]["Bytes"])
        for event in trace["traceEvents"]
        if event["name"] == "[memory]" and (event["args"]["Device Type"] == 1) == cuda
    )
    inside = [event for event in events if step.begin <= event[0] <= step.end]
    if not inside:
        return {"step": [], "step_peak_in": None, "step_peak_bytes": None}
    base = inside[0][1] - inside[0][2]
    held = [((time - step.begin) / 1e3, total - base) for time, total, _ in ((step.begin, base, 0), *inside)]
    time, peak = max(((event[0], event[1] - base) for event in inside), key=itemgetter(1))
    around = [span.name for span in step.walk() if span.begin <= time <= span.end and span.name.startswith(MODULE)]
    module = (around[-1].removeprefix(MODULE).split("|")[0] or "network") if around else None
    return {"step": held, "step_peak_in": module, "step_peak_bytes": peak}
