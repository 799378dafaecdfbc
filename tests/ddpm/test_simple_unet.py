"""SimpleUNet: its forward written once more from a state dict, every side, its form, engines, exported files."""

import copy
import gc
import json
import math
import weakref

import pytest
import torch
import torch.nn.functional as F

from ddpm import NoiseSchedule, SimpleUNet, load_run, sample
from ddpm.engines import ENGINES, unavailable_reason
from ddpm.inference import KERNELS, Layout, at, has_form, kept_form
from ddpm.inference.simple_unet import SimpleUNetForm
from ddpm.metrics import distance
from ddpm.networks.protocol import build_network, name_of, network_for

CPU = torch.device("cpu")
SCHEDULE = NoiseSchedule.make("cosine", 12)
SIZES = {
    "padded": {},
    "as it is": {"height": (8, 16)},
    "each side its own": {"height": (7, 13), "in_channels": 2},
    "a pixel": {"height": 1, "multipliers": (2,)},
    "unconditional": {"n_cfeat": 0, "time_dim": 6},
    "other widths": {"multipliers": (2, 1, 3), "height": (9, 28)},
}


def made(seed=0, **arguments):
    """In eval mode, with gains and statistics of their own."""
    torch.manual_seed(seed)
    model = SimpleUNet(**{"in_channels": 1, "n_feat": 8, "n_cfeat": 3, "height": 6, "multipliers": (1, 2)} | arguments)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.3)
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.05, 0.2)
        model.out[1].weight.uniform_(0.5, 1.5)
    return model.eval()


