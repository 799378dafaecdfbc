"""`ddpm train --network NAME`: each network's own options, in --help, in config.json, in resumed and begun runs."""

import json
import re
import signal

import numpy as np
import pytest
from PIL import Image

from ddpm import load_run
from ddpm.networks import NETWORKS
from ddpm.networks.protocol import own_options
from ddpm.training import TrainOptions
from ddpm.training.options import OF_NETWORKS
from tests.ddpm.test_checkpoints import after_step, assert_same_run

# network -> options, and what config.json then says of the network.
OWN = {
    "context_unet": ("--multipliers 2,1", {"multipliers": [2, 1]}),
    "simple_unet": ("--multipliers 2 --time-dim 8", {"multipliers": [2], "time_dim": 8}),
    "unet": (
        "--multipliers 1,2 --self-condition --attn-heads 2 --attn-dim-head 4",
        {"dim_mults": [1, 2], "self_condition": True, "attn_heads": [2, 2], "attn_dim_head": [4, 4]},
    ),
}


OTHERS = [name for name in OWN if name != "simple_unet"]


@pytest.fixture
def train(ddpm, tmp_path, monkeypatch):
    """train("--network", "unet", ...): on 16 images of 8x8 without classes, in tmp_path."""
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (16, 8, 8), dtype=np.uint8)
    np.save("images.npy", images)
    small = "--data images.npy --n-feat 8 --epochs 2 --batch-size 8 --timesteps 20 --schedule cosine --device cpu"
    return lambda *options: ddpm("train", *small.split(), *options)


# What they share is tried with one of them.
@pytest.mark.parametrize("network", ["simple_unet", *(pytest.param(name, marks=pytest.mark.long) for name in OTHERS)])
def test_a_network_trains_resumes_begins_and_samples_by_its_own_options(train, ddpm, tmp_path, network):
    options, expected = OWN[network]
    options = ("--network", network, *options.split())
    answer = train("--out", "whole", *options)
    assert answer.code == 0, answer.err
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["network"] == network
    assert {name: config["model"][name] for name in expected} == expected
    asked = {name for name in OF_NETWORKS if config["training"][name] is not None}
    assert asked == {word[2:].replace("-", "_") for word in options[2:] if word.startswith("--")}

    with pytest.MonkeyPatch.context() as patch:
        after_step(patch, 2, lambda: signal.raise_signal(signal.SIGINT))
        assert train("--out", "stopped", *options).code == 130
    other = train("--out", "stopped", "--resume", "--multipliers", "3")
    assert other.err == f"error: --multipliers: got 3, but stopped was started with {options[3]}: " + (
        "resume without it, or start another run\n"
    )
    assert ddpm("train", "--out", "stopped", "--resume", "--device", "cpu").code == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")

    assert train("--out", "begun", "--init", "whole").code == 0
    assert load_run("begun").model.config() == load_run("whole").model.config()
    answer = train("--out", "other", "--init", "whole", "--multipliers", "1,2")
    assert answer.err == "error: --multipliers: got 1,2, but --init takes over a network, needs none\n"
    assert ddpm("sample", "begun", "--n", 2, "--steps", 2, "--solver", "ddim", "--npy", "x.npy").code == 0
    assert np.load("x.npy").shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--time-dim 8", "--time-dim: got 8, but network context_unet does not take it, needs simple_unet"),
        ("--network unet --time-dim 8", "--time-dim: got 8, but network unet does not take it, needs simple_unet"),
        ("--network simple_unet --attn-heads 2", "--attn-heads: got 2, but network simple_unet does not"),
        ("--network context_unet --self-condition", "--self-condition: got True, but network context_unet does not"),
        ("--data swiss-roll --multipliers 1,2", "--multipliers: got (1, 2), but network mlp does not take it, needs"),
        ("--network simple_unet --time-dim 7", "--time-dim: got 7, needs a multiple of 2"),
        ("--network simple_unet --multipliers 1,0", "--multipliers: got '1,0', needs 1..16 integers >= 1, comma-sep"),
        ("--network simple_unet --multipliers 1,,2", "--multipliers: got '1,,2', needs"),
        ("--network simple_unet --multipliers 1,1,1,1,1,1,1,1,1", "--multipliers: got (1, 1, 1, 1"),
        ("--network context_unet --multipliers 1", "--multipliers: got (1,), needs at least two integers >= 1"),
        ("--network unet --attn-heads 0", "--attn-heads: got 0, needs an integer >= 1"),
        ("--network unet --n-feat 7", "--n-feat: got 7, needs an even number"),
        ("--network simple_unet --n-feat 12", "--n-feat: got 12, needs a multiple of 8"),
        ("--network unet --multipliers 1,1,1,1,1", "--image-size: got [8, 8], needs a multiple of 16 for 5 levels"),
        ("--image-size 18", "--image-size: got [18, 18], needs a multiple of 4 for 2 halvings (--image-size 16 or 20)"),
    ],
)
def test_options_of_another_network_or_out_of_range_are_one_line(train, tmp_path, options, message):
    answer = train("--out", "run", *options.split())
    lines = [line for line in answer.err.splitlines() if line.startswith("error: ")]
    assert answer.code == 2
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {message}")
    assert not (tmp_path / "run").exists()


