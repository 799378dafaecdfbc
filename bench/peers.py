"""`ddpm-bench peers`: one network and step count through other libraries' loops and through our engines.

Everything runs in one process, in interleaved rounds, after parity with our eager engine:

- ddim, eta = 0, is deterministic: whole trajectories are compared.
- ddpm: diffusers draws other noise, so for the comparison (and only there) it is given that of the noise contract; then
  whole trajectories are compared as well.
- denoising-diffusion-pytorch clips x0, visits other timesteps and takes its noise from x0: its estimate of x0 at t = T
  is compared, before clipping; it competes in ddim only.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from bench import store
from bench.machine import describe
from bench.measure import matrix_ceiling, measure
from bench.registry import Bench, Candidate, Workload
from bench.show import run_table
from bench.suites.networks import PARITY, SEED, TIMESTEPS, contexts, flops_of, network, step_bytes
from bench.timing import Call
from ddpm import NoiseSchedule, Run, Trajectory, load_run, make_table
from ddpm.command_line import FAILED
from ddpm.commands.drawing import ALL, class_count, contexts_of
from ddpm.engines import competitors
from ddpm.errors import BadInput
from ddpm.files import write_json
from ddpm.metrics import engine_error
from ddpm.networks import network_times, null_condition, sample_shape
from ddpm.networks.protocol import in_type
from ddpm.noise import PhiloxNoise
from ddpm.progress import Bar
from kernels import philox
from kernels.backend import Cost
from kernels.solver_step import guide

BATCHES = (1, 8, 32, 64)
STEPS, ROUNDS, GUIDANCE = 50, 5, 2.0
SOLVERS = ("ddim", "ddpm")
# denoising-diffusion-pytorch scales linear betas with 1000 / T; everybody gets its schedule.
BETAS = 0.1 / TIMESTEPS, 20 / TIMESTEPS
FLOAT = torch.float32


@contextmanager
def _contract_noise(steps: list[int]) -> Iterator[None]:
    """diffusers draws the noise of the noise contract, at these steps in turn."""
    from diffusers.schedulers import scheduling_ddpm as module

    own, left = module.randn_tensor, iter(steps)

    def randn_tensor(shape: torch.Size, *_: object, device: torch.device, dtype: torch.dtype, **__: object) -> Tensor:
        samples, step = torch.arange(shape[0], device=device), next(left)
        return philox.normal(SEED, samples, step, philox.Stream.SAMPLING, shape[1:], device=device, dtype=dtype)

    module.randn_tensor = randn_tensor
    try:
        yield
    finally:
        module.randn_tensor = own


class Field(nn.Module):
    """The network as other libraries call it: (x [n, C, h, w], t int64 [n] from 0) -> eps, guided as our eager engine.

    channels, out_dim, self_condition, random_or_learned_sinusoidal_cond: what denoising-diffusion-pytorch asks for.
    """

    self_condition = random_or_learned_sinusoidal_cond = False

    def __init__(self, model: nn.Module, count: int, context: Tensor | None, guidance: float) -> None:
        super().__init__()
        self.model, self.context, self.guidance = model, context, guidance
        self.channels = self.out_dim = sample_shape(model)[0]
        times = in_type(network_times(model, torch.arange(1, count + 1), count))
        self.register_buffer("times", times.to(next(model.parameters()).device), persistent=False)

    def forward(self, x: Tensor, t: Tensor, *_: object) -> Tensor:
        """eps of x's shape."""
        t = self.times[t]
        if self.guidance == 1.0:
            return self.model(x, t, self.context)
        both = torch.cat((self.context, null_condition(self.model, self.context)))
        both = self.model(torch.cat((x, x)), t.repeat(2), both)
        conditional, unconditional = both.chunk(2)
        return guide(conditional, unconditional, self.guidance)


def scheduler_loop(scheduler: Any, field: Field, x: Tensor) -> Tensor:
    """The loop of diffusers' pipelines."""
    with torch.no_grad():
        for t in scheduler.timesteps:
            m = field(x, t.expand(x.shape[0]))
            x = scheduler.step(m, t, x).prev_sample
    return x


