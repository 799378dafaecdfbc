"""The inference form: each of its steps is exact, and none outlives the weights it was made of."""

import copy
import gc

import pytest
import torch

from ddpm import ContextUnet, NoiseSchedule, PointMLP, inference, sample
from ddpm.inference import ContextUnetForm, Layout, PlainForm, at, kept_form, release
from ddpm.inference.context_unet import fold_batch_norm
from ddpm.inference.convolutions import Convolution
from ddpm.metrics import distance
from ddpm.networks.blocks import EmbedFC
from kernels.winograd import missing

SHAPES = {
    "16x16": {"in_channels": 3, "n_feat": 8, "n_cfeat": 5, "height": 16},
    "28x28 unconditional": {"in_channels": 1, "n_feat": 8, "n_cfeat": 0, "height": 28},
    "32x32, three levels": {"in_channels": 3, "n_feat": 8, "n_cfeat": 2, "height": 32, "multipliers": (1, 2, 4)},
    "8x20": {"in_channels": 2, "n_feat": 8, "n_cfeat": 2, "height": (8, 20)},
    "identity shortcut": {"in_channels": 8, "n_feat": 8, "n_cfeat": 3, "height": 8},
    "other widths": {"in_channels": 3, "n_feat": 16, "n_cfeat": 3, "height": 16, "multipliers": (1, 3, 2)},
}
# Convolutions by `winograd`, which is for float32; 4 does not divide the deeper side of the second.
WIDE = {
    "32 channels": {"in_channels": 3, "n_feat": 32, "n_cfeat": 5, "height": 16},
    "32 channels, 28x28": {"in_channels": 3, "n_feat": 32, "n_cfeat": 5, "height": 28},
}


def inputs(model, n, dtype):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, *model.sample_shape, generator=generator, dtype=dtype)
    return x, torch.rand(n, model.n_cfeat, generator=generator, dtype=dtype) if model.n_cfeat else None


def outputs(form, x, context, times, guided):
    """[S, k * n, ...] of the form at every time."""
    tables, rows = form.tables(times), form.rows(context, x.shape[0], guided)
    with torch.no_grad():
        return torch.stack([form(x, at(tables, torch.tensor([i])), rows) for i in range(len(times))])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_folding_batch_norm_changes_nothing_but_the_form(unet, shape):
    model = unet(**shape).double()
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
def test_the_form_is_the_network(unet, shape, guided, channels_last, shared):
    model = unet(**shape).double()
    if guided and not model.n_cfeat:
        pytest.skip("guidance needs a context")
    x, context = inputs(model, 3, torch.float64)
    times = torch.tensor([1.0, 0.5, 0.002], dtype=torch.float64)
    form = ContextUnetForm(model, torch.float64, Layout(channels_last=channels_last, shared=shared))
    actual = outputs(form, x, context, times, guided)
    contexts = [context, torch.zeros_like(context)] if guided else [context]
    for i, time in enumerate(times):
        with torch.no_grad():
            expected = torch.cat([model(x, time.expand(3), c) for c in contexts])
        assert distance(actual[i], expected) < 1e-12


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("shape", (SHAPES | WIDE).values(), ids=SHAPES | WIDE)
def test_packed_and_transformed_weights_stay_within_float32(unet, shape, guided):
    model = unet(**shape)
    if guided and not model.n_cfeat:
        pytest.skip("guidance needs a context")
    x, context = inputs(model, 3, torch.float32)
    times, exact = torch.tensor([0.7]), copy.deepcopy(model).double()
    form = ContextUnetForm(model, torch.float32)
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
def test_convolutions_of_32_channels_and_more_multiply_less(unet):
    form = kept_form(unet(**WIDE["32 channels"]), torch.float32)
    convolutions = [module for module in form.modules() if isinstance(module, Convolution)]
    others = [module.weight.shape for module in convolutions if not module.transformed]
    assert len(convolutions) == 22
    assert len(others) == 3  # 3 to 32 channels, the shortcut, 32 to 3


