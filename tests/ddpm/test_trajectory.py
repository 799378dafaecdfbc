"""A trajectory is prepared once and run many times; `sample` is one that is run once and never stale."""

import gc
import math
from weakref import ref

import pytest
import torch

from ddpm import NoiseSchedule, PointMLP, StepTable, Trajectory, inference, make_table, sample
from ddpm.errors import WorkFailed
from ddpm.inference import ContextUnetForm, make_form
from ddpm.metrics import distance
from kernels import philox

SCHEDULE = NoiseSchedule.make("cosine", 20)
STEPS = 5
WAYS = {
    "ddpm": {},
    "ddim, clipped": {"solver": "ddim", "clip": 1.0},
    "dpmpp_2m": {"solver": "dpmpp_2m"},
    "ddpm guided": {"guidance": 2.5},
    "dpmpp_2m guided": {"solver": "dpmpp_2m", "guidance": 2.5},
    "unconditional": {"context": None},
    "other samples": {"seed": 9, "first_sample": 1 << 40},
}
RUN = ("context", "guidance", "seed", "first_sample", "batch_size", "noise", "callback")
ENGINES = ["eager", "fused"]


@pytest.fixture(scope="module")
def model(unet):
    return unet()


def contexts(n):
    return torch.eye(5)[torch.arange(n) % 5]


def table(solver="ddpm", **options):
    return make_table(SCHEDULE, solver, STEPS, prediction="v", **options)


def trajectory(model, engine="fused", guided=True, **options):
    return Trajectory(model, SCHEDULE, table(**options), engine=engine, guided=guided)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("way", WAYS)
def test_it_draws_what_sample_does(model, engine, way):
    options = {"context": contexts(3), "seed": 3} | WAYS[way]
    run = {name: options.pop(name) for name in RUN if name in options}
    prepared = trajectory(model, engine, **options)
    expected = sample(model, SCHEDULE, 3, steps=STEPS, prediction="v", engine=engine, **run, **options)
    assert torch.equal(prepared(3, **run), expected)
    assert torch.equal(prepared(3, **run), expected)
    assert torch.equal(sample(model, SCHEDULE, 3, table=table(**options), engine=engine, **run), expected)


def test_a_second_call_prepares_nothing(model, monkeypatch):
    prepared = trajectory(model)
    first = prepared(2, contexts(2), 2.0)
    for name in ("__init__", "refresh", "tables"):
        monkeypatch.setattr(ContextUnetForm, name, lambda *_: pytest.fail("prepared again"))
    monkeypatch.setattr(inference.Snapshot, "same_tensors", lambda *_: pytest.fail("compared weights"))
    assert torch.equal(prepared(2, contexts(2), 2.0), first)
    assert prepared(3, contexts(3), seed=1).shape == (3, 3, 16, 16)


def test_it_keeps_its_weights_until_refresh_and_sample_is_never_stale(unet):
    model = unet()
    prepared, following = trajectory(model), trajectory(model, "eager")
    c = contexts(2)
    before = prepared(2, c, 2.0)

    def train():
        model.train()
        model(torch.randn(4, 3, 16, 16), torch.rand(4)).square().mean().backward()
        torch.optim.SGD(model.parameters(), lr=0.05).step()
        model.eval()

    for change in (lambda: model.out[3].weight.data.mul_(1.5), train):
        change()
        assert torch.equal(prepared(2, c, 2.0), before)
        now = sample(model, SCHEDULE, 2, context=c, guidance=2.0, table=table(), engine="fused")
        assert distance(now, before) > 1e-3
        assert distance(following(2, c, 2.0), now) < 1e-4
        assert torch.equal(prepared(2, c, 2.0), before)
        prepared.refresh()
        before = prepared(2, c, 2.0)
        assert torch.equal(before, now)


