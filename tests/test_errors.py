"""Every error that a user can meet: its exit code, and one line that names the argument or file, its value, the need.

`ROWS` are walked once, each a command in a folder of its own that `prepare` has spoilt. To add one, append a `Row`; to
audit another module, name it in `AUDITED`: then every line of it that raises must be met by a row.
"""

import ast
import errno
import fcntl
import io
import json
import os
import shlex
import shutil
import traceback
from collections.abc import Callable
from contextlib import ExitStack, chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ddpm import command_line
from ddpm.commands import main
from ddpm.distributed import World
from ddpm.files import write_tensors
from ddpm.networks import ContextUnet
from ddpm.training import Trainer, TrainOptions, train

ROOT = Path(__file__).parents[1]
AUDITED = ["files.py", "runs.py", "schedule.py", "commands/train.py"]
AUDITED += [f"training/{name}.py" for name in ("engines", "loop", "objective", "options")]
RAISED = ("BadInput", "ValueError", "WorkFailed")
# What one process with the commands' own arguments cannot meet, and why.
UNMET = {
    "cannot be opened": "the folder was there a moment ago",
    "a multiple of the": "torchrun, see tests/ddpm/test_training.py",
    "type(self).__name__": "make_trainer takes the class of the engine's name",
    "t: got {t}": "Python alone",
    "has taken its place": "another process meanwhile, see tests/ddpm/test_runs.py",
    "alpha_bars: got shape": "Python alone: a config's length is compared before",
}


@dataclass(frozen=True)
class Row:
    """A command that fails: what its line says, what is spoilt before, its exit code."""

    command: str
    words: tuple[str, ...]
    prepare: Callable[[ExitStack], object] = lambda _: None
    code: int = 2


def patched(stack: ExitStack, target: object, name: str, value: object) -> None:
    stack.enter_context(pytest.MonkeyPatch.context()).setattr(target, name, value)


def failing(target: object, name: str, number: int) -> Callable[[ExitStack], None]:
    """The function of this name raises this OSError, which names no file."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return lambda stack: patched(stack, target, name, fail)


def config(change: Callable[[dict], object]) -> Callable[[ExitStack], None]:
    """run/config.json is changed."""

    def prepare(_: ExitStack) -> None:
        path = Path("run/config.json")
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return prepare


def entry(value: object, *keys: str) -> Callable[[ExitStack], None]:
    """An entry of run/config.json has this value."""

    def change(content: dict) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return config(change)


def tensors(change: Callable[[dict], object], name: str = "training") -> Callable[[ExitStack], None]:
    """A file of run/ has changed tensors, and no digest that would tell of it."""

    def prepare(_: ExitStack) -> None:
        path = f"run/{name}.safetensors"
        state = load_file(path)
        change(state)
        save_file(state, path)

    return prepare


def tensor(name: str, value: object) -> Callable[[ExitStack], None]:
    """A tensor of the training state has this value, or what the function makes of it."""
    return tensors(lambda state: state.update({name: value(state[name]) if callable(value) else value}))


def without(*words: str) -> Callable[[ExitStack], None]:
    """The training state lacks the entries whose names contain all these words."""
    return tensors(lambda s: [s.pop(name) for name in list(s) if all(word in name for word in words)])


def content(path: str, raw: bytes) -> Callable[[ExitStack], None]:
    return lambda _: Path(path).write_bytes(raw)


def flipped(path: str, position: int) -> Callable[[ExitStack], None]:
    """One bit of a file is another."""

    def prepare(_: ExitStack) -> None:
        raw = bytearray(Path(path).read_bytes())
        raw[position] ^= 64
        Path(path).write_bytes(raw)

    return prepare


def piped(path: str) -> Callable[[ExitStack], None]:
    """A pipe to which nobody writes lies in the file's place."""
    return lambda _: (Path(path).unlink(), os.mkfifo(path))


def looped(path: str) -> Callable[[ExitStack], None]:
    return lambda _: (Path(path).unlink(), Path(path).symlink_to(Path(path).name))


def gone(*names: str) -> Callable[[ExitStack], None]:
    return lambda _: [Path("run", name).unlink() for name in names]