def test_without_a_compiler_convolutions_are_the_librarys_and_it_is_said(unet, monkeypatch, caplog):
    for module in ("context_unet", "convolutions"):
        monkeypatch.setattr(f"ddpm.inference.{module}.missing", lambda: "no compiler")
    model = unet(**WIDE["32 channels"])
    with caplog.at_level("INFO", "ddpm"):
        form = kept_form(model, torch.float32)
    assert "about a third as fast as the operator winograd: no compiler" in caplog.text
    assert not any(module.transformed for module in form.modules() if isinstance(module, Convolution))
    x, context = inputs(model, 2, torch.float32)
    with torch.no_grad():
        expected = model(x, torch.full((2,), 0.5), context)
    assert distance(outputs(form, x, context, torch.tensor([0.5]), False)[0], expected) < 1e-5


def test_no_context_is_a_context_of_zeros(unet):
    model = unet().double()
    x, context = inputs(model, 2, torch.float64)
    form, times = ContextUnetForm(model, torch.float64), torch.tensor([0.3])
    expected = outputs(form, x, torch.zeros_like(context), times, False)
    assert torch.equal(outputs(form, x, None, times, False), expected)


def test_a_context_of_another_width_is_refused(unet):
    form = ContextUnetForm(unet(), torch.float32)
    with pytest.raises(ValueError, match=r"c: got shape \[2, 4\], needs \[2, 5\]"):
        form.rows(torch.zeros(2, 4), 2, False)


def test_guidance_runs_the_encoder_once(unet):
    model = unet()
    x, context = inputs(model, 3, torch.float32)
    for shared, rows in ((True, 3), (False, 6)):
        form = ContextUnetForm(model, torch.float32, Layout(shared=shared))
        seen = []
        form.initial.register_forward_hook(lambda module, arguments, output, seen=seen: seen.append(len(output)))
        form.last.register_forward_hook(lambda module, arguments, output, seen=seen: seen.append(len(output)))
        outputs(form, x, context, torch.tensor([0.5]), True)
        assert seen == [rows, 6]


def test_time_and_context_are_embedded_once_a_run(unet, monkeypatch):
    model = unet()
    kept_form(model, torch.float32)
    calls, forward = [], EmbedFC.forward

    def counted(self, x):
        calls.append(x.numel() // self.input_dim)
        return forward(self, x)

    monkeypatch.setattr(EmbedFC, "forward", counted)
    sample(model, NoiseSchedule.make("cosine", 20), 3, context=torch.zeros(5), prediction="v", engine="fused")
    assert sorted(calls) == [3, 3, 20, 20]


def _train(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.train()
    model(torch.randn(4, 3, 16, 16), torch.rand(4)).square().mean().backward()
    optimizer.step()
    model.eval()


def _measure(model):
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 16, 16), torch.rand(4))
    model.eval()


CHANGES = {
    "training": _train,
    "BatchNorm statistics": _measure,
    "data": lambda model: model.out[3].weight.data.mul_(1.5),
    "state dict": lambda model: model.load_state_dict({k: v * 0.9 for k, v in model.state_dict().items()}),
    "another tensor": lambda model: setattr(model.out[3], "bias", torch.nn.Parameter(torch.randn(3))),
    "another module": lambda model: setattr(model.up1.model, "0", torch.nn.ConvTranspose2d(32, 8, 2, 2)),
    "one bit": lambda model: model.out[3].bias.data[:1].view(torch.int32).bitwise_xor_(1 << 24),
}


REMOVALS = {
    "bias": lambda model: setattr(model.out[3], "bias", None),
    "bias inside": lambda model: setattr(model.up1.model[0], "bias", None),
    "statistics": lambda model: [setattr(model.init_conv.conv1[1], f"running_{k}", None) for k in ("mean", "var")],
}


