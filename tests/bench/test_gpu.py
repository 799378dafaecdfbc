"""`ddpm-bench gpu` at tiny sizes, interpreted or faked on the CPU, so that it cannot rot while no GPU is at hand."""

import json
import time

import pytest
import torch

import kernels
from bench.cli import main
from bench.gpu import command, process
from bench.gpu import kernels as part
from bench.gpu.kernels import beside_static, predictions, run_kernels, table
from bench.gpu.record import FAILED, PASSED, SKIPPED, Record, verdict
from bench.kernels import Workload, measure, workloads

CPU = torch.device("cpu")
NOISE = {"q_sample", "q_sample_rows", "noise_mse", "noise_mse_backward", "solver_step"}
NETWORK = {"group_norm_relu", "bottleneck"}
OPERATORS = NOISE | NETWORK


@pytest.fixture
def elementwise(monkeypatch):
    """Without the convolutions, which the interpreter takes minutes for; tests/kernels has them."""

    def few(*arguments):
        return [workload for workload in workloads(*arguments) if workload.name in OPERATORS]

    monkeypatch.setattr(part, "workloads", few)


def stored(out, name):
    return json.loads((out / f"{name}.json").read_text())


# --- kernels ----------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_kernel_benchmark_runs_and_records(triton_device, elementwise, tmp_path):
    sizes, types = (800,), (torch.float32, torch.float16)
    content = run_kernels(tmp_path, triton_device, 600, sizes, types, rounds=1)
    assert stored(tmp_path, "kernels") == content
    assert content["machine"]["torch"] == torch.__version__
    assert verdict(content)[0] == PASSED
    records = content["records"]
    assert {record["kernel"] for record in records} == OPERATORS
    assert len(records) == len(OPERATORS) * len(sizes) * len(types)
    for record in records:
        assert record["parity"]
        assert len(record["kernel_us"]["samples"]) == 1
        assert record["ratio_to_eager"] > 0
        assert record["share_of_bound"] == record["share_of_copy"]  # no card, so the copy is all there is
    assert len(table(content).splitlines()) == 2 + len(records)


def test_a_spent_budget_stops_and_is_recorded_as_incomplete(triton_device, tmp_path):
    content = run_kernels(tmp_path, triton_device, -1, (800,), (torch.float32,), rounds=1)
    assert content["records"] == []
    assert not content["complete"]
    assert verdict(content) == (FAILED, "out of time in case 1 of 1")


def test_a_kernel_that_crashes_leaves_the_others(elementwise, tmp_path, monkeypatch):
    own = measure

    def crashing(workload, *arguments):
        if workload.name == "solver_step":
            raise RuntimeError("planted\ncrash")
        return own(workload, *arguments)

    monkeypatch.setattr(part, "measure", crashing)
    content = run_kernels(tmp_path, CPU, 600, (800,), (torch.float32,), rounds=1)
    assert content["complete"]
    assert verdict(content) == (FAILED, "1 records failed")
    assert {record["kernel"] for record in content["records"]} == OPERATORS
    assert "failed: RuntimeError: planted crash" in table(content)


def test_a_kernel_without_parity_gets_no_ratio(tmp_path):
    good = workloads(800, torch.float32, CPU)[0]

    class Bad(Workload):
        def error(self, arguments):
            return 1.0

    bad = Bad(**vars(good))
    measured = measure(bad, CPU, rounds=1)
    assert not measured["parity"]
    record = Record.start(tmp_path, "kernels", 1, CPU)
    record.add({"size": 800} | beside_static(measured, torch.float32, {}))
    record.finish()
    assert "ratio_to_eager" not in record.content["records"][0]
    assert verdict(record.content) == (FAILED, "1 records lost parity")
    assert "parity failed: 1 > 2e-05, no ratio" in table(record.content)


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
    workload = next(w for w in workloads(3 * 768, torch.float32, CPU) if w.name == "q_sample")
    record = measure(workload, CPU, rounds=1)
    assert not record["parity"]
    assert "ratio_to_eager" not in record


# --- the static prediction --------------------------------------------------------------------------------------

MEASURED = {"parity": True, "elements": 2_000_000, "kernel_us": {"median": 8.0}, "copy_us": {"median": 4.0}}


@pytest.mark.parametrize("kernel", sorted(OPERATORS))
def test_every_operator_has_a_prediction_for_the_h200(kernel):
    known = predictions("sm_90", "NVIDIA H200")
    for dtype in (torch.float32, torch.bfloat16):
        record = beside_static(MEASURED | {"kernel": kernel}, dtype, known)
        card = known[record["static"]]
        predicted = 2 * max(value for key, value in card.items() if key.endswith("_us"))
        assert record["predicted_us"] == pytest.approx(predicted)
        assert record["prediction_error"] == pytest.approx(predicted / 8 - 1)
        assert record["bound_us"] == max(4.0, 2 * card["issue_us"])


def test_the_larger_of_copy_and_issue_is_the_bound():
    card = {"solver_step fp32": {"issue_us": 3.0, "bytes_us": 2.5, "binds": "issue"}}
    record = beside_static(MEASURED | {"kernel": "solver_step"}, torch.float32, card)
    assert record["share_of_bound"] == 6 / 8
    record = beside_static(MEASURED | {"kernel": "another"}, torch.float32, card)
    assert record["share_of_bound"] == 4 / 8
    assert record["static"] is None
    variant = {"convolution bf16 two sources": card["solver_step fp32"]}
    record = beside_static(MEASURED | {"kernel": "convolution two sources"}, torch.bfloat16, variant)
    assert record["predicted_us"] == 6


