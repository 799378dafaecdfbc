"""The commands that write files, as a user has them: what lies there before, what is typed, what must lie there after.

Networks are tiny (8 features, 20 timesteps, 24 pictures of 16x16), so that a command takes a second or less.
"""

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

from ddpm import ContextUnet, NoiseSchedule, sample
from ddpm.commands import COMMANDS
from tests.faults.calls import CHANGING, on_file_calls
from tests.faults.processes import Ended, Lost, call, content, differences, digest

TRAIN = (
    *("ddpm", "train", "--out", "run", "--data", "data/images.npy", "--labels", "data/labels.npy", "--n-feat", "8"),
    *("--epochs", "1", "--batch-size", "12", "--timesteps", "20", "--schedule", "cosine", "--save-every", "1e-9"),
)
RESUME = ("ddpm", "train", "--out", "run", "--resume", "--save-every", "1e-9")
IMPORT = ("ddpm", "import", "weights.pth", "--out", "run", "--timesteps", "50", "--beta-end", "0.2")
SAMPLE = ("ddpm", "sample", "run", "--n", "2", "--steps", "5", "--seed", "1")
PICTURES = ("--npy", "x.npy", "--out", "x.png", "--gif", "x.gif")
ONNX = ("ddpm-export", "onnx", "run", "--out", "onnx", "--steps", "5")
DRAW = ("ddpm-export", "run", "onnx/sampler.onnx", "--n", "2", "--npy", "y.npy", "--out", "y.png")


@dataclass(frozen=True)
class Work:
    """A command. start: {name in its folder: what it is a copy of in the shop}. again: what is typed after a stop."""

    name: str
    words: tuple[str, ...]
    start: dict[str, str]
    again: tuple[str, ...] = ()
    run: bool = False  # whether it writes a run folder

    @property
    def repeated(self) -> tuple[str, ...]:
        return self.again or self.words


