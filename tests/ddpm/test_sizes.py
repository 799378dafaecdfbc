"""Pictures that are not square: height before width, data cropped to their shape, the same pictures when transposed."""

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm import ContextUnet, NoiseSchedule, Unet, edit, sample
from ddpm.data import load_data
from ddpm.engines import unavailable_reason
from ddpm.inference import form_of
from ddpm.metrics import distance
from ddpm.networks import SimpleUNet, UNet2D
from ddpm.noise import PhiloxNoise
from ddpm.sizes import asked_sides, short, sides_of
from kernels import philox
from tests.ddpm.test_graph_emulated import emulated
from tests.networks import UNET2D

RNG = np.random.default_rng(0)
SCHEDULE = NoiseSchedule.make("cosine", 12)


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("size", "sides", "stored"),
    [
        (16, (16, 16), 16),
        ("16", (16, 16), 16),
        ("16x16", (16, 16), 16),
        ("24x16", (24, 16), "24x16"),
        ([8, 20], (8, 20), "8x20"),
    ],
)
def test_a_size_is_a_side_or_height_and_width(size, sides, stored):
    assert asked_sides(size) == sides
    assert short(sides) == stored
    assert asked_sides(stored) == sides


@pytest.mark.parametrize(
    "size", ["", "24x", "x16", "24X16", "24x16x3", "-8", "1.5", " 16", "２４x16", "1e2", "16x1234567"]
)
def test_texts_that_are_no_size(size):
    with pytest.raises(ValueError, match=rf"--image-size: got {size!r}, needs a side in pixels, or HEIGHTxWIDTH"):
        asked_sides(size)


@pytest.mark.parametrize("size", [(16,), (16, 16, 16), 7.5, (16, None), True, "16", 0, (8, -8)])
def test_numbers_that_are_no_size(size):
    with pytest.raises(ValueError, match="image_size: got "):
        sides_of(size)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(
    ("height", "width", "size", "box"),
    [
        (20, 29, "24x16", (8, 0, 21, 20)),  # left, top, right, bottom: 13 columns of 29, the odd one at the right
        (31, 12, (16, 24), (0, 11, 12, 19)),
        (48, 32, "24x16", (0, 0, 32, 48)),
        (3, 40, "16x8", (19, 0, 21, 3)),
        (40, 2, "8x16", (0, 19, 2, 20)),
    ],
)
def test_pictures_are_cropped_to_the_shape_then_resized(height, width, size, box, dtype):
    top = np.iinfo(dtype).max
    images = RNG.integers(0, top + 1, (2, height, width), dtype=dtype)
    np.save("x.npy", images)
    values = load_data("x.npy", image_size=size).values
    sides = asked_sides(size)
    assert values.shape == (2, 1, *sides)
    for image, value in zip(images, values, strict=True):
        if dtype is np.uint16:
            image = (image / (top / 2) - 1).astype(np.float32)
        expected = np.asarray(Image.fromarray(image).crop(box).resize(sides[::-1], Image.Resampling.BICUBIC))
        np.testing.assert_allclose(value[0], expected if dtype is np.uint8 else expected.clip(-1, 1), atol=1e-6)


def test_data_keep_their_own_shape_without_the_option():
    images = RNG.integers(0, 256, (3, 24, 16, 3), dtype=np.uint8)
    np.save("x.npy", images)
    Path("d").mkdir()
    for k, image in enumerate(images):
        Image.fromarray(image).save(f"d/{k}.png")
    idx = bytes((0, 0, 8, 3)) + np.array([3, 24, 16], ">i4").tobytes() + images[..., 0].tobytes()
    Path("x-idx3-ubyte").write_bytes(idx)
    for source, channels in (("x.npy", 3), ("d", 3), ("x-idx3-ubyte", 1)):
        values = load_data(source).values
        assert np.array_equal(values, images[..., :channels].transpose(0, 3, 1, 2)), source


@pytest.mark.parametrize(("size", "found"), [("24x0", "24x0"), ("0x24", "0x24"), ("9460x8", "9460x8")])
def test_sizes_out_of_range(size, found):
    with pytest.raises(ValueError, match=f"--image-size: got {found}, needs a side of 1..9459"):
        load_data("digits", image_size=size)


# --- networks and engines: an independent statement, the transposed network on transposed noise ----------------------


def transposed(state):
    """A state dict whose convolutions see rows where they saw columns."""
    made = {name: value.mT if value.ndim == 4 and "mem_kv" not in name else value for name, value in state.items()}
    for name, value in made.items():  # what a Unet's PixelUnshuffle gives: channel 4 c + 2 row + column
        if name.startswith("downs.") and name.endswith(".3.1.weight"):
            made[name] = value.unflatten(1, (-1, 2, 2)).transpose(2, 3).flatten(1, 3)
    return {name: value.contiguous() for name, value in made.items()}


def turned_noise(samples, step, stream, shape):
    """The contract's noise of the transposed shape, transposed."""
    return PhiloxNoise(5)(samples, step, stream, (shape[0], shape[2], shape[1])).mT.contiguous()


def unet2d(sides):
    return UNet2D(**UNET2D | {"sample_size": list(sides)})


