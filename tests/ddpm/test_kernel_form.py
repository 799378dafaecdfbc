"""The form with one kernel per convolution computes what the inference form does."""

import sys

import pytest
import torch

from ddpm import ContextUnet
from ddpm.inference import InferenceUnet
from ddpm.kernel_form import KernelUnet
from kernels.backend import recording


def unet(**shape):
    torch.manual_seed(0)
    model = ContextUnet(**({"in_channels": 3, "n_feat": 16, "n_cfeat": 5, "height": 16} | shape))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    model(torch.randn(8, *model.sample_shape), torch.rand(8), torch.rand(8, model.n_cfeat))
    return model.eval()


def output(form, x, guided):
    context = torch.eye(5, device=x.device)[torch.arange(len(x)) % 5] if form.n_cfeat else None
    conditions = form.conditions(torch.tensor([0.25, 0.5], device=x.device), context, len(x), guided)
    with torch.no_grad():
        return form(x, conditions.at(torch.tensor([1], device=x.device)), conditions.rows)


@pytest.mark.parametrize(("shape", "guided"), [({}, True), ({"n_cfeat": 0, "in_channels": 16, "n_feat": 16}, False)])
def test_it_computes_what_the_inference_form_does(triton_device, shape, guided, monkeypatch):
    # Few large programs: the interpreter runs them one by one. (The function of this name hides the module.)
    monkeypatch.setattr(sys.modules["kernels.convolution"], "PROGRAMS", 1)
    model = unet(**shape)
    x = torch.randn(2, *model.sample_shape)
    exact = InferenceUnet(model.double(), torch.float64, channels_last=False)
    with monkeypatch.context() as references:
        references.setattr("kernels.backend.INTERPRETED", False)
        expected = output(exact, x.double(), guided)
    actual = output(KernelUnet(model.float().to(triton_device), torch.float32), x.to(triton_device), guided).cpu()
    assert actual.shape == expected.shape
    assert (actual.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("shape", "launches"), [({}, 25), ({"height": 64, "n_feat": 8}, 34)])
def test_a_call_is_few_launches(shape, launches):
    model = unet(**shape)
    form, x = KernelUnet(model, torch.bfloat16), torch.randn(2, *model.sample_shape)
    with recording() as recorded:
        output(form, x, False)
    assert len(recorded) == launches


def test_changed_weights_reach_it(triton_device):
    model = unet().to(triton_device)
    form = KernelUnet(model, torch.float32)
    with torch.no_grad():
        model.up1.model[0].weight.mul_(2.0)
    form.refresh(model)
    fresh = KernelUnet(model, torch.float32)
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(form.state_dict()[name], tensor), name
