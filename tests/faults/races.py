"""Two commands at once on the same files: what comes out is what one after the other, or one alone, leaves.

One is halted before each of its calls on files in turn while the other runs from start to end; and both run freely.
"""

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.faults.calls import ALL, at_call, halts_itself, on_file_calls
from tests.faults.processes import Ended, Lost, call, content, differences, start
from tests.faults.tries import Try, Wanted, draws
from tests.faults.works import DATA, DRAW, IMPORT, RESUME, RUN, SAMPLE, TRAIN, WORKS, Shop

HALTED, FREE = "one halted while the other runs", "two at once"
CASES = HALTED, FREE
HALTS, ROUNDS = 14, 6  # of each pair

ONE = (*SAMPLE, "--npy", "z.npy", "--out", "z.png")
OTHER = (*SAMPLE[:-1], "2", "--npy", "z.npy", "--out", "z.png")
FORCED, WEIGHTS = (*TRAIN, "--overwrite", "--seed", "9"), {"weights.pth": "weights.pth"}
OVER = (*IMPORT, "--overwrite")
DRAWN = (*DRAW, "--seed", "3")
# Those that another command may refuse because the folder is in use, or that one may refuse after the other has ended.
PAIRS = (
    ("two trainers", DATA, TRAIN, (*TRAIN, "--seed", "9")),
    ("two resumes", DATA | {"run": "midway"}, RESUME, RESUME),
    ("train, import", DATA | WEIGHTS, TRAIN, OVER),
    ("import, train", DATA | WEIGHTS, IMPORT, TRAIN),
    ("resume, import", DATA | WEIGHTS | {"run": "midway"}, RESUME, OVER),
    ("sample, train --overwrite", DATA | RUN, ONE, FORCED),
    ("sample, import --overwrite", RUN | WEIGHTS, ONE, OVER),
    ("sample, resume", DATA | {"run": "midway"}, ONE, RESUME),
    ("resume, sample", DATA | {"run": "midway"}, RESUME, ONE),
    ("two samples", RUN, ONE, OTHER),
    ("two draws", {"onnx": "onnx"}, DRAW, DRAWN),
)


@dataclass(frozen=True)
class Pair:
    """Two commands on one folder, and what may come of them."""

    shop: Shop
    name: str
    start: dict[str, str]
    one: tuple[str, ...]
    other: tuple[str, ...]

    def _left(self, *commands: tuple[str, ...]) -> tuple[list[Ended], dict[str, str]]:
        folder = self.shop.stocked(self.shop.new("serial"), self.start)
        return [call(folder, words) for words in commands], content(folder)

    @cached_property
    def serial(self) -> list[tuple[list[bool], dict[str, str]]]:
        """([whether one succeeded, whether the other], what lies there) of every order, and of each alone."""
        found = []
        for order in ((0, 1), (1, 0), (0,), (1,)):
            ended, left = self._left(*((self.one, self.other)[k] for k in order))
            good = [False, False]
            for k, each in zip(order, ended, strict=True):
                good[k] = each.code == 0
            found.append((good, left))
        return found

    @cached_property
    def calls(self) -> int:
        """How many calls on files the one makes, alone."""
        folder = self.shop.stocked(self.shop.new("counted"), self.start)
        log = folder.parent / f"{folder.name} calls"

        def count() -> None:
            handle = log.open("w")

            def reach(*_: object) -> None:
                handle.write("\n")
                handle.flush()

            on_file_calls(reach, ALL)

        call(folder, self.one, count).need()
        return len(log.read_text())

    @cached_property
    def pictures(self) -> dict[str, set[str]]:
        """Files of which each may be another's, whatever the others are, by name: what each may hold.

        Of commands that sample while the run is trained, the pictures of every checkpoint; of two that write the same
        pictures, those of both.
        """
        if self.name.startswith("two ") and self.serial[0][0] == [True, True]:
            ends = [left for _, left in self.serial]
            return {name: {left[name] for left in ends} for name in ends[0] if len({left[name] for left in ends}) > 1}
        if "resume" not in self.name or "sample" not in self.name:
            return {}
        known: dict[str, set[str]] = {}
        for version in self._checkpoints():
            folder = self.shop.stocked(self.shop.new("checkpoint"), self.start)
            (folder / "run" / "model.safetensors").write_bytes(version.read_bytes())
            call(folder, ONE).need()
            for name in ("z.npy", "z.png"):
                known.setdefault(name, set()).add(content(folder)[name])
        return known

    def _checkpoints(self) -> list[Path]:
        """Every model.safetensors that the run has from its start on, while it is resumed to its end."""
        work = next(work for work in WORKS if work.words == RESUME)
        found = [path for name, path in self.shop.undisturbed(work).versions if name == "run/model.safetensors"]
        return [self.shop.make("midway") / "model.safetensors", *found]

    def check(self, folder: Path, one: Ended, other: Ended) -> None:
        """Exit codes and files are those of an order, or of one alone while the other is refused."""
        good = [ended.code == 0 for ended in (one, other)]
        for ended in (one, other):
            if ended.code:
                ended.refusal()
        found = content(folder)
        for name, known in self.pictures.items():
            if name in found and found[name] in known:
                found[name] = "one of those"
        reasons = []
        for succeeded, left in self.serial:
            left = {name: "one of those" if name in self.pictures else of for name, of in left.items()}
            odd = differences(found, left)
            if good == succeeded and not odd:
                return
            reasons.append(odd)
        ends = ", ".join(f"`{ended.what}` ended with {ended.code}" for ended in (one, other))
        raise Lost(f"{ends}; no order of the two leaves that: {min(reasons, key=len) or 'the same files, other codes'}")


def halted(_: Shop, pair: Pair, number: int, folder: Path) -> None:
    """The one is halted before its number-th call, the other runs, the one goes on."""
    pair.shop.stocked(folder, pair.start)
    one = start(folder, pair.one, at_call(number, halts_itself, ALL))
    stopped = one.halted()
    try:
        other = call(folder, pair.other)
    finally:
        if stopped:
            one.send(signal.SIGCONT)
    pair.check(folder, one.wait(), other)


def free(_: Shop, pair: Pair, seed: int, folder: Path) -> None:
    """Both at once, the second a random moment after the first."""
    pair.shop.stocked(folder, pair.start)
    one = start(folder, pair.one)
    time.sleep(draws(pair.name, seed).uniform(0, 0.3))
    other = call(folder, pair.other)
    pair.check(folder, one.wait(), other)


def tries(shop: Shop, wanted: Wanted) -> Iterator[Try]:
    for arguments in PAIRS:
        pair = Pair(shop, *arguments)
        if not any(wanted(case, pair.name) for case in CASES):
            continue
        # Before the forks, which share them.
        count, _, _ = pair.calls, pair.serial, pair.pictures
        for number in sorted({round(k * (count - 1) / (HALTS - 1)) for k in range(HALTS)}):
            yield Try(HALTED, pair.name, f"before call {number} of {count}", halted, (pair, number))
        for seed in range(ROUNDS):
            yield Try(FREE, pair.name, f"seed {seed}", free, (pair, seed))