def _opened(folder: Path | None, guidance: float) -> Run | None:
    """Raises BadInput for a run that is not of images, or guidance without classes."""
    if folder is None:
        return None
    run = load_run(folder)
    shape = sample_shape(run.model)
    if len(shape) != 3:
        raise BadInput(f"{folder}: its samples are {list(shape)}, needs a run of images [channels, height, width]")
    if guidance != 1.0 and not class_count(run):
        raise BadInput(f"--guidance: {folder} was trained without classes, needs a run with some")
    return run


def _gaussian_diffusion() -> type | str:
    """denoising-diffusion-pytorch's class, or why it cannot be imported."""
    try:
        from denoising_diffusion_pytorch import GaussianDiffusion
    except (ImportError, RuntimeError) as error:  # its torchvision raises RuntimeError beside another build of torch
        return f"denoising-diffusion-pytorch cannot be imported here ({type(error).__name__}: {error})"
    return GaussianDiffusion


def _setting(
    run: Run | None, batch: int, device: torch.device
) -> tuple[nn.Module, NoiseSchedule, Tensor, Tensor | None]:
    """(network, schedule, x_T, contexts): of the run, or seeded random weights; the classes in turn."""
    if run is None:
        model, schedule = network(device), NoiseSchedule.make("linear", TIMESTEPS, *BETAS)
        context = contexts(batch, device)
    else:
        model, schedule = run.model.to(device), run.schedule
        context = contexts_of(run, ALL if class_count(run) else None, 0, batch)
    samples = torch.arange(batch, device=device)
    x = PhiloxNoise(SEED)(samples, 0, philox.Stream.INITIAL, sample_shape(model))
    return model, schedule, x, None if context is None else context.to(device)


def _build(run: Run | None, solver: str, steps: int, batch: int, guidance: float, device: torch.device) -> Bench:
    """The competitors of one solver at one batch size."""
    import diffusers

    from ddpm import schedulers

    model, schedule, x, context = _setting(run, batch, device)
    table = make_table(schedule, solver, steps)
    field = Field(model, schedule.timesteps, context, guidance)
    betas = schedule.betas[1:].tolist()

    def engine(name: str, network: nn.Module) -> Call:
        prepared = Trajectory(network, schedule, table, engine=name, dtype=FLOAT, guided=guidance != 1.0)
        return partial(prepared, batch, context, guidance, SEED, batch_size=batch, x_T=x)

    def loop(module: Any, prefix: str) -> Call:
        options = {"trained_betas": betas, "num_train_timesteps": schedule.timesteps, "clip_sample": False}
        kind = getattr(module, f"{prefix}{solver.upper()}Scheduler")
        scheduler = kind(**options, timestep_spacing="trailing")
        scheduler.set_timesteps(steps, device, **({"seed": SEED} if prefix else {}))
        if (scheduler.timesteps.cpu() + 1).tolist() != table.timesteps.tolist():
            raise ValueError(f"timesteps of {kind.__name__}: differ from ours, needs steps that divide T")
        return partial(scheduler_loop, scheduler, field, x)

    eager = engine("eager", model)
    expected = cache(eager)

    def error(call: Call) -> float:
        return engine_error(call(), expected(), FLOAT)

    def injected(call: Call) -> float:
        with _contract_noise(table.timesteps.tolist()):
            return error(call)

    def entry(make: Callable[[], Call], judge: Callable[[Call], float] = error) -> Candidate:
        return Candidate(make, judge, PARITY[FLOAT])

    candidates = {
        f"diffusers {solver.upper()}Scheduler": entry(lambda: loop(diffusers, ""), injected),
        f"Fused{solver.upper()}Scheduler": entry(lambda: loop(schedulers, "Fused")),
        "torch.compile of eager": entry(lambda: engine("eager", torch.compile(model))),
    }
    theirs = _gaussian_diffusion()
    if solver == "ddim" and run is None and not isinstance(theirs, str):
        candidates["GaussianDiffusion"] = _gaussian_entry(theirs, field, schedule, steps, x)
    candidates |= {name: entry(partial(engine, name, model)) for name in competitors(device, FLOAT)}
    calls = steps * (1 if guidance == 1.0 else 2)
    cost = Cost(steps * step_bytes(model, batch, FLOAT), calls * batch * flops_of(model))
    return Bench([()], eager, candidates, cost, calls=steps, images=batch)


