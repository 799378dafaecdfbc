"""The command line `ddpm-bench`: errors are one line on stderr and an exit code, 2 bad input or 1 failed work."""

import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from bench.static import static

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(static)

BAD_INPUT, FAILED = 2, 1


@app.callback()
def _root(debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False) -> None:
    """Measure the kernels."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; `--debug` may stand anywhere in it."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    try:
        result = app(arguments, prog_name="ddpm-bench", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        print("stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        usage = hasattr(error, "format_message")
        text = error.format_message() if usage else str(error)
        print(f"error: {' '.join(text.split()) or type(error).__name__}", file=sys.stderr)
        return BAD_INPUT if usage or isinstance(error, ValueError | TypeError | OSError) else FAILED
    return result if isinstance(result, int) else 0
