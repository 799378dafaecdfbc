"""What a picture's file shows, in every form that such files have: how it is turned, grey, transparent, 16 bits."""

import itertools
import os
import struct
import sys
import unicodedata
import weakref
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, features

from ddpm import image_files
from ddpm.data import load_data, to_unit
from ddpm.errors import BadInput
from ddpm.image_files import fitted, suffixes

RNG = np.random.default_rng(3)
GREY = RNG.integers(0, 256, (16, 16), dtype=np.uint8)
RGB = RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (16, 16, 4), dtype=np.uint16)
WHITE = 65535


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "pictures"
    made.mkdir()
    return made


def shown(folder, **options):
    """The only picture of a folder, as [H, W, C]."""
    (value,) = load_data(str(folder), **options).values
    return value.permute(1, 2, 0).numpy()


def unit(values, white=WHITE):
    return values.astype(np.float64) / white * 2 - 1


# --- orientation --------------------------------------------------------------------------------------------------

# What is seen at [y, x] of a picture stored as a, by the EXIF specification: where its row 0 and its column 0 are.
SEEN = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[::-1],
}
LOSSLESS = {"png": {}, "webp": {"lossless": True}, "tiff": {}, "tif": {"compression": "tiff_lzw"}}


@pytest.mark.parametrize("suffix", LOSSLESS)
@pytest.mark.parametrize("orientation", SEEN)
def test_a_picture_is_turned_as_viewers_turn_it(folder, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(RGB).save(folder / f"a.{suffix}", exif=exif, **LOSSLESS[suffix])
    assert np.array_equal(shown(folder), SEEN[orientation](RGB))


@pytest.mark.parametrize("orientation", SEEN)
def test_a_photo_is_turned_before_it_is_cropped(folder, orientation):
    stored = np.repeat(np.repeat(RNG.integers(0, 256, (3, 4, 3), dtype=np.uint8), 8, 0), 8, 1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(folder / "a.jpg", exif=exif, quality=95)
    with Image.open(folder / "a.jpg") as photo:
        turned = np.asarray(ImageOps.exif_transpose(photo))
    height, width = turned.shape[:2]
    top, left = (height - 24) // 2, (width - 24) // 2
    assert np.array_equal(shown(folder, image_size=24), turned[top : top + 24, left : left + 24])


def test_damaged_exif_leaves_the_pixels(folder):
    Image.fromarray(RGB).save(folder / "a.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xffgarbage")
    assert np.array_equal(shown(folder), RGB)


def test_deep_pictures_are_turned_too(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(DEEP[..., 0]).save(folder / "a.png", exif=exif)
    np.testing.assert_allclose(shown(folder)[..., 0], SEEN[6](unit(DEEP[..., 0])), atol=1e-6)


# --- grey and transparent -----------------------------------------------------------------------------------------

FIGURE = np.full((16, 16), 128, np.uint8)
FIGURE[:4] = 0  # around it, transparent
OPACITY = np.where(FIGURE == 0, 0, 255).astype(np.uint8)
ON_WHITE = np.where(FIGURE == 0, 255, FIGURE)


def palette(*colours):
    """The figure in the first of two colours, what is around it in the second."""
    image = Image.fromarray((FIGURE == 0).astype(np.uint8), "L").convert("P")
    image.putdata((FIGURE == 0).astype(np.uint8).reshape(-1).tolist())
    image.putpalette([part for colour in colours for part in colour])
    return image


def bands(mode, *planes):
    return Image.merge(mode, [Image.fromarray(plane) for plane in planes])


GREY_FORMS = {
    "LA": (bands("LA", FIGURE, OPACITY), "png", {}),
    "LA-tiff": (bands("LA", FIGURE, OPACITY), "tif", {}),
    "L-tRNS": (Image.fromarray(FIGURE), "png", {"transparency": 0}),
    "palette": (palette((128,) * 3, (255,) * 3), "png", {}),
    "palette-tRNS": (palette((128,) * 3, (0,) * 3), "png", {"transparency": 1}),
    "palette-tRNS-of-a-colour": (palette((128,) * 3, (255, 0, 255)), "png", {"transparency": 1}),
    "palette-alphas": (palette((128,) * 3, (9,) * 3), "png", {"transparency": b"\xff\0"}),
    "gif": (palette((128,) * 3, (255,) * 3), "gif", {}),
    "gif-transparent": (palette((128,) * 3, (0,) * 3), "gif", {"transparency": 1}),
    "bmp": (Image.fromarray(ON_WHITE), "bmp", {}),
    "tiff": (Image.fromarray(ON_WHITE), "tiff", {"compression": "tiff_deflate"}),
    "pgm": (Image.fromarray(ON_WHITE), "pgm", {}),
}
COLOUR_FORMS = {
    "RGBA": (bands("RGBA", FIGURE, FIGURE, FIGURE, OPACITY), "png", {}),
    "RGB-tRNS": (bands("RGB", FIGURE, FIGURE, FIGURE), "png", {"transparency": (0, 0, 0)}),
    "RGBA-webp": (bands("RGBA", FIGURE, FIGURE, FIGURE, OPACITY), "webp", {"lossless": True}),
    "RGB": (bands("RGB", ON_WHITE, ON_WHITE, ON_WHITE), "png", {}),
}


@pytest.mark.parametrize("name", [*GREY_FORMS, *COLOUR_FORMS])
def test_transparent_is_white_and_grey_is_one_channel(folder, name):
    image, suffix, options = (GREY_FORMS | COLOUR_FORMS)[name]
    image.save(folder / f"a.{suffix}", **options)
    expected = np.repeat(ON_WHITE[..., None], 1 if name in GREY_FORMS else 3, axis=2)
    assert np.array_equal(shown(folder), expected)


def test_a_bit_that_is_transparent_is_white(folder):
    for name, transparent in (("a", 0), ("b", None)):
        options = {} if transparent is None else {"transparency": transparent}
        Image.fromarray(FIGURE).point(lambda v: 255 * (v > 0)).convert("1").save(folder / f"{name}.png", **options)
    values = load_data(str(folder)).values
    assert values.shape[1] == 1
    assert (values[0] == 255).all()
    assert np.array_equal(values[1, 0], np.where(FIGURE == 0, 0, 255))


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "P"])
def test_other_modes_are_what_pillow_makes_of_them(folder, mode):
    image = Image.fromarray(RGB).convert(mode)
    image.save(folder / "a.tif", **({} if mode == "P" else {"compression": "raw"}))
    with Image.open(folder / "a.tif") as stored:
        assert np.array_equal(shown(folder), np.asarray(stored.convert("RGB")))


def test_half_transparent_colours_are_composed_as_pillow_does(folder):
    rgba = np.dstack((RGB, GREY))
    Image.fromarray(rgba).save(folder / "a.png")
    exact = RGB * (GREY[..., None] / 255.0) + 255 - GREY[..., None]
    assert np.abs(shown(folder) - exact).max() <= 1
    composed = Image.alpha_composite(Image.new("RGBA", (16, 16), "white"), Image.fromarray(rgba)).convert("RGB")
    assert np.array_equal(shown(folder), composed)


def test_alpha_is_kept_when_asked_for(folder):
    rgba = np.dstack((RGB, GREY))
    Image.fromarray(rgba).save(folder / "a.png")
    Image.fromarray(GREY).save(folder / "b.png")
    values = load_data(str(folder), alpha=True).values
    assert np.array_equal(values[0].permute(1, 2, 0), rgba)
    assert np.array_equal(values[1].permute(1, 2, 0), np.dstack((GREY, GREY, GREY, np.full_like(GREY, 255))))
    small = load_data(str(folder), image_size=8, alpha=True).values[0].permute(1, 2, 0)
    assert np.array_equal(small, Image.fromarray(rgba).resize((8, 8), Image.Resampling.BICUBIC))


# --- more than 8 bits ---------------------------------------------------------------------------------------------


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def deep_png(values, *extra):
    """A PNG of 16 bits, written by its definition."""
    height, width, channels = values.shape
    header = struct.pack(">2I5B", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def deep_tiff(values, order, bits=16, packed=False, photometric=None, planes=1, kind=1):
    """A TIFF, written by its definition. kind: 1 unsigned, 2 signed, 3 floating."""
    height, width, channels = values.shape
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    data = zlib.compress(data) if packed else data
    photometric = (1 if channels < 3 else 2) if photometric is None else photometric
    extra = {4: [2]}.get(channels, [])
    tags = [(256, "H", [width]), (257, "H", [height]), (258, "H", [bits] * channels), (259, "H", [8 if packed else 1])]
    tags += [(262, "H", [photometric]), (273, "I", [8]), (277, "H", [channels]), (278, "H", [height])]
    tags += [(279, "I", [len(data)]), (284, "H", [planes])]
    tags += ([(338, "H", extra)] if extra else []) + [(339, "H", [kind] * channels)]
    at = 8 + len(data) + len(data) % 2
    body, far = struct.pack(order + "H", len(tags)), b""
    beyond = at + 2 + 12 * len(tags) + 4
    for tag, code, numbers in tags:
        content = struct.pack(f"{order}{len(numbers)}{code}", *numbers)
        if len(content) > 4:
            content, far = struct.pack(order + "I", beyond + len(far)), far + content
        body += struct.pack(order + "2HI", tag, {"H": 3, "I": 4}[code], len(numbers)) + content.ljust(4, b"\0")
    start = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, at)
    return start + data + b"\0" * (len(data) % 2) + body + bytes(4) + far


def composed(values):
    """In [-1, 1] on white; the last of 2 or 4 channels is opacity."""
    values = values.astype(np.float64) / WHITE
    if values.shape[2] in (2, 4):
        opacity = values[..., -1:]
        values = values[..., :-1] * opacity + (1 - opacity)
    return values * 2 - 1


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_of_sixteen_bits_keeps_its_values(folder, channels):
    values = DEEP[..., :channels]
    (folder / "a.png").write_bytes(deep_png(values))
    loaded = shown(folder)
    assert loaded.dtype == np.float32
    np.testing.assert_allclose(loaded, composed(values), atol=1e-6)
    kept = shown(folder, alpha=True)
    opacity = values[..., -1:] if channels in (2, 4) else np.full((16, 16, 1), WHITE)
    colour = np.broadcast_to(values[..., : 3 if channels > 2 else 1], (16, 16, 3))
    np.testing.assert_allclose(kept, unit(np.concatenate((colour, opacity), axis=2)), atol=1e-6)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_tiff_of_sixteen_bits_keeps_its_values_in_both_byte_orders(folder, channels, packed, order):
    (folder / "a.tif").write_bytes(deep_tiff(DEEP[..., :channels], order, packed=packed))
    np.testing.assert_allclose(shown(folder), composed(DEEP[..., :channels]), atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_transparency_of_one_deep_colour_is_white(folder, channels):
    values = DEEP[..., :channels].copy()
    values[:4] = 300  # of which another colour has the same high byte
    values[4:6] = 301
    (folder / "a.png").write_bytes(deep_png(values, (b"tRNS", struct.pack(f">{channels}H", *[300] * channels))))
    expected = composed(values)
    expected[:4] = 1
    np.testing.assert_allclose(shown(folder), expected, atol=1e-6)


def test_one_deep_picture_makes_all_of_them_that(folder):
    Image.fromarray(GREY).save(folder / "a.png")
    (folder / "b.png").write_bytes(deep_png(DEEP[..., :3]))
    Image.fromarray(RGB).save(folder / "c.png")
    values = load_data(str(folder)).values.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(values[0], unit(np.repeat(GREY[..., None], 3, 2), 255), atol=1e-6)
    np.testing.assert_allclose(values[1], composed(DEEP[..., :3]), atol=1e-6)
    np.testing.assert_allclose(values[2], unit(RGB, 255), atol=1e-6)


def test_twelve_bits_are_scaled_by_what_they_reach(folder):
    pairs = RNG.integers(0, 4096, (16, 8, 2))
    packed = np.stack(
        (pairs[..., 0] >> 4, (pairs[..., 0] & 15) << 4 | pairs[..., 1] >> 8, pairs[..., 1] & 255), axis=-1
    )
    content = bytearray(deep_tiff(np.zeros((16, 16, 1), np.uint16), "<", bits=12))
    content[8 : 8 + packed.size] = packed.astype(np.uint8).tobytes()
    (folder / "a.tif").write_bytes(content)
    np.testing.assert_allclose(shown(folder)[..., 0], unit(pairs.reshape(16, 16), 4095), atol=1e-6)


def test_white_may_be_the_least_value(folder):
    (folder / "a.tif").write_bytes(deep_tiff(DEEP[..., :1], "<", photometric=0))
    np.testing.assert_allclose(shown(folder), -composed(DEEP[..., :1]), atol=1e-6)


@pytest.mark.parametrize("order", "<>")
def test_a_stated_range_scales_what_has_none(folder, order):
    values = RNG.uniform(0, 1, (16, 16, 1)).astype(np.float32)
    (folder / "a.tif").write_bytes(deep_tiff(values, order, bits=32, kind=3))
    with pytest.raises(BadInput, match=r"a\.tif: holds float32, needs --range LO,HI"):
        load_data(str(folder))
    np.testing.assert_allclose(shown(folder, value_range=(0, 1)), values * 2.0 - 1, atol=1e-6)
    with pytest.raises(BadInput, match=r"a\.tif: has values .*, needs 0\.\.0\.5 "):
        load_data(str(folder), value_range=(0, 0.5))
    signed = RNG.integers(-1000, 3000, (16, 16, 1)).astype(np.int16)
    (folder / "a.tif").write_bytes(deep_tiff(signed, order, kind=2))
    expected = (signed + 1000.0) / 4000 * 2 - 1
    np.testing.assert_allclose(shown(folder, value_range=(-1000, 3000)), expected, atol=1e-6)


def test_a_range_of_bytes_is_refused(folder):
    Image.fromarray(GREY).save(folder / "a.png")
    with pytest.raises(BadInput, match=r"--range: all pictures in .* have 8 bits"):
        load_data(str(folder), value_range=(0, 1))


@pytest.mark.parametrize(("values", "planes", "photometric"), [(DEEP[..., :3], 2, 2), (DEEP, 1, 5)])
def test_deep_pictures_that_pillow_would_truncate_are_refused(folder, values, planes, photometric):
    content = deep_tiff(values, "<", planes=planes, photometric=photometric)
    # CMYK's fourth channel is not opacity.
    (folder / "a.tif").write_bytes(content.replace(struct.pack("<2HI", 338, 3, 1), struct.pack("<2HI", 337, 3, 1)))
    with pytest.raises(BadInput, match=r"a\.tif: "):
        load_data(str(folder))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_deep_pictures_are_cropped_and_resized_as_bytes_are(channels):
    picture = RNG.integers(0, 256, (40, 56, channels), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(picture.squeeze()).resize((28, 20))).reshape(20, 28, channels)  # smooth
    exact = fitted((picture.astype(np.float32) / 127.5 - 1), (10, 10))
    coarse = fitted(picture, (10, 10)).astype(np.float32) / 127.5 - 1
    assert exact.shape == coarse.shape == (10, 10, channels)
    opacity = (exact[..., 3:] + 1) / 2 if channels == 4 else 1  # a colour is as exact as it is opaque
    assert np.abs((exact - coarse) * opacity).max() < 4 / 127.5


def test_to_unit_maps_black_and_white_to_the_ends():
    for dtype in (np.uint8, ">u2", np.int32, np.float16, ">f8", bool):
        ends = np.array([0, 1]).astype(dtype)
        assert to_unit(ends, (0, 1), "x").tolist() == [-1, 1]
    assert to_unit(np.array([0, WHITE], np.uint16), (0, WHITE), "x").tolist() == [-1, 1]


# --- folders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["tif", "TIFF", "jfif", "ppm", "webp", "jp2", "tga", "bmp", "avif", "PNG", "qoi"])
def test_what_pillow_reads_is_read(folder, suffix):
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    flat = np.full((16, 16, 3), (200, 60, 120), np.uint8)
    Image.fromarray(flat).save(folder / f"a.{suffix}")
    assert np.abs(shown(folder).astype(int) - flat).max() < 12


def test_stubs_and_documents_are_no_pictures():
    assert not suffixes() & {".h5", ".grib", ".wmf", ".pdf", ".eps", ".mpg", ".txt"}
    assert suffixes() >= {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".jfif", ".gif", ".bmp", ".webp", ".mpo"}


def test_deeper_folders_belong_to_their_class_and_what_is_skipped_is_said(folder, caplog):
    names = ["cat/1.png", "cat/2021/may/2.tif", "dog/a/3.png", "dog/4.jfif"]
    for name, level in zip(names, (10, 20, 30, 40), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 16), level).save(folder / name)
    for name in ("cat/notes.txt", ".DS_Store", "dog/._4.jfif", ".git/x.png", "readme"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"no picture")
    data = load_data(str(folder))
    assert sorted(data.values[:, 0, 0, 0].tolist()) == [10, 20, 30, 40]
    assert data.labels.argmax(1).tolist() == [0, 0, 1, 1]
    assert f"{folder}: 4 pictures, 2 classes; 5 files skipped (first: " in caplog.text
    assert "(first: ." not in caplog.text


def test_nothing_skipped_is_said_too(folder, caplog):
    Image.new("L", (16, 16)).save(folder / "a.png")
    load_data(str(folder))
    assert ": 1 pictures, 0 classes; 0 files skipped" in caplog.text


def test_further_frames_are_said(folder, caplog):
    frames = [Image.new("L", (16, 16), 50 * k) for k in range(4)]
    frames[1].save(folder / "a.gif", save_all=True, append_images=frames[2:])
    frames[2].save(folder / "b.tif", save_all=True, append_images=frames[:1])
    frames[3].save(folder / "c.png")
    assert load_data(str(folder)).values[:, 0, 0, 0].tolist() == [50, 100, 150]
    assert "; of 2 files the first of several frames (first: a.gif)" in caplog.text


def test_links_to_folders_are_followed_once(folder, tmp_path):
    (tmp_path / "cats").mkdir()
    Image.new("L", (16, 16), 7).save(tmp_path / "cats" / "1.png")
    (folder / "cat").symlink_to(tmp_path / "cats")
    (tmp_path / "cats" / "again").symlink_to(tmp_path / "cats")
    data = load_data(str(folder))
    assert (len(data), data.classes) == (1, ("cat",))


@pytest.mark.skipif(sys.platform == "win32", reason="has no FIFOs")
def test_what_is_no_file_is_refused_and_does_not_hang(folder):
    os.mkfifo(folder / "a.png")
    with pytest.raises(BadInput, match=r"a\.png: no such regular file"):
        load_data(str(folder))


def test_class_names_are_as_keyboards_type_them(folder):
    for name in (unicodedata.normalize("NFD", "café"), "cafz"):
        (folder / name).mkdir()
        Image.new("L", (16, 16)).save(folder / name / "a.png")
    assert load_data(str(folder)).classes == ("cafz", "café")
    (folder / "café").mkdir()
    Image.new("L", (16, 16)).save(folder / "café" / "a.png")
    if len(list(folder.iterdir())) == 3:  # file systems that do not normalise
        with pytest.raises(BadInput, match="got a class 'café', needs names that differ"):
            load_data(str(folder))


# --- what small files may cost ------------------------------------------------------------------------------------


def test_a_small_file_of_many_pixels_is_refused_without_drawing_it(folder, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("it was drawn"))
    for side in (60_000, 10_000):
        header = struct.pack(">2I5B", side, side, 8, 0, 0, 0, 0)
        parts = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(99))), (b"IEND", b"")]
        content = b"\x89PNG\r\n\x1a\n" + b"".join(itertools.starmap(chunk, parts))
        (folder / "a.png").write_bytes(content)
        with pytest.raises(BadInput, match=r"a\.png: not a readable image \(Image size"):
            load_data(str(folder))


def test_a_folder_holds_one_photo_at_a_time(folder, monkeypatch):
    """Of photos of 1 MB what is kept beside the result is one."""
    alive, most = [], 0

    class Photo(np.ndarray):
        pass

    for k in range(6):
        Image.new("L", (16, 16), k).save(folder / f"{k}.png")

    def read(path, *_):
        nonlocal most
        photo = np.full((600, 600, 3), int(path.stem), np.uint8).view(Photo)
        alive.append(weakref.ref(photo))
        most = max(most, sum(1 for ref in alive if ref() is not None))
        return photo, False

    monkeypatch.setattr(image_files, "read_picture", read)
    assert load_data(str(folder), image_size=16).values[:, 0, 0, 0].tolist() == list(range(6))
    assert most <= 2
