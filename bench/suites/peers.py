"""Suite `peers`: the same steps of the same network through other libraries' loops, other runtimes and our engines.

Everything competes in one process, after parity of whole trajectories with our eager engine; a call is a trajectory, so
times are per step. `torch.compile of eager` and the runtimes are eager's loop around the network as PyTorch compiles
it, or as ONNX Runtime or OpenVINO runs the exported denoiser.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from types import ModuleType
from unittest.mock import patch

import torch
from torch import Tensor, nn

from bench.registry import Bench, Candidate, Workload
from bench.suites.networks import (
    REST_S,
    SCHEDULE,
    SEED,
    TIMESTEPS,
    contexts,
    initial,
    judged,
    network,
    sampling_call,
    sampling_cost,
)
from bench.timing import Call
from ddpm import StepTable, make_table
from ddpm.engines import competitors
from ddpm.networks import network_times, null_condition
from ddpm.networks.protocol import in_type
from kernels import philox
from kernels.solver_step import guide

STEPS, QUICK_STEPS = 10, 2
BATCHES, QUICK_BATCHES = (1, 8, 32, 64), (1,)
SOLVERS = ("ddim", "ddpm")
GUIDED = 32, 2.0  # the batch that also runs with guidance, and its w
PACKAGES = {"diffusers": "peers", "openvino": "peers", "onnxruntime": "onnx"}  # and their extras
RUNTIMES = {"onnxruntime": "denoiser_call", "openvino": "openvino_call"}  # functions of suite `export`


def unavailable() -> dict[str, str]:
    """Who cannot compete in this installation, and why."""
    return {
        package: f"suite peers: {package} is not installed, needs pip install 'fused-ddpm[{extra}]'"
        for package, extra in PACKAGES.items()
        if find_spec(package) is None
    }


def _field(model: nn.Module, context: Tensor, guidance: float) -> Call:
    """The network as other libraries call it: (x [n, C, h, w], t int64 [n] from 0) -> eps, guided as eager does it."""
    times = in_type(network_times(model, torch.arange(1, TIMESTEPS + 1), TIMESTEPS)).to(context.device)
    both = torch.cat((context, null_condition(model, context)))

    def field(x: Tensor, t: Tensor) -> Tensor:
        if guidance == 1.0:
            return model(x, times[t], context)
        return guide(*model(torch.cat((x, x)), times[t].repeat(2), both).chunk(2), guidance)

    return field


def _scheduler_loop(module: ModuleType, prefix: str, solver: str, table: StepTable, field: Call, x: Tensor) -> Call:
    """The loop of diffusers' pipelines with a scheduler of theirs, or (prefix "Fused") of ours."""
    kind = getattr(module, f"{prefix}{solver.upper()}Scheduler")
    betas = SCHEDULE.betas[1:].tolist()
    scheduler = kind(trained_betas=betas, num_train_timesteps=TIMESTEPS, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(len(table), x.device, **({"seed": SEED} if prefix else {}))
    if (scheduler.timesteps.cpu() + 1).tolist() != table.timesteps.tolist():
        raise ValueError(f"timesteps of {kind.__name__}: differ from ours, needs steps that divide T")

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
    field, x = _field(model, contexts(batch, device), guidance), initial(model, batch, device)
    call = partial(sampling_call, table=table, batch=batch, guidance=guidance)
    loop = partial(_scheduler_loop, solver=solver, table=table, field=field, x=x)
    theirs, lacking = f"diffusers {solver.upper()}Scheduler", unavailable()
    makes: dict[str, Callable[[], Call]] = {"torch.compile of eager": lambda: call(torch.compile(model))}
    if "diffusers" not in lacking:
        import diffusers

        from ddpm import schedulers

        makes[theirs] = partial(loop, diffusers, "")
        makes[f"Fused{solver.upper()}Scheduler"] = partial(loop, schedulers, "Fused")
    for name, runtime in RUNTIMES.items():
        if device.type == "cpu" and not lacking.keys() & {"onnxruntime", name}:
            from bench.suites import export

            started = getattr(export, runtime)
            makes[name] = lambda started=started: call(export.elsewhere(started()))
    makes |= {name: partial(call, model, engine=name) for name in competitors(device)}
    eager = call(model)
    candidates = judged(eager, makes)
    if theirs in candidates:
        candidates[theirs] = _given_our_noise(candidates[theirs], table)
    cost = sampling_cost(model, batch, steps, guidance)
    return Bench([()], eager, candidates, cost, calls=steps, images=batch, rest_s=REST_S)


def workloads(quick: bool) -> list[Workload]:
    """Solver x batch, and ddpm with guidance at one batch size."""
    steps = QUICK_STEPS if quick else STEPS
    plain = [(solver, batch, 1.0) for batch in (QUICK_BATCHES if quick else BATCHES) for solver in SOLVERS]
    return [
        Workload(
            f"peers/{solver}{steps}{'' if w == 1.0 else '/guided'}/batch{batch}",
            "peers",
            partial(_build, solver, steps, batch, w),
        )
        for solver, batch, w in (*plain, *(() if quick else (("ddpm", *GUIDED),)))
    ]