NETWORKS = {
    "context_unet": lambda sides: ContextUnet(1, 32, 3, sides),
    "context_unet, three levels": lambda sides: ContextUnet(1, 8, 3, (2 * sides[0], 2 * sides[1]), (1, 2, 2)),
    "simple_unet": lambda sides: SimpleUNet(1, 8, 3, (sides[0] + 3, sides[1] + 3), (1, 2)),
    "unet": lambda sides: Unet(8, dim_mults=(1, 2), channels=1, image_size=sides),
    "unet, self_condition": lambda sides: Unet(8, dim_mults=(1, 2), channels=1, image_size=sides, self_condition=True),
    "unet2d": unet2d,
}
ENGINES = ["eager", "fused", "native", "graph", pytest.param("compile", marks=pytest.mark.long)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NETWORKS)
def test_transposed_networks_draw_transposed_pictures(name, engine, monkeypatch):
    torch.manual_seed(0)
    model, turned = (NETWORKS[name](sides).eval() for sides in ((16, 8), (8, 16)))
    turned.load_state_dict(transposed(model.state_dict()))
    lack = unavailable_reason(engine, torch.device("cpu"), form=form_of(model))
    if engine == "native" and lack:
        pytest.skip(f"needs {lack}")
    classes = model.condition_shape is not None
    options = {"solver": "ddpm", "steps": 3, "prediction": "v", "clip": 1.0}
    options |= {"context": torch.eye(3)[1], "guidance": 2.0} if classes else {}
    expected = sample(turned, SCHEDULE, 2, engine="eager", noise=turned_noise, **options)
    assert expected.shape == (2, *turned.sample_shape)
    with emulated(monkeypatch) if engine == "graph" else nullcontext():
        found = sample(model, SCHEDULE, 2, engine=engine, seed=5, **options)
    assert distance(found.mT, expected) < 1e-4
    assert found.std() > 0.1


def test_noise_is_numbered_by_channel_row_and_column():
    (drawn,) = philox.normal(7, torch.tensor([3]), 2, 1, (3, 4, 6))
    (flat,) = philox.normal(7, torch.tensor([3]), 2, 1, (72,))
    assert drawn[2, 1, 5] == flat[2 * 24 + 1 * 6 + 5]


def test_editing_keeps_known_pixels_of_any_shape():
    torch.manual_seed(0)
    model, image = ContextUnet(3, 8, 0, (16, 8)).eval(), torch.rand(3, 16, 8) * 2 - 1
    mask = torch.zeros(16, 8)
    mask[10:, :3] = 1
    found = [edit(model, SCHEDULE, image, 2, strength=1.0, mask=mask, clip=1.0, engine=e) for e in ("eager", "fused")]
    assert distance(*found) < 1e-4
    assert torch.equal(found[0][:, :, mask == 0], image[:, mask == 0].expand(2, -1, -1))
    with pytest.raises(ValueError, match=r"images: got shape \[3, 8, 16\], needs \[3, 16, 8\]"):
        edit(model, SCHEDULE, image.mT)


# --- the command line -------------------------------------------------------------------------------------------------


def test_a_run_remembers_its_size_and_goes_on(oblong_run, ddpm):
    run = oblong_run
    config = json.loads((run / "config.json").read_text())
    assert (config["training"]["image_size"], config["model"]["height"]) == ("24x16", [24, 16])
    resume = ("train", "--out", run, "--resume", "--image-size")
    assert ddpm(*resume, "24x16").out.startswith("finished before")
    for size in ("16x24", "24"):
        answer = ddpm(*resume, size)
        assert answer.code == 2
        assert answer.err.startswith(f"error: --image-size: got {size}, but {run} was started with 24x16: ")
    answer = ddpm(
        "train",
        "--out",
        "new",
        "--data",
        oblong_run.parent / "x.npy",
        "--init",
        run,
        "--image-size",
        "16x24",
        "--n-feat",
        8,
    )
    assert answer.code == 2
    assert "samples of shape [3, 24, 16], this run [3, 16, 24], needs the same" in answer.err


def test_its_pictures_are_as_high_and_wide(oblong_run, ddpm):
    how = ("--n", 6, "--context", "all", "--steps", 3, "--npy", "z.npy", "--out", "z.png", "--gif", "z.gif")
    answer = ddpm("sample", oblong_run, *how, "--png-dir", "each")
    assert answer.code == 0, answer.err
    images = np.load("z.npy")
    assert images.shape == (6, 3, 24, 16)
    with Image.open("each/000004.png") as picture:
        assert picture.size == (16, 24)
        values = np.rint((images[4].clip(-1, 1) + 1) * 127.5).transpose(1, 2, 0)
        assert np.abs(np.asarray(picture) - values).max() <= 1
        tile = np.asarray(picture.resize((32, 48), Image.Resampling.NEAREST))
    grid = np.asarray(Image.open("z.png"))
    y, x = grid.shape[0] - 10 - 14 - 2 * 4 - 48, 10 + 1 * (32 + 4)  # the lower row, class 1; margin, caption and gaps
    assert np.array_equal(grid[y : y + 48, x : x + 32], tile)
    with Image.open("z.gif") as gif:
        assert gif.width >= 3 * (16 * 2 + 4) - 4
    assert ddpm("evaluate", oblong_run, "--n", 6, "--steps", 2).code == 0
    size = ("edit", oblong_run, "each/000004.png", "--n", 2, "--steps", 4, "--npy", "e.npy")
    assert ddpm(*size).code == 0
    assert np.load("e.npy").shape == (2, 3, 24, 16)


@pytest.mark.parametrize("option", ["image", "--mask"])
def test_a_picture_of_another_size_is_named_with_both(oblong_run, ddpm, option):
    Image.new("RGB", (24, 16)).save("wide.png")
    Image.new("RGB", (16, 24)).save("high.png")
    words = ("wide.png",) if option == "image" else ("high.png", "--mask", "wide.png")
    answer = ddpm("edit", oblong_run, *words, "--npy", "e.npy")
    needs = "needs 24x16, what the run samples (height x width)"
    assert (answer.code, answer.err) == (2, f"error: wide.png: is 16x24, {needs}\n")
