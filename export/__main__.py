"""`python -m export`, also installed as `ddpm-export`."""

import sys
from collections.abc import Sequence

from ddpm.extras import lacks


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. `run` is taken before PyTorch is imported: it needs none."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    draws = "run" in arguments[:2] and set(arguments[: arguments.index("run")]) <= {"--debug"}
    try:
        if draws:
            from export import run
        else:
            from export.cli import main as others
    except ModuleNotFoundError as missing:
        if str(missing.name).partition(".")[0] in ("export", "ddpm", "kernels"):
            raise
        print(f"error: {lacks(str(missing.name))}", file=sys.stderr)
        return 4  # a provider is missing: run.ProviderError, which is out of reach
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    if draws:
        arguments.remove("run")
        return run.main(arguments, prog="ddpm-export run")
    return others(arguments)


if __name__ == "__main__":
    sys.exit(main())