def exchanged(_: ExitStack) -> None:
    """Two tensors of one shape change places in the model, below the metadata that were written for it."""
    path = Path("run/model.safetensors")
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    one, other = "down1.model.0.conv1.0.bias", "down1.model.0.conv2.0.bias"
    header[one], header[other] = header[other], header[one]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


def of_another_run(name: str) -> Callable[[ExitStack], None]:
    return lambda _: write_tensors(Path(f"run/{name}.safetensors"), load_file(f"run/{name}.safetensors"), run_id="x")


def held(stack: ExitStack) -> None:
    """Another process writes to run/."""
    handle = os.open("run", os.O_RDONLY)
    stack.callback(os.close, handle)
    fcntl.flock(handle, fcntl.LOCK_EX)


def spoiling(name: str) -> Callable[[ExitStack], None]:
    """In training a tensor becomes infinite and the loss does not."""
    step = Trainer.step

    def stepping(trainer: Trainer) -> None:
        step(trainer)
        trainer.state()[name].fill_(float("inf"))

    return lambda stack: patched(stack, Trainer, "step", stepping)


def diverging(stack: ExitStack) -> None:
    def stepping(trainer: Trainer) -> None:
        trainer.losses[trainer.index] = float("nan")
        trainer.index += 1

    patched(stack, Trainer, "step", stepping)


SMALL = "--n-feat 8 --epochs 1 --timesteps 20 --batch-size 4 --device cpu"
NEW = f"train --out new --data images.npy {SMALL} --schedule cosine "
LINEAR = f"train --out new --data images.npy {SMALL} "
RESUME = "train --out run --resume --device cpu"
SAMPLE = "sample run --n 1 --npy x.npy"
CONFIG, MODEL, STATE = "run/config.json: ", "run/model.safetensors: ", "run/training.safetensors: "
BIAS = "init_conv.conv1.0.bias"

