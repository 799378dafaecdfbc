"""Suites of our engines, without a compiler: what a call includes, what is left out, and that a NaN never passes."""

import subprocess
import sys

import pytest
import torch

from bench.children import environment
from bench.machine import ROOT
from bench.registry import selected
from bench.run import run_here
from bench.suites import cuda, ladder, networks, sampling, step
from ddpm import ContextUnet, PointMLP, Unet, make_table
from ddpm.inference import ContextUnetForm, Layout

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_engines(monkeypatch):
    for suite in (step, sampling, networks):
        monkeypatch.setattr(suite, "competitors", lambda *where, **of: ["fused"])


@pytest.fixture
def forms(monkeypatch):
    """The forms that are made."""
    made, own = [], ContextUnetForm.__init__

    def making(self, *arguments, **options):
        made.append(self)
        own(self, *arguments, **options)

    monkeypatch.setattr(ContextUnetForm, "__init__", making)
    return made


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_step_is_timed_with_its_engine_prepared(forms, guidance):
    bench = step._build(2, torch.float32, guidance, CPU)
    assert bench.calls == step.STEPS == 10
    candidate = bench.candidates["fused"]
    assert forms == []
    call = candidate.make()
    assert len(forms) == 1
    assert candidate.error(call) <= candidate.tolerance
    assert torch.equal(call(), call())
    assert len(forms) == 1
    assert candidate.error(lambda: call() * 1.001) > candidate.tolerance
    assert not candidate.error(lambda: call().index_fill(0, torch.tensor(1), torch.nan)) <= candidate.tolerance


def test_a_short_run_is_measured_whole(monkeypatch):
    for quick in (True, False):
        names = {workload.name: workload for workload in sampling.workloads(quick)}
        assert "sampling/short/ddim4/n1" in names
    seen = []
    own = sampling.sample

    def sample(*arguments, **options):
        seen.append((arguments[2], options))
        return own(*arguments, **options)

    monkeypatch.setattr(sampling, "sample", sample)
    bench = names["sampling/short/ddim4/n1"].build(CPU)
    candidate = bench.candidates["fused"]
    assert candidate.error(candidate.make()) <= candidate.tolerance
    assert {n for n, _ in seen} == {1}
    assert {(options["solver"], options["steps"]) for _, options in seen} == {("ddim", 4)}
    assert [options["engine"] for _, options in seen] == ["fused", "eager"]


@pytest.mark.parametrize("way", sampling.WAYS)
def test_other_ways_of_sampling_are_measured_beside_eager(way):
    solver = {"corrected": "pc"}.get(way, "ddim")
    assert f"sampling/{way}/{solver}5/n8" in [workload.name for workload in sampling.workloads(True)]
    bench = sampling._build(way, 2, 2, CPU)
    candidate = bench.candidates["fused"]
    call = candidate.make()
    assert candidate.error(call) <= candidate.tolerance
    assert candidate.error(lambda: call() * 1.001) > candidate.tolerance
    plain = sampling._build("", 2, 2, CPU)
    factor = {"guided": 2, "img2img": 0.5, "corrected": 1.5, "oblong": 1.5}.get(way, 1)
    assert bench.cost.flops == pytest.approx(plain.cost.flops * factor, rel=0.01)  # of a side all but its embeddings
    assert not torch.equal(call(), plain.candidates["fused"].make()())


def test_the_cost_of_any_network_is_counted():
    points = PointMLP(2, 8)
    linear = sum(2 * module.weight.numel() for module in points.modules() if isinstance(module, torch.nn.Linear))
    assert networks.flops_of(points) == linear
    assert networks.flops_of(ContextUnet(1, 8, 0)) > 0  # without a condition
    assert networks.flops_of(networks.network(CPU)) / 1e9 == pytest.approx(0.301, abs=0.002)
    plain, guided, larger = (networks.sampling_cost(points, n, 5, w) for n, w in ((3, 1.0), (3, 2.0), (6, 2.0)))
    assert guided.flops == 2 * plain.flops == larger.flops / 2
    assert guided.bytes == plain.bytes == 5 * (4 * sum(p.numel() for p in points.parameters()) + 8 * 3 * 2)


def test_other_networks_are_measured_beside_their_own_eager(monkeypatch):
    names = [workload.name for workload in networks.workloads(quick=False)]
    found = [name for name in networks.OTHERS if name not in networks.unavailable()]
    assert names == [f"networks/{name}/ddim10/batch{n}" for name in found for n in (1, 8, 32)]
    monkeypatch.setattr(networks, "OTHERS", {"unet": None})
    monkeypatch.setitem(networks.OTHERS, "unet", lambda: Unet(4, dim_mults=(1, 2), attn_dim_head=4, image_size=8))
    (workload,) = networks.workloads(quick=True)
    bench = workload.build(CPU)
    candidate = bench.candidates["fused"]
    call = candidate.make()
    assert (bench.calls, tuple(call().shape)) == (2, (1, 3, 8, 8))
    assert candidate.error(call) <= candidate.tolerance
    assert not candidate.error(lambda: call() * torch.nan) <= candidate.tolerance


def test_networks_that_cannot_be_made_here_are_left_out_and_said(monkeypatch):
    monkeypatch.setattr(networks, "find_spec", lambda name: None)
    found, skipped = selected("networks", True, "")
    assert "unet2d" not in {work.name.split("/")[1] for work in found}
    needs = "diffusers is not installed, needs: pip install 'fused-ddpm[diffusers]'"
    assert skipped == {"unet2d": f"suite networks: {needs}"}


