"""`ddpm-bench profile`: its figures against independent counts, its page, its errors."""

import html
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from bench.cli import main
from bench.kernels import operator_file
from bench.measure import Convolution, convolution_ceiling
from bench.profile import by_operator, comparison, floor, summary
from bench.profiling import measure, trace
from bench.profiling.measure import RangedNoise
from bench.profiling.native import clocked
from bench.profiling.operators import work_of
from bench.profiling.page import Number, render
from ddpm import Trajectory, load_run
from ddpm.engines import unavailable_reason
from ddpm.inference import kept_form
from ddpm.networks import ContextUnet, PointMLP, SimpleUNet
from ddpm.runs import make_config, start_run
from ddpm.schedule import NoiseSchedule
from ddpm.solvers import make_table
from kernels.winograd import transform

CPU = torch.device("cpu")

F32 = torch.float32
NAMES = ("solver_step", "group_norm_relu", "bottleneck", "convolution")
solver_step, group_norm_relu, bottleneck, convolution = map(operator_file, NAMES)

TINY_CEILINGS = {
    "copy_gb_per_s": 10.0,
    "copy_at": "256 MiB",
    "cached_copy_gb_per_s": 20.0,
    "cached_copy_at": "4 MiB",
    "matmul_gflop_per_s": 100.0,
    "matmul_at": "768x768",
    "conv_gflop_per_s": 90.0,
    "conv_at": "[32, 64, 16, 16] 3x3",
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _run(folder, network, classes=()):
    folder.mkdir()
    schedule = NoiseSchedule.make("linear", 10, 1e-4, 0.7)
    start_run(folder, make_config(network, schedule, "eps", classes=classes), network)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of random weights: 16x16x1, n_feat 8, three classes, T = 10."""
    torch.manual_seed(0)
    return _run(tmp_path_factory.mktemp("runs") / "digits", ContextUnet(1, 8, 3, 16), ("a", "b", "c"))


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    """An unconditional run of points."""
    torch.manual_seed(0)
    return _run(tmp_path_factory.mktemp("runs") / "points", PointMLP(2, 8))


@pytest.fixture(scope="module")
def profiled(run, tmp_path_factory):
    """The three files of a profile of it, with guidance, read: (content, trace, page, what the terminal showed)."""
    out = tmp_path_factory.mktemp("a profile; $HOME")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.profiling.measure.ceilings", lambda *arguments: TINY_CEILINGS)
        arguments = (
            "profile",
            run,
            "--batch",
            2,
            "--guidance",
            2,
            "--context",
            "all",
            "--trajectories",
            2,
            "--out",
            out,
        )
        line = [str(argument) for argument in (*arguments, "--engine", "eager")]
        patch.setattr("sys.argv", ["ddpm-bench", *line])
        assert main(line) == 0
    assert sorted(path.name for path in out.iterdir()) == ["profile.json", "report.html", "trace.json"]
    content, events = (json.loads((out / name).read_text()) for name in ("profile.json", "trace.json"))
    return content, events, (out / "report.html").read_text()


def test_the_shares_add_up_to_the_step(profiled):
    content = profiled[0]
    assert sum(part["share"] for part in content["parts"]) == pytest.approx(1, abs=1e-4)
    assert sum(part["ms"] for part in content["parts"]) == pytest.approx(content["profiler"]["step_ms"], rel=1e-3)
    worked = sum(part["ms"] for part in content["parts"] if part["name"] != "gaps")
    assert sum(row["ms"] for row in content["operators"]) == pytest.approx(worked, rel=1e-2)
    names = {part["name"] for part in content["parts"]}
    assert names >= {"encoder", "bottleneck", "decoder", "head", "embeddings", "solver", "noise", "gaps"}
    by_name = sum(row["ms"] for row in by_operator(content["operators"]))
    assert by_name == pytest.approx(sum(row["ms"] for row in content["operators"]))


def test_the_command_can_be_pasted_into_a_shell(profiled):
    content, _, page = profiled
    words = shlex.split(content["command"])
    assert words[:2] == ["ddpm-bench", "profile"]
    (out,) = (path for path in words if "a profile; $HOME" in path)
    assert f"'{out}'" in content["command"]
    assert html.escape(content["command"]) in page


def test_latencies_are_ordered_and_belong_to_whole_trajectories(profiled):
    latency = profiled[0]["latency"]
    step = latency["step_ms"]
    assert 0 < step["p50"] <= step["p90"] <= step["p99"] <= step["max"]
    assert [len(run["steps_ms"]) for run in latency["trajectories"]] == [10, 10]
    for trajectory in latency["trajectories"]:
        assert sum(trajectory["steps_ms"]) <= trajectory["wall_ms"]
    assert len(latency["warm_up_ms"]) == measure.WARM_UP_STEPS
    walls = sorted(trajectory["wall_ms"] for trajectory in latency["trajectories"])
    assert latency["images_per_s"] == pytest.approx(2e3 / (sum(walls) / 2), rel=1e-3)


def test_modules_nest(profiled):
    def check(node):
        assert sum(child["ms"] for child in node["children"]) <= node["ms"] * 1.001 + 1e-3
        for child in node["children"]:
            check(child)

    root = profiled[0]["modules"]
    check(root)
    network = next(node for node in root["children"] if node["name"] == "network")
    assert {node["name"] for node in network["children"]} == {name for name, _ in ContextUnet(1, 8, 3).named_children()}


def test_the_operators_are_those_of_the_network(profiled):
    """Every layer once per step, both halves of guidance in one call."""
    calls = {row["name"]: row["calls"] for row in by_operator(profiled[0]["operators"])}
    network = ContextUnet(1, 8, 3, 16)
    kinds = [type(module).__name__ for module in network.modules()]
    assert calls["conv2d"] == kinds.count("Conv2d")
    assert calls["conv_transpose2d"] == kinds.count("ConvTranspose2d")
    assert calls["batch_norm"] == kinds.count("BatchNorm2d")
    assert calls["gelu"] == kinds.count("GELU")


def test_memory_is_that_of_the_step(profiled):
    memory = profiled[0]["memory"]
    assert memory["step_peak_bytes"] >= 4 * 16 * 16 * 16 * 4  # one concatenation [4, 2 * n_feat, 16, 16], float32
    assert memory["step_peak_bytes"] == max(held for _, held in memory["step"])
    times = [time for time, _ in memory["step"]]
    assert times == sorted(times)
    assert memory["weights_bytes"] == sum(4 * p.numel() for p in ContextUnet(1, 8, 3, 16).parameters())
    assert len(memory["held_bytes"]) == 20


def test_the_trace_is_whole_and_names_no_machine(profiled):
    events = profiled[1]["traceEvents"]
    names = [event["name"] for event in events if event["ph"] == "X"]
    assert [name for name in names if name.startswith("step ")] == [f"step {k}" for k in range(3, 8)]
    assert sum(name == "noise" for name in names) == 6  # five steps and the one that warms up
    assert "module:down1.model.0.conv1.0|Conv2d" in names
    assert set(profiled[1]) <= {"schemaVersion", "deviceProperties", "displayTimeUnit", "traceEvents"}


def test_the_page_needs_nothing_but_itself(profiled):
    page = profiled[2]
    assert not re.findall(r"https?://|//[a-z]|@import|url\((?!#)", page)
    assert not re.findall(r"<(?:link|img|iframe|object|embed)\b|\bsrc=", page)
    assert page.count("<svg") == page.count("</svg>") == 4
    for heading in ("Where a step", "Latency of every step", "Time by module", "Roofline", "Memory"):
        assert heading in page
    for number in re.findall(r'\s(?:x|y|cx|cy|r|x1|y1|x2|y2)="([^"]*)"', page):
        assert abs(float(number)) < 1e4  # no NaN, nothing far outside
    assert "nan" not in " ".join(re.findall(r'points="([^"]*)"', page))


def test_flops_of_a_context_unet_equal_its_layers_count(tmp_path):
    """Against an independent count from the outputs' sizes; 0.30 GFLOP per image and step of 16x16x3, n_feat 64."""
    network = ContextUnet(3, 64, 5, 16).eval()
    expected = 0

    def count(module, arguments, output):
        nonlocal expected
        if isinstance(module, torch.nn.ConvTranspose2d):
            expected += 2 * arguments[0].numel() * module.weight[0].numel()
        elif isinstance(module, torch.nn.Conv2d):
            expected += 2 * output.numel() * module.weight[0].numel()
        elif isinstance(module, torch.nn.Linear):
            expected += 2 * output.numel() * module.in_features

    handles = [module.register_forward_hook(count) for module in network.modules()]
    with torch.no_grad():
        network(torch.zeros(1, 3, 16, 16), torch.ones(1), torch.zeros(1, 5))
    for handle in handles:
        handle.remove()
    schedule = NoiseSchedule.make("linear", 500)
    table = make_table(schedule, "ddpm", 4)
    trajectory = Trajectory(network, schedule, table, engine="eager")
    events, _ = measure.profiled(measure.Sampler(trajectory, 1, torch.zeros(1, 5)), steps=1)
    operators = trace.breakdown(events)["operators"]
    matrix = [row for row in operators if row["name"] in ("conv2d", "conv_transpose2d", "linear")]
    assert sum(row["flops"] for row in matrix) == expected
    assert expected / 1e9 == pytest.approx(0.301, abs=0.002)


STRIDED = ["", "", "", "[2, 2]", "[1, 1]", "[1, 1]"]
UP = ["", "", "", "[2, 2]", "[0, 0]"]


@pytest.mark.parametrize(
    ("name", "dims", "concrete", "flops", "moved"),
    [
        ("conv2d", [[2, 3, 9, 9], [8, 3, 3, 3], [8]], [*STRIDED, "1"], 21600, 4440),
        ("convolution", [[2, 3, 9, 9], [8, 3, 3, 3], [8]], [*STRIDED, "False", "[0, 0]", "1"], 21600, 4440),
        ("conv_transpose2d", [[1, 4, 5, 5], [4, 6, 2, 2], [6]], [*UP, "[0, 0]", "1", "[1, 1]"], 4800, 3208),
        ("convolution", [[1, 4, 5, 5], [4, 6, 2, 2], [6]], [*UP, "[1, 1]", "True", "[0, 0]", "1"], 4800, 3208),
        ("conv2d", [[2, 3, 9, 9], [8, 3, 3, 3], []], ["", "", "", "[1, 1]", "same", "[1, 1]", "1"], 69984, 7992),
        ("linear", [[7, 3], [5, 3], [5]], ["", "", ""], 210, 304),
        ("addmm", [[5], [7, 3], [3, 5]], ["", "", "", "1", "1"], 210, 304),
        ("add", [[4, 1, 3], [2, 1], []], ["", "", "1"], 24, 152),
        ("max_pool2d", [[1, 2, 4, 4]], ["", "[2, 2]", "[2, 2]", "[0, 0]", "[1, 1]", "False"], 32, 160),
        ("cat", [[[2, 3], [2, 5]], []], ["", "1"], 0, 128),
        ("copy_", [[2, 3], [3]], ["", "", "False"], 0, 36),
        ("view", [[2, 3]], ["", "[-1]"], 0, 0),
        ("mul_", [[4, 3], [3]], ["", ""], 12, 108),
        ("__xor__", [[4, 3], [3]], ["", ""], 12, 108),
        ("mm", [[7, 3], [3, 5], [7, 5]], ["", "", ""], 210, 284),  # into the third
    ],
)
def test_work_by_hand(name, dims, concrete, flops, moved):
    """Counted by hand in float32; the convolution's output is 5x5, the transposed one's 10x10."""
    dims = [*dims, *[[]] * (len(concrete) - len(dims))]
    kind = "int" if name == "__xor__" else "float"
    types = ["TensorList" if shape and isinstance(shape[0], list) else kind if shape else "Scalar" for shape in dims]
    work = work_of(f"aten::{name}", dims, types, concrete)
    assert (work and work.flops, work and work.bytes) == (flops, moved)


def test_products_of_winograd_by_hand():
    """Two convolutions of 6x6 images, 32 to 32 to 64 channels: 8 tiles, 36 points each."""
    weights = [list(transform(torch.zeros(k, 32, 3, 3)).shape) for k in (32, 64)]
    dims = [[2, 32, 6, 6], weights, [], [], []]
    work = work_of("fused_ddpm::winograd", dims, ["float", "TensorList", "", "", "Scalar"], ["", "", "", "", "True"])
    assert work.flops == 2 * 8 * 36 * (32 * 32 + 32 * 64)
    assert work.bytes == 4 * (2 * 32 * 36 + 36 * (32 * 32 + 32 * 64) + 2 * 64 * 36)


X, FILM = [2, 16, 4, 4], [2, 16]
TABLE = [[50, 8], [], [], [2]]


@pytest.mark.parametrize(
    ("name", "dims", "cost"),
    [
        ("solver_step", [X, X, *TABLE, [], [], [], []], solver_step.cost(F32, F32)),
        ("solver_step", [X, X, *TABLE, X, [], X, []], solver_step.cost(F32, F32, True, True)),
        ("group_norm_relu", [X, [16], [16], [], []], group_norm_relu.cost(F32)),
        ("bottleneck", [X, [16, 16, 4, 4], [16], [16], [16], FILM, FILM, [], []], bottleneck.cost(F32, 16, 2)),
        ("convolution", [X, [16, 16, 3, 3], [16], *[[]] * 7], convolution.cost(F32, 16, 16, 9)),
        ("convolution", [X, [16, 16, 1, 1], [16], [2, 8, 4, 4], *[[]] * 6], convolution.cost(F32, 24, 16, 1)),
    ],
)
def test_our_operators_cost_what_their_files_say(name, dims, cost):
    """As the profiler records a call: empty where an argument is no tensor or not given."""
    work = work_of(f"fused_ddpm::{name}", dims, ["float" if shape else "" for shape in dims], [""] * len(dims))
    assert (work.flops, work.bytes) == (512 * cost.flops, 512 * cost.bytes)


def test_an_unknown_operator_has_no_count():
    assert work_of("aten::mystery", [[2, 2]], ["float"], [""]) is None
    assert work_of("fused_ddpm::q_sample", [[2, 2], [2]], ["float", "long int"], ["", ""]) is None
    assert work_of("aten::einsum", [[], [[2, 2], [2, 2]], []], ["", "TensorList", ""], ["ij,jk->ik", "", ""]) is None


def _event(category, name, begin, duration, **arguments):
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "ts": begin,
        "dur": duration,
        "pid": 1,
        "tid": 1,
        "args": arguments,
    }


