"""Unet: its forward written once more from a state dict, its form, every engine, and the library whose names it has."""

import copy
import json
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ddpm import GaussianDiffusion, NoiseSchedule, Unet, sample
from ddpm.engines import ENGINES, unavailable_reason
from ddpm.inference import Layout, at, has_form, kept_form
from ddpm.inference.unet import UnetForm
from ddpm.metrics import distance
from ddpm.networks.protocol import build_network, name_of, network_for
from ddpm.networks.unet_versions import STRUCTURES, release_of
from tests import library as releases

CPU = torch.device("cpu")
SCHEDULE = NoiseSchedule.make("cosine", 12)
SMALL = {"dim": 4, "dim_mults": (1, 2), "image_size": 8, "attn_dim_head": 4, "attn_heads": 2}
SIZES = {
    "two levels": {},
    "three levels": {"dim_mults": (1, 2, 3), "attn_heads": (1, 3, 2), "attn_dim_head": (4, 2, 6), "channels": 1},
    "full attention outside": {"full_attn": (True, False), "init_dim": 6, "sinusoidal_pos_emb_theta": 100},
    "its own estimate": {"self_condition": True, "image_size": (4, 8)},
    "one level, other outputs": {"dim_mults": (2,), "out_dim": 5, "dropout": 0.5},
}


def made(seed=0, **arguments):
    """In eval mode, with gains and memories of their own."""
    torch.manual_seed(seed)
    model = Unet(**(SMALL | arguments)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".g"):
                parameter.uniform_(0.5, 1.5)
    return model


def inputs(model, n=3, dtype=torch.float64):
    """x, time from 0, the estimate before or None."""
    generator = torch.Generator().manual_seed(1)
    x, previous = torch.randn(2, n, *model.sample_shape, generator=generator, dtype=dtype)
    return x, torch.tensor([0, 500, 999])[:n], previous if model.self_condition else None


# --- the mathematics ------------------------------------------------------------------------------------------------


def by_hand(model, x, time, previous=None):
    """The network from its state dict and its arguments alone."""
    w, config = model.state_dict(), model.config()
    levels, heads = len(config["dim_mults"]), config["attn_heads"]

    def conv(name, x):
        weight = w[f"{name}.weight"]
        return F.conv2d(x, weight, w.get(f"{name}.bias"), padding=weight.shape[-1] // 2)

    def norm(name, x):
        return x / x.square().sum(1, keepdim=True).sqrt() * w[f"{name}.g"] * math.sqrt(x.shape[1])

    def silu(x):
        return x / (1 + torch.exp(-x))

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    half = config["dim"] // 2
    # As trained: the frequencies, and their products with whole times, are those of float32.
    frequencies = torch.exp(torch.arange(half) * -(math.log(config["sinusoidal_pos_emb_theta"]) / (half - 1)))
    angles = time[:, None] * frequencies
    embedding = torch.cat((angles.sin(), angles.cos()), 1).double()
    embedding = linear("time_mlp.3", F.gelu(linear("time_mlp.1", embedding)))

    def resnet(name, x):
        scale, shift = linear(f"{name}.mlp.1", silu(embedding))[:, :, None, None].chunk(2, 1)
        hidden = norm(f"{name}.block1.norm", conv(f"{name}.block1.proj", x)) * (scale + 1) + shift
        hidden = silu(norm(f"{name}.block2.norm", conv(f"{name}.block2.proj", silu(hidden))))
        return hidden + (conv(f"{name}.res_conv", x) if f"{name}.res_conv.weight" in w else x)

    def attention(name, x, level, full):
        n, _, height, width = x.shape
        qkv = conv(f"{name}.to_qkv", norm(f"{name}.norm", x)).reshape(n, 3, heads[level], -1, height * width)
        q, k, v = qkv.unbind(1)
        memory = w[f"{name}.mem_kv"].transpose(-1, -2) if full else w[f"{name}.mem_kv"]
        k, v = (torch.cat((memory[i].expand(n, -1, -1, -1), each), -1) for i, each in enumerate((k, v)))
        if full:
            weights = torch.einsum("nhdi,nhdj->nhij", q, k) / math.sqrt(q.shape[2])
            out = torch.einsum("nhij,nhdj->nhdi", weights.softmax(-1), v)
            return conv(f"{name}.to_out", out.reshape(n, -1, height, width)) + x
        context = torch.einsum("nhdp,nhep->nhde", k.softmax(-1), v)
        out = torch.einsum("nhde,nhdp->nhep", context, q.softmax(2)) / math.sqrt(q.shape[2])
        return norm(f"{name}.to_out.1", conv(f"{name}.to_out.0", out.reshape(n, -1, height, width))) + x

    if model.self_condition:
        x = torch.cat((torch.zeros_like(x) if previous is None else previous, x), 1)
    x = first = conv("init_conv", x)
    skips = []
    for level in range(levels):
        name = f"downs.{level}"
        skips.append(resnet(f"{name}.0", x))
        skips.append(attention(f"{name}.2", resnet(f"{name}.1", skips[-1]), level, config["full_attn"][level]))
        x = skips[-1]
        if level == levels - 1:
            x = conv(f"{name}.3", x)
        else:
            parts = [x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]
            x = conv(f"{name}.3.1", torch.stack(parts, 2).flatten(1, 2))
    x = attention("mid_attn", resnet("mid_block1", x), levels - 1, True)
    x = resnet("mid_block2", x)
    for place, level in enumerate(reversed(range(levels))):
        name = f"ups.{place}"
        for block in (0, 1):
            x = resnet(f"{name}.{block}", torch.cat((x, skips.pop()), 1))
        x = attention(f"{name}.2", x, level, config["full_attn"][level])
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3) if level else x
        x = conv(f"{name}.3.1" if level else f"{name}.3", x)
    return conv("final_conv", resnet("final_res_block", torch.cat((x, first), 1)))


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_it_computes_what_its_parameters_say(size):
    model = made(**size)
    exact = copy.deepcopy(model).double()
    x, time, previous = inputs(model)
    expected = by_hand(exact, x, time, previous)
    assert distance(exact(x, time, previous), expected) < 1e-12
    previous = None if previous is None else previous.float()
    assert distance(model(x.float(), time, previous), expected) < 1e-5


