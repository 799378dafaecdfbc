"""`ddpm-export` from outside: what it writes, what it refuses, and that nothing half-written is left."""

import json
import os
import re
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from PIL import Image

from ddpm import pictures
from ddpm.commands import main as ddpm
from ddpm.networks import PointMLP
from ddpm.runs import load_run
from export import run, verification
from export.models import describe, sha256


def line(answer, code):
    """The one line of an error, with its exit code."""
    assert answer.code == code, answer
    lines = [text for text in answer.err.splitlines() if not text.startswith("eager reference")]
    assert len(lines) == 1, answer.err
    assert lines[0].startswith("error: "), answer.err
    return lines[0]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_manifest_describes_the_files(exported, opened):
    manifest = json.loads((exported / "manifest.json").read_text())
    assert sorted(path.name for path in exported.iterdir()) == sorted([*manifest["files"], "manifest.json"])
    for name, file in manifest["files"].items():
        assert (exported / name).stat().st_size == file["bytes"]
        assert sha256(exported / name) == file["sha256"]
    assert len(manifest["table"]["rows"]) == manifest["table"]["steps"] == 12
    assert len(manifest["parity"]) == 5
    assert all(result["good"] and result["error"] <= result["tolerance"] for result in manifest["parity"])
    assert sum(result["error"] > 0 for result in manifest["parity"]) >= 4  # one sample alone may be the same to the bit
    assert manifest["versions"]["torch"] == version("torch")


def test_run_draws_what_ddpm_sample_draws(exported, opened, export, tmp_path):
    from ddpm import sample

    arguments = ("--n", 5, "--seed", 7, "--context", "b", "--guidance", 2, "--first-sample", 3, "--batch-size", 2)
    answer = export(
        "run", exported / "sampler.onnx", *arguments, "--out", tmp_path / "g.png", "--npy", tmp_path / "g.npy"
    )
    assert answer.code == 0, answer.err
    found = np.load(tmp_path / "g.npy")
    options = opened.sampling | {"context": torch.eye(3)[1], "guidance": 2.0, "seed": 7, "first_sample": 3}
    reference = sample(opened.model, opened.schedule, 5, **options).numpy()
    assert np.abs(found - reference).max() <= 1e-4 * max(1, np.abs(reference).max())
    picture = np.asarray(Image.open(tmp_path / "g.png"))
    assert picture.shape == (2 * 68 + 4, 3 * 68 + 4, 3)
    pixel = np.rint((found[0, :, 0, 0].clip(-1, 1) + 1) * 127.5)
    assert picture[4, 4].tolist() == pixel.tolist()


def test_info_is_readable(exported, export):
    answer = export("info", exported / "sampler.onnx")
    assert answer.code == 0
    for text in ("sampler", "3x16x16", "a, b, c", "ddpm, 12 steps, clip 1.0", "guidance", "table", "images"):
        assert text in answer.out


@pytest.mark.parametrize("name", ["denoiser.onnx", "sampler.onnx", "step.onnx"])
def test_verify_measures_again(exported, run_folder, export, name):
    answer = export("verify", exported / name, run_folder)
    assert answer.code == 0, answer.err
    assert name in answer.out


def test_verify_fails_on_other_weights(exported, run_folder, export, tmp_path):
    other = load_run(run_folder)
    with torch.no_grad():
        other.model.out[3].weight.mul_(1.01)
    folder = tmp_path / "other"
    from ddpm.runs import start_run

    folder.mkdir()
    start_run(folder, other.config, other.model)
    assert "parity" in line(export("verify", exported / "denoiser.onnx", folder), 1)


def broken_loop(value):
    """A StepLoop whose pictures have this value everywhere."""
    return lambda *_, **__: lambda samples, *_, **__: np.full((len(samples), 3, 16, 16), value, np.float32)


def test_a_failed_verification_leaves_what_was_there(copied, run_folder, export, monkeypatch):
    before = contents(copied)
    monkeypatch.setattr(verification, "StepLoop", broken_loop(2.0))
    assert "step.onnx, whole trajectory is off by" in line(export("onnx", run_folder, "--out", copied, "--steps", 4), 1)
    assert contents(copied) == before


def test_a_failed_verification_makes_no_folder(run_folder, export, monkeypatch, tmp_path):
    monkeypatch.setattr(verification, "StepLoop", broken_loop(float("nan")))
    line(export("onnx", run_folder, "--out", tmp_path / "new", "--steps", 2), 1)
    assert not (tmp_path / "new").exists()