def test_on_cuda_the_parts_are_kernels_and_the_gaps_are_the_rest():
    """A trace as CUDA writes it: operators return at once, their kernels run later and in two streams."""
    events = [
        _event("user_annotation", "step 0", 0, 100),
        _event("user_annotation", "module:|Net", 0, 40),
        _event("user_annotation", "module:down1|UnetDown", 5, 20),
        _event("cpu_op", "aten::conv2d", 6, 10, **{"External id": 1}),
        _event("cpu_op", "aten::cudnn_convolution", 7, 8, **{"External id": 2}),
        _event("cpu_op", "aten::mul", 50, 5, **{"External id": 3}),
        _event("user_annotation", "noise", 60, 10),
        _event("cpu_op", "aten::sin", 61, 5, **{"External id": 4}),
        _event("kernel", "implicit_gemm", 20, 30, **{"External id": 2}),
        _event("kernel", "mul", 60, 10, **{"External id": 3}),
        _event("kernel", "sin", 65, 10, **{"External id": 4}),
    ]
    figures = trace.breakdown({"traceEvents": events})
    # Busy 20..50 and 60..75 of 100 us; the kernels' 50 us share these 45.
    parts = {part["name"]: part["ms"] for part in figures["parts"]}
    assert parts == pytest.approx({"encoder": 0.027, "solver": 0.009, "noise": 0.009, "gaps": 0.055})
    assert trace.union([(0, 2), (1, 3), (5, 6)]) == 4


