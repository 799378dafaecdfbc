"""Editing: Gaussian data in closed form, the same picture on every engine, known pixels exactly as they were."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm import NoiseSchedule, Trajectory, edit, inference, make_table, sample
from ddpm.editing import rest_of
from ddpm.inference import has_form
from ddpm.networks.inpaint import Inpaint
from kernels import philox

LINEAR, COSINE = NoiseSchedule.make("linear", 1000), NoiseSchedule.make("cosine", 20)
IMAGE = torch.linspace(-1, 1, 3 * 16 * 16).reshape(3, 16, 16).sin()
MASK = torch.zeros(16, 16)
MASK[3:9, 5:12] = 1
WAYS = {
    "img2img": {"strength": 0.5},
    "dpmpp_2m": {"strength": 0.7, "solver": "dpmpp_2m", "steps": 10},
    "inpainting": {"strength": 1.0, "mask": MASK, "resample": 2},
    "inpainting ddim": {"strength": 0.8, "mask": MASK, "solver": "ddim"},
}


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("way", WAYS)
def test_the_same_picture_on_every_engine(unet, way, guidance):
    model, condition = unet(), torch.eye(5)[1]
    options = {"clip": 1.0, "seed": 5, "first_sample": 2, "guidance": guidance, "context": condition}
    expected = edit(model, COSINE, IMAGE, 3, engine="eager", **options, **WAYS[way])
    found = edit(model, COSINE, IMAGE, 3, engine="fused", batch_size=2, **options, **WAYS[way])
    assert (found - expected).abs().max() < 1e-4
    alone = edit(model, COSINE, IMAGE, 1, engine="fused", **options | {"first_sample": 4}, **WAYS[way])
    assert (alone - found[2:]).abs().max() < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_the_same_picture_compiled(unet, way):
    model, options = unet(), {"clip": 1.0, "seed": 5}
    expected = edit(model, COSINE, IMAGE, 2, engine="eager", **options, **WAYS[way])
    assert (edit(model, COSINE, IMAGE, 2, engine="compile", **options, **WAYS[way]) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_img2img_of_gaussian_data_has_the_posteriors_mean_and_variance(gaussian_eps, share):
    """x_t ~ N(sqrt(ab) x0, 1 - ab); p(x_0 | x_t) is Gaussian where the data are N(0, s^2)."""
    s, n, image = 0.5, 4000, torch.tensor([1.5, -0.3, 0.0, 0.7])
    found = edit(gaussian_eps(LINEAR, s, (4,)), LINEAR, image, n, strength=share, engine="eager", seed=3).double()
    ab = LINEAR.alpha_bars[round(share * 1000)].item()
    gain = math.sqrt(ab) * s**2 / (ab * s**2 + 1 - ab)
    variance = gain**2 * (1 - ab) + s**2 * (1 - ab) / (ab * s**2 + 1 - ab)
    mean = gain * math.sqrt(ab) * image.double()
    assert (found.mean(0) - mean).abs().max() < 4 * math.sqrt(variance / n)
    assert abs((found - mean).square().mean().item() / variance - 1) < 4 * math.sqrt(2 / (4 * n)) + 0.01


@pytest.mark.parametrize(("solver", "options"), [("ddpm", {}), ("ddpm", {"resample": 2}), ("ddim", {"eta": 1.0})])
def test_inpainting_is_exact_where_pixels_are_independent(gaussian_eps, solver, options):
    """Unknown pixels keep the distribution that they have without a mask, known ones their values."""
    s, n, image = 0.5, 4000, torch.tensor([1.5, -0.3, 0.0, 0.7])
    mask = torch.tensor([0, 1, 0, 1])
    more = {"solver": solver, "steps": 250, "engine": "eager", "seed": 3} | options
    found = edit(gaussian_eps(LINEAR, s, (4,)), LINEAR, image, n, strength=1.0, mask=mask, **more).double()
    assert torch.equal(found[:, [0, 2]], image[[0, 2]].double().expand(n, 2))
    free = sample(gaussian_eps(LINEAR, s, (4,)), LINEAR, n, **more).double()[:, [1, 3]]
    new = found[:, [1, 3]]
    assert new.mean().abs() < 4 * s / math.sqrt(2 * n)
    assert abs(new.var().item() / free.var().item() - 1) < 4 * math.sqrt(4 / (2 * n))
    assert np.corrcoef(new.T.numpy())[0, 1] == pytest.approx(0, abs=4 / math.sqrt(n))


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("engine", ["eager", "fused"])
def test_known_pixels_are_known_at_every_step(unet, prediction, engine):
    """The x0 of every row is the picture there, so that rows carry it to the right noise level."""
    model = Inpaint(unet(), COSINE, IMAGE, MASK == 0, prediction)
    assert has_form(model)
    table = make_table(COSINE, "ddpm", prediction=prediction)
    seen = []
    Trajectory(model, COSINE, table, engine=engine)(2, callback=lambda row, x0: seen.append(x0.clone()))
    off = [(x0 - IMAGE).abs()[:, :, MASK == 0].max().item() for x0 in seen]
    # Rounding grows with 1 / sqrt(alpha_bar), which at first is 6e4.
    scale = [1 / math.sqrt(COSINE.alpha_bars[t]) for t in table.timesteps.tolist()]
    assert all(each < 1e-6 * max(1, by) for each, by in zip(off, scale, strict=True))


def test_networks_without_a_form_and_with_indices_as_time(gaussian_eps):
    class Index(torch.nn.Module):
        sample_shape, time = (4,), "index"

        def forward(self, x, t, c=None):
            assert t.dtype == torch.int64
            return 0.5 * x + t[:, None] / 1000

    image, mask = torch.ones(4), torch.tensor([1, 0, 0, 0])
    more = {"strength": 1.0, "mask": mask, "solver": "ddim", "steps": 5, "clip": 1.0}
    eager, fused = (edit(Index(), COSINE, image, 2, engine=engine, **more) for engine in ("eager", "fused"))
    assert torch.equal(eager[:, 1:], torch.ones(2, 3))
    torch.testing.assert_close(fused, eager, atol=1e-5, rtol=0)


def test_a_network_that_does_not_state_its_conditions():
    class Unstated(torch.nn.Module):
        sample_shape = (4,)

        def forward(self, x, t, c=None):
            return 0.5 * x + (0 if c is None else c.sum(1, keepdim=True) / 10)

    image, mask = torch.ones(4), torch.tensor([1, 0, 0, 0])
    more = {"strength": 1.0, "mask": mask, "solver": "ddim", "steps": 5, "clip": 1.0, "guidance": 2.0}
    eager, fused = (
        edit(Unstated(), COSINE, image, 2, engine=engine, context=torch.tensor([1.0, 2.0, 3.0]), **more)
        for engine in ("eager", "fused")
    )
    torch.testing.assert_close(fused, eager, atol=1e-5, rtol=0)
    assert torch.equal(eager[:, 1:], torch.ones(2, 3))


def test_several_pictures_of_one_mask(unet):
    model, images = unet(), torch.stack([IMAGE, -IMAGE])
    options = {"mask": MASK, "strength": 1.0, "clip": 1.0, "engine": "fused", "steps": 5, "context": torch.eye(5)[:2]}
    both = edit(model, COSINE, images, **options)
    one = edit(model, COSINE, -IMAGE, **options | {"context": torch.eye(5)[1], "first_sample": 1})
    torch.testing.assert_close(both[1:], one, atol=1e-5, rtol=0)
    assert torch.equal(both[:, :, MASK == 0], images[:, :, MASK == 0])


def test_strength_1_is_sampling_where_nothing_is_left_of_the_data(unet):
    """A picture of zeros leaves x_T alone but for its spread, sqrt(1 - alpha_bar)."""
    options, model = {"solver": "ddim", "steps": 10, "clip": 1.0, "engine": "fused", "seed": 4}, unet()
    found = edit(model, COSINE, torch.zeros(3, 16, 16), 2, strength=1.0, **options)
    assert (found - sample(model, COSINE, 2, **options)).abs().max() < 1e-3


def test_the_rest_begins_at_the_share_of_the_schedule():
    table = make_table(COSINE, "dpmpp_2m", 10)
    assert rest_of(table, COSINE, 0.5).timesteps.tolist() == [10, 8, 6, 4, 2]
    assert rest_of(table, COSINE, 0.55).timesteps.tolist() == [10, 8, 6, 4, 2]
    assert rest_of(table, COSINE, 1.0) is table
    again = make_table(COSINE, "ddpm", 5, resample=3)
    assert rest_of(again, COSINE, 0.4).timesteps.tolist() == [8, 8, 8, 4]


BAD = [
    ({"strength": 0}, "strength: got 0, needs 0.05..1"),
    ({"strength": 0.01}, "strength: got 0.01, needs 0.05..1 with this table"),
    ({"strength": 1.1}, "strength: got 1.1, needs 0 < strength <= 1"),
    ({"strength": math.nan}, "strength: got nan"),
    ({"mask": torch.zeros(16, 16)}, "mask: every pixel is known"),
    ({"mask": torch.ones(16, 16)}, "mask: no pixel is known"),
    ({"mask": torch.ones(8, 16)}, "mask: got shape [8, 16], needs [3, 16, 16], or what broadcasts to it"),
    ({"images": torch.zeros(3, 8, 8)}, "images: got shape [3, 8, 8], needs [3, 16, 16]"),
    ({"images": IMAGE[None], "n": 2}, "images: got shape [1, 3, 16, 16], needs [3, 16, 16] or [2, 3, 16, 16]"),
    ({"images": IMAGE * math.nan}, "images: got NaN or infinite values, needs finite ones"),
    ({"n": 0}, "n: got 0"),
    ({"table": make_table(COSINE, "ddim"), "steps": 5}, "steps: got 5 beside a table, which has its own"),
    ({"table": make_table(COSINE, "ddim"), "clip": 1.0}, "clip: got 1.0 beside a table"),
]


@pytest.mark.parametrize(("change", "words"), BAD)
def test_bad_arguments(unet, change, words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (compared as it stands)
        edit(unet(), COSINE, **{"images": IMAGE} | change)
    assert words in str(caught.value)


def test_a_learned_table_has_no_middle(unet):
    learned = make_table(COSINE, "ddim", 4)
    object.__setattr__(learned, "weights", "0" * 64)
    with pytest.raises(ValueError, match="got a learned table"):
        edit(unet(), COSINE, IMAGE, strength=0.5, table=learned)


# The commands


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "seven.png"
    Image.fromarray((np.indices((16, 16)).sum(0) * 8).astype(np.uint8)).save(path)
    return path


def test_edit_writes_what_python_gives(ddpm, digits_run, picture, tmp_path):
    mask = np.zeros((16, 16), np.uint8)
    mask[:, 8:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    written = [tmp_path / f"{name}.npy" for name in ("like", "filled")]
    more = ("--n", 3, "--seed", 7, "--engine", "fused", "--solver", "ddim", "--steps", 5)
    assert ddpm("edit", digits_run, picture, "--npy", written[0], "--out", tmp_path / "x.png", *more).code == 0
    assert ddpm("edit", digits_run, picture, "--mask", tmp_path / "mask.png", "--npy", written[1], *more).code == 0
    like, filled = map(np.load, written)
    known = np.asarray(Image.open(picture)) / np.float32(127.5) - 1
    assert like.shape == filled.shape == (3, 1, 16, 16)
    np.testing.assert_array_equal(filled[:, 0, :, :8], np.broadcast_to(known[:, :8], (3, 16, 8)))
    assert np.abs(filled[:, 0, :, 8:] - known[:, 8:]).mean() > 0.05
    assert Image.open(tmp_path / "x.png").width > 100


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("--strength 2", "strength: got 2"),
        ("--mask {picture}.gone", "no such regular file"),
        ("--mask {black}", "mask: every pixel is known"),
        ("--mask {large}", "is 10x20, needs 16x16, what the run samples (height x width)"),
        ("--n 0", "--n: got 0"),
        ("--solver euler", "solver: got 'euler'"),
    ],
)
def test_wrong_input_is_one_line(ddpm, digits_run, picture, tmp_path, change, words):
    black, large = tmp_path / "black.png", tmp_path / "large.png"
    Image.new("L", (16, 16)).save(black)
    Image.new("L", (20, 10)).save(large)
    asked = change.format(picture=picture, black=black, large=large).split()
    answer = ddpm("edit", digits_run, picture, "--out", tmp_path / "x.png", *asked)
    assert (answer.code, answer.err.count("error: ")) == (2, 1), answer.err
    assert words in answer.err
    assert not (tmp_path / "x.png").exists()


def test_pictures_of_another_size_or_kind(ddpm, digits_run, roll_run, picture, tmp_path):
    large, colour = tmp_path / "large.png", tmp_path / "colour.png"
    Image.new("L", (20, 10)).save(large)
    Image.effect_mandelbrot((16, 16), (-2, -2, 2, 2), 9).convert("RGB").point(list(range(256)) * 2 + [9] * 256).save(
        colour
    )
    for run, path, words in (
        (digits_run, large, f"{large}: is 10x20, needs 16x16"),
        (digits_run, colour, f"{colour}: has 3 channels, needs 1"),
        (roll_run, picture, "needs images"),
    ):
        answer = ddpm("edit", run, path, "--out", tmp_path / "x.png")
        assert answer.code == 2
        assert words in answer.err


def test_between_two_seeds(ddpm, digits_run, tmp_path):
    more = ("--solver", "ddim", "--steps", 5, "--engine", "eager")
    path = tmp_path / "x.npy"
    assert ddpm("sample", digits_run, "--between", 3, 9, "--n", 5, "--npy", path, *more).code == 0
    found, ends = np.load(path), []
    for seed in (3, 9):
        assert ddpm("sample", digits_run, "--seed", seed, "--n", 1, "--npy", path, *more).code == 0
        ends.append(np.load(path)[0])
    np.testing.assert_allclose(found[[0, -1]], ends, atol=1e-5)
    own = ("--npy", path, "--out", tmp_path / "row.png", "--steps", 5, "--engine", "eager")
    answer = ddpm("sample", digits_run, "--between", 3, 9, "--n", 5, *own)
    assert "note: --between: ddpm adds noise at each step, ddim takes its place" in answer.err  # of the run's own
    np.testing.assert_array_equal(np.load(path), found)
    with Image.open(tmp_path / "row.png") as row:
        assert row.width > 5 * 64
        assert row.height < 2 * 64
    noise = [philox.normal(seed, torch.tensor([0]), 0, philox.Stream.INITIAL, (1, 16, 16)).double() for seed in (3, 9)]
    from ddpm.commands.sample import from_one_to_another

    middle = from_one_to_another((3, 9), 3, (1, 16, 16))[1].double()
    cosine = (noise[0] * noise[1]).sum() / noise[0].norm() / noise[1].norm()
    torch.testing.assert_close(middle[None], sum(noise) / (2 + 2 * cosine).sqrt(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", range(9))
def test_from_a_seed_to_itself_nothing_changes(seed):
    from ddpm.commands.sample import from_one_to_another

    noise = philox.normal(seed, torch.tensor([2]), 0, philox.Stream.INITIAL, (3, 16, 16))
    torch.testing.assert_close(from_one_to_another((seed, seed), 3, (3, 16, 16), 2), noise.expand(3, 3, 16, 16))


@pytest.mark.parametrize(
    ("asked", "words"),
    [("--solver ddpm", "adds noise at each step"), ("--solver ddim --n 1", "--n: got 1, needs an integer >= 2")],
)
def test_between_needs_a_path(ddpm, digits_run, tmp_path, asked, words):
    answer = ddpm("sample", digits_run, "--between", 3, 9, "--npy", tmp_path / "x.npy", *asked.split())
    assert answer.code == 2
    assert words in answer.err


def test_what_a_call_prepares_of_the_network_is_kept(unet, monkeypatch):
    made, make = [], inference.make_form
    monkeypatch.setattr("ddpm.inference.make_form", lambda *given: made.append(1) or make(*given))
    model = unet()
    first, again = (edit(model, COSINE, IMAGE, 1, engine="fused", steps=4, context=torch.eye(5)[:1]) for _ in range(2))
    assert torch.equal(first, again)
    assert made == [1]
