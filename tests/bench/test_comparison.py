"""The tables of `compare`: what their columns are, and that they show what the verdict used."""

import json

import pytest

from bench import store
from bench.comparison import compare_markdown, compare_table, result_of
from bench.verdicts import Thresholds, exit_code, judge, pooled

ROWS = {"kernels/a": 1.0, "kernels/b": 2.0, "kernels/c": 3.0}


def counted(content, **counts):
    for record in content["records"]:
        record["counts"] = dict(counts)
    return content


@pytest.fixture
def rounds(content):
    """a waits, b is a frozen reference that moved, c takes more memory; in two rounds."""
    made = []
    for number, processes in enumerate((8, 16)):
        pair = (
            counted(content(ROWS, processes, seed=2 * number), operators=3, peak_bytes=2_000_000),
            counted(content(ROWS, processes, seed=2 * number + 1), operators=3, peak_bytes=4_000_000),
        )
        for side, one in enumerate(pair):
            for record in one["records"]:
                record["wall_us"] = 500.0 * (1 + number) * (1 + side)
                record["wall_gate"] = record["gate"] * (2 if side and record["workload"] == "kernels/a" else 1)
                record["frozen"] = record["workload"] == "kernels/b"
                if record["workload"] == "kernels/a":
                    record["counts"]["peak_bytes"] = 2_000_000
        made.append(pair)
    return made


def result(rounds):
    found = judge(*rounds[0], Thresholds()) if len(rounds) == 1 else pooled(*rounds, Thresholds())
    return result_of(rounds, found, exit_code(found))


def cells(text, row):
    return next([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if f"| {row} |" in line)


def test_columns_say_what_they_are_and_the_table_shows_both_rounds(rounds):
    text = compare_markdown(result(rounds))
    headings = cells(text, "row")
    assert headings == ["row", "wall base", "wall head", "processor time or count", "p", "limit", "against", "verdict"]
    waits = cells(text, "kernels/a operator")
    assert waits[1:3] == ["1 ms", "2 ms"]  # medians over both rounds: of the first alone 500 us and 1 ms
    assert waits[3].count("%") == 1
    assert " to " in waits[3]
    assert waits[5:] == ["+5%", "eager", "waits (wall time +100.0%; 24 and 24 processes)"] or waits[7].startswith(
        "waits"
    )
    assert "24 and 24 processes" in waits[7]
    assert cells(text, "kernels/b operator")[7] == "not gated (24 and 24 processes)"
    assert cells(text, "kernels/b operator")[5] == ""
    memory = cells(text, "kernels/c operator [peak bytes]")
    assert memory[1:4] == ["1.91 MiB", "3.81 MiB", "+100.0%"]
    assert memory[7] == "more"
    assert text.index("REGRESSION") < text.index("kernels/a operator") < text.index("<details>")
    assert "24" not in compare_markdown(result(rounds[:1])).partition("wall: ")[0]


def test_the_terminal_shows_the_names_of_counts_and_how_many_are_the_same(rounds, capsys):
    compare_table(result(rounds))
    said = capsys.readouterr().out
    assert "kernels/c operator [peak bytes]" in said  # brackets are no markup
    assert "3 counts the same" in said
    assert said.splitlines()[-1] == "REGRESSION"


def test_the_header_names_what_is_known(rounds, capsys):
    made = result(rounds)
    assert "base c0ffee, head c0ffee; 8 and 8 processes on test" in compare_markdown(made)
    made["base"]["machine"] = made["base"]["machine"] | {"commit": None, "processor": "other"}
    assert "base of 2026-01-01T00:00:00+00:00 (no commit), head c0ffee; 8 and 8 processes on other and test." in (
        compare_markdown(made)
    )
    empty = store.content_of([], {"commit": "c0ffee"}, {}, processes=0)
    assert "base c0ffee, head c0ffee; 0 and 0 processes." in compare_markdown(result_of([(empty, empty)], [], 3))


def test_rows_that_cannot_be_told_are_said_beside_the_conclusion(content):
    noisy = [content(ROWS, spread=0.3), content(ROWS, spread=0.3, seed=1)]
    found = judge(*noisy, Thresholds())
    assert "no row is slower; of 3 it cannot be told (too noisy)" in compare_markdown(result_of([noisy], found, 0))
    assert "TOO NOISY TO TELL" in compare_markdown(result_of([noisy], found, 4))


def test_the_json_keeps_the_samples_of_all_processes(rounds):
    made = json.loads(store.text_of(result(rounds), lines=False))
    assert len(made["records"]) == (2 * 8 + 2 * 16) * len(ROWS)
    assert {(record["round"], record["side"]) for record in made["records"]} == {
        (number, side) for number in (1, 2) for side in ("base", "head")
    }
    assert all("gate" in record for record in made["records"])