def test_an_engine_may_name_its_parts_itself():
    events = [
        _event("user_annotation", "step 0", 0, 100),
        _event("user_annotation", "encoder", 0, 40),
        _event("cpu_op", "aten::conv2d", 5, 30),
        _event("user_annotation", "solver", 50, 20),
        _event("cpu_op", "fused_ddpm::solver_step", 55, 10),
        _event("cpu_op", "Torch-Compiled Region: 0/0", 80, 10),
        _event("cpu_op", "aten::mm", 81, 4),
    ]
    figures = trace.breakdown({"traceEvents": events})
    parts = {part["name"]: part["ms"] for part in figures["parts"]}
    assert parts == pytest.approx({"encoder": 0.03, "solver": 0.01, "other": 0.01, "gaps": 0.05})
    assert {row["name"] for row in figures["operators"]} >= {"compiled code", "mm"}


def test_noise_drawn_ahead_belongs_to_every_step():
    """Of two steps the second draws the noise of eight: in 40 of its 140 us, 8 us a step by the clock."""
    events = [
        _event("user_annotation", "step 0", 0, 100),
        _event("cpu_op", "aten::mul", 10, 50),
        _event("user_annotation", "step 1", 100, 140),
        _event("user_annotation", "noise ahead", 110, 40),
        _event("user_annotation", "noise", 110, 40),
        _event("cpu_op", "aten::sin", 110, 30),
        _event("cpu_op", "aten::mul", 160, 50),
    ]
    figures = trace.breakdown({"traceEvents": events}, ahead=[(8, 64e-6)])
    parts = {part["name"]: part["ms"] for part in figures["parts"]}
    assert parts == pytest.approx({"other": 0.05, "noise": 0.008, "gaps": 0.05})
    assert (figures["profiler"]["step_ms"], figures["modules"]["ms"]) == pytest.approx((0.108, 0.108))
    assert {row["name"]: row["calls"] for row in figures["operators"]} == {"mul": 1, "noise, drawn ahead": 0.125}


