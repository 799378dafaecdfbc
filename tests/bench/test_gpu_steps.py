"""Parts `step` and `training` of `ddpm-bench gpu`, on two images on the CPU."""

import json
import time

import pytest
import torch

from bench.gpu import measured
from bench.gpu.command import FAILED, PASSED, Record, show, verdict
from bench.gpu.measured import OUT_OF_TIME
from bench.kernels import full_precision
from bench.registry import Unavailable
from bench.suites import cuda, networks, training
from ddpm.engines import ENGINES, Engine, FusedEngine
from ddpm.inference import KERNELS
from ddpm.precision import computed_in

CPU = torch.device("cpu")
TINY = cuda.Row("tiny", 2, steps=3)
GUIDED = cuda.Row("guided", 2, guidance=2.0, steps=3)


@pytest.fixture(autouse=True)
def one_round(monkeypatch):
    monkeypatch.setattr(measured, "ROUNDS", 1)


def run_step(out, seconds=600, pattern="engines"):
    record = Record(out, "step").start(CPU, pattern)
    measured.step(record, CPU, time.time() + seconds, (TINY,))
    assert json.loads((out / "step.json").read_text()) == record.content
    return record.content


@pytest.fixture
def compiled(monkeypatch):
    """torch.compile without its compiler: traces the step whole."""
    monkeypatch.setattr(cuda, "compiled", lambda step: torch.compile(step, backend="eager", fullgraph=True))


def candidates(row, kind):
    return cuda._build(row, kind, CPU).candidates


def test_the_step_part_measures(tmp_path, capsys):
    content = run_step(tmp_path)
    assert content["tf32"] is False
    assert content["seed"] == cuda.SEED
    assert verdict(content) == (PASSED, "")
    by_name = {record["candidate"]: record for record in content["records"]}
    assert {"eager", "fused fp32", "fused bf16", "eager tf32"} <= by_name.keys()
    assert all(record["parity"] and record["kernel_us"] > 0 for record in by_name.values())
    show(content)
    shown = capsys.readouterr().out
    assert all(shown.count(name) for name in by_name)


@pytest.mark.long
def test_lost_parity_fails_the_part_and_has_no_time(tmp_path, monkeypatch):
    monkeypatch.setitem(networks.PARITY, torch.bfloat16, 1e-9)
    content = run_step(tmp_path)
    lost = next(record for record in content["records"] if record["candidate"] == "fused bf16")
    assert not lost["parity"]
    assert "kernel_us" not in lost
    assert verdict(content) == (FAILED, "1 records lost parity")


def test_without_time_everything_is_named_as_not_measured(tmp_path, capsys):
    content = run_step(tmp_path, 0, "")
    names = {f"cuda/tiny/{kind}" for kind in ("engines", "autotune-bf16", "autotune-fp32")}
    assert content["skipped"] == dict.fromkeys(names, OUT_OF_TIME)
    assert content["records"] == []
    assert not content["complete"]
    assert verdict(content) == (FAILED, "out of time: 3 workloads not measured")
    assert f"note: step: cuda/tiny/engines skipped, {OUT_OF_TIME}" in capsys.readouterr().err


def test_a_workload_that_would_take_too_long_is_not_begun(tmp_path, monkeypatch):
    """What a workload took is expected of the next one of its kind; the first has a guess. By a clock of the test's."""
    seconds = {"a/quick": 2.0, "b/quick": 2.0, "c/quick": 2.0, "d/short": 0.0, "e/engines": 0.0}
    begun, clock = [], [100.0]
    monkeypatch.setattr(measured, "time", lambda: clock[0])
    monkeypatch.setattr(measured, "matrix_ceiling", lambda device: 1.0)

    def building(name):
        def build(device):
            begun.append(name)
            clock[0] += seconds[name]
            raise RuntimeError("no more is needed")

        return measured.Workload(name, "kernels", build)

    record = Record(tmp_path, "step").start(CPU)
    measured.measure_all(record, [building("e/engines")], CPU, clock[0] + measured.TAKES["engines"] - 1, 7)
    assert begun == []
    slow = [building(name) for name in seconds]
    measured.measure_all(record, slow, CPU, clock[0] + 3, 7)
    assert begun == ["a/quick", "d/short"]
    assert record.content["failures"] == [
        "out of time: 1 workloads not measured",
        "out of time: 3 workloads not measured",
    ]


@pytest.mark.long
@pytest.mark.parametrize("row", [TINY, GUIDED], ids=["plain", "guided"])
def test_what_users_would_compile_draws_eager_s_pictures(compiled, row):
    candidate = candidates(row, "fp32")["max-autotune fp32"]
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    call = candidate.make()
    assert candidate.error(call) <= candidate.tolerance
    assert candidate.error(lambda: call() * 1.001) > candidate.tolerance
    # Strides or steps that compile anew would take minutes each.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1