@dataclass
class Undisturbed:
    """A work that nothing happened to.

    before, after: what lies in its folder. between: digests that a file had under its name meanwhile (checkpoints).
    calls: (kind, name) of the calls that changed files. versions: (name, copy) of all that was renamed there, and their
    sizes.
    """

    before: dict[str, str]
    after: dict[str, str] = field(default_factory=dict)
    between: dict[str, set[str]] = field(default_factory=dict)
    calls: list[tuple[str, str]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    versions: list[tuple[str, Path]] = field(default_factory=list)
    seconds: float = 0.0

    def known(self, name: str) -> set[str]:
        """The digests that the file may have at any moment."""
        ends = {side[name] for side in (self.before, self.after) if name in side}
        return ends | self.between.get(name, set())


DATA, RUN = {"data": "data"}, {"run": "trained"}


def stop_after_a_checkpoint() -> None:
    """For `call(prepare=)`: training gets a Ctrl-C when it has saved for the first time."""

    def reach(_: str, __: str, arguments: tuple[object, ...]) -> None:
        if Path(os.fsdecode(arguments[1])).name == "loss.csv":
            os.kill(os.getpid(), signal.SIGINT)

    on_file_calls(reach, ("os.rename",))


def make_images(_: "Shop", target: Path) -> None:
    """24 random pictures of three classes."""
    target.mkdir()
    np.save(target / "images.npy", np.random.default_rng(0).integers(0, 256, (24, 16, 16, 1), dtype=np.uint8))
    np.save(target / "labels.npy", np.arange(24) % 3)


def make_weights(_: "Shop", target: Path) -> None:
    torch.manual_seed(0)
    torch.save(ContextUnet(1, 8, 3, 16).state_dict(), target)


# name: (the command that makes it, what lies there before, which part of its folder it is, how it is called), or a
# function that makes it.
Made = tuple[tuple[str, ...], dict[str, str], str, dict[str, object]]
STOPPED: dict[str, object] = {"prepare": stop_after_a_checkpoint}
DREW = ("ddpm-export", "run", "onnx/sampler.onnx", "--n", "1", *DRAW[5:])
TORCH = ("ddpm-export", "torch", "run", "--out", "d.pt2")
STOCK: dict[str, Made | Callable[["Shop", Path], object]] = {
    "data": make_images,
    "weights.pth": make_weights,
    "trained": (TRAIN, DATA, "run", {}),
    "midway": (TRAIN, DATA, "run", STOPPED),
    "another": ((*TRAIN, "--seed", "5", "--lr", "2e-3"), DATA, "run", {}),
    "imported": (IMPORT, {"weights.pth": "weights.pth"}, "run", {}),
    "pictures": ((*SAMPLE[:-1], "0", *PICTURES), RUN, "", {}),
    "drawn": (DREW, {"onnx": "onnx"}, "", {}),
    "onnx": (ONNX, RUN, "onnx", {}),
    "onnx_before": (ONNX, {"run": "imported"}, "onnx", {}),
    "onnx_input": ((*ONNX, "--noise", "input"), RUN, "onnx", {}),
    "d.pt2": (TORCH, {"run": "imported"}, "d.pt2", {}),
}


WORKS = (
    Work("train", TRAIN, DATA, (*TRAIN, "--resume"), run=True),
    Work("train --resume", RESUME, DATA | {"run": "midway"}, run=True),
    Work("train --overwrite", (*TRAIN, "--overwrite"), DATA | {"run": "imported"}, run=True),
    Work("import", IMPORT, {"weights.pth": "weights.pth"}, (*IMPORT, "--overwrite"), run=True),
    Work("import --overwrite", (*IMPORT, "--overwrite"), RUN | {"weights.pth": "weights.pth"}, run=True),
    Work("sample", (*SAMPLE, *PICTURES), RUN | {name: f"pictures/{name}" for name in ("x.npy", "x.png", "x.gif")}),
    Work("evaluate", ("ddpm", "evaluate", "run", "--n", "8", "--steps", "5", "--json", "e.json"), DATA | RUN),
    Work("export onnx", ONNX, RUN | {"onnx": "onnx_before"}),
    Work("export torch", TORCH, RUN | {"d.pt2": "d.pt2"}),
    Work("export run", DRAW, {"onnx": "onnx"} | {name: f"drawn/{name}" for name in ("y.npy", "y.png")}),
)


def warm_up() -> None:
    """What every command would load and make anew: modules, fonts, the traced network. Starts no thread."""
    from ddpm import pictures
    from export import bundle

    for name in (*COMMANDS.values(), "export.cli:", "sklearn.svm:"):
        import_module(name.partition(":")[0])
    torch.set_num_threads(1)
    pictures._plotted(1, 1, lambda axes: axes.plot([1, 2]))
    sample(ContextUnet(1, 8, 3, 16), NoiseSchedule.make("cosine", 20), 1, steps=2)
    trace, kept = bundle.trace, {}

    def traced(model: torch.nn.Module) -> object:
        """Tracing takes four seconds: once for all forks that export the same weights."""
        key = b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())
        if key not in kept:
            kept[key] = trace(model)
        return kept[key]

    bundle.trace = traced


