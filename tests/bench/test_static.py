"""The static report: every case compiles for every architecture, and stays as lean as it is."""

import copy
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from bench import cli
from bench.static import ARCHS, BASELINE
from bench.static.cases import CASES
from bench.static.command import compare, versions
from kernels import backend

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
PAIRS = [(name, arch) for arch in ARCHS for name in CASES]


def bench(*arguments):
    """Run in a process of its own: under TRITON_INTERPRET=1 this one cannot compile."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The whole report, run once: records.json and a TTIR and SASS file of each kernel."""
    folder = tmp_path_factory.mktemp("static")
    archs = [word for arch in ARCHS for word in ("--arch", arch)]
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


@pytest.mark.long
def test_every_case_compiles_for_every_architecture(records):
    assert set(records) == set(PAIRS)


@pytest.mark.long
def test_nothing_spills(records):
    for record in records.values():
        assert record["spill_store_bytes"] == record["spill_load_bytes"] == record["stack"] == 0, record


NETWORK = [name for name, case in CASES.items() if case.elements is not None]
NOISE = [name for name in CASES if name not in NETWORK]

# Every access of a thread, bits -> how many. Of its row it reads scalars: seed, sample index, t, row and step have 64
# bits, alpha_bar, weight, grad and the table's coefficients 32. Everything else is its elements, in 16 bytes unless:
CUT = "rows start at any element, so each is accessed by itself"
APART = "neighbours in a channel lie 8 elements apart"
PIXELS = "as many pixels as a 16-byte store takes, see items.vector_run"
BACKWARDS = "mirrored pixels run backwards"
NARROW = {
    "q_sample uint8 to fp32": (32, 128, PIXELS),
    "q_sample uint8 to bf16": (64, 128, PIXELS),
    "q_sample_rows uint8 to fp32": (32, 128, PIXELS),
    "q_sample_rows uint8 to bf16": (64, 128, PIXELS),
    "q_sample_rows uint8, flip, noise": (8, 128, BACKWARDS),
    "q_sample_rows uint8 ragged": (8, 32, CUT),
    "q_sample fp32 ragged": (32, 32, CUT),
    "noise_mse fp32 ragged": (32, 32, CUT),
    "solver_step fp32 ragged": (32, 32, CUT),
    "q_sample fp32 8 channels_last": (32, 32, APART),
}


def accesses(name):
    """(loads, stores) that a thread of this case cannot do without: Counters, bits -> accesses."""
    case, operator, words = CASES[name], name.split()[0], name.replace(",", "").split()
    constants = case.launch().constants
    elements = constants["BLOCK"] * constants["REPEAT"] * constants["RUN"] // 128
    load, store, _ = NARROW.get(name, (128, 128, ""))
    backward, full = "backward" in words, "full" in words
    scalars = {
        "q_sample": ({64: 3, 32: 1}, {}),
        "q_sample_rows": ({64: 3, 32: 1}, {64: 1}),  # writes t
        "noise_mse": ({64: 2, 32: ("weighted" in words) + backward}, {} if backward else {32: 1}),  # a program's sum
        "solver_step": ({64: 3, 32: 9 if full else 7}, {}),  # in full also c5 and guidance
    }[operator]
    read = {"solver_step": 4 if full else 2}.get(operator, 1)
    written = {
        "q_sample": 2,
        "q_sample_rows": 1 + ("noise" in words),
        "noise_mse": backward,
        "solver_step": 2 + full,  # x, in the branch with noise and in the one without
    }[operator]
    loads, stores = map(Counter, scalars)
    if name == "solver_step fp32, m bf16":  # four elements of m are 8 bytes
        read, loads[64] = 1, loads[64] + elements * 16 // 64
    loads[load] += read * elements * 8 * (1 if "uint8" in words else case.stored.itemsize) // load
    stores[store] += written * elements * 8 * case.stored.itemsize // store
    return loads, stores


@pytest.mark.parametrize("name", NOISE)
@pytest.mark.long
def test_accesses_are_16_bytes_wherever_alignment_allows(records, name):
    loads, stores = accesses(name)
    for arch in ARCHS:
        record = records[name, arch]
        assert record["vectors"] == (NARROW.get(name, ("", "", ""))[2] not in (CUT, APART))
        assert {int(bits): number for bits, number in record["load_widths"].items()} == +loads, arch
        assert {int(bits): number for bits, number in record["store_widths"].items()} == +stores, arch


@pytest.mark.long
def test_accesses_of_the_networks_operators(records):
    for arch in ARCHS:
        for name in NETWORK:
            if name.startswith("convolution"):  # its tiles go through cp.async, see below
                continue
            record = records[name, arch]
            assert set(record["store_widths"]) == {"128"}
            # Weights, biases and gains of a group are 16 channels; the pooled pixels of 7x7 images lie 256 bytes apart
            # and a thread takes one channel of each.
            # How many of each depends on Triton's version; `static --check` counts them against the baseline.
            narrow = set(record["load_widths"]) - {"128"}
            expected = {
                "bottleneck fp32": {"64"},
                "bottleneck bf16": {"32", "64"},
                "bottleneck bf16 28x28": {"16", "64"},
            }
            if name.startswith("guidance_rescale"):  # the weight and phi
                expected[name] = {"32"}
            assert narrow == expected.get(name, set()), name


