"""Shared by the tests of ddpm/: small networks and trainers, a tiny trained run, the command line in-process."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from ddpm import ContextUnet
from ddpm.commands import main
from ddpm.data import Dataset
from ddpm.distributed import World
from ddpm.training import Trainer, TrainOptions

TINY = ("--n-feat", "8", "--epochs", "1", "--timesteps", "20", "--beta-end", "0.35", "--device", "cpu")


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny networks are fastest on one thread, and agree bit for bit with subprocesses under OMP_NUM_THREADS=1."""
    with threads(1):
        yield


@pytest.fixture(autouse=True)
def no_tf32():
    """PyTorch's default convolves float32 in TF32 on CUDA: 2.5e-3 off within 20 steps."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    yield
    cudnn.allow_tf32, matmul.allow_tf32 = before


def trained(folder: Path, *arguments: str) -> Path:
    """A run, trained before any fixture of a single test has turned Triton's interpreter off."""
    with threads(1), pytest.MonkeyPatch.context() as patch:
        patch.setattr("kernels.backend.INTERPRETED", False)
        assert main(["train", "--out", str(folder), *TINY, *arguments]) == 0
    return folder


@pytest.fixture(scope="session")
def tiny_options() -> tuple[str, ...]:
    """Options of `ddpm train` for a run that takes a second."""
    return TINY


@pytest.fixture(scope="session")
def library() -> ModuleType:
    """denoising_diffusion_pytorch itself, where it is installed."""
    from bench import library

    if (name := library.missing()) is not None:
        pytest.skip(f"{name} is not installed here: docs/contributing.md says how it is")
    return library.load()


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory) -> Path:
    """A run on digits: n_feat 8, one epoch, T = 20. Copy it before changing it."""
    return trained(tmp_path_factory.mktemp("digits") / "run", "--data", "digits")


@pytest.fixture(scope="session")
def roll_run(tmp_path_factory) -> Path:
    """An unconditional run on the Swiss roll's points."""
    return trained(tmp_path_factory.mktemp("roll") / "run", "--data", "swiss-roll")


@pytest.fixture(scope="session")
def oblong_run(tmp_path_factory) -> Path:
    """A run on 24 pictures of three classes, 24 high and 16 wide; beside it x.npy, of 30x20, and y.npy."""
    folder, images = tmp_path_factory.mktemp("oblong"), np.random.default_rng(0).integers(0, 256, (24, 30, 20, 3))
    np.save(folder / "x.npy", images.astype(np.uint8))
    np.save(folder / "y.npy", np.arange(24) % 3)
    how = ("--image-size", "24x16", "--batch-size", "12", "--flip")
    return trained(folder / "run", "--data", str(folder / "x.npy"), "--labels", str(folder / "y.npy"), *how)


@pytest.fixture(scope="session")
def unet() -> Callable[..., ContextUnet]:
    """unet(seed=0, n_feat=16, ...): a ContextUnet in eval mode whose BatchNorms have gains and statistics of their own.

    The statistics are those of random images, so features keep to order 1 as in a trained network.
    """

    @torch.no_grad()
    def make(seed: int = 0, **arguments: object) -> ContextUnet:
        torch.manual_seed(seed)
        model = ContextUnet(**{"in_channels": 3, "n_feat": 8, "n_cfeat": 5, "height": 16} | arguments)
        norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.3)
        model(torch.randn(8, *model.sample_shape), torch.rand(8), torch.rand(8, model.n_cfeat))
        for norm in norms:
            norm.momentum = 0.1
        return model.eval()

    return make


@dataclass(frozen=True)
class Answer:
    """What a command left: its exit code and its two streams."""

    code: int
    out: str
    err: str


@pytest.fixture
def ddpm(capsys) -> Callable[..., Answer]:
    """ddpm("sample", run, "--n", 4): the command line in this process."""

    def call(*arguments: object) -> Answer:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Answer(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def spawn() -> Callable[..., subprocess.Popen]:
    """spawn("train", ...): `python -m ddpm` as a process of one thread; `ranks=2` puts it under torchrun."""

    def start(*arguments: object, ranks: int = 0) -> subprocess.Popen:
        # torchrun takes `--n` for one of its own options unless `--` stands before the module's name.
        run = ("torch.distributed.run", "--standalone", "--nproc-per-node", ranks, "-m", "--") if ranks else ()
        command = [sys.executable, "-m", *map(str, (*run, "ddpm", *arguments))]
        # As users run it: tests/conftest.py turns Triton's interpreter on for the kernels' tests.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
        )

    return start


@pytest.fixture(scope="session")
def snapshot() -> Callable[[Path], dict[str, str]]:
    """snapshot(folder): sha256 of every file below it, and the names of its folders."""

    def take(folder: Path) -> dict[str, str]:
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
            for path in sorted(folder.rglob("*"))
        }

    return take


@pytest.fixture
def tiny_data() -> Dataset:
    """24 random 1x16x16 images of 3 classes."""
    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.integers(0, 256, (24, 1, 16, 16), dtype=np.uint8))
    labels = torch.eye(3)[torch.arange(24) % 3]
    return Dataset("tiny", values, labels, ("a", "b", "c"))


@pytest.fixture
def make_trainer(tiny_data) -> Callable[..., Trainer]:
    """make_trainer(batch_size=4, network=..., ...): a small Trainer; the rest are TrainOptions."""
    defaults = {"n_feat": 8, "timesteps": 20, "schedule": "cosine", "batch_size": 8, "epochs": 2, "seed": 5}

    def make(dataset: Dataset = tiny_data, network=None, world: World | None = None, **options: object) -> Trainer:
        assert set(options) <= {field.name for field in fields(TrainOptions)}
        chosen = TrainOptions(**(defaults | options))
        network = chosen.make_network(dataset) if network is None else network
        return Trainer(network, dataset, chosen, torch.device("cpu"), world or World())

    return make
