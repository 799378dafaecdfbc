"""How networks, solvers and engines become known by their names."""

from typing import Any


def register(known: dict[str, Any], name: str, item: Any, what: str) -> None:
    """Add an item under a name. Raises ValueError if another one has it; the same, imported again, replaces itself."""
    held = known.get(name)
    if held is not None and (held.__module__, held.__qualname__) != (item.__module__, item.__qualname__):
        raise ValueError(f"{what}: {name!r} is {held.__module__}.{held.__qualname__}, needs another name")
    known[name] = item