@pytest.mark.parametrize("removal", REMOVALS)
def test_a_tensor_that_is_taken_away_is_not_sampled_with(unet, removal):
    model, schedule = unet(), NoiseSchedule.make("cosine", 6)

    def draw(engine):
        return sample(model, schedule, 2, prediction="v", engine=engine, context=torch.eye(5)[0])

    before = draw("fused")
    REMOVALS[removal](model)
    assert distance(draw("fused"), draw("eager")) < 1e-5
    assert distance(draw("fused"), before) > 1e-4


@pytest.mark.parametrize("change", CHANGES)
def test_folded_weights_are_never_stale(unet, change):
    model = unet()
    schedule = NoiseSchedule.make("cosine", 6)

    def draw(engine):
        return sample(model, schedule, 2, prediction="v", engine=engine, context=torch.eye(5)[0])

    before = draw("fused")
    for _ in range(2):
        CHANGES[change](model)
        after = draw("fused")
        assert distance(after, draw("eager")) < 1e-5
        assert distance(after, before) > 1e-4
        before = after


def test_a_write_between_two_calls_is_seen_by_the_bytes_alone(unet):
    """Neither version counters nor addresses change, as in a write through a pointer."""
    model = unet()
    form = kept_form(model, torch.float32)
    bias = model.out[3].bias
    version, address = bias._version, bias.data_ptr()
    bias.detach().numpy()[:] += 1
    assert (bias._version, bias.data_ptr()) == (version, address)
    assert kept_form(model, torch.float32) is form
    assert torch.equal(form.last.bias, bias)


def test_new_weights_go_into_the_memory_that_a_graph_would_read(unet):
    model = unet().double()
    form = kept_form(model, torch.float64)
    where = {name: buffer.data_ptr() for name, buffer in form.named_buffers()}
    with torch.no_grad():
        model.out[3].weight.mul_(2)
    assert kept_form(model, torch.float64) is form
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
def test_a_network_that_was_set_otherwise_is_run_as_it_is(unet, setting):
    model = unet()
    schedule = NoiseSchedule.make("cosine", 6)

    def draw(engine):
        return sample(model, schedule, 2, prediction="v", engine=engine, context=torch.eye(5)[0])

    before = draw("fused")
    SETTINGS[setting](model)
    assert distance(draw("fused"), draw("eager")) < 1e-5
    assert distance(draw("fused"), before) > 1e-6


def test_weights_that_stayed_are_not_folded_again(unet, monkeypatch):
    model = unet()
    form = kept_form(model, torch.float32)
    monkeypatch.setattr("ddpm.inference.context_unet.fold_batch_norm", lambda *_: pytest.fail("folded again"))
    assert kept_form(model, torch.float32) is form
    release(model)
    with pytest.raises(pytest.fail.Exception, match="folded again"):
        kept_form(model, torch.float32)


def test_what_folding_would_pass_by_is_run_as_it_is(unet):
    class Doubled(ContextUnet):
        def forward(self, x, t, c=None):
            return 2 * super().forward(x, t, c)

    exchanged = unet()
    exchanged.down1.model[0].conv1[2] = torch.nn.SiLU()
    hooked = unet()
    hooked.up1.register_forward_hook(lambda module, arguments, output: output + 1)
    overridden = unet()
    overridden.down1.forward = lambda x: torch.zeros(len(x), 8, 8, 8)
    for model in (Doubled(**SHAPES["16x16"]).eval(), exchanged, hooked, overridden, PointMLP(2)):
        assert isinstance(kept_form(model, torch.float32), PlainForm)
    assert isinstance(kept_form(unet(), torch.float32), ContextUnetForm)


def test_a_model_that_was_also_given_to_torch_compile_is_folded_all_the_same(unet):
    model = unet()
    torch.compile(model)
    assert isinstance(kept_form(model, torch.float32), ContextUnetForm)


def test_a_model_that_is_gone_leaves_no_form_behind(unet):
    model = unet()
    kept_form(model, torch.float32)
    held = len(inference._kept)
    del model
    gc.collect()
    assert len(inference._kept) < held