@torch.no_grad()
def test_the_estimate_before_is_zeros_where_there_is_none():
    model = made(self_condition=True)
    x, time, previous = inputs(model, dtype=torch.float32)
    assert torch.equal(model(x, time), model(x, time, torch.zeros_like(x)))
    assert torch.equal(model(x, time, None, previous), model(x, time, previous))
    assert not torch.allclose(model(x, time), model(x, time, previous))


LAYOUT = {
    "init_conv.weight": (8, 3, 7, 7),
    "time_mlp.1.weight": (32, 8),
    "time_mlp.3.bias": (32,),
    "downs.0.0.mlp.1.weight": (16, 32),
    "downs.0.1.block1.proj.weight": (8, 8, 3, 3),
    "downs.0.1.block2.norm.g": (1, 8, 1, 1),
    "downs.0.2.norm.g": (1, 8, 1, 1),
    "downs.0.2.mem_kv": (2, 4, 32, 4),
    "downs.0.2.to_qkv.weight": (384, 8, 1, 1),
    "downs.0.2.to_out.0.bias": (8,),
    "downs.0.2.to_out.1.g": (1, 8, 1, 1),
    "downs.0.3.1.weight": (8, 32, 1, 1),
    "downs.1.3.1.weight": (16, 32, 1, 1),
    "downs.3.2.mem_kv": (2, 4, 4, 32),
    "downs.3.2.to_out.weight": (32, 128, 1, 1),
    "downs.3.3.weight": (64, 32, 3, 3),
    "mid_block1.block1.proj.weight": (64, 64, 3, 3),
    "mid_attn.to_out.bias": (64,),
    "ups.0.0.res_conv.weight": (64, 96, 1, 1),
    "ups.0.3.1.weight": (32, 64, 3, 3),
    "ups.3.3.weight": (8, 8, 3, 3),
    "final_res_block.res_conv.weight": (8, 16, 1, 1),
    "final_conv.weight": (3, 8, 1, 1),
}


def test_names_and_shapes_follow_the_library():
    state = Unet(8).state_dict()
    assert {name: tuple(state[name].shape) for name in LAYOUT} == LAYOUT
    assert (len(state), sum(tensor.numel() for tensor in state.values())) == (245, 682_819)


