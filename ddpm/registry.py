"""How networks, solvers and engines become known by their names."""

from collections.abc import Callable
from typing import Any, TypeVar

Item = TypeVar("Item")


def register(known: dict[Any, Any], name: Any, what: str) -> Callable[[Item], Item]:
    """A decorator that adds a class or function under a name.

    It raises ValueError if another one has the name; the same, imported again, replaces itself.
    """

    def decorate(item: Item) -> Item:
        held = known.get(name)
        if held is not None and (held.__module__, held.__qualname__) != (item.__module__, item.__qualname__):
            raise ValueError(f"{what}: {name!r} is {held.__module__}.{held.__qualname__}, needs another name")
        known[name] = item
        return item

    return decorate
