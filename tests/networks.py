"""What each network does here: docs/networks.md has the table.

    PYTHONPATH=. python tests/networks.py --out bench/results/networks.jsonl

A small network is trained for a few steps on random data, then drawn by every engine, exported and profiled. A figure
is max |difference| / max(1, max |expected|): of `train` the losses of engine compile from those of eager; of eager the
samples from a float64 run, of other engines from eager; of the files from the run, as `ddpm-export onnx` measures it.
Engine graph is the stand-in of tests/ddpm/test_graph_emulated.py: what would be captured runs on the CPU.

The record has a line for each network, `--only NAME` renews those with NAME in theirs. `make report` makes the table,
test_networks.py says if it is too old. Another network is one more entry of NETWORKS.
"""

import argparse
import contextlib
import copy
import io
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import cli
from bench.machine import describe
from bench.suites.networks import BLOCKS
from ddpm import ContextUnet, PointMLP, SimpleUNet, Unet, load_run, sample, training
from ddpm.data import Dataset
from ddpm.distributed import World
from ddpm.errors import first_line
from ddpm.metrics import distance
from ddpm.networks import UNet2D
from ddpm.networks.protocol import condition_shape, one_hot_conditions, sample_shape
from ddpm.runs import Run
from export import bundle
from tests.ddpm.test_graph_emulated import emulated
from tests.records import code_digest, put

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
N, SEED, BATCH = 2, 3, 4
TRAIN = {"timesteps": 20, "schedule": "cosine", "prediction": "v", "batch_size": BATCH, "epochs": 2}
SAMPLE = {"solver": "ddpm", "steps": 8, "seed": SEED}


@dataclass(frozen=True)
class Network:
    """How it is made, small, and the files that it is written in, below the packages."""

    make: Callable[[], nn.Module]
    files: tuple[str, ...]

    def code(self) -> str:
        """What test_networks.py compares: another one, and the record is too old."""
        return code_digest(ROOT / file for file in self.files)


