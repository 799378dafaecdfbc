"""Each table against the textbook form of its sampler, then against data whose solution is known in closed form."""

import math
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm import NoiseSchedule, make_table, sample

LINEAR = NoiseSchedule.make("linear", 1000)
COSINE = NoiseSchedule.make("cosine", 40)
GRIDS = [(LINEAR, 10, "trailing"), (LINEAR, 7, "linspace"), (LINEAR, 20, "leading"), (COSINE, 40, "trailing")]
SPACINGS = ["trailing", "leading", "linspace", "lucidrains"]
SOLVERS = [("ddpm", {}), ("ddpm", {"variance": "beta"}), ("ddim", {}), ("ddim", {"eta": 0.7}), ("dpmpp_2m", {})]
SOLVERS += [("ddpm", {"resample": 3}), ("pc", {"corrections": 2, "snr": 0.3})]  # steps of several rows


def knots(schedule, table):
    """alpha_bars at every timestep of the table, then at 0."""
    return schedule.alpha_bars[[*table.timesteps.tolist(), 0]].tolist()


def execute(table, x, network, noise=None):
    """The table in float64 NumPy, as the design writes it; noise: [S, ...] or None. Returns every state."""
    clip = math.inf if table.clip is None else table.clip
    states, x0_previous = [x], 0.0
    for i, t in enumerate(table.timesteps.tolist()):
        c = table.coefficients[i].tolist()
        m = network(x, t)
        x0 = np.clip(c[0] * x + c[1] * m, -clip, clip)
        x = c[2] * x + c[3] * x0 + c[4] * m + c[5] * x0_previous + c[6] * (0.0 if noise is None else noise[i])
        states, x0_previous = [*states, x], x0
    return states


def nonlinear_eps(schedule):
    """Some network that predicts noise: close to that of N(0, I) data, bent by a sine."""
    alpha_bars = schedule.alpha_bars.numpy()
    return lambda x, t: math.sqrt(1 - alpha_bars[t]) * x + 0.3 * np.sin(3 * x + t)


def start(shape=(50,)):
    """x_T, seeded."""
    return np.random.default_rng(0).standard_normal(shape)


# The grids


def test_grids_of_the_design():
    assert make_table(LINEAR, "ddim", 4).timesteps.tolist() == [1000, 750, 500, 250]
    assert make_table(LINEAR, "ddim", 3).timesteps.tolist() == [1000, 667, 333]
    assert make_table(LINEAR, "ddim", 4, spacing="leading").timesteps.tolist() == [751, 501, 251, 1]
    assert make_table(LINEAR, "ddim", 4, spacing="linspace").timesteps.tolist() == [1000, 667, 334, 1]


@pytest.mark.parametrize(
    ("timesteps", "steps", "expected"),
    [
        (1000, 250, list(range(1000, 0, -4))),
        (1000, 4, [1000, 750, 500, 250]),
        (1000, 3, [1000, 666, 333]),  # -1 + 1000 k / 3 is 332.3, 665.7, 999
        (10, 4, [10, 7, 5, 2]),  # 1.5, 4, 6.5, 9
        (10, 3, [10, 6, 3]),  # 2.3, 5.7, 9
        (7, 7, [7, 6, 5, 4, 3, 2, 1]),
        (9, 1, [9]),
    ],
)
def test_lucidrains_grid_is_truncated_from_minus_1(timesteps, steps, expected):
    """denoising_diffusion_pytorch, ddim_sample: reversed(linspace(-1, T - 1, S + 1).int()), 0-based, without the -1."""
    schedule = NoiseSchedule.make("cosine", timesteps)
    assert make_table(schedule, "ddim", steps, spacing="lucidrains").timesteps.tolist() == expected


