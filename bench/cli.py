"""The command line `ddpm-bench`: one function per command, imported when it is called.

A process that measures for `compare` then pays for `run` alone, and `--help` for all of them.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated

import typer

from ddpm import command_line

# Of each command the module with a function of its name, in the order of --help.
COMMANDS = {
    "run": "bench.run",
    "compare": "bench.compare",
    "static": "bench.static.command",
    "profile": "bench.profile",
    "gpu": "bench.gpu.command",
    "report": "bench.report",
}


def _root(debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False) -> None:
    """Measure the kernels, the sampling steps and all above them."""


def app_of(arguments: Sequence[str]) -> typer.Typer:
    """The command line with the command that these arguments call, or with all if they call none."""
    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.callback()(_root)
    called = next((word for word in arguments if not word.startswith("-")), "")
    for name in [called] if called in COMMANDS else COMMANDS:
        app.command(name)(getattr(import_module(COMMANDS[name]), name))
    return app


def __getattr__(name: str) -> typer.Typer:
    """`app`: the whole command line, made when somebody asks for it."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return app_of(())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    return command_line.run(app_of(arguments), "ddpm-bench", arguments)
