"""Suite `export`: ONNX Runtime beside PyTorch, both on the CPU with PyTorch's number of threads.

`denoiser` is one network call, in fp32 and int8; `sampler` is a whole trajectory: sampler.onnx, and what it replaces, a
Python loop (that of the eager engine) around denoiser.onnx.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from bench.registry import Bench, Candidate, Workload
from bench.suites.networks import (
    CHANNELS,
    CLASSES,
    REST_S,
    SCHEDULE,
    SEED,
    SIDE,
    TIMESTEPS,
    contexts,
    judged,
    network,
    sampling_call,
    sampling_cost,
)
from bench.timing import Call
from ddpm import Run, StepTable, make_table
from ddpm.metrics import CALL_TOLERANCE, distance, relative_l2
from ddpm.networks import network_times
from ddpm.networks.protocol import in_type
from ddpm.runs import make_config
from export import models, run
from export.precision import in_precision
from export.traced import Traced, trace

BATCHES, QUICK_BATCHES = (1, 8, 32), (1,)
SAMPLERS, QUICK_SAMPLERS = ((20, 8),), ((4, 2),)  # ddpm steps, images
# Relative L2, of random weights; a trained run is judged by `ddpm-export onnx`. Below 0.15 with VNNI; 0.17 on a CPU
# with AVX2 alone, where pairs of products saturate at 16 bits.
INT8_TOLERANCE = 0.2
METADATA = {
    "format_version": run.FORMAT_VERSION,
    "channels": CHANNELS,
    "height": SIDE,
    "width": SIDE,
    "condition_shape": [CLASSES],
    "noise": "philox",
}
CPU = torch.device("cpu")


@cache
def _traced(precision: str) -> Traced:
    model = network(CPU)
    opened = Run(Path(), make_config(model, SCHEDULE, "eps", sampling={"clip": 1.0}), model, SCHEDULE)
    return in_precision(trace(model), precision, opened)


@contextmanager
def _as_file(model: onnx.ModelProto) -> Iterator[Path]:
    """A file, as users open it; it is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        yield path


def _denoiser(precision: str) -> onnx.ModelProto:
    """What `ddpm-export onnx` writes to denoiser.onnx."""
    return models.denoiser(network(CPU), _traced(precision), "{}")


def _session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    with _as_file(model) as path:
        return run.open_session(path, threads=torch.get_num_threads())


NetworkCall = Callable[[Tensor, Tensor, Tensor], Tensor]


def _on_arrays(compute: Callable[[dict[str, np.ndarray]], np.ndarray]) -> NetworkCall:
    """(x, t, context) -> m, all on the CPU, by a function of denoiser.onnx's inputs."""
    return lambda x, t, context: torch.from_numpy(compute({"x": x.numpy(), "t": t.numpy(), "context": context.numpy()}))


def denoiser_call(precision: str = "fp32") -> NetworkCall:
    """The network in ONNX Runtime."""
    session = _session(_denoiser(precision))
    return _on_arrays(lambda feeds: session.run(["m"], feeds)[0])


def openvino_call() -> NetworkCall:
    """The network in OpenVINO: float32, as it may take bfloat16 by itself, and PyTorch's number of threads."""
    import openvino

    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    with _as_file(_denoiser("fp32")) as path:
        compiled = openvino.Core().compile_model(path, "CPU", options)
    return _on_arrays(lambda feeds: compiled(feeds)["m"].copy())  # the next call writes to the same memory


def elsewhere(call: NetworkCall) -> nn.Module:
    """The shared network to those who ask it for shapes, computed by a call of another runtime."""
    model = network(CPU)
    model.forward = call
    return model


def _build_denoiser(batch: int, device: torch.device) -> Bench:
    model = network(device)
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(batch, CHANNELS, SIDE, SIDE, generator=generator)
    steps = torch.randint(1, TIMESTEPS + 1, (batch,), generator=generator)
    inputs = (x, in_type(network_times(model, steps, TIMESTEPS)), contexts(batch, device))

    @torch.inference_mode()
    def eager(*arguments: Tensor) -> Tensor:
        return model(*arguments)

    def candidate(precision: str, error: Callable[[Tensor, Tensor], float], tolerance: float) -> Candidate:
        make = partial(denoiser_call, precision)
        return Candidate(make, lambda call: error(call(*inputs), eager(*inputs)), tolerance)

    candidates = {
        "onnx": candidate("fp32", distance, CALL_TOLERANCE),
        "onnx-int8": candidate("int8", relative_l2, INT8_TOLERANCE),
    }
    return Bench([inputs], eager, candidates, sampling_cost(model, batch), images=batch, rest_s=REST_S)


def _sampler(table: StepTable, context: np.ndarray) -> Call:
    session = _session(models.sampler(network(CPU), _traced("fp32"), table, TIMESTEPS, "philox", "{}"))
    samples = np.arange(len(context))
    return lambda: torch.from_numpy(run.draw(session, METADATA, samples, context, seed=SEED))


def _build_sampler(steps: int, n: int, device: torch.device) -> Bench:
    model, table = network(device), make_table(SCHEDULE, "ddpm", steps, clip=1.0)
    makes = {
        "sampler.onnx": partial(_sampler, table, contexts(n, device).numpy()),
        "python-loop": lambda: sampling_call(elsewhere(denoiser_call()), table, n),
    }
    eager = sampling_call(model, table, n)
    cost = sampling_cost(model, n, steps)
    return Bench([()], eager, judged(eager, makes), cost, calls=steps, images=n, rest_s=REST_S)


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