ROWS = [
    # the folder and its lock
    Row(NEW.replace("new", "run"), ("run: already holds a run (config.json)", "--overwrite")),
    Row(NEW.replace("new", "exported"), ("exported: already holds a run (sampler.onnx)",)),
    Row(NEW.replace("new", "images.npy"), ("images.npy: is a file, needs a folder",)),
    Row(NEW.replace("new", "a/\udcff"), ("'a/\\udcff': is no name in UTF-8",)),
    Row(NEW.replace("new", "n" * 256), ("File name too long",)),
    Row(NEW.replace("new", "/proc/new"), ("/proc/new: cannot be written", "needs a writable folder")),
    *(
        Row(command, ("run: another process is writing to it",), held)
        for command in (RESUME, NEW.replace("new", "run") + "--overwrite", "import w.pth --out run --overwrite")
    ),
    Row(NEW, ("new: cannot be locked (No locks available)",), failing(fcntl, "flock", errno.ENOLCK)),
    Row(NEW, ("new/config.json: cannot be written (No space left",), failing(Path, "write_bytes", errno.ENOSPC)),
    Row("import w.pth --out new", ("new: cannot be written (No space",), failing(Path, "write_bytes", errno.ENOSPC)),
    Row(RESUME, (STATE + "is missing beside a model, needs --overwrite",), gone("training.safetensors")),
    Row(NEW + "--resume --overwrite", ("--resume, --overwrite: got both, needs at most one",)),
    Row(NEW.replace("new", "run") + "--overwrite --init run", ("--init: got run, which is --out",)),
    Row(NEW + "--init run --prediction v", ("--init: run has prediction eps, this run v, needs the same",)),
    Row(NEW + "--save-every 0", ("--save-every: got 0.0, needs seconds > 0",)),
    # outputs, before the work
    *(Row(f"sample run --n 1 {option} x/y{suffix}", (option, f"x/y{suffix}", "existing folder"))
      for option, suffix in (("--out", ".png"), ("--npy", ".npy"), ("--gif", ".gif"))),
    Row(f"sample run --npy {'n' * 252}.npy", ("File name too long", "nnn.npy")),
    Row("sample run --npy \udcff.npy", ("'\\udcff.npy': is no name in UTF-8",)),
    Row("sample run --npy /proc/x.npy", ("/proc/x.npy: cannot be written",)),
    Row("sample run --out run/loss.png", ("--out: got run/loss.png, which is a run's own file",)),
    Row("evaluate run --json run/config.json", ("--json: got run/config.json, which is a run's own file",)),
    # numbers that no machine has room for, options that would be ignored
    *(Row(f"{command} --n {10**12}", (f"--n: got {10**12}, which are", "GB"))
      for command in ("sample run --npy x.npy --context all", "evaluate run")),
    *(Row(f"{SAMPLE} --first-sample {k} --context all", (f"--first-sample: got {k}, needs 0..2^56 - n",))
      for k in (-1, 2**56, 10**30)),
    Row(NEW + "--multipliers 1,x", ("--multipliers: got '1,x', needs 1..16 integers >= 1, comma-separated",)),
    Row(NEW + "--multipliers 1,2 --init run", ("--multipliers: got 1,2, but --init takes over a network, needs none",)),
    Row(NEW + f"--image-size {10**5}", (f"--image-size: got {10**5}, needs a side of 1..9459",)),
    Row(SAMPLE + " --columns 2", ("--columns: got 2 without a picture", "needs --out or --gif")),
    Row(NEW.replace("images.npy", "swiss-roll") + "--flip", ("--flip: mirrors images, swiss-roll has points",)),
    Row(LINEAR + "--schedule constant --beta-start 0.1 --beta-end 0.2", ("beta_start, beta_end: got 0.1 and 0.2",)),
    # config.json
    Row("sample gone --npy x.npy", ("gone: no such run folder",)),
    Row(SAMPLE, (CONFIG + "no such file",), gone("config.json")),
    Row(SAMPLE, (CONFIG + "is no regular file",), piped("run/config.json")),
    Row(SAMPLE, (CONFIG + "cannot be read (Too many levels",), looped("run/config.json")),
    Row(SAMPLE, (CONFIG + "not readable JSON",), content("run/config.json", b"[" * 100_000)),
    Row(SAMPLE, (CONFIG + "not readable JSON",), content("run/config.json", b"\xff")),
    Row(SAMPLE, (CONFIG + "found a JSON list, needs an object",), content("run/config.json", b"[]")),
    Row(SAMPLE, (CONFIG + "format_version 3, needs 1 or 2",), entry(3, "format_version")),
    Row(SAMPLE, (CONFIG + "'classes' is 'abc', needs a list",), entry("abc", "classes")),
    Row(SAMPLE, (CONFIG + "'classes' is [1], needs names",), entry([1], "classes")),
    Row(SAMPLE, (CONFIG + "1 classes, its network needs 3",), entry(["a"], "classes")),
    Row(SAMPLE, (CONFIG + "its solver is 5, needs a name",), entry(5, "sampling", "solver")),
    Row(SAMPLE, (CONFIG + "'run_id' is 5, needs a text",), entry(5, "run_id")),
    Row(SAMPLE, (CONFIG + "'data' has no digest",), entry({}, "data")),
    Row(SAMPLE, (CONFIG + "clip: got '1', needs a finite bound > 0",), entry("1", "sampling", "clip")),
    Row(SAMPLE, (CONFIG + "steps: got '1', needs an integer in 1..20",), entry("1", "sampling", "steps")),
    Row(SAMPLE + " --clip 1e39", ("clip: got 1e+39, needs a finite bound > 0 in float32, or None",)),
    Row(SAMPLE, (CONFIG + "n_feat: got 9", "multiple of 8"), entry(9, "model", "n_feat")),
    Row(SAMPLE, (CONFIG + "network context_unet: ",), entry(2**70, "model", "in_channels")),
    Row(SAMPLE, (MODEL + "'init_conv.conv1.0.weight' is [8, 1", "needs [2048, 1"), entry(2048, "model", "n_feat")),
    Row(SAMPLE, (CONFIG + "height: got ", "needs at most 65536"), entry(2**1100, "model", "height")),
    Row(SAMPLE, (CONFIG, "overflow"), entry(2**31, "model", "n_feat")),
    Row(SAMPLE, (MODEL,), config(lambda c: c["model"].update(height=4096, multipliers=None))),
    *(Row(SAMPLE, (CONFIG + f"timesteps: got {t}, needs at most 1000000",), entry(t, "schedule", "timesteps"))
      for t in (10**7, 10**9, 2**63)),
    Row(SAMPLE, (CONFIG + "timesteps: got 0",), entry(0, "schedule", "timesteps")),
    Row(SAMPLE, (CONFIG + "schedule: got 'round', needs one of",), entry("round", "schedule", "kind")),
    Row(SAMPLE, (CONFIG + "beta_start, beta_end: the cosine",), entry(0.1, "schedule", "beta_end")),
    Row(SAMPLE, (CONFIG + "alpha_bars: got them for schedule 'cosine'",), entry([1, 0.5], "schedule", "alpha_bars")),
    *(
        Row(SAMPLE, (CONFIG + words,), entry({"timesteps": 20} | schedule, "schedule"))
        for words, schedule in (
            ("schedule: a given one has no betas", {"kind": "given", "alpha_bars": [1, 0.5]}),
            ("alpha_bars: got [1.0, 2.0]", {"kind": "given", "alpha_bars": [1, 2], "timesteps": 1}),
            ("beta_start: got '0.1', needs 0 <", {"kind": "linear", "beta_start": "0.1"}),
            ("beta_end: got True, needs 0 <", {"kind": "linear", "beta_end": True}),
        )
    ),
    # tensors
    Row(SAMPLE, (MODEL + "no such file: training has not saved yet", "--resume"), gone("model.safetensors")),
    Row("sample imported --npy x.npy", ("imported/model.safetensors: ",), gone("../imported/model.safetensors")),
    Row(SAMPLE, (MODEL + "is no regular file",), piped("run/model.safetensors")),
    Row(SAMPLE, (MODEL + "cannot be read",), looped("run/model.safetensors")),
    Row(SAMPLE, (MODEL + "not a whole safetensors file",), content("run/model.safetensors", b"x" * 99)),
    Row(SAMPLE, (MODEL + "damaged",), flipped(MODEL[:-2], -2)),
    Row(RESUME, (STATE + "damaged",), flipped(STATE[:-2], -2)),
    Row(SAMPLE, (MODEL + "damaged",), exchanged),
    Row(SAMPLE, (MODEL + "is of another run than config.json",), of_another_run("model")),
    Row(RESUME, (STATE + "training state does not fit config.json",), of_another_run("training")),
    Row(SAMPLE, (MODEL + f"'{BIAS}' has NaN",), tensors(lambda s: s[BIAS].fill_(np.nan), "model")),
    # the training state
    *(Row(RESUME, (STATE, *words), spoil) for words, spoil in (
        ((f"lacks 'adam.{BIAS}.exp_avg'",), without("adam", BIAS, "exp_avg")),
        (("lacks 'adam.",), without("adam")),
        (("lacks 'step'",), tensors(lambda state: state.pop("step"))),
        (("has 'more'",), tensor("more", torch.zeros(1))),
        ((f"'ema.{BIAS}' is float32 [1, 1, 1, 1], needs float32 [8]",), tensor(f"ema.{BIAS}", torch.zeros(1, 1, 1, 1))),
        ((f"'adam.{BIAS}.exp_avg' is float32 [], needs",), tensor(f"adam.{BIAS}.exp_avg", torch.tensor(1.0))),
        ((f"'network.{BIAS}' is float64 [8], needs float32",), tensor(f"network.{BIAS}", torch.Tensor.double)),
        (("'step' is 1e+09, needs 0..2",), tensor("step", torch.tensor(10**9))),
        (("'step' is -1, needs 0..2",), tensor("step", torch.tensor(-1))),
        (("'losses' has NaN",), tensor("losses", torch.full((2,), np.nan))),
        ((f"'adam.{BIAS}.step' is 1e+06, needs 0..1",), tensor(f"adam.{BIAS}.step", torch.tensor(1e6))),
        ((f"'ema.{BIAS}' has NaN",), tensor(f"ema.{BIAS}", lambda t: t * np.nan)),
        ((f"'network.{BIAS}' has NaN",), tensor(f"network.{BIAS}", lambda t: t * np.nan)),
    )),
    # training options
    Row(RESUME + " --lr 0.5", ("--lr: got 0.5, but run was started with 0.001",)),
    Row(RESUME, ("run: was trained on other data than images.npy",), flipped("images.npy", -1)),
    Row(RESUME, (CONFIG + "training options do not fit this version: colour",), entry("red", "training", "colour")),
    Row(RESUME, (CONFIG + "'model' and 'schedule'",), entry(16, "model", "n_feat")),
    Row(RESUME, (CONFIG + "'model' and 'schedule'",), entry(30, "schedule", "timesteps")),
    Row(RESUME, (CONFIG + "'model' and 'schedule'",), entry(4096, "training", "n_feat")),
    Row(RESUME, (CONFIG + "its training options are no run's: timesteps: got",), entry(10**9, "training", "timesteps")),
    Row(RESUME, (CONFIG + "its training options are no run's: image_size",), entry(10**5, "training", "image_size")),
    Row(RESUME, ("run: was begun by a program with ddpm.Trainer",), entry({}, "trainer")),
    Row("train --out imported --resume", ("imported/config.json: no training options: an imported run",)),
    Row("evaluate imported", ("imported/config.json: an imported run knows no training data",)),
    Row("evaluate run", ("run: was trained on other data than images",), flipped("images.npy", -1)),
    *(Row(RESUME, (CONFIG, f"--{name.replace('_', '-')}: got {value!r}, needs "), entry(value, "training", name))
      for name, value in (
        ("flip", "no"), ("lr", True), ("lr", "1"), ("epochs", 1.5), ("epochs", True), ("seed", None), ("data", 5),
        ("labels", 5), ("image_size", "16x"), ("classes", ["a"]), ("network", 5), ("n_feat", "8"), ("schedule", None),
        ("timesteps", 20.0), ("beta_start", "0"), ("beta_end", []), ("prediction", 1), ("loss", {}), ("min_snr", "1"),
        ("batch_size", "4"), ("ema_decay", None), ("context_dropout", False), ("clip_grad", "1"), ("precision", 1),
        ("engine", 1), ("flip", 1),
      )),
    Row(NEW + "--loss l3", ("--loss: got 'l3', needs one of mse, l1, huber",)),
    Row(NEW + "--lr 1e39", ("--lr: got 1e+39, needs a finite rate > 0 that float32 holds",)),
    Row(NEW + "--lr nan", ("--lr: got nan, needs a finite rate",)),
    Row(NEW + "--clip-grad 1e39", ("--clip-grad: got 1e+39, needs >= 0 and <= 3.4",)),
    Row(NEW + "--ema-decay 2", ("--ema-decay: got 2.0, needs 0..1",)),
    Row(NEW + f"--batch-size {10**12}", (f"--batch-size: got {10**12}, needs >= 1 and <= 1048576",)),
    Row(NEW + "--batch-size 1", ("--batch-size: got 1 on 1 ranks, needs at least 2",)),
    Row(NEW + f"--epochs {10**12}", (f"--epochs: got {10**12}, which are", "steps, needs at most 100000000")),
    Row(NEW + f"--timesteps {10**12}", (f"timesteps: got {10**12}, needs at most 1000000",)),
    Row(NEW + f"--n-feat {8 * 10**12}", (f"--n-feat: got {8 * 10**12}, needs a network that can be made",)),
    Row(NEW + "--n-feat 7", ("--n-feat: got 7, needs a multiple of 8",)),
    Row(NEW.replace("images.npy", "''"), ("--data: got",)),
    Row(NEW + "--engine graph", ("--engine: 'graph' needs",)),
    Row(LINEAR + "--beta-start .9999999 --beta-end .9999999", ("schedule: alpha_bars[20]", "beyond float32")),
    Row(LINEAR + "--beta-start 1e-300", ("beta_start: got 1e-300, needs more than 1e-16",)),
    # work that fails
    Row(RESUME, ("loss is not finite since step 2: try a lower --lr",), diverging, 1),
    *(Row(RESUME, (f"{name} is not finite at step 2: try a lower --lr",), spoiling(name), 1)
      for name in ("network.init_conv.conv1.1.running_var", f"ema.{BIAS}", f"adam.{BIAS}.exp_avg_sq")),
    # conditions
    *(Row(f"{SAMPLE} --context {text}", ("--context: got ", *words)) for text, words in (
        ("x", ("'x'", "needs a class (a, b, c) or 3 numbers")),
        ("3", ("'3'", "needs a class (a, b, c), 0..2")),
        ("1,0", ("2 numbers", "needs 3")),
    )),
    Row("sample plain --npy x.npy --context 1", ("--context: got '1', but plain was trained without classes",)),
]  # fmt: skip


