"""The inference form: each of its steps is exact, and none outlives the weights it was made of."""

import copy

import pytest
import torch

from ddpm import ContextUnet, NoiseSchedule, PointMLP, sample
from ddpm.convolutions import Convolution
from ddpm.inference import InferenceUnet, PlainForm, fold_batch_norm, inference_form, release
from kernels.winograd import missing

SHAPES = {
    "16x16": {"in_channels": 3, "n_feat": 8, "n_cfeat": 5, "height": 16},
    "28x28 unconditional": {"in_channels": 1, "n_feat": 8, "n_cfeat": 0, "height": 28},
    "64x64": {"in_channels": 3, "n_feat": 8, "n_cfeat": 2, "height": 64},
    "identity shortcut": {"in_channels": 8, "n_feat": 8, "n_cfeat": 3, "height": 8},
    "other widths": {"in_channels": 3, "n_feat": 16, "n_cfeat": 3, "height": 16, "multipliers": (1, 3, 2)},
}
# Convolutions by `winograd`, which is for float32; 4 does not divide the deeper side of the second.
WIDE = {
    "32 channels": {"in_channels": 3, "n_feat": 32, "n_cfeat": 5, "height": 16},
    "32 channels, 28x28": {"in_channels": 3, "n_feat": 32, "n_cfeat": 5, "height": 28},
}


def lived_in(**shape):
    """A network whose BatchNorms have statistics and gains of their own."""
    torch.manual_seed(0)
    model = ContextUnet(**shape)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 2)
            torch.nn.init.normal_(module.bias)
    return model.eval()


def inputs(model, n, dtype):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, *model.sample_shape, generator=generator, dtype=dtype)
    return x, torch.rand(n, model.n_cfeat, generator=generator, dtype=dtype) if model.n_cfeat else None


def distance(actual, expected):
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1))


def outputs(form, x, context, times, guided):
    """[S, k * n, ...] of the form at every time."""
    conditions = form.conditions(times, context, x.shape[0], guided)
    with torch.no_grad():
        return torch.stack([form(x, conditions.at(torch.tensor([i])), conditions.rows) for i in range(len(times))])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_folding_batch_norm_changes_nothing_but_the_form(shape):
    model = lived_in(**shape).double()
    before = copy.deepcopy(model.state_dict())
    folded = fold_batch_norm(model)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    x, context = inputs(model, 2, torch.float64)
    with torch.no_grad():
        assert (
            distance(folded(x, torch.tensor([0.1, 0.9]), context), model(x, torch.tensor([0.1, 0.9]), context)) < 1e-12
        )
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.init_conv.conv1[1].training is False


@pytest.mark.parametrize(("channels_last", "shared"), [(True, True), (False, True), (False, False), (True, False)])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_form_is_the_network(shape, guided, channels_last, shared):
    model = lived_in(**shape).double()
    if guided and not model.n_cfeat:
        pytest.skip("guidance needs a context")
    x, context = inputs(model, 3, torch.float64)
    times = torch.tensor([1.0, 0.5, 0.002], dtype=torch.float64)
    form = InferenceUnet(model, torch.float64, channels_last, shared)
    actual = outputs(form, x, context, times, guided)
    contexts = [context, torch.zeros_like(context)] if guided else [context]
    for i, time in enumerate(times):
        with torch.no_grad():
            expected = torch.cat([model(x, time.expand(3), c) for c in contexts])
        assert distance(actual[i], expected) < 1e-12


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("shape", (SHAPES | WIDE).values(), ids=SHAPES | WIDE)
def test_packed_and_transformed_weights_stay_within_float32(shape, guided):
    model = lived_in(**shape)
    if guided and not model.n_cfeat:
        pytest.skip("guidance needs a context")
    x, context = inputs(model, 3, torch.float32)
    times, exact = torch.tensor([0.7]), copy.deepcopy(model).double()
    form = InferenceUnet(model, torch.float32)
    for _ in range(2):
        with torch.no_grad():
            contexts = [context, torch.zeros_like(context)] if guided else [context]
            expected = torch.cat([exact(x.double(), times.double().expand(3), c) for c in contexts])
            own = distance(torch.cat([model(x, times.expand(3), c) for c in contexts]), expected)
            assert distance(outputs(form, x, context, times, guided)[0], expected) < 4 * own + 1e-6
            # Once more with other weights in the same form.
            for parameter, double in zip(model.parameters(), exact.parameters(), strict=True):
                double.copy_(parameter.mul_(0.9))
        form.refresh(model)


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_convolutions_of_32_channels_and_more_multiply_less():
    form = inference_form(lived_in(**WIDE["32 channels"]), torch.float32)
    convolutions = [module for module in form.modules() if isinstance(module, Convolution)]
    others = [module.weight.shape for module in convolutions if not module.transformed]
    assert len(convolutions) == 22
    assert len(others) == 3  # 3 to 32 channels, the shortcut, 32 to 3