def test_the_time_of_the_step_that_users_compile_is_that_of_the_engines():
    row = cuda.Row("tiny", 1, steps=3)
    table = make_table(networks.SCHEDULE, "ddpm", 3)
    own = cuda.Step(row, table, torch.float32, CPU)
    assert own.times.tolist() == (table.timesteps.double() / networks.TIMESTEPS).float().tolist()


# --- the ladder -------------------------------------------------------------------------------------------------------


@pytest.fixture
def in_hardware(monkeypatch):
    """A CPU that computes bfloat16."""
    for module in ("ddpm.inference", "bench.suites.ladder"):
        monkeypatch.setattr(f"{module}.computed_in", lambda dtype, device: dtype)


@pytest.fixture
def few_rungs(monkeypatch, in_hardware):
    """Those that compile nothing, and the fused engine in bfloat16."""
    rungs = {name: how for name, how in ladder.RUNGS.items() if how["engine"] in ("eager", "fused")}
    rungs["bf16"] = {"engine": "fused", "dtype": torch.bfloat16}
    monkeypatch.setattr(ladder, "RUNGS", rungs)
    return rungs


def test_each_rung_adds_one_thing():
    model = networks.network(CPU)
    layouts = {name: how["form"](model, torch.float32).layout for name, how in ladder.RUNGS.items() if "form" in how}
    assert layouts == {
        "tables": Layout(channels_last=False, shared=False),  # winograd is but for channels_last
        "shared": Layout(channels_last=False),
        "channels_last": Layout(winograd=False),
    }
    assert list(ladder.RUNGS)[:5] == ["folded", *layouts, "winograd"]
    assert ladder.RUNGS["winograd"] == {"engine": "fused"}  # which has all of it


def test_every_rung_draws_what_eager_draws(few_rungs):
    bench = ladder._build(2, CPU)
    assert list(bench.candidates) == list(few_rungs)
    assert bench.calls == ladder.STEPS
    for name, candidate in bench.candidates.items():
        error = candidate.error(candidate.make())
        assert (1e-4 if name == "bf16" else 0) < error <= candidate.tolerance, name
        assert not candidate.error(lambda: bench.reference() * torch.nan) <= candidate.tolerance
    folded = bench.candidates["folded"].make().func
    assert folded.engine == "eager"
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.model.modules())


def test_what_a_machine_cannot_do_is_left_out_and_said(monkeypatch, few_rungs):
    monkeypatch.setattr(ladder, "computed_in", lambda dtype, device: torch.float32)
    monkeypatch.setattr(ladder, "missing", lambda: "a C++ compiler")
    monkeypatch.setitem(few_rungs, "graph", {"engine": "graph", "dtype": torch.bfloat16})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reasons = {"winograd": "a C++ compiler", "bf16": "a CPU with AVX512-BF16 or AMX", "graph": "a CUDA device"}
    found = ladder.unavailable()
    assert found.keys() == reasons.keys()
    assert all(found[name].startswith(f"suite ladder: {name} needs {reason}") for name, reason in reasons.items())
    assert ladder._build(2, CPU).candidates.keys() == few_rungs.keys() - reasons.keys()
    assert ladder._lack("winograd", torch.device("cuda")) == "a CPU"


@pytest.mark.long
def test_the_ladder_is_measured_as_other_suites_are(few_rungs, monkeypatch):
    monkeypatch.setattr(ladder, "QUICK_BATCH", 1)
    content = run_here("ladder", quick=True, pattern="", rounds=1, quiet=True)
    assert (content["parity"], content["failed"], content["seed"]) == (True, 0, networks.SEED)
    assert [record["candidate"] for record in content["records"]] == ["eager", *few_rungs]
    assert all(record["speed_up"] > 0 for record in content["records"][1:])


# --- memory -----------------------------------------------------------------------------------------------------------

# VmHWM, not ru_maxrss: the latter starts at what the parent held when it forked. One image first: libraries that an
# engine loads are not what a batch costs.
PEAK = """import sys
import torch
from pathlib import Path
from ddpm import ContextUnet, NoiseSchedule, sample

torch.manual_seed(0)
model, schedule = ContextUnet(3, 64, 5, 16).eval(), NoiseSchedule.make("linear", 20, 1e-4, 0.35)
context = torch.eye(5)[torch.arange(256) % 5]
options = {"steps": 2, "clip": 1.0, "engine": sys.argv[1], "guidance": float(sys.argv[2])}


def kibibytes(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))


sample(model, schedule, 1, context=context[:1], **options)
before = kibibytes("VmRSS:")
sample(model, schedule, 256, context=context, batch_size=256, **options)
print(kibibytes("VmHWM:") - before)
"""


def peak(engine, guidance):
    """KiB that a fresh process took at most for a batch of 256 images."""
    line, own = [sys.executable, "-c", PEAK, engine, str(guidance)], environment([ROOT], torch.get_num_threads())
    return int(subprocess.run(line, cwd=ROOT, env=own, capture_output=True, text=True, check=True).stdout)


@pytest.mark.long
@pytest.mark.alone
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_sampling_a_large_batch_holds_less_than_eager_does():
    """Peak memory at batch 256, in fresh processes, network of 64 features."""
    for guidance in (1.0, 2.0):
        # Processes differ by 15%, upwards; fused takes a fifth to a half less.
        eager, fused = (min(peak(engine, guidance) for _ in range(3)) for engine in ("eager", "fused"))
        assert fused < 0.9 * eager
