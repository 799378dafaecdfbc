"""Parts `step`, `training` and the goals of `ddpm-bench gpu`, on two images on the CPU."""

import json

import pytest
import torch

from bench.goals import GPU_HEADINGS, gpu_cells
from bench.gpu import steps
from bench.gpu.record import FAILED, PASSED, verdict
from bench.gpu.steps import OUT_OF_TIME, Clock, run_step, run_training, table
from bench.kernels import full_precision
from bench.registry import Unavailable
from bench.suites import cuda, training
from ddpm.engines import ENGINES, Engine, FusedEngine
from ddpm.inference import KERNELS
from ddpm.precision import computed_in

CPU = torch.device("cpu")
TINY = cuda.Row("tiny", 2, steps=3)
GUIDED = cuda.Row("guided", 2, guidance=2.0, steps=3)


@pytest.fixture(autouse=True)
def one_round(monkeypatch):
    monkeypatch.setattr(steps, "ROUNDS", 1)


@pytest.fixture
def compiled(monkeypatch):
    """torch.compile without its compiler: traces the step whole."""
    monkeypatch.setattr(cuda, "compiled", lambda step: torch.compile(step, backend="eager", fullgraph=True))


def candidates(row, kind):
    return cuda._build(row, kind, CPU).candidates


def test_the_step_part_measures_and_says_what_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(steps, "find_spec", lambda name: None)
    content = run_step(tmp_path, CPU, 600, "engines", (TINY,))
    assert json.loads((tmp_path / "step.json").read_text()) == content
    assert content["tf32"] is False
    assert content["seed"] == cuda.SEED
    assert content["skipped"] == dict.fromkeys(steps.PEERS, "it is not installed here")
    assert "note: step: diffusers skipped" in capsys.readouterr().err
    assert verdict(content)[0] == PASSED
    by_name = {record["candidate"]: record for record in content["records"]}
    assert {"eager", "fused fp32", "fused bf16", "eager tf32"} <= by_name.keys()
    assert all(record["parity"] and record["kernel_us"] > 0 for record in by_name.values())
    assert len(table(content).splitlines()) == 1 + len(by_name)


def test_lost_parity_fails_the_part_and_has_no_time(tmp_path, monkeypatch):
    monkeypatch.setitem(cuda.PARITY, torch.bfloat16, 1e-9)
    content = run_step(tmp_path, CPU, 600, "engines", (TINY,))
    lost = next(record for record in content["records"] if record["candidate"] == "fused bf16")
    assert not lost["parity"]
    assert "kernel_us" not in lost
    assert verdict(content) == (FAILED, "1 records lost parity")
    assert "parity lost" in table(content)


def test_without_time_everything_is_named_as_not_measured(tmp_path):
    content = run_step(tmp_path, CPU, 0, "", (TINY,))
    names = {f"cuda/tiny/{kind}" for kind in ("engines", "autotune-bf16", "autotune-fp32")}
    assert {what for what, why in content["skipped"].items() if why == OUT_OF_TIME} == names
    assert content["records"] == []
    assert not content["complete"]
    assert verdict(content) == (FAILED, "out of time: 3 workloads or candidates not measured")
    assert "not measured, out of time: cuda/tiny/engines" in table(content)


@pytest.mark.long
def test_a_candidate_that_would_take_too_long_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setitem(steps.BUILD_SECONDS, "fused", 1e6)
    content = run_step(tmp_path, CPU, 600, "engines", (TINY,))
    assert content["skipped"]["cuda/tiny/engines fused fp32"] == OUT_OF_TIME
    assert {record["candidate"] for record in content["records"]} == {"eager", "eager tf32"}
    assert not content["complete"]


def test_the_clock_learns_what_building_takes():
    clock = Clock(1000, {"max-autotune": 90.0})
    assert clock.has("max-autotune bf16")
    clock.learn([{"candidate": "max-autotune fp32", "warm_up_s": 2000.0}, {"candidate": "graph bf16", "failed": "x"}])
    assert not clock.has("max-autotune bf16")
    assert clock.has("graph bf16")


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
    whole, split = (cuda.trajectory(TINY, "fused", torch.float32, CPU, 3, chunk)() for chunk in (None, 1))
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


