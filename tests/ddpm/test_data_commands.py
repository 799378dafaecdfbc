"""From data of every kind to pictures of every kind, through the command line."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm import load_run, pictures, sample
from ddpm.commands.sampling_options import sample_run, table_of
from ddpm.distributed import World
from ddpm.training import training_data

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def train(ddpm, tiny_options):
    """train("--data", ...): the config of a run in run/."""

    def call(*arguments):
        answer = ddpm("train", "--out", "run", *tiny_options, "--batch-size", 4, *arguments)
        assert answer.code == 0, answer.err
        return json.loads(Path("run/config.json").read_text())

    return call


def save(labels=None, count=12, **more):
    """x.npy of grey images whose brightness is their class, y.npy of labels."""
    level = np.arange(count) % 3
    values = level[:, None, None] * 100 + RNG.integers(0, 40, (count, 16, 16))
    np.save("x.npy", values.astype(np.uint8))
    if labels is not None:
        np.save("y.npy", labels(level))


def test_class_numbers_with_gaps_train_sample_and_evaluate(train, ddpm):
    save(lambda level: level + 1990)
    config = train("--data", "x.npy", "--labels", "y.npy")
    assert config["classes"] == ["1990", "1991", "1992"]
    assert config["model"]["n_cfeat"] == 3
    assert ddpm("sample", "run", "--context", 1991, "--n", 1, "--steps", 2, "--npy", "z.npy").code == 0
    answer = ddpm("evaluate", "run", "--n", 6, "--steps", 2, "--json", "f.json")
    assert answer.code == 0
    assert "evaluate 100%" in answer.err


def test_a_run_that_took_every_number_for_a_class_finds_its_data(train, ddpm):
    """As former versions trained: labels 1..3 made four classes, of which the first had no picture."""
    save(lambda level: level + 1)
    config = train("--data", "x.npy", "--labels", "y.npy", "--classes", "0,1,2,3")
    for option in ("range", "alpha"):
        del config["training"][option]
    config["training"]["classes"] = None
    Path("run/config.json").write_text(json.dumps(config))
    run = load_run("run")
    data = training_data(run)
    assert data.labels.argmax(1).tolist() == (np.arange(12) % 3 + 1).tolist()
    assert ddpm("train", "--out", "run", "--resume").code == 0
    assert ddpm("evaluate", "run", "--n", 6, "--steps", 2).code == 0


@pytest.mark.parametrize("present", [[0, 2], [1], [0, 1, 2]])
def test_evaluation_asks_for_classes_that_have_data_alone(train, ddpm, monkeypatch, present):
    save(lambda level: np.eye(4)[np.array(present)[np.arange(len(level)) % len(present)]])
    train("--data", "x.npy", "--labels", "y.npy")
    asked = []

    def evaluate(samples, dataset, classes, **_):
        asked.extend(classes.tolist())
        raise InterruptedError

    monkeypatch.setattr("ddpm.evaluation.evaluate", evaluate)
    ddpm("evaluate", "run", "--n", 7, "--steps", 1)
    assert asked == [present[k % len(present)] for k in range(7)]


@pytest.mark.parametrize("conditions", [lambda level: level[:, None] / 7, lambda level: np.ones((len(level), 2)) * 0.3])
def test_conditions_that_are_no_classes_train_sample_and_evaluate(train, ddpm, conditions):
    save(conditions)
    config = train("--data", "x.npy", "--labels", "y.npy")
    width = conditions(np.zeros(1)).shape[1]
    assert (config["classes"], config["model"]["n_cfeat"]) == ([], width)
    text = ",".join(["0.25"] * width)
    assert ddpm("sample", "run", "--context", text, "--n", 1, "--steps", 2, "--npy", "z.npy").code == 0
    assert ddpm("evaluate", "run", "--n", 6, "--steps", 2, "--json", "f.json").code == 0
    assert json.loads(Path("f.json").read_text())["accuracy"] is None


def test_deep_data_with_alpha_become_pictures_of_their_own(train, ddpm):
    np.save("x.npy", RNG.uniform(0, 1, (12, 16, 16, 4)))
    config = train("--data", "x.npy", "--range", "0,1", "--alpha")
    assert (config["training"]["range"], config["training"]["alpha"]) == ("0,1", True)
    how = ("sample", "run", "--n", 3, "--steps", 2, "--first-sample", 5, "--npy", "z.npy", "--gif", "z.gif")
    answer = ddpm(*how, "--out", "z.png", "--png-dir", "each", "--depth", 16)
    assert answer.code == 0, answer.err
    assert answer.out.splitlines()[-1] == "wrote 3 pictures into each"
    with Image.open("each/000006.png") as picture:
        high = np.asarray(picture)
    expected = pictures.to_values(torch.from_numpy(np.load("z.npy")), 16)[1]
    assert np.array_equal(high, expected >> 8)
    assert ddpm("evaluate", "run", "--n", 4, "--steps", 2).code == 0
    values = pictures.to_values(torch.from_numpy(np.load("z.npy")))[0]
    with Image.open("z.png") as grid:
        own = grid.crop((10, 10, 74, 74)).resize((16, 16), Image.Resampling.NEAREST)
        assert np.array_equal(own, values)
    with Image.open("z.gif") as gif:
        gif.seek(gif.n_frames - 1)
        own = gif.convert("RGBA").crop((10, 10, 58, 58)).resize((16, 16), Image.Resampling.NEAREST)
    assert np.array_equal(np.asarray(own)[..., 3], np.where(values[..., 3] < 128, 0, 255))
    assert 20 < (values[..., 3] < 128).sum() < 236


@pytest.mark.parametrize("source", ["npy", "png", "tiff"])
def test_sixteen_bits_are_kept_in_training_and_written(train, ddpm, source):
    """A run of --depth 16 has the values to the last bit, and remembers to write as many."""
    values = RNG.integers(0, 65536, (12, 16, 8), dtype=np.uint16)
    if source == "npy":
        np.save("x.npy", values)
    else:
        Path("x.npy").mkdir()
        for k, value in enumerate(values):
            Image.fromarray(value).save(f"x.npy/{k:02d}.{source}")
    config = train("--data", "x.npy", "--depth", 16)
    assert config["training"]["depth"] == 16
    data = training_data(load_run("run")).values
    assert np.array_equal(np.rint((data[:, 0].double() + 1) * 32767.5), values)
    how = ("sample", "run", "--n", 2, "--steps", 2, "--npy", "z.npy", "--png-dir")
    for folder, more, depth in (("a", (), 16), ("b", ("--depth", 8), 8)):
        assert ddpm(*how, folder, *more).code == 0
        with Image.open(f"{folder}/000001.png") as picture:
            found = np.asarray(picture).astype(float)
        expected = (np.load("z.npy")[1, 0].clip(-1, 1).astype(float) + 1) / 2 * (2**depth - 1)
        assert np.abs(found - expected).max() < 0.51
    answer = ddpm("train", "--out", "run", "--resume", "--depth", 8)
    assert (answer.code, "--depth: got 8, but run was started with 16" in answer.err) == (2, True)


def test_depth_8_rounds_to_bytes(train, ddpm):
    values = RNG.integers(0, 65536, (12, 16, 16), dtype=np.uint16)
    np.save("x.npy", values)
    train("--data", "x.npy", "--depth", 8)
    data = training_data(load_run("run")).values
    assert data.dtype == torch.uint8
    assert np.abs(data[:, 0].double() - values / 257).max() < 0.501
    assert ddpm("sample", "run", "--n", 1, "--steps", 1, "--png-dir", "a").code == 0
    with Image.open("a/000000.png") as picture:
        assert picture.mode == "L"


def test_each_sample_is_the_array_s_and_others_in_the_folder_are_said(digits_run, ddpm):
    for first in (0, 3):
        how = ("--n", 3, "--first-sample", first, "--steps", 2, "--png-dir", "each", "--npy", "z.npy")
        answer = ddpm("sample", digits_run, *how)
        assert answer.code == 0, answer.err
    assert answer.out.splitlines()[-1] == "wrote 3 pictures into each, which holds 3 other files"
    values = pictures.to_values(torch.from_numpy(np.load("z.npy")))
    for k in range(3):
        with Image.open(f"each/{3 + k:06d}.png") as picture:
            assert picture.mode == "L"
            assert np.array_equal(picture, values[k, ..., 0])


LONG = "x" * 252  # with its suffix more than the 255 that file systems allow


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--out", f"{LONG}.png"), ("--out", LONG, "File name too long")),
        (("--npy", f"{LONG}.npy"), ("--npy", "File name too long")),
        (("--gif", "/proc/x.gif"), ("--gif", "/proc/x.gif: cannot be written")),
        (("--png-dir", "/proc/x"), ("--png-dir", "/proc/x: cannot be written")),
        (("--png-dir", "/proc"), ("--png-dir", "cannot be written")),
        (("--png-dir", "gone/x"), ("--png-dir", "gone/x", "existing one")),
        (("--png-dir", "file"), ("--png-dir", "file", "needs a folder")),
        (("--npy", "x.npy", "--depth", "16"), ("--depth", "--png-dir")),
        (("--png-dir", "new", "--depth", "12"), ("--depth", "12", "8 or 16")),
        (("--png-dir", "new", "--context", "77"), ("--context",)),
    ],
)
def test_where_pictures_go_is_checked_before_they_are_made(digits_run, ddpm, tmp_path, monkeypatch, options, words):
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr("ddpm.commands.sampling_options.sample", lambda *_, **__: pytest.fail("sampled"))
    answer = ddpm("sample", digits_run, "--n", 1, *options)
    assert answer.code == 2
    assert len(answer.err.splitlines()) == 1
    assert all(word in answer.err for word in words), answer.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_points_have_no_pictures_of_their_own(roll_run, ddpm):
    answer = ddpm("sample", roll_run, "--n", 1, "--png-dir", "new")
    assert (answer.code, "--png-dir: samples are of shape [2]" in answer.err) == (2, True)


def test_what_a_gif_keeps_is_its_frames_alone(digits_run):
    run = load_run(digits_run)
    table = table_of(run, {"solver": "ddim", "steps": 20})[1]
    every = []
    options = {"engine": "eager", "batch_size": 2, "seed": 3}
    for first in (0, 2, 4):
        part = []
        more = {"n": min(2, 5 - first), "first_sample": first, "seed": 3, "engine": "eager"}
        sample(run.model, run.schedule, table=table, callback=lambda _, x0, p=part: p.append(x0.clone()), **more)
        every.append(torch.stack(part))
    every = torch.cat(every, dim=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "GIF_FRAMES_MAX", 6)
        _, kept = sample_run(run, 5, None, table, World(), keep=True, **options)
        frames = pictures.frames_of(20)
    assert len(kept) == len(frames) == 6
    assert all(torch.equal(one, every[frame]) for one, frame in zip(kept, frames, strict=True))


def test_a_folder_s_name_is_no_markup_and_may_be_any_text(train, ddpm):
    save()
    train("--data", "x.npy")
    name = "x[/red]y[bold]:smile:\\[c]"
    Path("x[").mkdir()
    Path("run").rename(name)
    answer = ddpm("evaluate", name, "--n", 4, "--steps", 1)
    assert answer.code == 0, answer.err
    assert name in answer.out.replace("\n", "")


def test_class_names_are_found_however_their_accents_are_stored(train, ddpm, tmp_path):
    decomposed = unicodedata.normalize("NFD", "café")
    for name in (decomposed, "thé"):
        for k in range(2):
            (tmp_path / "d" / name).mkdir(parents=True, exist_ok=True)
            Image.new("L", (16, 16), 60 * k).save(tmp_path / "d" / name / f"{k}.png")
    config = train("--data", "d")
    assert config["classes"] == ["café", "thé"]
    how = ("--n", 1, "--steps", 1, "--npy", "z.npy")
    for text in ("café", decomposed):
        assert ddpm("sample", "run", "--context", text, *how).code == 0
    config["classes"] = [decomposed, "thé"]  # as former versions stored it
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    assert ddpm("sample", "run", "--context", "café", *how).code == 0
