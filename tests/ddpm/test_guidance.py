"""Guidance with a weight a sample, negative conditions, an interval and rescale, against mathematics in float64."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from ddpm import NoiseSchedule, edit, engines, make_table, sample
from ddpm.inference import PlainForm
from ddpm.metrics import ENGINE_TOLERANCE, distance

SCHEDULE = NoiseSchedule.make("cosine", 40)
SEED, N, STEPS = 3, 4, 20
MEANS, AWAY = torch.tensor([[0.9, -0.3, 0.4, 0.0]]), torch.tensor([[-0.5, 0.2, 0.1, 0.6]])
CONTEXTS, NEGATIVES = MEANS * torch.linspace(0.5, 1, N)[:, None], AWAY * torch.linspace(1, -1, N)[:, None]
WEIGHTS = [2.5, 1.0, -1.5, 7.0]
HERE = [
    pytest.param(name, marks=pytest.mark.long if name == "compile" else ())
    for name in engines.ENGINES
    if engines.unavailable_reason(name, torch.device("cpu"), form=PlainForm) is None
]
NATIVE = [] if engines.unavailable_reason("native", torch.device("cpu")) else ["native"]


class Gaussian(torch.nn.Module):
    """The exact eps of data N(c, 0.5^2): its guided score is that of a Gaussian around u + w (c - u)."""

    sample_shape = condition_shape = (4,)

    def forward(self, x, t, c=None):
        ab = SCHEDULE.alpha_bars[(t.double() * 40).round().long()].to(x.dtype)[:, None]
        return (1 - ab).sqrt() * (x - ab.sqrt() * (0 if c is None else c)) / (ab * 0.25 + 1 - ab)


def exact(normals, negatives, weights, interval=(0, 1), phi=0.0):
    """DDIM on Gaussian data [n, 4] in float64, each sample by itself."""
    grid = [40 - 2 * k for k in range(STEPS)]
    found = normals(SEED, range(N), 0, 0, (4,))
    for x, c, u, w in zip(found, CONTEXTS.double().numpy(), negatives.double().numpy(), weights, strict=True):
        for t, later in zip(grid, [*grid[1:], 0], strict=True):
            a, s = (SCHEDULE.alpha_bars[k].item() for k in (t, later))
            weight = w if interval[0] < t / 40 <= interval[1] else 1.0
            both = [math.sqrt(1 - a) * (x - math.sqrt(a) * mean) / (a / 4 + 1 - a) for mean in (c, u)]
            m = both[1] + weight * (both[0] - both[1])
            if weight != 1:
                m = phi * m * both[0].std() / m.std() + (1 - phi) * m
            x[:] = math.sqrt(s) * (x - math.sqrt(1 - a) * m) / math.sqrt(a) + math.sqrt(1 - s) * m
    return found


WAYS = {
    "one a sample": {"guidance": WEIGHTS},
    "negative": {"guidance": 3.0, "negative": NEGATIVES},
    "interval": {"guidance": 3.0, "guidance_interval": (0.25, 0.7)},
    "rescale": {"guidance": 4.0, "guidance_rescale": 0.7},
    "all": {
        "guidance": torch.tensor(WEIGHTS),
        "negative": NEGATIVES,
        "guidance_interval": (0.3, 0.85),
        "guidance_rescale": 0.4,
    },
}
DRAW = {"solver": "ddim", "steps": STEPS, "context": CONTEXTS, "seed": SEED}


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", HERE)
def test_gaussian_data_guided_in_float64(engine, way, plain_normals):
    options = WAYS[way]
    weights = np.broadcast_to(np.asarray(options["guidance"], np.float64), N)
    negatives = options.get("negative", torch.zeros(N, 4))
    how = options.get("guidance_interval", (0, 1)), options.get("guidance_rescale", 0.0)
    expected = exact(plain_normals, negatives, weights, *how)
    found = sample(Gaussian(), SCHEDULE, N, engine=engine, batch_size=3, **DRAW, **options)
    assert np.abs(found.numpy() - expected).max() < 2e-5
    if engine == "eager":
        precise = sample(Gaussian().double(), SCHEDULE, N, engine=engine, dtype=torch.float64, **DRAW, **options)
        assert np.abs(precise.numpy() - expected).max() < 1e-6


@pytest.mark.parametrize("engine", ["eager", "fused"])
def test_guidance_is_sampling_around_the_guided_mean(engine):
    """In closed form: w leads to N(u + w (c - u), 0.5^2) by the same noise."""
    draw = partial(sample, Gaussian(), SCHEDULE, N, engine=engine, **DRAW | {"context": MEANS[0]})
    guided = draw(guidance=2.5, negative=AWAY[0])
    plain = draw(context=AWAY[0] + 2.5 * (MEANS[0] - AWAY[0]))
    torch.testing.assert_close(guided, plain, atol=2e-5, rtol=0)


@pytest.fixture
def draw(unet):
    """Pictures of a ContextUnet: draw(n, engine, ...)."""
    model, contexts = unet(), torch.eye(5)[torch.arange(N) % 5]

    def call(engine="fused", first=0, n=N, make=sample, **options):
        more = {
            "solver": "ddpm",
            "steps": 6,
            "prediction": "v",
            "clip": 1.0,
            "seed": 9,
            "context": contexts[first : first + n],
        }
        return make(model, SCHEDULE, **{"n": n, "first_sample": first, "engine": engine} | more | options)

    return call


PICTURES = {name: dict(options) for name, options in WAYS.items()}
for each in PICTURES.values():
    if "negative" in each:
        each["negative"] = torch.eye(5)[[4, 3, 2, 0]]


@pytest.mark.parametrize("way", PICTURES)
@pytest.mark.parametrize("engine", ["fused", *NATIVE, pytest.param("compile", marks=pytest.mark.long)])
def test_the_same_pictures_on_every_engine_and_in_every_chunk(draw, way, engine):
    options = PICTURES[way]
    whole = draw(engine, **options)
    assert distance(whole, draw("eager", **options)) < ENGINE_TOLERANCE
    assert distance(draw(engine, batch_size=3, **options), whole) < 1e-5


@pytest.mark.parametrize("engine", ["eager", "fused"])
@pytest.mark.parametrize("make", [sample, edit])
def test_a_weight_a_sample_is_each_sample_alone(draw, engine, make):
    given = {"make": make}
    if make is edit:
        given |= {"images": torch.zeros(3, 16, 16).sin(), "strength": 0.7}
    whole = draw(engine, **PICTURES["all"], **given)
    for k, w in enumerate(WEIGHTS):
        options = PICTURES["all"] | {"guidance": w, "negative": PICTURES["all"]["negative"][k]}
        if w == 1:  # nothing to guide, nothing to say of how
            options = {"guidance_interval": (0.3, 0.85)}
        assert distance(draw(engine, first=k, n=1, **options, **given), whole[k : k + 1]) < 1e-5


@pytest.mark.parametrize("engine", ["eager", "fused"])
def test_what_changes_nothing_changes_no_bit(draw, engine):
    plain = draw(engine, guidance=2.5)
    for same in (
        {"negative": torch.zeros(5)},  # the null condition
        {"guidance_interval": (0, 1)},
        {"guidance_rescale": 0.0},
        {"guidance": [2.5] * N},
    ):
        assert torch.equal(draw(engine, **{"guidance": 2.5} | same), plain), same
    unguided = draw(engine)
    ones = {"guidance": [1.0] * N, "negative": torch.eye(5)[2], "guidance_rescale": 0.5}  # one rank's, say
    assert torch.equal(draw(engine, **ones), unguided)
    assert distance(draw(engine, guidance=2.5, guidance_interval=(0, 0.01)), unguided) < 1e-5
    for other in ({"negative": torch.eye(5)[2]}, {"guidance_interval": (0.2, 0.8)}, {"guidance_rescale": 0.5}):
        assert distance(draw(engine, guidance=2.5, **other), plain) > 1e-3, other


def test_pictures_with_masks_have_weights_and_negatives_of_their_own(draw):
    images, mask = torch.stack([torch.full((3, 16, 16), k / 8) for k in range(N)]), torch.zeros(16, 16)
    mask[:, 8:] = 1
    more = {"make": edit, "mask": mask, "strength": 1.0}
    whole = draw(images=images, **more, **PICTURES["all"])
    options = PICTURES["all"] | {"guidance": WEIGHTS[3], "negative": PICTURES["all"]["negative"][3]}
    assert distance(draw(first=3, n=1, images=images[3], **more, **options), whole[3:]) < 1e-5


def test_the_interval_is_a_column_of_the_table():
    table = make_table(SCHEDULE, "ddpm", 10, guidance_interval=(0.3, 0.7), resample=2)
    inside = [float(12 < t <= 28) for t in table.timesteps.tolist()]
    assert table.guidance_scale.tolist() == inside
    assert table.made_for["guidance_interval"] == [0.3, 0.7]
    assert table.from_row(8).guidance_scale.tolist() == inside[8:]
    # Bounds are exact for every share that is written in decimals.
    every = make_table(NoiseSchedule.make("cosine", 100), "ddim", guidance_interval=(0.28, 0.57))
    assert every.timesteps[every.guidance_scale == 1].tolist() == list(range(57, 28, -1))


BAD = [
    ({"guidance": [2.0, 3.0]}, r"guidance: got weights [2], needs a number or [4], one for each sample"),
    ({"guidance": torch.ones(4, 1) * 2}, "guidance: got weights [4, 1], needs a number or [4]"),
    ({"guidance": [2.0, math.nan, 1.0, 1.0]}, "guidance: got nan for sample 1 of the 4, needs finite"),
    ({"guidance": [2.0, 1.0, 1e39, 1.0]}, "guidance: got 1e+39 for sample 2"),
    ({"guidance": ["a", 1, 1, 1]}, "guidance: got a list, needs a tensor or numbers"),
    ({"guidance": [2.0] * 4, "context": None}, "guidance: got [2.0, 2.0, 2.0, 2.0] without a context"),
    ({"negative": torch.zeros(5)}, "negative: got conditions without guidance, needs a guidance other than 1"),
    ({"negative": torch.zeros(5), "guidance": torch.ones(())}, "negative: got conditions without guidance"),
    ({"negative": torch.zeros(4), "guidance": 2.0}, "negative: got shape [4], needs [4, 5] or [5]"),
    ({"negative": torch.full((5,), math.nan), "guidance": 2.0}, "negative: got NaN or infinite values"),
    ({"guidance_rescale": 0.5}, "guidance_rescale: got 0.5 without guidance"),
    ({"guidance_rescale": 1.5, "guidance": 2.0}, "guidance_rescale: got 1.5, needs 0 <= phi <= 1"),
    ({"guidance_rescale": math.nan, "guidance": 2.0}, "guidance_rescale: got nan"),
    ({"guidance_interval": (0.8, 0.2)}, "guidance_interval: got (0.8, 0.2), needs low,high with 0 <= low < high <= 1"),
    ({"guidance_interval": (0.2, 1.1)}, "guidance_interval: got (0.2, 1.1), needs"),
    ({"guidance_interval": (0.2, math.nan)}, "guidance_interval: got (0.2, nan), needs"),
    ({"guidance_interval": 0.2}, "guidance_interval: got 0.2, needs"),
    ({"guidance_interval": (0.1, 0.2, 0.3)}, "guidance_interval: got (0.1, 0.2, 0.3), needs"),
]


@pytest.mark.parametrize(("change", "words"), BAD)
def test_bad_arguments(draw, change, words):
    with pytest.raises((TypeError, ValueError)) as caught:
        draw(**change)
    assert words in str(caught.value)


def test_an_interval_beside_a_table_is_refused(draw):
    table = make_table(SCHEDULE, "ddim", 4)
    with pytest.raises(ValueError, match=r"guidance_interval: got .* beside a table"):
        sample(Gaussian(), SCHEDULE, 1, table=table, guidance_interval=(0.1, 0.9))


# The commands


def test_commands_draw_what_python_draws(ddpm, digits_run, tmp_path):
    from ddpm import load_run

    run = load_run(digits_run)
    path, more = tmp_path / "x.npy", ("--solver", "ddim", "--steps", 5, "--engine", "fused", "--seed", 7, "--n", 3)
    asked = ("--context", 3, "--guidance", "2,1,-3", "--negative", "all", "--guidance-interval", "0.2,0.9")
    asked += ("--guidance-rescale", 0.7, "--first-sample", 2)
    answer = ddpm("sample", digits_run, "--npy", path, "--out", tmp_path / "x.png", *more, *asked)
    assert answer.code == 0, answer.err
    options = run.options(solver="ddim", steps=5, guidance_interval=(0.2, 0.9))
    how = {"guidance": [2, 1, -3], "negative": torch.eye(10)[2:5], "guidance_rescale": 0.7}
    python = sample(run.model, run.schedule, 3, context=run.context("3"), seed=7, first_sample=2, **how, **options)
    assert distance(torch.from_numpy(np.load(path)), python) < 1e-5
    picture = tmp_path / "a.png"
    from PIL import Image

    Image.fromarray((np.indices((16, 16)).sum(0) * 8).astype(np.uint8)).save(picture)
    answer = ddpm("edit", digits_run, picture, "--npy", path, *more, *asked, "--strength", 0.5)
    assert answer.code == 0, answer.err
    image = torch.from_numpy(np.asarray(Image.open(picture))[None])
    more = {"strength": 0.5, "context": run.context("3"), "seed": 7, "first_sample": 2}
    python = edit(run.model, run.schedule, image, 3, **more, **how, **options)
    assert distance(torch.from_numpy(np.load(path)), python) < 1e-5


@pytest.mark.long
def test_ranks_take_their_own_weights_and_negatives(digits_run, spawn, tmp_path):
    written = [tmp_path / f"{ranks}.npy" for ranks in (0, 2)]
    asked = ("--context", 3, "--guidance", "2,1,-3", "--negative", "all", "--solver", "ddim", "--steps", 5)
    for ranks, path in zip((0, 2), written, strict=True):
        process = spawn("sample", digits_run, "--n", 3, "--npy", path, "--device", "cpu", *asked, ranks=ranks)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    one, two = map(np.load, written)
    np.testing.assert_allclose(two, one, atol=1e-5)


@pytest.mark.parametrize("command", ["sample", "edit"])
@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("--context 3 --negative 4", "--negative: got 4 without guidance, needs a --guidance other than 1"),
        ("--guidance 2 --negative 4", "guidance: got 2.0 without a context"),
        ("--context 3 --guidance 2 --negative eleven", "--negative: got 'eleven', needs a class"),
        ("--context 3 --guidance 2,3", "--guidance: got 2 numbers, needs one, or 8: one for each sample"),
        ("--context 3 --guidance 2,nan,1,1,1,1,1,1", "guidance: got nan for sample 1"),
        ("--context 3 --guidance nan", "guidance: got nan, needs a finite number"),
        ("--context 3 --guidance two", "--guidance: got 'two', needs a number, or one for each sample"),
        ("--context 3 --guidance-interval .2,.8", "--guidance-interval: got .2,.8 without guidance"),
        ("--context 3 --guidance 2 --guidance-interval .8,.2", "guidance_interval: got [0.8, 0.2], needs low,high"),
        ("--context 3 --guidance 2 --guidance-interval all", "--guidance-interval: got 'all', needs LO,HI"),
        ("--context 3 --guidance-rescale .5", "--guidance-rescale: got 0.5 without guidance"),
        ("--context 3 --guidance 2 --guidance-rescale 2", "guidance_rescale: got 2.0, needs 0 <= phi <= 1"),
    ],
)
def test_wrong_input_is_one_line(ddpm, digits_run, tmp_path, command, asked, words):
    from PIL import Image

    Image.new("L", (16, 16)).save(tmp_path / "a.png")
    given = (tmp_path / "a.png",) if command == "edit" else ()
    answer = ddpm(command, digits_run, *given, "--n", 8, "--npy", tmp_path / "x.npy", *asked.split())
    assert (answer.code, answer.err.count("error: "), answer.err.count("\n")) == (2, 1, 1), answer.err
    assert words in answer.err
    assert not (tmp_path / "x.npy").exists()
