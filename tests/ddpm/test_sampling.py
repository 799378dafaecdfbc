"""`sample` on the eager engine: one picture per (weights, table, seed, index), whatever else changes."""

import logging
import math

import pytest
import torch

from ddpm import ContextUnet, NoiseSchedule, PointMLP, make_table, sample
from ddpm.metrics import distance
from kernels import philox, solver_step

SCHEDULE = NoiseSchedule.make("linear", 50, 1e-3, 0.2)
STEPS = 8
WAYS = {
    "ddpm": {"solver": "ddpm"},
    "ddim": {"solver": "ddim", "clip": 1.0},
    "dpmpp_2m": {"solver": "dpmpp_2m"},
    "ddpm guided": {"solver": "ddpm", "guidance": 2.5},
    "dpmpp_2m guided": {"solver": "dpmpp_2m", "guidance": 2.5},
}


class SaneUnet(torch.nn.Module):
    """A small ContextUnet in a frame that keeps trajectories of order 1, as trained weights do.

    The network, its BatchNorm statistics measured, gives v / 0.3; out comes eps = sqrt(1 - ab) x + sqrt(ab) v, so
    that the predicted x0 = sqrt(ab) x - sqrt(1 - ab) v never explodes.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = ContextUnet(3, n_feat=8, n_cfeat=5, height=16)
        for module in self.net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        self.net(torch.randn(16, 3, 16, 16), torch.rand(16), torch.rand(16, 5))
        self.register_buffer("alpha_bars", SCHEDULE.alpha_bars.clone())
        self.sample_shape = (3, 16, 16)

    def forward(self, x, t, c=None):
        ab = self.alpha_bars[(t.double() * SCHEDULE.timesteps).round().long()].to(x.dtype)[:, None, None, None]
        return (1 - ab).sqrt() * x + ab.sqrt() * 0.3 * self.net(x, t, None if c is None else 2 * c)


class Recorder(torch.nn.Module):
    """Remembers its arguments; predicts no noise."""

    def __init__(self, sample_shape=(2,)):
        super().__init__()
        self.sample_shape, self.calls = sample_shape, []

    def forward(self, x, t, c=None):
        self.calls.append((x.clone(), t.clone(), None if c is None else c.clone()))
        return torch.zeros_like(x)


@pytest.fixture(scope="module")
def model():
    return SaneUnet().eval()


def contexts(n):
    """[n, 5], mixed between classes."""
    return torch.rand(n, 5, generator=torch.Generator().manual_seed(1))


def draw(model, n=8, **options):
    """n samples with mixed contexts."""
    first = options.get("first_sample", 0)
    arguments = {"steps": STEPS, "context": contexts(16)[first : first + n], "seed": 3, "engine": "eager"}
    return sample(model, SCHEDULE, n, **arguments | options)


# One seed, one picture


@pytest.mark.parametrize("way", WAYS)
def test_pictures_do_not_depend_on_how_the_work_is_split(model, way):
    whole = draw(model, **WAYS[way])
    assert whole.shape == (8, 3, 16, 16)
    assert whole.dtype == torch.float32
    assert 0.5 < whole.std() < 2
    for batch_size in (1, 3, 8, 100):
        assert distance(draw(model, batch_size=batch_size, **WAYS[way]), whole) <= 1e-5
    parts = [draw(model, 5, **WAYS[way]), draw(model, 3, first_sample=5, **WAYS[way])]
    assert distance(torch.cat(parts), whole) <= 1e-5


@pytest.mark.parametrize("way", WAYS)
def test_pictures_do_not_depend_on_the_threads(model, way):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(draw(model, 2, steps=3, **WAYS[way]))
    finally:
        torch.set_num_threads(before)
    assert distance(*results) <= 1e-5


def test_the_same_seed_repeats_and_another_does_not(model):
    first = draw(model, 2)
    assert torch.equal(draw(model, 2), first)
    assert distance(draw(model, 2, seed=4), first) > 0.1
    assert distance(first[0], first[1]) > 0.1


def test_huge_seeds_and_indices(gaussian_eps, plain_normals):
    model = gaussian_eps(SCHEDULE, 1.0, (3,))
    seed, first = 2**63 - 1, 2**56 - 2
    got = sample(model, SCHEDULE, 2, solver="ddim", steps=1, seed=seed, first_sample=first, engine="eager")
    ab = SCHEDULE.alpha_bars[-1].item()
    x = plain_normals(seed, [first, first + 1], 0, 0, (3,))
    expected = (x - math.sqrt(1 - ab) * math.sqrt(1 - ab) * x) / math.sqrt(ab)
    torch.testing.assert_close(got.double(), torch.from_numpy(expected), atol=1e-3, rtol=0)


@pytest.mark.parametrize("way", WAYS)
def test_float64_is_close_to_float32(model, way):
    single, double = draw(model, **WAYS[way]), draw(model, dtype=torch.float64, **WAYS[way])
    assert double.dtype == torch.float32
    assert 0 < distance(single, double) <= 1e-5
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_bfloat16_reaches_the_network_and_the_result_stays_float32():
    model = Recorder()
    x = sample(model, SCHEDULE, 2, steps=2, dtype=torch.bfloat16, engine="eager")
    assert {value.dtype for call in model.calls for value in call[:2]} == {torch.bfloat16}
    assert x.dtype == torch.float32


# What the loop computes


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_sample_is_the_table_run_by_hand(model, plain_normals, way):
    """x_T, network, guidance, coefficients and noise, one plain step after the other in float64."""
    options = dict(WAYS[way])
    guidance = options.pop("guidance", 1.0)
    table = make_table(SCHEDULE, steps=STEPS, **options)
    c, ids = contexts(16)[2:5].double(), torch.arange(2, 5)
    double = SaneUnet().double().eval()
    x, x0_previous = torch.from_numpy(plain_normals(3, ids, 0, 0, (3, 16, 16))), 0
    for t, k in zip(table.timesteps.tolist(), table.coefficients.tolist(), strict=True):
        time = torch.full((3,), t / 50, dtype=torch.float64)
        m = guidance * double(x, time, c) + (1 - guidance) * double(x, time, None)
        x0 = k[0] * x + k[1] * m
        x0 = x0 if table.clip is None else x0.clamp(-table.clip, table.clip)
        z = torch.from_numpy(plain_normals(3, ids, t, 1, (3, 16, 16))) if k[6] else 0
        x, x0_previous = k[2] * x + k[3] * x0 + k[4] * m + k[5] * x0_previous + k[6] * z, x0
    assert distance(draw(model, 3, first_sample=2, **WAYS[way]).double(), x) <= 1e-5


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_solver_step_runs_the_same_trajectory(model, way):
    options = dict(WAYS[way])
    guidance = options.pop("guidance", 1.0)
    table = make_table(SCHEDULE, steps=STEPS, **options)
    c, ids, rows = contexts(16)[:4], torch.arange(4), table.rows()
    x = philox.normal(3, ids, 0, 0, (3, 16, 16))
    x0_prev = torch.zeros_like(x)
    for index, t in enumerate(table.timesteps.tolist()):
        time = torch.full((4,), t / 50)
        uncond = model(x, time, None) if guidance != 1 else None
        solver_step(x, model(x, time, c), rows, index, 3, ids, uncond, guidance, x0_prev, table.clip)
    assert distance(draw(model, 4, **WAYS[way]), x) <= 1e-5


def test_times_are_t_over_T():  # noqa: N802
    model = Recorder()
    sample(model, SCHEDULE, 3, steps=5, engine="eager")
    assert [t.tolist() for _, t, _ in model.calls] == [pytest.approx([time] * 3) for time in (1.0, 0.8, 0.6, 0.4, 0.2)]


def test_guidance_1_calls_the_network_once_with_the_context():
    model = Recorder()
    sample(model, SCHEDULE, 2, steps=3, context=[1.0, 0.0], guidance=1.0, engine="eager")
    assert len(model.calls) == 3
    assert all(torch.equal(c, torch.tensor([[1.0, 0.0]] * 2)) for *_, c in model.calls)


def test_guidance_1_is_no_guidance_and_0_is_no_context(model):
    options = {"solver": "ddim", "clip": 1.0}
    assert torch.equal(draw(model, 3, guidance=1.0, **options), draw(model, 3, **options))
    assert distance(draw(model, 3, guidance=1.0 + 1e-6, **options), draw(model, 3, **options)) <= 1e-5
    assert distance(draw(model, 3, guidance=0.0, **options), draw(model, 3, context=None, **options)) <= 1e-5
    assert distance(draw(model, 3, guidance=4.0, **options), draw(model, 3, **options)) > 1e-3


def test_one_context_for_all_is_the_same_row_for_each(model):
    row = contexts(1)[0]
    one = draw(model, 3, context=row)
    assert torch.equal(draw(model, 3, context=row.tolist()), one)
    assert torch.equal(draw(model, 3, context=row.repeat(3, 1)), one)
    assert distance(draw(model, 3), one) > 1e-4


def test_contexts_belong_to_their_samples_across_chunks():
    model = Recorder()
    c = contexts(5)
    sample(model, SCHEDULE, 5, steps=1, context=c, batch_size=2, engine="eager")
    assert [len(x) for x, *_ in model.calls] == [2, 2, 1]
    assert torch.equal(torch.cat([call[2] for call in model.calls]), c)


@pytest.mark.parametrize(("prediction", "clip"), [("eps", None), ("v", None), ("x0", 1.0)])
def test_table_options_reach_the_table(prediction, clip):
    model = Recorder()
    x = sample(
        model, SCHEDULE, 2, solver="ddim", steps=4, prediction=prediction, clip=clip, spacing="linspace", engine="eager"
    )
    table = make_table(SCHEDULE, "ddim", 4, prediction=prediction, clip=clip, spacing="linspace")
    expected = philox.normal(0, torch.arange(2), 0, 0, (2,), dtype=torch.float64)
    for c in table.coefficients.tolist():
        x0 = c[0] * expected
        expected = c[2] * expected + c[3] * (x0 if clip is None else x0.clamp(-clip, clip))
    torch.testing.assert_close(x.double(), expected, rtol=1e-4, atol=1e-5)
    assert [round(call[1][0].item() * 50) for call in model.calls] == table.timesteps.tolist()


# Injected noise, callback


def recording_noise(calls):
    def noise(samples, step, stream, shape):
        calls.append((samples.tolist(), int(step), int(stream), tuple(shape)))
        return philox.normal(3, samples, step, stream, shape)

    return noise


def test_noise_is_asked_for_by_sample_step_and_stream():
    calls = []
    sample(Recorder(), SCHEDULE, 3, steps=3, first_sample=7, batch_size=2, noise=recording_noise(calls), engine="eager")
    expected = []
    for samples in ([7, 8], [9]):
        expected += [(samples, 0, 0, (2,)), (samples, 50, 1, (2,)), (samples, 33, 1, (2,))]
    assert calls == expected


def test_a_deterministic_solver_asks_for_x_T_only():  # noqa: N802
    calls = []
    sample(Recorder(), SCHEDULE, 2, solver="ddim", steps=3, noise=recording_noise(calls), engine="eager")
    assert calls == [([0, 1], 0, 0, (2,))]


def test_injected_noise_replaces_philox(model):
    assert torch.equal(draw(model, 2, seed=99, noise=recording_noise([])), draw(model, 2, seed=3))
    silent = draw(model, 2, noise=lambda samples, step, stream, shape: torch.zeros(len(samples), *shape))
    assert distance(silent, draw(model, 2)) > 0.1


def test_callback_sees_every_step_of_every_chunk(model):
    seen = []
    whole = draw(model, 5, batch_size=2, callback=lambda step, x0: seen.append((step, x0.clone())))
    assert [step for step, _ in seen] == [*range(STEPS)] * 3
    assert [len(x0) for _, x0 in seen] == [2] * 2 * STEPS + [1] * STEPS
    last = torch.cat([x0 for step, x0 in seen if step == STEPS - 1])
    torch.testing.assert_close(last.float(), whole, atol=1e-5, rtol=0)


# The model


def test_every_submodule_gets_its_mode_back():
    model = SaneUnet().train()
    model.net.down1.eval()
    model.net.out[1].eval()
    modes = [module.training for module in model.modules()]
    statistics = model.net.init_conv.conv1[1].running_mean.clone()
    from_mixed = draw(model, 2)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model.net.init_conv.conv1[1].running_mean, statistics)
    assert torch.equal(from_mixed, draw(model.eval(), 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_copy_in_another_type_is_in_eval_mode_too(dtype):
    model = SaneUnet().train()
    from_training = draw(model, 2, dtype=dtype)
    assert torch.equal(from_training, draw(model.eval(), 2, dtype=dtype))


def test_modes_come_back_after_a_failure():
    model = SaneUnet().train()

    def fail(step, x0):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(model, 1, callback=fail)
    assert all(module.training for module in model.modules())


def test_sampling_records_no_gradients(model):
    assert not draw(model, 1).requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_users_model_needs_only_in_channels_and_height():
    class Users(torch.nn.Module):
        in_channels, height = 2, 6

        def forward(self, x, t, c=None):
            return 0.9 * x

    assert sample(Users(), SCHEDULE, 3, steps=2, engine="eager").shape == (3, 2, 6, 6)


def test_a_model_without_a_size_is_an_error():
    with pytest.raises(TypeError, match="model: Linear needs an attribute sample_shape, or in_channels and height"):
        sample(torch.nn.Linear(2, 2), SCHEDULE, 1, engine="eager")


def test_points():
    torch.manual_seed(0)
    points = sample(PointMLP(3, 16), SCHEDULE, 4, steps=3, clip=1.0, engine="eager")
    assert points.shape == (4, 3)
    assert points.abs().max() <= 1


def test_results_are_not_clamped(gaussian_eps):
    x = sample(gaussian_eps(SCHEDULE, 5.0, (50,)), SCHEDULE, 20, solver="ddim", steps=50, engine="eager")
    assert x.abs().max() > 5


def test_the_schedules_steps_are_the_default():
    model = Recorder()
    sample(model, SCHEDULE, 1, engine="eager")
    assert [round(t.item() * 50) for _, t, _ in model.calls] == list(range(50, 0, -1))


def test_auto_says_what_it_chose(model, caplog):
    with caplog.at_level(logging.INFO, logger="ddpm"):
        chosen = draw(model, 2, engine="auto")
    assert "engine auto: " in caplog.text
    assert distance(chosen, draw(model, 2)) <= 1e-4


# Errors

BAD = [
    ({"n": 0}, "n: got 0"),
    ({"n": -1}, "n: got -1"),
    ({"n": 1.5}, "n: got 1.5"),
    ({"n": True}, "n: got True"),
    ({"engine": "turbo"}, "engine: got 'turbo'"),
    ({"seed": -1}, "seed: got -1"),
    ({"seed": 2**63}, "seed: got"),
    ({"seed": 1.0}, "seed: got"),
    ({"first_sample": -1}, "first_sample: got -1"),
    ({"first_sample": 2**56 - 1}, "first_sample: got"),
    ({"first_sample": 0.5}, "first_sample: got"),
    ({"batch_size": 0}, "batch_size: got 0"),
    ({"batch_size": 1.5}, "batch_size: got 1.5"),
    ({"dtype": torch.int32}, "dtype: got"),
    ({"guidance": 2.0}, "guidance: got 2.0 without a context"),
    ({"guidance": math.nan, "context": [0.0] * 5}, "guidance: got nan"),
    ({"guidance": math.inf, "context": [0.0] * 5}, "guidance: got inf"),
    ({"context": [math.nan] * 5}, "context: got NaN"),
    ({"context": [math.inf] * 5}, "context: got NaN or infinite"),
    ({"context": torch.zeros(3, 5)}, r"context: got shape \[3, 5\], needs one vector or \[2, ...\], a row a sample"),
    ({"context": 1.0}, "context: got shape"),
    ({"context": torch.zeros(2, 4)}, r"got shape \[2, 4\], needs \[2, 5\]"),
    ({"solver": "euler"}, "solver: got 'euler'"),
    ({"steps": 51}, "steps: got 51"),
    ({"steps": 0}, "steps: got 0"),
    ({"spacing": "karras"}, "spacing: got"),
    ({"solver": "ddim", "eta": 2.0}, "eta: got 2.0, needs 0 <= eta <= 1"),
    ({"eta": 0.5}, "eta: got 0.5, but solver 'ddpm' takes only"),
    ({"bogus": 1}, "bogus: got 1, but solver 'ddpm' takes only"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments(model, change, message):
    arguments = {"n": 2, "engine": "eager"} | change
    with pytest.raises((TypeError, ValueError), match=message):
        sample(model, SCHEDULE, arguments.pop("n"), **arguments)


def test_noise_or_models_of_another_shape_are_refused():
    class Wide(torch.nn.Module):
        sample_shape = (3,)

        def forward(self, x, t, c=None):
            return x[:, :1]

    schedule = NoiseSchedule.make("cosine", 10)
    with pytest.raises(ValueError, match=r"model: returned \[2, 1\], needs the shape of x \[2, 3\]"):
        sample(Wide(), schedule, 2)
    with pytest.raises(ValueError, match=r"noise: returned \[1, 3\], needs \[2, 3\]"):
        sample(Wide(), schedule, 2, noise=lambda samples, step, stream, shape: torch.zeros(1, *shape))


def test_the_command_fails_with_samples_that_are_not_finite(ddpm, digits_run, tmp_path):
    """The first is named with its step, and nothing is written; what float32 does not hold is refused before."""
    picture = tmp_path / "x.npy"
    options = ("sample", digits_run, "--n", 2, "--steps", 5, "--npy", picture)
    failed = ddpm(*options, "--context", ",".join(["1e38"] * 10), "--first-sample", 7)
    assert failed.code == 1
    assert failed.err.splitlines()[-1].startswith(
        "error: sample 7 is not finite from step 1 of 5 (t = 20) on, nor are 1"
    )
    refused = ddpm(*options, "--context", "1", "--guidance", "1e300")
    assert (refused.code, refused.err.splitlines()[-1]) == (
        2,
        "error: guidance: got 1e+300, needs a finite number in float32",
    )
    for context in ((), ("--context", "all"), ("--context", "1")):
        many = ddpm(*options[:2], "--n", 10**12, "--npy", picture, *context)
        assert many.code == 2
        assert "error: --n: got 1000000000000, which are" in many.err
    assert not picture.exists()
