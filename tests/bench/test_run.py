"""`ddpm-bench run`: parity before speed, nothing that goes wrong stays silent, what is stored can be read again."""

import json
import re
import shlex
import subprocess
import sys
from statistics import median

import pytest
import torch

from bench import children, kernels, store
from bench.children import environment, run_child
from bench.cli import main
from bench.machine import ROOT, describe
from bench.measure import Convolution, measure
from bench.processor import queued_seconds
from bench.registry import SUITES, Workload, load, seed_of, selected
from bench.run import merged, run_here
from bench.suites import networks
from ddpm.command_line import debugging
from ddpm.errors import BadInput
from kernels.backend import Cost

CPU = torch.device("cpu")


def by_row(content):
    return {store.row_of(record): record for record in content["records"]}


def test_a_good_workload_has_every_column(small_registry):
    workload = load("step", True)[0]
    eager, double = measure(workload, CPU, rounds=4, seconds=10, ceiling=1e9)
    assert (eager["candidate"], double["candidate"]) == ("eager", "double")
    assert eager["speed_up"] is None
    assert 0.05 < double["speed_up"] < 1  # it does the work three times
    for record in (eager, double):
        assert record["parity"]
        # calls=2: times are per unit; images per call.
        assert record["images_per_s"] == pytest.approx(3 / (2 * record["wall_us"] * 1e-6))
        assert record["bytes_per_s"] == pytest.approx(16000 / (2 * record["kernel_us"] * 1e-6))
        assert record["share_of_product"] == pytest.approx(record["flops_per_s"] / 1e9)
        assert record["warm_up_s"] > 0
        assert record["share_of_copy"] > 0
    assert len(double["samples_us"]["double"]["processor"]) == 4
    assert double["against"] == "eager"
    assert eager["against"] == "yardstick"
    assert (eager["frozen"], "frozen" in double) == (True, False)
    assert double["counts"]["operators"] == 4 * 1 + 1  # sin of sin, times 0, plus sin
    mine, theirs = (double["samples_us"][name] for name in ("double", "eager"))
    ratios = [
        max(wall - queued, 1e-3) / max(other - waited, 1e-3)
        for wall, queued, other, waited in zip(
            mine["wall"], mine["queued"], theirs["wall"], theirs["queued"], strict=True
        )
    ]
    wanted = median(ratios) if queued_seconds() is not None else min(mine["wall"]) / min(theirs["wall"])
    assert double["wall_gate"] == pytest.approx(wanted, rel=1e-2)


def test_without_parity_there_is_no_time_and_the_run_fails_after_the_rest(small_registry, tmp_path, capsys):
    out = tmp_path / "r.json"
    assert main(["run", "--suite", "step", "--rounds", "2", "--out", str(out)]) == 1
    content = store.load(out)
    assert content["parity"] is False
    assert content["failed"] == 3
    rows = by_row(content)
    for candidate in ("cosine", "nan", "signed"):
        assert not store.is_good(rows[f"step/wrong {candidate}"])
        assert "kernel_us" not in rows[f"step/wrong {candidate}"]
    assert rows["step/wrong nan"]["error"] == "nan"  # JSON has no NaN
    for broken in ("step/crashes called", "step/crashes made", "step/unbuilt eager"):
        assert rows[broken]["failed"] == "RuntimeError: planted crash"
    for good in ("step/good double", "step/wrong double", "step/crashes double"):
        assert store.is_good(rows[good])
    printed = capsys.readouterr().out
    assert "parity lost: error 0.3 > 1e-06, no speed-up" in printed
    assert "failed: RuntimeError: planted crash" in printed


def test_a_suite_may_be_a_file_of_another_project(tmp_path, monkeypatch):
    """The function and the suite that docs/ci.md shows."""
    text = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
    for name, shown in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", text, re.S):
        (tmp_path / name).write_text(shown)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    assert main(["run", "--suite", "speed.py", "--rounds", "2", "--out", "r.json"]) == 0
    assert {record["candidate"] for record in store.load(tmp_path / "r.json")["records"]} == {"eager", "mine"}
    for name, words in (("gone.py", "no such file"), ("mine.py", "has no workloads(quick)")):
        with pytest.raises(BadInput, match=re.escape(words)):
            selected(name, True, "")


