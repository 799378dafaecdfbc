"""The command line `ddpm-bench`: one function per command."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench import report
from bench.compare import compare
from bench.history import history
from bench.profile import profile
from bench.run import run
from bench.static import static
from ddpm import command_line
from ddpm.command_line import FAILED

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(run)
app.command()(compare)
app.command()(history)
app.command()(static)
app.command()(profile)


@app.command()
def gpu(
    out: Annotated[Path, typer.Option(help="folder for the records")],
    tests: Annotated[bool, typer.Option(help="run the kernel tests on the device first")] = True,
) -> int:
    """Everything that only a GPU can tell: the kernel tests on it, then the kernels' times, in under nine minutes."""
    from bench.gpu import BUDGET_SECONDS, run_kernels, run_tests, table

    if not torch.cuda.is_available():
        raise typer.BadParameter("this PyTorch sees no CUDA device, needs one", param_hint="gpu")
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    tested = run_tests() if tests else None
    left = BUDGET_SECONDS - (time.monotonic() - began)
    content = run_kernels(out, torch.device("cuda"), budget=left, tests=tested)
    records = content["records"]
    print(table(records))
    print(f"wrote {out / 'kernels.json'}")
    passed = tested is None or tested["exit"] == 0
    good = content["complete"] and passed and all(record["parity"] for record in records)
    return 0 if good else FAILED


@app.command("report")
def write_report() -> None:
    """Regenerate the figures in README.md and docs/ from the stored records."""
    report.write()


@app.callback()
def _root(debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False) -> None:
    """Measure the kernels, the sampling steps and all above them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return command_line.run(app, "ddpm-bench", arguments)
