"""The networks: shapes, sizes, names, and the original's forward written once more from its state dict."""

import json
import warnings

import pytest
import torch
import torch.nn.functional as F

from ddpm import ContextUnet, NoiseSchedule, PointMLP, load_context_unet_weights, sample
from ddpm.metrics import distance
from ddpm.networks.protocol import build_network, name_of, network, network_for, network_times, one_hot_conditions


def inputs(network, n=2):
    """x, t, c of a seeded batch."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, *network.sample_shape, generator=generator)
    return x, (torch.arange(n) + 1) / n, torch.rand(n, network.n_cfeat, generator=generator)


# 36 and 72 are halved as often as they can be, not down to 8.
MULTIPLIERS = {16: (1, 2), 28: (1, 2), 32: (1, 2), 36: (1, 2), 64: (1, 2, 4), 72: (1, 2, 4), 256: (1, 2, 4, 8, 8)}


@pytest.mark.parametrize("height", MULTIPLIERS)
@torch.no_grad()
def test_heights(unet, height):
    network = unet(height=height)
    x, t, c = inputs(network)
    assert network.multipliers == MULTIPLIERS[height]
    assert network.sample_shape == (3, height, height)
    y = network(x, t, c)
    assert y.shape == x.shape
    assert y.isfinite().all()


@torch.no_grad()
def test_every_side_that_can_be_halved_twice_is_taken():
    with torch.device("meta"):
        for side in range(16, 257, 4):
            depth = len(ContextUnet(3, 8, 0, side).multipliers)
            assert side % 2**depth == 0
            assert side / 2**depth <= 8 or side % 2 ** (depth + 1)


@torch.no_grad()
def test_given_multipliers(unet):
    network = unet(height=24, multipliers=(1, 3, 2))
    x, t, c = inputs(network)
    assert network(x, t, c).shape == x.shape
    assert network.state_dict()["down2.model.0.conv1.0.weight"].shape == (24, 8, 3, 3)
    assert network.state_dict()["up1.model.0.weight"].shape == (32, 24, 2, 2)


def test_size_of_the_published_network():
    network = ContextUnet(3, n_feat=64, n_cfeat=5, height=16)
    beside = [p.numel() for name, p in network.named_parameters() if "shortcut" not in name]
    assert sum(beside) == 1_480_771
    assert len([name for name in network.state_dict() if "shortcut" not in name]) == 156


LAYOUT = {
    "init_conv.conv1.0.weight": (64, 3, 3, 3),
    "init_conv.conv2.1.running_var": (64,),
    "down1.model.0.conv1.0.weight": (64, 64, 3, 3),
    "down2.model.1.conv2.0.weight": (128, 128, 3, 3),
    "timeembed1.model.0.weight": (128, 1),
    "timeembed2.model.2.weight": (64, 64),
    "contextembed1.model.0.weight": (128, 5),
    "contextembed2.model.2.bias": (64,),
    "up0.0.weight": (128, 128, 4, 4),
    "up0.1.weight": (128,),
    "up1.model.0.weight": (256, 64, 2, 2),
    "up2.model.0.weight": (128, 64, 2, 2),
    "up2.model.2.conv2.1.num_batches_tracked": (),
    "out.0.weight": (64, 128, 3, 3),
    "out.1.bias": (64,),
    "out.3.weight": (3, 64, 3, 3),
}


def test_names_and_shapes_follow_the_original():
    state = ContextUnet(3, n_feat=64, n_cfeat=5, height=16).state_dict()
    assert {name: tuple(state[name].shape) for name in LAYOUT} == LAYOUT


def test_the_shortcut_is_registered_and_trained(unet):
    network = unet(multipliers=(1, 1))
    shortcut = network.init_conv.shortcut
    assert [tuple(p.shape) for p in shortcut.parameters()] == [(8, 3, 1, 1), (8,)]
    network(*inputs(network)).sum().backward()
    assert shortcut.weight.grad.abs().sum() > 0
    assert not list(ContextUnet(8, n_feat=8).init_conv.shortcut.parameters())


def published(network):
    """The layout of published weights: no shortcut."""
    return {name: value.clone() for name, value in network.state_dict().items() if "shortcut" not in name}


def original_forward(w, x, t, c):
    """The 16x16 original in eval mode, from its state dict alone; the shortcut's expectation is zero."""

    def block(name, x):
        for conv in ("conv1", "conv2"):
            x = F.conv2d(x, w[f"{name}.{conv}.0.weight"], w[f"{name}.{conv}.0.bias"], padding=1)
            norm = [w[f"{name}.{conv}.1.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
            x = F.gelu(F.batch_norm(x, *norm))
        return x

    def embed(name, v):
        hidden = F.gelu(F.linear(v, w[f"{name}.model.0.weight"], w[f"{name}.model.0.bias"]))
        return F.linear(hidden, w[f"{name}.model.2.weight"], w[f"{name}.model.2.bias"])[:, :, None, None]

    def down(name, x):
        return F.max_pool2d(block(f"{name}.model.1", block(f"{name}.model.0", x)), 2)

    def up(name, x, skip):
        x = F.conv_transpose2d(
            torch.cat((x, skip), 1), w[f"{name}.model.0.weight"], w[f"{name}.model.0.bias"], stride=2
        )
        return block(f"{name}.model.2", block(f"{name}.model.1", x))

    x0 = block("init_conv", x) / 1.414
    down1 = down("down1", x0)
    down2 = down("down2", down1)
    vector = F.gelu(F.avg_pool2d(down2, 4))
    up0 = F.conv_transpose2d(vector, w["up0.0.weight"], w["up0.0.bias"], stride=4)
    up0 = F.relu(F.group_norm(up0, 8, w["up0.1.weight"], w["up0.1.bias"]))
    t = t[:, None]
    up1 = up("up1", embed("contextembed1", c) * up0 + embed("timeembed1", t), down2)
    up2 = up("up2", embed("contextembed2", c) * up1 + embed("timeembed2", t), down1)
    out = F.conv2d(torch.cat((up2, x0), 1), w["out.0.weight"], w["out.0.bias"], padding=1)
    out = F.relu(F.group_norm(out, 8, w["out.1.weight"], w["out.1.bias"]))
    return F.conv2d(out, w["out.3.weight"], w["out.3.bias"], padding=1)


@torch.no_grad()
def test_published_weights_load_aloud_and_compute_what_the_original_does(unet):
    source = unet(seed=1)
    network = unet(seed=2)
    with pytest.warns(UserWarning, match="no init_conv.shortcut"):
        load_context_unet_weights(network, published(source))
    x, t, c = inputs(network, 3)
    torch.testing.assert_close(network(x, t, c), original_forward(published(source), x, t, c), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_weights_with_a_shortcut_load_quietly(unet):
    source, network = unet(seed=1), unet(seed=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_context_unet_weights(network, source.state_dict())
    x, t, c = inputs(network)
    assert torch.equal(network(x, t, c), source(x, t, c))
    assert source.init_conv.shortcut.weight.abs().sum() > 0


@torch.no_grad()
def test_the_shortcut_is_added_and_the_sum_divided(unet):
    block = unet().init_conv
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    weight = block.shortcut.weight[:, :, 0, 0]
    shortcut = torch.einsum("oc,nchw->nohw", weight, x) + block.shortcut.bias[:, None, None]
    torch.testing.assert_close(block(x), (shortcut + block.conv2(block.conv1(x))) / 1.414)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("out.3.bias"), "no entry 'out.3.bias'"),
        (lambda w: w.update({"extra": torch.zeros(1)}), "has .extra., which"),
        (lambda w: w.update({"out.3.bias": torch.zeros(4)}), r"'out.3.bias' is \[4\], the network needs \[3\]"),
    ],
)
def test_weights_that_do_not_fit_are_refused_whole(unet, change, message):
    network = unet()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    weights = unet(seed=1).state_dict()
    change(weights)
    with pytest.raises(ValueError, match=message):
        load_context_unet_weights(network, weights)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@torch.no_grad()
def test_no_context_is_a_zero_context(unet):
    network = unet()
    x, t, c = inputs(network)
    assert torch.equal(network(x, t), network(x, t, torch.zeros_like(c)))
    assert not torch.allclose(network(x, t), network(x, t, c))


@torch.no_grad()
def test_time_matters_and_any_shape_of_n_times_will_do(unet):
    network = unet()
    x, t, c = inputs(network)
    assert not torch.allclose(network(x, t, c), network(x, t / 2, c))
    for shape in ((2, 1), (2, 1, 1, 1)):
        assert torch.equal(network(x, t.reshape(shape), c), network(x, t, c))


@torch.no_grad()
def test_an_unconditional_network_has_no_context_embedding(unet):
    network = unet(n_cfeat=0)
    x, t, _ = inputs(network)
    assert network(x, t).shape == x.shape
    assert not [name for name in network.state_dict() if "contextembed" in name]


@torch.no_grad()
def test_rows_are_independent_in_eval_mode(unet):
    network = unet()
    x, t, c = inputs(network, 5)
    torch.testing.assert_close(network(x[3:4], t[3:4], c[3:4]), network(x, t, c)[3:4], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 18}, r"height: got 18, needs a multiple of 4 for 2 halvings \(--image-size 16 or 20\)"),
        ({"height": 255}, r"height: got 255, needs a multiple of 4 .*\(--image-size 252 or 256\)"),
        ({"height": 2}, r"height: got 2, .*\(--image-size 4\)"),
        ({"height": 0}, "height: got 0"),
        ({"height": (16, 18)}, r"height: got \(16, 18\), needs a multiple of 4 .*\(--image-size 16 or 16x20\)"),
        ({"height": (2, 16)}, r"height: got \(2, 16\), .*\(--image-size 4x16\)"),
        ({"height": (16, 16, 16)}, r"height: got \(16, 16, 16\), needs one side, or \(height, width\)"),
        ({"height": "16"}, "height: got '16', needs an integer"),
        ({"n_feat": 12}, "n_feat: got 12, needs a multiple of 8"),
        ({"n_feat": 0}, "n_feat: got 0"),
        ({"in_channels": 0}, "in_channels"),
        ({"n_cfeat": -1}, "n_cfeat"),
        ({"multipliers": (1,)}, "multipliers: got"),
        ({"multipliers": (1, 0)}, "multipliers: got"),
        ({"multipliers": (1, 2, 4, 8, 8)}, "height: got 16, needs a multiple of 32"),
    ],
)
def test_sizes_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        ContextUnet(**{"in_channels": 3, "n_feat": 8} | arguments)