def test_a_clean_run_records_what_repeats_it(small_registry, tmp_path, capsys, monkeypatch):
    out = tmp_path / "r.json"
    line = ["run", "--suite", "all", "--filter", "good|none of this", "--rounds", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["ddpm-bench", *line])
    rates = iter((Convolution(2e9, ""), Convolution(3e9, "")))  # before the workload and after it
    monkeypatch.setitem(run_here.__globals__, "convolution_ceiling", lambda device: next(rates))
    assert main(line) == 0
    content = store.load(out)
    assert content["parity"] is True
    assert content["processes"] == 1
    assert content["seed"] == 21
    assert {"commit", "dirty", "torch", "processor", "device"} <= content["machine"].keys()
    assert shlex.split(content["command"]) == ["ddpm-bench", *line]
    for record in content["records"]:
        assert record["convolution_flops_per_s"] == 3e9
        assert record["share_of_convolution"] == record["flops_per_s"] / 3e9
    assert (
        content["skipped"]["kernels"]
        == "suite kernels: nobody_has_it is not installed, needs: pip install nobody_has_it"
    )
    assert set(content["skipped"]) == set(SUITES) - {"step"}
    assert "note: suite kernels: nobody_has_it is not installed" in capsys.readouterr().err


def test_the_seed_is_the_one_that_the_workloads_draw_with(small_registry, monkeypatch, tmp_path):
    def some(*names):
        return [Workload(f"{name}/a", name, None) for name in names]

    assert seed_of("step", some("step")) == 21
    monkeypatch.setitem(SUITES, "sampling", "small_kernels")  # which has none
    assert seed_of("sampling", some("sampling")) is None
    assert seed_of("all", some("step", "step")) == 21
    assert seed_of("all", some("step", "sampling")) is None
    for name, text, seed in (("a.py", "SEED = 3", 3), ("b.py", "", None)):
        (tmp_path / name).write_text(f"{text}\ndef workloads(quick): return []\n")
        assert seed_of(str(tmp_path / name), []) == seed
    one = store.content_of([], {}, {}, seed=5, suite="", quick=True, filter="", product_flops_per_s=1)
    assert merged([one, one])["seed"] == 5
    assert store.content_of([], {}, {})["seed"] is None  # a caller that does not say is not believed to know


@pytest.mark.parametrize("suite", ["kernels", "step", "sampling", "networks", "training", "export", "peers", "ladder"])
def test_the_seed_of_the_real_suites_is_that_of_their_noise(suite):
    assert seed_of(suite, []) == seed_of("all", [Workload("a", suite, None)]) == networks.SEED == kernels.SEED


def test_debug_shows_the_tracebacks_of_what_a_record_keeps_in_one_line(small_registry, tmp_path, capsys):
    arguments = ["run", "--suite", "step", "--filter", "crashes|unbuilt", "--rounds", "1", "--out"]
    assert main([*arguments, str(tmp_path / "r.json"), "--quiet"]) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert main(["--debug", *arguments, str(tmp_path / "r.json"), "--quiet"]) == 1
    assert capsys.readouterr().err.count("RuntimeError: planted\ncrash\n") == 3
    assert not debugging()


