"""The rules of `compare` on made-up records: what is an alarm and what is none, what fails closed."""

import pytest

from bench.compare import AGAIN
from bench.verdicts import Thresholds, exit_code, judge, pooled, suspects
from ddpm.errors import BadInput
from tests.bench.rows import ROWS, SLOW, broken, slowed

ROW = f"{SLOW} operator"


def statuses(verdicts):
    return {verdict.row: verdict.status for verdict in verdicts}


def counted(content, *values, name="operators", row=SLOW):
    """With this count in its processes; the last value in all that remain."""
    records = [record for record in content["records"] if record["workload"] == row]
    for number, record in enumerate(records):
        record["counts"] = record.get("counts", {}) | {name: values[min(number, len(values) - 1)]}
    return content


def both(content, head, spread=0.04, processes=8, seed=0):
    """Two rounds of (base, head)."""
    sizes = (processes, AGAIN * processes)
    return [
        (content(ROWS, n, spread, seed + 2 * k), content(head, n, spread, seed + 2 * k + 1))
        for k, n in enumerate(sizes)
    ]


def test_two_hundred_same_comparisons_raise_no_alarm(content):
    """1600 rows with 4% noise in six processes a side and twice as many in the second round."""
    for seed in range(200):
        verdicts = pooled(*both(content, ROWS, processes=6, seed=4 * seed), Thresholds())
        assert exit_code(verdicts) == 0


def test_ten_percent_in_one_row_are_found_in_that_row_alone(content):
    found = 0
    for seed in range(50):
        final = statuses(pooled(*both(content, slowed(1.1), processes=6, seed=4 * seed), Thresholds()))
        found += final.pop(ROW) == "slower"
        assert "slower" not in final.values()
    assert found >= 48


def test_significance_without_size_and_size_without_significance_are_no_alarm(content):
    small = judge(content(ROWS, spread=0.001), content(slowed(1.03), spread=0.001, seed=1), Thresholds())
    assert statuses(small)[f"{SLOW} operator"] == "same"
    assert min(verdict.p for verdict in small) < 0.005
    noisy = judge(content(ROWS, spread=0.6), content(slowed(1.2), spread=0.6, seed=1), Thresholds())
    assert statuses(noisy)[f"{SLOW} operator"] == "too noisy"
    assert (exit_code(noisy), exit_code(noisy, "fail")) == (0, 4)


def test_thresholds_by_name(content):
    sides = content(ROWS), content(slowed(1.08), seed=1)
    assert exit_code(judge(*sides, Thresholds())) == 1
    assert exit_code(judge(*sides, Thresholds(0.05, ["/c/=0.1"]))) == 0
    assert exit_code(judge(*sides, Thresholds(0.1, ["kernels=0.2", "/c/=0.05"]))) == 1
    for bad in (["[=0.1"], ["c=x"], ["c=-1"], ["c"]):
        with pytest.raises(BadInput, match="threshold"):
            Thresholds(0.05, bad)


@pytest.mark.parametrize(
    ("change", "status"),
    [
        (lambda head: broken(head, failed="RuntimeError: x"), "failed"),
        (lambda head: broken(head, parity=False, error=1, tolerance=0), "parity lost"),
        (lambda head: broken(head, against="yardstick"), "failed"),
        (lambda head: head | {"records": [r for r in head["records"] if r["workload"] != SLOW]}, "missing"),
        (
            lambda head: head | {"records": [r for r in head["records"] if (r["workload"], r["process"]) != (SLOW, 3)]},
            "failed",
        ),
    ],
)
def test_a_row_that_did_not_run_fails_the_comparison(content, change, status):
    verdicts = judge(content(ROWS), change(content(slowed(2), seed=1)), Thresholds())
    assert statuses(verdicts)[f"{SLOW} operator"] == status
    assert exit_code(verdicts) == 3


def test_what_base_lacks_is_new_and_nothing_to_compare_is_a_failure(content):
    base = content({name: time for name, time in ROWS.items() if name != SLOW})
    verdicts = judge(base, content(ROWS, seed=1), Thresholds())
    assert statuses(verdicts)[f"{SLOW} operator"] == "new"
    assert exit_code(verdicts) == 0
    mended = judge(broken(content(ROWS), failed="x"), content(ROWS, seed=1), Thresholds())
    assert statuses(mended)[f"{SLOW} operator"] == "new"
    assert exit_code(judge(base | {"records": []}, content(ROWS), Thresholds())) == 3