@dataclass(frozen=True)
class Met:
    """What a row left: the exit code, its errors, the lines of ours that raised, and what had changed."""

    code: int
    errors: list[str]
    raised: set[tuple[str, int]]
    changed: list[str]


def files_of(folder: Path) -> dict[str, object]:
    return {
        str(path): path.read_bytes() if path.is_file() and not path.is_fifo() else None for path in folder.rglob("*")
    }


def make_workshop(folder: Path) -> None:
    """`run`, stopped after its first of two steps, `imported` and `plain`, without classes; the data of all."""
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 1), dtype=np.uint8)
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", np.arange(8) % 3)
    (folder / "exported").mkdir()
    (folder / "exported" / "sampler.onnx").write_bytes(b"mine")
    torch.manual_seed(0)
    for name, classes in (("w", 3), ("plain", 0)):
        torch.save(ContextUnet(1, 8, classes, 16).state_dict(), folder / f"{name}.pth")
    step = Trainer.step

    def once(trainer: Trainer) -> None:
        step(trainer)
        if trainer.index == 2:
            raise KeyboardInterrupt

    with chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", once)
        options = {"n_feat": 8, "epochs": 1, "timesteps": 20, "schedule": "cosine", "batch_size": 4}
        options = TrainOptions("images.npy", "labels.npy", classes="a,b,c", **options)
        with pytest.raises(KeyboardInterrupt):
            train(options, Path("run"), device=torch.device("cpu"), world=World(), save_every=1e-9)
        for name, out in (("w", "imported"), ("plain", "plain")):
            assert main(["import", f"{name}.pth", "--out", out]) == 0


