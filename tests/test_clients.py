"""The stored table of clients is of today's graphs and whole, and what docs/export.md promises is so in it.

Too old: tests/clients.py, in its first lines, says how the record is made.
"""

from itertools import product

import pytest

from bench.report import CLIENTS as RECORD
from bench.report import clients_table, read_lines
from tests import clients
from tests.clients import CLIENTS, FILES, GIVEN, GRAPH, PRECISIONS, few_words, stored
from tests.environments import ENDS
from tests.records import code_digest

# What computes as ONNX says, and what OpenVINO is promised to run.
WHOLE = ("onnxruntime, oldest", "onnxruntime, newest", "onnxruntime-node", "onnxruntime-web in Chromium, wasm")
PROMISED = {
    *product((*WHOLE, "onnx ReferenceEvaluator"), FILES),
    ("OpenVINO, CPU", "denoiser.onnx"),
    ("OpenVINO, CPU", GIVEN),
}


def test_the_record_is_of_the_present_graphs_and_whole():
    lines = read_lines(RECORD)
    assert {line["graph"] for line in lines} == {code_digest(GRAPH)}
    found = [(line["client"], line["precision"], line["file"]) for line in lines]
    assert found == list(product(CLIENTS, PRECISIONS, FILES))


@pytest.mark.parametrize("end", ENDS)
def test_the_oldest_and_the_newest_runtime_are_those_of_the_other_tests(end):
    versions = {line["version"] for line in read_lines(RECORD) if line["client"] == f"onnxruntime, {end}"}
    assert versions == {ENDS[end]["onnxruntime"]}


def test_what_is_promised_is_so():
    wrong = [line for line in read_lines(RECORD) if (line["client"], line["file"]) in PROMISED and not line["right"]]
    assert wrong == []


def line(file="step.onnx", precision="fp32", client="tract", **facts):
    made = {"client": client, "file": file, "precision": precision, "version": "1.0", "loaded": True, "reason": None}
    return made | {"error": 3e-7, "psnr_db": 60.2, "right": True} | facts


def test_the_table_tells_what_is_right_wrong_missing_and_why():
    nothing = {"error": None, "psnr_db": None, "right": False}
    lines = [
        line(), line(precision="int8"), line("b.onnx", error=0.5, right=False), line("b.onnx", "int8", **nothing),
        line(client="other", version=None, loaded=False, reason="no Scan", **nothing),
        line(client="other", reason="out of bounds", precision="int8", **nothing),
        *(line("b.onnx", each, "other", loaded=False, reason="no Scan", **nothing) for each in ("fp32", "int8")),
    ]  # fmt: skip
    assert clients_table(lines).splitlines() == [
        "| fp32, int8 | step.onnx | b.onnx |",
        "|---|---|---|",
        "| tract 1.0 | 3.0e-07, 60 dB | **wrong: 5.0e-01**, **not finite** |",
        "| other 1.0 | no, fails | no |",
        "",
        "- other, without step.onnx in fp32; b.onnx: no Scan",
        "- other, without step.onnx in int8: out of bounds",
    ]


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            "Exception from src/core.cpp:132:\nCheck 'x' failed at a.cpp:7:\nno Scan_18 in /tmp/x/a.onnx",
            "no Scan in a.onnx",
        ),
        ("/r/o/t.cc:254 bool ort::T(const Node &) const !t.empty() was false. Cast_1 is not set.", "Cast is not set."),
        ("Failed\n\nCaused by:\n  0: no Scan\n\nStack backtrace:\n 0: a\n", "Failed 0: no Scan"),
    ],
)
def test_a_reason_has_no_folders_and_no_places_of_source(said, reason):
    assert few_words(said) == reason


def test_a_line_takes_the_place_of_the_one_of_the_same_client_and_file(tmp_path):
    path = tmp_path / "clients.jsonl"
    for error in (1.0, 2.0):
        for file in reversed(FILES):
            stored(path, line(file, error=error))
    assert [(one["file"], one["error"]) for one in read_lines(path)] == [(file, 2.0) for file in FILES]


@pytest.mark.long
def test_the_record_of_a_client_can_be_made_again(tmp_path):
    assert clients.main(["--only", "Reference", "--out", str(tmp_path / "some.jsonl")]) == 0
    lines = read_lines(tmp_path / "some.jsonl")
    assert len(lines) == len(PRECISIONS) * len(FILES)
    assert [line for line in lines if not line["right"]] == []
