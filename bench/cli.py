"""The command line `ddpm-bench`: one function per command.

Imported when it is called: a process that measures for `compare` pays for `run` alone, and `--help` for all of them.
"""

from collections.abc import Sequence
from functools import partial

from ddpm import command_line

COMMANDS = {
    "run": "bench.run:run",
    "compare": "bench.compare:compare",
    "static": "bench.static.command:static",
    "profile": "bench.profile:profile",
    "gpu": "bench.gpu.command:gpu",
    "report": "bench.report:report",
}
app_of = partial(command_line.app_of, COMMANDS, "Measure the kernels, the sampling steps and all above them.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return command_line.run(app_of, "ddpm-bench", arguments)
