"""The forward process: chain and closed form are one distribution, and the commands that draw it."""

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm import NoiseSchedule
from ddpm.data import held_out, load_data
from ddpm.evaluation import energy_distance, evaluate
from ddpm.forward import chain, closed_form
from kernels import philox

ROLL = load_data("swiss-roll")
SCHEDULES = {kind: NoiseSchedule.make(kind, 40, *betas) for kind, betas in {
    "linear": (1e-3, 0.2), "cosine": (), "context_unet": (1e-3, 0.2),
}.items()}  # fmt: skip


def beyond_chance(a, b, splits=100):
    """Share of random splits of both that are at least as far apart as these two are: a permutation test's p."""
    found, both, rng = energy_distance(a, b), np.concatenate([a, b]), np.random.default_rng(0)
    apart = []
    for _ in range(splits):
        order = rng.permutation(len(both))
        apart.append(energy_distance(both[order[: len(a)]], both[order[len(a) :]]))
    return np.mean([value >= found for value in apart])


@pytest.mark.parametrize("t", [1, 5, 20, 40])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_chain_and_closed_form_agree_in_distribution(kind, t):
    x0 = ROLL.values[:400]
    (one,), (other,) = chain(x0, SCHEDULES[kind], [t], seed=1), closed_form(ROLL.values[400:800], SCHEDULES[kind], [t])
    assert beyond_chance(one.double().numpy(), other.double().numpy()) > 0.01


def test_the_energy_test_sees_a_chain_that_ignores_its_betas():
    """The tutorial's mistake: every step adds as much noise, whatever its beta."""
    x0, schedule = ROLL.values, SCHEDULES["linear"]
    wrong = NoiseSchedule.make("constant", 40, schedule.betas[1:].mean().item())
    (one,), (other,) = chain(x0[:800], wrong, [4]), closed_form(x0[800:1600], schedule, [4])
    assert beyond_chance(one.double().numpy(), other.double().numpy()) == 0


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_moments_of_both_are_exact(kind):
    """One datum many times: mean sqrt(ab) x0, variance 1 - ab, within 4 standard errors."""
    schedule, n = SCHEDULES[kind], 20_000
    x0 = torch.tensor([1.5, -0.5]).expand(n, 2)
    for made in (chain, closed_form):
        for t, x in zip((1, 7, 40), made(x0, schedule, [1, 7, 40], seed=3), strict=True):
            ab = schedule.alpha_bars[t].item()
            assert (x.double().mean(0) - ab**0.5 * x0[0]).abs().max() < 4 * ((1 - ab) / n) ** 0.5
            assert abs(x.double().var(0).mean() / (1 - ab) - 1) < 4 * (1 / n) ** 0.5


def test_a_step_of_the_chain_is_equation_2_with_the_contracts_noise():
    x0, schedule = ROLL.values[:3], SCHEDULES["linear"]
    first, second = chain(x0, schedule, [1, 2], seed=9)
    z = philox.normal(9, torch.arange(3), 2, philox.Stream.SAMPLING, (2,))
    beta = schedule.betas[2].item()
    torch.testing.assert_close(second, (1 - beta) ** 0.5 * first + beta**0.5 * z)


@pytest.mark.parametrize("made", [chain, closed_form])
def test_times_and_values(made):
    pixels = torch.randint(0, 256, (2, 1, 4, 4), dtype=torch.uint8)
    start, _ = made(pixels, SCHEDULES["cosine"], [0, 3])
    torch.testing.assert_close(start, pixels.float() / 127.5 - 1)
    assert made(pixels, SCHEDULES["cosine"], []) == []
    for times in ([41], [-1], [3, 2], [1.0]):
        with pytest.raises(ValueError, match="times: got"):
            made(pixels, SCHEDULES["cosine"], times)


def test_energy_distance_of_lines_is_the_integral_of_their_distribution_functions():
    """In one dimension it is 2 the integral of (F - G)^2; here from the sorted samples, each with itself counted."""
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((60, 1)), rng.standard_normal((90, 1)) * 1.5 + 0.3
    ends = np.sort(np.concatenate([a, b]).ravel())
    f, g = ((sample.ravel()[:, None] <= ends).mean(0) for sample in (a, b))
    expected = 2 * ((f - g)[:-1] ** 2 * np.diff(ends)).sum()
    within = [np.abs(x - x.T).sum() * (1 / len(x) ** 2 - 1 / (len(x) * (len(x) - 1))) for x in (a, b)]
    assert energy_distance(a, b) == pytest.approx(expected + sum(within), rel=1e-9)