def test_no_verify_says_so_in_the_manifest(run_folder, export, tmp_path):
    answer = export(
        "onnx", run_folder, "--out", tmp_path, "--no-verify", "--solver", "ddim", "--steps", 3, "--noise", "none"
    )
    assert answer.code == 0, answer.err
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["verified"] is False
    assert manifest["parity"] == []


def test_runs_of_points_are_refused(export, make_run, tmp_path):
    folder = make_run(tmp_path / "roll", PointMLP())
    for command in (("onnx", folder, "--out", tmp_path / "x"), ("torch", folder)):
        assert "(mlp) has samples [2]" in line(export(*command), 2)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--precision", "int4"), "--precision"),
        (("--noise", "pink"), "--noise"),
        (("--noise", "none"), "adds noise"),
        (("--steps", "99"), "steps"),
        (("--solver", "euler"), "solver"),
        (("--precision", "int8", "--evaluate", "1"), "--evaluate"),
    ],
)
def test_bad_options_are_named(run_folder, export, tmp_path, arguments, says):
    assert says in line(export("onnx", run_folder, "--out", tmp_path / "x", *arguments), 2)
    assert not (tmp_path / "x").exists()


def test_a_missing_run_is_named(export, tmp_path):
    assert "no such run folder" in line(export("onnx", tmp_path / "nothing", "--out", tmp_path / "x"), 2)


def damaged(folder, how):
    """sampler.onnx of the folder, damaged."""
    path = folder / "sampler.onnx"
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "garbage":
        path.write_bytes(np.random.default_rng(0).bytes(5000))
    else:
        model = onnx.load_from_string(content)
        if how == "newer opset":
            model.opset_import[0].version = 99
        elif how == "newer ir":
            model.ir_version = 99
        elif how == "foreign":
            del model.metadata_props[:]
        elif how == "damaged metadata":
            model.metadata_props[0].value = "{"
        elif how == "denoiser":
            model = onnx.load(folder / "denoiser.onnx")
        path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("missing", "no such file"),
        ("empty", "is empty"),
        ("truncated", "not a whole ONNX model"),
        ("garbage", "not a whole ONNX model"),
        ("newer opset", "newer runtime"),
        ("newer ir", "newer runtime"),
        ("foreign", "no 'fused_ddpm' metadata"),
        ("damaged metadata", "damaged"),
        ("denoiser", "is a denoiser"),
    ],
)
def test_bad_models_exit_with_3(copied, run_folder, export, how, says):
    path = damaged(copied, how)
    answer = line(export("run", path, "--n", 1, "--out", copied / "g.png"), 3)
    assert says in answer
    assert str(path) in answer
    assert not (copied / "g.png").exists()
    if how != "denoiser":
        assert says in line(export("info", path), 3)
        assert says in line(export("verify", path, run_folder), 3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--n", "0"), "--n: got 0"),
        (("--n", "x"), "--n: got 'x', needs a whole number"),
        (("--guidance", "x"), "--guidance: got 'x', needs a number"),
        (("--seed",), "--seed: got nothing, needs a value"),
        (("--steps", "0"), "--steps: got 0"),
        (("--solver", "ddim"), "--solver: got ddim, but the table is a constant of this model, needs"),
        (("--steps", "4"), "--steps: got 4, but the table is a constant of this model, needs"),
        (("--steps", "4", "--table", "t.npy"), "--table: got t.npy beside"),
        (("--seed", "-1"), "--seed"),
        (("--seed", str(2**63)), "--seed"),
        (("--context", "nan,0,0"), "--context"),
        (("--context", "3"), "--context"),
        (("--context", "dragon"), "a, b, c"),
        (("--context", "1,2"), "--context"),
        (("--context", "a", "--guidance", "nan"), "--guidance"),
        (("--guidance", "2"), "without --context"),
        (("--provider", "abacus"), "--provider"),
        (("--threads", "-1"), "--threads"),
        (("--threads", "999999"), "--threads"),
        (("--context", "1e39,0,0"), "--context"),
        (("--context", "a", "--guidance", "1e39"), "--guidance"),
        (("--batch-size", "0"), "--batch-size"),
        (("--table", "nothing.npy"), "nothing.npy"),
        (("--clip", "1"), "--clip"),
        (("--frobnicate",), "--frobnicate: no such option"),
        (("--depth", "16"), "--depth: got 16, needs 8 or 16, and --png-dir"),
        (("--png-dir", "new", "--depth", "12"), "--depth: got 12, needs 8 or 16"),
    ],
)
def test_bad_arguments_of_run_exit_with_2(exported, export, tmp_path, arguments, says):
    answer = line(export("run", exported / "sampler.onnx", "--out", tmp_path / "g.png", *arguments), 2)
    assert says in answer
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("depth", [8, 16])
def test_run_writes_each_sample_as_a_picture_of_its_own(exported, run_folder, export, tmp_path, depth):
    """Those of `ddpm sample --png-dir`, but for a last bit here and there."""
    how = ("--n", 3, "--context", "all", "--seed", 5, "--first-sample", 7, "--depth", depth)
    answer = export("run", exported / "sampler.onnx", *how, "--png-dir", tmp_path / "own")
    assert answer.code == 0, answer.err
    assert ddpm([str(word) for word in ("sample", run_folder, *how, "--png-dir", tmp_path / "theirs")]) == 0
    names = [path.name for path in sorted((tmp_path / "own").iterdir())]
    assert names == [path.name for path in sorted((tmp_path / "theirs").iterdir())] == [f"00000{k}.png" for k in "789"]
    for name in names:
        own, theirs = (np.asarray(Image.open(tmp_path / who / name)).astype(int) for who in ("own", "theirs"))
        assert np.abs(own - theirs).max() <= 1  # of colours of 16 bits Pillow reads the high byte
        assert (tmp_path / "own" / name).read_bytes()[24] == depth


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_run_writes_the_png_that_ddpm_writes(channels, depth):
    images = torch.rand(1, channels, 5, 7, generator=torch.manual_seed(0)) * 2.4 - 1.2
    values = pictures.to_values(images, depth)
    assert np.array_equal(run.to_pixels(images.numpy(), depth), values)
    assert run.png_bytes(values[0]) == pictures.png_bytes(values[0])


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_grids_are_those_of_ddpm_sample(channels):
    images = torch.rand(3, channels, 8, 8, generator=torch.manual_seed(0)) * 2.2 - 1.1
    own = np.asarray(run.grid(images.numpy()))
    for k, (y, x) in enumerate(((4, 4), (4, 72), (72, 4))):
        theirs = pictures.to_pixels(images, alpha=True)[k]
        assert np.abs(own[y : y + 64 : 8, x : x + 64 : 8].astype(int) - theirs).max() <= 1
    assert [value.shape for value in run.to_pixels(images.numpy())] == [(8, 8, channels)] * 3
    assert run.grid(images[:2, :, :, :4].numpy(), 2).size == (2 * 32 + 3 * 4, 64 + 2 * 4)


