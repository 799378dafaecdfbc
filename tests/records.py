"""Records that scripts make, a JSON line each; a test says that one is too old when its code is another."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.report import read_lines
from ddpm.files import write_text


def code_digest(paths: Iterable[Path]) -> str:
    """Of the code of these files, without comments and docstrings."""
    texts = [re.sub(r'""".*?"""', "", path.read_text("utf-8"), flags=re.S) for path in paths]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    code = "\n".join(line for line in lines if line and not line.startswith("#"))
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def put(path: Path, line: dict[str, Any], place: Callable[[dict[str, Any]], tuple[int, ...] | None]) -> None:
    """A line into a record, in place of an older one of the same place; those that have none (None) any more go."""
    by_place = {place(other): other for other in (*(read_lines(path) if path.exists() else ()), line)}
    by_place.pop(None, None)
    write_text(path, "".join(f"{json.dumps(by_place[key])}\n" for key in sorted(by_place)))
