"""The eager reference, frozen: every ratio in this project is against it, so a slower reference is no speed-up.

One guided step is written down here operator by operator, as the design documents the network and the engine: NCHW,
float32, each module once. Whatever makes the reference do more, less, something else or in another layout fails here.
"""

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from ddpm import ContextUnet
from ddpm.engines.eager import EagerEngine
from ddpm.table import StepTable

CHANNELS, SIDE, N_FEAT, CLASSES, N = 3, 16, 64, 5, 2
BLOCK = ["conv2d", "batch_norm", "gelu"] * 2
EMBEDDING = ["to", "reshape", "linear", "gelu", "linear", "__getitem__"]
GATE = [*EMBEDDING, *EMBEDDING, "mul", "add"]
DOWN = [*BLOCK, *BLOCK, "max_pool2d"]
UP = ["cat", "conv_transpose2d", *BLOCK, *BLOCK]
NETWORK = [
    *BLOCK, "conv2d", "add", "div",  # init_conv with its 1x1 shortcut, divided by 1.414
    *DOWN, *DOWN,
    "avg_pool2d", "gelu", "conv_transpose2d", "group_norm", "relu",  # to_vec, up0
    *GATE, *UP, *GATE, *UP,
    "cat", "conv2d", "group_norm", "relu", "conv2d",  # out
]  # fmt: skip
# Once a run: the table's rows, cast once (they are the only float64), its noise steps and guidance scales as numbers,
# the null condition, and an x0 of zeros.
SETUP = ["__getitem__", "to", "cat", "to", "tolist", "tolist", "zeros", "to", "zeros_like"]
# Conditional and unconditional rows are one call; then m_uncond + w (m_cond - m_uncond) and the row of the table:
# c0 x + c1 m, c2 x + c3 x0 + c4 m + c5 x0_previous, and c6 z where there is noise.
BEFORE = ["cat", "cat", "full", "to", "to"]
GUIDE = ["to", "chunk", "sub", "mul", "add"]
UPDATE = ["__getitem__", "unbind", "mul", "mul", "add", "mul", "mul", "add", "mul", "add", "mul", "add"]
NOISE = ["mul", "add"]
NOISY_STEP = [*BEFORE, *NETWORK, *GUIDE, *UPDATE, *NOISE]
LAST_STEP = [*BEFORE, *NETWORK, *GUIDE, *UPDATE]
# Reading shapes and types: no work, and versions of PyTorch count it differently.
FREE = {"__get__", "dim", "numel", "size", "is_floating_point", "__len__"}


class Recorder(TorchFunctionMode):
    """The torch functions called, and those after SETUP that return anything but contiguous float32."""

    def __init__(self):
        super().__init__()
        self.calls, self.strange = [], []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.__name__ not in FREE:
            self.calls.append(function.__name__)
        tensors = [t for t in (result if isinstance(result, tuple | list) else (result,)) if isinstance(t, Tensor)]
        if len(self.calls) > len(SETUP):
            self.strange += [
                (function.__name__, tensor.dtype, tensor.stride())
                for tensor in tensors
                if not (tensor.is_contiguous() and tensor.dtype == torch.float32)
            ]
        return result


def network():
    torch.manual_seed(0)
    return ContextUnet(CHANNELS, N_FEAT, CLASSES, SIDE).eval()


def under(mode, model, engine=EagerEngine):
    """The mode, after it has seen a guided trajectory of two steps with given noise."""
    coefficients = torch.tensor([[0.9, -0.4, 0.5, 0.4, 0.1, 0.1, 0.2], [0.9, -0.4, 0.5, 0.4, 0.1, 0.1, 0.0]])
    table = StepTable(torch.tensor([9, 3]), coefficients.double())
    x, z = torch.randn(2, N, CHANNELS, SIDE, SIDE)
    built = engine(model, 10, table, torch.float32)
    samples, context = torch.arange(N), torch.eye(CLASSES)[:N]
    with torch.no_grad(), mode:
        built(x, samples, context, 2.0, lambda *_: z)
    return mode


def network_flops():
    """Multiplications and additions of one image, from the widths in the design alone."""

    def conv(side, inside, outside, kernel=3):
        return 2 * side**2 * kernel**2 * inside * outside

    def block(side, inside, outside):
        return conv(side, inside, outside) + conv(side, outside, outside)

    def transposed(side, inside, outside, kernel):  # side: of the input; kernel = stride
        return 2 * side**2 * kernel**2 * inside * outside

    def embedding(inside, outside):
        return 2 * (inside * outside + outside**2)

    f, side = N_FEAT, SIDE
    down = [(side, f, f), (side, f, f), (side // 2, f, 2 * f), (side // 2, 2 * f, 2 * f)]
    up = [(side // 2, f, f), (side // 2, f, f), (side, f, f), (side, f, f)]
    return (
        block(side, CHANNELS, f)
        + conv(side, CHANNELS, f, 1)
        + sum(block(*sizes) for sizes in (*down, *up))
        + transposed(1, 2 * f, 2 * f, side // 4)
        + transposed(side // 4, 4 * f, f, 2)
        + transposed(side // 2, 2 * f, f, 2)
        + sum(embedding(1, width) + embedding(CLASSES, width) for width in (2 * f, f))
        + conv(side, 2 * f, f)
        + conv(side, f, CHANNELS)
    )


def test_the_reference_calls_what_the_design_says_and_nothing_else():
    calls = under(Recorder(), network())
    assert calls.calls == [*SETUP, *NOISY_STEP, *LAST_STEP]


def test_everything_is_float32_in_nchw():
    calls = under(Recorder(), network())
    assert calls.strange == []


def test_it_multiplies_no_more_than_the_network_has():
    flops = under(FlopCounterMode(display=False), network())
    # Two steps, two halves of guidance.
    assert flops.get_total_flops() == 2 * 2 * N * network_flops()


def test_it_runs_the_module_that_it_was_given():
    model = network()
    table = StepTable(torch.tensor([1]), torch.zeros(1, 7, dtype=torch.float64))
    assert EagerEngine(model, 10, table, torch.float32).model is model


class Twice(ContextUnet):
    def forward(self, x, t, c=None):
        return (super().forward(x, t, c) + super().forward(x, t, c)) / 2


class Copying(EagerEngine):
    def _network(self, x, time, context):
        return super()._network(x.clone(), time, context)


class Repacking(EagerEngine):
    def _network(self, x, time, context):
        return super()._network(x.to(memory_format=torch.channels_last), time, context)


def slower(kind):
    """(network, engine) of a reference that someone has changed."""
    if kind == "twice":
        return Twice(CHANNELS, N_FEAT, CLASSES, SIDE).eval(), EagerEngine
    if kind == "unfused":
        model = network()
        model.out[2] = torch.nn.LeakyReLU(0.0)
        return model, EagerEngine
    return network(), {"copying": Copying, "repacking": Repacking}[kind]


@pytest.mark.parametrize("kind", ["twice", "unfused", "copying", "repacking"])
def test_a_changed_reference_is_noticed(kind):
    calls = under(Recorder(), *slower(kind))
    assert calls.calls != [*SETUP, *NOISY_STEP, *LAST_STEP]
    assert bool(calls.strange) == (kind == "repacking")