def _gaussian_entry(kind: type, field: Field, schedule: NoiseSchedule, steps: int, x: Tensor) -> Candidate:
    """denoising-diffusion-pytorch's own ddim loop; parity is x0 at t = T, of T - 1 in its count."""
    options = {"timesteps": schedule.timesteps, "sampling_timesteps": steps, "beta_schedule": "linear"}
    options |= {"objective": "pred_noise", "image_size": x.shape[-1], "auto_normalize": False}
    built = cache(lambda: kind(field, **options).to(x.device))

    def error(_: Call) -> float:
        t = torch.full((x.shape[0],), schedule.timesteps - 1, device=x.device)
        a = schedule.alpha_bars[-1].item()
        with torch.no_grad():
            expected = (x - (1 - a) ** 0.5 * field(x, t)) / a**0.5
            return engine_error(built().model_predictions(x, t).pred_x_start, expected, FLOAT)

    def make() -> Call:
        from denoising_diffusion_pytorch import denoising_diffusion_pytorch as module

        module.tqdm = lambda values, **_: values  # its progress bar is not part of the comparison
        return partial(built().ddim_sample, tuple(x.shape))

    return Candidate(make, error, PARITY[FLOAT])


def peers(
    out: Annotated[Path, typer.Option(metavar="F.json", help="where the records go")],
    run: Annotated[Path | None, typer.Option(help="a trained run instead of seeded random weights")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="batch sizes (repeat), default 1 8 32 64")] = None,
    steps: Annotated[int, typer.Option(min=1, help="sampling steps; must divide the schedule's T")] = STEPS,
    guided: Annotated[bool, typer.Option("--guidance", help="with classifier-free guidance, w = 2")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="interleaved rounds of everything")] = ROUNDS,
) -> int:
    """Measure other libraries' sampling loops, torch.compile and our engines on the same network; parity first."""
    if not out.parent.is_dir() or out.is_dir():
        raise BadInput(f"--out: {out} cannot be written, needs a file in a folder that exists")
    try:
        import diffusers  # noqa: F401
    except ModuleNotFoundError as error:
        raise BadInput(f"peers: found no {error.name}, needs the extra: pip install 'fused-ddpm[peers]'") from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    guidance = GUIDANCE if guided else 1.0
    opened = _opened(run, guidance)
    timesteps = TIMESTEPS if opened is None else opened.schedule.timesteps
    if timesteps % steps:
        raise BadInput(f"--steps: got {steps}, needs a divisor of T = {timesteps}")
    theirs = _gaussian_diffusion()
    skipped = {"denoising-diffusion-pytorch": theirs} if isinstance(theirs, str) else {}
    for reason in skipped.values():
        print(f"note: {reason}", file=sys.stderr)
    ceiling, records = matrix_ceiling(device), []
    workloads = [
        Workload(
            f"peers/{solver}{steps}{'/guided' if guided else ''}/batch{size}",
            "peers",
            partial(_build, opened, solver, steps, size, guidance),
        )
        for size in batch or BATCHES
        for solver in SOLVERS
    ]
    with Bar("peers", len(workloads), "workloads/s") as bar:
        for done, workload in enumerate(workloads, start=1):
            records += measure(workload, device, rounds, float("inf"), ceiling)
            bar.update(done, workload.name)
    content = store.content_of(
        [{"process": 0} | record for record in records],
        describe(device),
        skipped,
        seed=SEED,
        suite="peers",
        quick=False,
        filter="",
        processes=1,
        product_flops_per_s=ceiling,
    )
    write_json(out, content)
    run_table(content)
    print(f"wrote {out}")
    return 0 if content["parity"] and not content["failed"] else FAILED
