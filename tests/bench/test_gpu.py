"""`ddpm-bench gpu` at tiny sizes, interpreted or faked on the CPU, so that it cannot rot while no GPU is at hand."""

import json
import time

import pytest
import torch

import kernels
from bench.cli import main
from bench.gpu import command, measured
from bench.gpu.command import FAILED, PASSED, SKIPPED, Record, verdict
from bench.gpu.measured import predictor
from bench.kernels import TOLERANCE, workloads
from bench.measure import measure
from bench.registry import Workload
from bench.static import BASELINE
from bench.store import load
from bench.suites import cuda
from bench.suites.kernels import bench_of
from tests.bench.test_children import alive, waited

CPU = torch.device("cpu")
NOISE = {"q_sample", "q_sample_rows", "noise_mse", "noise_mse_backward", "solver_step"}
NETWORK = {"group_norm_relu", "bottleneck"}
OPERATORS = NOISE | NETWORK


@pytest.fixture
def elementwise(monkeypatch):
    """Without the convolutions, which take the interpreter minutes; tests/kernels has them. One round and type."""

    def few(*arguments):
        return [workload for workload in workloads(*arguments) if workload.name in OPERATORS]

    monkeypatch.setattr("bench.kernels.workloads", few)
    monkeypatch.setattr(cuda, "TYPES", {"fp32": torch.float32})
    monkeypatch.setattr(measured, "ROUNDS", 1)


def stored(out, name):
    return json.loads((out / f"{name}.json").read_text())


def run_kernels(out, device=CPU, seconds=600):
    record = Record(out, "kernels").start(CPU)
    measured.kernels(record, device, time.time() + seconds, (800,))
    return record.content


# --- kernels ----------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_kernel_benchmark_runs_and_records(triton_device, elementwise, tmp_path, monkeypatch):
    monkeypatch.setattr(cuda, "TYPES", {"fp32": torch.float32, "fp16": torch.float16})
    content = run_kernels(tmp_path, triton_device)
    assert load(tmp_path / "kernels.json") == content
    assert content["machine"]["torch"] == torch.__version__
    assert verdict(content)[0] == PASSED
    names = {f"kernels/{name}/{label}/1e3" for name in OPERATORS for label in ("fp32", "fp16")}
    ours = [record for record in content["records"] if record["candidate"] == "operator"]
    assert {record["workload"] for record in ours} == names
    assert len(content["records"]) == 2 * len(ours)
    for record in ours:
        assert record["parity"]
        assert len(record["samples_us"]["operator"]["kernel"]) == 1
        assert record["speed_up"] > 0
        assert record["share_of_copy"] > 0


def test_a_spent_budget_stops_and_is_recorded_as_incomplete(elementwise, tmp_path):
    content = run_kernels(tmp_path, seconds=-1)
    assert content["records"] == []
    assert not content["complete"]
    assert {f"kernels/{name}/fp32/1e3" for name in OPERATORS} == content["skipped"].keys()
    assert verdict(content) == (FAILED, f"out of time: {len(OPERATORS)} workloads not measured")


@pytest.mark.long
def test_a_kernel_that_crashes_leaves_the_others(elementwise, tmp_path, monkeypatch, capsys):
    def crashing(*arguments):
        raise RuntimeError("planted\ncrash")

    monkeypatch.setattr(kernels, "solver_step", crashing)
    content = run_kernels(tmp_path)
    assert content["complete"]
    assert verdict(content) == (FAILED, "1 records failed")
    assert {record["workload"].split("/")[1] for record in content["records"]} == OPERATORS
    assert content["tf32"] is False
    assert content["seed"] == 7
    command.show(content)
    assert "RuntimeError: planted crash" in capsys.readouterr().out


