"""The form with one kernel per convolution computes what the network does, in each type that runs on it."""

import sys

import pytest
import torch

from ddpm.inference import KERNELS, ContextUnetForm, Layout, at
from ddpm.metrics import distance
from kernels.backend import recording

# What 22 convolutions in a row leave of a type, n_feat 8: measured 6e-7 and 3e-3; bfloat16 has 8 times less.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
SMALL = {"height": (8, 4), "in_channels": 1}
PLAIN = {"height": (4, 12), "n_cfeat": 0, "in_channels": 8}  # its shortcut is the identity
WAYS = [
    pytest.param(SMALL, True, torch.float16, id="guided, float16"),
    pytest.param(SMALL, True, torch.bfloat16, id="guided, bfloat16"),
    pytest.param(PLAIN, False, torch.float16, id="unconditional, float16"),
    pytest.param(PLAIN, False, torch.float32, id="unconditional, float32"),
]


def output(form, x, guided):
    context = torch.eye(5, device=x.device)[torch.arange(len(x)) % 5] if form.n_cfeat else None
    tables, rows = form.tables(torch.tensor([0.25, 0.5], device=x.device)), form.rows(context, len(x), guided)
    with torch.no_grad():
        return form(x, at(tables, torch.tensor([1], device=x.device)), rows)


@pytest.mark.parametrize(("shape", "guided", "dtype"), WAYS)
def test_it_computes_what_the_network_does(unet, triton_device, monkeypatch, shape, guided, dtype):
    if dtype == torch.bfloat16 and triton_device.type == "cpu":
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 as integers")
    # Few large programs: the interpreter runs them one by one. (The function of this name hides the module.)
    monkeypatch.setattr(sys.modules["kernels.convolution"], "PROGRAMS", 1)
    with monkeypatch.context() as references:
        references.setattr("kernels.backend.INTERPRETED", False)
        model = unet(**shape)
        x = torch.randn(2, *model.sample_shape)
        expected = output(ContextUnetForm(model, torch.float64, Layout(channels_last=False)), x.double(), guided)
    form = ContextUnetForm(model.to(triton_device), dtype, KERNELS)
    actual = output(form, x.to(triton_device), guided)
    assert actual.dtype == dtype
    assert distance(actual, expected) <= TOLERANCES[dtype]


@pytest.mark.parametrize(("shape", "launches"), [({"n_feat": 16}, 25), ({"height": 64}, 34)])
def test_a_call_is_few_launches(unet, shape, launches):
    model = unet(**shape)
    form, x = ContextUnetForm(model, torch.bfloat16, KERNELS), torch.randn(2, *model.sample_shape)
    with recording() as recorded:
        output(form, x, False)
    assert len(recorded) == launches


def test_changed_weights_reach_it(unet, triton_device):
    model = unet().to(triton_device)
    form = ContextUnetForm(model, torch.float32, KERNELS)
    before = {name: tensor.clone() for name, tensor in form.state_dict().items()}
    with torch.no_grad():
        model.up1.model[0].weight.mul_(2.0)
    form.refresh(model)
    fresh = ContextUnetForm(model, torch.float32, KERNELS).state_dict()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in form.state_dict().items())
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, fresh[name])}
    assert changed == {"upsamplings.0.of_x", "upsamplings.0.of_skip"}
