"""`[tool.ddpm-bench]` of a repository's pyproject.toml: what the command line need not say there.

    [tool.ddpm-bench]
    suites = ["benchmarks/speed.py"]     # beside pyproject.toml
    threshold = 0.05
    thresholds = { "softmax/.*" = 0.1 }  # rows by name
    processes = 8
    build = "pip install --no-deps --target . ."
    timeout = 600                        # seconds a process
    too_noisy = "fail"                   # or "pass"

Every key may be absent. Options of the command line win.
"""

import math
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ddpm.errors import BadInput

TABLE = "[tool.ddpm-bench]"
TooNoisy = Literal["pass", "fail"]


@dataclass(frozen=True)
class Config:
    """The table's values, suites by their whole path; None or empty where it says nothing. file: where it stands."""

    suites: tuple[str, ...] = ()
    threshold: float | None = None
    thresholds: Mapping[str, float] = field(default_factory=dict)
    processes: int | None = None
    build: str | None = None
    timeout: float | None = None
    too_noisy: TooNoisy | None = None
    file: Path | None = None

    @property
    def rules(self) -> list[str]:
        """`thresholds` as `--threshold-for` has them."""
        return [f"{pattern}={value!r}" for pattern, value in self.thresholds.items()]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _are_limits(value: object) -> bool:
    return isinstance(value, dict) and all(_is_pattern(key) and _is_number(limit) for key, limit in value.items())


def _are_names(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) and name for name in value)


KEYS: dict[str, tuple[Callable[[object], bool], str]] = {
    "suites": (_are_names, 'a list of files, like ["speed.py"]'),
    "threshold": (_is_number, "a number > 0, like 0.05 for five percent"),
    "thresholds": (_are_limits, 'regular expressions with numbers > 0, like { "softmax/.*" = 0.1 }'),
    "processes": (_is_count, "an integer >= 1"),
    "build": (lambda value: isinstance(value, str), 'a shell command, or "" for none'),
    "timeout": (_is_number, "seconds > 0"),
    "too_noisy": (lambda value: value in ("pass", "fail"), '"pass" or "fail"'),
}


def _table_of(file: Path) -> dict[str, Any] | None:
    """The table in a file; None if there is no such file or table."""
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise BadInput(f"{file}: not readable TOML ({error})") from error
    tools = found.get("tool", {})
    table = tools.get("ddpm-bench") if isinstance(tools, dict) else None
    if table is not None and not isinstance(table, dict):
        raise BadInput(f"{file}: tool.ddpm-bench: got {table!r}, needs a table")
    return table


def _checked(file: Path, table: Mapping[str, Any]) -> Config:
    for key, value in table.items():
        if key not in KEYS:
            raise BadInput(f"{file}: {TABLE}: got {key}, knows {', '.join(KEYS)}")
        fits, need = KEYS[key]
        if not fits(value):
            raise BadInput(f"{file}: {TABLE} {key}: got {value!r}, needs {need}")
    # A suite of ours is a name, not a file.
    suites = (str(file.parent / name) if name.endswith(".py") else name for name in table.get("suites", ()))
    return Config(**{**table, "suites": tuple(suites)}, file=file)


def read(top: Path, folder: Path | None = None) -> Config:
    """The table of the nearest pyproject.toml that has one, from the working directory up to the repository's top.

    Raises BadInput, naming the file and the key, if it is not what it should be.
    """
    folder = (folder or Path.cwd()).resolve()
    top = top.resolve()
    inside = [place for place in (folder, *folder.parents) if place.is_relative_to(top)]
    for place in inside or [top]:
        file = place / "pyproject.toml"
        table = _table_of(file)
        if table is not None:
            return _checked(file, table)
    return Config()
