"""A step table is data: stored exactly, read with suspicion, cut, refused where it does not belong."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from ddpm import NoiseSchedule, StepTable, Trajectory, engines, load_run, make_table, sample
from ddpm.errors import BadInput
from ddpm.files import digest_of
from ddpm.inference import PlainForm
from ddpm.metrics import distance
from ddpm.runs import make_config
from ddpm.solvers import SOLVERS, carried_over, solver

SCHEDULE = NoiseSchedule.make("cosine", 40)
FIELDS = ("timesteps", "coefficients", "guidance_scale", "noise_steps", "begins")
EVERY_SOLVER = [("ddpm", {"variance": "beta"}), ("ddim", {"eta": 0.3}), ("dpmpp_2m", {})]


def learned(**more):
    """A table with all that one may have: fractions, a repeated time, pairs of rows, scales, digest."""
    generator = torch.Generator().manual_seed(0)
    coefficients = torch.randn(4, 7, dtype=torch.float64, generator=generator) / 3
    coefficients[-1, 6] = 0.0
    fields = {
        "timesteps": torch.tensor([39.123456789012345, 1 / 3 + 20, 1 / 3 + 20, 0.1], dtype=torch.float64),
        "coefficients": coefficients,
        "clip": 0.1 + 0.2,
        "prediction": "x0",
        "guidance_scale": torch.tensor([1.0, 0.0, 1 / 3, 1e-300], dtype=torch.float64),
        "noise_steps": torch.tensor([39, 20, 20 | 1 << 20, 0]),
        "begins": torch.tensor([True, False, True, True]),
        "made_for": {"solver": "tuned", "steps": 3, "schedule": SCHEDULE.config()},
        "weights": "ab" * 32,
    }
    return StepTable(**fields | more)


def same(one, other):
    tensors = all(
        torch.equal(getattr(one, name), getattr(other, name)) and getattr(one, name).dtype == getattr(other, name).dtype
        for name in FIELDS
    )
    rest = ("clip", "prediction", "made_for", "weights", "solver", "steps")
    return tensors and all(getattr(one, name) == getattr(other, name) for name in rest)


# --- stored -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [learned(), learned(clip=None, weights=None)])
def test_a_stored_table_is_the_same_to_the_bit(table, tmp_path):
    table.save(tmp_path / "t.json")
    again = StepTable.load(tmp_path / "t.json")
    assert same(again, table)
    assert again.timesteps.dtype == torch.float64
    again.save(tmp_path / "u.json")
    assert (tmp_path / "u.json").read_bytes() == (tmp_path / "t.json").read_bytes()


@pytest.mark.parametrize(("solver", "options"), EVERY_SOLVER)
def test_solvers_tables_are_stored_with_what_they_were_made_for(solver, options, tmp_path):
    table = make_table(SCHEDULE, solver, 7, clip=1.0, prediction="v", spacing="linspace", **options)
    table.save(str(tmp_path / "t.json"))
    again = StepTable.load(str(tmp_path / "t.json"))
    assert same(again, table)
    assert again.timesteps.dtype == torch.int64
    expected = {"solver": solver, "steps": 7, "spacing": "linspace", **options, "schedule": SCHEDULE.config()}
    assert again.made_for == expected
    assert (again.solver, again.steps, len(again), again.weights) == (solver, 7, 7, None)


def test_steps_are_those_of_the_solver_and_rows_those_of_the_network():
    assert (learned().steps, len(learned())) == (3, 4)


NAN, INF = math.nan, math.inf
DAMAGES = [
    ("kind", None, "kind: got None"),
    ("kind", "table", "kind: got 'table'"),
    ("format_version", 2, "format_version: got 2, needs 1"),
    ("prediction", "score", "prediction: got 'score'"),
    ("prediction", None, "prediction: got 'None'"),
    ("clip", 0, "clip: got 0"),
    ("clip", -1.0, "clip: got -1"),
    ("clip", "1", "clip: got"),
    ("clip", NAN, "clip: got"),
    ("timesteps", [], r"timesteps: got \[\]"),
    ("timesteps", None, "timesteps: got None"),
    ("timesteps", [3, 2, 1], "coefficients: got"),
    ("timesteps", [4, 3, 2, 3], "timesteps: got .*never ascend"),
    ("timesteps", [4, 3, 2, 0], "timesteps: got .*needs numbers > 0"),
    ("timesteps", [4, 3, 2, True], "timesteps: got"),
    ("timesteps", [4, 3, "2", 1], "timesteps: got"),
    ("timesteps", [INF, 3, 2, 1], "timesteps: got"),
    ("timesteps", [10**400, 3, 2, 1], "timesteps: got"),
    ("timesteps", [1 << 70, 3, 2, 1], "timesteps: got"),
    ("coefficients", None, "coefficients"),
    ("coefficients", [], "coefficients: needs rows of 7"),
    ("coefficients", [[0.0] * 7] * 3 + [[10**400] + [0] * 6], "coefficients"),
    ("coefficients", [[0.0] * 7] * 3, r"coefficients: got \[3, 7\], needs \[4, 7\]"),
    ("coefficients", [[0.0] * 6] * 4, "coefficients: needs rows of 7"),
    ("coefficients", [[0.0] * 7] * 3 + [None], "coefficients"),
    ("coefficients", [[0.0] * 7] * 3 + [[NAN] * 7], "coefficients"),
    ("coefficients", [[0.0] * 7] * 3 + [[1e39] + [0.0] * 6], "coefficients: beyond float32"),
    ("coefficients", [[0.0] * 7] * 3 + [[0.5] * 7], r"coefficients: the last row adds noise \(0.5\)"),
    ("guidance_scale", None, "guidance_scale: got None"),
    ("guidance_scale", [1.0], r"guidance_scale: got \[1\], needs \[4\]"),
    ("guidance_scale", [1.0, 1.0, 1.0, NAN], "guidance_scale: got"),
    ("noise_steps", None, "noise_steps: got None"),
    ("noise_steps", [3, 2, 1], r"noise_steps: got \[3\], needs \[4\]"),
    ("noise_steps", [4, 3, 2, 1.5], "noise_steps: got .*integers"),
    ("noise_steps", [4, 3, 2, -1], "noise_steps: got .*integers"),
    ("noise_steps", [1 << 24, 3, 2, 1], "noise_steps: got .*integers"),
    ("begins", None, "begins: got None"),
    ("begins", [], r"begins: got \[\]"),
    ("begins", [True, True], r"begins: got \[2\], needs \[4\]"),
    ("begins", [1, 1, 1, 1], "begins: got"),
    ("begins", [False, True, True, True], "begins: got .*the first true"),
    ("weights", 7, "weights"),
    ("made_for", None, "made_for"),
    ("made_for", [], "made_for"),
    ("made_for", {"schedule": "cosine"}, "made_for: its schedule is cosine"),
]


@pytest.mark.parametrize(("field", "value", "message"), DAMAGES)
def test_a_damaged_file_is_one_error_naming_file_and_field(tmp_path, field, value, message):
    path = tmp_path / "t.json"
    path.write_text(json.dumps(learned().asdict() | {field: value}))
    with pytest.raises(BadInput, match=message) as refusal:
        StepTable.load(path)
    assert str(refusal.value).startswith(f"{path}: no usable step table: ")


@pytest.mark.parametrize("field", learned().asdict())
def test_a_file_that_lacks_a_field_is_refused(tmp_path, field):
    path = tmp_path / "t.json"
    content = learned().asdict()
    del content[field]
    path.write_text(json.dumps(content))
    with pytest.raises(BadInput, match=f"no usable step table: {field}: "):
        StepTable.load(path)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "not readable JSON"), ("[1]", "found a JSON list"), ("", "JSON")]
)
def test_a_file_without_a_table(tmp_path, content, message):
    path = tmp_path / "t.json"
    path.write_text(content)
    with pytest.raises(BadInput, match=message):
        StepTable.load(path)
    with pytest.raises(BadInput, match="no such file"):
        StepTable.load(tmp_path / "gone.json")


# --- from the middle --------------------------------------------------------------------------------------------


def run(table, x, first=0):
    """The table's rows from one on, in float64, with an empty memory: x0_previous of the first is its own x0."""
    x0_previous = None
    for t, k in list(zip(table.timesteps.tolist(), table.coefficients.tolist(), strict=True))[first:]:
        m = np.sin(3 * x + t)
        x0 = k[0] * x + k[1] * m
        x0_previous = x0 if x0_previous is None else x0_previous
        x, x0_previous = k[2] * x + k[3] * x0 + k[4] * m + k[5] * x0_previous + k[6], x0
    return x