FORMER = [{"version": release, "resnet_block_groups": 2} for release in STRUCTURES if release != "2.0.0"]


def test_it_is_built_again_by_name_and_config():
    for size in (*SIZES.values(), *FORMER):
        model = made(**size)
        again = build_network(name_of(model), json.loads(json.dumps(model.config())))
        again.load_state_dict(model.state_dict())
        assert again.config() == model.config()
        assert again.sample_shape == model.sample_shape


def test_the_network_for_data_has_as_many_levels_as_the_sides_halve():
    for side, mults in ((32, [1, 2, 4, 8]), (28, [1, 2, 4]), (6, [1, 2]), (7, [1])):
        model = network_for("unet", (1, side, 32), 0, 4)
        assert (model.config()["dim_mults"], model.sample_shape) == (mults, (1, side, 32))
    with pytest.raises(ValueError, match="network: unet takes no classes, the data have 10"):
        network_for("unet", (1, 32, 32), 10, 4)
    with pytest.raises(ValueError, match=r"network: unet is for images, the data have \[2\]"):
        network_for("unet", (2,), 0, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learned_variance": True}, "learned_variance: got True, which this Unet does not build, needs False"),
        ({"learned_sinusoidal_cond": True}, "learned_sinusoidal_cond: got True"),
        ({"random_fourier_features": True}, "random_fourier_features: got True"),
        ({"dim": 7}, "dim: got 7, needs an even number"),
        ({"dim": 2}, "dim: got 2, needs an integer >= 4"),
        ({"dim": 8.0}, r"dim: got 8\.0, needs an integer"),
        ({"init_dim": 0}, "init_dim: got 0"),
        ({"out_dim": -1}, "out_dim: got -1"),
        ({"channels": None}, "channels: got None"),
        ({"dim_mults": ()}, r"dim_mults: got \(\), needs a tuple of integers"),
        ({"dim_mults": 2}, "dim_mults: got 2, needs a tuple of integers"),
        ({"dim_mults": (1, 0)}, r"dim_mults: got \(1, 0\), needs an integer >= 1, or 2 of them, one a level"),
        ({"attn_heads": (1, 2, 3)}, r"attn_heads: got \(1, 2, 3\), needs an integer >= 1, or 2 of them"),
        ({"attn_dim_head": 0}, "attn_dim_head: got 0"),
        ({"full_attn": (True,)}, r"full_attn: got \(True,\), needs True or False, or 2 of them"),
        ({"full_attn": 1}, "full_attn: got 1"),
        ({"dropout": 1}, "dropout: got 1, needs a share"),
        ({"dropout": "a"}, "dropout: got 'a'"),
        ({"sinusoidal_pos_emb_theta": math.nan}, "sinusoidal_pos_emb_theta: got nan"),
        ({"image_size": (8, 8, 8)}, "image_size: got"),
        ({"image_size": (8, 7)}, r"image_size: got \(8, 7\), needs a multiple of 2 for 2 levels"),
        ({"image_size": 7.5}, r"image_size: got 7\.5, needs an integer"),
        ({"version": "0.21.2"}, r"version: got '0\.21\.2', whose network is not built, needs 0\.22\.0 or later"),
        ({"version": "latest"}, "version: got 'latest', needs that of a release"),
        ({"version": 1.5}, r"version: got 1\.5, needs that of a release"),
        ({"version": "1.5.4"}, r"resnet_block_groups: got 8, needs a divisor of all widths, \[4, 8\]"),
        ({"resnet_block_groups": 0}, "resnet_block_groups: got 0, needs an integer >= 1"),
        ({"version": "2.1", "resnet_block_groups": 8}, r"resnet_block_groups: got 8, which no network has from 2\.0"),
        ({"with_time_emb": False}, "with_time_emb: got False, an argument of former versions, needs True"),
        ({"groups": 8}, "groups: got 8, an argument of former versions, needs resnet_block_groups"),
        ({"use_convnext": True}, "use_convnext: got True"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message) as refusal:
        Unet(**(SMALL | arguments))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("x", "time", "previous", "message"),
    [
        ((2, 1, 8, 8), 2, None, r"x: got shape \[2, 1, 8, 8\], needs \[n, 3, H, W\] with sides divisible by 2"),
        ((2, 3, 8, 7), 2, None, "x: got shape"),
        ((3, 8, 8), 3, None, "x: got shape"),
        ((2, 3, 8, 8), 1, None, r"time: got shape \[1\], needs \[2\]"),
        ((2, 3, 8, 8), 2, (2, 3, 8, 8), "x_self_cond: got shape .*, needs None without self_condition"),
    ],
)
def test_inputs_that_do_not_fit(x, time, previous, message):
    with pytest.raises(ValueError, match=message):
        made()(torch.zeros(x), torch.zeros(time), None if previous is None else torch.zeros(previous))