def test_same_needs_an_interval_within_the_threshold(content):
    quiet = judge(content(ROWS, spread=0.01), content(ROWS, spread=0.01, seed=1), Thresholds())
    assert set(statuses(quiet).values()) == {"same"}
    assert all(1 / 1.05 <= verdict.low <= verdict.ratio <= verdict.high <= 1.05 for verdict in quiet)
    noisy = judge(content(ROWS, spread=0.2), content(ROWS, spread=0.2, seed=1), Thresholds())
    assert set(statuses(noisy).values()) == {"too noisy"}
    assert (exit_code(noisy), exit_code(noisy, "pass"), exit_code(noisy, "fail")) == (0, 0, 4)
    faster = judge(content(ROWS, spread=0.01), content(slowed(0.955), spread=0.01, seed=1), Thresholds())
    assert statuses(faster)[ROW] == "too noisy"  # as fast, or faster
    assert exit_code(faster, "fail") == 0  # but not slower


def test_a_row_that_waits_is_a_regression_whatever_its_processor_time(content):
    def waiting(factor, time=1.0):
        made = content(slowed(time), spread=0.02, seed=1)
        for record in made["records"]:
            record["wall_gate"] = record["gate"] * (factor / time if record["workload"] == SLOW else 1)
        return made

    for head, status in ((waiting(1.3), "waits"), (waiting(2, 0.2), "waits"), (waiting(1.08), "same"),
                         (waiting(1.3, 1.3), "slower"), (waiting(0.5), "faster")):  # fmt: skip
        base = content(ROWS, spread=0.02)
        for record in base["records"]:
            record["wall_gate"] = record["gate"]
        verdicts = judge(base, head, Thresholds())
        assert statuses(verdicts)[ROW] == status
        assert exit_code(verdicts) == (1 if status in ("waits", "slower") else 0)
        assert suspects(verdicts) == ([ROW] if status == "waits" else [])  # `slower` by 30% is certain
        again = pooled((base, head), (base, head), Thresholds())
        assert statuses(again)[ROW] == status


def test_wall_times_that_rose_in_one_round_alone_are_no_waiting(content):
    rounds = both(content, ROWS, spread=0.01)
    for number, pair in enumerate(rounds):
        for side, made in enumerate(pair):
            for record in made["records"]:
                record["wall_gate"] = record["gate"] * (1.5 if (number, side) == (0, 1) else 1)
    assert statuses(judge(*rounds[0], Thresholds()))[ROW] == "waits"
    assert statuses(pooled(*rounds, Thresholds()))[ROW] == "same"


@pytest.mark.parametrize(
    ("base", "head", "name", "status"),
    [
        ((5,), (6,), "operators", "more"),
        ((5,), (4,), "operators", "fewer"),
        ((100,), (104,), "operators", "same"),  # within the threshold
        ((5,), (5, 5, 9, 5), "operators", "too noisy"),  # not in every process
        ((5, 7, 5), (6,), "operators", "too noisy"),
        ((0,), (1,), "graph_breaks", "more"),
        ((0,), (0,), "recompiles", "same"),
        ((1_000_000,), (2_000_000,), "peak_bytes", "more"),
        ((1_000_000,), (1_060_000,), "peak_bytes", "same"),  # below 64 KiB
        ((100,), (60_000,), "allocated_bytes", "same"),
        ((0,), (100_000,), "allocated_bytes", "more"),
    ],
)
def test_counts_are_rows_of_their_own(content, base, head, name, status):
    label = f"{ROW} [{name.replace('_', ' ')}]"
    pair = counted(content(ROWS), *base, name=name), counted(content(ROWS, seed=1), *head, name=name)
    for verdicts in (judge(*pair, Thresholds()), pooled(pair, pair, Thresholds())):
        assert statuses(verdicts)[label] == status
        assert exit_code(verdicts) == (1 if status == "more" else 0)
        assert label not in suspects(verdicts)
    loose = judge(*pair, Thresholds(0.05, [r"\[(operators|.* bytes)\]=2000", "graph=1"]))
    assert statuses(loose)[label] in ("same", "more") if base == (0,) else ("same",)


