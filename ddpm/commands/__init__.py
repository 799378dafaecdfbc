"""The command line `ddpm`: one file per command."""

from collections.abc import Sequence
from typing import Annotated

import typer

from ddpm.command_line import run
from ddpm.commands.evaluate import evaluate
from ddpm.commands.importing import import_weights
from ddpm.commands.sample import sample
from ddpm.commands.train import train

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(train)
app.command()(sample)
app.command()(evaluate)
app.command("import")(import_weights)


@app.callback()
def _root(debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False) -> None:
    """Train a ContextUnet diffusion model and sample it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return run(app, "ddpm", arguments)
