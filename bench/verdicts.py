"""Whether one version is slower than another: the rules, on two stored contents or two rounds of two.

A sample is one process. Of times it is the median over its rounds of time / eager where the reference is frozen, of
time / yardstick where it is our own code (`Bench.frozen`); rounds of one process are not independent, processes are.
Counts (`bench.counts`) hardly vary: there the ranges of the processes are compared.

What did not run, disappeared or lost parity fails the comparison: it fails closed.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, NamedTuple

from bench import store
from bench.statistics import Ratio, hodges_lehmann, mann_whitney
from ddpm.errors import BadInput

# Simulated, both rounds pooled (tests/bench/test_statistics.py): 10% is found 99 times in 100 at 5% noise between
# processes, 83 at 8%; of rows without a change 0.3 and 2 in 1000 are alarms, 3 where processes fall into two kinds.
P_VALUE = 0.005
THRESHOLD = 0.05
# A row is measured again beyond this share of its threshold: of the whole threshold 4% of true 10% were left out.
SUSPECT = 0.5
# One round is enough where its interval lies beyond so many thresholds and p below that (of 8 processes a side, almost
# all of head's above all of base's). Simulated as above: of 80,000 rows without a change 2, of 30% two thirds to all.
CERTAIN, CERTAIN_P = 2, 0.001
LEAST_PROCESSES = 6
# Wall times of a row may rise by that much without a verdict if its own threshold is smaller. With a busy machine those
# of nine processes spread by 4-9% without the queueing, but by 5-18% where only the smallest can be taken.
WALL_THRESHOLD = 0.15
# Counted bytes that are no change: caches, the interpreter's own.
SLACK_BYTES = 64 * 2**10
CLEAN, REGRESSION, NOT_RUN, TOO_NOISY = 0, 1, 3, 4
BROKEN = ("failed", "parity lost", "missing")
REGRESSIONS = ("slower", "waits", "more")
SAME, NOISY, NOT_GATED, NEW = "same", "too noisy", "not gated", "new"
Pair = tuple[store.Content, store.Content]
Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Verdict:
    """One row of a comparison.

    status: one of `REGRESSIONS` (slower: processor time, kernel time on CUDA; waits: wall time, and the former not or
    not half as much; more: a count), faster, fewer, same, too noisy (cannot tell), not gated (a frozen reference), new,
    or one of `BROKEN`.
    unit: "us" of a time, "bytes" or "" of a count. base, head: medians over processes, of wall time or of the count.
    ratio, low, high: head / base of the gating times, each relative to `against` in its own process, and its 95%
    interval; of counts the ranges' extremes; None without one (of a count 0 in base). wall: head / base of wall times.
    processes: of base and of head, over all rounds. detail: why.
    """

    row: str
    status: str
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    threshold: float = THRESHOLD
    against: str = ""
    unit: str = "us"
    base: float | None = None
    head: float | None = None
    wall: float | None = None
    wall_p: float | None = None
    processes: tuple[int, int] | None = None
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


class Round(NamedTuple):
    """The records of one row in one round of processes, and how many processes there were of each side."""

    base: Records
    head: Records
    processes: tuple[int, int]


class Change(NamedTuple):
    """What all rounds together say of one quantity. rounds: the ratio of each."""

    ratio: Ratio
    p: float
    rounds: list[float]

    def is_up(self, threshold: float) -> bool:
        """Whether head is certainly above base by more than the threshold, and no round contradicts that."""
        least = 1 + SUSPECT * threshold
        return self.p < P_VALUE and self.ratio.median > 1 + threshold and min(self.rounds) > least

    def is_down(self, threshold: float) -> bool:
        least = 1 + SUSPECT * threshold
        return self.p < P_VALUE and self.ratio.median < 1 / (1 + threshold) and max(self.rounds) < 1 / least


def _change(rounds: Sequence[Round], key: str) -> Change:
    """Each round is taken relative to its own median: alone, or an hour later, a row's level is another one."""
    before, after, ratios = [], [], []
    for one in rounds:
        base, head = ([record[key] for record in records] for records in (one.base, one.head))
        level = median(base + head)
        before += [value / level for value in base]
        after += [value / level for value in head]
        ratios.append(hodges_lehmann(base, head).median)
    return Change(hodges_lehmann(before, after), mann_whitney(before, after), ratios)