def test_a_network_without_conditions_trains_on_pictures_alone(train, ddpm, tmp_path):
    """Classes that data bring are left out, which is said; those that are asked for are refused."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for k in range(4):
            values = rng.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(values).save(tmp_path / "pictures" / name / f"{k}.png")
    small = ("--network", "unet", "--attn-dim-head", 4, "--attn-heads", 1)
    assert train("--out", "of_pictures", "--data", "pictures", *small).code == 0
    run = load_run("of_pictures")
    assert (run.model.sample_shape, run.classes) == ((1, 8, 8), ())
    assert train("--out", "of_pictures", "--data", "pictures", *small, "--resume").code == 0  # it knows its data
    np.save("labels.npy", np.arange(16) % 2)
    for option, value in (("--labels", "labels.npy"), ("--classes", "a,b")):
        answer = train("--out", "no", *small, option, value)
        assert answer.code == 2
        assert f"error: {option}: got " in answer.err
        assert answer.err.endswith("but the network takes no conditions, needs none\n")
    assert not (tmp_path / "no").exists()


@pytest.mark.long
def test_a_network_without_conditions_trains_on_digits(train):
    small = ("--network", "unet", "--attn-dim-head", 4, "--attn-heads", 1, "--batch-size", 900)
    answer = train("--out", "of_digits", "--data", "digits", *small)
    assert answer.code == 0, answer.err
    run = load_run("of_digits")
    assert (run.model.sample_shape, run.classes) == ((1, 16, 16), ())


def takers_of(option):
    return [name for name, kind in NETWORKS.items() if option in own_options(kind)]


def test_help_lists_each_option_under_the_networks_that_take_it(ddpm):
    answer = ddpm("train", "--help")
    sections = dict(re.findall(r"^(Options of .*):\n((?:  .*\n)+)", answer.out, re.M))
    assert list(sections) == ["Options of context_unet, simple_unet, unet", "Options of simple_unet", "Options of unet"]
    for title, text in sections.items():
        takers = title.removeprefix("Options of ").split(", ")
        listed = {word[2:].replace("-", "_") for word in re.findall(r"^  (--[\w-]+)", text, re.M)}
        assert listed == {name for name in OF_NETWORKS if takers == takers_of(name)}
    (usual,) = re.findall(r"^Options:\n((?:  .*\n)+)", answer.out, re.M)
    assert not any(name.replace("_", "-") in usual for name in OF_NETWORKS)


def test_every_option_of_a_network_is_one_of_training():
    assert set(OF_NETWORKS) == {name for kind in NETWORKS.values() for name in own_options(kind)}
    assert set(OF_NETWORKS) <= set(TrainOptions.__dataclass_fields__)
