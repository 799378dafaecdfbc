"""What a part leaves behind: OUT/PART.json, whole after every case, so that nothing that was measured is lost.

The keys are those of `bench.store`, and: complete, failures [one line each], seconds (the part's share of the budget).
"""

import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from bench import store
from bench.machine import describe
from ddpm.files import read_json, write_json

Content = dict[str, Any]
PASSED, SKIPPED, FAILED = "passed", "skipped", "failed"
ARGUMENTS = ("--out", "--parts", "--budget", "--filter")


class Record:
    """A part's file while it is being written. path: of the file; content: what is in it."""

    def __init__(self, path: Path, content: Content) -> None:
        self.path, self.content = path, content

    @classmethod
    def start(
        cls,
        out: Path,
        part: str,
        seconds: float,
        device: torch.device,
        pattern: str = "",
        *,
        seed: int | None = None,
        **facts: Any,
    ) -> "Record":
        """A new file that says it is not complete. seed: of what is measured, if it has one. facts: more keys."""
        made = store.content_of(
            [],
            describe(device),
            {},
            seed=seed,
            suite=part,
            quick=False,
            filter=pattern,
            processes=1,
            product_flops_per_s=None,
        )
        given = (str(out), part, f"{seconds:.0f}", pattern)
        options = [word for pair in zip(ARGUMENTS, given, strict=True) if pair[1] for word in pair]
        made["command"] = shlex.join(("ddpm-bench", "gpu", *options))
        record = cls(out / f"{part}.json", made | {"complete": False, "failures": [], "seconds": seconds} | facts)
        record.write()
        return record

    @classmethod
    def resume(cls, out: Path, part: str) -> "Record":
        """The file of a part, to be added to."""
        path = out / f"{part}.json"
        return cls(path, read_json(path))

    def write(self) -> None:
        """Replace the file."""
        records = self.content["records"]
        self.content["parity"] = all(record.get("parity", True) for record in records)
        self.content["failed"] = sum("failed" in record for record in records)
        write_json(self.path, self.content)

    def add(self, *records: dict[str, Any]) -> None:
        """Keep these records."""
        self.content["records"] += records
        self.write()

    def skip(self, what: str, reason: str) -> None:
        """Keep, and say, that something was left out."""
        print(f"note: {self.path.stem}: {what} skipped, {reason}", file=sys.stderr)
        self.content["skipped"][what] = reason
        self.write()

    def fail(self, line: str) -> None:
        """Keep why the part failed."""
        self.content["failures"].append(line)
        self.write()

    def finish(self) -> None:
        """The part reached its end."""
        self.content["complete"] = True
        self.write()


def verdict(content: Content) -> tuple[str, str]:
    """(PASSED, SKIPPED or FAILED, why). Fails closed: what did not reach its end has failed."""
    lost = sum(not record.get("parity", True) for record in content["records"])
    reasons = list(content["failures"])
    reasons += [f"{content['failed']} records failed"] if content["failed"] else []
    reasons += [f"{lost} records lost parity"] if lost else []
    if not content["complete"]:
        reasons = reasons or ["did not reach its end"]
    if reasons:
        return FAILED, "; ".join(reasons)
    skipped = "; ".join(f"{what}: {reason}" for what, reason in content["skipped"].items())
    return (PASSED if content["records"] else SKIPPED), skipped