def test_what_is_no_longer_counted_fails_closed_and_older_records_have_no_counts(content):
    base, head = counted(content(ROWS), 5), content(ROWS, seed=1)
    verdicts = judge(base, broken(head, uncounted={"operators": "RuntimeError: no mode"}), Thresholds())
    broken_row = next(verdict for verdict in verdicts if verdict.row == f"{ROW} [operators]")
    assert (broken_row.status, broken_row.detail) == ("failed", "in head: RuntimeError: no mode")
    assert exit_code(verdicts) == 3
    verdicts = judge(content(ROWS), counted(content(ROWS, seed=1), 5), Thresholds())
    assert f"{ROW} [operators]" not in statuses(verdicts)
    assert exit_code(verdicts) == 0


def test_a_frozen_reference_is_shown_and_neither_gated_nor_measured_again(content):
    pair = [broken(counted(content(times, seed=seed), 5 + seed), frozen=True) for seed, times in
            enumerate((ROWS, slowed(2)))]  # fmt: skip
    verdicts = judge(*pair, Thresholds())
    assert statuses(verdicts)[ROW] == "not gated"
    assert f"{ROW} [operators]" not in statuses(verdicts)
    assert exit_code(verdicts) == 0
    assert suspects(verdicts) == []
    assert exit_code(judge(pair[0], broken(pair[1], failed="x"), Thresholds())) == 3  # it has to run all the same
    alone = [made | {"records": [r for r in made["records"] if r["workload"] == SLOW]} for made in pair]
    assert exit_code(judge(*alone, Thresholds())) == 3  # nothing was compared


def test_a_suspect_that_is_not_seen_again_is_no_alarm(content):
    first = content(ROWS), content(slowed(1.1), seed=1)
    same = content(ROWS, 16, seed=2), content(ROWS, 16, seed=3)
    assert statuses(judge(*first, Thresholds()))[ROW] == "slower"
    verdicts = pooled(first, same, Thresholds())
    assert statuses(verdicts)[ROW] in ("same", "too noisy")
    assert exit_code(verdicts) == 0
    assert exit_code(pooled(first, first, Thresholds())) == 1
    crashed = same[0], broken(content(ROWS, 16, seed=3), failed="x")
    assert exit_code(pooled(first, crashed, Thresholds())) == 3
    empty = [made | {"records": []} for made in same]
    assert statuses(pooled(first, empty, Thresholds()))[ROW] == "failed"


@pytest.mark.parametrize(
    ("factor", "spread", "processes", "threshold", "again"),
    [
        (1.3, 0.02, 8, 0.05, False),
        (1.3, 0.02, 6, 0.05, True),  # the least p of six a side is 0.002
        (1.3, 0.02, 8, 0.2, True),
        (1.1, 0.02, 8, 0.05, True),
        (1.3, 0.2, 8, 0.05, True),
    ],
)
def test_what_one_round_shows_beyond_doubt_is_not_measured_again(content, factor, spread, processes, threshold, again):
    pair = content(ROWS, processes, spread), content(slowed(factor), processes, spread, seed=1)
    verdicts = judge(*pair, Thresholds(threshold))
    assert (ROW in suspects(verdicts)) == again
    if not again:
        assert exit_code(verdicts) == 1
        same = content({}, 16), content({}, 16, seed=3)
        assert statuses(pooled(pair, same, Thresholds(threshold)))[ROW] == "slower"


def test_the_verdict_is_that_of_both_rounds_together(content):
    first = content(ROWS, spread=0.2), content(slowed(1.15), spread=0.2, seed=6)
    assert statuses(judge(*first, Thresholds()))[ROW] == "too noisy"
    assert ROW in suspects(judge(*first, Thresholds()))
    again = content(ROWS, 16, seed=2), content(slowed(1.15), 16, seed=3)
    found = next(verdict for verdict in pooled(first, again, Thresholds()) if verdict.row == ROW)
    assert (found.status, found.processes) == ("slower", (24, 24))
    assert found.ratio == pytest.approx(1.15, rel=0.03)


def test_a_level_that_moved_between_the_rounds_hides_nothing(content):
    first = content(ROWS), content(slowed(1.1), seed=1)
    again = [content(times, 16, seed=seed) for seed, times in ((2, ROWS), (3, slowed(1.1)))]
    for made in again:  # measured alone, the row takes half as long again
        for record in made["records"]:
            record["gate"] *= 1.5
    assert statuses(pooled(first, again, Thresholds()))[ROW] == "slower"
