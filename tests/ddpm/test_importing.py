"""`ddpm import`: every wrapping that people save this network in, and files that claim what they do not hold."""

import argparse
import json
import os
import resource
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from ddpm import ContextUnet, load_run

FIRST, VARIANCE = "init_conv.conv1.0.weight", "init_conv.conv1.1.running_var"


def published(**options):
    """A state dict as the original leaves it: without the shortcut; 3 channels, n_feat 8, two levels."""
    torch.manual_seed(0)
    network = ContextUnet(3, 8, **{"n_cfeat": 5, "height": 16, "multipliers": (1, 2)} | options)
    return {name: value for name, value in network.state_dict().items() if not name.startswith("init_conv.shortcut.")}


STATE = published()
OTHER = {name: value + 1 for name, value in STATE.items()}


def under(prefix, state=STATE):
    return {prefix + name: value for name, value in state.items()}


def floats(state, change):
    return {name: change(value) if value.is_floating_point() else value for name, value in state.items()}


class EveryTime:
    """What pickles say it is made of runs when they are read."""

    def __init__(self, make, *arguments):
        self.made = make, arguments

    def __reduce__(self):
        return self.made


CHECKPOINT = {
    "epoch": 31,
    "model_state_dict": under("_orig_mod."),
    "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    "loss": np.float64(0.1),
    "history": np.zeros(3),
    "args": argparse.Namespace(lr=0.1, out=Path("x")),
}
PARAMETERS = {name: value for name, value in STATE.items() if "running" not in name and "tracked" not in name}
WRAPPED = {
    "bare": STATE,
    "data parallel": under("module."),
    "compiled": under("_orig_mod."),
    "compiled and parallel": under("module._orig_mod."),
    "wrapped in the author's class": under("nn_model.") | {"sqrt_alphas": torch.ones(3)},
    "checkpoint": CHECKPOINT,
    "model": {"model": STATE, "step": 3},
    "state_dict": {"state_dict": STATE},
    "Lightning": {"state_dict": under("model.") | {"betas": torch.ones(3)}, "hyper_parameters": {"lr": 0.1}},
    "average inside": {"model": OTHER, "ema": {"decay": 0.999, "shadow": STATE}},
    "average beside": {"state_dict": under("model.", OTHER) | under("model_ema.module.")},
    "average of parameters alone": {"model": STATE, "ema": PARAMETERS},
    "Adam by names": {"network": STATE, "exp_avg": PARAMETERS},
    "twice the same": {"model": STATE, "best": STATE},
    "tuple": (STATE, 3),
    "parameters": {name: torch.nn.Parameter(value) for name, value in STATE.items() if value.is_floating_point()},
    "double": floats(STATE, torch.Tensor.double),
    "strided": floats(STATE, lambda value: value.t().contiguous().t() if value.ndim == 2 else value),
}


@pytest.fixture
def imported(ddpm, tmp_path):
    """imported(content, *options): (answer, the run's weights) of importing what torch.save wrote."""

    def call(content, *options, **how):
        torch.save(content, tmp_path / "w.pth", **how)
        answer = ddpm("import", tmp_path / "w.pth", "--out", tmp_path / "run", *options)
        return answer, load_run(tmp_path / "run").model.state_dict() if answer.code == 0 else None

    return call


def same(weights, state=STATE):
    assert weights.keys() - state.keys() <= {"init_conv.shortcut.weight", "init_conv.shortcut.bias"}
    for name, value in state.items():
        assert torch.equal(weights[name], value), name


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_every_wrapping_is_taken_off(imported, wrapping):
    answer, weights = imported(WRAPPED[wrapping])
    assert answer.code == 0, answer.err
    same(weights)


@pytest.mark.parametrize("wrapping", ["average inside", "average beside"])
def test_the_other_than_the_average_can_be_asked_for(imported, wrapping):
    same(imported(WRAPPED[wrapping], "--weights", "online")[1], OTHER)


def test_former_formats_and_safetensors(imported, ddpm, tmp_path):
    same(imported(STATE, _use_new_zipfile_serialization=False)[1])
    save_file(under("module."), tmp_path / "w.safetensors")
    assert ddpm("import", tmp_path / "w.safetensors", "--out", tmp_path / "other").code == 0
    same(load_run(tmp_path / "other").model.state_dict())


