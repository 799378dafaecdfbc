"""What a part leaves behind: OUT/PART.json, whole after every case, so that nothing that was measured is lost.

The keys are those of `bench.store`, and: complete, failures [one line each].
"""

import sys
from pathlib import Path
from typing import Any

import torch

from bench.machine import describe
from bench.store import Content, content_of
from ddpm.files import read_json, write_json

PASSED, SKIPPED, FAILED = "passed", "skipped", "failed"


class Record:
    """A part's file while it is being written, by one process at a time. content: what is in it."""

    def __init__(self, out: Path, part: str) -> None:
        self.out, self.part, self.path = out, part, out / f"{part}.json"
        self.content: Content = {}

    def start(self, device: torch.device, pattern: str = "") -> "Record":
        """Begin a file that says it is not complete."""
        asked = {"suite": self.part, "quick": False, "filter": pattern, "processes": 1, "product_flops_per_s": None}
        self.content = content_of([], describe(device), {}, **asked)
        self.keep(complete=False, failures=[])
        return self

    def read(self) -> "Record":
        """Take over what another process wrote."""
        self.content = read_json(self.path)
        return self

    def keep(self, *records: dict[str, Any], **facts: Any) -> None:
        """Add records, set other keys, and replace the file."""
        self.content |= facts
        self.content["records"] += records
        self.content["parity"] = all(record.get("parity", True) for record in self.content["records"])
        self.content["failed"] = sum("failed" in record for record in self.content["records"])
        write_json(self.path, self.content)

    def skip(self, what: str, reason: str) -> None:
        """Keep, and say, that something was left out."""
        print(f"note: {self.part}: {what} skipped, {reason}", file=sys.stderr)
        self.keep(skipped=self.content["skipped"] | {what: reason})

    def fail(self, line: str) -> None:
        """Keep why the part failed."""
        self.keep(failures=[*self.content["failures"], line])


def verdict(content: Content) -> tuple[str, str]:
    """(PASSED, SKIPPED or FAILED, why). Fails closed: what did not reach its end has failed."""
    lost = sum(not record.get("parity", True) for record in content["records"])
    reasons = list(content["failures"])
    reasons += [f"{content['failed']} records failed"] if content["failed"] else []
    reasons += [f"{lost} records lost parity"] if lost else []
    if reasons or not content["complete"]:
        return FAILED, "; ".join(reasons) or "did not reach its end"
    skipped = "; ".join(f"{what}: {reason}" for what, reason in content["skipped"].items())
    return (PASSED if content["records"] else SKIPPED), skipped
