"""Stored measurements, made and checked here: JSON Lines in a file ending in .jsonl, else one JSON object.

Of JSON Lines the first is the header, then follow the records; of an object they are its "records", a line each too, so
that a new measurement is a readable diff. The header, or object:

    format_version, kind, date (UTC), machine (`bench.machine.describe`: commit, dirty, versions, device), command,
    seed (of the workloads, None if unknown), suite, quick, filter, processes, skipped {suite: reason},
    product_flops_per_s, parity, failed, records

A record is one competitor of one workload in one process; `bench.measure` says what is in it. In a .jsonl the header's
"records" is their number, so that a file that was cut off between two lines is known from a whole one.
"""

import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ddpm.errors import BadInput
from ddpm.files import check_readable, read_json, write_text

FORMAT_VERSION = 1
KIND = "fused-ddpm benchmark"
LINES = ".jsonl"
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


def is_stored(name: str) -> bool:
    """Whether a name is that of a stored file."""
    return name.endswith((".json", LINES))


def text_of(content: Mapping[str, Any], lines: bool) -> str:
    """A content with "records" as the text of a file, each record in a line of its own. lines: as JSON Lines."""
    head = {key: value for key, value in content.items() if key != "records"}
    records = [json.dumps(record) for record in content["records"]]
    if lines:
        return "".join(f"{line}\n" for line in (json.dumps(head | {"records": len(records)}), *records))
    body = json.dumps(head, indent=1).removesuffix("\n}")
    return f'{body},\n "records": [\n  ' + ",\n  ".join(records) + "\n ]\n}\n"


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a content as the file's ending says."""
    write_text(path, text_of(content, path.suffix == LINES))


def _object(text: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{place}: not readable JSON ({error}), needs a whole file") from error
    if not isinstance(value, dict):
        raise BadInput(f"{place}: found a JSON {type(value).__name__}, needs an object")
    return value


def _read_lines(path: Path) -> Content:
    """The content of a file of JSON Lines. Raises BadInput naming the line that is cut off or does not belong there."""
    check_readable(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read ({error})") from error
    lines = text.split("\n")
    places = [f"{path}: line {number}" for number in range(1, len(lines) + 1)]
    content, *records = [_object(line, place) for line, place in zip(lines[:-1] or lines, places, strict=False)]
    if lines[-1]:
        raise BadInput(f"{places[-1]}: has no end, needs a whole file")
    if isinstance(content.get("records"), list):
        raise BadInput(f"{places[0]}: holds the records itself, needs a header alone, or a name ending in .json")
    for place, record in zip(places[1:], records, strict=False):
        if "kind" in record or "machine" in record:
            raise BadInput(f"{place}: found another header, needs one file's records")
    if content.get("records", len(records)) != len(records):
        raise BadInput(
            f"{places[len(records)]}: the last of {len(records)} records, needs the {content['records']} of its header"
        )
    return content | {"records": records}


def load(path: Path) -> Content:
    """A stored file. Raises BadInput if it is missing, cut off, mixed, no JSON, not ours or of another format."""
    content = _read_lines(path) if path.suffix == LINES else read_json(path)
    if content.get("kind") != KIND or not isinstance(content.get("records"), list):
        raise BadInput(f"{path}: found another JSON object, needs a file that `ddpm-bench run --out` wrote")
    if content.get("format_version") != FORMAT_VERSION:
        raise BadInput(f"{path}: found format_version {content.get('format_version')}, needs {FORMAT_VERSION}")
    lacking = [key for key in NEEDED if key not in content]
    if lacking:
        raise BadInput(f"{path}: lacks {', '.join(lacking)}, needs a whole file")
    processes = content["processes"]
    if not isinstance(content["machine"], dict) or not isinstance(processes, int) or isinstance(processes, bool):
        raise BadInput(f"{path}: its machine is no object or its processes no integer, needs a whole file")
    for key in ("commit", "processor", "device"):
        if not isinstance(content["machine"].get(key, ""), str if key == "device" else str | None):
            raise BadInput(f"{path}: its machine has the {key} {content['machine'][key]!r}, needs a string")
    seen: dict[tuple, str] = {}
    for number, record in enumerate(content["records"], start=1):
        place = f"line {number + 1}" if path.suffix == LINES else f"record {number}"
        _check_record(record, f"{path}: {place}")
        key = row_of(record), record["process"]
        if key in seen:
            raise BadInput(
                f"{path}: {place}: {key[0]} of process {key[1]} is in {seen[key]} too, needs one file's records"
            )
        seen[key] = place
    return content


def _check_record(record: Any, place: str) -> None:
    if not isinstance(record, dict) or not {"workload", "candidate", "process"} <= record.keys():
        raise BadInput(f"{place}: lacks workload, candidate or process, needs a whole file")
    named = isinstance(record["workload"], str) and isinstance(record["candidate"], str)
    if not named or not isinstance(record["process"], int):
        raise BadInput(f"{place}: workload or candidate is no string or process no integer, needs a whole file")
    if not is_good(record):
        if "failed" not in record and not {"parity", "error", "tolerance"} <= record.keys():
            raise BadInput(f"{place}: {row_of(record)} has neither times nor why, needs a whole file")
        return
    times = [record[key] for key in ("gate", "wall_gate", "kernel_us", "wall_us") if key in record]
    if not isinstance(record.get("against"), str):
        raise BadInput(f"{place}: {row_of(record)} does not say what it was timed against, needs a whole file")
    if not {"gate", "kernel_us"} <= record.keys() or not all(map(_is_time, times)):
        raise BadInput(f"{place}: {row_of(record)} has no times above 0, needs a whole file")
    counted = record.get("counts", {})
    if not isinstance(counted, dict) or not all(map(_is_count, counted.values())):
        raise BadInput(f"{place}: {row_of(record)} has counts that are no numbers from 0, needs a whole file")
    if not isinstance(record.get("uncounted", {}), dict):
        raise BadInput(f"{place}: {row_of(record)} does not say why something was not counted, needs a whole file")


def _is_time(value: object) -> bool:
    return isinstance(value, float | int) and 0 < value < math.inf


def _is_count(value: object) -> bool:
    return isinstance(value, float | int) and 0 <= value < math.inf


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