def test_without_a_compiler_convolutions_are_the_librarys_and_it_is_said(monkeypatch, caplog):
    for module in ("inference", "convolutions"):
        monkeypatch.setattr(f"ddpm.{module}.missing", lambda: "no compiler")
    model = lived_in(**WIDE["32 channels"])
    with caplog.at_level("INFO", "ddpm"):
        form = inference_form(model, torch.float32)
    assert "about a third as fast as the operator winograd: no compiler" in caplog.text
    assert not any(module.transformed for module in form.modules() if isinstance(module, Convolution))
    x, context = inputs(model, 2, torch.float32)
    with torch.no_grad():
        expected = model(x, torch.full((2,), 0.5), context)
    assert distance(outputs(form, x, context, torch.tensor([0.5]), False)[0], expected) < 1e-5


def test_no_context_is_a_context_of_zeros():
    model = lived_in(**SHAPES["16x16"]).double()
    x, context = inputs(model, 2, torch.float64)
    form, times = InferenceUnet(model, torch.float64), torch.tensor([0.3])
    expected = outputs(form, x, torch.zeros_like(context), times, False)
    assert torch.equal(outputs(form, x, None, times, False), expected)


def test_a_context_of_another_width_is_refused():
    form = InferenceUnet(lived_in(**SHAPES["16x16"]), torch.float32)
    with pytest.raises(ValueError, match=r"c: got shape \[2, 4\], needs \[2, 5\]"):
        form.conditions(torch.tensor([0.5]), torch.zeros(2, 4), 2, False)


def test_guidance_runs_the_encoder_once():
    model = lived_in(**SHAPES["16x16"])
    x, context = inputs(model, 3, torch.float32)
    for shared, rows in ((True, 3), (False, 6)):
        form = InferenceUnet(model, torch.float32, shared=shared)
        seen = []
        form.initial.register_forward_hook(lambda module, arguments, output, seen=seen: seen.append(len(output)))
        form.last.register_forward_hook(lambda module, arguments, output, seen=seen: seen.append(len(output)))
        outputs(form, x, context, torch.tensor([0.5]), True)
        assert seen == [rows, 6]


def test_time_and_context_are_embedded_once_a_run(monkeypatch):
    model = lived_in(**SHAPES["16x16"])
    calls = []
    original = type(model.timeembed1).forward

    def counted(self, x):
        calls.append(len(x))
        return original(self, x)

    monkeypatch.setattr(type(model.timeembed1), "forward", counted)
    sample(model, NoiseSchedule.make("cosine", 20), 3, context=torch.zeros(5), prediction="v", engine="fused")
    assert sorted(calls) == [1, 1, 20, 20] or sorted(calls) == [3, 3, 20, 20]


def _step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.train()
    model(torch.randn(4, 3, 16, 16), torch.rand(4)).square().mean().backward()
    optimizer.step()
    model.eval()


CHANGES = {
    "training": _step,
    "BatchNorm statistics": lambda model: model.train()(torch.randn(4, 3, 16, 16), torch.rand(4)) and None,
    "data": lambda model: model.out[3].weight.data.mul_(1.5),
    "state dict": lambda model: model.load_state_dict(lived_in(**SHAPES["16x16"]).state_dict()),
    "another tensor": lambda model: setattr(model.out[3], "bias", torch.nn.Parameter(torch.ones(3))),
}


