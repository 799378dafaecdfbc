"""The stored proof of `compare` is of today's plants and rules, and good enough; a part of it is made anew.

Too old: tests/bench/planted.py, in its first lines, says how the record is made; `--only NAME` renews a part.
"""

from collections import Counter

import pytest

from bench.report import PLANTED, planted_outcome, planted_summary, planted_table, read_lines
from tests.bench.foreign import git, make_repository
from tests.bench.planted import branch_of, compared, is_stored, make_project, rules_digest, stored
from tests.bench.plants import PLANTS

REPETITIONS, HARMLESS = 3, 8
of_the_record = pytest.mark.skipif(not PLANTED.exists(), reason="no record yet, docs/ci.md says so")


def lines_of(kind):
    return [line for line in read_lines(PLANTED) if line["kind"] == kind]


@of_the_record
def test_the_record_is_of_these_plants_and_of_these_rules():
    lines = read_lines(PLANTED)
    assert {(line["plant"], line["kind"], line["expected"]) for line in lines} == {
        (name, plant.kind, plant.exit) for name, plant in PLANTS.items()
    }
    repetitions = Counter(line["plant"] for line in lines)
    assert min(repetitions.values()) >= REPETITIONS
    assert {line["plant"] for line in lines if line["loaded"]} == set(PLANTS)
    assert {line["rules"] for line in lines} == {rules_digest()}


@of_the_record
def test_what_was_planted_was_caught_and_what_is_harmless_was_not():
    for kind in ("slower", "broken"):
        assert [line["plant"] for line in lines_of(kind) if planted_outcome(line) == "missed"] == []
    small = [planted_outcome(line) for line in lines_of("10%")]
    assert small.count("caught") >= 7 / 9 * len(small)
    harmless = lines_of("harmless")
    assert len(harmless) >= REPETITIONS * HARMLESS
    assert [line["plant"] for line in harmless if planted_outcome(line) == "false"] == []


def test_every_plant_changes_the_repository_and_its_own_files_alone(tmp_path):
    root = tmp_path / "project"
    make_repository(root)
    for name, plant in PLANTS.items():
        git(root, "reset", "-q", "--hard", "base")
        git(root, "clean", "-qfd")
        plant.change(root)
        assert git(root, "status", "--porcelain"), name


def line(plant, repetition=0, **facts):
    made = {"plant": plant, "kind": PLANTS[plant].kind, "expected": PLANTS[plant].exit, "seconds": 30, "loaded": False}
    return made | {"repetition": repetition, "as_expected": True} | facts


def test_the_table_counts_what_was_caught_missed_and_false():
    lines = [line("10% in Python"), line("10% in Python", 1, as_expected=False), line("a hang", seconds=60)]
    lines += [line("a comment"), line("a comment", 1, as_expected=False), line("a comment", 2)]
    assert planted_table(lines).rows == [
        ["10% in Python", "1", "2", "1", "1", "", "30"],
        ["a hang", "3", "1", "1", "0", "", "60"],
        ["a comment", "0", "3", "", "", "1", "30"],
    ]
    assert planted_summary(lines) == (
        "caught 2, missed 1 of 3 planted (of those of 10% caught 1 of 2); false 1 of 3 harmless"
    )


def test_a_line_takes_the_place_of_the_one_of_the_same_repetition(tmp_path):
    path = tmp_path / "planted.jsonl"
    for seconds in (1, 2):
        for name in ("a comment", "a hang"):
            for repetition in (1, 0):
                stored(path, line(name, repetition, seconds=seconds))
    assert [(one["repetition"], one["plant"], one["seconds"]) for one in read_lines(path)] == [
        (0, "a hang", 2), (0, "a comment", 2), (1, "a hang", 2), (1, "a comment", 2),
    ]  # fmt: skip


def test_a_record_goes_on_where_it_was_stopped_unless_the_rules_are_others(tmp_path):
    path = tmp_path / "planted.jsonl"
    assert not is_stored(path, "a hang", 0)
    assert not is_stored(None, "a hang", 0)
    stored(path, line("a hang", 0, rules=rules_digest()))
    stored(path, line("a comment", 0, rules="others"))
    assert is_stored(path, "a hang", 0)
    assert not is_stored(path, "a hang", 1)
    assert not is_stored(path, "a comment", 0)


SOME = ("30% in the extension", "the package moved with its configuration")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("planted"), SOME)


@pytest.mark.long
@pytest.mark.alone
@pytest.mark.parametrize("name", SOME)
def test_some_are_planted_anew(project, name):
    found = compared(project, name)
    assert found["as_expected"], found


def test_branches_have_a_name_each():
    assert len({branch_of(name) for name in PLANTS}) == len(PLANTS)
