"""What the step must reach, and what a stored `ddpm-bench run --suite step` measured, beside each other."""

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