def test_debug_shows_what_a_child_said(small_registry, monkeypatch, capsys):
    said = "Traceback (most recent call last)\nerror: --suite: got 'nonsense'\n"
    talk = f"import sys; sys.stderr.write({said!r}); sys.exit(2)"
    monkeypatch.setattr(children, "PYTHON", (sys.executable, "-c", talk))
    for word, shown in (("", ""), ("1", said)):
        monkeypatch.setenv("FUSED_DDPM_DEBUG", word)
        with pytest.raises(BadInput, match="--suite: got 'nonsense'"):
            run_child(ROOT, 0, ["--suite", "nonsense"], paths=[ROOT])
        assert capsys.readouterr().err == shown
    assert environment([ROOT])["FUSED_DDPM_DEBUG"] == "1"  # which makes the child say it


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--suite", "nonsense"],
            "needs one of kernels, step, sampling, networks, training, export, peers, ladder, all",
        ),
        (["--suite", "kernels"], "nobody_has_it is not installed"),
        (["--suite", "training"], "not built yet"),
        (["--suite", "step", "--filter", "["], "'[' is no regular expression"),
        (["--suite", "step", "--filter", "zzz"], "matches none of: step/good; step/wrong"),
        (["--suite", "step", "--rounds", "0"], "rounds"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(small_registry, tmp_path, capsys, arguments, words):
    assert main(["run", *arguments, "--out", str(tmp_path / "r.json")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error
    assert list(tmp_path.iterdir()) == []


def test_threads_are_those_asked_for(small_registry, tmp_path, capsys):
    before = torch.get_num_threads()
    try:
        arguments = ["run", "--suite", "step", "--filter", "good", "--rounds", "1", "--quiet"]
        assert main([*arguments, "--threads", "1", "--out", str(tmp_path / "r.json")]) == 0
    finally:
        torch.set_num_threads(before)
    assert store.load(tmp_path / "r.json")["machine"]["threads"] == 1
    assert environment([ROOT], 3)["OMP_NUM_THREADS"] == "3"
    assert environment([ROOT])["OMP_NUM_THREADS"] == "1"


def test_an_unwritable_out_is_said_before_anything_is_measured(small_registry, tmp_path, capsys):
    for out in (tmp_path / "no" / "r.json", tmp_path):
        assert main(["run", "--suite", "step", "--out", str(out)]) == 2
        assert "needs a file in a folder that exists" in capsys.readouterr().err


def test_a_broken_import_of_our_own_is_no_missing_package(small_registry, monkeypatch):

    def broken(quick):
        raise ModuleNotFoundError("No module named 'ddpm.gone'", name="ddpm.gone")

    monkeypatch.setattr(sys.modules["small_kernels"], "workloads", broken)
    with pytest.raises(ModuleNotFoundError):
        selected("all", True, "")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no such file"),
        ("{", "not readable JSON"),
        ("[]", "needs an object"),
        ('{"records": []}', "needs a file that `ddpm-bench run --out` wrote"),
        ('{"kind": "fused-ddpm benchmark", "records": [], "format_version": 99}', "found format_version 99, needs 1"),
        ('{"kind": "fused-ddpm benchmark", "records": [], "format_version": 1}', "lacks date, machine"),
    ],
)
def test_foreign_files_are_refused(tmp_path, text, words):
    path = tmp_path / "r.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BadInput, match=r"r\.json") as caught:
        store.load(path)
    assert words in str(caught.value)


COMPILING = ("step", "sampling", "networks", "training", "ladder")


@pytest.mark.parametrize("suite", ["kernels", *(pytest.param(name, marks=pytest.mark.long) for name in COMPILING)])
def test_the_real_suites_build_and_are_named_after_themselves(suite):
    found = {quick: load(suite, quick) for quick in (True, False)}
    for workloads in found.values():
        names = [workload.name for workload in workloads]
        assert len(set(names)) == len(names)
        assert all(name.startswith(f"{suite}/") for name in names)
    bench = found[True][0].build(CPU)
    assert isinstance(bench.cost, Cost)
    assert bench.cost.bytes > 0
    assert bench.cost.flops > 0
    bench.reference(*bench.sets[0])
    for candidate in bench.candidates.values():
        assert candidate.error(candidate.make()) <= candidate.tolerance


@pytest.mark.long
def test_stored_json_is_plain(small_registry, tmp_path):
    out = tmp_path / "r.json"
    main(["run", "--suite", "step", "--rounds", "1", "--out", str(out)])
    json.loads(out.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.long
@pytest.mark.alone
def test_pytest_bench_measures_the_same_registry(tmp_path):
    result = tmp_path / "pytest.json"
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-k", "noise_mse/", "-p", "no:cacheprovider"]
    command += ["--benchmark-max-time=0.01", "--benchmark-min-rounds=2", f"--benchmark-json={result}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    names = {line["name"].partition("[")[2] for line in json.loads(result.read_text())["benchmarks"]}
    assert names == {"kernels/noise_mse/fp32/1e5 eager]", "kernels/noise_mse/fp32/1e5 operator]"}


@pytest.mark.long
def test_several_processes_are_merged_into_one_file(tmp_path, capsys):
    out = tmp_path / "r.json"
    arguments = ["--suite", "kernels", "--quick", "--filter", "group_norm", "--rounds", "1", "--processes", "2"]
    assert main(["run", *arguments, "--out", str(out)]) == 0
    content = store.load(out)
    assert content["processes"] == 2
    assert [(record["process"], record["candidate"]) for record in content["records"]] == [
        (process, name) for process in range(2) for name in ("eager", "operator")
    ]
    assert content["machine"]["threads"] == 1


def test_the_commit_of_a_tree_without_git_is_the_one_that_was_named(monkeypatch):
    monkeypatch.setenv("FUSED_DDPM_COMMIT", "c0ffee")
    monkeypatch.setattr("bench.machine.git", lambda *line, **_: subprocess.CompletedProcess(line, 0, b"abc\n", b""))
    assert describe(CPU)["commit"] == "abc"  # git knows better
    monkeypatch.setattr("bench.machine.git", lambda *_, **__: None)
    assert (describe(CPU)["commit"], describe(CPU)["dirty"]) == ("c0ffee", None)