def test_refresh_keeps_the_form_where_it_serves(unet):
    model = unet()
    prepared = trajectory(model)
    form = prepared._prepared(custom_noise=False).form
    prepared.refresh()
    assert prepared._prepared(custom_noise=False).form is form
    model.up1.register_forward_hook(lambda module, arguments, output: 1.1 * output)
    prepared.refresh()
    expected = sample(model, SCHEDULE, 2, table=table(), engine="eager")
    assert distance(prepared(2), expected) < 1e-5
    assert distance(sample(model, SCHEDULE, 2, table=table(), engine="fused"), expected) < 1e-5


def test_a_network_without_a_form_is_followed_live():
    torch.manual_seed(0)
    points = PointMLP(2, 16).eval()
    prepared = trajectory(points, guided=False)
    before = prepared(4)
    points.out.bias.data.add_(0.1)
    after = prepared(4)
    assert distance(after, before) > 1e-3
    assert distance(after, sample(points, SCHEDULE, 4, table=table(), engine="eager")) < 1e-5


def test_trajectories_of_one_model_do_not_disturb_each_other(unet):
    model = unet()
    c, how = contexts(2), {"table": table(), "engine": "fused"}
    first = trajectory(model)
    of_first = first(2, c)
    kept = sample(model, SCHEDULE, 2, context=c, **how)
    model.out[3].bias.data.add_(0.5)
    second = trajectory(model)
    of_second = second(2, c)
    assert distance(of_second, of_first) > 1e-2
    assert torch.equal(first(2, c), of_first)
    assert torch.equal(sample(model, SCHEDULE, 2, context=c, **how), of_second)
    model.out[3].bias.data.sub_(0.5)
    assert distance(sample(model, SCHEDULE, 2, context=c, **how), kept) < 1e-6
    second.refresh()
    assert torch.equal(first(2, c), of_first)
    assert distance(second(2, c), of_first) < 1e-6


def test_a_trajectory_s_form_is_its_own(model):
    form = inference.kept_form(model, torch.float32)
    assert trajectory(model)._prepared(custom_noise=False).form is not form
    assert inference.kept_form(model, torch.float32) is form
    assert make_form(model, torch.float32) is not form


@pytest.mark.parametrize("engine", ENGINES)
def test_x_T_is_where_it_starts(model, engine):  # noqa: N802
    prepared, samples = trajectory(model, engine), torch.arange(4, 7)
    x = philox.normal(7, samples, 0, 0, (3, 16, 16))
    before = x.clone()
    options = {"context": contexts(3), "guidance": 2.0, "seed": 7, "first_sample": 4}
    expected = prepared(3, **options)
    assert torch.equal(prepared(3, **options, x_T=x), expected)
    assert distance(prepared(3, **options, x_T=x.double(), batch_size=2), expected) < 1e-5
    assert torch.equal(x, before)
    assert distance(prepared(3, **options, x_T=-x), expected) > 0.1
    with pytest.raises(ValueError, match=r"x_T: got \[3, 16, 16\], needs \[3, 3, 16, 16\]"):
        prepared(3, **options, x_T=x[0])


@pytest.mark.parametrize("engine", ENGINES)
def test_it_does_not_depend_on_how_the_work_is_split(model, engine):
    prepared, c = trajectory(model, engine), contexts(5)
    whole = prepared(5, c, 2.0, seed=3)
    assert whole.dtype == torch.float32
    for batch_size in (1, 2, 4, 100):
        assert distance(prepared(5, c, 2.0, seed=3, batch_size=batch_size), whole) < 1e-5
    parts = [prepared(2, c[:2], 2.0, seed=3), prepared(3, c[2:], 2.0, seed=3, first_sample=2)]
    assert distance(torch.cat(parts), whole) < 1e-5


@pytest.mark.parametrize("engine", ["eager", "fused", "auto"])
def test_a_noise_of_one_s_own_is_asked_for_by_sample_step_and_stream(model, engine):
    calls = []

    def noise(samples, step, stream, shape):
        calls.append((samples.tolist(), int(step), int(stream)))
        return philox.normal(3, samples, step, stream, shape)

    prepared = trajectory(model, engine)
    images = prepared(2, contexts(2), first_sample=6, noise=noise)
    steps = table().timesteps.tolist()[:-1]
    assert calls == [([6, 7], step, stream) for step, stream in [(0, 0), *((step, 1) for step in steps)]]
    assert distance(images, prepared(2, contexts(2), first_sample=6, seed=3)) < 1e-6


