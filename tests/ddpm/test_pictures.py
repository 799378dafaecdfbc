"""Pictures: where each sample lands in the grid, and what a GIF holds."""

import math
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from ddpm import pictures
from ddpm.data import load_data
from ddpm.errors import BadInput


def test_pixels_are_clamped_and_grey_becomes_rgb():
    images = torch.tensor([-7.0, -1.0, 0.0, 1.0, 7.0]).reshape(5, 1, 1, 1)
    assert pictures.to_pixels(images)[:, 0, 0].tolist() == [[v] * 3 for v in (0, 0, 128, 255, 255)]


def test_pixels_invert_the_training_map():
    values = torch.arange(256).reshape(1, 1, 16, 16)
    assert np.array_equal(pictures.to_pixels(values / 127.5 - 1)[0, :, :, 0], values[0, 0])


@pytest.mark.parametrize(("n", "columns", "rows", "width"), [(6, 3, 2, 3), (5, None, 2, 3), (1, None, 1, 1)])
def test_grid_places_sample_k_at_row_and_column_in_reading_order(n, columns, rows, width):
    colours = torch.linspace(-1, 0.8, n)
    images = colours.reshape(n, 1, 1, 1).expand(n, 3, 16, 16)
    grid = np.asarray(pictures.render(images, columns))
    cell = 4 * 16 + pictures.GAP
    edges = 2 * pictures.MARGIN - pictures.GAP
    assert grid.shape == (rows * cell + edges, width * cell + edges, 3)
    for k in range(n):
        y, x = (pictures.MARGIN + cell * place for place in (k // width, k % width))
        assert (grid[y : y + 64, x : x + 64] == pictures.to_pixels(images)[k, 0, 0]).all()


def test_small_images_are_enlarged_pixel_by_pixel():
    image = torch.rand(1, 3, 8, 8, generator=torch.manual_seed(0)) * 2 - 1
    grid = np.asarray(pictures.render(image))
    tile = grid[pictures.MARGIN :, pictures.MARGIN :][:64, :64]
    assert np.array_equal(tile, np.repeat(np.repeat(pictures.to_pixels(image)[0], 8, 0), 8, 1))


def test_headers_and_caption_are_drawn_around_the_same_tiles():
    images = torch.zeros(4, 1, 16, 16)
    plain = pictures.render(images, 2)
    labelled = pictures.render(images, 2, ("cat", "a very long class name"), "ddpm, 20 steps, and so on and on")
    assert labelled.height > plain.height
    assert labelled.width >= plain.width
    ink = (np.asarray(labelled.convert("L")) < 100).any(axis=1)
    assert ink[: pictures.MARGIN + 14].any(), "no headers"
    assert ink[-pictures.MARGIN - 14 :].any(), "no caption"


def test_what_no_font_has_is_shown_as_number_and_code_points(monkeypatch):
    """Never one box for two classes: the headers are those of the texts that stand for them, and differ."""
    monkeypatch.setattr(pictures, "_installed_fonts", list)
    pictures._font_of.cache_clear()
    names = ["cat", "\u72ac", "\u732b", "\u0e20\u0e32", "\udcff", "a\u0301"]
    headers = [pictures.header_of(name, k) for k, name in enumerate(names)]
    assert headers == ["cat", "1 \u72ac", "2 \u732b", "3 \u0e20\u0e32", "4 \udcff", "5 a\u0301"]
    shown = ["cat", "1\nU+72AC", "2\nU+732B", "3\nU+0E20\nU+0E32", "4\nU+DCFF", "5 a\nU+0301"]
    assert [pictures._legible(header, 14)[0] for header in headers] == shown
    images = torch.ones(6, 1, 16, 16)
    grid = np.asarray(pictures.render(images, 6, headers, "context \u72ac, seed 0"))
    columns = [grid[: pictures.MARGIN + 54, pictures.MARGIN + k * (64 + pictures.GAP) :][:, :64] for k in range(6)]
    assert len({column.tobytes() for column in columns}) == 6
    assert pictures._legible("context \u72ac, seed 0", 14)[0] == "context\nU+72AC\n, seed 0"
    pictures._font_of.cache_clear()


def test_a_font_that_has_the_glyphs_is_found():
    """matplotlib brings DejaVu Sans, Pillow's own font has neither of these."""
    for name in ("caf\u00e9", "\u041f\u0440\u0438\u0432\u0435\u0442", "\u03bb"):
        assert pictures.header_of(name, 3) == name
        assert pictures._legible(name, 14)[0] == name


def test_what_is_transparent_is_drawn_on_white():
    image = torch.tensor([0.5, -0.5, 0.0, 0.0]).reshape(1, 4, 1, 1).repeat(4, 1, 1, 1)
    image[:, 3, 0, 0] = torch.tensor([-1.0, 1.0, 0.0, 7.0])
    colours = pictures.to_pixels(image)[:, 0, 0].tolist()
    assert colours == [[255, 255, 255], [191, 64, 128], [223, 159, 191], [191, 64, 128]]


def test_what_is_transparent_stays_so_in_a_picture(tmp_path):
    """Of all samples as it is; in a GIF's two kinds of pixels what less than half of one is."""
    image = torch.rand(2, 4, 16, 16, generator=torch.manual_seed(0)) * 2 - 1
    picture = pictures.render(image, 2, ("a", "b"), "a caption")
    assert picture.mode == "RGBA"
    y = picture.height - 10 - 10 - 2 * 4 - 4 - 64
    tile = np.asarray(picture)[y : y + 64 : 4, 10:74:4]
    assert np.array_equal(tile, pictures.to_values(image)[0])
    on_paper = np.asarray(Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB"))
    assert np.abs(on_paper[y : y + 64 : 4, 10:74:4].astype(int) - pictures.to_pixels(image)[0]).max() <= 1
    frames = [pictures.render(image * scale) for scale in (-1, 1)]
    pictures.save_gif(tmp_path / "a.gif", frames)
    with Image.open(tmp_path / "a.gif") as gif:
        shown = [frame.convert("RGBA") for frame in ImageSequence.Iterator(gif)]
    for frame, drawn in zip(shown, frames, strict=True):
        own, expected = np.asarray(frame), np.asarray(drawn)
        assert np.array_equal(own[..., 3], np.where(expected[..., 3] < 128, 0, 255))
    assert (own[0] == 255).all()


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("height", "width", "scale"), [(32, 8, 2), (8, 32, 2), (4, 100, 1)])
def test_the_longer_side_of_an_image_fits_its_cell(channels, height, width, scale):
    image = torch.zeros(2, channels, height, width)
    picture = pictures.render(image, 2)
    assert picture.size == (2 * width * scale + 4 + 20, height * scale + 20)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("depth", [8, 16])
def test_each_sample_is_a_png_of_its_own(tmp_path, channels, depth):
    images = torch.rand(3, channels, 5, 7, generator=torch.manual_seed(0)) * 2.4 - 1.2
    pictures.save_each(tmp_path, images, 41, depth)
    names = ["000041.png", "000042.png", "000043.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    expected = np.rint((images.clamp(-1, 1).double().numpy() + 1) / 2 * (2**depth - 1)).transpose(0, 2, 3, 1)
    for name, values in zip(names, expected, strict=True):
        content = (tmp_path / name).read_bytes()
        assert (content[24], content[25]) == (depth, {1: 0, 3: 2, 4: 6}[channels])  # of IHDR: depth, kind of colour
        assert np.abs(pictures.to_values(images, depth)[int(name[:6]) - 41] - values).max() <= 1  # rounded in float32
        with Image.open(tmp_path / name) as picture:
            picture.verify()
        with Image.open(tmp_path / name) as picture:
            read = np.asarray(picture).reshape(5, 7, channels)
        # Of colours of 16 bits Pillow reads the high byte.
        high = values if depth == 8 or channels == 1 else values // 256
        assert np.abs(read.astype(float) - high).max() <= 1


def test_more_pictures_than_files_may_be_open(tmp_path):
    """What tools for FID read: tens of thousands."""
    limits, open_now = resource.getrlimit(resource.RLIMIT_NOFILE), len(list(Path("/proc/self/fd").iterdir()))
    count = pictures.FILES_AT_ONCE + 44
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + pictures.FILES_AT_ONCE + 20, limits[1]))
    try:
        pictures.save_each(tmp_path, torch.linspace(-1, 1, count).reshape(count, 1, 1, 1), 7)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{k:06d}.png" for k in range(7, 7 + count)]
    with Image.open(tmp_path / f"{6 + count:06d}.png") as last:
        assert last.getpixel((0, 0)) == 255


def test_more_columns_than_pictures_are_no_wider(tmp_path):
    assert pictures.render(torch.zeros(2, 1, 16, 16), 10**9).size == pictures.render(torch.zeros(2, 1, 16, 16), 2).size


def test_sixteen_bits_come_back_as_they_were_written(tmp_path):
    images = torch.rand(2, 3, 16, 16, generator=torch.manual_seed(1)) * 2 - 1
    pictures.save_each(tmp_path, images, depth=16)
    assert (load_data(str(tmp_path)).values - images).abs().max() < 1.1 / 65535


def test_points_become_a_scatter_plot():
    points = torch.tensor([[1.5, 1.5]]).repeat(50, 1)
    dark = (np.asarray(pictures.render(points).convert("L")) < 200).astype(float)
    blank = (np.asarray(pictures.render(points + 100).convert("L")) < 200).astype(float)
    added = np.argwhere(dark > blank).mean(axis=0) / dark.shape
    assert added[0] < 0.4, "not in the upper half"
    assert added[1] > 0.6, "not in the right half"


def test_gif_has_every_frame_and_rests_on_the_last(tmp_path):
    frames = [Image.new("RGB", (20, 20), (40 * k, 0, 0)) for k in range(5)]
    pictures.save_gif(tmp_path / "a.gif", frames)
    with Image.open(tmp_path / "a.gif") as gif:
        shown = [
            (frame.convert("RGB").getpixel((5, 5)), frame.info["duration"]) for frame in ImageSequence.Iterator(gif)
        ]
        assert gif.info["loop"] == 0
    assert [colour for colour, _ in shown] == [(40 * k, 0, 0) for k in range(5)]
    assert [duration for _, duration in shown] == [pictures.GIF_FRAME_MS] * 4 + [pictures.GIF_LAST_MS]


@pytest.mark.parametrize("steps", [1, 2, 39, 40, 41, 1000])
def test_frames_are_few_and_the_last_is_among_them(steps):
    frames = pictures.frames_of(steps)
    assert (frames[0], frames[-1], len(frames)) == (0, steps - 1, min(steps, pictures.GIF_FRAMES_MAX))
    assert pictures.frames_of(len(frames)) == list(range(len(frames)))


@pytest.mark.parametrize("steps", [1, 2, 20, 500])
def test_trajectory_goes_from_noise_to_the_last_estimate(steps):
    estimates = [torch.full((2, 1, 4, 4), float(k)) for k in range(steps)]
    alpha_bars = [(k + 1) / (steps + 1) for k in range(steps)]
    initial = torch.full((2, 1, 4, 4), 3.0)
    frames = pictures.trajectory(estimates, alpha_bars, initial)
    assert 3 <= len(frames) <= pictures.GIF_FRAMES_MAX + 2
    assert torch.equal(frames[0], initial)
    assert torch.equal(frames[-1], estimates[-1])
    a = alpha_bars[0]
    torch.testing.assert_close(frames[1], math.sqrt(a) * estimates[0] + math.sqrt(1 - a) * initial)


def test_loss_plot_is_a_picture_of_the_losses(tmp_path):
    pictures.save_loss_plot(tmp_path / "falling.png", [1, 2, 3], [1.0, 0.1, 0.01])
    pictures.save_loss_plot(tmp_path / "rising.png", [1, 2, 3], [0.01, 0.1, 1.0])
    falling, rising = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("falling", "rising"))
    assert falling.shape == rising.shape
    assert (falling != rising).any()


def test_a_failed_picture_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(BadInput, match="No space left"):
        pictures.save_png(path, Image.new("RGB", (4, 4)))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