def walk(row: Row, folder: Path) -> Met:
    caught: list[BaseException] = []
    with ExitStack() as stack:
        stack.enter_context(chdir(folder))
        row.prepare(stack)
        patched(stack, command_line, "show_trace", caught.append)
        before, err = files_of(Path()), io.StringIO()
        with redirect_stderr(err), redirect_stdout(io.StringIO()):
            code = main(shlex.split(row.command))
        after = files_of(Path())
    raised = set()
    while caught:
        error = caught.pop()
        raised |= {(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)}
        caught += [cause for cause in (error.__cause__, error.__context__) if cause is not None]
    lines = [line for line in err.getvalue().splitlines() if not line.startswith(("note: ", "train ", "sample "))]
    return Met(code, lines, raised, [name for name in before | after if before.get(name, 0) != after.get(name, 0)])


@pytest.fixture(scope="module")
def met(tmp_path_factory) -> list[Met]:
    """What every row left."""
    base = tmp_path_factory.mktemp("errors")
    (base / "workshop").mkdir()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    make_workshop(base / "workshop")
    try:
        return [walk(row, Path(shutil.copytree(base / "workshop", base / str(k)))) for k, row in enumerate(ROWS)]
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("k", range(len(ROWS)), ids=[f"{row.command[:60]}-{row.words[0][:60]}" for row in ROWS])
def test_a_failure_is_its_code_and_one_line(met, k):
    row, left = ROWS[k], met[k]
    assert left.code == row.code, left
    assert len(left.errors) == 1, left.errors
    assert left.errors[0].startswith("error: ")
    for word in row.words:
        assert word in left.errors[0]
    assert left.changed == []


def raising_lines(path: Path) -> dict[int, str]:
    """The lines of a module on which it raises errors of ours, with what they say."""
    calls = (node.exc for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Raise))
    calls = (call for call in calls if isinstance(call, ast.Call) and ast.unparse(call.func) in RAISED)
    return {call.lineno: ast.unparse(call) for call in calls}


@pytest.mark.parametrize("name", AUDITED)
def test_every_line_that_raises_is_met(met, name):
    path = ROOT / "ddpm" / name
    lines = {line for left in met for file, line in left.raised if Path(file) == path}
    sites = {line: text for line, text in raising_lines(path).items() if not any(word in text for word in UNMET)}
    assert {line: text for line, text in sites.items() if line not in lines} == {}
