"""Stored measurements: one JSON object per file, made and checked here.

    format_version, kind, date (UTC), machine (`bench.machine.describe`: commit, dirty, versions, device), command,
    seed (of the workloads, None if unknown), suite, quick, filter, processes, skipped {suite: reason},
    product_flops_per_s, parity, failed, records

A record is one competitor of one workload in one process; `bench.measure` says what is in it.
"""

import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ddpm.errors import BadInput
from ddpm.files import read_json

FORMAT_VERSION = 1
KIND = "fused-ddpm benchmark"
NEEDED = ("date", "machine", "processes")
Content = dict[str, Any]


def command() -> str:
    """This process's command line, as a shell takes it."""
    return shlex.join(("ddpm-bench", *sys.argv[1:]))


def content_of(
    records: Sequence[Mapping[str, Any]],
    machine: Mapping[str, Any],
    skipped: Mapping[str, str],
    *,
    seed: int | None = None,
    **asked: Any,
) -> Content:
    """What a file holds. asked: suite, quick, filter, processes, product_flops_per_s.

    seed: what the workloads drew with; None if that is not known.
    """
    return {
        "format_version": FORMAT_VERSION,
        "kind": KIND,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": dict(machine),
        "command": command(),
        "seed": seed,
        **asked,
        "skipped": dict(skipped),
        "parity": all(record.get("parity", True) for record in records),
        "failed": sum("failed" in record for record in records),
        "records": list(records),
    }


def load(path: Path) -> Content:
    """A stored file. Raises BadInput if it is missing, no JSON, not ours or of another format."""
    content = read_json(path)
    if content.get("kind") != KIND or not isinstance(content.get("records"), list):
        raise BadInput(f"{path}: found another JSON object, needs a file that `ddpm-bench run --out` wrote")
    if content.get("format_version") != FORMAT_VERSION:
        raise BadInput(f"{path}: found format_version {content.get('format_version')}, needs {FORMAT_VERSION}")
    lacking = [key for key in NEEDED if key not in content]
    if lacking:
        raise BadInput(f"{path}: lacks {', '.join(lacking)}, needs a whole file")
    for record in content["records"]:
        if not isinstance(record, dict) or not {"workload", "candidate", "process"} <= record.keys():
            raise BadInput(f"{path}: a record lacks workload, candidate or process, needs a whole file")
        times = [record.get(key) for key in ("gate", "kernel_us")]
        if is_good(record) and not ("against" in record and all(map(_is_time, times))):
            raise BadInput(f"{path}: the record of {row_of(record)} has no times above 0, needs a whole file")
    return content


def _is_time(value: object) -> bool:
    return isinstance(value, float | int) and 0 < value < math.inf


def row_of(record: Mapping[str, Any]) -> str:
    """The name of a record's row: workload and candidate."""
    return f"{record['workload']} {record['candidate']}"


def is_good(record: Mapping[str, Any]) -> bool:
    """Whether a record has times: it ran, with parity."""
    return "failed" not in record and bool(record.get("parity"))


def rows(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Records by row, in order of appearance; the processes of a row together."""
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        grouped.setdefault(row_of(record), []).append(record)
    return grouped