def test_a_file_remembers_the_depth_of_its_run(opened, copied, export, tmp_path):
    deep = replace(opened, config=opened.config | {"training": {"depth": 16}})
    assert "depth" not in describe(opened, "sampler", "fp32")
    model = onnx.load(copied / "sampler.onnx")
    note = next(entry for entry in model.metadata_props if entry.key == run.KEY)
    note.value = json.dumps(json.loads(note.value) | {"depth": describe(deep, "sampler", "fp32")["depth"]})
    onnx.save(model, copied / "sampler.onnx")
    for folder, more, depth in (("a", (), 16), ("b", ("--depth", 8), 8)):
        answer = export("run", copied / "sampler.onnx", "--n", 1, "--png-dir", tmp_path / folder, *more)
        assert answer.code == 0, answer.err
        assert (tmp_path / folder / "000000.png").read_bytes()[24] == depth


def test_run_needs_something_to_write(exported, export, tmp_path):
    assert "--out, --npy, --png-dir: got none" in line(export("run", exported / "sampler.onnx"), 2)
    assert "existing folder" in line(export("run", exported / "sampler.onnx", "--out", tmp_path / "no" / "g.png"), 2)
    assert "without --out" in line(export("run", exported / "sampler.onnx", "--npy", "x.npy", "--columns", 2), 2)


@pytest.mark.parametrize(
    ("option", "place", "says"),
    [
        ("--out", "/proc/x.png", "cannot be written"),
        ("--npy", "/proc/x.npy", "cannot be written"),
        ("--png-dir", "/proc", "cannot be written"),
        ("--png-dir", "x" * 300, "File name too long"),
        ("--png-dir", "no/such", "a name in an existing one"),
        ("--npy", "\udcff.npy", "its name is not in UTF-8"),
        ("--png-dir", "\udcff", "its name is not in UTF-8"),
    ],
)
def test_run_knows_before_it_draws_what_it_cannot_write(exported, export, tmp_path, monkeypatch, option, place, says):
    monkeypatch.setattr(run, "draw", None)
    monkeypatch.chdir(tmp_path)
    said = line(export("run", exported / "sampler.onnx", option, place), 2)
    assert says in said
    assert said.startswith(f"error: {option}: ")
    assert not list(tmp_path.iterdir())


