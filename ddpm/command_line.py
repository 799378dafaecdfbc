"""What the command lines share: errors are one line on stderr and an exit code, no traceback without `--debug`."""

import _thread
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ddpm.errors import WorkFailed
from ddpm.extras import lacks
from ddpm.interrupts import handling

BAD_INPUT, FAILED, STOPPED, TERMINATED = 2, 1, 130, 143
SENT_AGAIN_S = 0.01
# Set to 1 by `--debug`: processes that a command starts show their tracebacks too.
DEBUG = "FUSED_DDPM_DEBUG"


class Command(TyperCommand):
    """A command whose --help lists the options of a panel under its name."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for each in self.get_params(ctx):
            name = getattr(each, "rich_help_panel", None) or f"{each.param_type_name}s".capitalize()
            if (line := each.get_help_record(ctx)) is not None:
                sections.setdefault(name, []).append(line)
        for name, lines in sections.items():
            if lines:
                with formatter.section(name):
                    formatter.write_dl(lines)


class Terminated(BaseException):
    """SIGTERM, as an exception so that what is half written is removed."""


def _terminate(*_: object) -> None:
    raise Terminated


def _send(number: int) -> None:
    """The signal to the main thread, which wakes from what it waits for where the system can do that."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident, number)
    else:
        _thread.interrupt_main(number)


@contextmanager
def _interrupts_heeded() -> Iterator[None]:
    """Python ignores what is raised in a destructor or a weak reference's callback: an interrupt is sent again."""
    before, numbers = sys.unraisablehook, {KeyboardInterrupt: signal.SIGINT, Terminated: signal.SIGTERM}

    def hook(ignored: "sys.UnraisableHookArgs") -> None:
        number = numbers.get(ignored.exc_type)
        if number is None:
            before(ignored)
        else:
            threading.Timer(SENT_AGAIN_S, _send, (number,)).start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def debugging() -> bool:
    """Whether this command runs under `--debug`."""
    return os.environ.get(DEBUG) == "1"


def typed(context: typer.Context) -> dict[str, str]:
    """What stands on the command line, not what was left at its default: {parameter: its option, or argument}."""
    there = (each for each in context.command.params if context.get_parameter_source(each.name).name == "COMMANDLINE")
    return {each.name: each.opts[0] for each in there}


def show_trace(error: BaseException) -> None:
    """Under `--debug` the traceback on stderr, for errors that are caught and go on as one line."""
    if debugging():
        traceback.print_exception(error)


def exit_code(error: BaseException) -> int:
    """2 for what the user can put right, 1 for work that failed; an error class may bring its own `exit_code`."""
    if isinstance(error, WorkFailed):
        return FAILED
    usage = hasattr(error, "format_message")
    if not usage and hasattr(error, "exit_code"):
        return error.exit_code
    return BAD_INPUT if usage or isinstance(error, ValueError | TypeError | OSError) else FAILED


def app_of(commands: Mapping[str, str], about: str, arguments: Sequence[str] = ()) -> typer.Typer:
    """A command line with the command that these arguments call, or with all if they call none.

    commands: name -> "module:function", in the order of --help; a module is imported when its command is called.
    """

    def root(debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False) -> None:
        pass

    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.callback(help=about)(root)
    called = next((word for word in arguments if not word.startswith("-")), "")
    for name in [called] if called in commands else commands:
        module, _, function = commands[name].partition(":")
        app.command(name, cls=Command)(getattr(import_module(module), function))
    return app


def run(make: Callable[[Sequence[str]], typer.Typer], name: str, arguments: Sequence[str] | None) -> int:
    """Run the command line that is made for these arguments; `--debug` may stand anywhere in them.

    Returns its exit code. A package that is not installed is named with the extra that brings it.
    """
    words, before = list(sys.argv[1:] if arguments is None else arguments), os.environ.get(DEBUG, "")
    os.environ[DEBUG] = "1" if "--debug" in words else before
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    warnings.simplefilter("always", UserWarning)
    warnings.showwarning = lambda message, *_: print(f"note: {message}", file=sys.stderr)
    try:
        with handling(_terminate, signal.SIGTERM), _interrupts_heeded():
            words = [word for word in words if word != "--debug"]
            result = make(words)(words, prog_name=name, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, typer.Abort, Terminated) as error:
        print("stopped", file=sys.stderr)
        return TERMINATED if isinstance(error, Terminated) else STOPPED
    except Exception as error:
        show_trace(error)
        text = error.format_message() if hasattr(error, "format_message") else str(error)
        if isinstance(error, ModuleNotFoundError) and text.startswith("No module named"):
            text = lacks(error.name or text)
        if type(error).__name__ == "NoArgsIsHelpError":
            print(text, file=sys.stderr)
            return BAD_INPUT
        # One write with its newline: ranks under torchrun share stderr, and print would write twice.
        sys.stderr.write(f"error: {' '.join(text.split()) or type(error).__name__}\n")
        return exit_code(error)
    finally:
        os.environ[DEBUG] = before
