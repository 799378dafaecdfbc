"""`ddpm import` of denoising_diffusion_pytorch: its Trainer's own checkpoint, what files tell, what they are not."""

import math

import numpy as np
import pytest
import torch

from ddpm import GaussianDiffusion, Unet, load_run, sample
from ddpm.commands.importing_unet import objective_of
from ddpm.metrics import distance
from ddpm.networks.unet_versions import STRUCTURES
from tests import library

BEYOND = "needs an integer in 1..12 (the schedule's timesteps)"
BUFFERS = {"image_size": 8, "timesteps": 12, "beta_schedule": "cosine"}


def diffusion_of(network=None, **options):
    torch.manual_seed(0)
    network = {"dim": 4, "dim_mults": (1, 2), "attn_dim_head": 4, "channels": 2} | (network or {})
    return GaussianDiffusion(Unet(**network), **(BUFFERS | options))


def checkpoint(diffusion):
    """As its Trainer writes it; the average is the weights plus one."""
    online = diffusion.state_dict()
    average = {name: value + 1 if name.startswith("model.") else value for name, value in online.items()}
    ema = {f"online_model.{name}": value for name, value in online.items()}
    ema |= {f"ema_model.{name}": value for name, value in average.items()} | {"initted": torch.tensor(True)}
    moments = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}
    opt = {"state": {0: moments}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.99), "params": [0]}]}
    return {"step": 3, "model": online, "opt": opt, "ema": ema, "scaler": None, "version": "2.3.4"}


@pytest.fixture
def imported(ddpm, tmp_path):
    """imported(content, *options): (answer, run or None) of importing what torch.save wrote, or a file."""

    def call(content, *options):
        path = content
        if isinstance(content, dict):
            path = tmp_path / "model-3.pt"
            torch.save(content, path)
        answer = ddpm("import", path, "--out", tmp_path / "run", "--overwrite", *options)
        return answer, load_run(tmp_path / "run") if answer.code == 0 else None

    return call


@pytest.mark.parametrize("weights", ["ema", "online"])
@pytest.mark.parametrize("steps", [None, library.DDIM_STEPS])
def test_a_checkpoint_of_its_trainer_draws_what_it_draws(imported, weights, steps):
    options = ["--image-size", 8, "--weights", weights] + ([] if steps is None else ["--sampling-timesteps", steps])
    answer, run = imported(library.CHECKPOINT, *options)
    assert answer.code == 0, answer.err
    assert "predicts v, as its loss_weight says; 20 timesteps" in answer.out
    drawn = sample(run.model, run.schedule, library.N, seed=library.SEED, **run.options())
    expected = np.load(library.PICTURES)[f"{weights}_{steps}"]
    assert expected.std() > 0.05
    assert distance((drawn + 1) / 2, expected) < 1e-4
    assert run.config["weights"] == weights


@pytest.mark.long
@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0"])
@pytest.mark.usefixtures("library")
def test_so_does_one_that_its_trainer_has_just_written(imported, tmp_path, objective):
    held = library.train(tmp_path, objective=objective, timesteps=1000)
    for weights, steps in (("ema", 50), ("online", None)):
        options = [] if steps is None else ["--sampling-timesteps", steps]
        _, run = imported(tmp_path / "model-1.pt", "--image-size", 8, "--weights", weights, *options)
        drawn = sample(run.model, run.schedule, library.N, seed=library.SEED, **run.options())
        expected = library.draw(held, weights, steps, objective=objective, timesteps=1000)
        assert distance((drawn + 1) / 2, expected) < 1e-4


def test_the_average_is_not_what_training_ended_with():
    drawn = np.load(library.PICTURES)
    assert abs(drawn["ema_None"] - drawn["online_None"]).max() > 1e-2


