"""Our two errors, what the user can put right and work that failed, and the checks that everything shares."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

Item = TypeVar("Item")


class BadInput(ValueError):
    """A file or argument that cannot be used: says which, what was found and what is needed, in one line."""


class WorkFailed(RuntimeError):
    """Work that was asked for rightly and did not succeed: says what happened and what to try, in one line."""


def check_choice(name: str, value: object, known: Iterable[str]) -> None:
    """Raise ValueError unless the value is one of the known names."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}: got {value!r}, needs one of {', '.join(known)}")


def check_integer(name: str, value: object, low: int = 1, high: int | None = None) -> None:
    """Raise ValueError unless the value is an integer proper, not below `low` and not above `high`."""
    from kernels.philox import is_integer  # not above: the errors alone need no operator

    if not is_integer(value) or value < low or (high is not None and value > high):
        needs = f">= {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"{name}: got {value!r}, needs an integer {needs}")


def check_number(name: str, value: object, low: float, high: float, needs: str) -> float:
    """The value, a number or a tensor of one, as float. Raises ValueError for another thing, or outside low..high."""
    try:
        number = value if isinstance(value, int | float) else value.item()
    except (AttributeError, TypeError, ValueError, RuntimeError):
        number = None
    if isinstance(number, bool) or not isinstance(number, int | float) or not low <= number <= high:
        raise ValueError(f"{name}: got {repr(value)[:80]}, needs {needs}")
    return float(number)


def first_line(error: BaseException) -> str:
    """What an error says, or what it is called if it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0]


def register(known: dict[Any, Any], name: Any, what: str) -> Callable[[Item], Item]:
    """A decorator that adds a class or function under a name. It raises ValueError if another one has the name."""

    def decorate(item: Item) -> Item:
        held = known.get(name)
        if held is not None and (held.__module__, held.__qualname__) != (item.__module__, item.__qualname__):
            raise ValueError(f"{what}: {name!r} is {held.__module__}.{held.__qualname__}, needs another name")
        known[name] = item
        return item

    return decorate