def test_a_network_that_knows_no_size_draws_nothing():
    with pytest.raises(TypeError, match="sample_shape: got None, needs a tuple of sizes"):
        sample(made(image_size=None), SCHEDULE, 1)


# --- the form, and engines ------------------------------------------------------------------------------------------


def form_outputs(form, x, times, previous):
    tables, more = form.tables(times), () if previous is None else (previous,)
    with torch.no_grad():
        return torch.stack(
            [form(x, at(tables, torch.tensor([i])), form.rows(None, len(x), False), *more) for i in range(len(times))]
        )


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("size", [*list(SIZES.values())[:4], FORMER[0], FORMER[-1], FORMER[-4]], ids=str)
def test_the_form_is_the_network(size, channels_last):
    model = made(**size).double()
    x, times, previous = inputs(model)
    form = UnetForm(model, torch.float64, Layout(channels_last=channels_last))
    for _ in range(2):
        actual = form_outputs(form, x, times, previous)
        for i, time in enumerate(times):
            with torch.no_grad():
                assert distance(actual[i], model(x, time.expand(3), previous)) < 1e-12
        with torch.no_grad():  # once more with other weights in the same form
            for parameter in model.parameters():
                parameter.mul_(0.9)
        form.refresh(model)


def test_wide_weights_and_lower_types_stay_within_rounding():
    model = made(dim=32, image_size=16, attn_dim_head=8)
    x, times, _ = inputs(model, dtype=torch.float32)
    expected = form_outputs(UnetForm(model.double(), torch.float64), x.double(), times, None)
    model.float()
    assert distance(form_outputs(kept_form(model, torch.float32), x, times, None), expected) < 1e-5
    assert distance(form_outputs(UnetForm(model, torch.bfloat16), x, times, None), expected) < 0.1


def test_it_has_a_form_until_it_is_changed():
    model = made()
    assert has_form(model)
    assert isinstance(kept_form(model, torch.float32), UnetForm)
    model.mid_attn.split = 3, 1, 8
    assert not has_form(model)


@pytest.mark.long
@pytest.mark.parametrize("size", ["two levels", "its own estimate"])
def test_torch_compile_takes_the_form_as_one_graph(size):
    model = made(**SIZES[size])
    x, times, previous = inputs(model, dtype=torch.float32)
    form, expected = UnetForm(model, torch.float32), form_outputs(UnetForm(model, torch.float32), x, times, previous)
    form.forward = torch.compile(form.forward, fullgraph=True, backend="eager")
    assert distance(form_outputs(form, x, times, previous), expected) < 1e-5


HERE = [
    pytest.param(name, marks=pytest.mark.long if name == "compile" else ())
    for name in ENGINES
    if name != "eager" and unavailable_reason(name, CPU, form=UnetForm) is None
]


@pytest.mark.parametrize(
    ("self_condition", "plain"), [(False, False), (True, False), (True, True)], ids=["plain", "its own", "no form"]
)
@pytest.mark.parametrize("engine", HERE)
def test_every_engine_draws_eager_s_pictures(engine, self_condition, plain):
    model = made(self_condition=self_condition)
    if plain:
        model.register_forward_hook(lambda *_: None)
    for way in ({"solver": "ddpm", "clip": 1.0, "steps": 4}, {"solver": "dpmpp_2m", "steps": 3}):
        given = {"prediction": "v", "seed": 3} | way
        expected, exact = (
            sample(model, SCHEDULE, 2, engine="eager", dtype=d, **given) for d in (torch.float32, torch.float64)
        )
        actual = sample(model, SCHEDULE, 2, engine=engine, **given)
        assert distance(actual, expected) < 1e-4
        assert distance(actual, exact) <= 4 * distance(expected, exact) + 1e-6
        assert distance(sample(model, SCHEDULE, 2, engine=engine, batch_size=1, **given), actual) < 1e-5