NETWORKS = {
    "plain": {},
    "one level": {"dim_mults": (1,)},
    "three levels, an odd one": {"dim": 6, "dim_mults": (1, 3, 2)},
    "other first width": {"init_dim": 10},
    "its own estimate": {"self_condition": True, "channels": 1},
    "attention everywhere": {"full_attn": (True, True)},
    "attention outside": {"full_attn": (True, False)},
    "heads by level": {"attn_heads": (1, 3), "attn_dim_head": (8, 4)},
    "heads like the memory": {"attn_heads": 4, "attn_dim_head": 4, "full_attn": (False, True)},
}


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_the_network_is_read_off_the_weights(imported, network):
    diffusion = diffusion_of(network)
    _, run = imported(checkpoint(diffusion), "--image-size", "16x8")
    assert run.model.config() == diffusion.model.config() | {"image_size": [16, 8]}
    for name, value in diffusion.model.state_dict().items():
        assert torch.equal(run.model.state_dict()[name], value + 1), name
    torch.testing.assert_close(run.schedule.alpha_bars[1:].float(), diffusion.alphas_cumprod, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("gamma", [None, 5.0, 0.3])
@pytest.mark.parametrize("objective", ["pred_noise", "pred_v", "pred_x0"])
def test_the_loss_weight_tells_the_objective(objective, gamma, kind):
    clipped = {} if gamma is None else {"min_snr_loss_weight": True, "min_snr_gamma": gamma}
    more = {"timesteps": 1000, "beta_schedule": kind}
    diffusion = diffusion_of(objective=objective, **clipped, **more)
    bars = torch.cat((torch.ones(1), diffusion.alphas_cumprod)).double()
    assert objective_of(diffusion.loss_weight, bars) == diffusion.prediction
    assert objective_of(diffusion.loss_weight * torch.linspace(1, 2, 1000), bars) is None


def without_loss_weight(content):
    weight = content.pop("loss_weight")
    return content | {"p2_loss_weight": torch.ones_like(weight)}


@pytest.mark.parametrize("asked", ["v", "pred_v"])
def test_former_files_need_the_prediction(imported, asked):
    content = without_loss_weight(diffusion_of({"dim": 8, "attn_dim_head": 32, "version": "1.4"}).state_dict())
    answer, _ = imported(content, "--image-size", 8)
    assert answer.code == 2
    assert answer.err.splitlines()[-1].startswith("error: --prediction: loss_weight, which tells it, has none")
    answer, run = imported(content, "--image-size", 8, "--prediction", asked)
    assert run.config["prediction"] == "v"
    assert "predicts v, as you say" in answer.out
    assert run.sampling["clip"] == 1.0


# What else a file of each release has, beside which names of entries tell it; None: it needs --unet version.
OF_RELEASE = {
    "0.22.0": ("p2_loss_weight", None),
    "0.26.0": ("p2_loss_weight", None),
    "0.26.4": ("p2_loss_weight", None),
    "0.26.5": ("p2_loss_weight", None),
    "0.27.3": ("p2_loss_weight", None),
    "0.28.0": ("p2_loss_weight", None),
    "0.32.0": ("p2_loss_weight", ""),
    "1.7.0": ("loss_weight", "1.7.1"),
    "1.7.3": ("loss_weight", "1.7.3"),
    "1.7.4": ("loss_weight", "1.7.7"),
    "1.8.0": ("loss_weight", ""),
    "1.9.0": ("loss_weight", ""),
}


@pytest.mark.parametrize("release", OF_RELEASE)
def test_a_former_release_is_told_by_its_entries_or_its_version(imported, release):
    buffer, version = OF_RELEASE[release]
    diffusion = diffusion_of({"dim": 8, "attn_dim_head": 32, "version": release})
    state = {name.replace("model.", "denoise_fn.", 1): value for name, value in diffusion.state_dict().items()}
    state[buffer] = state.pop("loss_weight")
    content = checkpoint(diffusion) | {"model": state, "ema": {}, "version": version}
    content = content if version else {name: value for name, value in content.items() if name != "version"}
    options = ["--image-size", 8, "--prediction", "v"]
    answer, run = imported(content, *options)
    if version is None:
        assert (answer.code, "does not tell its release, could be of 0.2" in answer.err) == (2, True)
        answer, run = imported(content, *options, "--unet", f"version={release}")
    assert answer.code == 0, answer.err
    assert run.model.config() == diffusion.model.config() | {"image_size": [8, 8]}
    assert f"version {release}, resnet_block_groups 8" in answer.out
    assert "resnet_block_groups 8 as by default: the weights do not tell" in answer.out
    for name, value in diffusion.model.state_dict().items():
        assert torch.equal(run.model.state_dict()[name], value), name


def test_every_former_release_is_tried():
    assert {*OF_RELEASE, "2.0.0"} == STRUCTURES.keys()


def test_what_weights_do_not_tell_can_be_said(imported):
    told = {"version": "0.31.1", "resnet_block_groups": 2, "attn_dim_head": 8, "sinusoidal_pos_emb_theta": 50.0}
    diffusion = diffusion_of({"dim": 4, **told, "attn_heads": 3})
    content = without_loss_weight(diffusion.state_dict())
    more = [part for name, value in told.items() for part in ("--unet", f"{name}={value}")]
    answer, run = imported(content, "--image-size", 8, "--prediction", "eps", *more)
    assert answer.code == 0, answer.err
    assert run.model.config() == diffusion.model.config() | {"image_size": [8, 8]}
    assert "as by default" not in answer.out


@pytest.mark.parametrize("wrapper", ["model._orig_mod.", "model.module._orig_mod."])
def test_a_network_may_be_wrapped_in_its_diffusion(imported, wrapper):
    diffusion = diffusion_of()
    state = {name.replace("model.", wrapper, 1): value for name, value in diffusion.state_dict().items()}
    answer, run = imported({"model": state}, "--image-size", 8)
    assert answer.code == 0, answer.err
    assert "predicts v, as its loss_weight says; 12 timesteps" in answer.out
    assert torch.equal(run.model.final_conv.weight, diffusion.model.final_conv.weight)


def renamed(old, new):
    return lambda state: {name.replace(old, new): value for name, value in state.items()}


def changed(name, change):
    return lambda state: state | {name: change(state[name])}


FIRST, LAST, MIDDLE = "model.init_conv.weight", "model.final_conv.weight", "model.mid_block1.block1.proj.weight"
VARIANTS = {
    "video": (changed(MIDDLE, lambda w: w[:, :, None]), "looks like a variant for video"),
    "1d": (changed(MIDDLE, lambda w: w[..., 0]), "looks like a one-dimensional variant (Unet1D)"),
    "elucidated": (renamed("model.", "net."), "looks like ElucidatedDiffusion"),
    "karras": (lambda _: {"to_time_emb.0.weights": torch.ones(2)}, "looks like KarrasUnet"),
    "simple diffusion": (lambda _: {"model.vit.layers.0.0.q_scale": torch.ones(2)}, "looks like UViT (Simple"),
    "learned variance": (changed(LAST, lambda w: torch.cat((w, w))), "looks like LearnedGaussianDiffusion"),
    "weighted": (changed(LAST, lambda w: torch.cat((w, w, w, w))), "looks like WeightedObjectiveGaussianDiffusion"),
    "classes": (lambda s: s | {"model.null_classes_emb": torch.ones(2)}, "looks like the variant with classes"),
    "random time": (lambda s: s | {"model.time_mlp.0.weights": torch.ones(2)}, "looks like learned_sinusoidal_cond or"),
    "continuous": (
        lambda s: {k: v for k, v in s.items() if k[:6] == "model."} | {"model.time_mlp.0.weights": torch.ones(2)},
        "looks like a continuous-time variant",
    ),
    "norms of no release": (renamed("norm.g", "norm.gain"), "'downs.0.0.block1.norm.gain' is no entry of a Unet"),
    "earlier": (renamed("ups.0.3.1.", "ups.0.3.1.0."), "looks like the network of 0.16 to 0.21"),
    "before": (
        renamed("block1.proj.", "block1.block.0."),
        "(looks like the network of denoising_diffusion_pytorch bef",
    ),
    "of no release": (renamed("mem_kv", "memory"), "does not tell its release, is of none"),
    "alone": (lambda s: {k[6:]: v for k, v in s.items() if k[:6] == "model."}, "holds a Unet alone, without the noise"),
    "diffusers": (lambda _: {"time_embedding.linear_1.weight": torch.ones(2)}, "looks like a network of diffusers"),
    "guided": (lambda _: {"ema.input_blocks.0.0.weight": torch.ones(2)}, "looks like guided-diffusion's"),
    "no schedule": (changed("alphas_cumprod", torch.ones_like), "alpha_bars: got [1.0, 1.0, 1.0, 1.0].., needs"),
    "NaN": (changed(FIRST, lambda w: w * math.nan), "'init_conv.weight' has NaN"),
    "gap": (lambda s: {k: v for k, v in s.items() if k != LAST}, "final_conv.weight is missing"),
    "other widths": (changed("model.downs.1.3.weight", lambda w: w[:7]), "level 2 is 7 wide, no multiple of dim, 4"),
    "something more": (lambda s: s | {"model.more": torch.ones(2)}, "'more' is no entry of a Unet"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_not_that_network_says_what_it_looks_like(imported, tmp_path, variant):
    change, words = VARIANTS[variant]
    (tmp_path / "run").mkdir()
    answer, _ = imported(change(dict(diffusion_of({"channels": 1}).state_dict())), "--image-size", 8)
    *_, line = answer.err.strip().splitlines()
    assert answer.code == 2
    assert line.startswith(f"error: {tmp_path / 'model-3.pt'}: ")
    assert words in line
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "--image-size: {} does not tell the size of its images, needs a side in pixels"),
        (("--image-size", "8x"), "--image-size: got '8x', needs a side in pixels, or HEIGHTxWIDTH"),
        (("--image-size", 7), "--image-size: got [7, 7], needs a multiple of 2 for 2 levels"),
        (("--image-size", 8, "--prediction", "eps"), "--prediction: got eps, but {} has the loss_weight of v"),
        (("--image-size", 8, "--prediction", "noise"), "--prediction: got 'noise', needs one of eps, v, x0"),
        (
            ("--image-size", 8, "--sampling-timesteps", 13),
            "--sampling-timesteps: got 13, needs an integer in 1..12 (the schedule's timesteps)",
        ),
        (("--image-size", 8, "--weights", "best"), "--weights: got 'best', needs one of ema, online"),
        (
            ("--image-size", 8, "--unet", "dropout=1"),
            "--unet: got 'dropout', needs one of version, resnet_block_groups, attn_dim_head, sinusoidal_pos_emb_theta",
        ),
        (("--image-size", 8, "--unet", "attn_dim_head=x"), "--unet: got attn_dim_head=x, needs attn_dim_head=NUMBER"),
        (("--image-size", 8, "--unet", "attn_dim_head=0"), "--unet attn_dim_head: got 0, needs an integer >= 1"),
        (
            ("--image-size", 8, "--unet", "attn_dim_head=8"),
            "--unet attn_dim_head: got 8, but the memory of level 1 has 4",
        ),
        (
            ("--image-size", 8, "--unet", "version=0.20"),
            "--unet version: got '0.20', whose network is not built, needs 0.22.0 or later",
        ),
        (
            ("--image-size", 8, "--unet", "resnet_block_groups=8"),
            "--unet resnet_block_groups: got 8, which no network has from 2.0.0 on, needs None",
        ),
        (
            ("--image-size", 8, "--unet", "version=1.5.4"),
            "{}: is not of release 1.5.4, whose network has other entries",
        ),
        (("--image-size", 8, "--beta-end", 0.1), "--beta-end: got 0.1, but {} holds a Unet, which it is not for"),
    ],
)
def test_options_that_do_not_fit(imported, tmp_path, options, words):
    answer, _ = imported(diffusion_of().state_dict(), *options)
    *_, line = answer.err.strip().splitlines()
    assert (answer.code, line) == (2, f"error: {words.format(tmp_path / 'model-3.pt')}")


def test_options_of_a_unet_are_for_it_alone_and_an_average_alone_has_no_other(ddpm, tmp_path):
    torch.save({"init_conv.conv1.0.weight": torch.ones(2)}, tmp_path / "c.pth")
    answer = ddpm("import", tmp_path / "c.pth", "--out", tmp_path / "run", "--image-size", 8)
    assert answer.err.endswith(f"--image-size: got 8, but {tmp_path / 'c.pth'} holds no Unet, which it is for\n")
    ema = {f"ema_model.{name}": value for name, value in diffusion_of().state_dict().items()}
    torch.save(ema, tmp_path / "e.pt")
    more = ("--out", tmp_path / "run", "--image-size", 8)
    answer = ddpm("import", tmp_path / "e.pt", *more, "--weights", "online")
    assert (answer.code, "holds the moving average alone, needs ema" in answer.err) == (2, True)
    assert ddpm("import", tmp_path / "e.pt", *more).code == 0
