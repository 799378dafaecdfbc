"""`ddpm-bench ladder`: every rung is what it says, quality gates speed, and errors are one line."""

import copy
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from bench import ladder, store
from bench.cli import main
from bench.ladder import RUNGS, Job, Rung, workload
from bench.machine import ROOT
from bench.measure import EAGER, measure
from bench.run import environment
from bench.show import LADDER_HEADINGS, ladder_notes, ladder_plot, ladder_rows, ladder_table
from ddpm import ContextUnet, NoiseSchedule, load_run, make_table, sample
from ddpm.errors import WorkFailed
from ddpm.inference import Layout
from ddpm.metrics import distance
from ddpm.networks import PointMLP
from ddpm.runs import make_config, start_run

CPU = torch.device("cpu")
CLASSES = ("a", "b", "c")
FAST = ("folded", "tables", "shared", "channels_last", "winograd")


def _write(folder, network, classes=()):
    folder.mkdir()
    schedule = NoiseSchedule.make("linear", 20, 1e-4, 0.35)
    start_run(folder, make_config(network, schedule, "eps", classes=classes, sampling={"clip": 1.0}), network)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a small network with random weights and statistics: folding must have something to fold."""
    torch.manual_seed(0)
    network = ContextUnet(1, 8, len(CLASSES), 16)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.5, 0.5)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    return _write(tmp_path_factory.mktemp("ladder") / "run", network.eval(), CLASSES)


@pytest.fixture
def job(run):
    opened = load_run(run)
    return Job(opened, make_table(opened.schedule, **opened.options(steps=6)), 3, 2.0, CPU)


@pytest.fixture
def few_rungs(monkeypatch):
    """Without the compiled rungs, which take a minute; `bf16` is the fused engine in bfloat16, emulated or not."""
    for module in ("ddpm.inference.form", "bench.ladder"):
        monkeypatch.setattr(f"{module}.computed_in", lambda dtype, device: dtype)
    fast = {name: RUNGS[name] for name in (EAGER, *FAST)} | {"bf16": Rung("bfloat16", "fused", torch.bfloat16)}
    fast["graph"] = RUNGS["graph"]
    monkeypatch.setattr(ladder, "RUNGS", fast)
    return fast


def in_this_process(monkeypatch, run, rungs):
    """Three rungs, and children replaced by measuring here: a process takes three seconds to start."""
    del rungs["tables"], rungs["shared"], rungs["winograd"]

    def child(root, process, arguments, name, threads):
        assert (root, name) == (ROOT, "ladder")
        assert arguments[0] == str(run)
        rung = arguments[arguments.index("--rung") + 1]
        content = ladder._timed_here(rung, ladder._job(run, 3, 2.0, 6)[0], rounds=3)
        for record in content["records"]:
            record["process"] = process
        return content

    monkeypatch.setattr(ladder, "run_child", child)
    monkeypatch.setattr("bench.run.matrix_ceiling", lambda device: 1e9)


def test_every_rung_samples_what_sample_does(job, few_rungs):
    context = torch.eye(3)[torch.arange(3)]
    expected = sample(
        job.run.model,
        job.run.schedule,
        3,
        context=context,
        guidance=2.0,
        engine="eager",
        **job.run.options(steps=6),
    )
    assert torch.equal(job.call(RUNGS[EAGER], job.table)(), expected)
    for name in FAST:
        assert distance(job.call(RUNGS[name], job.table)(), expected) <= 1e-4


def test_each_rung_adds_one_thing(job):
    layouts = {name: RUNGS[name].form(job.run.model, torch.float32).layout for name in FAST[1:]}
    assert layouts == {
        "tables": Layout(channels_last=False, shared=False),  # winograd is but for channels_last
        "shared": Layout(channels_last=False),
        "channels_last": Layout(winograd=False),
        "winograd": Layout(),
    }
    assert {job.prepared(RUNGS[name], job.table, torch.float32).engine for name in FAST[1:]} == {"fused"}
    folded = job.prepared(RUNGS["folded"], job.table, torch.float32)
    assert folded.engine == "eager"
    kinds = {type(module) for module in folded.model.modules()}
    assert torch.nn.BatchNorm2d not in kinds
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in job.run.model.modules())


def test_a_type_that_is_emulated_is_left_out(monkeypatch):
    monkeypatch.setattr(ladder, "computed_in", lambda dtype, device: torch.float32)
    monkeypatch.setattr(ladder, "unavailable_reason", lambda *_: None)
    assert RUNGS["bf16"].missing(CPU) == "a CPU with AVX512-BF16 or AMX"
    assert RUNGS["compile"].missing(CPU) is None


def test_the_timed_rows_are_the_first_of_the_table(job):
    table = replace(job.table, guidance_scale=torch.arange(6).double())
    head = replace(job, table=table).head
    assert len(head) == 5
    for name in ("timesteps", "coefficients", "guidance_scale", "noise_steps", "begins"):
        assert torch.equal(getattr(head, name), getattr(table, name)[:5])
    assert (head.clip, head.prediction) == (1.0, "eps")


def test_a_solver_or_a_stored_table_is_climbed(run, job, tmp_path, monkeypatch):
    path = tmp_path / "fast.json"
    make_table(job.run.schedule, "dpmpp_2m", 6, clip=1.0).save(path)
    stored, options = ladder._job(run, 3, 2.0, solver=str(path))
    assert (options["solver"], options["steps"]) == ("dpmpp_2m", 6)
    named, _ = ladder._job(run, 3, 2.0, 6, "dpmpp_2m")
    for found in (stored, named):
        assert torch.equal(found.table.coefficients, make_table(job.run.schedule, "dpmpp_2m", 6).coefficients)
        assert found.table.clip == 1.0  # the run's
    asked = []

    def timed(names, processes, arguments, threads, quiet):
        asked.append(arguments)
        raise WorkFailed("far enough")

    monkeypatch.setattr(ladder, "quality", lambda names, *_: {name: {"parity": True} for name in names})
    monkeypatch.setattr(ladder, "_timed", timed)
    for solver in (["--solver", str(path)], ["--solver", "dpmpp_2m", "--steps", "6"]):
        assert main(["ladder", str(run), "--out", str(tmp_path / "l.json"), "--quiet", *solver]) == 1
        assert asked.pop()[-len(solver) :] == solver  # what processes of their own are asked for


def test_the_cost_is_that_of_the_timed_steps(job):
    guided, plain, larger = (
        workload("shared", each).build(CPU).cost for each in (job, replace(job, guidance=1.0), replace(job, batch=6))
    )
    assert guided.flops == 2 * plain.flops
    assert larger.flops == 2 * guided.flops
    weights = 4 * sum(p.numel() for p in job.run.model.parameters())
    assert guided.bytes == 5 * (weights + 8 * 3 * 256)


def test_quality_is_measured_against_eager_and_float64(job, few_rungs):
    found = ladder.quality([EAGER, *FAST, "bf16"], job, quiet=True)
    assert found[EAGER]["to_eager"] == 0
    assert found[EAGER]["psnr_db"] is None
    assert 0 < found[EAGER]["to_float64"] < 1e-4
    for name in FAST:
        assert found[name]["parity"]
        assert found[name]["tolerance"] == pytest.approx(min(1e-4, 4 * found[EAGER]["to_float64"] + 1e-6))
        assert found[name]["psnr_db"] > 80
    assert 1e-4 < found["bf16"]["to_eager"] < 1
    assert 10 < found["bf16"]["psnr_db"] < 70
    assert found["bf16"]["tolerance"] is None


def test_pictures_that_are_not_finite_have_no_distance_and_no_parity(job, few_rungs):
    def broken(model):
        model = copy.deepcopy(model)
        model.out[3].bias.data.fill_(torch.nan)
        return model

    few_rungs["folded"] = Rung("NaN", "eager", torch.bfloat16, network=broken)  # a type without a tolerance
    found = ladder.quality([EAGER, "folded"], job, quiet=True)
    nothing = {"to_eager": None, "to_float64": None, "psnr_db": None, "tolerance": None, "parity": False}
    assert found["folded"] == nothing
    (_, row) = ladder_rows({"quality": found, "records": []})
    assert row.cells() == ["folded", "parity lost (needs finite values)", "", "", "not finite", "not finite", ""]


def test_one_rung_is_timed_beside_eager_in_its_process(job):
    records = measure(workload("shared", job), CPU, rounds=3, seconds=60, ceiling=1e9)
    assert [record["candidate"] for record in records] == [EAGER, "shared"]
    assert records[1]["parity"]
    assert records[1]["speed_up"] > 0
    assert len(records[1]["samples_us"]["shared"]["wall"]) == 3


@pytest.mark.long
def test_a_ladder_is_stored_shown_and_drawn(run, few_rungs, monkeypatch, tmp_path, capsys):
    in_this_process(monkeypatch, run, few_rungs)
    out, picture = tmp_path / "l.json", tmp_path / "l.png"
    arguments = ["ladder", str(run), "--batch", "3", "--steps", "6", "--processes", "2", "--plot", str(picture)]
    assert main([*arguments, "--out", str(out)]) == 0
    content = store.load(out)
    assert content["processes"] == 2
    assert list(content["left_out"]) == ["graph"]
    rows = ladder_rows(content)
    assert [row.name for row in rows] == [EAGER, "folded", "channels_last", "bf16"]
    assert all(row.ratio.median > 0 for row in rows[1:])
    assert rows[0].ratio is None
    # Eager was measured by every process of every rung.
    assert sum(record["candidate"] == EAGER for record in content["records"]) == 2 * 3
    captured = capsys.readouterr()
    assert "note: graph is left out, needs a CUDA device, the model is on cpu" in captured.err
    assert picture.read_bytes().startswith(b"\x89PNG")
    json.loads(out.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert all(len(row) == len(LADDER_HEADINGS) for row in ladder_table(content).rows)
    assert all(row.memory > 0 for row in rows)


@pytest.mark.long
def test_a_rung_without_parity_has_no_ratio_and_the_ladder_fails(run, few_rungs, monkeypatch, tmp_path, capsys):
    in_this_process(monkeypatch, run, few_rungs)

    def slightly_wrong(model):
        model = copy.deepcopy(model)
        model.out[3].bias.data += 1e-2
        return model

    few_rungs["folded"] = Rung("an error", "eager", network=slightly_wrong)
    out = tmp_path / "l.json"
    arguments = ["ladder", str(run), "--batch", "3", "--steps", "6", "--processes", "1", "--out", str(out)]
    assert main(arguments) == 1
    content = store.load(out)
    assert content["parity"] is False
    assert not [record for record in content["records"] if record["candidate"] == "folded"]
    folded = next(row for row in ladder_rows(content) if row.name == "folded")
    assert folded.milliseconds is None
    assert "parity lost" in folded.wrong
    assert "parity lost" in capsys.readouterr().out
    ladder_plot(content, tmp_path / "l.png")  # a rung without a time is drawn as such


@pytest.mark.long
def test_a_crashed_process_leaves_a_rung_without_a_time(run, few_rungs, monkeypatch, tmp_path):
    in_this_process(monkeypatch, run, few_rungs)
    whole = ladder.run_child

    def child(root, process, arguments, name, threads):
        content = whole(root, process, arguments, name, threads)
        if process == 1 and "channels_last" in arguments:
            content["records"] = [
                {
                    "process": 1,
                    "workload": "ladder/channels_last",
                    "candidate": "channels_last",
                    "failed": "RuntimeError: planted",
                }
            ]
        return content

    monkeypatch.setattr(ladder, "run_child", child)
    out = tmp_path / "l.json"
    arguments = ["ladder", str(run), "--batch", "3", "--steps", "6", "--processes", "2", "--quiet", "--out", str(out)]
    assert main(arguments) == 1
    crashed = next(row for row in ladder_rows(store.load(out)) if row.name == "channels_last")
    assert crashed.ratio is None
    assert crashed.wrong == "failed: RuntimeError: planted"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch", "0"], "batch"),
        (["--steps", "0"], "steps: got 0, needs an integer in 1..20"),
        (["--guidance", "nan"], "--guidance: got nan"),
        (["--rung", "turbo"], "--rung: got 'turbo', needs one of folded, "),
        (["--rung", "eager"], "--rung: got 'eager'"),
        (["--rung", "graph"], "--rung: graph needs a CUDA device"),
        (["--plot", "no/such/folder.png"], "--plot: no/such/folder.png cannot be written"),
        (["--solver", "x.json"], "--steps: got 6 beside --solver x.json"),
        (["--solver", "euler"], "solver: got 'euler'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(run, tmp_path, capsys, arguments, words):
    assert main(["ladder", str(run), "--steps", "6", *arguments, "--out", str(tmp_path / "l.json")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_run_of_this_network_is_refused(run, tmp_path, capsys):
    points = _write(tmp_path / "points", PointMLP(2, 16))
    plain = _write(tmp_path / "plain", ContextUnet(1, 8, 0, 16).eval())
    for folder, out, words in (
        (tmp_path / "nothing", "l.json", "nothing"),
        (points, "l.json", "is a run of mlp, needs a network with a form (context_unet)"),
        (plain, "l.json", "--guidance: got 2 for a run without classes, needs 1"),
        (run, "no/l.json", "--out: "),
    ):
        assert main(["ladder", str(folder), "--out", str(tmp_path / out)]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1


def test_notes_say_what_the_table_does_not():
    left_out = {"graph": "a CUDA device"}
    assert ladder_notes({"left_out": left_out}) == ["`graph` is left out: it needs a CUDA device."]
    assert "emulates it" in ladder_notes({"bfloat16_in_hardware": False, "left_out": left_out})[0]


# VmHWM, not ru_maxrss: the latter starts at what the parent held when it forked.
PEAK = """import sys
import torch
from pathlib import Path
from ddpm import load_run, sample

