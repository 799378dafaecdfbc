"""The static report: every case compiles for every architecture, and stays as lean as it is."""

import copy
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import cli
from bench.static import BASELINE, versions
from kernels import backend, static

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
PAIRS = [(name, arch) for arch in static.ARCHS for name in static.CASES]


def bench(*arguments):
    """Run in a process of its own: under TRITON_INTERPRET=1 this one cannot compile."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The whole report, run once: records.json and a TTIR and SASS file of each kernel."""
    folder = tmp_path_factory.mktemp("static")
    archs = [word for arch in static.ARCHS for word in ("--arch", arch)]
    # Another Triton compiles otherwise: then the figures below are checked, but not against the baseline.
    same = json.loads(BASELINE.read_text())["versions"] == versions()
    result = bench(
        "static", *archs, *(["--check"] if same else []), "--json", folder / "records.json", "--dump", folder
    )
    assert result.returncode == 0, result.stderr
    (folder / "out.txt").write_text(result.stdout)
    return folder


@pytest.fixture(scope="session")
def records(folder):
    lines = json.loads((folder / "records.json").read_text())["records"]
    return {(line["kernel"], line["arch"]): line for line in lines}


def dumped(folder, name, arch, kind):
    return (folder / f"{'-'.join(name.replace(',', '').split())}.{arch}.{kind}").read_text()


def test_every_case_compiles_for_every_architecture(records):
    assert set(records) == set(PAIRS)


def test_nothing_spills(records):
    for record in records.values():
        assert record["spill_store_bytes"] == record["spill_load_bytes"] == record["stack"] == 0, record


def test_accesses_are_16_bytes_wherever_alignment_allows(records):
    for (name, _), record in records.items():
        if not record["vectors"]:
            assert "ragged" in name or "channels_last" in name
            continue
        if "uint8" not in name and not name.startswith("bare"):  # the bare kernel only loads scalars
            assert record["load_bits"] == 128, record
        if not name.startswith("noise_mse") or "backward" in name:  # the loss itself is one scalar per program
            assert record["store_bits"] == 128, record


@pytest.mark.parametrize(("name", "run"), [("q_sample uint8 to fp32", 4), ("q_sample uint8 to bf16", 8)])
def test_pixels_are_loaded_as_many_together_as_a_16_byte_store_takes(records, name, run):
    for arch in static.ARCHS:
        scalars = 4  # seed, sample, t, alpha_bar
        assert records[name, arch]["global_loads"] == 16 // run + scalars


@pytest.mark.parametrize("name", ["q_sample bf16", "solver_step fp32"])
def test_operators_stand_within_1_3_of_the_bare_kernel(records, name):
    for arch in static.ARCHS:
        bare = records[static.CASES[name].yardstick, arch]["instructions_per_element"]
        assert records[name, arch]["instructions_per_element"] <= 1.3 * bare
        assert records[name, arch]["ratio"] == pytest.approx(
            records[name, arch]["instructions_per_element"] / bare, abs=1e-3
        )


NETWORK = [name for name, case in static.CASES.items() if case.yardstick is None]
NOISE = [name for name in static.CASES if name not in NETWORK and not name.startswith("bare")]


@pytest.mark.parametrize("name", NOISE)
def test_offsets_are_64_bit_from_the_row_on(folder, name):
    """In the TTIR every access to image tensors [B, RUN] adds an int64 offset, multiplied out in int64."""
    for arch in ("sm_80", "sm_100"):
        ttir = dumped(folder, name, arch, "ttir")
        accesses = re.findall(r"tt\.addptr (%\w+), .*: tensor<128x\d+x!tt\.ptr<\w+>>, tensor<128x\d+xi(\d+)>", ttir)
        assert accesses
        for base, width in accesses:
            # 32 bits serve from the start of a gathered row on, which was reached by 64.
            assert width == "64" or re.search(rf"{base} = tt\.broadcast .* : tensor<128x1x!tt\.ptr<\w+>> ->", ttir)
        # Rows or chunks are widened first ...
        assert re.search(r"arith\.ext[su]i .*: tensor<128xi32> to tensor<128xi64>", ttir)
        # ... and then scaled to elements.
        assert re.search(r"arith\.muli .*: tensor<128(x1)?xi64>", ttir)