def test_a_kernel_without_parity_gets_no_ratio(elementwise, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(TOLERANCE, torch.float32, -1.0)
    content = run_kernels(tmp_path)
    lost = [record for record in content["records"] if record["candidate"] == "operator"]
    assert len(lost) == len(OPERATORS)
    for record in lost:
        assert not record["parity"]
        assert not record.keys() & {"speed_up", "kernel_us", "share_of_copy"}
    assert verdict(content) == (FAILED, f"{len(OPERATORS)} records lost parity")
    command.show(content)
    assert capsys.readouterr().out.count("parity lost") == len(OPERATORS)


@pytest.mark.parametrize("name", sorted(NETWORK))
def test_a_network_operator_with_another_eps_loses_parity(name, monkeypatch):
    operator = getattr(kernels, name)
    monkeypatch.setattr(kernels, name, lambda *arguments: operator(*arguments, eps=0.1))
    workload = next(w for w in workloads(800, torch.float32, CPU) if w.name == name)
    assert workload.error(workload.make(0)) > 1e-3
    monkeypatch.undo()
    workload = next(w for w in workloads(800, torch.float32, CPU) if w.name == name)
    assert workload.error(workload.make(0)) < 2e-5


@pytest.mark.parametrize("name", sorted(NOISE))
def test_a_wrong_kernel_loses_parity(name, monkeypatch):
    """Another noise than the contract's is an error of order one, for every operator."""
    workload = next(w for w in workloads(800, torch.float32, CPU) if w.name == name)
    arguments = workload.make(0)
    assert workload.error(arguments) < 2e-5
    monkeypatch.setattr("bench.kernels.SEED", 8)
    assert workload.error(arguments) > 1e-3


def test_a_nan_in_any_chunk_loses_parity(monkeypatch):
    own = kernels.q_sample

    def broken(*arguments):
        x_t, noise = own(*arguments)
        x_t[0, 0, 0, 0] = torch.nan
        return x_t, noise

    monkeypatch.setattr(kernels, "q_sample", broken)
    monkeypatch.setattr("bench.kernels.CHUNK_ROWS", 1)
    one = next(w for w in workloads(3 * 768, torch.float32, CPU) if w.name == "q_sample")
    _, record = measure(Workload("one", "kernels", lambda device: bench_of(one, device)), CPU, 1, 1.0, 1.0)
    assert not record["parity"]
    assert "speed_up" not in record


# --- records and processes --------------------------------------------------------------------------------------


def test_only_what_reached_its_end_has_passed(tmp_path):
    record = Record(tmp_path, "step").start(CPU, "batch1")
    assert stored(tmp_path, "step")["filter"] == "batch1"
    assert stored(tmp_path, "step")["seed"] is None
    assert verdict(stored(tmp_path, "step")) == (FAILED, "did not reach its end")
    record.skip("peer", "not here")
    record.keep(complete=True, seed=7)
    assert stored(tmp_path, "step")["seed"] == 7
    assert verdict(stored(tmp_path, "step")) == (SKIPPED, "peer: not here")
    record.keep({"workload": "a"})
    assert verdict(stored(tmp_path, "step")) == (PASSED, "peer: not here")
    record.keep({"workload": "b", "failed": "crash"})
    record.fail("this")
    assert verdict(stored(tmp_path, "step")) == (FAILED, "this; 1 records failed")
    assert Record(tmp_path, "step").read().content == record.content


def test_a_command_is_stopped_with_all_that_it_started(tmp_path):
    child = tmp_path / "child"
    done = command.run(["bash", "-c", f"echo begun; sleep 987 & echo $! > '{child}'; wait"], 0.5)
    assert done.code is None
    assert done.lines == ["begun"]
    assert done.ending().startswith("stopped after")
    assert waited(lambda: not alive(int(child.read_text())), 5)


def test_a_command_that_ends_says_how():
    done = command.run(["bash", "-c", "echo out; echo $WORD >&2; exit 3"], 10, {"WORD": "err"})
    assert (done.code, done.lines) == (3, ["out", "err"])
    assert done.ending() == "exit code 3: err"


# --- the command ------------------------------------------------------------------------------------------------


def planted(name, finish=True, error=None):
    def run(record, seconds):
        record.keep({"workload": name})
        if error is not None:
            raise error
        record.keep(complete=finish)

    return 1.0, run


@pytest.fixture
def parts(monkeypatch):
    made = {
        "good": planted("good"),
        "crashes": planted("crashes", error=RuntimeError("planted\ncrash")),
        "ends": planted("ends", finish=False),
    }
    monkeypatch.setattr(command, "PARTS", made)
    return made


def test_every_part_runs_and_the_bad_ones_are_said(parts, tmp_path, capsys):
    assert command.run_parts(tmp_path, list(parts), 60, CPU) == 1
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("error")]
    assert errors == ["error: crashes: RuntimeError: planted crash", "error: ends: did not reach its end"]
    assert all(printed.out.split().count(name) >= 2 for name in parts)  # in its table and with its verdict
    assert all(stored(tmp_path, name)["records"] == [{"workload": name}] for name in parts)


def test_a_good_part_alone_is_exit_code_0(parts, tmp_path, capsys):
    assert command.run_parts(tmp_path, ["good"], 60, CPU) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["good.json"]
    assert "error" not in capsys.readouterr().err


