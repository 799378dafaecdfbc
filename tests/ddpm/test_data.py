"""Data sources: what they yield, the resizing rule, and one clear error for every way a file can be wrong."""

import gzip
import io
import os
import pickle
import struct
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from ddpm.data import class_names, load_data, parse_range
from ddpm.errors import BadInput

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (6, 28, 28), dtype=np.uint8)


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def idx(array: np.ndarray) -> bytes:
    """An idx file of unsigned bytes, written by the format's definition."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


# --- the embedded data sets -------------------------------------------------------------------------------------


def test_digits_are_scikit_learns_enlarged_by_pillow():
    data, source = load_data("digits"), load_digits()
    assert (data.values.dtype, tuple(data.values.shape)) == (torch.uint8, (1797, 1, 16, 16))
    assert data.classes == tuple("0123456789")
    assert np.array_equal(data.labels.numpy(), np.eye(10)[source.target])
    small = Image.fromarray(np.rint(source.images[1234] * 255 / 16).astype(np.uint8))
    assert np.array_equal(data.values[1234, 0], small.resize((16, 16), Image.Resampling.BICUBIC))


def test_digits_keep_their_own_pixels_at_side_8():
    data = load_data("digits", image_size=8)
    assert np.array_equal(data.values[:, 0], np.rint(load_digits().images * 255 / 16))


def test_swiss_roll_is_points_of_unit_variance_without_labels():
    data = load_data("swiss-roll")
    assert (data.values.dtype, tuple(data.values.shape)) == (torch.float32, (4096, 2))
    assert data.labels is None
    assert data.classes == ()
    assert not data.is_images
    assert data.values.mean(0).abs().max() < 1e-5
    assert abs(float(data.values.std()) - 1) < 1e-3


def test_swiss_roll_is_the_same_each_time():
    assert load_data("swiss-roll").digest() == load_data("swiss-roll").digest()


# --- npy --------------------------------------------------------------------------------------------------------


def test_npy_images_become_channels_first():
    np.save("x.npy", IMAGES)
    data = load_data("x.npy")
    assert np.array_equal(data.values, IMAGES.transpose(0, 3, 1, 2))
    assert data.labels is None
    assert data.name == "x"


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_integer_labels_become_one_hot(dtype):
    np.save("x.npy", IMAGES)
    np.save("y.npy", np.array([0, 2, 1, 2, 0, 3], dtype))
    data = load_data("x.npy", "y.npy")
    assert data.labels.dtype == torch.float32
    assert np.array_equal(data.labels, np.eye(4)[[0, 2, 1, 2, 0, 3]])
    assert data.classes == ("0", "1", "2", "3")


@pytest.mark.parametrize("dtype", [np.uint8, np.float64, bool])
def test_one_hot_labels_stay(dtype):
    np.save("x.npy", IMAGES)
    np.save("y.npy", np.eye(5)[[0, 2, 1, 2, 0, 3]].astype(dtype))
    data = load_data("x.npy", "y.npy")
    assert np.array_equal(data.labels, np.eye(5)[[0, 2, 1, 2, 0, 3]])


def test_classes_are_named_in_order():
    np.save("x.npy", IMAGES)
    np.save("y.npy", np.array([0, 1, 0, 1, 0, 1]))
    assert load_data("x.npy", "y.npy", classes=["cat", "dog"]).classes == ("cat", "dog")


def test_digest_sees_values_and_labels():
    np.save("x.npy", IMAGES)
    np.save("y.npy", np.array([0, 1, 0, 1, 0, 1]))
    np.save("z.npy", np.array([0, 1, 0, 1, 1, 0]))
    changed = IMAGES.copy()
    changed[3, 4, 5, 1] ^= 1
    np.save("w.npy", changed)
    digests = [load_data(*source).digest() for source in (("x.npy", "y.npy"), ("x.npy", "z.npy"), ("w.npy", "y.npy"))]
    assert len(set(digests)) == 3


def test_object_arrays_are_refused_without_unpickling():
    class Trap:
        def __reduce__(self):
            return open, ("sprung", "w")

    array = np.empty(1, dtype=object)
    array[0] = Trap()
    np.save("x.npy", array, allow_pickle=True)
    Path("bare.npy").write_bytes(pickle.dumps(Trap()))
    for name in ("x.npy", "bare.npy"):
        with pytest.raises(BadInput, match=name):
            load_data(name)
    assert not Path("sprung").exists()


# --- numbers of other kinds ---------------------------------------------------------------------------------------


def test_grey_arrays_need_no_channel():
    np.save("x.npy", GREY)
    assert np.array_equal(load_data("x.npy").values[:, 0], GREY)


def test_an_archive_of_one_array_is_that_array():
    np.savez_compressed("x.npz", pictures=IMAGES)
    np.savez("y.npz", np.arange(6) % 2)
    data = load_data("x.npz", "y.npz")
    assert np.array_equal(data.values, IMAGES.transpose(0, 3, 1, 2))
    assert data.labels.argmax(1).tolist() == [0, 1, 0, 1, 0, 1]
    np.savez("x.npz", a=IMAGES, b=IMAGES)
    with pytest.raises(BadInput, match=r"x\.npz: is an archive of 2 arrays \(a, b\), needs a \.npz of one"):
        load_data("x.npz")


@pytest.mark.parametrize("order", "<>")
def test_sixteen_bits_keep_their_values_in_both_byte_orders(order):
    values = RNG.integers(0, 65536, (3, 16, 16, 3)).astype(f"{order}u2")
    np.save("x.npy", values)
    data = load_data("x.npy")
    assert (data.values.dtype, data.is_images) == (torch.float32, True)
    np.testing.assert_allclose(data.values.permute(0, 2, 3, 1), values / 32767.5 - 1, atol=1e-6)


@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<f2", "u1", "<i4", "?"])
def test_a_stated_range_takes_any_numbers(dtype):
    values = RNG.integers(0, 2, (3, 16, 16)).astype(dtype)
    np.save("x.npy", values)
    data = load_data("x.npy", value_range=(0, 1))
    assert np.array_equal(data.values[:, 0], values.astype(np.float32) * 2 - 1)
    np.save("x.npy", values.astype(np.int8) - 1)
    with pytest.raises(BadInput, match=r"x\.npy: has values -1\.\.0, needs 0\.\.1 \(--range"):
        load_data("x.npy", value_range=(0, 1))


def test_float_images_without_a_range_are_refused():
    np.save("x.npy", IMAGES / 255)
    with pytest.raises(BadInput, match=r"float64 .* other numbers with --range"):
        load_data("x.npy")
    values = IMAGES / 255
    values[2, 3, 4, 1] = np.nan
    np.save("x.npy", values)
    with pytest.raises(BadInput, match=r"x\.npy: has values nan"):
        load_data("x.npy", value_range=(0, 1))


def test_a_fourth_channel_is_taken_when_asked_for():
    rgba = np.concatenate((IMAGES, IMAGES[..., :1]), axis=3)
    np.save("x.npy", rgba)
    assert np.array_equal(load_data("x.npy", alpha=True).values, rgba.transpose(0, 3, 1, 2))
    with pytest.raises(BadInput, match="C = 4 with --alpha"):
        load_data("x.npy")
    for source in ("digits", "swiss-roll"):
        with pytest.raises(BadInput, match=f"--alpha: {source} has no transparency"):
            load_data(source, alpha=True)


@pytest.mark.parametrize(("text", "bounds"), [("0,1", (0, 1)), ("-1,1", (-1, 1)), ("-1024,3071", (-1024, 3071))])
def test_ranges_are_two_numbers(text, bounds):
    assert parse_range(text) == bounds


@pytest.mark.parametrize("text", ["", "1", "1,0", "0,0", "0,1,2", "a,b", "nan,1", "0,inf", "-1e308,1e308"])
def test_other_ranges_are_refused(text):
    with pytest.raises(BadInput, match=r"--range: got .* needs LO,HI"):
        parse_range(text)


@pytest.mark.parametrize("source", ["digits", "swiss-roll"])
def test_a_range_for_what_has_its_own_is_refused(source):
    with pytest.raises(BadInput, match=f"--range: {source}"):
        load_data(source, value_range=(0, 1))


# --- labels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
@pytest.mark.parametrize("dtype", ["u2", ">i4", "<i8"])
def test_numbers_with_gaps_become_classes_that_all_have_data(dtype, shape):
    np.save("x.npy", IMAGES)
    np.save("y.npy", np.array([1992, 1990, 7, 1990, 7, 1992], dtype).reshape(shape))
    data = load_data("x.npy", "y.npy")
    assert data.classes == ("7", "1990", "1992")
    assert data.labels.argmax(1).tolist() == [2, 1, 0, 1, 0, 2]
    assert data.has_classes
    assert load_data("x.npy", "y.npy", classes=["a", "b", "c"]).classes == ("a", "b", "c")


def test_more_names_than_numbers_name_every_number():
    np.save("x.npy", IMAGES)
    np.save("y.npy", np.array([1, 3, 3, 1, 1, 1]))
    data = load_data("x.npy", "y.npy", classes=list("abcd"))
    assert np.array_equal(data.labels, np.eye(4)[[1, 3, 3, 1, 1, 1]])
    with pytest.raises(BadInput, match="--classes: got 3 names, needs 2"):
        load_data("x.npy", "y.npy", classes=list("abc"))


CONDITIONS = {
    "multi-hot": np.array([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1], [1, 1, 0]]),
    "continuous": np.linspace(-3, 7, 18).reshape(6, 3),
    "one-number": np.linspace(0, 1, 6)[:, None],
    "halves": np.full((6, 2), 0.5),
}


@pytest.mark.parametrize("rows", CONDITIONS.values(), ids=CONDITIONS)
def test_other_rows_are_conditions_as_they_are(rows, caplog):
    caplog.set_level("INFO", "ddpm")
    np.save("x.npy", IMAGES)
    np.save("y.npy", rows)
    data = load_data("x.npy", "y.npy")
    assert np.array_equal(data.labels, rows.astype(np.float32))
    assert (data.labels.dtype, data.classes, data.has_classes) == (torch.float32, (), False)
    assert f"x.npy: 6 pictures, {rows.shape[1]} conditions" in caplog.text
    names = [f"n{k}" for k in range(rows.shape[1])]
    assert load_data("x.npy", "y.npy", classes=names).classes == tuple(names)


def test_what_was_read_is_said(caplog):
    caplog.set_level("INFO", "ddpm")
    np.save("x.npy", IMAGES)
    np.save("y.npy", np.array([1, 5, 1, 5, 1, 5]))
    load_data("x.npy", "y.npy")
    load_data("digits", image_size=8)
    load_data("swiss-roll")
    assert [record.message for record in caplog.records] == [
        *("x.npy: 6 pictures, 2 classes", "digits: 1797 pictures, 10 classes", "swiss-roll: 4096 points, 0 classes")
    ]


# --- the --image-size rule --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width", "box"), [(20, 29, (4, 0, 24, 20)), (31, 20, (0, 5, 20, 25))])
def test_image_size_crops_the_centre_then_resizes_bicubic(height, width, box):
    images = RNG.integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    np.save("x.npy", images)
    data = load_data("x.npy", image_size=16)
    for image, value in zip(images, data.values, strict=True):
        expected = Image.fromarray(image).crop(box).resize((16, 16), Image.Resampling.BICUBIC)
        assert np.array_equal(value.permute(1, 2, 0), expected)


def test_image_size_of_grey_images_keeps_one_channel():
    np.save("x.npy", GREY[..., None])
    data = load_data("x.npy", image_size=16)
    expected = Image.fromarray(GREY[0]).resize((16, 16), Image.Resampling.BICUBIC)
    assert tuple(data.values.shape) == (6, 1, 16, 16)
    assert np.array_equal(data.values[0, 0], expected)


def test_image_size_equal_to_the_side_changes_nothing():
    np.save("x.npy", IMAGES)
    assert load_data("x.npy", image_size=16).digest() == load_data("x.npy").digest()


# --- folders ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "pictures"
    made.mkdir()
    return made


def test_folder_without_classes_is_unconditional_and_sorted(folder):
    for name, image in (("b.png", IMAGES[1]), ("a.png", IMAGES[0]), ("c.BMP", IMAGES[2])):
        Image.fromarray(image).save(folder / name)
    (folder / "readme.txt").write_text("not an image")
    data = load_data(str(folder))
    assert np.array_equal(data.values, IMAGES[:3].transpose(0, 3, 1, 2))
    assert data.labels is None


def test_subfolders_are_classes_in_sorted_order(folder):
    for name, image in (("dog/1.png", 0), ("cat/1.png", 1), ("cat/2.png", 2)):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(IMAGES[image]).save(folder / name)
    data = load_data(str(folder))
    assert data.classes == ("cat", "dog")
    assert np.array_equal(data.labels, [[1, 0], [1, 0], [0, 1]])
    assert np.array_equal(data.values, IMAGES[[1, 2, 0]].transpose(0, 3, 1, 2))


def test_grey_folder_has_one_channel(folder):
    Image.fromarray(GREY[0]).save(folder / "a.png")
    Image.fromarray(GREY[1]).save(folder / "b.png")
    assert np.array_equal(load_data(str(folder)).values[:, 0], GREY[:2])


def test_one_colour_image_makes_the_folder_rgb(folder):
    Image.fromarray(IMAGES[0]).save(folder / "a.png")
    Image.fromarray(IMAGES[1, ..., 0]).save(folder / "b.png")
    values = load_data(str(folder)).values
    assert tuple(values.shape) == (2, 3, 16, 16)
    assert np.array_equal(values[1], np.broadcast_to(IMAGES[1, ..., 0], (3, 16, 16)))


def test_alpha_is_laid_on_white(folder):
    rgba = np.zeros((16, 16, 4), np.uint8)
    rgba[:8, :, 3] = 255
    Image.fromarray(rgba).save(folder / "a.png")
    values = load_data(str(folder)).values
    assert (values[0, :, :8] == 0).all()
    assert (values[0, :, 8:] == 255).all()


def test_folder_of_mixed_sizes_is_brought_to_one_by_image_size(folder):
    Image.fromarray(GREY[0]).save(folder / "a.png")
    Image.fromarray(GREY[1, :20]).save(folder / "b.png")
    values = load_data(str(folder), image_size=16).values
    expected = Image.fromarray(GREY[1, :20]).crop((4, 0, 24, 20)).resize((16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(values[1, 0], expected)


# --- idx --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gz"])
def test_idx_images_and_labels(tmp_path, pack):
    (tmp_path / "images-idx3-ubyte").write_bytes(pack(idx(GREY)))
    (tmp_path / "labels-idx1-ubyte").write_bytes(pack(idx(np.array([0, 1, 2, 0, 1, 9], np.uint8))))
    data = load_data("images-idx3-ubyte", "labels-idx1-ubyte")
    assert np.array_equal(data.values[:, 0], GREY)
    assert np.array_equal(data.labels, np.eye(4)[[0, 1, 2, 0, 1, 3]])
    assert data.classes == ("0", "1", "2", "9")


# --- what is refused --------------------------------------------------------------------------------------------

GOOD_LABELS = npy(np.array([0, 1, 0, 1, 0, 1]))
BAD_IMAGES = {
    "empty": (b"", "empty"),
    "truncated": (npy(IMAGES)[:-1], "not a readable"),
    "wrong-rank": (npy(IMAGES[0]), r"uint8 \[16, 16, 3\], needs uint8 \[N, H, W, C\]"),
    "wrong-dtype": (npy(IMAGES.astype(np.float32)), r"float32 \[6, 16, 16, 3\], needs uint8"),
    "nan": (npy(np.full((2, 16, 16, 1), np.nan)), "NaN"),
    "channels": (npy(np.zeros((2, 16, 16, 4), np.uint8)), "C = 1 or 3"),
    "no-images": (npy(np.zeros((0, 16, 16, 1), np.uint8)), "at least one image"),
    "strings": (npy(np.array(["a", "b"])), "needs uint8"),
}
BAD_LABELS = {
    "empty": (b"", "empty"),
    "truncated": (GOOD_LABELS[:-3], "not a readable"),
    "other-length": (npy(np.array([0, 1])), r"2 labels for 6 images in x\.npy"),
    "negative": (npy(np.array([0, -1, 0, 1, 0, 1])), r"-1\.\.1, needs 0"),
    "enormous": (npy(np.array([0, 2**40, 0, 1, 0, 1])), "needs 0"),
    "float-vector": (npy(np.zeros(6)), r"float64 \[6\], needs integers"),
    "rank-3": (npy(np.zeros((6, 2, 2))), "needs integers"),
    "nan": (npy(np.full((6, 2), np.nan)), "row 0 is .* one-hot"),
    "beyond-float32": (npy(np.array([[0, 1.0]] * 5 + [[1e39, 0]])), "row 5 is .* finite"),
    "no-columns": (npy(np.zeros((6, 0))), r"float64 \[6, 0\], needs integers"),
    "texts": (npy(np.array(list("abcdef"))), "needs integers"),
}


@pytest.mark.parametrize(("content", "message"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_bad_images_are_refused(tmp_path, content, message):
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(BadInput, match=message) as caught:
        load_data("x.npy")
    assert "x.npy" in str(caught.value)


@pytest.mark.parametrize(("content", "message"), BAD_LABELS.values(), ids=BAD_LABELS)
def test_bad_labels_are_refused(tmp_path, content, message):
    np.save("x.npy", IMAGES)
    (tmp_path / "y.npy").write_bytes(content)
    with pytest.raises(BadInput, match=message) as caught:
        load_data("x.npy", "y.npy")
    assert "y.npy" in str(caught.value)


def test_an_npz_named_npy_is_refused(tmp_path):
    np.savez("x.npz", IMAGES)
    (tmp_path / "x.npz").rename("x.npy")
    with pytest.raises(BadInput, match=r"x\.npy"):
        load_data("x.npy")


@pytest.mark.parametrize("name", ["missing.npy", "missing", "missing.gz"])
def test_missing_data_are_refused(name):
    with pytest.raises(BadInput, match=f"{name}: no such file"):
        load_data(name)


@pytest.mark.parametrize("name", ["missing.npy", "missing-idx1-ubyte"])
def test_missing_labels_are_refused(name):
    np.save("x.npy", IMAGES)
    with pytest.raises(BadInput, match=f"{name}: no such file"):
        load_data("x.npy", name)


@pytest.mark.parametrize("source", ["digits", "swiss-roll"])
def test_labels_beside_data_that_need_none_are_refused(source):
    with pytest.raises(BadInput, match=f"--labels: {source}"):
        load_data(source, labels="y.npy")


@pytest.mark.parametrize("source", ["swiss-roll", "x.npy"])
def test_class_names_for_data_without_classes_are_refused(source):
    np.save("x.npy", IMAGES)
    with pytest.raises(BadInput, match=r"--classes: got 2 names, needs 0"):
        load_data(source, classes=["a", "b"])


BAD_NAMES = {
    "repeated": (["cat", "dog", "cat"], "'cat'"),
    "empty": (["cat", ""], "''"),
    "all": (["all", "dog"], "'all'"),
    "repeated as macOS stores it": (["caf\u00e9", "cafe\u0301"], "'caf\u00e9'"),
}


@pytest.mark.parametrize(("names", "named"), BAD_NAMES.values(), ids=BAD_NAMES)
def test_class_names_that_a_context_could_not_say_are_refused(names, named):
    message = f"--classes: got a class {named}, needs names that differ, none of them empty or 'all'$"
    with pytest.raises(BadInput, match=f"^{message}"):
        class_names(names, "--classes")
    np.save("x.npy", IMAGES)
    np.save("y.npy", np.arange(6) % len(names))
    with pytest.raises(BadInput, match=f"^{message}"):
        load_data("x.npy", "y.npy", classes=names)


@pytest.mark.parametrize("names", [[], ["cat"], ["1", "2"], ["All", "a,b", " "]])
def test_other_class_names_are_taken(names):
    assert class_names(names, "--classes") == tuple(names)


def test_class_names_are_kept_as_keyboards_type_them():
    assert class_names(["cafe\u0301"], "--classes") == ("caf\u00e9",)


def test_a_class_folder_named_all_is_refused(folder):
    for name in ("all", "cat"):
        (folder / name).mkdir()
        Image.fromarray(IMAGES[0]).save(folder / name / "a.png")
    with pytest.raises(BadInput, match="pictures: got a class 'all', needs names that differ"):
        load_data(str(folder))


def test_wrong_number_of_class_names_is_refused():
    with pytest.raises(BadInput, match="--classes: got 2 names, needs 10"):
        load_data("digits", classes=["a", "b"])


@pytest.mark.parametrize(("source", "size"), [("digits", 0), ("digits", -4), ("swiss-roll", 16)])
def test_impossible_image_sizes_are_refused(source, size):
    with pytest.raises(BadInput, match="--image-size"):
        load_data(source, image_size=size)


def test_empty_folder_is_refused(folder):
    with pytest.raises(BadInput, match=r"pictures: no images found, needs .*\.png"):
        load_data(str(folder))


def test_folder_of_mixed_sizes_is_refused(folder):
    Image.fromarray(IMAGES[0]).save(folder / "a.png")
    Image.fromarray(IMAGES[1, :8, :8]).save(folder / "b.png")
    with pytest.raises(BadInput, match=r"b\.png: is 8x8, the first image is 16x16: needs --image-size"):
        load_data(str(folder))


def test_class_folder_without_images_is_refused(folder):
    (folder / "full").mkdir()
    (folder / "hollow").mkdir()
    Image.fromarray(IMAGES[0]).save(folder / "full" / "a.png")
    with pytest.raises(BadInput, match="hollow: a class folder without images"):
        load_data(str(folder))


def test_loose_image_beside_class_folders_is_refused(folder):
    (folder / "cat").mkdir()
    Image.fromarray(IMAGES[0]).save(folder / "cat" / "a.png")
    Image.fromarray(IMAGES[0]).save(folder / "stray.png")
    with pytest.raises(BadInput, match=r"stray\.png: lies beside"):
        load_data(str(folder))


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage", png(IMAGES[0])[:100], png(IMAGES[0]).replace(b"IHDR", b"XHDR")],
    ids=["empty", "garbage", "truncated", "corrupted"],
)
def test_unreadable_image_is_refused(folder, content):
    (folder / "a.png").write_bytes(content)
    with pytest.raises(BadInput, match=r"a\.png: not a readable image"):
        load_data(str(folder))


def test_image_that_claims_to_be_gigantic_is_refused(folder):
    header = io.BytesIO()
    Image.fromarray(IMAGES[0]).save(header, "BMP")
    content = bytearray(header.getvalue())
    content[18:26] = struct.pack("<ii", 60_000, 60_000)
    (folder / "a.bmp").write_bytes(content)
    with pytest.raises(BadInput, match=r"a\.bmp: not a readable image"):
        load_data(str(folder))


BAD_IDX = {
    "wrong-magic": b"\0\0\x0d\x03" + idx(GREY)[4:],
    "labels-for-images": idx(GREY[0, 0]),
    "one-byte-short": idx(GREY)[:-1],
    "one-byte-long": idx(GREY) + b"\0",
    "header-only": idx(GREY)[:16],
    "empty": b"",
    "truncated-gz": gzip.compress(idx(GREY))[:-20],
    "corrupted-gz": gzip.compress(idx(GREY))[:20] + b"\xff" * 40,
    "negative-sides": struct.pack(">iiii", 2051, 1, -1, -1) + b"\0",
    "overflowing-sides": struct.pack(">iiii", 2051, 2**30, 2**30, 2**4),
}


@pytest.mark.parametrize("content", BAD_IDX.values(), ids=BAD_IDX)
def test_bad_idx_is_refused(tmp_path, content):
    (tmp_path / "x-idx3-ubyte").write_bytes(content)
    with pytest.raises(BadInput, match="x-idx3-ubyte"):
        load_data("x-idx3-ubyte")


def test_a_gz_is_unpacked_no_further_than_its_header_says(tmp_path):
    """What 64 MB unpack to, and what 2^40 bytes are promised in, costs less than 8 MB."""
    bomb = gzip.compress(idx(GREY)[:16] + bytes(1 << 26), 1)
    promise = gzip.compress(struct.pack(">iiii", 2051, 2**20, 2**10, 2**10) + bytes(999))
    for content, found in ((bomb, "more data, its header"), (promise, "999 bytes of data, its header")):
        (tmp_path / "x.gz").write_bytes(content)
        tracemalloc.start()
        with pytest.raises(BadInput, match=rf"x\.gz: {found}"):
            load_data("x.gz")
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most < 8e6


@pytest.mark.skipif(sys.platform == "win32", reason="has no FIFOs")
@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x-idx"])
def test_what_is_no_regular_file_is_refused_and_does_not_hang(name):
    os.mkfifo(name)
    np.save("good.npy", IMAGES)
    for arguments in ((name,), ("good.npy", name)):
        with pytest.raises(BadInput, match=f"{name}: is no regular file"):
            load_data(*arguments)


WHOLE = {"x.npy": npy(IMAGES), "x-idx": idx(GREY), "x.gz": gzip.compress(idx(GREY), mtime=0)}


@given(name=st.sampled_from(sorted(WHOLE)), kept=st.floats(0, 1, exclude_max=True))
@settings(deadline=None, max_examples=150, derandomize=True)
def test_files_cut_anywhere_are_refused_and_nothing_else(tmp_path_factory, name, kept):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(WHOLE[name][: int(kept * len(WHOLE[name]))])
    with pytest.raises(BadInput, match=name):
        load_data(str(path))


@given(
    case=st.sampled_from([("x.npy", 128), ("x-idx", 16)]),
    damage=st.lists(st.tuples(st.integers(0, 127), st.integers(0, 255)), min_size=1, max_size=3),
)
@settings(deadline=None, max_examples=300, derandomize=True)
@example(case=("x.npy", 128), damage=[(8, 1)])
@example(case=("x-idx", 16), damage=[(4, 255)])
def test_damaged_headers_are_refused_or_read_and_nothing_else(tmp_path_factory, case, damage):
    name, header = case
    content = bytearray(WHOLE[name])
    for position, byte in damage:
        content[position % header] = byte
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    message = name
    try:
        load_data(str(path))
    except BadInput as error:
        message = str(error)
    assert name in message