@pytest.mark.parametrize(("solver", "options"), EVERY_SOLVER)
@pytest.mark.parametrize("k", [0, 1, 4, 9])
def test_from_the_middle_it_is_the_rest_of_the_table(solver, options, k):
    table = make_table(SCHEDULE, solver, 10, prediction="v", clip=1.0, **options)
    rest = table.from_row(k)
    assert torch.equal(rest.timesteps, table.timesteps[k:])
    assert torch.equal(rest.noise_steps, table.noise_steps[k:])
    assert (rest.clip, rest.prediction, rest.made_for["from_row"]) == (1.0, "v", k)
    assert rest.coefficients[0, 5] == 0
    x = np.random.default_rng(0).standard_normal(50)
    np.testing.assert_allclose(run(rest, x), run(table, x, k), rtol=1e-12, atol=1e-12)
    assert same(table, make_table(SCHEDULE, solver, 10, prediction="v", clip=1.0, **options))


class Bent(nn.Module):
    sample_shape, condition_shape = (2,), (2,)

    def forward(self, x, t, c=None):
        condition = 0.0 if c is None else c
        return torch.tanh(3 * x * t[:, None] + condition)


@pytest.mark.parametrize("engine", ["eager", "fused"])
def test_a_trajectory_goes_on_from_the_middle(engine):
    """DDIM has no memory: its second half ends where the whole one does."""
    table = make_table(SCHEDULE, "ddim", 8, prediction="v")
    first = StepTable(table.timesteps[:4], table.coefficients[:4], prediction="v")
    middle = Trajectory(Bent(), SCHEDULE, first, engine=engine)(3, seed=1)
    end = Trajectory(Bent(), SCHEDULE, table.from_row(4), engine=engine)(3, x_T=middle)
    assert distance(end, Trajectory(Bent(), SCHEDULE, table, engine=engine)(3, seed=1)) < 1e-5