def test_held_out_points_are_of_the_same_distribution_and_others():
    points = held_out("swiss-roll")
    assert points.shape == ROLL.values.shape
    assert beyond_chance(points[:300].double().numpy(), ROLL.values[:300].double().numpy()) > 0.01
    assert not set(map(tuple, points.tolist())) & set(map(tuple, ROLL.values.tolist()))
    assert held_out("digits") is None


def test_evaluation_of_points_has_an_energy_distance():
    """It sees what Frechet's cannot: a Gaussian has the mean and covariance of the roll."""
    gaussian = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    result = evaluate(gaussian, ROLL, None, held_out=held_out("swiss-roll"))
    assert result.frechet < 0.02
    assert result.energy > 10 * result.energy_real > 0
    assert evaluate(torch.randn(500, 2), ROLL, None).energy is None


@pytest.mark.parametrize("asked", ["", "--data digits --n 2 --schedule linear --beta-end 0.1", "--steps 3 --n 50"])
def test_the_picture(ddpm, tmp_path, asked):
    assert ddpm("forward", "--out", tmp_path / "f.png", "--seed", 3, *asked.split()).code == 0
    picture = Image.open(tmp_path / "f.png")
    assert picture.width > picture.height > 300
    assert len(picture.convert("P").getcolors()) > 20


def test_data_are_read_as_training_reads_them(ddpm, tmp_path):
    rng = np.random.default_rng(0)
    numbers, clear = rng.random((8, 6, 10, 3)), rng.integers(0, 256, (8, 6, 10, 4), dtype=np.uint8)
    np.save(tmp_path / "numbers.npy", numbers)
    np.save(tmp_path / "clear.npy", clear)
    for data, option in (("numbers", "--range 0,1"), ("clear", "--alpha")):
        line = ["forward", "--out", tmp_path / f"{data}.png", "--data", tmp_path / f"{data}.npy", "--steps", 5]
        answer = ddpm(*line)
        assert (answer.code, option.partition(" ")[0] in answer.err) == (2, True)
        assert ddpm(*line, *option.split()).code == 0
    pictures = [np.asarray(Image.open(tmp_path / f"{data}.png")) for data in ("numbers", "clear")]
    assert (pictures[0] != pictures[1]).any()


def test_the_field_of_a_run(ddpm, roll_run, tmp_path):
    more = ("--n", 50, "--solver", "ddim", "--steps", 2)
    assert ddpm("score", roll_run, "--out", tmp_path / "s.png", "--t", "1,20", *more).code == 0
    assert Image.open(tmp_path / "s.png").width > 1000
    for t in ("0", "21", "x", "1,,2"):
        answer = ddpm("score", roll_run, "--out", tmp_path / "no.png", "--t", t)
        assert answer.code == 2
        assert f"--t: got {t!r}, needs timesteps in 1..20" in answer.err
    assert not (tmp_path / "no.png").exists()


def test_evaluate_shows_it(ddpm, roll_run):
    assert "energy distance to held-out points" in ddpm("evaluate", roll_run, "--n", 20, "--steps", 2).out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("forward --out x.jpg", "--out: got x.jpg, needs a file name ending in .png"),
        ("forward --out x.png --schedule circle", "schedule: got 'circle', needs one of"),
        ("forward --out x.png --steps 0", "timesteps: got 0"),
        ("forward --out x.png --n 0", "--n: got 0"),
        ("forward --out x.png --data nowhere", "nowhere: no such file or folder"),
        ("score {run} --out x.png", "needs points in the plane [2]"),
    ],
)
def test_wrong_input_is_one_line(ddpm, digits_run, line, words):
    answer = ddpm(*line.format(run=digits_run).split())
    assert (answer.code, answer.err.count("error: ")) == (2, 1)
    assert words in answer.err