# --- former releases ------------------------------------------------------------------------------------------------


FIRST = {release_of(release): release for release in reversed(releases.RELEASES)}  # of each network


@pytest.mark.parametrize(
    "release",
    [pytest.param(each, marks=() if each in FIRST.values() else pytest.mark.long) for each in releases.RELEASES],
)
def test_former_networks_draw_what_their_release_drew(release):
    model = Unet(**releases.FORMER_NETWORK, **releases.former_options(release), version=release)
    held = np.load(releases.FORMER)
    assert releases.names_of(model.state_dict()) == held[f"{release} names"]
    model.load_state_dict(releases.filled(model.state_dict()))
    diffusion, expected = GaussianDiffusion(model, **releases.FORMER_DIFFUSION), held[f"{release} images"]
    assert expected.std() > 0.05
    for engine in ("eager", "fused"):
        assert distance(diffusion.sample(releases.N, seed=releases.SEED, engine=engine), expected) < 1e-5


def test_releases_are_told_apart():
    held = np.load(releases.FORMER)
    drawn = {release_of(release): held[f"{release} images"] for release in releases.RELEASES}
    assert drawn.keys() == STRUCTURES.keys()
    for release in releases.RELEASES:
        same = [name for name, images in drawn.items() if abs(images - held[f"{release} images"]).max() < 1e-4]
        assert same == [release_of(release)]


@pytest.mark.parametrize(
    ("version", "release"),
    [("0.22", "0.22.0"), ("0.27.12", "0.27.3"), ("1.7", "1.7.0"), ("1.8.14a", "1.8.0"), ("1.10.17", "1.9.0"),
     ("2.0", "2.0.0"), ("2.04", "2.0.0"), ("3.1.0rc1", "2.0.0")],
)  # fmt: skip
def test_a_version_is_of_the_release_with_its_network(version, release):
    assert release_of(version) == release


def test_groups_alone_mean_the_last_release_that_had_them():
    assert release_of(None, 8) == release_of("1.11.1") == "1.9.0"
    assert made(resnet_block_groups=2, with_time_emb=True).config()["version"] == "1.9.0"
    assert "version" not in made(version="2.3.4").config()


# --- the library ----------------------------------------------------------------------------------------------------


def random_arguments(seed):
    rng = random.Random(seed)  # noqa: S311
    levels = rng.choice((1, 2, 3))

    def each(values):
        return tuple(rng.choice(values) for _ in range(levels))

    return {
        "dim": rng.choice((4, 6, 8)),
        "init_dim": rng.choice((None, 5, 8)),
        "dim_mults": each((1, 2, 3)),
        "channels": rng.choice((1, 3)),
        "self_condition": rng.choice((True, False)),
        "sinusoidal_pos_emb_theta": rng.choice((10000, 50)),
        "attn_dim_head": rng.choice((4, each((2, 8)))),
        "attn_heads": rng.choice((2, each((1, 3)))),
        "full_attn": rng.choice((None, each((True, False)))),
        "flash_attn": rng.choice((True, False)),
    }


@torch.no_grad()
@pytest.mark.parametrize("seed", range(5))
def test_weights_go_both_ways_and_compute_the_same(library, seed):
    arguments = random_arguments(seed)
    pair = []
    for kind in (library.Unet, Unet):
        torch.manual_seed(seed)
        pair.append(kind(**arguments).eval())
    theirs, ours = pair
    assert [(name, p.shape) for name, p in theirs.named_parameters()] == [
        (n, p.shape) for n, p in ours.named_parameters()
    ]
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in theirs.state_dict().items())
    for parameter in theirs.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    ours.load_state_dict(theirs.state_dict())
    ours.sample_shape = arguments["channels"], 8, 12
    x, time, previous = inputs(ours, dtype=torch.float32)
    assert distance(ours(x, time, previous), theirs(x, time, previous)) < 1e-5
    theirs.load_state_dict(Unet(**arguments).state_dict())
