"""PyTorch without Python: a torch.export program, and an AOTInductor package compiled for this machine's CPU."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from ddpm.engines.compile import compiler_missing
from ddpm.errors import WorkFailed
from ddpm.files import replacing
from ddpm.networks import condition_shape, sample_shape
from ddpm.runs import Run
from export.metadata import describe
from export.parity import Denoise, Parity, denoiser_parity, require
from export.traced import Denoiser, example_times, quiet

METADATA = "fused_ddpm.json"

Writer = Callable[[Run, Path, bool], Parity | None]


def program_of(run: Run) -> ExportedProgram:
    """The denoiser (x [batch, C, H, W], t [batch][, context [batch, ...]]) -> m with a dynamic batch."""
    module = Denoiser(run.model).eval()
    arguments = [torch.zeros(3, *sample_shape(run.model)), example_times(run.model, 3)]
    if (condition := condition_shape(run.model)) is not None:
        arguments.append(torch.zeros(3, *condition))
    batch = Dim("batch")
    dynamic = {name: {0: batch} for name, _ in zip(("x", "t", "context"), arguments, strict=False)}
    if len(arguments) == 2:
        dynamic["context"] = None
        arguments.append(None)
    with torch.no_grad(), quiet():
        program = torch.export.export(module, tuple(arguments), dynamic_shapes=dynamic)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # holds local paths
    return program


def _denoiser(call: Callable[..., Tensor]) -> Denoise:
    def denoise(x: Tensor, t: Tensor, c: Tensor | None) -> np.ndarray:
        with torch.no_grad():
            return call(x, t, c).numpy()

    return denoise


def write_torch(run: Run, path: Path, verify: bool = True) -> Parity | None:
    """torch.export's .pt2, checked after reading it back. Raises WorkFailed if it differs from the run."""
    program, metadata = program_of(run), describe(run, "denoiser", "fp32")
    with replacing(path) as partial, quiet():
        with partial.open("wb") as file:  # given a name, PyTorch would write it into the archive
            torch.export.save(program, file, extra_files={METADATA: json.dumps(metadata)})
        if not verify:
            return None
        parity = denoiser_parity(path.name, _denoiser(torch.export.load(partial).module()), run)
        require([parity])
    return parity


def write_aoti(run: Run, path: Path, verify: bool = True) -> Parity | None:
    """An AOTInductor package (C++ compiled here, run from C++ or `torch._inductor.aoti_load_package`), checked.

    It is for this machine and names its folders. What it is called with goes unchecked, so a t of one row is broadcast,
    unless the environment says AOTI_RUNTIME_CHECK_INPUTS=1.
    Raises WorkFailed without a C++ compiler, or if it differs from the run.
    """
    lack = compiler_missing()
    if lack is not None:
        raise WorkFailed(f"{path}: AOTInductor needs {lack}")
    program = program_of(run)
    with replacing(path) as partial, torch.no_grad(), quiet():
        torch._inductor.aoti_compile_and_package(program, package_path=str(partial))
        if not verify:
            return None
        package = torch._inductor.aoti_load_package(str(partial))
        parity = denoiser_parity(path.name, _denoiser(lambda *given: package(*given)), run)
        require([parity])
    return parity
