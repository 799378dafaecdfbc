"""Suite `peers`: the same steps of the same network through other libraries' loops, other runtimes and our engines.

Everything competes in one process, after parity of whole trajectories with our eager engine; a call is a trajectory, so
times are per step. `torch.compile of eager` and the runtimes are eager's loop around the network as PyTorch compiles
it, or as ONNX Runtime or OpenVINO runs the exported denoiser. A Unet competes with denoising_diffusion_pytorch, whose
DDIM runs its own network with the same weights.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from unittest.mock import patch

import torch
from torch import Tensor, nn

from bench import library
from bench.registry import Bench, Candidate, Workload
from bench.suites import networks
from bench.suites.networks import SCHEDULE, SEED, TIMESTEPS, contexts, network, sampling_call
from bench.timing import Call
from ddpm import GaussianDiffusion, StepTable, make_table
from ddpm.engines import competitors
from ddpm.extras import lacks
from ddpm.inference import form_of
from ddpm.networks import network_times, null_condition
from ddpm.networks.protocol import in_type
from kernels import philox
from kernels.solver_step import guide

PACKAGES = ("diffusers", "openvino", "onnxruntime")
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
RUNTIMES = {"onnxruntime": "denoiser_call", "openvino": "openvino_call"}  # functions of suite `export`


def unavailable() -> dict[str, str]:
    """Who cannot compete in this installation, and why."""
    lacking = {package: f"suite peers: {lacks(package)}" for package in PACKAGES if find_spec(package) is None}
    if (package := library.missing()) is not None:
        lacking[library.NAME] = f"suite peers: {library.NAME} needs {package}, see docs/contributing.md"
    return lacking


def _field(model: nn.Module, context: Tensor, guidance: float) -> Call:
    """The network as other libraries call it: (x [n, C, h, w], t int64 [n] from 0) -> eps, guided as eager does it."""
    times = in_type(network_times(model, torch.arange(1, TIMESTEPS + 1), TIMESTEPS)).to(context.device)
    both = torch.cat((context, null_condition(model, context)))

    def field(x: Tensor, t: Tensor) -> Tensor:
        if guidance == 1.0:
            return model(x, times[t], context)
        return guide(*model(torch.cat((x, x)), times[t].repeat(2), both).chunk(2), guidance)

    return field


def _scheduler_loop(module: str, name: str, options: dict[str, int], table: StepTable, field: Call, x: Tensor) -> Call:
    """The loop of diffusers' pipelines with a scheduler; options: of its `set_timesteps`."""
    known = {"trained_betas": SCHEDULE.betas[1:].tolist(), "num_train_timesteps": TIMESTEPS}
    scheduler = getattr(import_module(module), name)(**known, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(len(table), x.device, **options)

    @torch.no_grad()
    def loop() -> Tensor:
        state = x
        for t in scheduler.timesteps:
            state = scheduler.step(field(state, t.expand(len(state))), t, state).prev_sample
        return state

    return loop


def _given_our_noise(candidate: Candidate, table: StepTable) -> Candidate:
    """diffusers draws other noise: it is judged with the noise of the contract in its place, and timed with its own."""

    def error(call: Call) -> float:
        steps = iter(table.noise_steps.tolist())

        def drawn(shape: torch.Size, *_: object, device: torch.device, dtype: torch.dtype, **__: object) -> Tensor:
            samples, stream = torch.arange(shape[0], device=device), philox.Stream.SAMPLING
            return philox.normal(SEED, samples, next(steps), stream, shape[1:], device=device, dtype=dtype)

        with patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", drawn):
            return candidate.error(call)

    return replace(candidate, error=error)


def _build(solver: str, steps: int, batch: int, guidance: float, device: torch.device) -> Bench:
    model, table = network(device), make_table(SCHEDULE, solver, steps)
    field, x = _field(model, contexts(batch, device), guidance), networks.initial(model, batch, device)
    call = partial(sampling_call, table=table, batch=batch, guidance=guidance)
    makes: dict[str, Callable[[], Call]] = {"torch.compile of eager": lambda: call(torch.compile(model))}
    scheduler, lacking = f"{solver.upper()}Scheduler", unavailable()
    theirs = f"diffusers {scheduler}"
    if "diffusers" not in lacking:
        loop = partial(_scheduler_loop, table=table, field=field, x=x)
        makes[theirs] = partial(loop, "diffusers", scheduler, {})
        makes[f"Fused{scheduler}"] = partial(loop, "ddpm.schedulers", f"Fused{scheduler}", {"seed": SEED})
    for name, runtime in RUNTIMES.items():
        if device.type == "cpu" and not lacking.keys() & {"onnxruntime", name}:
            from bench.suites import export

            makes[name] = lambda runtime=runtime: call(export.elsewhere(getattr(export, runtime)()))
    makes |= {name: partial(call, model, engine=name) for name in competitors(device)}
    eager = call(model)
    candidates = networks.judged(eager, makes)
    if theirs in candidates:
        candidates[theirs] = _given_our_noise(candidates[theirs], table)
    cost = networks.sampling_cost(model, batch, steps, guidance)
    return Bench([()], eager, candidates, cost, calls=steps, images=batch, rest_s=networks.REST_S)


def _library_call(ours: GaussianDiffusion, x: Tensor) -> Call:
    """The library's DDIM of the same weights, from x: with eta = 0 it draws noise and multiplies it by zero."""
    there, size = library.load(), ours.image_size[0]
    how = {"timesteps": TIMESTEPS, "sampling_timesteps": ours.sampling_timesteps, "objective": ours.objective}
    network = there.Unet(**networks.UNET)
    theirs = there.GaussianDiffusion(network, image_size=size, auto_normalize=False, **how).to(x.device).eval()
    theirs.load_state_dict(ours.state_dict())
    bar = f"{library.NAME}.{library.NAME}.tqdm"

    def loop() -> Tensor:
        with patch("torch.randn", lambda *_, **__: x), patch(bar, lambda steps, **_: steps):
            return theirs.ddim_sample(tuple(x.shape))

    return loop


def _build_unet(steps: int, batch: int, device: torch.device) -> Bench:
    model = networks.other("unet", device)
    how = {"timesteps": TIMESTEPS, "sampling_timesteps": steps, "objective": "pred_noise", "auto_normalize": False}
    ours = GaussianDiffusion(model, image_size=model.sample_shape[1], **how).to(device)
    call = partial(sampling_call, model, ours.table(), batch)
    makes: dict[str, Callable[[], Call]] = {
        name: partial(call, engine=name) for name in competitors(device, form=form_of(model))
    }
    if library.missing() is None:
        x = networks.initial(model, batch, device)
        makes[library.NAME] = lambda: _library_call(ours, x)
    eager, cost = call(), networks.sampling_cost(model, batch, steps)
    return Bench([()], eager, networks.judged(eager, makes), cost, calls=steps, images=batch, rest_s=networks.REST_S)


def workloads(quick: bool) -> list[Workload]:
    """Solver x batch, ddpm with guidance and once with all its steps, and a Unet where its library is installed."""
    steps, batches = (2, (1,)) if quick else (10, (1, 8, 32, 64))
    settings = [("ddim", steps, "", batch, 1.0) for batch in (batches if quick else BATCHES)]
    settings += [("ddpm", steps, "", batch, 1.0) for batch in batches]
    settings += [] if quick else [("ddpm", steps, "/guided", 32, 2.0), ("ddpm", TIMESTEPS, "/whole", 1, 1.0)]
    found = [
        Workload(f"peers/{solver}{steps}{mark}/batch{batch}", "peers", partial(_build, solver, steps, batch, w))
        for solver, steps, mark, batch, w in settings
    ]
    for batch in batches if library.missing() is None else ():
        found.append(Workload(f"peers/unet/ddim{steps}/batch{batch}", "peers", partial(_build_unet, steps, batch)))
    return found
