"""Our two errors, what the user can put right and work that failed, and the checks that everything shares."""

from collections.abc import Iterable

from kernels.philox import is_integer


class BadInput(ValueError):
    """A file or argument that cannot be used: says which, what was found and what is needed, in one line."""


class WorkFailed(RuntimeError):
    """Work that was asked for rightly and did not succeed: says what happened and what to try, in one line."""


def check_choice(name: str, value: object, known: Iterable[str]) -> None:
    """Raise ValueError unless the value is one of the known names."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}: got {value!r}, needs one of {', '.join(known)}")


def check_integer(name: str, value: object, low: int = 1) -> None:
    """Raise ValueError unless the value is an integer proper, and not below `low`."""
    if not is_integer(value) or value < low:
        raise ValueError(f"{name}: got {value!r}, needs an integer >= {low}")
