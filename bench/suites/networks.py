"""The network that the suites share, with random weights, how it is sampled and judged, and what networks cost.

Suite `networks` is here too: other networks, each through every engine, beside its own eager.
"""

import copy
import math
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.registry import Bench, Candidate, Workload
from bench.timing import Call
from ddpm import ContextUnet, NoiseSchedule, PointMLP, SimpleUNet, StepTable, Trajectory, Unet, make_table
from ddpm.engines import competitors
from ddpm.extras import lacks
from ddpm.inference import form_of
from ddpm.metrics import ENGINE_TOLERANCE, engine_error
from ddpm.networks import UNet2D, condition_shape, network_times, sample_shape
from ddpm.networks.protocol import in_type
from ddpm.noise import PhiloxNoise
from kernels.backend import Cost
from kernels.philox import Stream

SEED = 7
AUTOTUNE = "max-autotune"  # mode of torch.compile, and candidate of the suites on CUDA
CHANNELS, SIDE, N_FEAT, CLASSES = 3, 16, 64, 5
NETWORK = f"ContextUnet with {N_FEAT} features, {CHANNELS}x{SIDE}x{SIDE} images"
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TIMESTEPS = 500
SCHEDULE = NoiseSchedule.make("linear", TIMESTEPS)
# What `metrics.engine_error` may be. On 50 rows of ddpm at batch 1 (these weights, CPU): 4e-7, 1.7e-3 in bfloat16,
# 1.8e-4 in float16.
PARITY = {torch.float32: ENGINE_TOLERANCE, torch.bfloat16: 5e-2, torch.float16: 5e-3}
# The threads of OpenMP (PyTorch) and of other runtimes spin after a call, on the time of what is measured next:
# libgomp's 300,000 pauses last 17 ms on this kind of processor. ONNX Runtime in int8 at batch 32 took 26.6 ms without a
# rest, 25.9 alone.
REST_S = 0.05
# Suite `networks`, of 3x32x32 images but for the points' one: name -> network, and the package that it needs.
UNET = {"dim": 64, "dim_mults": (1, 2, 4)}
BLOCKS = {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
UNET2D = {"block_out_channels": [32, 64], "layers_per_block": 1, "norm_num_groups": 8, **BLOCKS}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "simple_unet": lambda: SimpleUNet(3, height=32),
    "unet": lambda: Unet(**UNET, image_size=32),
    "unet2d": lambda: UNet2D(sample_size=32, **UNET2D),
    "mlp": PointMLP,
}
NEEDS = {"unet2d": "diffusers"}


def network(device: torch.device, side: int | tuple[int, int] = SIDE) -> ContextUnet:
    """A ContextUnet for images of this side, or (height, width), in eval mode; the same weights every time."""
    return _seeded(lambda: ContextUnet(CHANNELS, N_FEAT, CLASSES, side), device)


def _seeded(make: Callable[[], nn.Module], device: torch.device) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return make().eval().to(device)


def other(name: str, device: torch.device) -> nn.Module:
    """A network of OTHERS in eval mode; the same weights every time."""
    return _seeded(OTHERS[name], device)


def contexts(batch: int, device: torch.device) -> Tensor:
    """One-hot float32 [batch, 5], the classes in turn."""
    return torch.eye(CLASSES, device=device)[torch.arange(batch, device=device) % CLASSES]


def initial(model: nn.Module, batch: int, device: torch.device) -> Tensor:
    """x_T, float32 [batch, *shape of the model's samples]."""
    return PhiloxNoise(SEED)(torch.arange(batch, device=device), 0, Stream.INITIAL, sample_shape(model))


def sampling_call(
    model: nn.Module, table: StepTable, batch: int, guidance: float = 1.0, engine: str = "eager", **how: Any
) -> Call:
    """A function that runs the table on a shared network, prepared as far as can be. how: as `Trajectory` takes it."""
    device = next(model.parameters()).device
    prepared = Trajectory(model, SCHEDULE, table, engine=engine, guided=guidance != 1.0, **how)
    x, context = initial(model, batch, device), None if condition_shape(model) is None else contexts(batch, device)
    return partial(prepared, batch, context, guidance, SEED, batch_size=batch, x_T=x)


def judged(
    expected: Callable[[], Tensor], makes: Mapping[str, Callable[[], Call]], dtype: torch.dtype = torch.float32
) -> dict[str, Candidate]:
    """Candidates that must draw, up to the rounding of a type, what `expected` draws, which is computed once."""
    once = cache(expected)
    return {
        name: Candidate(make, lambda call: engine_error(call(), once(), dtype), PARITY[dtype])
        for name, make in makes.items()
    }


def flops_of(model: nn.Module) -> float:
    """Floating-point operations of one sample in one call, counted by PyTorch (convolutions and matrix products)."""
    t = in_type(network_times(model, torch.ones(1, dtype=torch.int64), 1)).to("meta")
    condition = condition_shape(model)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        context = None if condition is None else torch.empty(1, *condition)
        copy.deepcopy(model).to("meta").eval()(torch.empty(1, *sample_shape(model)), t, context)
    return float(counter.get_total_flops())


def sampling_cost(
    model: nn.Module, batch: int, steps: int = 1, guidance: float = 1.0, dtype: torch.dtype = torch.float32
) -> Cost:
    """Of so many steps, guidance evaluates the network twice; bytes are the least that a step can move: weights of a
    type are read once, the float32 state is read and written.
    """
    weights = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    evaluations = steps * batch * (1 if guidance == 1.0 else 2)
    return Cost(steps * (weights + 2 * 4 * batch * math.prod(sample_shape(model))), evaluations * flops_of(model))


def _build(name: str, steps: int, batch: int, device: torch.device) -> Bench:
    model = other(name, device)
    call = partial(sampling_call, model, make_table(SCHEDULE, "ddim", steps), batch)
    eager, makes = call(), {engine: partial(call, engine=engine) for engine in competitors(device, form=form_of(model))}
    return Bench([()], eager, judged(eager, makes), sampling_cost(model, batch, steps), calls=steps, images=batch)


def unavailable() -> dict[str, str]:
    """Networks that this installation cannot make, and why."""
    return {name: f"suite networks: {lacks(package)}" for name, package in NEEDS.items() if find_spec(package) is None}


def workloads(quick: bool) -> list[Workload]:
    """Network x batch, of those that can be made here."""
    steps, batches = (2, (1,)) if quick else (10, (1, 8, 32))
    lacking = unavailable()
    return [
        Workload(f"networks/{name}/ddim{steps}/batch{batch}", "networks", partial(_build, name, steps, batch))
        for name in OTHERS
        if name not in lacking
        for batch in batches
    ]
