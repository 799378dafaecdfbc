"""The form with one C++ kernel per convolution computes what the network does, and calls nothing else."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm.inference import NATIVE, ContextUnetForm, Layout, SimpleUNetForm, at
from ddpm.metrics import distance
from ddpm.networks import SimpleUNet
from kernels import native
from kernels.convolution import SOURCE

TOLERANCE = 2e-5
VIEWS = {"view", "_unsafe_view", "alias", "slice", "select", "unsqueeze", "expand", "as_strided", "t", "permute"}
pytestmark = pytest.mark.skipif(native.missing(SOURCE) is not None, reason=str(native.missing(SOURCE)))


class Calls(TorchDispatchMode):
    """The names of what is dispatched, but views and the making of outputs."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        if name not in VIEWS and not name.startswith(("empty", "new_empty")):
            self.names.append(name)
        return func(*args, **kwargs or {})


def inputs(form, x, guided, conditioned=True):
    condition = torch.eye(5)[torch.arange(len(x)) % 5] if form.n_cfeat and conditioned else None
    tables = form.tables(torch.tensor([0.25, 0.5]))
    return at(tables, torch.tensor([1])), form.rows(condition, len(x), guided)


SHAPES = [
    pytest.param({"n_feat": 32, "height": 16, "in_channels": 3}, True, 3, id="winograd, guided"),
    pytest.param({"n_feat": 32, "height": (8, 12), "in_channels": 3}, False, 1, id="winograd, batch 1"),
    pytest.param({"n_feat": 8, "height": (8, 4), "in_channels": 1}, True, 2, id="narrow"),
    pytest.param({"n_feat": 24, "height": 8, "n_cfeat": 0, "in_channels": 24}, False, 2, id="identity shortcut"),
    pytest.param({"n_feat": 32, "height": 16, "multipliers": (1, 2, 2)}, False, 2, id="three levels"),
]


@pytest.mark.parametrize(("shape", "guided", "n"), SHAPES)
def test_a_context_unet_is_calls_of_our_operators(unet, shape, guided, n):
    model = unet(**shape)
    x = torch.randn(n, *model.sample_shape)
    exact = ContextUnetForm(model, torch.float64, Layout(channels_last=False))
    form = ContextUnetForm(model, torch.float32, NATIVE)
    laid, given = x.contiguous(memory_format=torch.channels_last), inputs(form, x, guided)
    with torch.no_grad():
        expected = exact(x.double(), *inputs(exact, x, guided))
        with Calls() as calls:
            actual = form(laid, *given)
    assert distance(actual, expected) <= TOLERANCE
    # Packed weights go to C++ by themselves; the others are registered.
    assert calls.names == ["bottleneck", "group_norm_relu"]


SIMPLE = [
    pytest.param({"n_feat": 32, "n_cfeat": 5, "height": 28}, True, 2, id="padded, guided"),
    pytest.param({"n_feat": 32, "n_cfeat": 5, "height": (10, 13), "multipliers": (1, 2)}, False, 3, id="conditional"),
    pytest.param({"n_feat": 8, "height": 16}, False, 1, id="unconditional, narrow"),
]


@pytest.mark.parametrize(("options", "guided", "n"), SIMPLE)
def test_a_simple_unet_is_calls_of_our_operators(options, guided, n):
    torch.manual_seed(0)
    model = SimpleUNet(3, **options).eval()
    x = torch.randn(n, *model.sample_shape)
    exact = SimpleUNetForm(model, torch.float64, Layout(channels_last=False))
    form = SimpleUNetForm(model, torch.float32, NATIVE)
    laid, given = x.contiguous(memory_format=torch.channels_last), inputs(form, x, guided)
    with torch.no_grad():
        expected = exact(x.double(), *inputs(exact, x, guided))
        with Calls() as calls:
            actual = form(laid, *given)
    assert distance(actual, expected) <= TOLERANCE
    assert calls.names == ["group_norm_relu"]
