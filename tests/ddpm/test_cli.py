"""The command line: every bad input is one line, exit code 2 and nothing changed; the good paths do what they say."""

import errno
import json
import os
import shutil
import warnings
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ddpm import ContextUnet, load_run, make_table, sample
from ddpm.metrics import distance
from ddpm.networks.context_unet import SHORTCUT_PREFIX
from kernels import philox


def published_state() -> dict[str, torch.Tensor]:
    """A ContextUnet state dict as published ones are: without the shortcut."""
    torch.manual_seed(0)
    state = ContextUnet(3, 16, 5, 16).state_dict()
    return {name: tensor for name, tensor in state.items() if not name.startswith(SHORTCUT_PREFIX)}


def copy_run(source: Path, target: Path, **config: object) -> Path:
    """A copy of a run with entries of its config.json replaced."""
    shutil.copytree(source, target)
    stored = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(stored | config))
    return target


def make_data(folder: Path) -> None:
    """Good and bad data files."""
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 1), dtype=np.uint8)
    arrays = {
        "good": images,
        "other": images // 2,
        "rank": images[0],
        "float": images.astype(np.float32),
        "nan": np.where(images > 9, np.nan, 0.5),
        "wide": images[:, :8],
        "side18": np.zeros((8, 18, 18, 1), np.uint8),
        "object": np.array([{}], dtype=object),
        "classes": np.arange(8) % 3,
        "few": np.arange(5),
        "negative": np.arange(8) - 1,
        "enormous": np.arange(8) * 10_000,
        "infinite": np.full((8, 2), np.inf),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    whole = (folder / "good.npy").read_bytes()
    (folder / "truncated.npy").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.npy").write_bytes(b"")
    (folder / "garbage.npy").write_bytes(b"garbage" * 99)
    (folder / "short-idx").write_bytes(b"\0\0\x08\x03" + b"\0\0\0\x04" * 3 + b"x" * 63)
    (folder / "magic-idx").write_bytes(b"\0\0\x0d\x03" + b"\0\0\0\x04" * 3 + b"x" * 64)
    (folder / "hollow").mkdir()
    for name, size in (("mixed/a.png", 16), ("mixed/b.png", 8), ("broken/a.png", 16)):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(images[0, :size, :size, 0]).save(folder / name)
    broken = folder / "broken" / "a.png"
    broken.write_bytes(broken.read_bytes()[:-40])


def make_runs(folder: Path, digits_run: Path, roll_run: Path, main) -> None:
    """Good and bad runs."""
    shutil.copytree(digits_run, folder / "run")
    shutil.copytree(roll_run, folder / "roll")
    config = json.loads((digits_run / "config.json").read_text())
    copy_run(digits_run, folder / "wider", model=config["model"] | {"n_feat": 16})
    copy_run(digits_run, folder / "fewer", model=config["model"] | {"n_cfeat": 5})
    copy_run(digits_run, folder / "points", network="mlp", model={"features": 2, "n_feat": 8})
    copy_run(digits_run, folder / "kind", network="transformer")
    copy_run(digits_run, folder / "nameless", network=None)
    copy_run(digits_run, folder / "text", model=config["model"] | {"n_feat": "8"})
    copy_run(digits_run, folder / "named", classes=["a", "b"])
    copy_run(digits_run, folder / "version", format_version=99)
    copy_run(digits_run, folder / "noschedule", schedule=None)
    copy_run(digits_run, folder / "solver", sampling=config["sampling"] | {"solver": "euler"})
    copy_run(digits_run, folder / "moved", training=config["training"] | {"data": "gone.npy"})
    copy_run(digits_run, folder / "otherdata", training=config["training"] | {"image_size": 8})
    whole = (digits_run / "model.safetensors").read_bytes()
    damages = {"cut": whole[:-9], "half": whole[:999], "void": b"", "junk": b"\xff" * 500}
    for name, content in damages.items():
        (shutil.copytree(digits_run, folder / name) / "model.safetensors").write_bytes(content)
    for name, text in (("nojson", "{"), ("list", "[]")):
        (shutil.copytree(digits_run, folder / name) / "config.json").write_text(text)
    (shutil.copytree(digits_run, folder / "unsaved") / "model.safetensors").unlink()
    (shutil.copytree(digits_run, folder / "noconfig") / "config.json").unlink()
    extra = shutil.copytree(digits_run, folder / "extra") / "model.safetensors"
    save_file(load_file(extra) | {"surplus.weight": torch.zeros(1)}, extra)

    state = published_state()
    weights = {
        "good": state,
        "list": [torch.zeros(1)],
        "numbered": {0: torch.zeros(1)},
        "twice": {"a": state, "b": dict(state)},
        "linear": torch.nn.Linear(2, 2).state_dict(),
        "surplus": state | {"surplus.weight": torch.zeros(1)},
        "missing-out": {name: tensor for name, tensor in state.items() if name != "out.0.weight"},
        "flat": state | {"init_conv.conv1.0.weight": torch.zeros(3)},
        "misshapen": state | {"out.0.weight": torch.zeros(3)},
    }
    for name, value in weights.items():
        torch.save(value, folder / f"{name}.pth")
    torch.save({"object": PurePosixPath("x")}, folder / "object.pth")
    whole = (folder / "good.pth").read_bytes()
    for name, content in {"void": b"", "garbage": b"garbage" * 99, "cut": whole[: len(whole) // 2]}.items():
        (folder / f"{name}.pth").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["import", str(folder / "good.pth"), "--out", str(folder / "imported")]) == 0


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, digits_run, roll_run) -> Path:
    """A folder of good and bad inputs. No test may change anything in it."""
    from ddpm.commands import main

    folder = tmp_path_factory.mktemp("workshop")
    make_data(folder)
    make_runs(folder, digits_run, roll_run, main)
    (folder / "old.png").write_bytes(b"keep me")
    return folder


def stamps(folder: Path) -> dict[str, tuple[int, ...]]:
    """What a write to a file below it changes, and the names of its folders: without reading fifty runs."""
    facts = {path: path.lstat() for path in folder.rglob("*")}
    return {
        str(path.relative_to(folder)): () if path.is_dir() else (fact.st_ino, fact.st_size, fact.st_ctime_ns)
        for path, fact in facts.items()
    }


@pytest.fixture
def refused(workshop, monkeypatch, ddpm):
    """refused("train ...", "word", ...): exit code 2, one line with these words, and the workshop as it was."""

    def call(command: str, *words: str) -> None:
        monkeypatch.chdir(workshop)
        before = stamps(workshop)
        answer = ddpm(*command.split())
        assert stamps(workshop) == before
        assert answer.code == 2, answer
        assert len(answer.err.splitlines()) == 1, answer.err
        assert answer.err.startswith("error: ")
        for word in words:
            assert word in answer.err, f"{word!r} not in {answer.err!r}"

    return call


# --- bad input: each row is the command, then what the line must name: file or argument, found, needed ----------

TRAIN = "train --out new --n-feat 8 --epochs 1 --timesteps 20 --schedule cosine "
BAD_DATA = [
    ("--data missing.npy", "missing.npy", "no such file"),
    ("--data empty.npy", "empty.npy", "empty file"),
    ("--data truncated.npy", "truncated.npy", "not a readable .npy"),
    ("--data garbage.npy", "garbage.npy", "not a readable .npy"),
    ("--data object.npy", "object.npy", "Object arrays", "without pickled objects"),
    ("--data rank.npy", "rank.npy", "uint8 [16, 16, 1]", "[N, H, W, C]"),
    ("--data float.npy", "float.npy", "float32", "uint8"),
    ("--data nan.npy", "nan.npy", "NaN", "uint8"),
    ("--data wide.npy --image-size 8x18", "[8, 18]", "multiple of 4", "--image-size 8x16 or 8x20"),
    ("--data good.npy --image-size 24x", "--image-size", "'24x'", "HEIGHTxWIDTH"),
    ("--data good.npy --depth 12", "--depth", "12", "8 or 16"),
    ("--data good.npy --depth 16", "--depth", "16", "good.npy", "8 bits"),
    ("--data swiss-roll --depth 16", "--depth", "points"),
    ("--data side18.npy", "18", "multiple of 4"),
    ("--data good.npy --image-size 10", "10", "multiple of 4"),
    ("--data good.npy --image-size 0", "--image-size", "0", "1..9459"),
    ("--data good.npy --labels gone.npy", "gone.npy", "no such file"),
    ("--data good.npy --labels gone-idx", "gone-idx", "no such file"),
    ("--data good.npy --labels empty.npy", "empty.npy", "empty file"),
    ("--data good.npy --labels object.npy", "object.npy", "Object arrays"),
    ("--data good.npy --labels few.npy", "few.npy", "5 labels", "8 images", "good.npy"),
    ("--data good.npy --labels negative.npy", "negative.npy", "-1..6", "needs 0"),
    ("--data good.npy --labels enormous.npy", "enormous.npy", "0..70000", "needs 0..9999"),
    ("--data good.npy --labels infinite.npy", "infinite.npy", "[inf, inf]", "finite", "one-hot"),
    ("--data good.npy --labels nan.npy", "nan.npy", "needs integers"),
    ("--data good.npy --labels short-idx", "short-idx", "2049"),
    ("--data good.npy --labels classes.npy --classes a,b", "--classes", "2 names", "needs 3"),
    ("--data good.npy --classes a,b", "--classes", "2 names", "needs 0"),
    ("--data digits --labels classes.npy", "--labels", "digits"),
    ("--data mixed --labels classes.npy", "--labels", "mixed"),
    ("--data swiss-roll --image-size 16", "--image-size", "points"),
    ("--data short-idx", "short-idx", "63 bytes", "64"),
    ("--data magic-idx", "magic-idx", "2051"),
    ("--data hollow", "hollow", "no images", ".png"),
    ("--data mixed", "b.png", "8x8", "16x16", "--image-size"),
    ("--data broken", "a.png", "not a readable image"),
]
BAD_TRAINING = [
    ("--n-feat 7", "--n-feat", "7", "multiple of 8"),
    ("--epochs 0", "--epochs", "0", ">= 1"),
    ("--batch-size 0", "--batch-size", "0", ">= 1"),
    ("--batch-size 1", "--batch-size", "1", "at least 2"),
    ("--timesteps 0", "timesteps", "0", ">= 1"),
    ("--schedule round", "schedule", "'round'", "linear"),
    ("--schedule linear --beta-end 1.5", "beta_end", "1.5", "< 1"),
    ("--beta-start 0.1", "beta_start", "cosine"),
    ("--prediction x1", "--prediction", "'x1'", "eps, v, x0"),
    ("--loss l3", "--loss", "'l3'", "mse, l1, huber"),
    ("--min-snr -1", "--min-snr", "-1", ">= 0"),
    ("--lr 0", "--lr", "0.0", "> 0"),
    ("--lr nan", "--lr", "nan", "finite"),
    ("--ema-decay 2", "--ema-decay", "2", "0..1"),
    ("--context-dropout nan", "--context-dropout", "nan", "0..1"),
    ("--clip-grad -1", "--clip-grad", "-1", ">= 0"),
    ("--precision fp8", "--precision", "'fp8'", "bf16"),
    ("--seed -1", "--seed", "-1", "0.."),
    ("--seed 9223372036854775808", "--seed", "9223372036854775808"),
    ("--device tpu", "--device", "'tpu'", "cpu"),
    ("--save-every 0", "--save-every", "0", "> 0"),
    ("--save-every nan", "--save-every", "nan", "> 0"),
    ("--resume --overwrite", "--resume", "--overwrite"),
]
BAD_FOLDERS = [
    ("train --data good.npy --out run", "run", "already holds a run", "--resume", "--overwrite"),
    ("train --data good.npy --out unsaved", "unsaved", "already holds a run"),
    ("train --data good.npy --out noconfig", "noconfig", "already holds a run"),
    ("train --data good.npy --out old.png", "old.png", "is a file", "folder"),
    ("train --data good.npy --out old.png/run", "old.png", "folder"),
    ("train --out run --resume --lr 0.5", "--lr", "0.5", "0.001"),
    ("train --out run --resume --data good.npy", "run", "other data", "good.npy"),
    ("train --out imported --resume", "imported", "cannot be resumed"),
    ("train --out version --resume", "version/config.json", "99", "needs 1"),
    ("train --out noconfig --resume", "noconfig/config.json", "no such file"),
    ("train --out moved --resume", "gone.npy", "no such file"),
    ("import good.pth --out run", "run", "already holds a run", "--overwrite"),
    ("import good.pth --out old.png", "old.png", "is a file", "folder"),
]
SAMPLE = "sample run --out old.png "
BAD_SAMPLING = [
    ("--solver euler", "solver", "'euler'", "ddpm, ddim, dpmpp_2m"),
    ("--steps 21", "steps", "21", "1..20"),
    ("--steps 0", "steps", "0", "1..20"),
    ("--steps -3", "steps", "-3", "1..20"),
    ("--steps 7 --spacing leading", "steps", "7", "divisor of 20"),
    ("--spacing odd", "spacing", "'odd'", "trailing"),
    ("--solver ddim --eta 2", "eta", "2", "<= 1"),
    ("--eta 0.5", "eta", "0.5", "solver 'ddpm' takes only", "variance"),
    ("--solver dpmpp_2m --eta 0", "eta", "0.0", "solver 'dpmpp_2m' takes only"),
    ("--variance small", "variance", "'small'", "posterior"),
    ("--solver ddim --variance beta", "variance", "'beta'", "solver 'ddim' takes only", "eta"),
    ("--solver gone.json", "gone.json", "no such file"),
    ("--clip -1", "clip", "-1", "> 0"),
    ("--n 0", "--n", "0", ">= 1"),
    ("--n -5", "--n", "-5", ">= 1"),
    ("--n many", "--n", "integer"),
    ("--seed -1", "seed", "-1", "0..9223372036854775807"),
    ("--first-sample -1", "--first-sample", "-1"),
    ("--batch-size 0", "--batch-size", "0", ">= 1"),
    ("--columns 0", "--columns", "0", ">= 1"),
    ("--guidance 2", "guidance", "2.0", "context"),
    ("--guidance nan --context 3", "guidance", "nan", "finite"),
    ("--context x", "--context", "'x'", "0, 1, 2"),
    ("--context 10", "--context", "'10'", "0..9"),
    ("--context -1", "--context", "'-1'", "0..9"),
    ("--context 1,0,0", "--context", "3 numbers", "10"),
    ("--context nan,0,0,0,0,0,0,0,0,0", "--context", "nan", "finite"),
    ("--context 1,,0", "--context", "'1,,0'"),
    ("--engine warp", "engine", "'warp'", "eager"),
    ("--precision int8", "--precision", "'int8'", "fp32, bf16, fp16"),
    ("--device tpu", "--device", "'tpu'", "cpu"),
    ("--npy old.png", "--npy", "old.png", ".npy"),
    ("--gif x.png", "--gif", "x.png", ".gif"),
    ("--npy nowhere/x.npy", "--npy", "nowhere/x.npy", "existing folder"),
]
BAD_RUNS = [
    ("sample gone --out old.png", "gone", "no such run folder"),
    ("sample run", "--out, --npy, --gif", "at least one"),
    ("sample run --out grid.jpg", "--out", "grid.jpg", ".png"),
    ("sample run --out hollow", "--out", "hollow", ".png"),
    ("sample roll --context 1 --out old.png", "--context", "'1'", "without classes"),
    ("sample roll --context all --out old.png", "--context", "'all'", "without classes"),
    ("sample cut --out old.png", "cut/model.safetensors", "not a whole safetensors"),
    ("sample half --out old.png", "half/model.safetensors", "not a whole safetensors"),
    ("sample void --out old.png", "void/model.safetensors", "not a whole safetensors"),
    ("sample junk --out old.png", "junk/model.safetensors", "not a whole safetensors"),
    ("sample unsaved --out old.png", "unsaved/model.safetensors", "no such file", "--resume"),
    ("sample extra --out old.png", "extra/model.safetensors", "surplus.weight", "another network"),
    ("sample noconfig --out old.png", "noconfig/config.json", "no such file"),
    ("sample nojson --out old.png", "nojson/config.json", "not readable JSON"),
    ("sample list --out old.png", "list/config.json", "list", "needs an object"),
    ("sample wider --out old.png", "wider/model.safetensors", "init_conv", "[8, ", "[16, "),
    ("sample fewer --out old.png", "fewer/", "5"),
    ("sample points --out old.png", "points/config.json", "10 classes"),
    ("sample kind --out old.png", "kind/config.json", "'transformer'", "context_unet"),
    ("sample nameless --out old.png", "nameless/config.json", "'network'", "None", "str"),
    ("sample text --out old.png", "text/config.json"),
    ("sample named --out old.png", "named/config.json", "2", "10"),
    ("sample version --out old.png", "version/config.json", "99", "needs 1"),
    ("sample noschedule --out old.png", "noschedule/config.json", "'schedule'", "None"),
    ("sample solver --out old.png", "solver/config.json", "'euler'", "ddim"),
    ("evaluate gone", "gone", "no such run folder"),
    ("evaluate run --n 1", "--n", "1", "at least 2"),
    ("evaluate run --n 2 --json nowhere/x.json", "--json", "nowhere/x.json"),
    ("evaluate run --n 2 --solver euler", "solver", "'euler'"),
    ("evaluate run --n 2 --precision half", "--precision", "'half'", "fp32, bf16, fp16"),
    ("evaluate roll --n 2 --guidance 2", "guidance", "2.0", "context"),
    ("evaluate imported --n 4", "imported/config.json", "no training data"),
    ("evaluate moved --n 4", "gone.npy", "no such file"),
    ("evaluate otherdata --n 4", "otherdata", "other data"),
    ("evaluate run --n 4 --data good.npy", "run", "other data", "good.npy"),
]
BAD_WEIGHTS = [
    ("gone.pth", "gone.pth", "no such file"),
    ("hollow", "hollow"),
    ("void.pth", "void.pth", "not a PyTorch file"),
    ("garbage.pth", "garbage.pth", "not a PyTorch file"),
    ("cut.pth", "cut.pth", "not a PyTorch file"),
    ("object.pth", "object.pth", "not a PyTorch file of weights alone"),
    ("list.pth", "list.pth", "list", "state dict"),
    ("twice.pth", "twice.pth", "holds 2 networks", "a, b"),
    ("numbered.pth", "numbered.pth"),
    ("linear.pth", "linear.pth", "not a ContextUnet state dict"),
    ("flat.pth", "flat.pth", "not a ContextUnet state dict"),
    ("surplus.pth", "surplus.pth", "surplus.weight"),
    ("missing-out.pth", "missing-out.pth", "out.0.weight"),
    ("misshapen.pth", "misshapen.pth", "out.0.weight", "[3]"),
    ("good.pth --n-feat 64", "--n-feat", "64", "16"),
    ("good.pth --n-cfeat 7", "--n-cfeat", "7", "5"),
    ("good.pth --height 32", "--height", "32", "16"),
    ("good.pth --classes a,b", "--classes", "2 names", "5"),
    ("good.pth --timesteps 0", "timesteps", "0", ">= 1"),
    ("good.pth --beta-end 2", "beta_end", "2.0", "< 1"),
]
BAD_COMMANDS = [
    ("trian", "trian"),
    ("train", "--out"),
    ("train --out new --colour red", "--colour"),
    ("train --out new --epochs", "--epochs"),
    ("train --out new --epochs two", "--epochs", "integer"),
    ("sample", "run"),
    ("import good.pth", "--out"),
    ("sample run extra --out old.png", "extra"),
]


def rows(cases, prefix=""):
    return pytest.mark.parametrize(
        ("command", "words"), [pytest.param(prefix + row[0], row[1:], id=row[0].replace(" ", "_")) for row in cases]
    )


@rows(BAD_DATA, TRAIN)
def test_bad_data(refused, command, words):
    refused(command, *words)


@rows(BAD_TRAINING, TRAIN + "--data good.npy ")
def test_bad_training_options(refused, command, words):
    refused(command, *words)


@rows(BAD_FOLDERS)
def test_bad_folders(refused, command, words):
    refused(command, *words)


@rows(BAD_SAMPLING, SAMPLE)
def test_bad_sampling_options(refused, command, words):
    refused(command, *words)


@rows(BAD_RUNS)
def test_bad_runs(refused, command, words):
    refused(command, *words)


@rows(BAD_WEIGHTS, "import --out new ")
def test_bad_weights(refused, command, words):
    refused(command, *words)


@rows(BAD_COMMANDS)
def test_bad_commands(refused, command, words):
    refused(command, *words)


def test_no_advice_to_unpickle_is_passed_on(workshop, ddpm):
    for name in ("object", "garbage"):
        err = ddpm("import", workshop / f"{name}.pth", "--out", workshop / "new").err
        assert "`False`" not in err
        assert "\x1b" not in err


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
@pytest.mark.parametrize(
    "command",
    ["train --data good.npy --out new", "train --data good.npy --out run --overwrite", "import good.pth --out new"],
)
def test_a_folder_that_cannot_be_written_to(workshop, monkeypatch, ddpm, command, number):
    monkeypatch.chdir(workshop)
    before = stamps(workshop)

    def fail(path: Path, *_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), *([] if number == errno.ENOSPC else [str(path)]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_text", fail)
        patch.setattr(Path, "write_bytes", fail)
        answer = ddpm(*command.split())
    shutil.rmtree("new", ignore_errors=True)
    errors = [line for line in answer.err.splitlines() if not line.startswith("note: ")]
    assert stamps(workshop) == before
    assert answer.code == 2
    assert len(errors) == 1
    assert command.split()[command.split().index("--out") + 1] in errors[0]
    assert os.strerror(number) in errors[0]


def test_a_picture_that_cannot_be_written_leaves_the_old_one(workshop, monkeypatch, ddpm):
    monkeypatch.chdir(workshop)
    before = stamps(workshop)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", fail)
    answer = ddpm("sample", "run", "--n", 1, "--steps", 1, "--out", "old.png")
    assert answer.code == 2
    assert stamps(workshop) == before
    assert answer.err.splitlines()[-1].startswith("error: ")
    assert "old.png" in answer.err.splitlines()[-1]
    assert "No space left" in answer.err.splitlines()[-1]


def test_debug_shows_the_traceback_before_the_same_line(workshop, ddpm):
    answers = [ddpm(*debug, "sample", workshop / "cut", "--out", "new.png") for debug in ((), ("--debug",))]
    assert [answer.code for answer in answers] == [2, 2]
    assert "Traceback (most recent call last)" in answers[1].err
    assert answers[1].err.splitlines()[-1] == answers[0].err.strip()


def test_no_arguments_shows_the_help_and_no_error(ddpm):
    answer = ddpm()
    assert "Usage: ddpm" in answer.out + answer.err
    assert "error:" not in answer.err
    assert len((answer.out + answer.err).splitlines()) > 5


def test_help_lists_the_commands(ddpm):
    answer = ddpm("--help")
    assert answer.code == 0
    assert all(f"\n  {name} " in answer.out for name in ("train", "sample", "evaluate", "import"))


# --- good paths -------------------------------------------------------------------------------------------------


@pytest.fixture
def draw(ddpm, tmp_path):
    """draw(run, "--n", 4, ...): the array that `ddpm sample --npy` writes."""

    def call(run: Path, *arguments: object) -> np.ndarray:
        answer = ddpm("sample", run, "--npy", tmp_path / "x.npy", *arguments)
        assert answer.code == 0, answer.err
        return np.load(tmp_path / "x.npy")

    return call


def test_training_leaves_a_run(digits_run):
    assert {path.name for path in digits_run.iterdir()} == {
        *("config.json", "model.safetensors", "training.safetensors", "loss.csv", "loss.png")
    }
    header, row = (digits_run / "loss.csv").read_text().splitlines()
    assert header == "epoch,step,loss,lr"
    assert row.split(",")[:2] == ["1", "18"]
    config = json.loads((digits_run / "config.json").read_text())
    assert (config["format_version"], config["network"]) == (2, "context_unet")
    assert config["sampling"] == {"solver": "ddpm", "steps": None, "clip": 1.0}
    assert config["classes"] == list("0123456789")
    assert config["model"]["n_feat"] == 8


def test_training_overwrites_only_when_told(digits_run, tmp_path, ddpm, tiny_options, workshop):
    run = shutil.copytree(digits_run, tmp_path / "run")
    data = ("--data", workshop / "good.npy")
    assert ddpm("train", *data, "--out", run, *tiny_options).code == 2
    assert json.loads((run / "config.json").read_text())["data"]["name"] == "digits"
    assert ddpm("train", *data, "--out", run, *tiny_options, "--overwrite").code == 0
    assert json.loads((run / "config.json").read_text())["data"]["name"] == "good"
    assert load_run(run).model.n_cfeat == 0


def test_training_shows_progress(ddpm, workshop, tmp_path, tiny_options):
    answer = ddpm("train", "--data", workshop / "good.npy", "--out", tmp_path / "run", *tiny_options)
    last = [line for line in answer.err.splitlines() if line.startswith("train ")][-1]
    assert all(word in last for word in ("100%", "loss", "images/s", "left"))
    assert f"ddpm sample {tmp_path / 'run'}" in answer.out


def test_sample_writes_picture_array_and_gif(digits_run, tmp_path, ddpm):
    names = [tmp_path / f"a.{suffix}" for suffix in ("png", "npy", "gif")]
    options = ("--out", names[0], "--npy", names[1], "--gif", names[2])
    answer = ddpm("sample", digits_run, "--n", 10, "--context", "all", "--steps", 5, *options)
    assert answer.code == 0
    assert answer.out.splitlines() == [f"wrote {name}" for name in names]
    array = np.load(names[1])
    assert (array.dtype, array.shape) == (np.float32, (10, 1, 16, 16))
    assert Image.open(names[0]).format == "PNG"
    with Image.open(names[2]) as gif:
        assert gif.n_frames == 7
    assert sorted(tmp_path.iterdir()) == sorted(names)


def test_gif_does_not_change_the_samples(digits_run, tmp_path, draw):
    options = ("--n", 3, "--steps", 4, "--context", "2")
    assert np.array_equal(draw(digits_run, *options), draw(digits_run, *options, "--gif", tmp_path / "a.gif"))


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmpp_2m"])
def test_array_is_exactly_what_python_samples(digits_run, draw, solver):
    array = draw(digits_run, "--n", 4, "--solver", solver, "--steps", 6, "--seed", 9, "--context", 3, "--guidance", 2)
    run = load_run(digits_run)
    options = run.options(solver=solver, steps=6)
    images = sample(run.model, run.schedule, 4, seed=9, context=torch.eye(10)[3], guidance=2.0, **options)
    assert np.array_equal(array, images)


def test_defaults_are_the_runs(digits_run, draw):
    run = load_run(digits_run)
    assert run.sampling["clip"] == 1.0
    assert np.array_equal(draw(digits_run, "--n", 3), sample(run.model, run.schedule, 3, **run.sampling))


def test_contexts_by_class_number_vector_and_mixture(digits_run, draw):
    def of(context: str) -> np.ndarray:
        return draw(digits_run, "--n", 2, "--steps", 3, "--context", context)

    run = load_run(digits_run)
    options = run.sampling | {"steps": 3}
    mixture = torch.tensor([0.5, 0, 0, 0.5, 0, 0, 0, 0, 0, 0])
    assert np.array_equal(of("3"), of("0,0,0,1,0,0,0,0,0,0"))
    assert np.array_equal(of("0.5,0,0,.5,0,0,0,0,0,0"), sample(run.model, run.schedule, 2, context=mixture, **options))
    assert distance(of("3"), of("4")) > 1e-4


def test_context_all_gives_sample_k_class_k(digits_run, draw):
    options = ("--steps", 3, "--guidance", 2)
    every = draw(digits_run, "--n", 13, "--context", "all", *options)
    for k in (0, 7, 12):
        one = draw(digits_run, "--n", 1, "--first-sample", k, "--context", k % 10, *options)
        assert distance(one[0], every[k]) <= 1e-5


def test_named_classes_are_understood(ddpm, draw, workshop, tmp_path, tiny_options):
    data = ("--data", workshop / "good.npy", "--labels", workshop / "classes.npy", "--classes", "cat,dog,cow")
    assert ddpm("train", *data, "--out", tmp_path / "run", *tiny_options).code == 0
    assert np.array_equal(
        draw(tmp_path / "run", "--n", 1, "--context", "cow"), draw(tmp_path / "run", "--n", 1, "--context", "2")
    )


def test_the_only_class_is_class_0(ddpm, draw, workshop, tmp_path, tiny_options):
    np.save(tmp_path / "zeros.npy", np.zeros(8, np.int64))
    run, data = tmp_path / "run", ("--data", workshop / "good.npy", "--labels", tmp_path / "zeros.npy")
    assert ddpm("train", *data, "--out", run, *tiny_options).code == 0
    opened = load_run(run)
    assert opened.model.condition_shape == (1,)
    how = ("--n", 2, "--steps", 3)
    of_class = sample(opened.model, opened.schedule, 2, context=[1.0], **opened.options(steps=3))
    assert np.array_equal(draw(run, *how, "--context", 0), of_class)
    assert np.array_equal(draw(run, *how, "--context", "all"), of_class)
    assert np.array_equal(draw(run, *how, "--context", "1.0"), of_class)
    without = sample(opened.model, opened.schedule, 2, **opened.options(steps=3))
    assert np.array_equal(draw(run, *how), without)
    assert distance(without, of_class) > 1e-4
    answer = ddpm("sample", run, *how, "--context", 1, "--npy", tmp_path / "y.npy")
    assert (answer.code, len(answer.err.splitlines())) == (2, 1)
    assert "--context: got '1', needs a class (0), 0..0" in answer.err


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmpp_2m"])
def test_splits_and_batches_draw_the_whole(digits_run, draw, solver):
    options = ("--context", "all", "--guidance", 2, "--solver", solver, "--seed", 4)
    whole = draw(digits_run, "--n", 6, *options)
    parts = [draw(digits_run, "--n", n, "--first-sample", k, *options) for k, n in ((0, 2), (2, 4))]
    assert distance(np.concatenate(parts), whole) <= 1e-5
    assert distance(draw(digits_run, "--n", 6, "--batch-size", 4, *options), whole) <= 1e-5


def test_seeds_differ_and_repeat(digits_run, draw):
    one, other, again = (draw(digits_run, "--n", 2, "--steps", 3, "--seed", seed) for seed in (1, 2, 1))
    assert np.array_equal(one, again)
    assert distance(one, other) > 0.1


def test_clip_zero_lifts_the_bound(digits_run, draw):
    bound, free = (draw(digits_run, "--n", 4, "--solver", "ddim", "--steps", 2, *c) for c in ((), ("--clip", 0)))
    assert np.abs(bound).max() <= 1.0001
    assert np.abs(free).max() > 1.0001


def test_v_prediction_is_stored_and_honoured(ddpm, draw, tmp_path, tiny_options, workshop):
    folder = tmp_path / "run"
    data = ("--data", workshop / "good.npy", "--prediction", "v")
    assert ddpm("train", *data, "--out", folder, *tiny_options).code == 0
    array = draw(folder, "--n", 2, "--solver", "ddim", "--steps", 5, "--seed", 1)
    run = load_run(folder)
    assert run.config["prediction"] == "v"
    table = make_table(run.schedule, "ddim", 5, prediction="v", clip=1.0)
    x = philox.normal(1, torch.arange(2), 0, 0, (1, 16, 16))
    previous = torch.zeros_like(x)
    with torch.no_grad():
        for t, row in zip(table.timesteps.tolist(), table.coefficients.tolist(), strict=True):
            m = run.model(x, torch.full((2,), t / 20))
            x0 = (row[0] * x + row[1] * m).clamp(-1, 1)
            x, previous = row[2] * x + row[3] * x0 + row[4] * m + row[5] * previous, x0
    assert distance(array, x.numpy()) <= 1e-5
    as_eps = sample(run.model, run.schedule, 2, solver="ddim", steps=5, seed=1, clip=1.0, prediction="eps")
    assert distance(as_eps.numpy(), array) > 1e-2


def test_swiss_roll_trains_and_samples_points(roll_run, draw, tmp_path):
    array = draw(roll_run, "--n", 50, "--out", tmp_path / "points.png")
    assert array.shape == (50, 2)
    assert np.isfinite(array).all()
    assert Image.open(tmp_path / "points.png").format == "PNG"
    assert load_run(roll_run).sampling["clip"] is None


def test_evaluate_prints_both_figures_beside_those_of_real_data(digits_run, ddpm, tmp_path):
    path = tmp_path / "figures.json"
    answer = ddpm("evaluate", digits_run, "--n", 30, "--steps", 5, "--guidance", 2, "--seed", 1, "--json", path)
    assert answer.code == 0
    figures = json.loads(path.read_text())
    settings = {"solver": "ddpm", "steps": 5, "guidance": 2.0, "seed": 1, "precision": "fp32", "n": 30, "real": 1797}
    assert {name: figures[name] for name in settings} == settings
    for name in ("frechet", "frechet_real"):
        assert f"{figures[name]:.3f}" in answer.out
    for name in ("accuracy", "accuracy_real"):
        assert f"{figures[name]:.1%}" in answer.out
    assert figures["accuracy_real"] > 0.95


def test_bfloat16_is_asked_for_and_judged_beside_float32(digits_run, ddpm, draw, tmp_path, monkeypatch):
    monkeypatch.setattr("ddpm.precision.has_bfloat16", lambda: True)
    how = ("--n", 30, "--steps", 5, "--context", "all", "--guidance", 2)
    fp32, bf16 = draw(digits_run, *how), draw(digits_run, *how, "--precision", "bf16")
    error = np.abs(bf16 - fp32).max() / np.abs(fp32).max()
    assert 1e-4 < error < 0.1  # bfloat16 keeps 8 bits
    path = tmp_path / "figures.json"
    answer = ddpm("evaluate", digits_run, "--n", 30, "--steps", 5, "--precision", "bf16", "--json", path)
    assert answer.code == 0
    assert "bf16" in answer.out
    assert json.loads(path.read_text())["precision"] == "bf16"


def test_evaluate_without_classes_has_a_distance_alone(roll_run, ddpm, tmp_path):
    assert ddpm("evaluate", roll_run, "--n", 30, "--json", tmp_path / "f.json").code == 0
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["accuracy"] is None
    assert figures["frechet"] > 0


def test_evaluate_finds_moved_data_where_it_is_told(ddpm, workshop, tmp_path, tiny_options):
    data, labels = (shutil.copy(workshop / f"{name}.npy", tmp_path) for name in ("good", "classes"))
    run = tmp_path / "run"
    assert ddpm("train", "--data", data, "--labels", labels, "--out", run, *tiny_options).code == 0
    (tmp_path / "good.npy").rename(tmp_path / "moved.npy")
    assert ddpm("evaluate", run, "--n", 4).code == 2
    assert ddpm("evaluate", run, "--n", 4, "--data", tmp_path / "moved.npy").code == 0


def test_imported_weights_are_a_run_that_samples(ddpm, draw, workshop, tmp_path):
    run = tmp_path / "run"
    answer = ddpm("import", workshop / "good.pth", "--out", run, "--classes", "a,b,c,d,e")
    assert answer.code == 0
    assert "init_conv.shortcut" in answer.err
    config = json.loads((run / "config.json").read_text())
    assert config["weights"] == "imported"
    assert config["schedule"]["kind"] == "context_unet"
    assert (config["sampling"]["variance"], config["sampling"]["clip"]) == ("beta", None)
    state = load_run(run).model.state_dict()
    for name, tensor in published_state().items():
        assert torch.equal(state[name], tensor)
    assert not state["init_conv.shortcut.weight"].any()
    assert draw(run, "--n", 2, "--steps", 5, "--context", "c", "--guidance", 2).shape == (2, 3, 16, 16)


def test_unconditional_weights_are_imported_and_sample(ddpm, draw, unet, tmp_path):
    source = unet(n_cfeat=0)
    torch.save({n: v for n, v in source.state_dict().items() if "shortcut" not in n}, tmp_path / "w.pth")
    answer = ddpm("import", tmp_path / "w.pth", "--out", tmp_path / "run", "--timesteps", 20, "--beta-end", 0.35)
    assert answer.code == 0, answer.err
    opened = load_run(tmp_path / "run")
    assert (opened.model.condition_shape, opened.classes) == (None, ())
    torch.nn.init.zeros_(source.init_conv.shortcut.weight)
    torch.nn.init.zeros_(source.init_conv.shortcut.bias)
    options = {"solver": "ddpm", "variance": "beta", "seed": 2}
    expected = sample(source, opened.schedule, 2, engine="eager", **options)
    assert distance(draw(tmp_path / "run", "--n", 2, "--seed", 2), expected) < 1e-4
    answer = ddpm("sample", tmp_path / "run", "--context", 0, "--npy", tmp_path / "y.npy")
    assert (answer.code, "was trained without classes" in answer.err) == (2, True)


def test_import_overwrites_only_when_told(ddpm, digits_run, workshop, tmp_path):
    run = shutil.copytree(digits_run, tmp_path / "run")
    assert ddpm("import", workshop / "good.pth", "--out", run).code == 2
    assert load_run(run).model.in_channels == 1
    assert ddpm("import", workshop / "good.pth", "--out", run, "--overwrite").code == 0
    assert load_run(run).model.in_channels == 3
    assert not (run / "training.safetensors").exists()


def test_sampling_replaces_an_old_picture(digits_run, ddpm, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    assert ddpm("sample", digits_run, "--n", 1, "--steps", 1, "--out", path).code == 0
    assert Image.open(path).format == "PNG"