@pytest.mark.parametrize(
    ("x", "t", "c", "message"),
    [
        ((2, 1, 16, 16), (2,), (2, 5), r"x: got shape \[2, 1, 16, 16\], needs \[n, 3, 16, 16\]"),
        ((2, 3, 32, 32), (2,), (2, 5), "x: got shape"),
        ((3, 16, 16), (3,), (3, 5), "x: got shape"),
        ((2, 3, 16, 16), (1,), (2, 5), r"t: got shape \[1\], needs \[2\]"),
        ((2, 3, 16, 16), (3,), (2, 5), "t: got shape"),
        ((2, 3, 16, 16), (2,), (2, 4), r"c: got shape \[2, 4\], needs \[2, 5\]"),
        ((2, 3, 16, 16), (2,), (1, 5), "c: got shape"),
        ((2, 3, 16, 16), (2,), (5,), "c: got shape"),
    ],
)
def test_inputs_that_do_not_fit(unet, x, t, c, message):
    with pytest.raises(ValueError, match=message):
        unet()(torch.zeros(x), torch.ones(t), torch.zeros(c))


@torch.no_grad()
def test_point_mlp():
    torch.manual_seed(0)
    network = PointMLP(features=3, n_feat=16, n_cfeat=2).eval()
    x, t, c = inputs(network, 4)
    y = network(x, t, c)
    assert network.sample_shape == (3,)
    assert y.shape == (4, 3)
    assert torch.equal(network(x, t), network(x, t, torch.zeros_like(c)))
    assert not torch.allclose(y, network(x, t))
    assert not torch.allclose(y, network(x, t / 2, c))
    torch.testing.assert_close(network(x[1:2], t[1:2], c[1:2]), y[1:2])


