"""Each schedule against its formula, written here once more in plain Python floats."""

import json
import math
import warnings

import numpy as np
import pytest
import torch

from ddpm import NoiseSchedule

T = 1000
START, END = 1e-4, 0.02


def quietly(*arguments):
    """The schedule, whatever it warns about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return NoiseSchedule.make(*arguments)


def along(t):
    """Position of t in the grid of 1..T, 0 to 1."""
    return (t - 1) / (T - 1)


FORMULAS = {
    "linear": lambda t: START + (END - START) * along(t),
    "quad": lambda t: (math.sqrt(START) + (math.sqrt(END) - math.sqrt(START)) * along(t)) ** 2,
    "sigmoid": lambda t: START + (END - START) / (1 + math.exp(6 - 12 * along(t))),
    "constant": lambda t: 0.035,
    "cosine": lambda t: min(0.999, 1 - cosine_signal(t) / cosine_signal(t - 1)),
}


def cosine_signal(t):
    """f(t) of Nichol & Dhariwal 2021, equation 17."""
    return math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2


@pytest.mark.parametrize("kind", FORMULAS)
def test_formula(kind):
    schedule = NoiseSchedule.make(kind, T)
    alpha_bar = 1.0
    for t in range(1, T + 1):
        beta = FORMULAS[kind](t)
        alpha_bar *= 1 - beta
        assert schedule.betas[t].item() == pytest.approx(beta, rel=1e-9)
        assert schedule.alpha_bars[t].item() == pytest.approx(alpha_bar, rel=1e-9)


def test_cosine_alpha_bars_are_its_signal():
    alpha_bars = NoiseSchedule.make("cosine", T).alpha_bars
    for t in (1, 10, 500, 990):
        assert alpha_bars[t].item() == pytest.approx(cosine_signal(t) / cosine_signal(0), rel=1e-9)


def test_context_unet_includes_the_first_beta():
    """T+1 points, ab = exp(cumsum(log a)) with b_0 in it, then ab[0] = 1."""
    schedule = NoiseSchedule.make("context_unet", 500)
    grid = [START + (END - START) * i / 500 for i in range(501)]
    for t in (1, 2, 77, 500):
        expected = math.exp(sum(math.log(1 - beta) for beta in grid[: t + 1]))
        assert schedule.alpha_bars[t].item() == pytest.approx(expected, rel=1e-9)
        assert schedule.betas[t].item() == pytest.approx(grid[t], rel=1e-9)
    assert schedule.alpha_bars[0] == 1


def test_given_betas_are_used():
    schedule = NoiseSchedule.make("linear", 11, 0.1, 0.6)
    torch.testing.assert_close(schedule.betas[1:], torch.linspace(0.1, 0.6, 11, dtype=torch.float64))
    assert set(NoiseSchedule.make("constant", 20, beta_end=0.2).betas[1:].tolist()) == {0.2}
    assert set(NoiseSchedule.make("constant", 20, 0.2).betas[1:].tolist()) == {0.2}


@pytest.mark.parametrize("kind", [*FORMULAS, "context_unet"])
@pytest.mark.parametrize("timesteps", [1, 2, 500])
def test_arrays(kind, timesteps):
    schedule = quietly(kind, timesteps)
    for values in (schedule.betas, schedule.alphas, schedule.alpha_bars):
        assert values.shape == (timesteps + 1,)
        assert values.dtype == torch.float64
        assert values.device.type == "cpu"
    assert (schedule.betas[0], schedule.alphas[0], schedule.alpha_bars[0]) == (0, 1, 1)
    assert torch.equal(schedule.alphas, 1 - schedule.betas)
    assert (schedule.alpha_bars.diff() < 0).all()
    assert schedule.alpha_bars[-1] > 0
    assert (schedule.timesteps, schedule.kind) == (timesteps, kind)


@pytest.mark.parametrize(
    "arguments", [("linear", 1000, 1e-3, 0.03), ("constant", 300), ("cosine", 40), ("context_unet", 500)]
)
def test_config_builds_it_again(arguments):
    schedule = NoiseSchedule.make(*arguments)
    again = NoiseSchedule.make(**schedule.config())
    assert torch.equal(again.alpha_bars, schedule.alpha_bars)
    assert again.config() == schedule.config()


def test_too_much_signal_left_is_a_warning():
    with pytest.warns(UserWarning, match=r"alpha_bars\[T\] = 0\.36 > 0\.05"):
        NoiseSchedule.make("linear", 100)


@pytest.mark.parametrize(("kind", "timesteps"), [("linear", 1000), ("cosine", 20), ("context_unet", 500)])
def test_little_signal_left_is_no_warning(kind, timesteps):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert NoiseSchedule.make(kind, timesteps).alpha_bars[-1] <= 0.05


BAD = [
    (("Linear", 10), "schedule: got 'Linear', needs one of linear"),
    (("linear", 0), "timesteps: got 0"),
    (("linear", -5), "timesteps: got -5"),
    (("linear", 10.0), r"timesteps: got 10\.0"),
    (("linear", True), "timesteps: got True"),
    (("linear", 10, 0.0), "beta_start: got 0"),
    (("linear", 10, 1e-4, 1.0), "beta_end: got 1"),
    (("quad", 10, -0.1), "beta_start: got -0.1"),
    (("sigmoid", 10, math.nan), "beta_start: got nan"),
    (("constant", 10, None, 2.0), "beta_(start|end): got 2"),
    (("cosine", 10, 1e-4), "cosine schedule takes none"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.make(*arguments)


def test_numpy_numbers_are_numbers():
    schedule = NoiseSchedule.make("linear", np.int64(1000), np.float32(1e-4), np.float64(0.02))
    assert json.loads(json.dumps(schedule.config()))["timesteps"] == 1000


def test_given_alpha_bars_are_kept_to_the_bit():
    made = NoiseSchedule.make("cosine", 30)
    for values in (made.alpha_bars, made.alpha_bars[1:].tolist(), made.alpha_bars.numpy()):
        given = NoiseSchedule.from_alpha_bars(values)
        assert (given.kind, given.timesteps) == ("given", 30)
        assert torch.equal(given.alpha_bars, made.alpha_bars)
        torch.testing.assert_close(given.betas, made.betas, rtol=0, atol=1e-12)
        again = NoiseSchedule.make(**json.loads(json.dumps(given.config())))
        assert torch.equal(again.alpha_bars, given.alpha_bars)
        assert again.config() == given.config()


def test_alphas_cumprod_of_another_library_is_read_and_not_multiplied_anew():
    theirs = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)  # float32
    assert torch.equal(NoiseSchedule.from_alpha_bars(theirs).alpha_bars[1:], theirs.double())


@pytest.mark.parametrize(
    "values", [[], [[1.0]], [1.0], [1.0, 1.0, 0.5], [0.5, 0.5], [0.5, 0.6], [0.9, math.nan], [0.9, -0.1], [1.2, 0.5]]
)
def test_alpha_bars_that_are_none(values):
    with pytest.raises(ValueError, match="alpha_bars: got"):
        NoiseSchedule.from_alpha_bars(values)


def test_a_given_schedule_takes_nothing_else():
    config = NoiseSchedule.make("cosine", 4).alpha_bars.tolist()
    for wrong in ({"timesteps": 5}, {"timesteps": 4, "beta_end": 0.1}):
        with pytest.raises(ValueError, match="a given one has no betas and T = 4"):
            NoiseSchedule.make("given", alpha_bars=config, **wrong)
    with pytest.raises(ValueError, match="alpha_bars: got them for schedule 'linear'"):
        NoiseSchedule.make("linear", 4, alpha_bars=config)


def test_alpha_bar_between_whole_times_interpolates_log_snr():
    schedule = NoiseSchedule.make("linear", 1000)
    assert schedule.alpha_bar(0) == 1.0
    assert schedule.alpha_bar(7) == float(schedule.alpha_bars[7])
    a, b = schedule.alpha_bars[40:42].tolist()
    middle = (math.log(a / (1 - a)) + math.log(b / (1 - b))) / 2
    ends = NoiseSchedule.from_alpha_bars([1.0, 0.5, 0.0])
    assert (ends.alpha_bar(0.5), ends.alpha_bar(1.5)) == (0.75, 0.25)
    for t in (-1, 2.5):
        with pytest.raises(ValueError, match=rf"t: got {t}, needs 0\.\.2"):
            ends.alpha_bar(t)
    assert schedule.alpha_bar(40.5) == pytest.approx(1 / (1 + math.exp(-middle)), rel=1e-12)
