"""Whether one version is slower than another: the statistics, on two stored contents.

A sample is one process: the median over its rounds of time / eager where the reference is frozen, of time / yardstick
where it is our own code (`Bench.frozen`). Rounds of one process are not independent; processes are. A row is slower if
the Mann-Whitney test over processes (two-sided) says p < 0.01 AND the ratio of medians exceeds the row's threshold.
A row that crashed, disappeared or lost parity is a failure of the comparison: it fails closed.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from bench import store
from ddpm.errors import BadInput

P_VALUE = 0.01
THRESHOLD = 0.05
LEAST_PROCESSES = 6
CLEAN, REGRESSION, NOT_RUN = 0, 1, 3
BROKEN = ("failed", "parity lost", "missing")


@dataclass(frozen=True)
class Verdict:
    """One row of a comparison.

    status: same, slower, faster, unconfirmed (slower in the first round of processes only), new, failed, parity lost,
    missing. base_us, head_us: median times, for reading. ratio: head / base of the gating times, each relative to
    `against` in its own process. detail: why.
    """

    row: str
    status: str
    ratio: float | None = None
    p: float | None = None
    threshold: float = THRESHOLD
    against: str = ""
    base_us: float | None = None
    head_us: float | None = None
    detail: str = ""


class Thresholds:
    """The threshold of a row: the last rule "RE=0.1" whose RE matches its name, else the default."""

    def __init__(self, default: float = THRESHOLD, rules: Sequence[str] = ()) -> None:
        self.default, self.rules = default, []
        for rule in rules:
            pattern, _, value = rule.rpartition("=")
            try:
                self.rules.append((re.compile(pattern), float(value)))
            except (re.error, ValueError) as error:
                raise BadInput(
                    f"--threshold-for: got {rule!r}, needs RE=NUMBER like 'step/.*=0.1' ({error})"
                ) from error
        if not all(0 < value < float("inf") for value in (default, *(value for _, value in self.rules))):
            raise BadInput("--threshold: needs numbers > 0, like 0.05 for five percent")

    def of(self, row: str) -> float:
        matching = [value for pattern, value in self.rules if pattern.search(row)]
        return matching[-1] if matching else self.default


def trouble(row: str, side: str, records: Sequence[Mapping[str, Any]], processes: int) -> Verdict | None:
    """The verdict on a side that did not run everywhere; None if it did."""
    for record in records:
        if "failed" in record:
            return Verdict(row, "failed", detail=f"in {side}: {record['failed']}")
        if not record["parity"]:
            return Verdict(row, "parity lost", detail=f"in {side}: error {record['error']} > {record['tolerance']}")
    if len(records) < processes:
        return Verdict(row, "failed", detail=f"in {side}: ran in {len(records)} of {processes} processes")
    return None


def _judge(
    row: str,
    base: Sequence[Mapping[str, Any]],
    head: Sequence[Mapping[str, Any]],
    processes: tuple[int, int],
    threshold: float,
) -> Verdict:
    if not head:
        return Verdict(row, "missing", detail="in base, not in head")
    broken = trouble(row, "head", head, processes[1])
    if broken is not None:
        return broken
    if not base:
        return Verdict(row, "new", detail="not in base")
    broken = trouble(row, "base", base, processes[0])
    if broken is not None:  # if it never ran in base, head has mended it and there is nothing to compare with
        return broken if any(store.is_good(record) for record in base) else replace(broken, status="new")
    against = {record["against"] for record in (*base, *head)}
    if len(against) > 1:
        return Verdict(row, "failed", detail=f"timed against {' and '.join(sorted(against))}, needs the same")
    before, after = [[record["gate"] for record in records] for records in (base, head)]
    ratio = median(after) / median(before)
    from scipy.stats import mannwhitneyu  # half a second that the measuring processes need not spend

    p = float(mannwhitneyu(before, after).pvalue)
    status = "same"
    if p < P_VALUE and ratio > 1 + threshold:
        status = "slower"
    elif p < P_VALUE and ratio < 1 / (1 + threshold):
        status = "faster"
    times = [median(record["kernel_us"] for record in records) for records in (base, head)]
    return Verdict(row, status, ratio, p, threshold, head[0]["against"], *times)


def judge(base: store.Content, head: store.Content, thresholds: Thresholds) -> list[Verdict]:
    """Every row of both sides, in base's order, new rows last."""
    rows = [store.rows(content["records"]) for content in (base, head)]
    processes = base["processes"], head["processes"]
    names = list(dict.fromkeys([*rows[0], *rows[1]]))
    return [
        _judge(name, rows[0].get(name, []), rows[1].get(name, []), processes, thresholds.of(name)) for name in names
    ]


def comparable(base: store.Content, head: store.Content) -> None:
    """Raise BadInput unless two stored contents come from the same kind of machine and have enough processes."""
    for side, content in (("base", base), ("head", head)):
        if content["processes"] < LEAST_PROCESSES:
            raise BadInput(
                f"{side}: has {content['processes']} process(es), needs at least {LEAST_PROCESSES} "
                f"(ddpm-bench run --processes {LEAST_PROCESSES})"
            )
    for key in ("processor", "device", "threads"):
        ours, theirs = base["machine"].get(key), head["machine"].get(key)
        if ours != theirs:
            raise BadInput(f"base was measured on {key} {ours}, head on {theirs}: times never compare across machines")


def exit_code(verdicts: Sequence[Verdict]) -> int:
    """3 if anything did not run or there was nothing to compare, else 1 for a slower row, else 0."""
    if not any(verdict.ratio is not None for verdict in verdicts):
        return NOT_RUN
    if any(verdict.status in BROKEN for verdict in verdicts):
        return NOT_RUN
    return REGRESSION if any(verdict.status == "slower" for verdict in verdicts) else CLEAN


def is_suspect(verdict: Verdict) -> bool:
    """Whether a row is beyond its threshold, significantly or not: six processes a side are too few to tell."""
    return verdict.ratio is not None and verdict.ratio > 1 + verdict.threshold


def suspects(verdicts: Sequence[Verdict]) -> list[str]:
    """Rows that are measured again."""
    return [verdict.row for verdict in verdicts if is_suspect(verdict)]


def confirmed(first: Sequence[Verdict], second: Sequence[Verdict]) -> list[Verdict]:
    """The first verdicts, where a suspect is slower if a second round of fresh processes says so, p < 0.01 and all.

    With some twenty rows a chance alarm in one round is likely enough; beyond the threshold twice in the same row it is
    not. A suspect that broke in the second round is broken.
    """
    again = {verdict.row: verdict for verdict in second}
    return [_final(verdict, again.get(verdict.row)) if is_suspect(verdict) else verdict for verdict in first]


def _final(first: Verdict, second: Verdict | None) -> Verdict:
    if second is None:
        return replace(first, status="failed", detail="no second round")
    if second.status == "slower":
        return replace(second, detail=f"{first.ratio - 1:+.1%} in the first round")
    if second.ratio is None:
        return second if second.status in BROKEN else replace(second, status="failed", detail="no second round")
    if first.status != "slower":
        return first
    return replace(
        first, status="unconfirmed", detail=f"{second.ratio - 1:+.1%} (p {second.p:.2g}) in the second round"
    )
