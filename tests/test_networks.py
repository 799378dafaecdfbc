"""The stored table of networks is of today's networks, whole, and right: a hole is one that docs/networks.md explains.

Too old: tests/networks.py, in its first lines, says how the record is made.
"""

from bench.report import NETWORKS as RECORD
from bench.report import networks_table, read_lines
from ddpm.metrics import CALL_TOLERANCE, ENGINE_TOLERANCE
from tests.networks import COLUMNS, NETWORKS

TOLERANCES = dict.fromkeys(COLUMNS, ENGINE_TOLERANCE) | {"onnx_denoiser": CALL_TOLERANCE, "profile": None}
# Points are no images; native has only what is written in operators with kernels in C++.
HOLES = {("PointMLP", "onnx_denoiser"), ("PointMLP", "onnx_sampler")}
HOLES |= {(name, "native") for name in NETWORKS if name not in ("ContextUnet", "SimpleUNet")}


def test_the_record_is_of_the_present_networks_and_whole():
    lines = read_lines(RECORD)
    assert {line["network"]: line["code"] for line in lines} == {name: each.code() for name, each in NETWORKS.items()}
    assert all(tuple(line["cells"]) == COLUMNS for line in lines)


def test_what_is_there_is_right_and_what_is_not_says_why():
    cells = {(line["network"], name): cell for line in read_lines(RECORD) for name, cell in line["cells"].items()}
    assert {place for place, cell in cells.items() if cell["reason"]} == HOLES
    for (network, column), cell in cells.items():
        if (network, column) not in HOLES and TOLERANCES[column] is not None:
            assert cell["figure"] <= TOLERANCES[column], (network, column)


def test_the_table_has_a_row_for_each_network_and_a_note_for_each_reason():
    cells = {"train": {"figure": 1.23e-6, "reason": None}, "profile": {"figure": None, "reason": None}}
    other = {"train": {"figure": 0.0, "reason": None}, "profile": {"figure": None, "reason": "no images"}}
    lines = [{"network": "A", "cells": cells}, {"network": "B", "cells": other}]
    assert networks_table(lines).splitlines() == [
        "| network | train | profile |",
        "|---|---|---|",
        "| A | 1e-06 | yes |",
        "| B | 0 | no |",
        "",
        "- B: without profile: no images",
    ]