def test_what_cannot_be_cut():
    pair = StepTable(torch.tensor([3, 2, 1]), torch.zeros(3, 7).double(), begins=torch.tensor([True, False, True]))
    assert len(pair.from_row(2)) == 1
    with pytest.raises(ValueError, match="row: got 1, which continues a step"):
        pair.from_row(1)
    for k in (-1, 3):
        with pytest.raises(ValueError, match=rf"row: got {k}, needs 0\.\.2"):
            pair.from_row(k)
    with pytest.raises(ValueError, match="from_row: got a learned table"):
        learned().from_row(0)


# --- what make_table refuses ------------------------------------------------------------------------------------

REFUSED = [
    ("ddpm", {"eta": 0.0}),
    ("ddpm", {"eta": 0.5}),
    ("dpmpp_2m", {"eta": 1.0}),
    ("ddim", {"variance": "posterior"}),
    ("dpmpp_2m", {"variance": "beta"}),
    ("ddim", {"rho": 7}),
    ("ddpm", {"strenght": 0.5}),
]


@pytest.mark.parametrize(("solver", "option"), REFUSED)
def test_an_option_that_a_solver_does_not_take_is_refused_by_name(solver, option):
    ((name, value),) = option.items()
    message = f"^{name}: got {value!r}, but solver '{solver}' takes only steps, prediction, clip, spacing"
    with pytest.raises(ValueError, match=message):
        make_table(SCHEDULE, solver, 5, **option)
    with pytest.raises(ValueError, match=message):
        sample(Bent(), SCHEDULE, 1, solver=solver, steps=5, **option)


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmpp_2m"])
def test_none_is_not_given(solver):
    none = dict.fromkeys(("steps", "eta", "variance", "prediction", "clip", "spacing", "anything"))
    assert same(make_table(SCHEDULE, solver, **none), make_table(SCHEDULE, solver))


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, {"solver": "ddim", "steps": 9, "eta": 0.5}),
        ({"eta": None, "solver": None}, {"solver": "ddim", "steps": 9, "eta": 0.5}),
        ({"solver": "ddim", "steps": 4}, {"solver": "ddim", "steps": 4, "eta": 0.5}),
        ({"solver": "ddpm"}, {"solver": "ddpm"}),
        ({"solver": "ddpm", "variance": "beta", "steps": 3}, {"solver": "ddpm", "steps": 3, "variance": "beta"}),
        ({"solver": "ddpm", "clip": 0.0}, {"solver": "ddpm", "clip": 0.0}),
    ],
)
def test_a_run_s_options_belong_to_its_own_solver(asked, expected):
    stored = {"solver": "ddim", "steps": 9, "eta": 0.5, "clip": 1.0, "spacing": "leading", "prediction": "v"}
    shared = {"clip": 1.0, "spacing": "leading", "prediction": "v"}
    assert carried_over(stored, asked) == shared | expected
    assert carried_over(stored | {"variance": None}, asked) == shared | expected


