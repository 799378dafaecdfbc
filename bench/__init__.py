"""Benchmarks of everything below, parity first; a suite of one's own needs `Bench`, `Candidate`, `Cost`, `Workload`."""

from typing import Any

__all__ = ["Bench", "Candidate", "Cost", "Workload"]


def __getattr__(name: str) -> Any:
    """Imported when asked for: `bench.packages` has to come before the rest."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from bench import registry

    return getattr(registry, name)
