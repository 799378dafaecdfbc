"""What the step must reach, and what was measured, beside each other.

On the CPU by a stored `ddpm-bench run --suite step`, on a GPU by the files of `ddpm-bench gpu`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from bench import store
from bench.interval import Interval, median_interval

# (row of suite step, what is counted, to reach, beyond); the ratio is of the better of the engines below.
ENGINES = ("fused", "compile")
GOALS = (
    ("step/fp32/batch32/plain", "x eager", 1.35, 1.5),
    ("step/fp32/batch1/plain", "x eager", 2.0, 2.5),
    ("step/fp32/batch1/guided", "x eager", None, None),
    ("step/fp32/batch32/guided", "x eager", 1.8, 2.2),
    ("step/bf16/batch32/plain", "x eager", 2.5, 2.8),
    ("step/bf16/batch32/guided", "x eager", 3.3, 4.0),
    ("step/fp32/batch32/plain", "share of the convolution rate", 0.85, None),
)
HEADINGS = ("step", "", "eager", "to reach", "beyond", *ENGINES, "reached")
# On an H200, n_feat 64, T 500: (workload, x eager in fp32, x max-autotune in one type, absolute figure).
ABSOLUTE = {"ms": "ms of 500 steps", "share": "of the measured matrix rate"}
GPU_GOALS = (
    ("cuda/batch1", 20.0, 2.0, ("ms", 45.0)),
    ("cuda/batch64", 20.0, 2.0, ("ms", 55.0)),
    ("cuda/batch1024", 6.0, 1.5, ("share", 0.5)),
    ("cuda/batch64-guided", 25.0, 2.5, None),
    ("training/batch100", 4.0, 1.5, None),
    ("cuda/256x256-batch16", 3.0, 1.2, None),
)
GPU_ENGINES = ("graph", "kernels", "fused", "compile")
AUTOTUNE, TF32 = "max-autotune", "eager tf32"  # competitors in the suites `cuda` and `training`
GPU_HEADINGS = ("workload", "", "measured", "by", "to reach", "reached")
KEYS = {"x eager": "speed_up", "share of the convolution rate": "share_of_convolution"}


def _interval(records: Sequence[Mapping[str, Any]], workload: str, candidate: str, key: str) -> Interval | None:
    """Over processes; None where the row was not measured. Raises ValueError if it failed or lost parity."""
    found = [r for r in records if r["workload"] == workload and r["candidate"] == candidate]
    for record in found:
        if not store.is_good(record):
            raise ValueError(f"{store.row_of(record)}: failed or lost parity, needs a run without failures")
    return median_interval([record[key] for record in found]) if found else None


def _shown(found: Interval | None, key: str) -> str:
    if found is None:
        return "not measured"
    if key == "speed_up":
        return found.text()
    return f"{found.median:.0%} ({found.low:.0%} to {found.high:.0%})" if found.coverage else f"{found.median:.0%}"


def _goal(value: float | None, key: str) -> str:
    if value is None:
        return ""
    return f"{value:g}x" if key == "speed_up" else f"{value:.0%}"


def goal_cells(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """As HEADINGS, one row per goal, from the records of suite `step`."""
    rows = []
    for workload, what, reach, beyond in GOALS:
        key = KEYS[what]
        eager = _interval(records, workload, "eager", "kernel_us")
        found = [_interval(records, workload, engine, key) for engine in ENGINES]
        best = max((interval.median for interval in found if interval is not None), default=None)
        verdict = "" if reach is None or best is None else "beyond" if beyond and best >= beyond else None
        if verdict is None:
            verdict = "yes" if best >= reach else "**no**"
        rows.append(
            [
                workload.removeprefix("step/"),
                what,
                "" if eager is None else f"{eager.median * 1e-3:.3g} ms",
                _goal(reach, key),
                _goal(beyond, key),
                *(_shown(interval, key) for interval in found),
                verdict,
            ]
        )
    return rows


def gpu_cells(records: Sequence[Mapping[str, Any]], trajectories: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """As GPU_HEADINGS, one row per goal, from the records of parts `step` and `training` and the former's trajectories.

    A record that failed or lost parity counts as not measured; the parts themselves fail for it.
    """
    rows = []
    for workload, eager, autotune, absolute in GPU_GOALS:
        here = [r for r in records if r["workload"].startswith(f"{workload}/") and store.is_good(r)]
        ours = [r for r in here if r["candidate"].split()[0] in GPU_ENGINES]
        whole = {n: t["wall_ms"]["median"] for n, t in trajectories.items() if n.startswith(f"{workload} ")}
        # An engine may be in two workloads: the first, of which there are more, counts.
        ratios = {r["candidate"]: r["speed_up"] for r in reversed(ours)}
        rows.append(_gpu_row(workload, "x eager fp32", _best(ratios), eager))
        rows.append(_gpu_row(workload, "x max-autotune", _against(here, f"{AUTOTUNE} "), autotune))
        tf32 = _against(here, TF32)
        if tf32 is not None:
            rows.append(_gpu_row(workload, f"x {TF32}", tf32, None))
        if absolute is not None and absolute[0] == "ms":
            fastest = min(whole.items(), key=lambda item: item[1], default=None)
            found = None if fastest is None else (fastest[1], fastest[0].removeprefix(f"{workload} "))
            rows.append(_gpu_row(workload, ABSOLUTE["ms"], found, absolute[1], least=False))
        elif absolute is not None:
            found = _best({r["candidate"]: r["share_of_product"] for r in ours})
            rows.append(_gpu_row(workload, ABSOLUTE["share"], found, absolute[1]))
    return rows


def _best(values: Mapping[str, float]) -> tuple[float, str] | None:
    """The largest value and whose it is."""
    return max(((value, name) for name, value in values.items()), default=None)


def _against(records: Sequence[Mapping[str, Any]], name: str) -> tuple[float, str] | None:
    """How many times as fast as a competitor our fastest engine is: as the one, of all types, that is fastest.

    Only records of one workload are compared, which were measured in the same rounds, and with max-autotune only those
    of one type. name: of the competitor, or what its name begins with.
    """
    pairs = []
    for theirs in (r for r in records if r["candidate"].startswith(name)):
        kind = theirs["candidate"].removeprefix(AUTOTUNE) if name.startswith(AUTOTUNE) else ""
        ours = [
            (r["kernel_us"], r["candidate"])
            for r in records
            if r["workload"] == theirs["workload"] and r["candidate"].startswith(GPU_ENGINES)
            if r["candidate"].endswith(kind)
        ]
        if ours:
            pairs.append((theirs["kernel_us"], *min(ours)))
    if not pairs:
        return None
    theirs_us, ours_us, best = min(pairs)
    return theirs_us / ours_us, best


def _gpu_row(
    workload: str, what: str, found: tuple[float, str] | None, goal: float | None, least: bool = True
) -> list[str]:
    """least: whether the goal is to be at least this, not at most."""

    def shown(value: float | None) -> str:
        if value is None:
            return ""
        return f"{value:.0%}" if what == ABSOLUTE["share"] else f"{value:.3g}{'x' if what.startswith('x ') else ' ms'}"

    if found is None:
        return [workload, what, "not measured", "", shown(goal), ""]
    value, name = found
    if goal is None:
        return [workload, what, shown(value), name, "", ""]
    reached = value >= goal if least else value <= goal
    return [workload, what, shown(value), name, shown(goal), "yes" if reached else "**no**"]