def trouble(row: str, side: str, records: Records, processes: int) -> Verdict | None:
    """The verdict on a side that did not run everywhere; None if it did."""
    for record in records:
        if "failed" in record:
            return Verdict(row, "failed", detail=f"in {side}: {record['failed']}")
        if not record["parity"]:
            return Verdict(row, "parity lost", detail=f"in {side}: error {record['error']} > {record['tolerance']}")
    if len(records) < processes:
        return Verdict(row, "failed", detail=f"in {side}: ran in {len(records)} of {processes} processes")
    return None


def _broken(row: str, one: Round) -> Verdict | None:
    """Why a row of a round has nothing to compare; None if it has."""
    if not one.head:
        return Verdict(row, "missing", detail="in base, not in head")
    broken = trouble(row, "head", one.head, one.processes[1])
    if broken is not None:
        return broken
    if not one.base:
        return Verdict(row, NEW, detail="not in base")
    broken = trouble(row, "base", one.base, one.processes[0])
    if broken is not None:  # if it never ran in base, head has mended it and there is nothing to compare with
        return broken if any(map(store.is_good, one.base)) else replace(broken, status=NEW)
    against = {record["against"] for record in (*one.base, *one.head)}
    if len(against) > 1:
        return Verdict(row, "failed", detail=f"timed against {' and '.join(sorted(against))}, needs the same")
    return None


def _everywhere(rounds: Sequence[Round], key: str) -> bool:
    return all(record.get(key) is not None for one in rounds for record in (*one.base, *one.head))


def _is_frozen(rounds: Sequence[Round]) -> bool:
    return all(record.get("frozen") for one in rounds for record in (*one.base, *one.head))


def _time(row: str, rounds: Sequence[Round], threshold: float) -> Verdict:
    """The verdict on the times of a row that ran everywhere."""
    gate = _change(rounds, "gate")
    wall = _change(rounds, "wall_gate") if _everywhere(rounds, "wall_gate") else None
    wall_threshold = max(threshold, WALL_THRESHOLD)
    status, detail = NOISY, ""
    if _is_frozen(rounds):
        status = NOT_GATED
    elif wall is not None and wall.is_up(wall_threshold) and wall.ratio.median - 1 > 2 * (gate.ratio.median - 1):
        status, detail = "waits", f"wall time {wall.ratio.median - 1:+.1%}"
    elif gate.is_up(threshold):
        status = "slower"
    elif gate.is_down(threshold):
        status = "faster"
    elif wall is not None and wall.is_down(wall_threshold):
        status, detail = "faster", f"waits less, wall time {wall.ratio.median - 1:+.1%}"
    elif gate.ratio.low >= 1 / (1 + threshold) and gate.ratio.high <= 1 + threshold:
        status = SAME
    walls = [median(r.get("wall_us", r["kernel_us"]) for one in rounds for r in one[side]) for side in (0, 1)]
    return Verdict(
        row, status, *gate.ratio, gate.p, threshold, rounds[0].head[0]["against"], "us", *walls,
        None if wall is None else wall.ratio.median, None if wall is None else wall.p, _processes(rounds), detail,
    )  # fmt: skip


def _processes(rounds: Sequence[Round]) -> tuple[int, int]:
    return sum(one.processes[0] for one in rounds), sum(one.processes[1] for one in rounds)


def _counts(row: str, rounds: Sequence[Round], thresholds: Thresholds) -> list[Verdict]:
    """A verdict on everything that was counted in base, but of a frozen reference."""
    if _is_frozen(rounds):
        return []
    counted: dict[str, tuple[list[float], list[float]]] = {}
    for one in rounds:
        for side in (0, 1):
            for record in one[side]:
                for name, value in record.get("counts", {}).items():
                    counted.setdefault(name, ([], []))[side].append(value)
    before, after = _processes(rounds)
    found = []
    for name, (base, head) in counted.items():
        label = f"{row} [{name.replace('_', ' ')}]"
        if len(base) < before:  # an older record, or what base could not count
            continue
        if len(head) < after:
            reasons = (r.get("uncounted", {}).get(name) for one in rounds for r in one.head)
            reason = next(filter(None, reasons), "not counted")
            found.append(Verdict(label, "failed", unit=_unit(name), detail=f"in head: {reason}"))
            continue
        found.append(_count(label, _unit(name), base, head, thresholds.of(label), (before, after)))
    return found


def _unit(name: str) -> str:
    return "bytes" if name.endswith("bytes") else ""


