"""Suite `export`: ONNX Runtime beside PyTorch, both on the CPU with PyTorch's number of threads.

`denoiser` is one network call, in fp32 and int8; `sampler` is a whole trajectory: sampler.onnx, and the Python loop
around denoiser.onnx (NumPy noise and solver) that it replaces.
"""

import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from bench.registry import Bench, Candidate, Workload
from bench.suites.networks import (
    CHANNELS,
    CLASSES,
    PARITY,
    SEED,
    SIDE,
    TIMESTEPS,
    contexts,
    forward_flops,
    network,
    step_bytes,
)
from ddpm import NoiseSchedule, Run, StepTable, Trajectory, make_table
from ddpm.metrics import CALL_TOLERANCE, distance, engine_error, relative_l2
from ddpm.networks import network_times
from ddpm.networks.protocol import in_type
from ddpm.runs import make_config
from export import models, run
from export.precision import in_precision
from export.traced import Traced, trace
from kernels.backend import Cost

BATCHES, QUICK_BATCHES = (1, 8, 32), (1,)
SAMPLERS, QUICK_SAMPLERS = ((20, 8),), ((4, 2),)  # ddpm steps, images
# Relative L2, of random weights; a trained run is judged by `ddpm-export onnx`. Below 0.15 with VNNI; 0.17 on a CPU
# with AVX2 alone, where pairs of products saturate at 16 bits.
INT8_TOLERANCE = 0.2
# The threads of OpenMP (PyTorch) and of onnxruntime spin after a call, on the time of what is measured next: libgomp's
# 300,000 pauses last 17 ms on this kind of processor. int8 at batch 32 took 26.6 ms without a rest, 25.9 alone.
REST_S = 0.05
METADATA = {
    "format_version": run.FORMAT_VERSION,
    "channels": CHANNELS,
    "height": SIDE,
    "width": SIDE,
    "condition_shape": [CLASSES],
    "noise": "philox",
}


@cache
def _traced(precision: str) -> Traced:
    model, schedule = network(torch.device("cpu")), NoiseSchedule.make("linear", TIMESTEPS)
    opened = Run(Path(), make_config(model, schedule, "eps", sampling={"clip": 1.0}), model, schedule)
    return in_precision(trace(model), precision, opened)


def _session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """A session as users open it, from a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        return run.open_session(path, threads=torch.get_num_threads())


def _denoiser(precision: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    model = network(torch.device("cpu"))
    session = _session(models.denoiser(model, _traced(precision), "{}"))

    def call(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        feeds = {"x": x.numpy(), "t": t.numpy(), "context": context.numpy()}
        return torch.from_numpy(session.run(["m"], feeds)[0])

    return call


def _build_denoiser(batch: int, device: torch.device) -> Bench:
    model = network(device)
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(batch, CHANNELS, SIDE, SIDE, generator=generator)
    steps = torch.randint(1, TIMESTEPS + 1, (batch,), generator=generator)
    inputs = (x, in_type(network_times(model, steps, TIMESTEPS)), contexts(batch, device))

    @torch.inference_mode()
    def eager(*arguments: Tensor) -> Tensor:
        return model(*arguments)

    def exact(call: Callable[..., Tensor]) -> float:
        return distance(call(*inputs), eager(*inputs))

    candidates = {
        "onnx": Candidate(partial(_denoiser, "fp32"), exact, CALL_TOLERANCE),
        "onnx-int8": Candidate(
            partial(_denoiser, "int8"), lambda call: relative_l2(call(*inputs), eager(*inputs)), INT8_TOLERANCE
        ),
    }
    cost = Cost(step_bytes(model, batch, torch.float32), batch * forward_flops())
    return Bench([inputs], eager, candidates, cost, images=batch, rest_s=REST_S)


def _loop(table: StepTable, context: np.ndarray) -> Callable[[], Tensor]:
    """The loop that users write around denoiser.onnx."""
    model = network(torch.device("cpu"))
    session = _session(models.denoiser(model, _traced("fp32"), "{}"))
    rows, samples = table.rows().numpy(), np.arange(len(context))
    times = in_type(network_times(model, table.timesteps, TIMESTEPS)).numpy()
    shape = (CHANNELS, SIDE, SIDE)

    def call() -> Tensor:
        x = run.normals(SEED, samples, 0, 0, shape)
        x0 = np.zeros_like(x)
        for time, (c0, c1, c2, c3, c4, c5, c6, step) in zip(times, rows, strict=True):
            (m,) = session.run(["m"], {"x": x, "t": time.repeat(len(x)), "context": context})
            memory, x0 = x0, c0 * x + c1 * m
            if table.clip is not None:
                x0 = x0.clip(-table.clip, table.clip)
            x = c2 * x + c3 * x0 + c4 * m + c5 * memory
            if c6 != 0:
                x = x + c6 * run.normals(SEED, samples, int(step), 1, shape)
        return torch.from_numpy(x)

    return call


def _sampler(table: StepTable, context: np.ndarray) -> Callable[[], Tensor]:
    model = network(torch.device("cpu"))
    session = _session(models.sampler(model, _traced("fp32"), table, TIMESTEPS, "philox", "{}"))
    samples = np.arange(len(context))
    return lambda: torch.from_numpy(run.draw(session, METADATA, samples, context, seed=SEED))


def _build_sampler(steps: int, n: int, device: torch.device) -> Bench:
    model, schedule = network(device), NoiseSchedule.make("linear", TIMESTEPS)
    context, table = contexts(n, device), make_table(schedule, "ddpm", steps, clip=1.0)
    eager = partial(Trajectory(model, schedule, table, engine="eager"), n, context, seed=SEED)
    expected = cache(eager)
    candidates = {
        name: Candidate(
            partial(make, table, context.numpy()),
            lambda call: engine_error(call(), expected(), torch.float32),
            PARITY[torch.float32],
        )
        for name, make in (("sampler.onnx", _sampler), ("python-loop", _loop))
    }
    cost = Cost(steps * step_bytes(model, n, torch.float32), steps * n * forward_flops())
    return Bench([()], eager, candidates, cost, calls=steps, images=n, rest_s=REST_S)


def workloads(quick: bool) -> list[Workload]:
    """The denoiser by batch, the sampler by steps and images; none on a GPU."""
    on_cpu = [
        Workload(f"export/denoiser/batch{batch}", "export", partial(_build_denoiser, batch))
        for batch in (QUICK_BATCHES if quick else BATCHES)
    ]
    return on_cpu + [
        Workload(f"export/sampler/ddpm{steps}/n{n}", "export", partial(_build_sampler, steps, n))
        for steps, n in (QUICK_SAMPLERS if quick else SAMPLERS)
    ]