class Shop:
    """What works start from, made in `folder` when it is asked for, and what they leave undisturbed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder / "shop", 0
        self.folder.mkdir(parents=True)
        self.results: dict[str, Undisturbed] = {}
        self.peaks: dict[tuple[str, ...], int] = {}

    def make(self, name: str) -> Path:
        """What is called so, made by a command if it is not there yet."""
        if (self.folder / name).exists():
            return self.folder / name
        if callable(STOCK[name]):
            STOCK[name](self, self.folder / name)
            return self.folder / name
        words, start, part, how = STOCK[name]
        made = self.stocked(self.new("making"), start)
        if words[1] == "onnx":
            self._trace(made / "run")
        call(made, words, **how).need(130 if how else 0)
        target = self.folder / name
        (made / part if part else made).rename(target)
        return target

    def _trace(self, run: Path) -> None:
        """Here, so that forks have it."""
        from ddpm.runs import load_run
        from export import bundle

        bundle.trace(load_run(run).model)

    def new(self, name: str) -> Path:
        """A path that is not taken."""
        self.count += 1
        return self.folder / f"{name} {self.count}"

    def stocked(self, folder: Path, start: dict[str, str]) -> Path:
        """A new folder with copies of what is named."""
        folder.mkdir(parents=True)
        for name, source in start.items():
            path = self.make(source.partition("/")[0]) / Path(source).name if "/" in source else self.make(source)
            (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / name)
        return folder

    def peak(self, start: dict[str, str], words: tuple[str, ...]) -> int:
        """The peak of memory of an honest command, in MB."""
        if words not in self.peaks:
            self.peaks[words] = call(self.stocked(self.new("honest"), start), words).need().peak
        return self.peaks[words]

    def undisturbed(self, work: Work) -> Undisturbed:
        """What the work leaves and does, watched; the same twice, or nothing can be said of it."""
        if work.name in self.results:
            return self.results[work.name]
        folder = self.stocked(self.new(work.name), work.start)
        log, kept = self.new("calls"), self.new("versions")
        kept.mkdir()
        result = Undisturbed(content(folder))

        def watch() -> None:
            handle = log.open("w")

            def reach(kind: str, name: str, arguments: tuple[object, ...]) -> None:
                to = copied = ""
                if kind == "os.rename":
                    to = os.path.relpath(os.fsdecode(arguments[1]))
                    copied = f"{len(list(kept.iterdir()))}{Path(to).suffix}"
                    shutil.copy(os.fsdecode(arguments[0]), kept / copied)
                print(kind, name, to, copied, sep="\t", file=handle, flush=True)

            on_file_calls(reach, CHANGING)

        result.seconds = call(folder, work.words, watch).need().seconds
        result.after = content(folder)
        for line in log.read_text().splitlines():
            kind, name, to, copied = line.split("\t")
            result.calls.append((kind, name))
            if copied:
                result.versions.append((to, kept / copied))
                result.sizes.append((kept / copied).stat().st_size)
                result.between.setdefault(to, set()).add(digest(kept / copied, to))
        again = self.stocked(self.new(work.name), work.start)
        call(again, work.words).need()
        odd = differences(content(again), result.after)
        if odd:
            raise RuntimeError(f"{work.name}: two undisturbed runs differ: {odd}")
        self.results[work.name] = result
        return result


def is_partial(name: str) -> bool:
    """Whether a file is one that was being written: hidden, and no name of a result."""
    return Path(name).name.startswith(".")


def check_versions(folder: Path, normal: Undisturbed, partials: bool) -> None:
    """Every file is whole: as it was before, as it is after, or a checkpoint. partials: may lie there too."""
    for name, found in content(folder).items():
        if found in normal.known(name):
            continue
        if normal.known(name):
            raise Lost(f"{name} is neither what it was nor what it becomes")
        if not (partials and is_partial(name)):
            raise Lost(f"{name} is left over")


def check_reader(folder: Path, work: Work, normal: Undisturbed) -> None:
    """A run folder reads as one run, the old or the new, or is refused in one line."""
    run = folder / "run"
    if not work.run or not run.exists():
        return
    ended = call(folder, (*SAMPLE[:3], *("--n", "1", "--steps", "2", "--npy", "../reader.npy")))
    found = content(folder)
    sides = []
    for name in ("run/config.json", "run/model.safetensors"):
        old, new = normal.before.get(name), {normal.after[name]} | normal.between.get(name, set())
        sides.append({side for side, known in (("old", {old}), ("new", new)) if found.get(name) in known})
    if ended.code == 0:
        if not sides[0] & sides[1]:
            raise Lost(
                f"sample takes a mixture: config.json of the {sides[0]}, model.safetensors of the {sides[1]} run"
            )
        return
    ended.refusal("run")
    if sides[0] & sides[1] and all(name in found for name in ("run/config.json", "run/model.safetensors")):
        raise Lost(f"a whole run is refused: {ended.last()}")


def check_healed(folder: Path, work: Work, normal: Undisturbed) -> Ended:
    """What the user types next ends as if nothing had happened, and leaves nothing else behind."""
    ended = call(folder, work.repeated).need()
    odd = differences(content(folder), normal.after)
    if odd:
        raise Lost(f"after `{' '.join(work.repeated)}`: {odd}")
    return ended
