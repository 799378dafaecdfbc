"""The goals of engine native are judged by the stored medians, and against the fastest of the others."""

import pytest

from bench.goals import WHOLE, goals_table


def row(workload: str, candidate: str, speed_up: float = 1.0, wall_us: float = 1.0) -> dict[str, list[dict]]:
    return {f"{workload} {candidate}": [{"speed_up": speed_up, "wall_us": wall_us}]}


@pytest.mark.parametrize(
    ("native", "others", "said"),
    [
        (7.0, 7.2, "reached"),
        (6.9, 1.0, "missed"),
        (8.0, 8.4, "reached, but 1.05 times slower than the fastest of the others"),
    ],
)
def test_a_ratio_is_judged(native, others, said):
    one = "peers/ddim10/batch1"
    rows = row(one, "native", native) | row(one, "onnxruntime", 1.0) | row(one, "openvino", others)
    line = goals_table(rows).splitlines()[-1]
    assert line == f"| 1 image | 7 | {native:.2f} | - | - | 1.00 | {others:.2f} | {said} |"


@pytest.mark.parametrize(("us", "said"), [(700.0, "reached"), (900.0, "missed")])
def test_a_whole_run_is_judged_by_its_seconds(us, said):
    line = goals_table(row(WHOLE, "native", wall_us=us)).splitlines()[-1]
    assert line == f"| 500 steps of 1 image | 0.4 s | {us * 5e-4:.2f} s | - | - | - | - | {said} |"


def test_what_was_not_measured_has_no_row():
    assert len(goals_table({}).splitlines()) == 2