def test_leading_with_an_offset_takes_any_number_of_steps():
    """diffusers' grids: arange(S) * (T // S) + steps_offset, counted from 0."""
    assert make_table(LINEAR, "ddim", 3, spacing="leading+0").timesteps.tolist() == [667, 334, 1]
    assert make_table(LINEAR, "ddpm", 4, spacing="leading+2").timesteps.tolist() == [753, 503, 253, 3]
    assert make_table(LINEAR, "ddim", 1, spacing="leading+7").timesteps.tolist() == [8]
    with pytest.raises(ValueError, match=r"spacing: got leading\+1 with 1000 steps, which begin at 1001 > T = 1000"):
        make_table(LINEAR, "ddpm", spacing="leading+1")
    for wrong in ("leading+", "leading-1", "leading+1.5", "trailing+1", 3):
        with pytest.raises(ValueError, match="spacing: got"):
            make_table(LINEAR, "ddim", 4, spacing=wrong)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_one_step_starts_at_the_end_and_all_steps_visit_everything(spacing):
    assert make_table(COSINE, "ddpm", 1, spacing=spacing).timesteps.tolist() == [40]
    assert make_table(COSINE, "ddpm", 40, spacing=spacing).timesteps.tolist() == list(range(40, 0, -1))
    assert make_table(COSINE, "ddpm", spacing=spacing).timesteps.tolist() == list(range(40, 0, -1))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data(), timesteps=st.integers(1, 1200), spacing=st.sampled_from(SPACINGS))
def test_grids_descend_strictly_within_1_and_the_end(data, timesteps, spacing):
    divisors = [s for s in range(1, timesteps + 1) if timesteps % s == 0]
    steps = data.draw(st.sampled_from(divisors) if spacing == "leading" else st.integers(1, timesteps))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        schedule = NoiseSchedule.make("linear", timesteps)
    table = make_table(schedule, "ddim", steps, spacing=spacing)
    grid = table.timesteps
    assert grid.dtype == torch.int64
    assert len(table) == len(grid) == steps
    assert (grid.diff() < 0).all()
    assert grid.min() >= 1
    assert grid.max() <= timesteps
    if spacing != "leading" or steps == 1:
        assert grid[0] == timesteps
    if spacing in ("leading", "linspace") and steps > 1:
        assert grid[-1] == 1


# The tables against textbooks


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_ddpm_is_equation_11_of_ho(variance):
    """1/sqrt(alpha) (x - beta/sqrt(1 - ab) eps) + sigma z on consecutive steps."""
    table = make_table(LINEAR, "ddpm", variance=variance)
    betas, alpha_bars = LINEAR.betas.tolist(), LINEAR.alpha_bars.tolist()
    rng = np.random.default_rng(1)
    for t in (1000, 999, 500, 3, 2, 1):
        x, eps, z = rng.standard_normal((3, 20))
        row = torch.clone(table.coefficients[1000 - t]).tolist()
        x0 = row[0] * x + row[1] * eps
        beta, ab, ab_before = betas[t], alpha_bars[t], alpha_bars[t - 1]
        sigma = math.sqrt(beta if variance == "beta" else beta * (1 - ab_before) / (1 - ab))
        expected = (x - beta / math.sqrt(1 - ab) * eps) / math.sqrt(1 - beta) + (t > 1) * sigma * z
        got = row[2] * x + row[3] * x0 + row[4] * eps + row[6] * z
        np.testing.assert_allclose(got, expected, atol=1e-11, rtol=0)
        assert row[5] == 0


