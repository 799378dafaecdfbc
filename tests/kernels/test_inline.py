"""Where an operator of the network's inference form is the registered operator, and where its reference inline."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.export import Dim, export
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import backend, bottleneck, convolution, group_norm_relu, native
from kernels.convolution import SOURCE

OPERATORS = ("convolution", "bottleneck", "group_norm_relu")


class Network(nn.Module):
    """Every operator, as a U-Net calls them under guidance: k copies share the images x [n, 8, 4, 4]."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {
            "weight": (8, 8, 3, 3),
            "skip_weight": (8, 8, 3, 3),
            "spread_weight": (32, 8, 1, 1),
            "up_weight": (8, 8, 4, 4),
            **dict.fromkeys(("bias", "gain", "offset"), (8,)),
            "shift": (1, 8),
        }
        for name, shape in shapes.items():
            self.register_buffer(name, torch.randn(shape, generator=generator) / 4)

    def forward(self, x, scale):
        """x: [n, 8, 4, 4]; scale: [k, n, 8]."""
        x = convolution(x, self.weight, self.bias, onto=x, gelu=True, kernel=True)
        y = bottleneck(x, self.up_weight, self.bias, self.gain, self.offset, scale, self.shift)
        film = {"film_scale": scale.flatten(0, 1), "film_shift": self.shift}
        y = convolution(y, self.weight, self.bias, skip=x, skip_weight=self.skip_weight, **film, kernel=True)
        y = convolution(y, self.spread_weight, then="spread", kernel=True)
        y = convolution(y, self.weight, then="pool", kernel=True)
        return group_norm_relu(y, self.gain, self.offset)


class SharedSkip(nn.Module):
    """A convolution over copies that are made here, of y [n, C, h, w] by scale [k, n, C]."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.randn(2, 8, 8, 3, 3, generator=torch.Generator().manual_seed(1)))

    def forward(self, y, scale):
        x = (scale[..., None, None] * y[None]).flatten(0, 1)
        return convolution(x, self.weight[0], skip=y, skip_weight=self.weight[1], film_scale=scale.flatten(0, 1))


def arguments(k, n, layout=torch.channels_last, device="cpu"):
    generator = torch.Generator().manual_seed(10 * k + n)
    x, scale = torch.randn(n, 8, 4, 4, generator=generator), torch.randn(k, n, 8, generator=generator)
    return x.contiguous(memory_format=layout).to(device), scale.to(device)


class Dispatched(TorchDispatchMode):
    """Collects the names of our operators that are dispatched."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fused_ddpm":
            self.names.add(func._opname)
        return func(*args, **kwargs or {})


def dispatched(*given):
    with Dispatched() as seen, torch.no_grad():
        Network().to(given[0].device)(*given)
    return seen.names


def compiled_for(*given):
    """The code that torch.compile traces."""
    torch._dynamo.reset()
    graphs = []

    def keep(graph, _):
        graphs.append(graph.code)
        return graph.forward

    torch.compile(Network().to(given[0].device), backend=keep, fullgraph=True)(*given)
    torch._dynamo.reset()
    (code,) = graphs
    return code


def test_without_a_kernel_nothing_of_ours_is_dispatched(monkeypatch):
    monkeypatch.setattr("kernels.native.missing", lambda source: "a compiler")
    assert dispatched(*arguments(2, 3)) == set()


@pytest.mark.skipif(native.missing(SOURCE) is not None, reason=str(native.missing(SOURCE)))
def test_a_kernel_in_cpp_is_dispatched():
    assert dispatched(*arguments(2, 3)) == set(OPERATORS)


def test_a_kernel_is_dispatched(triton_device):
    assert dispatched(*arguments(2, 3, device=triton_device)) == set(OPERATORS)


def test_without_a_kernel_torch_compile_sees_the_references():
    assert "fused_ddpm" not in compiled_for(*arguments(2, 3))


@pytest.mark.long
def test_with_a_kernel_torch_compile_sees_the_operators(triton_device):
    code = compiled_for(*arguments(2, 3, device=triton_device))
    assert all(f"fused_ddpm.{name}" in code for name in OPERATORS)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("network", [Network, SharedSkip])
def test_an_exported_network_serves_every_batch_and_number_of_copies(network, layout, strict):
    network = network()
    n, k = Dim("n", min=1), Dim("k", min=1)
    program = export(network, arguments(2, 3, layout), dynamic_shapes=({0: n}, {0: k, 1: n}), strict=strict)
    assert "fused_ddpm" not in str(program.graph)
    for copies in (1, 2, 3):
        for batch in (1, 4):
            given = arguments(copies, batch, layout)
            torch.testing.assert_close(program.module()(*given), network(*given), atol=2e-5, rtol=0)


def test_where_a_kernel_runs_export_sees_the_references(triton_device):
    program = export(Network().to(triton_device), arguments(2, 3, device=triton_device))
    assert "fused_ddpm" not in str(program.graph)


def test_cuda_without_triton_is_an_error_but_can_be_exported(monkeypatch):
    monkeypatch.setattr(backend, "triton", None)
    with pytest.raises(RuntimeError, match="CUDA tensors need Triton"):
        backend.is_opaque(SimpleNamespace(is_cuda=True))
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert not backend.is_opaque(SimpleNamespace(is_cuda=True))
