"""PyTorch without Python: a torch.export program, and an AOTInductor package compiled for this machine's CPU."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch.export import Dim, ExportedProgram

from ddpm.engines.compile import compiler_missing
from ddpm.errors import WorkFailed
from ddpm.files import replacing
from ddpm.networks import condition_shape, sample_shape
from ddpm.runs import Run
from export.models import describe
from export.traced import Denoiser, example_times, quiet
from export.verification import Parity, denoiser_parity, require


def program_of(run: Run) -> ExportedProgram:
    """The denoiser (x [batch, C, H, W], t [batch][, context [batch, ...]]) -> m with a dynamic batch."""
    module = Denoiser(run.model).eval()
    condition = condition_shape(run.model)
    context = None if condition is None else torch.zeros(3, *condition)
    arguments = (torch.zeros(3, *sample_shape(run.model)), example_times(run.model, 3), context)
    batch = {0: Dim("batch")}
    dynamic = (batch, batch, None if context is None else batch)
    with torch.no_grad(), quiet():
        program = torch.export.export(module, arguments, dynamic_shapes=dynamic)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # holds local paths
    return program


def _written(
    run: Run, path: Path, save: Callable[[Path], object], load: Callable[[str], Callable], verify: bool
) -> Parity | None:
    """Save, read back and compare; the file is there if it passed."""
    with replacing(path) as partial, torch.no_grad(), quiet():
        save(partial)
        if not verify:
            return None
        call = load(str(partial))
        parity = denoiser_parity(path.name, lambda *given: call(*given).numpy(), run)
        require([parity])
    return parity


def write_torch(run: Run, path: Path, verify: bool = True) -> Parity | None:
    """torch.export's .pt2, checked after reading it back. Raises WorkFailed if it differs from the run."""
    program, metadata = program_of(run), describe(run, "denoiser", "fp32")

    def save(partial: Path) -> None:
        with partial.open("wb") as file:  # given a name, PyTorch would write it into the archive
            torch.export.save(program, file, extra_files={"fused_ddpm.json": json.dumps(metadata)})

    return _written(run, path, save, lambda name: torch.export.load(name).module(), verify)


def write_aoti(run: Run, path: Path, verify: bool = True) -> Parity | None:
    """An AOTInductor package (C++ compiled here, run from C++ or `torch._inductor.aoti_load_package`), checked.

    It is for this machine and names its folders. What it is called with goes unchecked, so a t of one row is broadcast,
    unless the environment says AOTI_RUNTIME_CHECK_INPUTS=1.
    Raises WorkFailed without a C++ compiler, or if it differs from the run.
    """
    lack = compiler_missing()
    if lack is not None:
        raise WorkFailed(f"{path}: AOTInductor needs {lack}")
    program, inductor = program_of(run), torch._inductor

    def save(partial: Path) -> None:
        inductor.aoti_compile_and_package(program, package_path=str(partial))

    return _written(run, path, save, inductor.aoti_load_package, verify)