def test_options_of_a_run(unet, digits_run, tmp_path):
    shutil.copytree(digits_run, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    config["sampling"] |= {"variance": "beta", "steps": 10, "spacing": "linspace"}
    path.write_text(json.dumps(config))
    opened = load_run(tmp_path / "run")
    shared = {"prediction": "eps", "clip": 1.0, "spacing": "linspace"}
    assert opened.options() == {"solver": "ddpm", "steps": 10, "variance": "beta"} | shared
    assert opened.options(solver="ddim", steps=5) == {"solver": "ddim", "steps": 5} | shared
    own = sample(opened.model, opened.schedule, 2, **opened.sampling)
    assert torch.equal(own, sample(opened.model, opened.schedule, 2, **opened.options()))


# --- guidance by row --------------------------------------------------------------------------------------------

HERE = [
    pytest.param(name, marks=pytest.mark.long if name == "compile" else ())
    for name in engines.ENGINES
    if engines.unavailable_reason(name, torch.device("cpu"), form=PlainForm) is None
]


@torch.no_grad()
@pytest.mark.parametrize("engine", HERE)
def test_guidance_is_scaled_by_row(engine, plain_normals):
    scales = [0.0, 1.0, 0.5, 2.0, 0.0]
    table = make_table(SCHEDULE, "ddpm", 5, prediction="v")
    table = replace(table, guidance_scale=torch.tensor(scales, dtype=torch.float64))
    w, c = 3.0, torch.tensor([0.5, -1.0])
    images = Trajectory(Bent(), SCHEDULE, table, engine=engine, guided=True)(3, c, w, seed=3)
    x = torch.from_numpy(plain_normals(3, range(3), 0, 0, (2,)))
    for t, k, scale in zip(table.timesteps.tolist(), table.coefficients.tolist(), scales, strict=True):
        with_c, without = torch.tanh(3 * x * t / 40 + c), torch.tanh(3 * x * t / 40)
        m = without + (1 + scale * (w - 1)) * (with_c - without)
        z = torch.from_numpy(plain_normals(3, range(3), t, 1, (2,)))
        x = k[2] * x + k[3] * (k[0] * x + k[1] * m) + k[4] * m + k[6] * z
    assert distance(images, x) < 1e-5
    table = replace(table, guidance_scale=torch.zeros(5, dtype=torch.float64))
    nowhere = Trajectory(Bent(), SCHEDULE, table, engine=engine, guided=True)(3, c, w, seed=3)
    plain = sample(Bent(), SCHEDULE, 3, steps=5, prediction="v", context=c, seed=3, engine=engine)
    assert distance(nowhere, plain) < 1e-5
    assert distance(images, plain) > 1e-2


# --- ddpm sample --solver FILE.json -----------------------------------------------------------------------------


@pytest.fixture
def pictures(ddpm, tmp_path):
    """pictures(run, ...): what `ddpm sample --npy` writes."""

    def call(run, *options):
        answer = ddpm("sample", run, "--n", 3, "--npy", tmp_path / "x.npy", *options)
        assert answer.code == 0, answer.err
        return np.load(tmp_path / "x.npy")

    return call


def of_run(digits_run, solver="ddim", **options):
    opened = load_run(digits_run)
    return make_table(opened.schedule, **opened.options(solver=solver, **options))


def test_a_file_draws_what_the_solver_draws(digits_run, pictures, ddpm, tmp_path):
    path, how = tmp_path / "fast.json", ("--context", "all", "--guidance", 2, "--seed", 4)
    of_run(digits_run, steps=6, eta=0.5).save(path)
    named = pictures(digits_run, "--solver", "ddim", "--steps", 6, "--eta", 0.5, *how)
    png = ("--out", tmp_path / "x.png")
    assert np.array_equal(pictures(digits_run, "--solver", path, *how, *png), named)
    assert distance(named, pictures(digits_run, "--solver", "ddim", "--steps", 6, *how)) > 1e-3
    assert ddpm("evaluate", digits_run, "--n", 12, "--solver", path, "--json", tmp_path / "e.json").code == 0
    figures = json.loads((tmp_path / "e.json").read_text())
    assert (figures["solver"], figures["steps"]) == ("ddim", 6)


def test_a_table_learned_for_these_weights_is_taken(digits_run, pictures, tmp_path):
    path, weights = tmp_path / "t.json", digest_of(load_run(digits_run).model.state_dict())
    replace(of_run(digits_run, steps=4), weights=weights).save(path)
    assert np.array_equal(
        pictures(digits_run, "--solver", path), pictures(digits_run, "--solver", "ddim", "--steps", 4)
    )


def test_tables_for_something_else_are_refused(digits_run, ddpm, tmp_path):
    path, npy = tmp_path / "t.json", tmp_path / "x.npy"
    good = of_run(digits_run, steps=4).asdict()
    other = NoiseSchedule.make("cosine", 20).config()
    cases = [
        ({"made_for": good["made_for"] | {"schedule": other}}, (), "made for another noise schedule", "cosine"),
        ({"prediction": "v"}, (), "is for networks that predict v", "predicts eps"),
        ({"weights": "00" * 32}, (), "was learned for other weights"),
        ({"made_for": {}, "timesteps": [21, 10, 5, 2]}, (), "starts at timestep 21", "has 20"),
        ({"coefficients": []}, (), "no usable step table"),
        ({}, ("--steps", 4), "--steps: got 4 beside --solver"),
        ({}, ("--eta", 0), "--eta: got 0.0 beside --solver"),
        ({}, ("--clip", 0), "--clip: got 0.0 beside --solver"),
        ({}, ("--spacing", "leading"), "--spacing: got leading beside --solver"),
        ({}, ("--variance", "beta"), "--variance: got beta beside --solver"),
    ]
    for damage, options, *words in cases:
        path.write_text(json.dumps(good | damage))
        answer = ddpm("sample", digits_run, "--n", 1, "--npy", npy, "--solver", path, *options)
        assert (answer.code, len(answer.err.splitlines())) == (2, 1), answer
        assert str(path) in answer.err
        assert all(word in answer.err for word in words), answer.err
    path.write_text("no table")
    assert "not readable JSON" in ddpm("sample", digits_run, "--n", 1, "--npy", npy, "--solver", path).err
    assert not npy.exists()


def test_a_run_may_not_have_options_that_its_solver_does_not_take(unet):
    with pytest.raises(ValueError, match=r"eta: got 0\.5, but solver 'ddpm' takes only"):
        make_config(unet(), SCHEDULE, "v", sampling={"eta": 0.5})


def test_numpy_numbers_are_stored_like_others(tmp_path):
    table = make_table(SCHEDULE, "ddim", np.int64(3), eta=np.float32(0.5), clip=np.float64(1.0))
    table.save(tmp_path / "t.json")
    assert torch.equal(StepTable.load(tmp_path / "t.json").coefficients, table.coefficients)


def test_a_bound_beyond_all_numbers_is_refused():
    with pytest.raises(ValueError, match="clip: got inf, needs a finite bound"):
        make_table(SCHEDULE, "ddim", 3, clip=math.inf)


def test_a_solver_that_returns_other_rows_is_named():
    SOLVERS["short"] = lambda alpha_bars, prediction: [[0.0] * 6] * (len(alpha_bars) - 1)
    try:
        with pytest.raises(ValueError, match="solver: 'short' returned 3 rows, needs 3 of 7 numbers"):
            make_table(SCHEDULE, "short", 3)
    finally:
        del SOLVERS["short"]


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match=r"solver: 'ddim' is ddpm\.solvers\.ddim, needs another name"):
        solver("ddim")(lambda alpha_bars, prediction: [])
