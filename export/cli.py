"""The command line `ddpm-export`: one function per command. `run` lives in export/run.py, which needs no PyTorch."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from ddpm import runs
from ddpm.command_line import run as run_app
from ddpm.commands.sampling_options import check_output, takes_table_options
from ddpm.runs import Run
from export import bundle, packages, run
from export.info import rows_of
from export.verification import FLOORS, Parity, Quality, require

LIMITS = ("measured", "allowed")
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="run folder")]
Verify = Annotated[
    bool, typer.Option("--verify/--no-verify", help="compare with the run, and keep nothing that differs")
]
Data = Annotated[str | None, typer.Option(help="where the training data lies now, for fp16 and int8 [as trained]")]
Labels = Annotated[str | None, typer.Option(help="where its labels lie now [as trained]")]
Evaluate = Annotated[int | None, typer.Option(help=f"samples that fp16 and int8 are judged by [{bundle.SAMPLES}]")]


@app.command()
@takes_table_options
def onnx(
    folder: RunFolder,
    out: Annotated[Path, typer.Option(help="folder for denoiser.onnx, sampler.onnx, step.onnx, run.py, manifest.json")],
    precision: Annotated[str, typer.Option(help="fp32, fp16 or int8")] = "fp32",
    noise: Annotated[str, typer.Option(help="philox (in the graph), input, or none (x_T alone)")] = "philox",
    open_table: Annotated[
        bool, typer.Option("--open-table", help="make the solver's table an input: one file runs any steps")
    ] = False,
    open_guidance: Annotated[
        bool, typer.Option("--open-guidance", help="guidance by sample, negative conditions and rescale as inputs")
    ] = False,
    verify: Verify = True,
    evaluate: Evaluate = None,
    data: Data = None,
    labels: Labels = None,
    **asked: Any,
) -> None:
    """Write a run as ONNX: the denoiser, one step, and the whole sampler in one file."""
    how = {"precision": precision, "noise": noise, "open_table": open_table, "open_guidance": open_guidance}
    judged = {"verify": verify, "evaluate": evaluate, "data": data, "labels": labels}
    manifest = bundle.write(runs.load_run(folder), out, asked, **how, **judged)
    print_parity([Parity(p["name"], p["error"], p["tolerance"]) for p in manifest["parity"]])
    print_quality(manifest["quality"])
    for name, file in manifest["files"].items():
        print(f"wrote {out / name} ({file['bytes']:,} bytes)")
    print(f"wrote {out / bundle.MANIFEST}")
    print(f"run it with: ddpm-export run {out / bundle.SAMPLER} --n 64 --out grid.png")


@app.command(
    "run", context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
)
def run_model(context: typer.Context) -> int:
    """Draw samples from a sampler.onnx, without PyTorch (`ddpm-export run --help`)."""
    return run.main(context.args, prog="ddpm-export run")


@app.command()
def info(file: Annotated[Path, typer.Argument(metavar="FILE", help="an exported .onnx or .pt2, or a table")]) -> None:
    """What an exported file tells of itself."""
    table = Table("", Column(overflow="fold"), title=Text(str(file)), show_header=False)
    for name, value in rows_of(file).items():
        table.add_row(name, value)
    Console().print(table, markup=False)


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="an exported .onnx")],
    folder: RunFolder,
    evaluate: Evaluate = None,
    data: Data = None,
    labels: Labels = None,
) -> None:
    """Measure again how far an exported file is from the run."""
    parity, measured = bundle.verify(file, runs.load_run(folder), data, labels, evaluate)
    print_quality(measured)
    print_parity(parity)
    require(parity)


@app.command()
def torch(
    folder: RunFolder,
    out: Annotated[Path | None, typer.Option(help="file to write, .pt2 [RUN/denoiser.pt2]")] = None,
    verify: Verify = True,
) -> None:
    """Write the denoiser as a torch.export program."""
    _package(folder, out or folder / "denoiser.pt2", packages.write_torch, verify)


@app.command()
def aoti(
    folder: RunFolder,
    out: Annotated[Path | None, typer.Option(help="file to write, .pt2 [RUN/denoiser.aoti.pt2]")] = None,
    verify: Verify = True,
) -> None:
    """Compile the denoiser with AOTInductor for this machine's CPU (needs a C++ compiler; about a minute)."""
    _package(folder, out or folder / "denoiser.aoti.pt2", packages.write_aoti, verify)


def _package(folder: Path, out: Path, write: Callable[[Run, Path, bool], Parity | None], verify: bool) -> None:
    check_output(out, "--out", ".pt2")
    with runs.held_beside(out):
        opened = runs.load_run(folder)
        bundle.check_network(opened)
        parity = write(opened, out, verify)
    print_parity([] if parity is None else [parity])
    print(f"wrote {out} ({out.stat().st_size:,} bytes)")


def print_parity(results: Sequence[Parity]) -> None:
    """A table of comparisons, if there are any, and which failed."""
    if results:
        table = Table("max|difference| / max(1, max|reference|)", *(Column(n, justify="right") for n in LIMITS), "")
        for each in results:
            table.add_row(each.name, f"{each.error:.1e}", f"{each.tolerance:.0e}", "ok" if each.good else "FAILED")
        Console().print(table)


def print_quality(measured: Quality | None) -> None:
    """A table of what a precision costs, and gives, if it was measured."""
    if measured is None:
        return
    floor = FLOORS[measured["precision"]]
    table = Table("", *(Column(name, justify="right") for name in (measured["precision"], "eager fp32", "floor")))
    for name, psnr in measured["trajectories"].items():
        table.add_row(f"PSNR of {name}, its own table", f"{psnr:.1f} dB", "", f"{floor.psnr_db:g} dB")
    if measured["psnr_db"] is not None:
        table.add_section()
        table.add_row("{samples} samples, {solver}, {steps} steps, guidance {guidance:g}:".format(**measured))
        table.add_row("  PSNR", f"{measured['psnr_db']:.1f} dB", "", f"{floor.psnr_db:g} dB")
    if measured["accuracy"] is not None:
        lowest = f"{measured['accuracy_fp32'] - floor.accuracy_loss:.1%}"
        table.add_row("  class accuracy (SVM)", *(f"{measured[n]:.1%}" for n in ("accuracy", "accuracy_fp32")), lowest)
    if measured["frechet"] is not None:
        table.add_row("  Frechet distance", f"{measured['frechet']:.2f}", f"{measured['frechet_fp32']:.2f}", "")
    if measured["relative_l2"] is not None:
        table.add_section()
        table.add_row("relative L2 of the network", f"{measured['relative_l2']:.2g}", "", f"{floor.relative_l2:g}")
    Console().print(table)
    if measured["skipped"] is not None:
        print(f"note: class accuracy and Frechet distance were not measured: {measured['skipped']}")


@app.callback()
def _root(debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False) -> None:
    """Take a trained run out of PyTorch."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return run_app(lambda _: app, "ddpm-export", arguments)