def test_run_waits_for_no_pipe(exported, copied, export, tmp_path):
    os.mkfifo(tmp_path / "t.npy")
    words = ("--n", 1, "--npy", tmp_path / "x.npy")
    said = line(export("run", exported, *words, "--table", tmp_path / "t.npy"), 2)
    assert f"{tmp_path / 't.npy'}: is no regular file" in said
    os.mkfifo(copied / "manifest.json")
    assert f"{copied / 'manifest.json'}: is no regular file" in line(export("run", copied, *words), 3)


def test_tables_of_noise_are_refused_where_there_is_none(run_folder, export, tmp_path):
    how = ("--no-verify", "--solver", "ddim", "--noise", "none", "--open-table")
    assert export("onnx", run_folder, "--out", tmp_path, *how).code == 0
    table = np.zeros((2, 8), np.float32)
    table[:, 6:] = 1  # noise at t = 1
    np.save(tmp_path / "t.npy", table)
    arguments = ("--table", tmp_path / "t.npy", "--out", tmp_path / "g.png")
    assert "has noise" in line(export("run", tmp_path / "sampler.onnx", *arguments), 2)


BAD_TABLES = {
    "archive": (None, "an archive"),
    "narrow": (np.ones((2, 7)), "[2, 7]"),
    "integers": (np.ones((2, 8), np.int64), "int64"),
    "huge": (np.full((2, 8), 1e300), "finite float32"),
    "times": (np.full((2, 8), -5.0), "has times -5..-5"),
    "later": (np.full((2, 8), 13.0), "needs whole ones in 1..12"),
    "text": ("nothing of numpy", "not a .npy file"),
}


@pytest.mark.parametrize(("table", "says"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_tables_that_cannot_be_are_refused(exported, export, tmp_path, table, says):
    path = tmp_path / "t.npy"
    if table is None:
        with path.open("wb") as file:
            np.savez(file, rows=np.ones((2, 8)))
    elif isinstance(table, str):
        path.write_text(table)
    else:
        np.save(path, table)
    arguments = ("--n", 1, "--table", path, "--npy", tmp_path / "g.npy")
    assert says in line(export("run", exported / "sampler.onnx", *arguments), 2)


def test_another_table_keeps_the_models_clip(exported_open, export, tmp_path):
    rows = json.loads((exported_open / "manifest.json").read_text())["table"]["rows"]
    np.save(tmp_path / "t.npy", np.array(rows, np.float32))
    draw = ("run", exported_open / "sampler.onnx", "--n", 1, "--npy")
    assert export(*draw, tmp_path / "own.npy").code == 0
    assert export(*draw, tmp_path / "same.npy", "--table", tmp_path / "t.npy").code == 0
    assert export(*draw, tmp_path / "none.npy", "--table", tmp_path / "t.npy", "--clip", 0).code == 0
    own, same, none = (np.load(tmp_path / f"{name}.npy") for name in ("own", "same", "none"))
    assert np.array_equal(own, same)
    assert np.abs(own - none).max() > 0.1


def test_samples_that_do_not_fit_into_memory(exported, export, tmp_path, monkeypatch):
    def draw(*_, **__):
        raise MemoryError

    monkeypatch.setattr(run, "draw", draw)
    words = ("run", exported / "sampler.onnx", "--npy", tmp_path / "g.npy")
    assert "memory" in line(export(*words), 1)
    assert f"--n: got {2**31}, which are 6.6e+03 GB" in line(export(*words, "--n", 2**31), 2)
    assert not list(tmp_path.iterdir())


def test_names_too_long_for_the_disk(exported, export, tmp_path):
    answer = export("run", exported / "sampler.onnx", "--n", 1, "--npy", tmp_path / f"{'x' * 300}.npy")
    assert "needs a file name" in line(answer, 2)
    long = tmp_path / f"{'x' * 250}.npy"  # itself no longer than a name may be
    assert export("run", exported / "sampler.onnx", "--n", 1, "--npy", long).code == 0
    assert [path.name for path in tmp_path.iterdir()] == [long.name]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"samples": np.array([5, 3])}, "consecutive"),
        ({"samples": np.array([-1, 0])}, "consecutive"),
        ({"samples": np.arange(0)}, "consecutive"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.5}, "seed: got 1.5"),
        ({"seed": True}, "seed: got True"),
        ({"samples": np.arange(2) + 0.5}, "samples: got [0.5, 1.5]"),
        ({"guidance": float("nan")}, "guidance"),
        ({"guidance": "2"}, "guidance: got '2'"),
        ({"guidance": [1.0, 2.0]}, "guidance: got [1.0, 2.0]"),
        ({"table": np.ones((2, 8))}, "table: got [2, 8], but it is a constant of this model"),
        ({"table": np.full((2, 8), 0.5)}, "table: has times 0.5..0.5"),
        ({"table": np.full((2, 8), np.nan)}, "table: has NaN"),
        ({"table": np.ones((2, 8)), "clip": float("nan")}, "clip: got nan"),
        ({"clip": 1.0}, "without a table"),
        ({"samples": np.array([2**56 - 1, 2**56])}, "in 0..2^56 - 1"),
        ({"context": None}, "context"),
        ({"context": np.full((2, 3), np.nan, np.float32)}, "NaN"),
        ({"context": np.zeros((2, 4), np.float32)}, "needs [2, 3]"),
        ({"context": np.array([["a"] * 3] * 2)}, "context: got NaN"),
    ],
)
def test_draw_refuses_what_onnxruntime_would_take(exported, change, says):
    session = run.open_session(exported / "sampler.onnx", threads=1)
    metadata = run.metadata_of(session, exported / "sampler.onnx")
    given = {"samples": np.arange(2), "context": np.zeros((2, 3), np.float32)} | change
    with pytest.raises(run.UsageError, match=re.escape(says)):
        run.draw(session, metadata, **given)


