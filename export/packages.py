"""PyTorch without Python: a torch.export program, and an AOTInductor package compiled for this machine's CPU."""

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from ddpm.engines.compile import compiler_missing
from ddpm.errors import WorkFailed
from ddpm.files import replacing
from ddpm.interrupts import interrupts_wait
from ddpm.networks.protocol import condition_shape, recalls, sample_shape
from ddpm.runs import Run
from export.models import describe
from export.traced import Denoiser, example_times, quiet
from export.verification import Parity, denoiser_cases, denoiser_parity, nothing_written, require


def program_of(run: Run) -> ExportedProgram:
    """The denoiser (x [batch, C, H, W], t [batch][, context [batch, ...]]) -> m with a dynamic batch.

    x0_previous like x is the fourth argument of networks that read it.
    """
    module = Denoiser(run.model).eval()
    condition, x = condition_shape(run.model), torch.zeros(3, *sample_shape(run.model))
    context = None if condition is None else torch.zeros(3, *condition)
    recalled = (torch.zeros_like(x),) if recalls(run.model) else ()
    arguments = (x, example_times(run.model, 3), context, *recalled)
    batch = {0: Dim("batch")}
    dynamic = tuple(None if argument is None else batch for argument in arguments)
    with torch.no_grad(), quiet(), interrupts_wait():
        program = torch.export.export(module, arguments, dynamic_shapes=dynamic)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # holds local paths
    return program


def _written(run: Run, path: Path, content: bytes, load: Callable[[str], Callable], verify: bool) -> Parity | None:
    """Write, read back and compare; the file is there if it passed.

    PyTorch writes into memory, not to the disk: on a full one its writer ends the process.
    """
    with nothing_written(), replacing(path) as partial, torch.no_grad(), quiet():
        partial.write_bytes(content)
        if not verify:
            return None
        call = load(str(partial))
        parity = denoiser_parity(path.name, lambda *given: call(*given).numpy(), run)
        require([parity])
    return parity


def write_torch(run: Run, path: Path, verify: bool = True) -> Parity | None:
    """torch.export's .pt2, checked after reading it back. Raises WorkFailed if it differs from the run."""
    content = io.BytesIO()
    with quiet():
        noted = {"fused_ddpm.json": json.dumps(describe(run, "denoiser", "fp32"))}
        torch.export.save(program_of(run), content, extra_files=noted)
    return _written(run, path, content.getvalue(), lambda name: torch.export.load(name).module(), verify)


@contextmanager
def _checked_inputs() -> Iterator[None]:
    """AOTInductor's generated code checks what it is called with.

    It has the checks (dtypes, sizes, strides, devices), but only does them where the environment says
    AOTI_RUNTIME_CHECK_INPUTS=1, without the number of axes and without the batches' being the same: both are added.
    """
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
    from torch._inductor.virtualized import V

    generate = CppWrapperCpu.generate_input_output_runtime_checks

    def always(self: Any) -> None:
        generate(self)
        checks = ["int64_t axes;"]
        for k, tensor in enumerate(V.graph.graph_inputs.values()):
            handle, rank = f"input_handles[{k}]", len(tensor.get_size())
            checks.append(f"AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim({handle}, &axes));")
            batch = "ConstantHandle({}).sizes()[0]".format
            for wrong, needs in (
                (f"axes != {rank}", f"{rank} axes"),
                (f"{batch(handle)} != {batch('input_handles[0]')}", "the batch of input 0"),
            ):
                checks.append(f'if ({wrong}) throw std::runtime_error("{handle}: needs {needs}");')
        lines = self.prefix._lines
        for number, line in enumerate(lines):
            text = str(line).replace('getenv("AOTI_RUNTIME_CHECK_INPUTS")', '"1"')
            if text.strip() == "check_input_0(input_handles);":
                text = "\n".join([*checks, text])
            if text != str(line):
                lines[number] = text

    CppWrapperCpu.generate_input_output_runtime_checks = always
    try:
        yield
    finally:
        CppWrapperCpu.generate_input_output_runtime_checks = generate


def _require_checks(call: Callable, run: Run, path: Path) -> None:
    """Raise WorkFailed unless a package refuses inputs that it would read wrongly."""
    cases = denoiser_cases(run.model, run.schedule.timesteps)
    _, x, t, *more = next(case for case in cases if len(case[1]) > 1)
    wrong = {
        "of another batch": (x, t[:1], *more),
        "of other strides": (torch.cat([x, x], dim=-1)[..., : x.shape[-1]], t, *more),
        "that is expanded": (x[:1].expand(x.shape), t, *more),
        "of another size": (torch.cat([x, x], dim=-1), t, *more),
        "of fewer axes": (x[0], t, *more),
    }
    for what, given in wrong.items():
        try:
            call(*given)
        except RuntimeError:
            continue
        raise WorkFailed(f"{path}: this PyTorch's package computes with an input {what}, needs one that refuses it")


def write_aoti(run: Run, path: Path, verify: bool = True) -> Parity | None:
    """An AOTInductor package (C++ compiled here, run from C++ or `torch._inductor.aoti_load_package`), checked.

    It is for this machine and names its folders. It refuses inputs of other dtypes, sizes or strides than contiguous.
    Raises WorkFailed without a C++ compiler, or if it differs from the run.
    """
    lack = compiler_missing()
    if lack is not None:
        raise WorkFailed(f"{path}: AOTInductor needs {lack}")
    program, inductor = program_of(run), torch._inductor
    options = {"aot_inductor.metadata": {"fused_ddpm": json.dumps(describe(run, "denoiser", "fp32"))}}
    if hasattr(inductor.config.aot_inductor, "check_lowerbound"):  # else its checks take no batch of one
        options["aot_inductor.check_lowerbound"] = False
    content = io.BytesIO()
    with torch.no_grad(), quiet(), interrupts_wait(), _checked_inputs():
        inductor.aoti_compile_and_package(program, package_path=content, inductor_configs=options)

    def load(name: str) -> Callable:
        call = inductor.aoti_load_package(name)
        _require_checks(call, run, path)
        return call

    return _written(run, path, content.getvalue(), load, verify)