def test_the_stored_profile_has_a_page():
    page = render(json.loads((Path(__file__).parents[2] / "docs/profile/profile.json").read_text()))
    assert "63.5" in page
    assert "{" not in re.sub(r"<style.*?</style>|<script>.*?</script>", "", page, flags=re.S)


def test_the_fused_engine_has_the_parts_and_the_arithmetic_of_eager(run, tmp_path, monkeypatch):
    monkeypatch.setattr("bench.profiling.measure.ceilings", lambda *arguments: TINY_CEILINGS)
    flops, parts = {}, {}
    for engine in ("eager", "fused"):
        out = tmp_path / engine
        asked = ["--batch", "2", "--steps", "10", "--trajectories", "1", "--engine", engine, "--out", str(out)]
        assert main(["profile", str(run), *asked]) == 0
        content = json.loads((out / "profile.json").read_text())
        kinds = ("conv", "addmm", "bmm", "linear")
        rows = [row for row in content["operators"] if any(kind in row["name"] for kind in kinds)]
        flops[engine] = sum(row["flops"] for row in rows)
        parts[engine] = {part["name"] for part in content["parts"]}
    assert flops["fused"] == pytest.approx(flops["eager"], rel=0.02)
    assert parts["eager"] - parts["fused"] == {"embeddings"}  # computed once a run
    network = next(node for node in content["modules"]["children"] if node["name"] == "network")
    found = {node["name"].split(".")[0]: node["part"] for node in network["children"]}
    assert found == {
        "initial": "encoder",
        "shortcut": "encoder",
        "downs": "encoder",
        "bottleneck": "bottleneck",
        "upsamplings": "decoder",
        "ups": "decoder",
        "head": "head",
        "normalisation": "head",
        "last": "head",
    }