def test_a_noise_of_one_s_own_takes_an_engine_that_can_with_the_same_form(model, monkeypatch):
    """As engine native, which draws its own noise and `auto` goes on with fused."""
    from ddpm.engines import ENGINES, FusedEngine

    class Proud(FusedEngine):
        name = "native"

        @classmethod
        def lacks(cls, device, dtype=torch.float32, custom_noise=False):
            return "Philox noise" if custom_noise else None

    monkeypatch.setitem(ENGINES, "native", Proud)
    prepared = trajectory(model, "auto")
    assert prepared.engine == "native"
    expected = prepared(2, seed=3)
    images = prepared(2, noise=lambda *where: philox.normal(3, *where))
    assert distance(images, expected) < 1e-6
    proud, other = (prepared._prepared(custom_noise=own) for own in (False, True))
    assert (type(other), other.form is proud.form) == (FusedEngine, True)
    with pytest.raises(RuntimeError, match="engine: 'native' in float32 needs Philox noise"):
        trajectory(model, "native")(2, noise=lambda *where: philox.normal(3, *where))


def test_a_callback_sees_every_row_of_every_chunk(model):
    seen = []
    prepared = trajectory(model)
    whole = prepared(3, contexts(3), batch_size=2, callback=lambda row, x0: seen.append((row, x0.clone())))
    assert [(row, len(x0)) for row, x0 in seen] == [(row, n) for n in (2, 1) for row in range(STEPS)]
    assert distance(torch.cat([x0 for row, x0 in seen if row == STEPS - 1]), whole) < 1e-6


@pytest.mark.parametrize("engine", ENGINES)
def test_every_module_gets_its_mode_back(unet, engine):
    model = unet().train()
    model.down1.eval()
    modes = [module.training for module in model.modules()]
    statistics = model.init_conv.conv1[1].running_mean.clone()
    prepared = trajectory(model, engine)
    images = prepared(2, contexts(2))

    def fail(row, x0):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared(2, contexts(2), callback=fail)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model.init_conv.conv1[1].running_mean, statistics)
    assert torch.equal(images, prepared(2, contexts(2)))
    assert not images.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_type_is_the_network_s_alone(model, dtype, monkeypatch):
    monkeypatch.setattr("ddpm.precision.has_bfloat16", lambda: True)
    expected = trajectory(model)(2, contexts(2), 2.0)
    for engine in ENGINES:
        prepared = Trajectory(model, SCHEDULE, table(), engine=engine, dtype=dtype, guided=True)
        images = prepared(2, contexts(2), 2.0)
        assert images.dtype == torch.float32
        assert 0 < distance(images, expected) < (0.1 if dtype == torch.bfloat16 else 1e-5)
    assert next(model.parameters()).dtype == torch.float32


def test_it_leaves_nothing_behind(unet):
    model = unet()
    prepared, held = trajectory(model), len(inference._kept)
    prepared(1)
    assert len(inference._kept) == held
    form = ref(prepared._prepared(custom_noise=False).form)
    del prepared
    gc.collect()
    assert form() is None


class Continuous(torch.nn.Module):
    sample_shape = (2,)

    def forward(self, x, t, c=None):
        return 0.3 * x * t[:, None]