run = load_run(sys.argv[1])
context = torch.eye(5)[torch.arange(256) % 5]
options = run.options(steps=2) | {"engine": sys.argv[2], "guidance": float(sys.argv[3])}
sample(run.model, run.schedule, 256, context=context, batch_size=256, **options)
lines = Path("/proc/self/status").read_text().splitlines()
print(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")))
"""


def peak(run, engine, guidance):
    """KiB that a fresh process held at most while it sampled 256 images."""
    line = [sys.executable, "-c", PEAK, str(run), engine, str(guidance)]
    own = environment(ROOT, torch.get_num_threads())
    return int(subprocess.run(line, cwd=ROOT, env=own, capture_output=True, text=True, check=True).stdout)


@pytest.mark.long
@pytest.mark.alone
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_sampling_a_large_batch_holds_less_than_eager_does(tmp_path):
    """Peak memory at batch 256, in fresh processes, network of 64 features."""
    torch.manual_seed(0)
    run = _write(tmp_path / "run", ContextUnet(3, 64, 5, 16).eval(), ("a", "b", "c", "d", "e"))
    for guidance in (1.0, 2.0):
        # Processes differ by 5%, upwards, which is what fused saves: 2 to 7%.
        eager, fused = (min(peak(run, engine, guidance) for _ in range(3)) for engine in ("eager", "fused"))
        assert fused < 1.02 * eager


@pytest.mark.long
def test_the_whole_ladder_in_processes_of_its_own(run, tmp_path):
    out = tmp_path / "l.json"
    arguments = ["ladder", str(run), "--batch", "3", "--steps", "6", "--processes", "1", "--rounds", "2"]
    assert main([*arguments, "--out", str(out)]) == 0
    content = store.load(out)
    assert [row.name for row in ladder_rows(content)] == [name for name in RUNGS if name not in content["left_out"]]
    assert all(row.milliseconds is not None for row in ladder_rows(content))