@pytest.mark.parametrize("change", ["training", "BatchNorm statistics", "data", "state dict", "another tensor"])
def test_folded_weights_are_never_stale(change):
    torch.manual_seed(2)
    model = ContextUnet(**SHAPES["16x16"]).eval()
    schedule = NoiseSchedule.make("cosine", 6)

    def draw(engine):
        return sample(model, schedule, 2, prediction="v", engine=engine, context=torch.eye(5)[0])

    before = draw("fused")
    for _ in range(2):
        if change == "BatchNorm statistics":
            with torch.no_grad():
                model.train()(torch.randn(4, 3, 16, 16), torch.rand(4))
            model.eval()
        else:
            CHANGES[change](model)
        after = draw("fused")
        assert distance(after, draw("eager")) < 1e-5
    assert distance(after, before) > 1e-4


def test_new_weights_go_into_the_memory_that_a_graph_would_read():
    model = lived_in(**SHAPES["16x16"]).double()
    form = inference_form(model, torch.float64)
    where = {name: buffer.data_ptr() for name, buffer in form.named_buffers()}
    with torch.no_grad():
        model.out[3].weight.mul_(2)
    assert inference_form(model, torch.float64) is form
    assert where == {name: buffer.data_ptr() for name, buffer in form.named_buffers()}


def _set_all(model, kind, **settings):
    for module in model.modules():
        if isinstance(module, kind):
            vars(module).update(settings)


SETTINGS = {
    "padding": lambda model: _set_all(model, torch.nn.Conv2d, padding_mode="circular"),
    "residual": lambda model: setattr(model.init_conv, "is_res", not model.init_conv.is_res),
    "gelu": lambda model: _set_all(model, torch.nn.GELU, approximate="tanh"),
    "groups": lambda model: setattr(model.out[1], "num_groups", 2),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_network_that_was_set_otherwise_is_run_as_it_is(setting):
    model = lived_in(**SHAPES["16x16"])
    schedule = NoiseSchedule.make("cosine", 6)

    def draw(engine):
        return sample(model, schedule, 2, prediction="v", engine=engine, context=torch.eye(5)[0])

    before = draw("fused")
    SETTINGS[setting](model)
    assert distance(draw("fused"), draw("eager")) < 1e-5
    assert distance(draw("fused"), before) > 1e-6


def test_weights_that_stayed_are_not_folded_again(monkeypatch):
    model = lived_in(**SHAPES["16x16"])
    form = inference_form(model, torch.float32)
    monkeypatch.setattr("ddpm.inference.fold_batch_norm", lambda *_: pytest.fail("folded again"))
    assert inference_form(model, torch.float32) is form
    release(model)
    with pytest.raises(pytest.fail.Exception, match="folded again"):
        inference_form(model, torch.float32)


def test_what_folding_would_pass_by_is_run_as_it_is():
    class Doubled(ContextUnet):
        def forward(self, x, t, c=None):
            return 2 * super().forward(x, t, c)

    exchanged = lived_in(**SHAPES["16x16"])
    exchanged.down1.model[0].conv1[2] = torch.nn.SiLU()
    hooked = lived_in(**SHAPES["16x16"])
    hooked.up1.register_forward_hook(lambda module, arguments, output: output + 1)
    overridden = lived_in(**SHAPES["16x16"])
    overridden.down1.forward = lambda x: torch.zeros(len(x), 8, 8, 8)
    for model in (Doubled(**SHAPES["16x16"]).eval(), exchanged, hooked, overridden, PointMLP(2)):
        assert isinstance(inference_form(model, torch.float32), PlainForm)
    assert isinstance(inference_form(lived_in(**SHAPES["16x16"]), torch.float32), InferenceUnet)


def test_a_model_that_was_also_given_to_torch_compile_is_folded_all_the_same():
    model = lived_in(**SHAPES["16x16"])
    torch.compile(model)
    assert isinstance(inference_form(model, torch.float32), InferenceUnet)


def test_a_model_that_is_gone_leaves_no_form_behind():
    from ddpm import inference

    model = lived_in(**SHAPES["16x16"])
    inference_form(model, torch.float32)
    held = len(inference._forms)
    del model
    import gc

    gc.collect()
    assert len(inference._forms) < held
