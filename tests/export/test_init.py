"""`run.py --init`: pictures that begin with a picture, by step.onnx, are those of `ddpm edit`."""

import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from ddpm import edit
from ddpm.commands import main as ddpm
from ddpm.commands.edit import read_as
from ddpm.errors import BadInput
from ddpm.metrics import distance
from export import run

WAYS = {
    "ddpm": ("", "--strength 0.5"),
    "memory": ("--solver dpmpp_2m --steps 6", "--strength 0.7"),
    "usual": ("--solver ddim --steps 6 --clip 0", ""),
    "mask": ("--steps 6 --resample 2", "--mask {mask}"),
    "mask and memory": ("--solver dpmpp_2m --steps 6", "--mask {mask} --strength 0.7"),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A colour picture, a mask, pictures that do not fit."""
    folder = tmp_path_factory.mktemp("pictures")
    values = (np.indices((16, 16, 3)).sum(0) * 7).astype(np.uint8)
    Image.fromarray(values).save(folder / "image.png")
    mask = np.zeros((16, 16), np.uint8)
    mask[3:9, 5:12] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    Image.new("L", (16, 16)).save(folder / "black.png")
    Image.new("L", (16, 16), 255).save(folder / "white.png")
    Image.new("RGB", (20, 10)).save(folder / "large.png")
    Image.fromarray(values[..., 0].astype(np.uint16) << 8).save(folder / "deep.png")
    (folder / "text.png").write_text("no picture")
    np.save(folder / "image.npy", values.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1)
    np.save(folder / "small.npy", np.zeros((3, 8, 8), np.float32))
    np.save(folder / "nan.npy", np.full((3, 16, 16), np.nan, np.float32))
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_run_draws_what_ddpm_edit_draws(run_folder, export, pictures, tmp_path, way):
    table, asked = WAYS[way]
    asked = asked.format(mask=pictures / "mask.png").split()
    asked += ["--n", 3, "--seed", 5, "--first-sample", 2, "--context", "b", "--guidance", 2]
    assert export("onnx", run_folder, "--out", tmp_path / "onnx", "--no-verify", *table.split()).code == 0
    written = [tmp_path / f"{name}.npy" for name in ("run", "edit")]
    image = pictures / "image.png"
    answer = export("run", tmp_path / "onnx", "--init", image, "--batch-size", 2, "--npy", written[0], *asked)
    assert answer.code == 0, answer.err
    words = ("edit", run_folder, image, "--engine", "eager", "--npy", written[1], *asked, *table.split())
    assert ddpm([str(word) for word in words]) == 0
    found, expected = map(np.load, written)
    assert distance(found, expected) <= 1e-4
    if "mask" in way:
        kept = np.asarray(Image.open(pictures / "mask.png")) == 0
        assert np.array_equal(found[:, :, kept], expected[:, :, kept])


def test_arrays_one_for_all_or_one_a_sample(exported, opened, export, pictures, tmp_path):
    path, each = tmp_path / "x.npy", np.stack([np.load(pictures / "image.npy")] * 3) * [[[[1]]], [[[0.5]]], [[[-1]]]]
    np.save(tmp_path / "each.npy", each)
    for init in (pictures / "image.npy", tmp_path / "each.npy"):
        words = ("--n", 3, "--seed", 5, "--strength", 0.5, "--batch-size", 2, "--npy", path)
        assert export("run", exported / "step.onnx", "--init", init, *words).code == 0
        images = torch.from_numpy(np.load(init)).float()
        expected = edit(opened.model, opened.schedule, images, 3, strength=0.5, seed=5, **opened.options())
        assert distance(np.load(path), expected) <= 1e-4


def test_open_tables_and_open_guidance(exported_open, run_folder, opened, export, pictures, tmp_path):
    path, image = tmp_path / "x.npy", torch.from_numpy(np.load(pictures / "image.npy"))
    words = ("--init", pictures / "image.png", "--strength", 0.6, "--n", 2, "--seed", 5, "--npy", path)
    answer = export("run", exported_open, *words, "--solver", "ddim", "--steps", 5)
    assert answer.code == 0, answer.err
    options = opened.options(solver="ddim", steps=5)
    expected = edit(opened.model, opened.schedule, image, 2, strength=0.6, seed=5, **options)
    assert distance(np.load(path), expected) <= 1e-4
    assert export("onnx", run_folder, "--out", tmp_path / "g", "--open-guidance", "--no-verify").code == 0
    answer = export("run", tmp_path / "g", *words, "--context", "b", "--guidance", "2,4", "--negative", "c")
    assert answer.code == 0, answer.err
    how = {"context": torch.eye(3)[1], "negative": torch.eye(3)[2], "guidance": [2.0, 4.0], "seed": 5}
    expected = edit(opened.model, opened.schedule, image, 2, strength=0.6, **how, **opened.options())
    assert distance(np.load(path), expected) <= 1e-4


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pictures_are_read_as_ddpm_edit_reads_them(tmp_path, mode, channels):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    values = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    Image.fromarray(values).convert(mode).save(path)
    metadata = {"channels": channels, "height": 16, "width": 16}
    if channels == 1 and mode in ("P", "RGB", "RGBA", "CMYK"):
        for read in (lambda: read_as(path, (1, 16, 16)), lambda: run.read_init(path, metadata, 1)):
            with pytest.raises((BadInput, run.UsageError), match="has 3 channels, needs 1"):
                read()
        return
    np.testing.assert_array_equal(run.read_init(path, metadata, 1), read_as(path, (channels, 16, 16)))


BAD = [
    ("--init {p}/large.png", "{p}/large.png: is 10x20, needs 16x16, what the model draws (height x width)"),
    ("--init {p}/gone.png", "{p}/gone.png: no such regular file"),
    ("--init {p}/text.png", "{p}/text.png: not a readable image"),
    ("--init {p}/deep.png", "{p}/deep.png: has more than 8 bits a channel"),
    ("--init {p}/small.npy", "{p}/small.npy: got float32 [3, 8, 8], needs finite floats in -1..1 [3, 16, 16]"),
    ("--init {p}/nan.npy", "{p}/nan.npy: got float32 [3, 16, 16], needs finite floats"),
    ("--init {p}/gone.npy", "{p}/gone.npy: not a .npy file of numbers"),
    ("--init {p}/image.png --strength 0", "--strength: got 0, needs 0.08"),
    ("--init {p}/image.png --strength 1.1", "--strength: got 1.1, needs 0.08"),
    ("--init {p}/image.png --strength nan", "--strength: got nan, needs"),
    ("--init {p}/image.png --mask {p}/black.png", "{p}/black.png: every pixel is kept"),
    ("--init {p}/image.png --mask {p}/white.png", "{p}/white.png: no pixel is kept"),
    ("--init {p}/image.png --mask {p}/large.png", "{p}/large.png: is 10x20, needs 16x16"),
    ("--strength 0.5", "--strength, --mask: got them without --init"),
    ("--mask {p}/mask.png", "--strength, --mask: got them without --init"),
    (
        "--init {p}/image.png --mask {p}/mask.png --context a --guidance 2 --guidance-rescale 1",
        "--guidance-rescale: got",
    ),
    ("--init {p}/image.png --steps 4", "--steps: got 4, but the table is a constant"),
]


@pytest.mark.parametrize(("asked", "words"), BAD)
def test_wrong_input_is_one_line(exported, export, pictures, tmp_path, asked, words):
    answer = export("run", exported, "--n", 2, "--npy", tmp_path / "x.npy", *asked.format(p=pictures).split())
    assert (answer.code, answer.err.count("\n")) == (2, 1), answer.err
    assert answer.err.startswith(f"error: {words.format(p=pictures)}")
    assert not (tmp_path / "x.npy").exists()


@pytest.mark.parametrize(
    ("starts", "words"), [(None, "was exported by a former version"), ([], "has a learned table, which has no middle")]
)
def test_files_that_know_no_middle(exported, export, pictures, tmp_path, starts, words):
    model = onnx.load(exported / "step.onnx")
    metadata = json.loads(model.metadata_props[0].value)
    metadata["table"].pop("starts")
    metadata["table"] |= {} if starts is None else {"starts": starts}
    model.metadata_props[0].value = json.dumps(metadata)
    onnx.save(model, tmp_path / "step.onnx")
    answer = export("run", tmp_path, "--init", pictures / "image.png", "--npy", tmp_path / "x.npy")
    assert answer.code == 2
    assert f"--init: this model {words}" in answer.err


@pytest.mark.parametrize("starts", [[[12, 0.5, 0.5]], [[0.5, 0.5, 0.5]], [[0, 1.5, 0.5]], [[0, 1, "x"]], [[0, 1]], 3])
def test_damaged_starts(exported, export, pictures, tmp_path, starts):
    model = onnx.load(exported / "step.onnx")
    metadata = json.loads(model.metadata_props[0].value)
    metadata["table"]["starts"] = starts
    model.metadata_props[0].value = json.dumps(metadata)
    onnx.save(model, tmp_path / "step.onnx")
    answer = export("run", tmp_path, "--init", pictures / "image.png", "--npy", tmp_path / "x.npy")
    assert answer.code == 3
    assert "metadata is damaged" in answer.err


def test_a_sampler_is_no_step(exported, export, pictures, tmp_path):
    shutil.copy(exported / "sampler.onnx", tmp_path)
    for model, words in (
        (tmp_path / "sampler.onnx", "is a sampler, needs a step.onnx"),
        (tmp_path, "has no step.onnx"),
    ):
        answer = export("run", model, "--init", pictures / "image.png", "--npy", tmp_path / "x.npy")
        assert answer.code == 3
        assert words in answer.err