def test_what_is_left_out_is_said(imported):
    err = imported(CHECKPOINT)[0].err
    assert "1 tensors beside model_state_dict._orig_mod are left out (first: optimizer.state.0.exp_avg)" in err
    assert "left out" not in imported(STATE, "--overwrite")[0].err


def test_names_of_classes_are_kept_as_keyboards_type_them(imported, tmp_path):
    answer, _ = imported(STATE, "--classes", "a,b,c,d,cafe\u0301")
    assert answer.code == 0, answer.err
    run = load_run(tmp_path / "run")
    assert run.classes == ("a", "b", "c", "d", "caf\u00e9")
    assert run.context("cafe\u0301").tolist() == [0, 0, 0, 0, 1]
    answer, _ = imported(STATE, "--classes", "a,b,c,caf\u00e9,cafe\u0301", "--overwrite")
    assert (answer.code, "--classes: got a class 'caf\u00e9', needs names that differ" in answer.err) == (2, True)


def test_half_precision_with_its_counters_and_no_counters(imported):
    half = {name: value.half() for name, value in STATE.items()}
    answer, weights = imported(half)
    assert answer.code == 0, answer.err
    same(weights, {name: value.float() for name, value in half.items() if "tracked" not in name} | {
        name: torch.tensor(0) for name in STATE if "tracked" in name
    })  # fmt: skip
    same(imported({name: value for name, value in STATE.items() if "tracked" not in name}, "--overwrite")[1])


@pytest.mark.parametrize(
    ("options", "height"),
    [
        ({"height": 28}, 28),
        ({"height": 40}, 40),
        ({"height": 64, "multipliers": (1, 2, 4)}, 64),
        ({"height": 64}, 64),
        ({"height": 32, "multipliers": (3, 1, 2)}, 32),
        ({"height": (8, 20)}, [8, 20]),
        ({"n_cfeat": 0}, 16),
    ],
)
def test_depth_widths_and_sides_are_read_off_the_weights(imported, tmp_path, options, height):
    state = published(**options)
    answer, weights = imported(state)
    assert answer.code == 0, answer.err
    same(weights, state)
    model = json.loads((tmp_path / "run" / "config.json").read_text())["model"]
    expected = {"n_cfeat": 5, "multipliers": [1, 2]} | options | {"in_channels": 3, "n_feat": 8, "height": height}
    assert model == expected | {"multipliers": list(expected["multipliers"])}


def test_the_height_that_is_asked_for_must_be_that_of_the_weights(imported, tmp_path):
    state = published(height=(8, 20))
    for asked in ("20x8", "8"):
        err = imported(state, "--height", asked)[0].err
        assert err.endswith(f"--height: got {asked}, but {tmp_path / 'w.pth'} has 8x20\n")
    assert imported(state, "--height", "8x20")[0].code == 0


@torch.no_grad()
def test_embeddings_of_a_context_of_no_numbers_scale_as_in_the_original(imported):
    """There they are Linear(0, C), whose bias alone is left: with it they have the value that the network computes."""
    state = published(n_cfeat=1)
    state |= {f"contextembed{k}.model.0.weight": torch.zeros(c, 0) for k, c in ((1, 16), (2, 8))}
    answer, weights = imported(state)
    assert answer.code == 0, answer.err
    assert "context of no numbers" in answer.err
    for name in ("contextembed1", "contextembed2"):
        parts = [state[f"{name}.model.{part}"] for part in ("0.weight", "0.bias", "2.weight", "2.bias")]
        original = F.linear(F.gelu(F.linear(torch.zeros(2, 0), *parts[:2])), *parts[2:])
        hidden = F.gelu(F.linear(torch.ones(2, 1), weights[f"{name}.model.0.weight"], parts[1]))
        torch.testing.assert_close(F.linear(hidden, *parts[2:]), original)