def test_point_mlp_tells_all_timesteps_apart():
    """The finest frequency must not alias neighbouring t / T at T = 1000, the coarsest not the ends."""
    torch.manual_seed(0)
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    y = PointMLP(2, 16).double()(torch.ones(1000, 2, dtype=torch.float64), t)
    distances = (y[:, None] - y).norm(dim=2).fill_diagonal_(1)
    assert distances.min() > 1e-6


@pytest.mark.parametrize(
    ("x", "t", "c", "message"),
    [
        ((4, 2), (4,), (4, 2), "x: got shape"),
        ((4, 3, 1), (4,), (4, 2), "x: got shape"),
        ((4, 3), (3,), (4, 2), "t: got shape"),
        ((4, 3), (4,), (4, 1), "c: got shape"),
    ],
)
def test_point_mlp_inputs_that_do_not_fit(x, t, c, message):
    with pytest.raises(ValueError, match=message):
        PointMLP(3, 16, 2)(torch.zeros(x), torch.ones(t), torch.zeros(c))


@pytest.mark.parametrize("arguments", [(0, 16, 0), (2, 0, 0), (2, 16, -1)])
def test_point_mlp_sizes_that_do_not_fit(arguments):
    with pytest.raises(ValueError, match="needs >= 1"):
        PointMLP(*arguments)