@pytest.mark.long
def test_it_does_so_in_bf16(compiled):
    candidate = candidates(TINY, "bf16")["max-autotune bf16"]
    assert 1e-6 < candidate.error(candidate.make()) <= candidate.tolerance


def test_only_one_candidate_convolves_in_tf32(monkeypatch):
    seen = {}

    class Looking(Engine):
        def __init__(self, *arguments):
            pass

        def __call__(self, x, *arguments):
            seen["now"] = torch.backends.cudnn.allow_tf32
            return x

    for name in ("eager", "fused"):
        monkeypatch.setitem(ENGINES, name, Looking)
    with full_precision():
        for name, candidate in candidates(TINY, "engines").items():
            candidate.make()()
            assert seen["now"] == (name == "eager tf32")
            assert torch.backends.cudnn.allow_tf32 is False
        cuda._build(TINY, "engines", CPU).reference()
        assert seen["now"] is False


def test_chunks_change_no_picture():
    whole, split = (cuda.trajectory(TINY, "fused", torch.float32, CPU, chunk)() for chunk in (None, 1))
    torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-4)


def test_the_suite_s_rows_and_their_order(monkeypatch):
    names = [workload.name for workload in cuda.workloads(False, CPU)]
    assert names[0] == "cuda/batch1/engines"
    assert len(names) == 3 * len(cuda.ROWS)
    assert [name.rsplit("/", 1)[1] for name in names[:: len(cuda.ROWS)]] == [
        "engines",
        "autotune-bf16",
        "autotune-fp32",
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Unavailable, match="suite cuda: needs a CUDA device"):
        cuda.workloads(False)


def test_on_cuda_all_engines_and_types_compete(monkeypatch):
    monkeypatch.setattr(cuda, "unavailable_reason", lambda engine, device: None)
    expected = {f"{engine} {kind}" for engine in ("graph", "fused") for kind in ("fp32", "bf16")}
    expected |= {"graph fp16", "kernels bf16", "kernels fp16", "eager tf32"}
    assert candidates(TINY, "engines").keys() == expected
    assert list(candidates(TINY, "bf16")) == ["graph bf16", "kernels bf16", "max-autotune bf16", "compile bf16"]
    assert list(candidates(TINY, "fp32")) == ["graph fp32", "max-autotune fp32", "compile fp32"]
    assert "graph bf16 1 at a time" not in candidates(TINY, "engines")
    monkeypatch.setattr(cuda, "CHUNK", 1)
    assert "graph bf16 1 at a time" in candidates(TINY, "engines")


def test_kernels_is_the_graph_engine_on_the_form_of_kernels(monkeypatch):
    forms = []

    class Graph(FusedEngine):
        """In its place on a CPU, where the form's convolutions are their references."""

        def __call__(self, *arguments):
            forms.append(self.form)
            return super().__call__(*arguments)

    monkeypatch.setattr(cuda, "unavailable_reason", lambda engine, device: None)
    monkeypatch.setitem(ENGINES, "graph", Graph)
    candidate = candidates(GUIDED, "engines")["kernels bf16"]
    assert 0 < candidate.error(candidate.make()) <= candidate.tolerance
    assert {(form.layout, form.dtype) for form in forms} == {(KERNELS, computed_in(torch.bfloat16, CPU))}


# --- training ---------------------------------------------------------------------------------------------------


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(training, "STEPS_AHEAD", 1)
    monkeypatch.setattr(training, "N_FEAT", 8)


def test_the_training_part_measures(few_steps, tmp_path):
    record = Record(tmp_path, "training").start(CPU, "engines")
    measured.train(record, CPU, time.time() + 600, batch=4)
    content = record.content
    assert [record["candidate"] for record in content["records"]] == ["eager", "eager bf16"]
    assert content["seed"] == training.SEED
    assert verdict(content) == (PASSED, "")
    assert json.loads((tmp_path / "training.json").read_text()) == content


@pytest.mark.long
def test_the_loop_with_a_compiled_network_loses_as_eager(few_steps, monkeypatch):
    made = []
    compiling = torch.compile

    def compile_eagerly(module, **options):
        made.append(options["mode"])
        return compiling(module, backend="eager")

    monkeypatch.setattr(training.torch, "compile", compile_eagerly)
    bench = training._build(4, ("max-autotune fp32", "graph fp32"), training.STEPS_AHEAD, CPU)
    assert list(bench.candidates) == ["max-autotune fp32"]  # there is no graph on the CPU
    candidate = bench.candidates["max-autotune fp32"]
    call = candidate.make()
    call()
    assert candidate.error(call) <= candidate.tolerance
    assert made == ["max-autotune"]
    call.trainer.losses[0] *= 1.01
    assert candidate.error(call) > candidate.tolerance