def test_another_card_has_no_prediction():
    assert predictions("sm_90", "NVIDIA GH200 480GB") == {}
    assert predictions("sm_70", "NVIDIA H200") == {}


def test_what_misses_a_goal_is_marked():
    record = {"kernel": "q_sample", "dtype": "float32", "parity": True, "prediction_error": -0.25}
    records = [
        record | {"size": 10**4, "share_of_bound": 0.5, "ratio_to_eager": 2.9},
        record | {"size": 10**8, "share_of_bound": 0.85, "ratio_to_eager": 3.0},
    ]
    records.append(records[0] | {"kernel": "convolution", "dtype": "float16"})
    other, row = (line.split() for line in table({"records": records}).splitlines()[-2:])
    assert row == ["q_sample", "float32", "50%!", "85%", "|", "2.90!", "3.00", "|", "-25%"]
    assert other == ["convolution", "float16", "50%", "-", "|", "2.90", "-", "|", "-"]


# --- records and processes --------------------------------------------------------------------------------------


def test_a_record_says_the_seed_of_its_part(tmp_path):
    assert Record.start(tmp_path, "step", 5, CPU, seed=7).content["seed"] == 7
    assert Record.start(tmp_path, "tests", 5, CPU).content["seed"] is None


def test_only_what_reached_its_end_has_passed(tmp_path):
    record = Record.start(tmp_path, "step", 5, CPU)
    assert verdict(stored(tmp_path, "step")) == (FAILED, "did not reach its end")
    record.skip("peer", "not here")
    record.finish()
    assert verdict(stored(tmp_path, "step")) == (SKIPPED, "peer: not here")
    record.add({"workload": "a"})
    assert verdict(stored(tmp_path, "step")) == (PASSED, "peer: not here")
    record.add({"workload": "b", "failed": "crash"})
    record.fail("this")
    assert verdict(stored(tmp_path, "step")) == (FAILED, "this; 1 records failed")


def test_a_command_is_stopped_with_all_that_it_started(tmp_path):
    mark = tmp_path / "still there"
    done = process.run(["bash", "-c", f"echo begun; (sleep 2; touch '{mark}') & wait"], 0.5)
    assert done.code is None
    assert done.output == "begun\n"
    assert done.ending().startswith("stopped after")
    time.sleep(2)
    assert not mark.exists()


def test_a_command_that_ends_says_how():
    done = process.run(["bash", "-c", "echo out; echo $WORD >&2; exit 3"], 10, {"WORD": "err"})
    assert (done.code, done.output) == (3, "out\nerr\n")
    assert done.ending() == "exit code 3: err"


# --- the command ------------------------------------------------------------------------------------------------


def planted(name, finish=True, error=None):
    def run(out, device, seconds, pattern):
        record = Record.start(out, name, seconds, device, pattern)
        record.add({"workload": name})
        if error is not None:
            raise error
        if finish:
            record.finish()

    return command.Part(1.0, run, lambda content: f"table of {name}")


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
    assert all(f"table of {name}" in printed.out for name in parts)
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
        def run(out, device, seconds, pattern):
            given[name] = seconds
            time.sleep(takes)

        return command.Part(2.0 if name == "b" else 1.0, run, lambda content: "")

    names = {"a": 0.0, "b": 0.3, "c": 0.0}
    monkeypatch.setattr(command, "PARTS", {name: keeping(name, takes) for name, takes in names.items()})
    command.run_parts(tmp_path, list(names), 8, CPU)
    assert given == pytest.approx({"a": 2, "b": 6, "c": 7.7}, abs=0.25)


def test_a_part_that_measured_nothing_has_a_table_all_the_same(tmp_path):
    for name, one in command.PARTS.items():
        assert isinstance(one.table(Record.start(tmp_path, name, 1, CPU).content), str)
    assert set(command.CHILDREN) < set(command.PARTS)


def test_the_goals_are_shown_where_steps_were_measured(tmp_path):
    contents = {"step": Record.start(tmp_path, "step", 1, CPU, trajectories={}).content}
    lines = command.goals_table(contents).splitlines()
    assert lines[1] == "== goals"
    assert "cuda/batch1 " in lines[3]
    assert command.goals_table({"tests": contents["step"]}) == ""


def test_a_process_that_dies_is_a_failure_of_its_part(tmp_path, monkeypatch):
    monkeypatch.setattr(command.process, "run", lambda line, seconds: process.Finished(-11, 3.0, "Segmentation\n"))
    Record.start(tmp_path, "step", 1, CPU)
    command.in_child("step", tmp_path, 1)
    assert verdict(stored(tmp_path, "step")) == (FAILED, "its process: exit code -11: Segmentation")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_measuring_part_really_is_another_process(tmp_path):
    Record.start(tmp_path, "kernels", 60, CPU)
    command.in_child("kernels", tmp_path, 60)
    status, why = verdict(stored(tmp_path, "kernels"))
    assert status == FAILED
    assert why.startswith("its process: exit code 1")
    assert any("bench/gpu/kernels.py" in line for line in stored(tmp_path, "kernels")["output"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "this PyTorch sees no CUDA device, needs one"),
        (["--parts", "tests,walk"], "got 'walk', needs some of tests, sanitizer, kernels, step, training, profile"),
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
