"""Shared by the tests of export/: tiny runs and their exports, made once; the command line in this process."""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from ddpm import runs
from ddpm.networks import ContextUnet
from ddpm.runs import make_config, start_run
from ddpm.schedule import NoiseSchedule
from export import bundle, traced
from export.__main__ import main
from export.traced import Traced

T = 12


def random_run(folder: Path, network: torch.nn.Module, classes: tuple[str, ...] = (), **sampling: object) -> Path:
    """A run of random weights and random BatchNorm statistics, which folding must not lose."""
    generator = torch.Generator().manual_seed(3)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.2, generator=generator)
    schedule = NoiseSchedule.make("linear", T, 1e-4, 0.6)
    folder.mkdir(parents=True)
    start_run(folder, make_config(network, schedule, "eps", classes=classes, sampling=sampling), network)
    return folder


@dataclass(frozen=True)
class Answer:
    """What a command left: its exit code and its two streams."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


_traced: dict[str, Traced] = {}


@pytest.fixture(scope="session", autouse=True)
def traced_once() -> Iterator[None]:
    """Tracing a network takes four seconds: each set of weights is traced once, by whoever calls traced.trace."""
    trace = traced.trace

    def remembered(model: torch.nn.Module) -> Traced:
        weights = b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())
        key = hashlib.sha256(repr((type(model), model.config())).encode() + weights).hexdigest()
        if key not in _traced:
            _traced[key] = trace(model)
        return _traced[key]

    with pytest.MonkeyPatch.context() as patch:
        for module in (traced, bundle):
            patch.setattr(module, "trace", remembered)
        yield


@pytest.fixture
def export(capfd) -> Callable[..., Answer]:
    """export("info", file): `ddpm-export` in this process, what onnxruntime writes past Python included."""

    def call(*arguments: object) -> Answer:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return Answer(code, *capfd.readouterr())

    return call


@pytest.fixture
def make_run() -> Callable[..., Path]:
    """make_run(folder, network, classes, **sampling): see `random_run`."""
    return random_run


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory) -> Path:
    """Three classes: 3x16x16, n_feat 8, ddpm, T = 12, clip 1."""
    torch.manual_seed(0)
    network = ContextUnet(3, 8, 3, 16)
    return random_run(tmp_path_factory.mktemp("runs") / "tiny", network, ("a", "b", "c"), clip=1.0)


@pytest.fixture(scope="session")
def opened(run_folder) -> runs.Run:
    return runs.load_run(run_folder)


@pytest.fixture(scope="session")
def unconditional(tmp_path_factory) -> runs.Run:
    """1x32x16 without classes, depth 2."""
    torch.manual_seed(1)
    folder = random_run(tmp_path_factory.mktemp("runs") / "plain", ContextUnet(1, 8, 0, (32, 16)))
    return runs.load_run(folder)


@pytest.fixture(scope="session")
def exported(run_folder, tmp_path_factory) -> Path:
    """The export of run_folder, verified. Copy it before changing it."""
    out = tmp_path_factory.mktemp("exported") / "onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kernels.backend.INTERPRETED", False)
        assert main(["onnx", str(run_folder), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def exported_open(run_folder, tmp_path_factory) -> Path:
    """The export of run_folder with an open table, verified."""
    out = tmp_path_factory.mktemp("exported") / "open"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kernels.backend.INTERPRETED", False)
        assert main(["onnx", str(run_folder), "--out", str(out), "--open-table"]) == 0
    return out


@pytest.fixture
def copied(exported, tmp_path) -> Path:
    """A copy of the export, to be changed: without its manifest, which would tell (see test_digest.py)."""
    without = shutil.ignore_patterns("manifest.json")
    return Path(shutil.copytree(exported, tmp_path / "copied", ignore=without))
