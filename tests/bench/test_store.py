"""Stored files: JSON Lines or an object, a record a line; what is cut off or mixed is refused by name and line."""

import json
import os
import re

import pytest

from bench import store
from bench.machine import RESULTS, ROOT
from ddpm.errors import BadInput

TIMES = {"kernels/a": 1.0, "kernels/b": 2.0}


@pytest.fixture
def path(tmp_path, content):
    store.write(tmp_path / "r.jsonl", content(TIMES, processes=3))
    return tmp_path / "r.jsonl"


@pytest.mark.parametrize("name", ["r.json", "r.jsonl"])
def test_what_is_written_is_read_and_a_record_is_a_line(tmp_path, content, name):
    made = content(TIMES, processes=3)
    store.write(tmp_path / name, made)
    assert store.load(tmp_path / name) == made
    before = (tmp_path / name).read_text().splitlines()
    made["records"][3]["gate"] = 7.0
    store.write(tmp_path / name, made)
    after = (tmp_path / name).read_text().splitlines()
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert len(changed) == 1
    assert json.loads(changed[0][1].rstrip(","))["gate"] == 7.0


def test_an_object_and_lines_are_what_their_names_say(path, content):
    head, *records = map(json.loads, path.read_text().splitlines())
    made = content(TIMES, processes=3)
    assert head == made | {"records": 6}
    assert records == made["records"]
    store.write(path.with_suffix(".json"), made)
    assert json.loads(path.with_suffix(".json").read_text()) == made


def test_files_of_before_are_read(tmp_path, content):
    made = content(TIMES)
    (tmp_path / "old.json").write_text(json.dumps(made, indent=2))
    assert store.load(tmp_path / "old.json") == made
    lines = [made | {"records": None}, *made["records"]]
    del lines[0]["records"]  # a header without their number
    (tmp_path / "plain.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert store.load(tmp_path / "plain.jsonl") == made


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: [*lines[:-1], lines[-1][:40]], "line 7: has no end"),
        (lambda lines: [*lines[:3], lines[3][:40] + "\n", *lines[4:]], "line 4: not readable JSON"),
        (lambda lines: [*lines[:-1], lines[-1].rstrip("\n")], "line 7: has no end"),
        (lambda lines: lines[:-2], "line 5: the last of 4 records, needs the 6 of its header"),
        (lambda lines: [lines[0][:50]], "line 1: not readable JSON"),
        (lambda lines: [*lines, *lines], "line 8: found another header"),
        (lambda lines: [*lines, lines[2]], "line 8: the last of 7 records, needs the 6"),
        (lambda lines: [*lines[:3], lines[1], *lines[4:]], "line 4: kernels/a operator of process 0 is in line 2"),
        (lambda lines: [*lines[:2], "\n", *lines[2:]], "line 3: not readable JSON"),
        (lambda lines: [*lines[:2], "[]\n", *lines[3:]], "line 3: found a JSON list"),
        (lambda lines: [*lines[:2], '{"a": 1}\n', *lines[3:]], "line 3: lacks workload, candidate or process"),
        (lambda lines: [line.replace('"gate": ', '"gate": -') for line in lines], "line 2: kernels/a operator has no"),
        (lambda lines: ['{"records": []}\n'], "line 1: holds the records itself"),
        (lambda lines: ["{}\n"], "found another JSON object"),
        (lambda lines: [], "line 1: not readable JSON"),
    ],
)
def test_what_is_cut_off_or_mixed_is_refused_by_line(path, change, words):
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))
    with pytest.raises(BadInput, match=re.escape(f"{path}: ")) as caught:
        store.load(path)
    assert words in str(caught.value)


def test_an_object_that_is_cut_off_or_of_lines_is_refused_by_line(path, content):
    whole = path.with_suffix(".json")
    whole.write_text(path.read_text())  # JSON Lines under the other name
    with pytest.raises(BadInput, match=r"r\.json: .*line 2"):
        store.load(whole)
    text = store.text_of(content(TIMES, processes=3), lines=False)
    whole.write_text("".join(text.splitlines(keepends=True)[:-4]))
    with pytest.raises(BadInput, match=r"r\.json: .*line \d+"):
        store.load(whole)


def test_counts_that_are_none_are_refused(path):
    path.write_text(path.read_text().replace('"against"', '"counts": {"operators": -1}, "against"'))
    with pytest.raises(BadInput, match="line 2: kernels/a operator has counts"):
        store.load(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content.update(processes="8"), "its processes no integer"),
        (lambda content: content.update(machine=[]), "its machine is no object"),
        (lambda content: content["records"][1].update(process=[]), "record 2: workload or candidate is no string"),
        (lambda content: content["records"][1].update(workload=3), "record 2: workload or candidate is no string"),
        (lambda content: content["records"][1].update(parity=False), "has neither times nor why"),
        (lambda content: content["records"][1].pop("parity"), "has neither times nor why"),
        (lambda content: content["records"][1].pop("against"), "record 2: .* does not say what it was timed against"),
        (lambda content: content["records"][1].update(against=["eager"]), "does not say what it was timed against"),
        (lambda content: content["machine"].update(commit=7), "its machine has the commit 7"),
    ],
)
def test_what_is_not_of_its_kind_is_bad_input(tmp_path, content, change, words):
    path, changed = tmp_path / "r.json", content(TIMES, processes=3)
    change(changed)
    path.write_text(json.dumps(changed))
    with pytest.raises(BadInput, match=words):
        store.load(path)


def test_the_stored_measurements_are_lines():
    for name in ("run", "peers", "networks", "sampling", "export"):
        files = list((ROOT / RESULTS).glob(f"*/{name}.jsonl"))
        assert files
        for file in files:
            assert store.load(file)["records"]


def test_a_pipe_is_not_waited_for(tmp_path):
    for name in ("r.json", "r.jsonl"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(BadInput, match=r"r\.jsonl?: is no regular file"):
            store.load(tmp_path / name)
