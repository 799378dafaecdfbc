"""`compare` on real operators with a busy machine: parts of what `prove_compare.py` repeats ten times."""

import pytest

from tests.bench.prove_compare import OPERATORS, branches, compare, same, slower

pytestmark = [pytest.mark.long, pytest.mark.alone]


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    root = tmp_path_factory.mktemp("proof") / "repository"
    root.mkdir()
    branches(root)
    return root


def own(row, operator):
    return row["row"].startswith(f"kernels/{operator}/") and row["row"].endswith(" operator")


def test_the_same_code_raises_no_alarm(repository):
    code, content, _, output = same(repository)
    assert code == 0, output
    assert {row["status"] for row in content["rows"]} <= {"same", "faster", "fewer", "too noisy", "not gated"}
    assert sum(row["unit"] == "us" for row in content["rows"]) == 2 * len(OPERATORS)


def test_a_slower_operator_is_caught_on_its_own_row(repository):
    """30%: 10% are found nine times in ten on a busy machine (docs/ci.md), too seldom for a test."""
    code, content, _, output = slower(repository, "much_slower")
    assert code == 1, output
    assert [own(row, "solver_step") for row in content["rows"] if row["status"] == "slower"] == [True]


def test_a_crash_and_a_lost_parity_fail_the_comparison(repository):
    code, content, _, output = compare(repository, "broken", pattern="^kernels/(q_sample|group_norm_relu)/")
    assert code == 3, output
    broken = {row["row"]: row for row in content["rows"]}
    crashed = next(row for row in broken.values() if own(row, "q_sample"))
    assert (crashed["status"], crashed["detail"]) == ("failed", "in head: RuntimeError: planted")
    assert next(row for row in broken.values() if own(row, "group_norm_relu"))["status"] == "parity lost"


def test_a_benchmark_that_disappears_fails_the_comparison(repository):
    code, content, _, output = compare(repository, "gone", pattern="^kernels/(noise_mse|group_norm_relu)/")
    assert code == 3, output
    missing = [row["row"] for row in content["rows"] if row["status"] == "missing"]
    assert missing == ["kernels/noise_mse/fp32/1e5"]