def inputs(model, n=3, dtype=torch.float64):
    """x, t from 0, c or None."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, *model.sample_shape, generator=generator, dtype=dtype)
    c = torch.rand(n, model.n_cfeat, generator=generator, dtype=dtype) if model.n_cfeat else None
    return x, torch.tensor([0, 500, 999])[:n], c


# --- the mathematics ------------------------------------------------------------------------------------------------


def by_hand(model, x, t, c=None):
    """The network from its state dict and its arguments alone."""
    w, config = model.state_dict(), model.config()
    sides, levels, half = x.shape[2:], len(config["multipliers"]), config["time_dim"] // 2

    def conv(name, x):
        return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding=w[f"{name}.weight"].shape[-1] // 2)

    def half_block(name, x):
        x = conv(f"{name}.0", x)
        mean, var, gain, bias = (
            w[f"{name}.1.{which}"][:, None, None] for which in ("running_mean", "running_var", "weight", "bias")
        )
        x = (x - mean) / (var + 1e-5).sqrt() * gain + bias
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))

    angles = t[:, None] * torch.exp(torch.arange(half) * -(math.log(10000) / (half - 1)))
    angles = torch.cat((angles.sin(), angles.cos()), 1).double()
    hidden = F.gelu(angles @ w["shifts.time.1.weight"].T + w["shifts.time.1.bias"])
    of_time = hidden @ w["shifts.time.3.weight"].T + w["shifts.time.3.bias"]
    used, told = 0, 0

    def block(name, x, conditioned):
        nonlocal used, told
        x = half_block(f"{name}.conv1", x)
        width = x.shape[1]
        x = x + of_time[:, used : used + width, None, None]
        used += width
        if conditioned and c is not None:
            x = x + (c @ w["shifts.context.weight"][told : told + width].T)[:, :, None, None]
            told += width
        return half_block(f"{name}.conv2", x)

    step = 2**levels
    padded = torch.zeros(*x.shape[:2], *(math.ceil(side / step) * step for side in sides), dtype=x.dtype)
    top, left = ((whole - side) // 2 for whole, side in zip(padded.shape[2:], sides, strict=True))
    inside = (..., slice(top, top + sides[0]), slice(left, left + sides[1]))
    padded[inside] = x
    left_behind = [conv("conv0", padded)]
    for level in range(levels):
        x = block(f"downs.{level}", left_behind[-1], False)
        left_behind.append(x.unflatten(3, (-1, 2)).amax(4).unflatten(2, (-1, 2)).amax(3))
    x = block("middle", left_behind[-1], True)
    for level in range(levels):
        x, weight = torch.cat((x, left_behind.pop()), 1), w[f"transforms.{level}.weight"]
        x = torch.einsum("nchw,cdij->ndhiwj", x, weight).flatten(4).flatten(2, 3)
        x = block(f"ups.{level}", x + w[f"transforms.{level}.bias"][:, None, None], True)
    x = conv("out.0", torch.cat((x, left_behind.pop()), 1))
    groups = x.unflatten(1, (8, -1))
    mean, var = (
        how((2, 3, 4), keepdim=True) for how in (groups.mean, lambda *a, **k: groups.var(*a, **k, correction=0))
    )
    x = ((groups - mean) / (var + 1e-5).sqrt()).flatten(1, 2)
    x = x * w["out.1.weight"][:, None, None] + w["out.1.bias"][:, None, None]
    assert (used, told) in ((of_time.shape[1], 0), (of_time.shape[1], len(w.get("shifts.context.weight", ()))))
    return conv("out.3", x.clamp(min=0))[inside]


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_it_computes_what_its_parameters_say(size):
    model = made(**size)
    exact = copy.deepcopy(model).double()
    x, t, c = inputs(model)
    expected = by_hand(exact, x, t, c)
    assert distance(exact(x, t, c), expected) < 1e-12
    assert distance(model(x.float(), t, None if c is None else c.float()), expected) < 1e-5


@torch.no_grad()
def test_every_side_is_taken():
    for side in range(1, 34):
        model = SimpleUNet(1, 8, height=(side, 34 - side)).eval()
        assert model(torch.zeros(1, 1, side, 34 - side), torch.zeros(1)).shape == (1, 1, side, 34 - side)


@torch.no_grad()
def test_no_condition_is_one_of_zeros_and_time_and_condition_matter():
    model = made()
    x, t, c = inputs(model, dtype=torch.float32)
    assert torch.equal(model(x, t), model(x, t, torch.zeros_like(c)))
    assert torch.equal(model(x, t), model(x, t, model.null_condition(3)))
    assert not torch.allclose(model(x, t), model(x, t, c))
    assert not torch.allclose(model(x, t, c), model(x, t + 1, c))
    torch.testing.assert_close(model(x[1:2], t[1:2], c[1:2]), model(x, t, c)[1:2], atol=1e-5, rtol=1e-5)


def test_all_timesteps_are_told_apart():
    """Neighbours at t = 999 and at 0, and the ends."""
    y = made().double().shifts.of_time(torch.arange(1000))[0]
    assert torch.pdist(y).min() > 1e-4


def test_it_is_built_again_by_name_and_config():
    for size in SIZES.values():
        model = made(**size)
        again = build_network(name_of(model), json.loads(json.dumps(model.config())))
        again.load_state_dict(model.state_dict())
        assert (again.config(), again.sample_shape) == (model.config(), model.sample_shape)


def test_the_network_for_data():
    model = network_for("simple_unet", (1, 28, 30), 10, 8)
    assert model.config() == SimpleUNet(1, 8, 10, (28, 30)).config()
    assert network_for("simple_unet", (3, 8, 8), 0, 8, time_dim=4, multipliers=(1, 1)).config()["time_dim"] == 4
    with pytest.raises(ValueError, match=r"network: simple_unet is for images, the data have \[2\]"):
        network_for("simple_unet", (2,), 0, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 0}, "in_channels: got 0, needs an integer >= 1"),
        ({"in_channels": 2.0}, r"in_channels: got 2\.0, needs an integer"),
        ({"n_feat": 12}, "n_feat: got 12, needs a multiple of 8"),
        ({"n_feat": 0}, "n_feat: got 0, needs an integer >= 8"),
        ({"n_cfeat": -1}, "n_cfeat: got -1, needs an integer >= 0"),
        ({"height": 0}, r"height: got 0, needs an integer in 1\.\.65536"),
        ({"height": "28"}, "height: got '28', needs an integer"),
        ({"height": (28, 28, 28)}, r"height: got \(28, 28, 28\), needs one side, or \(height, width\)"),
        ({"height": 10**9}, "height: got 1000000000"),
        ({"multipliers": ()}, r"multipliers: got \(\), needs 1\.\.8 integers"),
        ({"multipliers": 2}, r"multipliers: got 2, needs 1\.\.8 integers"),
        ({"multipliers": [1] * 9}, r"multipliers: got \[1, .*, needs 1\.\.8 integers"),
        ({"multipliers": (1, 0)}, "multipliers: got 0, needs an integer >= 1"),
        ({"time_dim": 2}, "time_dim: got 2, needs an integer >= 4"),
        ({"time_dim": 7}, "time_dim: got 7, needs a multiple of 2"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message) as refusal:
        made(**arguments)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("x", "t", "c", "message"),
    [
        ((2, 1, 8, 8), 2, (2, 3), r"x: got shape \[2, 1, 8, 8\], needs \[n, 1, 6, 6\]"),
        ((2, 1, 6, 6), 3, (2, 3), r"t: got shape \[3\], needs \[2\]"),
        ((2, 1, 6, 6), 2, (2, 2), r"c: got shape \[2, 2\], needs \[2, 3\]"),
    ],
)
def test_inputs_that_do_not_fit(x, t, c, message):
    with pytest.raises(ValueError, match=message):
        made()(torch.zeros(x), torch.zeros(t), torch.zeros(c))


# --- the form, and engines ------------------------------------------------------------------------------------------


def outputs(form, x, context, times, guided):
    """[S, k * n, ...] of the form at every time."""
    tables, rows = form.tables(times), form.rows(context, x.shape[0], guided)
    with torch.no_grad():
        return torch.stack([form(x, at(tables, torch.tensor([i])), rows) for i in range(len(times))])


@pytest.mark.parametrize(("channels_last", "shared"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@torch.no_grad()
def test_the_form_is_the_network(size, guided, channels_last, shared):
    model = made(**size).double()
    x, times, context = inputs(model)
    guided = guided and context is not None
    form = SimpleUNetForm(model, torch.float64, Layout(channels_last=channels_last, shared=shared))
    actual = outputs(form, x, context, times, guided)
    for i, t in enumerate(times):
        contexts = [context, torch.zeros_like(context)] if guided else [context]
        assert distance(actual[i], torch.cat([model(x, t.expand(3), c) for c in contexts])) < 1e-12
    if context is not None:
        none, zeros = (outputs(form, x, c, times, False) for c in (None, torch.zeros_like(context)))
        assert torch.equal(none, zeros)


@pytest.mark.parametrize("layout", [Layout(), KERNELS], ids=["packed", "kernels"])
@torch.no_grad()
def test_its_operators_stay_within_float32_and_follow_the_weights(layout):
    """With 32 channels convolutions are by `winograd`."""
    model = made(n_feat=32, height=(7, 13))
    x, times, context = inputs(model, dtype=torch.float32)
    form = SimpleUNetForm(model, torch.float32, layout)
    for _ in range(2):
        exact = copy.deepcopy(model).double()
        expected = torch.cat(
            [exact(x.double(), times[1].expand(3), c.double()) for c in (context, torch.zeros_like(context))]
        )
        assert distance(outputs(form, x, context, times[1:2], True)[0], expected) < 1e-5
        for parameter in model.parameters():
            parameter.mul_(0.9)
        form.refresh(model)


@torch.no_grad()
def test_the_way_down_is_run_once_under_guidance():
    model = made()
    x, times, context = inputs(model, dtype=torch.float32)
    form, seen = SimpleUNetForm(model, torch.float32), []
    for module in (form.downs[-1], form.middle.first, form.middle.second, form.last):
        module.register_forward_hook(lambda module, arguments, output: seen.append(len(output)))
    outputs(form, x, context, times[:1], True)
    assert seen == [3, 3, 6, 6]


def test_a_network_is_not_kept_alive_by_its_form_and_has_none_when_a_part_was_exchanged():
    model = made()
    kept_form(model, torch.float32)
    assert has_form(model)
    model.padding = torch.nn.Identity()
    assert not has_form(model)
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None


HERE = [
    pytest.param(name, marks=pytest.mark.long if name == "compile" else ())
    for name in ENGINES
    if unavailable_reason(name, CPU, form=SimpleUNetForm) is None and name != "eager"
]


@pytest.mark.parametrize("engine", HERE)
@pytest.mark.parametrize("way", [{}, {"guidance": 2.5}, {"guidance": 2.5, "negative": torch.eye(3)[1]}])
def test_every_engine_draws_the_same_pictures(engine, way):
    model = made(height=(6, 9))
    how = {"steps": 6, "prediction": "v", "context": torch.eye(3), "seed": 3} | way
    images = [sample(model, SCHEDULE, 3, engine=name, **how) for name in ("eager", engine)]
    assert distance(*images) < 1e-5


# --- weights of somebody's training loop ------------------------------------------------------------------------------


def test_a_state_dict_becomes_a_run(ddpm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = made(height=(6, 9), multipliers=(2, 1, 2), time_dim=6)
    torch.save({"model": model.state_dict(), "epoch": 3}, "loop.pth")
    asked = ("--image-size", "6x9", "--timesteps", 12, "--beta-end", 0.3, "--classes", "a,b,c", "--prediction", "v")
    answer = ddpm("import", "loop.pth", "--out", "run", *asked)
    assert answer.code == 0, answer.err
    run = load_run("run")
    assert (run.model.config(), run.classes) == (model.config(), ("a", "b", "c"))
    assert all(torch.equal(tensor, run.model.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert run.options() == {"solver": "ddpm", "prediction": "v"}
    # As the tutorials have it: T betas from the first to the last.
    betas = torch.linspace(1e-4, 0.3, 12, dtype=torch.float64)
    assert distance(run.schedule.alpha_bars[1:], torch.cumprod(1 - betas, 0)) < 1e-12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--image-size 6", "--timesteps: loop.pth does not tell how many it was trained with, needs T"),
        ("--timesteps 12", "--image-size: loop.pth does not tell the size of its images, needs a side in pixels"),
        ("--timesteps 12 --image-size 6 --n-feat 8", "--n-feat: got 8, but loop.pth holds a SimpleUNet, which it is"),
        ("--timesteps 12 --image-size 6 --classes a", "--classes: got 1 names, needs 3"),
        ("--timesteps 12 --image-size 6 --prediction z", "--prediction: got 'z', needs one of"),
    ],
)
def test_what_a_state_dict_does_not_tell_is_asked_for(ddpm, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    torch.save(made().state_dict(), "loop.pth")
    answer = ddpm("import", "loop.pth", "--out", "run", *options.split())
    assert answer.code == 2
    assert answer.err.splitlines()[-1].startswith(f"error: {message}")
    assert not (tmp_path / "run").exists()