@pytest.mark.skipif(bool(unavailable_reason("native", CPU)), reason=f"needs {unavailable_reason('native', CPU)}")
def test_the_native_engine_s_layers_are_told_by_its_own_clock(run, tmp_path, monkeypatch):
    monkeypatch.setattr("bench.profiling.measure.ceilings", lambda *arguments: TINY_CEILINGS)
    contents = {}
    for engine in ("eager", "native"):
        out = tmp_path / engine
        asked = ["--batch", "2", "--steps", "10", "--trajectories", "1", "--engine", engine, "--out", str(out)]
        assert main(["profile", str(run), *asked]) == 0
        contents[engine] = json.loads((out / "profile.json").read_text())
    native = contents["native"]
    flops = {name: sum(row["flops"] or 0 for row in content["operators"]) for name, content in contents.items()}
    assert flops["native"] == pytest.approx(flops["eager"], rel=0.1)
    assert {"encoder", "bottleneck", "decoder", "head", "solver"} <= {part["name"] for part in native["parts"]}
    modules = {node["name"]: node for node in native["modules"]["children"]}
    assert {"initial.0", "bottleneck", "ups.1.3", "last", "solver"} <= modules.keys()
    told = sum(node["ms"] for node in modules.values())
    assert 0 < told <= native["profiler"]["step_ms"] * 1.01


