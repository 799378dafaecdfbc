"""The stored proof of reliability is of today's tries, and nothing was lost; a few of each case are tried anew.

Too old: tests/reliability.py, in its first lines, says how the record is made; `--only PART` renews a part.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench.report import DOCS, RELIABILITY, read_lines, reliability_summary, reliability_table
from tests.faults.processes import Lost
from tests.faults.tries import Try, draws, outcomes
from tests.reliability import PARTS, rules_digest, stored

ROOT = Path(__file__).parent.parent
TRIED = 300
CASES = [case for part in PARTS.values() for case in part.CASES]
MAY_LACK = {"a file system with too little room"}  # where nothing may be mounted
of_the_record = pytest.mark.skipif(not RELIABILITY.exists(), reason="no record yet, docs/reliability.md says so")


@of_the_record
def test_the_record_is_of_these_tries():
    lines = read_lines(RELIABILITY)
    assert {line["rules"] for line in lines} == {rules_digest()}
    assert set(CASES) - MAY_LACK <= {line["case"] for line in lines} <= set(CASES)


@of_the_record
def test_nothing_was_lost():
    lines = read_lines(RELIABILITY)
    assert [line["said"] for line in lines if line["lost"]] == []
    assert sum(line["tried"] for line in lines) >= TRIED


@pytest.mark.parametrize("case", CASES)
def test_the_page_says_what_survived_means(case):
    assert f"*{case}*" in (DOCS / "reliability.md").read_text("utf-8")


def test_the_table_counts_what_was_tried_and_lost():
    lines = [{"case": "a", "what": what, "tried": 3, "lost": lost} for what, lost in (("x", 0), ("y", 2))]
    lines.append({"case": "b", "what": "z", "tried": 1, "lost": 0})
    assert reliability_table(lines).rows == [["a", "6", "4", "2", "x; y"], ["b", "1", "1", "0", "z"]]
    assert reliability_summary(lines) == "tried 7, survived 5, lost 2"


def test_a_line_takes_the_place_of_the_one_of_the_same_case_and_command(tmp_path):
    path = tmp_path / "reliability.jsonl"
    for tried in (1, 2):
        stored(path, [{"case": "a", "what": what, "tried": tried} for what in ("x", "y")[:tried]])
    assert [(line["what"], line["tried"]) for line in read_lines(path)] == [("x", 2), ("y", 2)]


def survives(_shop, folder):
    folder.mkdir()


def loses(_shop, word, _folder):
    raise Lost(f"{word}\nis gone")


def dies(_shop, _folder):
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_becomes_of_a_try_is_told(tmp_path):
    """That it is lost, whatever the try's process does; each has a folder of its own, which goes."""
    tries = [Try("case", "x", "1", survives), Try("case", "x", "2", loses, ("it",)), Try("case", "x", "3", dies)]
    found = {outcome.tried.how: outcome.lost for outcome in outcomes(tries, None, tmp_path, 2)}
    assert (found["1"], found["2"]) == (None, "it is gone")
    assert "ended with -9" in found["3"]
    assert list(tmp_path.iterdir()) == []


def test_random_numbers_of_a_try_depend_on_its_name_alone():
    assert draws("a", 1).integers(1 << 40) == draws("a", 1).integers(1 << 40) != draws("a", 2).integers(1 << 40)


@pytest.mark.long
@pytest.mark.parametrize("part", PARTS)
def test_some_are_tried_anew(part):
    command = [sys.executable, "tests/reliability.py", "--only", part, "--every", "15", "--jobs", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lost 0" in done.stdout