def test_nan_in_the_model_fails_the_run(copied, export):
    model = onnx.load(copied / "sampler.onnx")
    table = next(tensor for tensor in model.graph.initializer if tensor.name == "table")
    table.CopyFrom(onnx.numpy_helper.from_array(np.full((12, 8), np.nan, np.float32), "table"))
    onnx.save(model, copied / "sampler.onnx")
    answer = export("run", copied / "sampler.onnx", "--n", 1, "--out", copied / "g.png")
    note, error = answer.err.splitlines()
    assert (answer.code, note[:24], "NaN" in error) == (1, "note: no manifest.json k", True)
    assert not (copied / "g.png").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_is_never_silently_the_cpu(exported, export, tmp_path, monkeypatch):
    arguments = ("run", exported / "sampler.onnx", "--n", 1, "--out", tmp_path / "g.png", "--provider", "cuda")
    answer = export(*arguments)
    assert "cuda was asked for" in line(answer, 4)
    assert answer.out == ""
    assert not (tmp_path / "g.png").exists()
    answer = export(*arguments, "--allow-fallback")
    assert answer.code == 0, answer.err
    assert "note: cuda is not available, runs on CPUExecutionProvider" in answer.err
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert "built without it" in line(export(*arguments), 4)


def test_fp16_and_int8_are_judged(exported, run_folder, export, tmp_path, monkeypatch):
    """Random weights quantise badly, so the floor is lowered here; its effect is the next test."""
    monkeypatch.setitem(verification.FLOORS, "int8", verification.Floor(-50.0, 5.0, 1.0))
    sizes = {}
    for precision in ("fp16", "int8"):
        out = tmp_path / precision
        answer = export("onnx", run_folder, "--out", out, "--precision", precision, "--evaluate", 4)
        assert answer.code == 0, answer.err
        manifest = json.loads((out / "manifest.json").read_text())
        measured = manifest["quality"]
        assert "imported run" in measured["skipped"]
        assert "were not measured" in answer.out
        assert 0 < measured["relative_l2"] < (0.01 if precision == "fp16" else 5)
        sizes[precision] = manifest["files"]["denoiser.onnx"]["bytes"]
        operators = {node.op_type for node in onnx.load(out / "denoiser.onnx").graph.node}
        assert ("QuantizeLinear" in operators) == (precision == "int8")
    whole = (exported / "denoiser.onnx").stat().st_size
    assert sizes["fp16"] < 0.7 * whole
    assert sizes["int8"] < whole


def test_below_the_floor_nothing_is_written(run_folder, export, tmp_path, monkeypatch):
    monkeypatch.setitem(verification.FLOORS, "fp16", verification.Floor(500.0, 1.0, 1.0))
    answer = export("onnx", run_folder, "--out", tmp_path / "x", "--precision", "fp16", "--evaluate", 2)
    assert answer.code == 1
    assert "PSNR" in answer.err.splitlines()[-1]
    assert not (tmp_path / "x").exists()
