"""The goals are judged by what was measured, and a failed row is no figure."""

import pytest

from bench.goals import GOALS, HEADINGS, goal_cells


def _records(workload, speed_ups, share=0.9):
    eager = [{"workload": workload, "candidate": "eager", "parity": True, "kernel_us": 2e5, "speed_up": None}]
    return eager + [
        {"workload": workload, "candidate": "fused", "parity": True, "kernel_us": 1e5, "speed_up": value}
        | {"share_of_convolution": share, "process": process}
        for process, value in enumerate(speed_ups)
    ]


@pytest.mark.parametrize(
    ("speed_ups", "verdict"), [([1.2, 1.3, 1.34], "**no**"), ([1.36, 1.4, 1.3], "yes"), ([1.6, 1.7, 1.4], "beyond")]
)
def test_the_median_is_judged(speed_ups, verdict):
    rows = goal_cells(_records("step/fp32/batch32/plain", speed_ups))
    assert all(len(row) == len(HEADINGS) for row in rows)
    assert rows[0][0] == "fp32/batch32/plain"
    assert rows[0][2] == "200 ms"
    assert rows[0][-1] == verdict
    assert rows[-1][1] == "share of the convolution rate"
    assert rows[-1][-3:] == ["90% (90% to 90%)", "not measured", "yes"]


def test_what_was_not_measured_reaches_nothing():
    assert [row[-1] for row in goal_cells([])] == [""] * len(GOALS)


def test_a_failed_row_is_refused():
    records = _records("step/fp32/batch32/plain", [1.5])
    records[-1] = records[-1] | {"parity": False}
    with pytest.raises(ValueError, match="step/fp32/batch32/plain fused: failed or lost parity"):
        goal_cells(records)