@pytest.mark.skipif(bool(unavailable_reason("native", CPU)), reason=f"needs {unavailable_reason('native', CPU)}")
def test_what_a_network_moves_without_weights_is_not_the_solver_s():
    """Of a SimpleUNet: the canvas around its images, the shifts that guidance's halves have of their own."""
    torch.manual_seed(0)
    schedule = NoiseSchedule.make("cosine", 20)
    model, table = SimpleUNet(1, n_feat=8, n_cfeat=5, height=10).eval(), make_table(schedule, "ddim", 5)
    trajectory = Trajectory(model, schedule, table, engine="native", guided=True, form=kept_form)
    names = [event["name"] for event in clocked(trajectory, 2, torch.eye(5)[0], 2.0)["traceEvents"]]
    assert names.count("solver") == 1
    assert names.count("module:placed|") == 2
    assert names.count("module:shifted|") > 0


def test_noise_with_ranges_is_still_drawn_by_the_engine(run):
    opened = load_run(run)
    prepared = Trajectory(opened.model, opened.schedule, make_table(opened.schedule, "ddpm", 4), engine="fused")
    expected = prepared(2, seed=3)
    with torch.profiler.profile() as seen:
        assert torch.equal(prepared(2, noise=RangedNoise(3)), expected)
    drawn = {event.key: event.count for event in seen.key_averages() if event.key in ("noise", trace.AHEAD)}
    assert drawn == {"noise": 1, trace.AHEAD: 1}  # x_T, and three rows at once


