"""The command line `ddpm`: one file per command; errors are one line on stderr and an exit code."""

import logging
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from ddpm.commands.evaluate import evaluate
from ddpm.commands.importing import import_weights
from ddpm.commands.sample import sample
from ddpm.commands.train import train
from ddpm.errors import WorkFailed

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(train)
app.command()(sample)
app.command()(evaluate)
app.command("import")(import_weights)

BAD_INPUT, FAILED = 2, 1


@app.callback()
def _root(debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False) -> None:
    """Train a ContextUnet diffusion model and sample it."""


def exit_code(error: BaseException) -> int:
    """2 for what the user can put right (arguments, files, a full disk), 1 for work that failed."""
    if isinstance(error, WorkFailed):
        return FAILED
    usage = hasattr(error, "format_message")
    return BAD_INPUT if usage or isinstance(error, ValueError | TypeError | OSError) else FAILED


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; `--debug` may stand anywhere in it."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    warnings.showwarning = lambda message, *_: print(f"note: {message}", file=sys.stderr)
    try:
        result = app(arguments, prog_name="ddpm", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        print("stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        text = error.format_message() if hasattr(error, "format_message") else str(error)
        if type(error).__name__ == "NoArgsIsHelpError":
            print(text, file=sys.stderr)
            return BAD_INPUT
        line = " ".join(text.split()) or type(error).__name__
        print(f"error: {line}", file=sys.stderr)
        return exit_code(error)
    return result if isinstance(result, int) else 0