UNET = {"dim": 8, "dim_mults": (1, 2), "channels": 1, "image_size": 16}
UNET_FILES = ("ddpm/networks/unet.py", "ddpm/networks/unet_versions.py", "ddpm/inference/unet.py")
UNET2D = {"sample_size": 16, "in_channels": 1, "out_channels": 1} | BLOCKS
UNET2D |= {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
NETWORKS = {
    "ContextUnet": Network(
        lambda: ContextUnet(1, 8, 3, 16), ("ddpm/networks/context_unet.py", "ddpm/inference/context_unet.py")
    ),
    "SimpleUNet": Network(
        lambda: SimpleUNet(1, 8, 3, (14, 15)), ("ddpm/networks/simple_unet.py", "ddpm/inference/simple_unet.py")
    ),
    "Unet": Network(lambda: Unet(**UNET), UNET_FILES),
    "Unet, self_condition": Network(lambda: Unet(**UNET, self_condition=True), UNET_FILES),
    "Unet, version 0.27.12": Network(lambda: Unet(**UNET, version="0.27.12"), UNET_FILES),
    "UNet2D": Network(lambda: UNet2D(**UNET2D, num_class_embeds=3), ("ddpm/networks/unet2d.py",)),
    "PointMLP": Network(lambda: PointMLP(2, 8), ("ddpm/networks/mlp.py",)),
}


class Subject:
    """One network: what is tried with it, each a figure, or None for what has none."""

    def __init__(self, network: Network, folder: Path) -> None:
        self.network, self.folder = network, folder

    def made(self) -> nn.Module:
        torch.manual_seed(SEED)
        return self.network.make()

    def trained(self, engine: str) -> training.Trainer:
        network = self.made()
        shape = (2 * BATCH, *sample_shape(network))
        values = torch.randint(256, shape, dtype=torch.uint8) if len(shape) == 4 else torch.randn(shape)
        labels = one_hot_conditions(network, torch.arange(len(values)))
        names = () if labels is None else tuple("abc"[: labels.shape[1]])
        how = {"device": CPU, "world": World(), "dataset": Dataset("random", values, labels, names), "network": network}
        return training.train(training.TrainOptions(**TRAIN, engine=engine), self.folder / engine, **how)[0]

    @cached_property
    def losses(self) -> Tensor:
        return self.trained("eager").losses

    @cached_property
    def run(self) -> Run:
        assert self.losses.isfinite().all()
        return load_run(self.folder / "eager")

    def drawn(self, engine: str, dtype: torch.dtype = torch.float32) -> Tensor:
        model = copy.deepcopy(self.run.model).to(dtype)
        context = None if condition_shape(model) is None else one_hot_conditions(model, torch.arange(N))
        more = {"engine": engine, "dtype": dtype, "context": context, "prediction": TRAIN["prediction"]}
        return sample(model, self.run.schedule, N, **SAMPLE, **more)

    @cached_property
    def parity(self) -> list[dict[str, Any]]:
        asked = {name: value for name, value in SAMPLE.items() if name != "seed"}
        return bundle.write(self.run, self.folder / "exported", asked)["parity"]

    def exported(self, file: str) -> float:
        return max(result["error"] for result in self.parity if result["name"].startswith(file))

    # --- the columns of the table

    def train(self) -> float:
        return distance(self.trained("compile").losses, self.losses)

    def eager(self) -> float:
        return distance(self.drawn("eager"), self.drawn("eager", torch.float64))

    def fused(self) -> float:
        return distance(self.drawn("fused"), self.drawn("eager"))

    def compile(self) -> float:
        return distance(self.drawn("compile"), self.drawn("eager"))

    def native(self) -> float:
        return distance(self.drawn("native"), self.drawn("eager"))

    def graph(self) -> float:
        with pytest.MonkeyPatch.context() as patch, emulated(patch):
            return distance(self.drawn("graph"), self.drawn("eager"))

    def onnx_denoiser(self) -> float:
        return self.exported("denoiser.onnx")

    def onnx_sampler(self) -> float:
        return self.exported("sampler.onnx")

    def profile(self) -> None:
        said = io.StringIO()
        line = ["profile", str(self.run.folder), "--out", str(self.folder / "profile")]
        with contextlib.redirect_stderr(said):
            code = cli.main([*line, "--steps", "3", "--trajectories", "1", "--batch", str(N)])
        if code:
            raise RuntimeError(said.getvalue().strip().splitlines()[-1].removeprefix("error: "))


COLUMNS = ("train", "eager", "fused", "compile", "native", "graph", "onnx_denoiser", "onnx_sampler", "profile")


def tried(subject: Subject, column: str) -> dict[str, Any]:
    """{"figure": a number or None, "reason": None, or why it cannot be done}."""
    try:
        return {"figure": getattr(subject, column)(), "reason": None}
    except Exception as error:  # whatever it is, it is what the table says
        return {"figure": None, "reason": first_line(error).removeprefix(f"{subject.folder}/eager: ")[:200]}


def stored(path: Path, line: dict[str, Any]) -> None:
    """Put a line into the record, in place of an older one of the same network."""
    names = list(NETWORKS)
    put(path, line, lambda line: (names.index(line["network"]),) if line["network"] in names else None)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="NAME", help="networks whose name has this in it")
    parser.add_argument("--out", type=Path, metavar="F.jsonl", help="the record, which lines are added to")
    asked = parser.parse_args(arguments)
    machine = describe(CPU)
    about = {key: machine.get(key) for key in ("commit", "dirty", "processor", "torch")}
    for name, network in NETWORKS.items():
        if asked.only not in name:
            continue
        with tempfile.TemporaryDirectory(prefix="networks-") as folder:
            subject = Subject(network, Path(folder))
            cells = {column: tried(subject, column) for column in COLUMNS}
        date = datetime.now(UTC).isoformat(timespec="seconds")
        line = {"network": name, "date": date, "cells": cells, "code": network.code()} | about
        if asked.out:
            stored(asked.out, line)
        print(name, cells, sep="  ", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
