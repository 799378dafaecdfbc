"""The command line `ddpm-bench`: one function per command."""

from collections.abc import Sequence
from typing import Annotated

import typer

from bench.compare import compare
from bench.gpu.command import gpu
from bench.profile import profile
from bench.report import report
from bench.run import run
from bench.static.command import static
from ddpm import command_line

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(run)
app.command()(compare)
app.command()(static)
app.command()(profile)
app.command()(gpu)
app.command()(report)


@app.callback()
def _root(debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False) -> None:
    """Measure the kernels, the sampling steps and all above them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return command_line.run(app, "ddpm-bench", arguments)