@torch.no_grad()
def test_a_table_of_fractions_and_scales_is_run_as_it_says(plain_normals):
    """Real times for the network; noise by row number; equal neighbours; on both engines."""
    coefficients = torch.rand(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.5
    coefficients[-1, 6] = 0.0
    times = torch.tensor([19.5, 12.25, 12.25, 0.5], dtype=torch.float64)
    fractional = StepTable(times, coefficients, clip=0.7)
    x, x0_previous = plain_normals(3, range(3), 0, 0, (2,)), 0.0
    for i, (t, k) in enumerate(zip(times.tolist(), coefficients.tolist(), strict=True)):
        m = 0.3 * x * t / 20
        x0 = (k[0] * x + k[1] * m).clip(-0.7, 0.7)
        z = plain_normals(3, range(3), i, 1, (2,)) if k[6] else 0.0
        x, x0_previous = k[2] * x + k[3] * x0 + k[4] * m + k[5] * x0_previous + k[6] * z, x0
    for engine in ENGINES:
        images = Trajectory(Continuous(), SCHEDULE, fractional, engine=engine)(3, seed=3)
        assert distance(images, torch.from_numpy(x)) < 1e-6
    discrete = Continuous()
    discrete.continuous_time = False
    for engine in ENGINES:
        with pytest.raises(ValueError, match="Continuous takes whole timesteps only"):
            Trajectory(discrete, SCHEDULE, fractional, engine=engine)


CALLS = [
    ({"n": 0}, "n: got 0, needs an integer >= 1"),
    ({"n": 2.0}, "n: got 2.0"),
    ({"seed": -1}, "seed: got -1"),
    ({"first_sample": -1}, "first_sample: got -1"),
    ({"batch_size": 0}, "batch_size: got 0"),
    ({"guidance": math.nan, "context": [0.0] * 5}, "guidance: got nan"),
    ({"guidance": 2.0}, "guidance: got 2.0 without a context"),
    ({"guidance": 1e300, "context": [0.0] * 5}, r"guidance: got 1e\+300, needs a finite number in float32"),
    ({"guidance": "2", "context": [0.0] * 5}, "guidance: got '2', needs a finite number in float32"),
    ({"guidance": None}, "guidance: got None, needs a finite number in float32"),
    ({"guidance": torch.ones(3)}, r"guidance: got weights \[3\], needs a number or \[2\], one for each sample"),
    ({"context": "sprite"}, "context: got a str, needs a tensor or numbers"),
    ({"context": [1e39] * 5}, "context: got NaN or infinite values"),
    ({"x_T": 3}, r"x_T: got a int, needs \[2, 3, 16, 16\]"),
    ({"noise": 3}, "noise: got a int, needs a function"),
    ({"callback": 3}, "callback: got a int, needs a function"),
    ({"context": [0.0] * 4}, r"context: got shape \[4\], needs \[2, 5\] or \[5\]"),
    ({"context": torch.zeros(3, 5)}, r"context: got shape \[3, 5\], needs \[2, 5\] or \[5\]"),
    ({"context": [math.nan] * 5}, "context: got NaN or infinite values"),
]


@pytest.mark.parametrize(("change", "message"), CALLS)
def test_bad_calls(model, change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        trajectory(model)(**{"n": 2} | change)


class Breaks(torch.nn.Module):
    """Its output is no number for samples with the context 1 from t = T / 2 on."""

    sample_shape, condition_shape = (2,), (1,)

    def forward(self, x, t, c=None):
        return 0.1 * x / (1 - c * (t[:, None] <= 0.5).to(x))


@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("engine", ENGINES)
def test_samples_that_are_not_finite_are_named_with_their_first_step(engine, size):
    prepared = Trajectory(Breaks(), SCHEDULE, table(), engine=engine)  # t = 20, 16, 12, 8, 4
    seen, context = [], torch.tensor([0.0, 0, 0, 1, 0, 1])[:, None]
    found = r"sample 13 is not finite from step 4 of 5 \(t = 8\) on, nor are 1 more of 6: needs"
    with pytest.raises(WorkFailed, match=found):
        prepared(6, context, first_sample=10, batch_size=size, callback=lambda row, x0: seen.append(row))
    assert len(seen) == STEPS * (1 if size is None else 3)
    assert prepared(5, torch.zeros(1)).isfinite().all()


def test_a_callback_is_not_asked_where_no_step_is_found():
    """A noise that is no function of its arguments: another run shows nothing, which is said."""
    draws = iter([math.nan])
    noise = lambda samples, step, stream, shape: torch.full((len(samples), *shape), next(draws, 0.0))  # noqa: E731
    with pytest.raises(WorkFailed, match="sample 0 is not finite at the end, nor are 1 more of 2"):
        Trajectory(Continuous(), SCHEDULE, table("ddim"), engine="eager")(2, noise=noise)


def test_more_samples_than_any_memory_holds_are_refused_at_once(model):
    with pytest.raises(ValueError, match=r"n: got 1000000000000, which are 3.07e\+06 GB of samples, needs at most"):
        trajectory(model)(10**12)


def test_a_model_without_weights_is_refused(unet):
    with pytest.raises(ValueError, match="model: is on the device meta, which holds no weights"):
        trajectory(unet().to("meta"))


def test_the_default_device_is_nobody_s(model):
    expected = trajectory(model)(2, [1.0, 0, 0, 0, 0])
    torch.set_default_device("meta")
    try:
        images = [trajectory(model, engine)(2, [1.0, 0, 0, 0, 0]) for engine in ENGINES]
    finally:
        torch.set_default_device(None)
    assert all(distance(image, expected) < 1e-5 for image in images)


def test_hooks_on_every_module_are_obeyed_by_eager_and_refused_by_the_others(model, caplog):
    expected, prepared = trajectory(model, "eager")(2), trajectory(model, "auto")
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, arguments, output: output + 0.01)
    try:
        with pytest.raises(RuntimeError, match="needs a process without forward hooks on every module: take eager"):
            trajectory(model, "fused")
        with caplog.at_level("INFO", logger="ddpm"):
            hooked = trajectory(model, "auto")
        assert hooked.engine == "eager"
        assert distance(hooked(2), expected) > 1e-3
        prepared.refresh()
        assert torch.equal(prepared(2), hooked(2))
    finally:
        hook.remove()
    assert "fused needs a process without forward hooks on every module" in caplog.text


def test_guidance_needs_a_trajectory_that_was_prepared_for_it(model):
    prepared = trajectory(model, guided=False)
    prepared(1, contexts(1))
    with pytest.raises(ValueError, match=r"guidance: got 2\.0, but this trajectory was prepared without guided=True"):
        prepared(1, contexts(1), 2.0)


def test_what_cannot_be_prepared(model):
    with pytest.raises(TypeError, match="table: got a str, needs a StepTable"):
        Trajectory(model, SCHEDULE, "ddpm")
    for dtype in ("bf16x3", torch.int32, None):
        with pytest.raises(TypeError, match=r"dtype: got .*needs a floating type"):
            Trajectory(model, SCHEDULE, table(), dtype=dtype)
    with pytest.raises(ValueError, match="engine: got 'warp'"):
        Trajectory(model, SCHEDULE, table(), engine="warp")
    with pytest.raises(RuntimeError, match="'graph' in float32 needs a CUDA device"):
        Trajectory(model.cpu(), SCHEDULE, table(), engine="graph")
    longer = make_table(NoiseSchedule.make("cosine", 30), "ddim", 4)
    with pytest.raises(ValueError, match="table: starts at timestep 30, the schedule ends at 20"):
        Trajectory(model, SCHEDULE, longer)
    with pytest.raises(TypeError, match="model: Linear needs an attribute sample_shape"):
        Trajectory(torch.nn.Linear(2, 2), SCHEDULE, table())


@pytest.mark.parametrize("beside", [{"solver": "ddim"}, {"steps": 3}, {"eta": 0.5}, {"clip": 1.0}, {"prediction": "v"}])
def test_sample_takes_a_table_or_what_makes_one(model, beside):
    name, value = next(iter(beside.items()))
    with pytest.raises(ValueError, match=f"{name}: got {value!r} beside a table, which has its own"):
        sample(model, SCHEDULE, 1, table=table(), **beside)


def test_what_is_no_tensor_is_named():
    class Wrapped(torch.nn.Module):
        sample_shape = (2,)

        def forward(self, x, t, c=None):
            return (x,)

    for engine in ("eager", "fused"):
        with pytest.raises(TypeError, match="model: returned a tuple, needs a tensor"):
            Trajectory(Wrapped(), SCHEDULE, make_table(SCHEDULE, "ddim", 3), engine=engine)(1)