@pytest.mark.long
def test_whole_trajectories_are_timed_where_there_is_parity(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "TRAJECTORIES", [("fused", "fp32"), ("fused", "bf16")])
    monkeypatch.setattr(steps, "TIMESTEPS", 4)
    monkeypatch.setitem(cuda.PARITY, torch.bfloat16, 1e-9)
    content = run_step(tmp_path, CPU, 600, "engines", (TINY,))
    (name,) = content["trajectories"]
    assert name == "cuda/tiny fused fp32"
    assert content["trajectories"][name]["steps"] == 4
    assert content["trajectories"][name]["wall_ms"]["median"] > 4
    assert "cuda/tiny fused fp32, 4 steps:" in table(content)


# --- training ---------------------------------------------------------------------------------------------------


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(training, "STEPS_AHEAD", 1)
    monkeypatch.setattr(training, "N_FEAT", 8)


def test_the_training_part_measures(few_steps, tmp_path):
    content = run_training(tmp_path, CPU, 600, "engines", batch=4)
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


# --- goals ------------------------------------------------------------------------------------------------------


def record(workload, candidate, kernel_us, speed_up=None, **more):
    head = {"workload": workload, "candidate": candidate, "parity": True, "share_of_product": 0.4}
    return head | {"kernel_us": kernel_us, "speed_up": speed_up} | more


RECORDS = [
    record("cuda/batch1/engines", "eager", 2000.0),
    record("cuda/batch1/engines", "graph bf16", 80.0, 25.0),
    record("cuda/batch1/engines", "graph fp16", 78.0, 25.6, parity=False),
    record("cuda/batch1/engines", "eager tf32", 1600.0, 1.25),
    record("cuda/batch1/autotune-bf16", "graph bf16", 82.0, 24.0),
    record("cuda/batch1/autotune-bf16", "max-autotune bf16", 123.0, 16.0),
    record("cuda/batch1/autotune-fp32", "graph fp32", 100.0, 20.0),
    record("cuda/batch1/autotune-fp32", "max-autotune fp32", 400.0, 5.0),
    record("cuda/batch1024/engines", "graph bf16", 900.0, 5.0),
    record("cuda/batch64/engines", "graph bf16", 1.0, failed="crash"),
]


def test_goals_are_judged_by_what_was_measured():
    trajectories = {
        "cuda/batch1 graph bf16": {"wall_ms": {"median": 44.0}},
        "cuda/batch1 graph fp16": {"wall_ms": {"median": 46.0}},
        "cuda/batch1024 graph bf16": {"wall_ms": {"median": 500.0}},
    }
    cells = gpu_cells(RECORDS, trajectories)
    assert all(len(row) == len(GPU_HEADINGS) for row in cells)
    rows = {(row[0], row[1]): row[2:] for row in cells}
    assert rows["cuda/batch1", "x eager fp32"] == ["25x", "graph bf16", "20x", "yes"]
    # Not 4, of fp32: max-autotune is faster in bf16. The times of one workload are compared, 123 / 82.
    assert rows["cuda/batch1", "x max-autotune"] == ["1.5x", "graph bf16", "2x", "**no**"]
    assert rows["cuda/batch1", "x eager tf32"] == ["20x", "graph bf16", "", ""]
    assert ("cuda/batch1024", "x eager tf32") not in rows
    assert rows["cuda/batch1", "ms of 500 steps"] == ["44 ms", "graph bf16", "45 ms", "yes"]
    assert rows["cuda/batch1024", "of the measured matrix rate"] == ["40%", "graph bf16", "50%", "**no**"]
    assert rows["cuda/batch64", "x eager fp32"] == ["not measured", "", "20x", ""]
    assert rows["training/batch100", "x max-autotune"] == ["not measured", "", "1.5x", ""]


def test_goals_of_what_is_not_there_are_not_reached():
    assert {row[-1] for row in gpu_cells([], {})} == {""}
