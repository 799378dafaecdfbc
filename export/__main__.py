"""`python -m export`, also installed as `ddpm-export`."""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. `run` is taken before PyTorch is imported: it needs none."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "run" in arguments[:2] and set(arguments[: arguments.index("run")]) <= {"--debug"}:
        from export import run

        arguments.remove("run")
        return run.main(arguments, prog="ddpm-export run")
    from export.cli import main as others

    return others(arguments)


if __name__ == "__main__":
    sys.exit(main())