@pytest.mark.parametrize(("schedule", "steps", "spacing"), GRIDS)
def test_ddpm_is_the_gaussian_posterior_between_any_two_times(schedule, steps, spacing):
    """Bayes: precisions of q(x_s | x0) and of q(x_t | x_s) add up."""
    table = make_table(schedule, "ddpm", steps, spacing=spacing)
    for row, (a, s) in zip(table.coefficients[:-1].tolist(), pairwise(knots(schedule, table)[:-1]), strict=True):
        precision = 1 / (1 - s) + (a / s) / (1 - a / s)
        of_x, of_x0 = math.sqrt(a / s) / (1 - a / s) / precision, math.sqrt(s) / (1 - s) / precision
        assert row[2:] == pytest.approx([of_x, of_x0, 0, 0, math.sqrt(1 / precision)], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("ends", [0, 1])
def test_ddim_ends_where_it_is_told(ends):
    """Each row is a step of its own: that of the schedule which jumps from t to max(t - T // S, ends)."""
    table = make_table(LINEAR, "ddim", 7, spacing="linspace", ends=ends, eta=0.3, prediction="v")
    bars = LINEAR.alpha_bars.tolist()
    for t, row in zip(table.timesteps[:-1].tolist(), table.coefficients.tolist(), strict=False):
        a, s = bars[t], bars[max(t - 142, ends)]
        noise = 0.3 * math.sqrt((1 - s) / (1 - a) * (1 - a / s))
        way = math.sqrt(1 - s - noise**2)
        expected = [math.sqrt(a), -math.sqrt(1 - a), way * math.sqrt(1 - a), math.sqrt(s), way * math.sqrt(a), 0, noise]
        assert row == pytest.approx(expected, rel=1e-12)
    assert table.coefficients[-1, 3] == math.sqrt(bars[ends])
    assert table.made_for["ends"] == ends
    for wrong in (2, -1, 0.5, "x", True):
        with pytest.raises(ValueError, match="ends: got"):
            make_table(LINEAR, "ddim", 7, ends=wrong)
    with pytest.raises(ValueError, match=r"ends: got 0, but solver 'ddpm' takes only"):
        make_table(LINEAR, "ddpm", 7, ends=0)


@pytest.mark.parametrize(("schedule", "steps", "spacing"), GRIDS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_equation_12_of_song(schedule, steps, spacing, eta):
    table = make_table(schedule, "ddim", steps, eta=eta, spacing=spacing)
    network, x = nonlinear_eps(schedule), start()
    z = np.random.default_rng(2).standard_normal((steps, *x.shape))
    got = execute(table, x, network, z)
    for i, (t, (a, s)) in enumerate(zip(table.timesteps.tolist(), pairwise(knots(schedule, table)), strict=True)):
        eps = network(x, t)
        sigma = eta * math.sqrt((1 - s) / (1 - a)) * math.sqrt(1 - a / s)
        predicted_x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
        x = math.sqrt(s) * predicted_x0 + math.sqrt(1 - s - sigma**2) * eps + sigma * z[i]
        np.testing.assert_allclose(got[i + 1], x, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_resampling_is_a_step_down_and_the_forward_step_back_up(variance):
    """RePaint: x_s ~ p(x_s | x_t), then x_t ~ N(sqrt(alpha) x_s, 1 - alpha); three times at each but the last."""
    plain = make_table(LINEAR, "ddpm", 5, variance=variance)
    table = make_table(LINEAR, "ddpm", 5, variance=variance, resample=3)
    assert table.timesteps.tolist() == [t for t in (1000, 800, 600, 400) for _ in range(3)] + [200]
    assert (table.noise_steps >> 20).tolist() == [0, 1, 2] * 4 + [0]
    assert (table.noise_steps & (1 << 20) - 1).tolist() == table.timesteps.tolist()
    assert table.begins.tolist() == [True, False, False] * 4 + [True]
    x, m = np.random.default_rng(2).standard_normal((2, 20))

    def moments(c):
        return c[2] * x + c[3] * (c[0] * x + c[1] * m) + c[4] * m, c[6] ** 2

    for i, (a, s) in enumerate(pairwise(knots(LINEAR, plain)[:-1])):
        down = plain.coefficients[i].tolist()
        mean, noise = moments(down)
        for row in (3 * i, 3 * i + 1):
            got_mean, got_noise = moments(table.coefficients[row].tolist())
            np.testing.assert_allclose(got_mean, math.sqrt(a / s) * mean, atol=1e-10)
            assert got_noise == pytest.approx(a / s * noise + 1 - a / s, rel=1e-9)
        assert table.coefficients[3 * i + 2].tolist() == down
    assert table.coefficients[-1].tolist() == plain.coefficients[-1].tolist()


def test_ddim_with_eta_1_is_ddpm():
    network, x = nonlinear_eps(COSINE), start()
    z = np.random.default_rng(3).standard_normal((40, *x.shape))
    tables = [make_table(COSINE, "ddim", eta=1.0), make_table(COSINE, "ddpm")]
    ddim, ddpm = (execute(table, x, network, z)[-1] for table in tables)
    np.testing.assert_allclose(ddim, ddpm, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("schedule", "steps", "spacing"), GRIDS)
def test_dpmpp_2m_is_algorithm_2_of_lu(schedule, steps, spacing):
    """x_i = sigma_i/sigma_{i-1} x_{i-1} - alpha_i (e^{-h_i} - 1) D_i in lambda = ln(alpha/sigma); x0 at the end."""
    table = make_table(schedule, "dpmpp_2m", steps, spacing=spacing)
    network, x = nonlinear_eps(schedule), start()
    got = execute(table, x, network)
    buffer = h_before = None
    for i, (t, (a, s)) in enumerate(zip(table.timesteps.tolist(), pairwise(knots(schedule, table)), strict=True)):
        x0 = (x - math.sqrt(1 - a) * network(x, t)) / math.sqrt(a)
        if i == steps - 1:
            np.testing.assert_allclose(got[-1], x0, rtol=1e-8, atol=1e-8)
            break
        h = math.log(math.sqrt(s) / math.sqrt(1 - s)) - math.log(math.sqrt(a) / math.sqrt(1 - a))
        direction = x0
        if buffer is not None:
            r = h_before / h
            direction = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * buffer
        x = math.sqrt(1 - s) / math.sqrt(1 - a) * x - math.sqrt(s) * (math.exp(-h) - 1) * direction
        np.testing.assert_allclose(got[i + 1], x, rtol=1e-8, atol=1e-8)
        buffer, h_before = x0, h


@pytest.mark.parametrize(("solver", "options"), SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 20, 1000])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_the_last_row_has_no_noise_and_lands_on_x0(solver, options, steps, prediction):
    table = make_table(LINEAR, solver, steps, prediction=prediction, **options)
    assert table.steps == steps
    assert table.coefficients.shape == (len(table), 7)
    assert table.coefficients.dtype == torch.float64
    assert table.coefficients.isfinite().all()
    assert table.coefficients[-1, 2:].tolist() == pytest.approx([0, 1, 0, 0, 0], abs=1e-12)
    assert table.coefficients[-1, 6] == 0
    noisy = solver in ("ddpm", "pc") or options.get("eta", 0) > 0
    assert ((table.coefficients[:-1, 6] > 0) == noisy).all()


@pytest.mark.parametrize(("solver", "options"), SOLVERS)
@pytest.mark.parametrize("clip", [None, 0.8])
def test_all_predictions_give_one_trajectory(solver, options, clip):
    """v = sqrt(ab) eps - sqrt(1 - ab) x0 (Salimans & Ho 2022)."""
    alpha_bars, eps = COSINE.alpha_bars.numpy(), nonlinear_eps(COSINE)

    def x0(x, t):
        return (x - np.sqrt(1 - alpha_bars[t]) * eps(x, t)) / np.sqrt(alpha_bars[t])

    def v(x, t):
        return np.sqrt(alpha_bars[t]) * eps(x, t) - np.sqrt(1 - alpha_bars[t]) * x0(x, t)

    noise = np.random.default_rng(4).standard_normal((60, 50))
    ends = []
    for prediction, network in (("eps", eps), ("v", v), ("x0", x0)):
        table = make_table(COSINE, solver, 20, prediction=prediction, clip=clip, **options)
        ends.append(execute(table, start(), network, noise)[-1])
    np.testing.assert_allclose(ends[1], ends[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(ends[2], ends[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_ddims_direction_keeps_the_networks_eps_under_clip(prediction):
    table = make_table(COSINE, "ddim", 10, prediction=prediction, clip=0.1)
    assert table.clip == 0.1
    x, eps = start(), start() + 0.5
    a, s, *_ = knots(COSINE, table)
    x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
    m = {"eps": eps, "x0": x0, "v": math.sqrt(a) * eps - math.sqrt(1 - a) * x0}[prediction]
    got = execute(table, x, lambda *_: m)[1]
    expected = math.sqrt(s) * np.clip(x0, -0.1, 0.1) + math.sqrt(1 - s) * eps
    assert np.abs(x0).max() > 0.1
    np.testing.assert_allclose(got, expected, atol=1e-9 * np.abs(x0).max(), rtol=0)


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_ddims_direction_can_be_derived_again_from_the_clipped_x0(prediction, eta):
    """Without a clip it is the same solver."""
    table = make_table(COSINE, "ddim", 10, prediction=prediction, clip=0.1, eta=eta, rederive=True)
    x, eps, z = start(), start() + 0.5, np.random.default_rng(6).standard_normal((10, *start().shape))
    a, s, *_ = knots(COSINE, table)
    x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
    m = {"eps": eps, "x0": x0, "v": math.sqrt(a) * eps - math.sqrt(1 - a) * x0}[prediction]
    clipped, sigma = np.clip(x0, -0.1, 0.1), eta * math.sqrt((1 - s) / (1 - a) * (1 - a / s))
    direction = (x - math.sqrt(a) * clipped) / math.sqrt(1 - a)
    expected = math.sqrt(s) * clipped + math.sqrt(1 - s - sigma**2) * direction + sigma * z[0]
    np.testing.assert_allclose(execute(table, x, lambda *_: m, z)[1], expected, atol=1e-9, rtol=0)
    given = {"steps": 10, "prediction": prediction, "eta": eta}
    ends = [
        execute(make_table(COSINE, "ddim", **given, rederive=again), x, lambda x, t: m * 0.3, z)[-1]
        for again in (True, False)
    ]
    np.testing.assert_allclose(*ends, rtol=1e-6, atol=1e-6)


def test_ddpms_mean_uses_the_clipped_x0():
    table = make_table(LINEAR, "ddpm", clip=0.1)
    x, eps, t = start(), start() + 0.5, 1000
    ab, before, beta = LINEAR.alpha_bars[t].item(), LINEAR.alpha_bars[t - 1].item(), LINEAR.betas[t].item()
    x0 = np.clip((x - math.sqrt(1 - ab) * eps) / math.sqrt(ab), -0.1, 0.1)
    mean = (math.sqrt(before) * beta * x0 + math.sqrt(1 - beta) * (1 - before) * x) / (1 - ab)  # Ho et al., equation 7
    np.testing.assert_allclose(execute(table, x, lambda *_: eps)[1], mean, atol=1e-12, rtol=0)


def test_rows_are_the_coefficients_and_t():
    table = make_table(LINEAR, "ddpm", 13)
    rows = table.rows()
    assert rows.dtype == torch.float32
    assert torch.equal(rows[:, :7], table.coefficients.float())
    assert rows[:, 7].tolist() == table.timesteps.tolist()
    assert table.rows(dtype=torch.float64).dtype == torch.float64


def test_only_alpha_bars_matter():
    changed = NoiseSchedule("x", 1000, None, None, LINEAR.betas * math.nan, LINEAR.alphas * math.nan, LINEAR.alpha_bars)
    for solver, options in SOLVERS:
        tables = [make_table(schedule, solver, 9, **options).coefficients for schedule in (changed, LINEAR)]
        assert torch.equal(*tables)


BAD = [
    ({"solver": "euler"}, "solver: got 'euler', needs one of ddpm"),
    ({"steps": 0}, "steps: got 0"),
    ({"steps": 41}, r"steps: got 41, needs an integer in 1\.\.40"),
    ({"steps": 2.0}, r"steps: got 2\.0"),
    ({"steps": True}, "steps: got True"),
    ({"steps": 7, "spacing": "leading"}, "steps: got 7, needs a divisor of 40"),
    ({"spacing": "karras"}, "spacing: got 'karras'"),
    ({"solver": "ddpm", "variance": "learned"}, "variance: got 'learned', needs one of posterior, beta"),
    ({"prediction": "score"}, "prediction: got 'score'"),
    ({"solver": "ddpm", "resample": 0}, r"resample: got 0, needs an integer in 1\.\.16"),
    ({"solver": "ddpm", "resample": 17}, "resample: got 17"),
    ({"solver": "pc", "corrections": 16}, r"corrections: got 16, needs an integer in 1\.\.15"),
    ({"solver": "pc", "snr": math.nan}, "snr: got nan, needs 0 <= snr <= 1"),
    ({"corrections": 2}, "corrections: got 2, but solver 'ddim' takes only"),
    ({"eta": -0.1}, "eta: got -0.1"),
    ({"eta": 1.1}, "eta: got 1.1"),
    ({"eta": math.nan}, "eta: got nan"),
    ({"rederive": 1}, "rederive: got 1, needs True or False"),
    ({"clip": 0.0}, "clip: got 0"),
    ({"clip": -1.0}, "clip: got -1"),
    ({"clip": math.nan}, "clip: got nan"),
    ({"clip": 1e39}, r"clip: got 1e\+39, needs a finite bound > 0 in float32"),
    ({"clip": 1e-300}, "clip: got 1e-300, needs a finite bound > 0 in float32"),
    ({"clip": "1"}, "clip: got '1', needs a finite bound > 0 in float32"),
    ({"solver": "ddim", "eta": "1"}, "eta: got '1', needs 0 <= eta <= 1"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        make_table(COSINE, **{"solver": "ddim"} | change)


def test_a_schedule_s_name_is_no_schedule():
    with pytest.raises(TypeError, match="schedule: got a str, needs a NoiseSchedule"):
        make_table("cosine", "ddim")


# Gaussian data N(0, s^2): the network is a factor k(t) on x, so trajectories are linear and variances exact


def factor(schedule, s):
    """k(t) of eps*(x, t) = k x."""
    return lambda t: (ab := schedule.alpha_bars[t].item(), math.sqrt(1 - ab) / (ab * s**2 + 1 - ab))[1]


def variances(schedule, table, s):
    """Exact variance of every state, from that of (x, x0_previous) and their covariance; x_T ~ N(0, 1)."""
    k = factor(schedule, s)
    covariance, result = np.diag([1.0, 0.0]), [1.0]
    for t, c in zip(table.timesteps.tolist(), table.coefficients.tolist(), strict=True):
        to_x0 = c[0] + c[1] * k(t)
        step = np.array([[c[2] + c[3] * to_x0 + c[4] * k(t), c[5]], [to_x0, 0.0]])
        covariance = step @ covariance @ step.T + np.diag([c[6] ** 2, 0.0])
        result.append(covariance[0, 0])
    return result


def ode_error(solver, steps, s=2.0):
    """Relative error at t = 1, the last time above 0, against the exact flow x_t ~ sqrt(ab s^2 + 1 - ab)."""
    table = make_table(LINEAR, solver, steps, spacing="linspace")
    k = factor(LINEAR, s)
    x_1 = execute(table, 1.0, lambda x, t: k(t) * x)[-2]
    spread = [math.sqrt(ab * s**2 + 1 - ab) for ab in (knots(LINEAR, table)[-2], knots(LINEAR, table)[0])]
    return abs(x_1 / (spread[0] / spread[1]) - 1)


@pytest.mark.parametrize(("solver", "low", "high"), [("ddim", 0.9, 1.1), ("dpmpp_2m", 1.8, 2.3)])
def test_order_of_convergence(solver, low, high):
    steps = [20, 40, 80, 160]
    errors = [ode_error(solver, s) for s in steps]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert low < slope < high, (slope, errors)
    assert errors[-1] < 0.02


def test_second_order_beats_first_order():
    assert ode_error("dpmpp_2m", 40) < ode_error("ddim", 40) / 3


@pytest.mark.parametrize("s", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_ddpm_with_all_steps_reproduces_the_data(s, variance):
    table = make_table(LINEAR, "ddpm", variance=variance)
    assert math.sqrt(variances(LINEAR, table, s)[-1]) == pytest.approx(s, rel=0.02)


@pytest.mark.parametrize("s", [0.5, 2.0])
def test_correctors_bring_the_spread_nearer_to_the_datas(s):
    """Few ancestral steps are off at the last timestep above 0; Langevin steps there draw it to the truth."""
    off = []
    for solver, options in (("ddpm", {}), ("pc", {"corrections": 15, "snr": 0.3})):
        table = make_table(LINEAR, solver, 10, **options)
        ab = LINEAR.alpha_bars[table.timesteps[-1]].item()
        off.append(abs(variances(LINEAR, table, s)[-2] / (ab * s**2 + 1 - ab) - 1))
    assert off[1] < off[0] / 2, off


@pytest.mark.parametrize(("solver", "options"), SOLVERS)
def test_sampled_variance_matches_the_recursion(gaussian_eps, solver, options):
    """160,000 seeded normals: the variance is within 4 standard errors of the exact one."""
    table = make_table(COSINE, solver, 20, **options)
    model = gaussian_eps(COSINE, 0.5, (16,))
    x = sample(model, COSINE, 10_000, solver=solver, steps=20, seed=1, engine="eager", **options)
    exact = variances(COSINE, table, 0.5)[-1]
    ratio = x.double().square().mean().item() / exact
    assert abs(ratio - 1) < 4 * math.sqrt(2 / x.numel())
    assert abs(x.double().mean().item()) < 4 * math.sqrt(exact / x.numel())


class MixtureEps(torch.nn.Module):
    """eps* = -sqrt(1 - ab) score of a mixture of N(mean_j, s^2 I) with the given weights, diffused to t."""

    def __init__(self, schedule, means, weights, s):
        super().__init__()
        self.schedule, self.means, self.weights, self.s = schedule, means, weights, s
        self.sample_shape = (means.shape[1],)

    def forward(self, x, t, c=None):
        ab = self.schedule.alpha_bars[round(t[0].item() * self.schedule.timesteps)].item()
        spread = ab * self.s**2 + 1 - ab
        offsets = x[:, None] - math.sqrt(ab) * self.means
        shares = torch.softmax(self.weights.log() - offsets.square().sum(-1) / (2 * spread), dim=1)
        return math.sqrt(1 - ab) * (shares[..., None] * offsets).sum(1) / spread


@pytest.mark.parametrize(
    ("solver", "steps", "options"),
    [("ddpm", 250, {}), ("ddim", 100, {}), ("ddim", 100, {"eta": 1.0}), ("dpmpp_2m", 50, {})],
)
def test_a_mixture_keeps_its_weights_means_and_spread(solver, steps, options):
    """Components far apart: around each the spread is that of a single Gaussian under the same table."""
    means, weights, s, n = torch.tensor([[2.0, 0.0], [-1.0, 1.5]]), torch.tensor([0.3, 0.7]), 0.3, 20_000
    spread = math.sqrt(variances(LINEAR, make_table(LINEAR, solver, steps, **options), s)[-1])
    x = sample(
        MixtureEps(LINEAR, means, weights, s), LINEAR, n, solver=solver, steps=steps, seed=2, engine="eager", **options
    )
    nearest = torch.cdist(x, means).argmin(1)
    for j, weight in enumerate(weights.tolist()):
        members = x[nearest == j]
        assert abs(len(members) / n - weight) < 0.015
        torch.testing.assert_close(members.mean(0), means[j], atol=0.03, rtol=0)
        assert members.std(0).tolist() == pytest.approx([spread, spread], rel=0.03)