def test_without_time_nothing_is_begun_and_old_records_are_gone(parts, tmp_path, capsys):
    assert command.run_parts(tmp_path, ["good"], 60, CPU) == 0
    assert command.run_parts(tmp_path, ["good"], 0, CPU) == 1
    assert stored(tmp_path, "good")["records"] == []
    assert "error: good: out of time before it began" in capsys.readouterr().err


def test_time_that_is_left_over_goes_to_the_next_part(monkeypatch, tmp_path):
    given = {}

    def keeping(name, takes):
        def run(record, seconds):
            given[name] = seconds
            time.sleep(takes)

        return 2.0 if name == "b" else 1.0, run

    names = {"a": 0.0, "b": 0.3, "c": 0.0}
    monkeypatch.setattr(command, "PARTS", {name: keeping(name, takes) for name, takes in names.items()})
    command.run_parts(tmp_path, list(names), 8, CPU)
    assert given == pytest.approx({"a": 2, "b": 6, "c": 7.7}, abs=0.25)


def test_a_table_has_what_the_records_have(capsys):
    command.show({"suite": "tests", "records": [{"run": "pytest", "exit": 0, "seconds": 1.25, "output": ["a line"]}]})
    title, heading, _, row = (line.split() for line in capsys.readouterr().out.splitlines() if line.strip())
    assert (title, heading, row) == (["tests"], ["run", "exit", "seconds"], ["pytest", "0", "1.25"])
    command.show({"suite": "tests", "records": []})


def test_every_measuring_part_is_a_function_of_the_process():
    children = {name for name, (_, run) in command.PARTS.items() if run is command.in_child}
    assert set(measured.MEASURED) == children


def test_a_process_that_dies_is_a_failure_of_its_part(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "run", lambda line, seconds: command.Finished(-11, 3.0, ["Segmentation"]))
    command.in_child(Record(tmp_path, "step").start(CPU), 1)
    assert verdict(stored(tmp_path, "step")) == (FAILED, "its process: exit code -11: Segmentation")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_measuring_part_really_is_another_process(tmp_path):
    command.in_child(Record(tmp_path, "kernels").start(CPU), 60)
    status, why = verdict(stored(tmp_path, "kernels"))
    assert status == FAILED
    assert why.startswith("its process: exit code 1")
    assert any("bench/gpu/measured.py" in line for line in stored(tmp_path, "kernels")["output"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "this PyTorch sees no CUDA device, needs one"),
        (["--parts", "tests,walk"], "got 'walk', needs some of tests, kernels, step, training, profile"),
        (["--filter", "("], "'(' is no regular expression"),
        (["--filter", "batch7"], "'batch7' matches none of: cuda/batch1/engines; "),
        (["--filter", "batch1", "--parts", "tests"], "'batch1' matches none of: nothing"),
        (["--budget", "-1"], "greater than or equal to 0"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys):
    assert main(["gpu", "--out", str(tmp_path / "new"), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "new").exists()


# --- the static prediction --------------------------------------------------------------------------------------


def measured_as(kernel, label="fp32"):
    return {"workload": f"kernels/{kernel}/{label}/1e6", "candidate": "operator", "parity": True, "kernel_us": 8.0}


@pytest.mark.parametrize("kernel", sorted(OPERATORS | {"convolution two sources"}))
def test_every_operator_has_a_prediction_for_the_h200(kernel):
    records = json.loads(BASELINE.read_text())["records"]
    for label in ("bf16",) if kernel.startswith("convolution") else ("fp32", "bf16"):
        line = measured_as(kernel, label)
        found = predictor("NVIDIA H200", {line["workload"]: 2_000_000})(line)
        record = next(r for r in records if (r["kernel"], r["arch"]) == (found["static"], "sm_90"))
        issue = record["instructions_per_element"] * 2e6 / (132 * 4 * 32 * 1.98e9)
        moved = record["bytes_per_element"] * 2e6 / 4800e9
        assert found["predicted_us"] == pytest.approx(1e6 * max(issue, moved))
        assert found["predicted_share"] == pytest.approx(found["predicted_us"] / 8)


def test_what_the_static_report_has_not_is_not_predicted():
    line = measured_as("solver_step")
    assert predictor("NVIDIA H200", {line["workload"]: 1000})(line)
    assert predictor("NVIDIA GH200 480GB", {line["workload"]: 1000})(line) == {}
    assert predictor("NVIDIA H200", {line["workload"]: 1000})(line | {"candidate": "eager"}) == {}
    assert predictor("NVIDIA H200", {line["workload"]: 1000})(line | {"parity": False}) == {}
    assert predictor("NVIDIA H200", {})(measured_as("another")) == {}