def _count(
    row: str, unit: str, base: list[float], head: list[float], threshold: float, processes: tuple[int, int]
) -> Verdict:
    slack = SLACK_BYTES if unit == "bytes" else 0

    def exceeds(more: float, less: float) -> bool:
        return more > less * (1 + threshold) and more - less > slack

    status = NOISY
    if exceeds(min(head), max(base)):
        status = "more"
    elif exceeds(min(base), max(head)):
        status = "fewer"
    elif not exceeds(max(head), min(base)) and not exceeds(max(base), min(head)):
        status = SAME
    medians = median(base), median(head)
    ratios = (None,) * 3
    if min(base) > 0:
        ratios = (medians[1] / medians[0], min(head) / max(base), max(head) / min(base))
    return Verdict(row, status, *ratios, None, threshold, "", unit, *medians, processes=processes)


def _judged(row: str, rounds: Sequence[Round], thresholds: Thresholds) -> list[Verdict]:
    """The row of times, and those of counts below it."""
    for one in rounds:
        broken = _broken(row, one)
        if broken is not None:
            return [broken]
    return [_time(row, rounds, thresholds.of(row)), *_counts(row, rounds, thresholds)]


def _rounds(pair: Pair) -> dict[str, Round]:
    """By row, in base's order, new rows last."""
    base, head = (store.rows(content["records"]) for content in pair)
    processes = pair[0]["processes"], pair[1]["processes"]
    return {name: Round(base.get(name, []), head.get(name, []), processes) for name in {**base, **head}}


def judge(base: store.Content, head: store.Content, thresholds: Thresholds) -> list[Verdict]:
    """Every row of both sides, in base's order, new rows last."""
    return [found for row, one in _rounds((base, head)).items() for found in _judged(row, [one], thresholds)]


def is_suspect(verdict: Verdict) -> bool:
    """Whether a row of times may be slower, by what one round of processes says, and is not certainly."""
    if verdict.status in (*BROKEN, NEW, NOT_GATED) or verdict.unit != "us":
        return False
    if verdict.status == "slower" and verdict.p < CERTAIN_P and verdict.low > 1 + CERTAIN * verdict.threshold:
        return False
    wall = SUSPECT * max(verdict.threshold, WALL_THRESHOLD)
    return verdict.ratio > 1 + SUSPECT * verdict.threshold or (verdict.wall or 0) > 1 + wall


def suspects(verdicts: Sequence[Verdict]) -> list[str]:
    """Rows that are measured again."""
    return [verdict.row for verdict in verdicts if is_suspect(verdict)]


def pooled(first: Pair, second: Pair, thresholds: Thresholds) -> list[Verdict]:
    """The verdicts on both rounds together; rows that only the first one measured by that alone.

    A suspect that is not in the second round has failed.
    """
    again = _rounds(second)
    missed = set(suspects(judge(*first, thresholds))) - again.keys()
    found = []
    for row, one in _rounds(first).items():
        if row in missed:
            found.append(Verdict(row, "failed", detail="no second round"))
        else:
            found += _judged(row, [one, again[row]] if row in again else [one], thresholds)
    return found


# What makes times incomparable; old files lack some and are compared with those that lack them too.
MACHINE = ("processor", "cores", "flags", "capability", "device", "threads", "torch", "python")


def comparable(base: store.Content, head: store.Content, across_machines: bool = False) -> list[str]:
    """What differs between the machines of two stored contents, a line each.

    Raises BadInput where either has too few processes and, unless across_machines, for the first difference.
    """
    for side, content in (("base", base), ("head", head)):
        if content["processes"] < LEAST_PROCESSES:
            raise BadInput(
                f"{side}: has {content['processes']} process(es), needs at least {LEAST_PROCESSES} "
                f"(ddpm-bench run --processes {LEAST_PROCESSES})"
            )
    differences = []
    for key in MACHINE:
        ours, theirs = base["machine"].get(key), head["machine"].get(key)
        if ours != theirs:
            differences.append(f"base was measured on {key} {_said(ours)}, head on {_said(theirs)}")
    if differences and not across_machines:
        raise BadInput(f"{differences[0]}: times do not compare across machines, needs --across-machines")
    return differences


def _said(value: object) -> str:
    return "not recorded" if value is None else str(value)


def exit_code(verdicts: Sequence[Verdict], too_noisy: str = "pass") -> int:
    """3 if anything did not run or there was nothing to compare, else 1 for a regression.

    Else, where too_noisy is "fail", 4 for a row of which it cannot be told whether it is slower; else 0.
    """
    statuses = {verdict.status for verdict in verdicts}
    if statuses & {*BROKEN} or not statuses - {NEW, NOT_GATED}:
        return NOT_RUN
    if statuses & {*REGRESSIONS}:
        return REGRESSION
    unsure = any(v.status == NOISY and (v.high is None or v.high > 1 + v.threshold) for v in verdicts)
    return TOO_NOISY if unsure and too_noisy == "fail" else CLEAN