@pytest.mark.parametrize("name", NETWORK)
def test_images_start_at_64_bit_offsets(folder, name):
    """In the TTIR, accesses to x and to the output start at an int64 offset; within an image they have 32 bits."""
    for arch in ("sm_80", "sm_100"):
        ttir = dumped(folder, name, arch, "ttir")
        if name.startswith("group_norm_relu"):
            starts = re.findall(r"tt\.addptr %(?:x|out), .*: !tt\.ptr<\w+>, (\w+)", ttir)
            assert starts == ["i64"] * 2
        else:
            starts = re.findall(r"tt\.addptr .*, %image\w* : tensor<16x1x!tt\.ptr<\w+>>, tensor<16x1xi(\d+)>", ttir)
            assert starts == ["64"] * 2


@pytest.mark.parametrize("name", NETWORK)
def test_networks_share_their_elements_out_among_programs(records, name):
    case = static.CASES[name]
    launch = case.launch()
    threads = 32 * launch.options["num_warps"] * math.prod(launch.grid)
    for arch in static.ARCHS:
        record = records[name, arch]
        assert record["instructions_per_element"] == round(record["instructions"] * threads / case.elements, 3)
        assert record["ratio"] is None


def test_products_run_on_tensor_cores_in_16_bit(folder):
    for arch in static.ARCHS:
        sass = dumped(folder, "bottleneck bf16", arch, "sass")
        steps = 32 // 16 * 256 // 8 // 4  # k and column tiles of m16n8k16 in a stage, over four warps
        assert len(re.findall(r"HMMA\.16816\.F32\.BF16", sass)) == steps


def test_listings_end_with_their_kernel(folder, records):
    for name, arch in PAIRS:
        assert dumped(folder, name, arch, "sass").count(" EXIT") >= 1
        assert records[name, arch]["instructions"] > 150


def test_cards_are_predicted_from_two_rates(records):
    record = records["q_sample bf16", "sm_90"]
    card = record["cards"]["H200"]
    assert card["issue_us"] == pytest.approx(record["instructions_per_element"] / (132 * 128 * 1.98e-3), abs=1e-3)
    assert card["bytes_us"] == pytest.approx(6 / 4.8, abs=1e-3)
    assert card["binds"] == ("issue" if card["issue_us"] > card["bytes_us"] else "bytes")
    assert {card for record in records.values() for card in record["cards"]} == set(static.CARDS)


def test_tables_fit_120_columns_uncut(folder):
    lines = (folder / "out.txt").read_text().splitlines()
    assert max(map(len, lines)) <= 120
    assert not any("…" in line for line in lines)


def test_compare_is_silent_about_equal_and_slightly_longer_code(records):
    slower = copy.deepcopy(list(records.values()))
    for record in slower:
        record["instructions_per_element"] *= 1.04
    assert static.compare(records.values(), records.values()) == []
    assert static.compare(slower, records.values()) == []


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("instructions_per_element", lambda value: value * 1.06),
        ("spill_store_bytes", lambda value: value + 4),
        ("spill_load_bytes", lambda value: value + 4),
        ("load_bits", lambda value: value // 2),
        ("store_bits", lambda value: value // 2),
        ("global_loads", lambda value: value + 1),
    ],
)
def test_compare_finds_planted_violations(records, field, change):
    planted = copy.deepcopy(list(records.values()))
    planted[7][field] = change(planted[7][field])
    (line,) = static.compare(planted, records.values())
    assert planted[7]["kernel"] in line
    assert planted[7]["arch"] in line
    assert field in line


def test_compare_fails_closed(records):
    everything = list(records.values())
    (line,) = static.compare(everything[1:], everything)
    assert "was not compiled" in line
    (line,) = static.compare(everything, everything[1:])
    assert "no baseline" in line


def test_the_committed_baseline_covers_everything():
    baseline = json.loads((ROOT / "bench" / "results" / "static.json").read_text())
    assert {(line["kernel"], line["arch"]) for line in baseline["records"]} == set(PAIRS)


@pytest.mark.parametrize(
    ("arguments", "interpreted", "code", "words"),
    [
        (["--arch", "sm_70"], False, 2, "sm_70"),
        (["--kernel", "("], False, 2, "regular expression"),
        (["--kernel", "nothing"], False, 2, "matches none"),
        ([], True, 1, "TRITON_INTERPRET"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, arguments, interpreted, code, words):
    monkeypatch.setattr(backend, "INTERPRETED", interpreted)
    assert cli.main(["static", *arguments]) == code
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert words in line