def deflated(path):
    """The archive of torch.save with zeros for weights, compressed."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, bytes(len(content)) if "/data/" in name else content)


def nested(depth):
    content = STATE
    for _ in range(depth):
        content = {"a": content, "b": content}
    return content


ONE = torch.zeros(1)
WIDE = {n: torch.zeros(()).expand([size * 128 if size > 3 else size for size in v.shape]) for n, v in STATE.items()}
REFUSED = {
    "module": (
        torch.nn.Linear(2, 2),
        "a pickled torch.nn.modules.linear.Linear",
        "torch.save(model.state_dict(), FILE)",
    ),
    "code": (STATE | {"x": EveryTime(os.mkdir, "ran")}, "not a PyTorch file of weights alone", "posix.mkdir"),
    "code in plain clothes": (STATE | {"x": EveryTime(argparse.Namespace, EveryTime(print, "ran"))}, "a pickled print"),
    "no network": ({"a": torch.zeros(2), "b": [3, "x"]}, "not a ContextUnet state dict, nor of a Unet (1 tensors"),
    "two networks": ({"a": STATE, "b": dict(STATE)}, "holds 2 networks (at a, b), needs one of them alone"),
    "too deep": (nested(50), "not a ContextUnet state dict, nor of a Unet (0 tensors"),
    "meta": ({name: value.to("meta") for name, value in STATE.items()}, FIRST, "on meta"),
    "sparse": (STATE | {FIRST: STATE[FIRST].to_sparse()}, FIRST, "torch.sparse_coo"),
    "quantized": (STATE | {FIRST: torch.quantize_per_tensor(STATE[FIRST], 0.1, 0, torch.qint8)}, FIRST, "torch.qint8"),
    "complex": (STATE | {FIRST: STATE[FIRST].to(torch.complex64)}, FIRST, "complex64"),
    "2000 levels": (STATE | {f"down{i}.model.0.conv1.0.weight": ONE for i in range(2000)}, "1999 levels"),
    "one level": ({n: v for n, v in STATE.items() if not n.startswith("down2")}, "multipliers: got (1,)"),
    "gap": ({n: v for n, v in STATE.items() if not n.startswith("up0")}, "up0.0.weight is missing"),
    "flat": (STATE | {"up0.0.weight": ONE}, "up0.0.weight is [1]"),
    "beyond counting": (STATE | {"up0.0.weight": torch.zeros(0, 0, 1 << 31, 1 << 31)}, "w.pth: "),
    "beyond float32": (floats(STATE, lambda v: v.double() * 1e300), "NaN or infinite values", "torch.float32"),
    "variance": (STATE | {VARIANCE: -torch.ones(8)}, VARIANCE, "negative values"),
    "more than it holds": (WIDE, "bytes of weights in a file of"),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_refused_names_the_file_and_replaces_nothing(imported, snapshot, tmp_path, monkeypatch, fault):
    monkeypatch.chdir(tmp_path)
    imported(OTHER)
    before = snapshot(tmp_path / "run")
    content, *words = REFUSED[fault]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answer, _ = imported(content, "--overwrite")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100_000  # kB
    assert answer.code == 2
    *_, line = answer.err.strip().splitlines()
    assert line.startswith(f"error: {tmp_path / 'w.pth'}: ")
    for word in words:
        assert word in line
    assert "ran" not in answer.out
    assert snapshot(tmp_path / "run") == before
    assert not (tmp_path / "ran").exists()


def test_archives_that_unpack_to_more_are_refused_unread(ddpm, tmp_path):
    torch.save(STATE, tmp_path / "w.pth")
    deflated(tmp_path / "w.pth")
    answer = ddpm("import", tmp_path / "w.pth", "--out", tmp_path / "run")
    assert answer.code == 2
    assert "w.pth: not a PyTorch file of weights alone (" in answer.err
    assert not (tmp_path / "run").exists()


def test_a_flipped_bit_of_a_weight_is_refused(ddpm, tmp_path):
    path = tmp_path / "w.pth"
    torch.save(STATE, path)
    content = bytearray(path.read_bytes())
    place = content.index(STATE[FIRST].numpy().tobytes())
    content[place + 5] ^= 64
    path.write_bytes(content)
    answer = ddpm("import", path, "--out", tmp_path / "run")
    assert answer.code == 2
    assert "w.pth: not a PyTorch file of weights alone (" in answer.err
    assert "does not have its checksum" in answer.err
    assert not (tmp_path / "run").exists()


def test_torchscript_is_refused_without_advice_to_run_it(ddpm, tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "w.pth")
    err = ddpm("import", tmp_path / "w.pth", "--out", tmp_path / "run").err
    line = err.strip().splitlines()[-1]
    assert line.endswith("w.pth: not a PyTorch file of weights alone (TorchScript), needs those: "
                         "torch.save(model.state_dict(), FILE)")  # fmt: skip