def test_a_stored_table_is_profiled(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bench.profiling.measure.ceilings", lambda *arguments: TINY_CEILINGS)
    path, out = tmp_path / "fast.json", tmp_path / "out"
    make_table(load_run(run).schedule, "dpmpp_2m", 4).save(path)
    asked = ["profile", str(run), "--solver", str(path), "--batch", "1", "--trajectories", "1", "--out", str(out)]
    assert main([*asked, "--steps", "4"]) == 2
    assert f"--steps: got 4 beside --solver {path}" in capsys.readouterr().err
    assert not out.exists()
    assert main(asked) == 0
    recipe = json.loads((out / "profile.json").read_text())["recipe"]
    assert (recipe["solver"], recipe["steps"]) == ("dpmpp_2m", 4)


def test_the_floor_is_the_larger_of_the_two_numbers():
    operators = [{"flops": 4e9, "bytes": 3e6}, {"flops": None, "bytes": None}]
    content = {"operators": operators, "ceilings": TINY_CEILINGS, "latency": {"step_ms": {"p50": 80.0}}}
    found = floor(content)
    assert (found["arithmetic_ms"], found["traffic_ms"], found["binds"]) == (40.0, 0.3, "arithmetic")
    assert found["share"] == 0.5


def test_two_profiles_stand_beside_each_other(run, profiled, tmp_path, capsys):
    first, second = profiled[0], json.loads(json.dumps(profiled[0]))
    second["recipe"]["engine"] = "another"
    second["latency"]["step_ms"]["p50"] *= 2
    second["parts"] = [part | {"ms": part["ms"] + 1} for part in second["parts"] if part["name"] != "noise"]
    second["operators"].append({"name": "new", "calls": 1, "ms": 3.0, "share": 0.1, "flops": None, "bytes": None})
    rows = {tuple(row[:2]): row[2:] for row in comparison(first, second).rows}
    (step, *_), parts = rows, {part["name"]: part["ms"] for part in first["parts"]}
    assert rows[step][3] == "+100%"
    assert rows["part", "encoder"][:3] == [f"{parts['encoder']:.3f}", f"{parts['encoder'] + 1:.3f}", "+1.000"]
    assert rows["part", "noise"][1:] == ["0.000", f"-{parts['noise']:.3f}", "-100%"]
    assert rows["operator", "new"] == ["0.000", "3.000", "+3.000", ""]
    paths = [tmp_path / name for name in "ab"]
    for path, content in zip(paths, (first, second), strict=True):
        path.write_text(json.dumps(content))
    assert main(["profile", "--compare", *map(str, paths)]) == 0
    shown = capsys.readouterr().out
    assert "B: digits: another, 2 images" in shown
    assert "conv2d" in shown
    for wrong in (
        '{"records": []}',
        *(json.dumps({name: value for name, value in second.items() if name != gone}) for gone in ("latency", "parts")),
        *(json.dumps(second | {name: 5}) for name in ("latency", "parts", "operators", "recipe", "run", "machine")),
        json.dumps(second | {"parts": [{"name": "a", "ms": "x"}]}),
    ):
        paths[1].write_text(wrong)
        assert main(["profile", "--compare", *map(str, paths)]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {paths[1]}: ")
        assert said.count("\n") == 1
    assert main(["profile", "--compare", str(tmp_path / "none"), str(paths[0])]) == 2
    assert main(["profile", "--compare", str(paths[0]), str(paths[0]), "--batch", "2"]) == 2
    assert "--compare A.json B.json alone" in capsys.readouterr().err
    assert main(["profile", str(run)]) == 2


def test_threads_are_set_and_recorded(run, tmp_path, monkeypatch):
    monkeypatch.setattr("bench.profiling.measure.ceilings", lambda *arguments: TINY_CEILINGS)
    asked = ["--batch", "1", "--steps", "2", "--trajectories", "1", "--threads", "2", "--out", str(tmp_path)]
    assert main(["profile", str(run), *asked]) == 0
    assert json.loads((tmp_path / "profile.json").read_text())["machine"]["threads"] == 2


def test_a_profile_of_points_in_one_step(points, tmp_path, monkeypatch):
    monkeypatch.setattr("bench.profiling.measure.ceilings", lambda *arguments: TINY_CEILINGS)
    assert (
        main(["profile", str(points), "--batch", "3", "--steps", "1", "--trajectories", "1", "--out", str(tmp_path)])
        == 0
    )
    content = json.loads((tmp_path / "profile.json").read_text())
    assert content["recipe"] | {"steps": 1, "rows": 3, "engine": "fused"} == content["recipe"]
    assert len(content["latency"]["trajectories"][0]["steps_ms"]) == 1


@pytest.mark.long
def test_ceilings_are_rates_of_this_machine():
    best = measure.ceilings(torch.device("cpu"))
    assert set(best) == set(TINY_CEILINGS)
    assert 0.1 < best["copy_gb_per_s"] < 5000
    assert 0.5 < best["matmul_gflop_per_s"] < 1e6
    assert 0.5 < best["conv_gflop_per_s"] < 1e6


def test_the_convolution_ceiling_is_that_of_run(monkeypatch):
    from bench.run import run

    assert measure.convolution_ceiling is run.__globals__["convolution_ceiling"] is convolution_ceiling
    asked = []

    def shared(device, rounds):
        asked.append((device, rounds))
        return Convolution(12.3456e9, "a shape")

    monkeypatch.setattr(measure, "convolution_ceiling", shared)
    monkeypatch.setitem(measure.MATRIX_SIDES, "cpu", (8,))
    monkeypatch.setitem(measure.LARGE_BYTES, "cpu", 2**20)
    best = measure.ceilings(torch.device("cpu"))
    assert asked == [(torch.device("cpu"), measure.CEILING_ROUNDS)]
    assert (best["conv_gflop_per_s"], best["conv_at"]) == (12.3456, "a shape")
    assert set(best) == set(TINY_CEILINGS)


def test_numbers_have_three_digits_and_no_exponent():
    shown = [f"{Number(value)}" for value in (0, 0.01234, 1.234, 21.0, 123.4, 12345.6)]
    assert shown == ["0", "0.0123", "1.23", "21.0", "123", "12,346"]
    assert f"{Number(4.83e9):giga} {Number(0.305):.0%}" == "4.83 30%"


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--batch", 10**12), 2, "--batch: got 1000000000000, which are"),
        (("--batch", 0), 2, "'--batch': Input should be greater than or equal to 1"),
        (("--steps", 0), 2, "steps: got 0"),
        (("--steps", 11), 2, "needs an integer in 1..10"),
        (("--trajectories", 0), 2, "'--trajectories': Input should be greater than or equal to 1"),
        (("--threads", 0), 2, "'--threads': Input should be greater than or equal to 1"),
        (("--compare", "a.json", "b.json"), 2, "needs RUN and --out FOLDER, or --compare A.json B.json alone"),
        (("--engine", "warp"), 2, "engine: got 'warp'"),
        (("--guidance", 2), 2, "without --context"),
        (("--guidance", "nan", "--context", "a"), 2, "needs a finite number"),
        (("--context", "z"), 2, "--context: got 'z'"),
        (("--seed", -1), 2, "'--seed': Input should be greater than or equal to 0"),
        (("--device", "tpu"), 2, "--device: got 'tpu'"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, capsys, options, code, said):
    out = tmp_path / "out"
    assert main([str(part) for part in ("profile", run, "--out", out, *options)]) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error
    assert not out.exists()


def test_guidance_of_a_run_without_classes_is_refused(points, tmp_path, capsys):
    assert main(["profile", str(points), "--guidance", "2", "--out", str(tmp_path / "out")]) == 2
    assert "trained without classes" in capsys.readouterr().err
    assert main(["profile", str(points), "--context", "all", "--out", str(tmp_path / "out")]) == 2
    assert "trained without classes" in capsys.readouterr().err


def test_a_missing_run_an_engine_not_here_and_an_unwritable_folder(run, tmp_path, capsys, monkeypatch):
    assert main(["profile", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert "no such run folder" in capsys.readouterr().err
    file = tmp_path / "file"
    file.write_text("kept")
    assert main(["profile", str(run), "--engine", "eager", "--out", str(file)]) == 2
    assert "file: is a file, needs a folder" in capsys.readouterr().err
    assert file.read_text() == "kept"

    def missing(name, device, form):
        raise RuntimeError(f"engine: {name!r} needs CUDA, found cpu")

    monkeypatch.setattr("bench.profile.choose", missing)
    assert main(["profile", str(run), "--engine", "graph", "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == "error: engine: 'graph' needs CUDA, found cpu\n"


def test_what_was_there_stays_if_the_work_fails(run, tmp_path, monkeypatch):
    (tmp_path / "profile.json").write_text("before")
    monkeypatch.setattr("bench.profiling.measure.ceilings", lambda *arguments: TINY_CEILINGS)

    def fail(content):
        raise RuntimeError("no page")

    monkeypatch.setattr("bench.profiling.page.render", fail)
    arguments = (
        "profile",
        run,
        "--batch",
        1,
        "--steps",
        2,
        "--trajectories",
        1,
        "--engine",
        "eager",
        "--out",
        tmp_path,
    )
    assert main([str(argument) for argument in arguments]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]
    assert (tmp_path / "profile.json").read_text() == "before"


def test_a_floor_that_the_machine_cannot_have_is_not_printed():
    content = json.loads((Path(__file__).parents[2] / "docs/profile/profile.json").read_text())
    assert "The floor of a step is the larger of the two" in render(content)
    content["floor"]["share"] = 1.74
    text = "at the best rates measured here a step would take 1.7 times as long as it did"
    assert f"The floor of a step: none can be told: {text}." in render(content)
    assert f"floor    none can be told: {text}" in summary(content)
    assert "The floor of a step is the larger" not in render(content)


def test_a_busy_machine_is_said_on_the_page():
    content = json.loads((Path(__file__).parents[2] / "docs/profile/profile.json").read_text())
    assert "machine is busy" not in render(content)
    assert "machine is busy, load 63.0 on" in render(content | {"load": {"others": 63.0}})
