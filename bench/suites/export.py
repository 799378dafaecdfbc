"""Suite `export`: ONNX Runtime beside PyTorch, both on the CPU with PyTorch's number of threads.

`denoiser` is one network call, in fp32 and int8; `sampler` is a whole trajectory: sampler.onnx, and what it replaces, a
Python loop (that of the eager engine) around denoiser.onnx.
"""

import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from bench.registry import Bench, Candidate, Workload
from bench.suites import networks
from bench.suites.networks import REST_S, SCHEDULE, SEED, TIMESTEPS, contexts, network, sampling_call, sampling_cost
from bench.timing import Call
from ddpm import Run, StepTable, make_table
from ddpm.metrics import CALL_TOLERANCE, distance, relative_l2
from ddpm.networks import network_times
from ddpm.networks.protocol import in_type
from ddpm.runs import make_config
from export import models, run
from export.precision import in_precision
from export.traced import Traced, trace

# Relative L2, of random weights; a trained run is judged by `ddpm-export onnx`. Below 0.15 with VNNI; 0.17 on a CPU
# with AVX2 alone, where pairs of products saturate at 16 bits.
INT8_TOLERANCE = 0.2
CPU = torch.device("cpu")
NetworkCall = Callable[[Tensor, Tensor, Tensor], Tensor]


@cache
def _traced(precision: str) -> Traced:
    model = network(CPU)
    opened = Run(Path(), make_config(model, SCHEDULE, "eps", sampling={"clip": 1.0}), model, SCHEDULE)
    return in_precision(trace(model), precision, opened)


def _denoiser(precision: str) -> onnx.ModelProto:
    """What `ddpm-export onnx` writes to denoiser.onnx."""
    return models.denoiser(network(CPU), _traced(precision), "{}")


def _session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """Of a file, as users open it; it is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        return run.open_session(path, threads=torch.get_num_threads())


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
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(_denoiser("fp32").SerializeToString()), "CPU", options)
    return _on_arrays(lambda feeds: compiled(feeds)["m"].copy())  # the next call writes to the same memory


def elsewhere(call: NetworkCall) -> nn.Module:
    """The shared network to those who ask it for shapes, computed by a call of another runtime."""
    model = network(CPU)
    model.forward = call
    return model


def _build_denoiser(batch: int, device: torch.device) -> Bench:
    model = network(device)
    steps = torch.randint(1, TIMESTEPS + 1, (batch,), generator=torch.Generator().manual_seed(SEED))
    times = in_type(network_times(model, steps, TIMESTEPS))
    inputs = (networks.initial(model, batch, device), times, contexts(batch, device))
    eager = torch.inference_mode()(model.forward)

    def candidate(precision: str, error: Callable[[Tensor, Tensor], float], tolerance: float) -> Candidate:
        make = partial(denoiser_call, precision)
        return Candidate(make, lambda call: error(call(*inputs), eager(*inputs)), tolerance)

    candidates = {
        "onnx": candidate("fp32", distance, CALL_TOLERANCE),
        "onnx-int8": candidate("int8", relative_l2, INT8_TOLERANCE),
    }
    return Bench([inputs], eager, candidates, sampling_cost(model, batch), images=batch, rest_s=REST_S)


def _sampler(table: StepTable, n: int) -> Call:
    session = _session(models.sampler(network(CPU), _traced("fp32"), table, TIMESTEPS, "philox", "{}"))
    numbers = {"guidance": np.float32(1), "seed": np.int64(SEED), "first_sample": np.int64(0)}
    feeds = {"context": contexts(n, CPU).numpy()} | {name: np.asarray(value) for name, value in numbers.items()}
    return lambda: torch.from_numpy(session.run(["images"], feeds)[0])


def _build_sampler(steps: int, n: int, device: torch.device) -> Bench:
    model, table = network(device), make_table(SCHEDULE, "ddpm", steps, clip=1.0)
    makes = {
        "sampler.onnx": partial(_sampler, table, n),
        "python-loop": lambda: sampling_call(elsewhere(denoiser_call()), table, n),
    }
    eager, cost = sampling_call(model, table, n), sampling_cost(model, n, steps)
    return Bench([()], eager, networks.judged(eager, makes), cost, calls=steps, images=n, rest_s=REST_S)


def workloads(quick: bool) -> list[Workload]:
    """The denoiser by batch, the sampler by ddpm steps and images."""
    steps, n = (4, 2) if quick else (20, 8)
    built = {f"denoiser/batch{batch}": partial(_build_denoiser, batch) for batch in ((1,) if quick else (1, 8, 32))}
    built[f"sampler/ddpm{steps}/n{n}"] = partial(_build_sampler, steps, n)
    return [Workload(f"export/{name}", "export", build) for name, build in built.items()]