@pytest.mark.parametrize("name", [name for name in NETWORK if name.startswith("convolution")])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.long
def test_convolutions_multiply_on_tensor_cores_and_load_tiles_in_16_bytes(folder, name, arch):
    """On sm_90 by wgmma where a program has 64 rows, and without a wait for each product."""
    launch, listing = CASES[name].launch(), dumped(folder, name, arch, "sass")
    warpgroups = arch == "sm_90" and launch.constants["BLOCK_M"] >= 64
    products = len(re.findall(r"\bHGMMA" if warpgroups else r"\bHMMA", listing))
    assert products > 0
    assert len(re.findall(r"WARPGROUP\.ARRIVE", listing)) <= max(1, products // 2)
    copies = re.findall(r"LDGSTS\.E([\w.]*)", listing)
    if launch.constants["C"] % 8 == 0:
        assert copies
        assert all(copy.endswith("128") for copy in copies)


@pytest.mark.parametrize("name", NOISE)
@pytest.mark.long
def test_offsets_are_64_bit_from_the_row_on(folder, name):
    """In the TTIR every access to image tensors [B, RUN] adds an int64 offset, multiplied out in int64."""
    for arch in ("sm_80", "sm_100"):
        ttir = dumped(folder, name, arch, "ttir")
        widths = re.findall(r"tt\.addptr .*: tensor<128x\d+x!tt\.ptr<\w+>>, tensor<128x\d+xi(\d+)>", ttir)
        assert set(widths) == {"64"}
        # Rows or chunks are widened first ...
        assert re.search(r"arith\.ext[su]i .*: tensor<128xi32> to tensor<128xi64>", ttir)
        # ... and then scaled to elements.
        assert re.search(r"arith\.muli .*: tensor<128(x1)?xi64>", ttir)


# A convolution refuses calls whose offsets would not fit 32 bits.
@pytest.mark.parametrize("name", [name for name in NETWORK if not name.startswith("convolution")])
@pytest.mark.long
def test_images_start_at_64_bit_offsets(folder, name):
    """In the TTIR, accesses to x and to the output start at an int64 offset; within an image they have 32 bits."""
    for arch in ("sm_80", "sm_100"):
        ttir = dumped(folder, name, arch, "ttir")
        if name.startswith("group_norm_relu"):
            starts = re.findall(r"tt\.addptr %(?:x|out), .*: !tt\.ptr<\w+>, (\w+)", ttir)
            assert starts == ["i64"] * 2
        elif name.startswith("guidance_rescale"):
            starts = re.findall(r"tt\.addptr %(?:m|m_uncond|out), .*: !tt\.ptr<\w+>, (\w+)", ttir)
            assert starts == ["i64"] * len(starts)
            assert len(starts) >= 3
        else:
            starts = re.findall(r"tt\.addptr .*, %image\w* : tensor<16x1x!tt\.ptr<\w+>>, tensor<16x1xi(\d+)>", ttir)
            assert starts == ["64"] * 2


@pytest.mark.parametrize("name", NETWORK)
@pytest.mark.long
def test_networks_share_their_elements_out_among_programs(records, name):
    case = CASES[name]
    launch = case.launch()
    threads = 32 * launch.options["num_warps"] * math.prod(launch.grid)
    for arch in ARCHS:
        record = records[name, arch]
        assert record["instructions_per_element"] == round(record["instructions"] * threads / case.elements, 3)


@pytest.mark.long
def test_products_run_on_tensor_cores_in_16_bit(folder):
    for arch in ARCHS:
        listing = dumped(folder, "bottleneck bf16", arch, "sass")
        steps = 32 // 16 * 256 // 8 // 4  # k and column tiles of m16n8k16 in a stage, over four warps
        assert len(re.findall(r"HMMA\.16816\.F32\.BF16", listing)) == steps


@pytest.mark.long
def test_listings_end_with_their_kernel(folder, records):
    for name, arch in PAIRS:
        assert dumped(folder, name, arch, "sass").count(" EXIT") >= 1
        assert records[name, arch]["instructions"] > 150


@pytest.mark.long
def test_tables_fit_120_columns_uncut(folder):
    lines = (folder / "out.txt").read_text().splitlines()
    assert max(map(len, lines)) <= 120
    assert not any("…" in line for line in lines)


@pytest.mark.long
def test_compare_is_silent_about_equal_and_slightly_longer_code(records):
    slower = copy.deepcopy(list(records.values()))
    for record in slower:
        record["instructions_per_element"] *= 1.04
    assert compare(records.values(), records.values()) == []
    assert compare(slower, records.values()) == []


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
@pytest.mark.long
def test_compare_finds_planted_violations(records, field, change):
    planted = copy.deepcopy(list(records.values()))
    planted[7][field] = change(planted[7][field])
    (line,) = compare(planted, records.values())
    assert planted[7]["kernel"] in line
    assert planted[7]["arch"] in line
    assert field in line


@pytest.mark.long
def test_compare_fails_closed(records):
    everything = list(records.values())
    (line,) = compare(everything[1:], everything)
    assert "was not compiled" in line
    (line,) = compare(everything, everything[1:])
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