NETWORKS = {
    "context_unet": lambda: ContextUnet(3, 8, 5, height=24, multipliers=(1, 2, 2)),
    "context_unet, unconditional": lambda: ContextUnet(3, 8, 0),
    "context_unet, not square": lambda: ContextUnet(3, 8, 5, height=(8, 20)),
    "mlp": lambda: PointMLP(3, 16, 2),
    "mlp, unconditional": lambda: PointMLP(),
}


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_name_and_config_build_it_again(name):
    network = NETWORKS[name]().eval()
    assert name_of(network) == name.split(",")[0]
    again = build_network(name_of(network), json.loads(json.dumps(network.config()))).eval()
    again.load_state_dict(network.state_dict())
    x, t, c = inputs(network)
    assert torch.equal(again(x, t, c), network(x, t, c))
    assert again.config() == network.config()


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("resnet", {}, "network: got 'resnet', needs one of context_unet, mlp"),
        (None, {}, "network: got None, needs one of"),
        ("point", {"depth": 3}, "network: got 'point'"),
        ("mlp", {"depth": 3}, "network mlp: .*depth"),
        ("context_unet", {}, "network context_unet: .*in_channels"),
    ],
)
def test_configs_that_build_nothing(name, config, message):
    with pytest.raises(ValueError, match=message):
        build_network(name, config)


def test_the_former_name_of_a_network_is_understood():
    assert type(build_network("point_mlp", {"features": 2})) is PointMLP


def test_a_name_belongs_to_one_class():
    class Other(torch.nn.Module):
        pass

    with pytest.raises(ValueError, match=r"network: 'mlp' is ddpm\.networks\.mlp\.PointMLP, needs another name"):
        network("mlp")(Other)
    with pytest.raises(ValueError, match="Other has no name"):
        name_of(Other())


@torch.no_grad()
def test_images_need_not_be_square(unet):
    model = unet(height=(8, 20))
    assert model.sample_shape == (3, 8, 20)
    assert model.multipliers == (1, 2)
    assert model.up0[0].kernel_size == (2, 5)
    x, t, c = inputs(model)
    assert model(x, t, c).shape == (2, 3, 8, 20)
    assert ContextUnet(3, 8, height=(8, 64)).multipliers == (1, 2, 4)
    with pytest.raises(ValueError, match=r"x: got shape \[2, 3, 20, 8\], needs \[n, 3, 8, 20\]"):
        model(x.transpose(2, 3), t, c)
    options = {"prediction": "v", "context": c[0], "guidance": 2.0}
    images = [sample(model, NoiseSchedule.make("cosine", 6), 2, engine=e, **options) for e in ("eager", "fused")]
    assert distance(*images) < 1e-4


def test_the_network_for_data_is_found_by_their_shape():
    assert network_for(None, (2,), 3, 16).config() == {"features": 2, "n_feat": 16, "n_cfeat": 3}
    assert network_for(None, (1, 8, 12), 0, 8).config() == ContextUnet(1, 8, 0, (8, 12)).config()
    assert type(network_for("mlp", (2,), 0, 8)) is PointMLP
    with pytest.raises(ValueError, match=r"network: mlp is for points, the data have \[1, 16, 16\]"):
        network_for("mlp", (1, 16, 16), 0, 8)
    with pytest.raises(ValueError, match=r"network: context_unet is for images, the data have \[2\]"):
        network_for("context_unet", (2,), 0, 8)


class Timed(torch.nn.Module):
    sample_shape = (2,)


@pytest.mark.parametrize(
    ("time", "timesteps", "expected"),
    [
        ("fraction", torch.tensor([50, 1]), torch.tensor([1.0, 0.02], dtype=torch.float64)),
        ("fraction", torch.tensor([49.5]).double(), torch.tensor([0.99], dtype=torch.float64)),
        ("index", torch.tensor([50, 1]), torch.tensor([49, 0])),
        ("index", torch.tensor([49.5]).double(), torch.tensor([48.5])),
    ],
)
def test_time_is_a_fraction_or_an_index(time, timesteps, expected):
    model = Timed()
    model.time = time
    times = network_times(model, timesteps, 50)
    assert times.dtype == expected.dtype
    assert torch.equal(times, expected)


def test_times_that_a_network_does_not_take():
    model = Timed()
    model.time, model.continuous_time = "index", False
    assert network_times(model, torch.tensor([3]), 50).tolist() == [2]
    with pytest.raises(ValueError, match="Timed takes whole timesteps only"):
        network_times(model, torch.tensor([2.5]), 50)
    model.time = "seconds"
    with pytest.raises(ValueError, match="time: Timed has 'seconds', needs one of fraction, index"):
        network_times(model, torch.tensor([3]), 50)


def test_one_hot_conditions_go_around():
    numbers = torch.tensor([0, 4, 5, -1])
    assert torch.equal(one_hot_conditions(ContextUnet(3, n_feat=8), numbers), torch.eye(5)[[0, 4, 0, 4]])
    assert one_hot_conditions(ContextUnet(3, n_feat=8, n_cfeat=0), numbers) is None

    class Tokens(torch.nn.Module):
        condition_shape = (2, 3)

    assert torch.equal(one_hot_conditions(Tokens(), numbers)[2], torch.eye(6)[5].reshape(2, 3))
