"""Suite `training`: one optimiser step (forward, backward, Adam, EMA) on random 16x16 images.

Parity is of the losses of the first four steps: the later ones depend on the earlier steps' gradients.
"""

from collections.abc import Sequence
from functools import cache, partial

import torch

from bench.registry import Bench, Candidate, Workload
from bench.suites.networks import AUTOTUNE, CHANNELS, CLASSES, N_FEAT, SEED, SIDE, flops_of
from ddpm.data import Dataset
from ddpm.distributed import World
from ddpm.engines import unavailable_reason
from ddpm.training import ENGINES, TrainOptions, make_trainer
from kernels.backend import Cost

IMAGES = 512
EPOCHS = 10_000  # more steps than a benchmark will take
PARITY_STEPS = 4
# Of the loss. Between engines in fp32: Adam divides by what it has seen, which amplifies the first gradients' rounding;
# 2.1e-4 in the worst of four steps at batch 8 on an EPYC with AVX2, below 1e-4 on a Xeon with AVX-512. Rounding to bf16
# moved it by 0.3% in the worst of four steps (batch 8, this network).
TOLERANCES = {"fp32": 5e-4, "bf16": 2e-2}
BATCHES = (32, 100)
STEPS_AHEAD = 10  # on CUDA


class Step:
    """A call: one step of a training run of its own. engine: or AUTOTUNE, the eager loop with a compiled network."""

    def __init__(self, batch: int, precision: str, engine: str, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(SEED)
        images = torch.randint(0, 256, (IMAGES, CHANNELS, SIDE, SIDE), generator=generator, dtype=torch.uint8)
        labels = torch.eye(CLASSES)[torch.arange(IMAGES) % CLASSES]
        dataset = Dataset("random", images, labels, tuple("abcde"))
        how = {"engine": "eager" if engine == AUTOTUNE else engine, "batch_size": batch, "precision": precision}
        options = TrainOptions(data="random", n_feat=N_FEAT, epochs=EPOCHS, seed=SEED, **how)
        network = options.make_network(dataset)
        self.trainer = make_trainer(network, dataset, options, device, World())
        if engine == AUTOTUNE:
            objective = self.trainer.objective
            objective.network = torch.compile(objective.network, mode=AUTOTUNE, dynamic=False)

    def __call__(self) -> None:
        self.trainer.step()

    def first_losses(self) -> torch.Tensor:
        """float64 [PARITY_STEPS]; takes the steps that are missing."""
        while self.trainer.index < PARITY_STEPS:
            self()
        return self.trainer.losses[:PARITY_STEPS].double().cpu()


def _build(batch: int, names: Sequence[str], calls: int, device: torch.device) -> Bench:
    """names: "ENGINE PRECISION", of which those that run here. calls: steps that are timed together."""
    reference = Step(batch, "fp32", "eager", device)
    expected = cache(lambda: Step(batch, "fp32", "eager", device).first_losses())

    def error(call: Step) -> float:
        return float(((call.first_losses() - expected()) / expected()).abs().max())

    candidates = {}
    for name in names:
        engine, precision = name.split()
        if engine == AUTOTUNE or unavailable_reason(engine, device) is None:
            make = partial(Step, batch, precision, engine, device)
            candidates[name] = Candidate(make, error, TOLERANCES[precision])
    network = reference.trainer.network
    parameters = sum(parameter.numel() for parameter in network.parameters())
    # Forward, and backward at twice its operations; weights, gradients, two moments and EMA, each read and written.
    cost = Cost(bytes=parameters * 4 * 10, flops=3 * batch * flops_of(network))
    return Bench([()] * calls, reference, candidates, cost, images=batch)


def cuda_workloads(batch: int) -> list[Workload]:
    """As `ddpm-bench gpu` measures them, the most important first: each may be the last for which there is time."""
    kinds = {
        "engines": ("graph bf16", "eager bf16"),
        "autotune-bf16": ("graph bf16", f"{AUTOTUNE} bf16", "compile bf16"),
        "autotune-fp32": ("graph fp32", f"{AUTOTUNE} fp32", "compile fp32"),
    }
    return [
        Workload(f"training/batch{batch}/{kind}", "training", partial(_build, batch, names, STEPS_AHEAD))
        for kind, names in kinds.items()
    ]


def workloads(quick: bool) -> list[Workload]:
    """By batch size."""
    names = (*(f"{engine} fp32" for engine in ENGINES if engine != "eager"), "eager bf16")
    return [
        Workload(f"training/batch{batch}", "training", partial(_build, batch, names, 1))
        for batch in ((8,) if quick else BATCHES)
    ]
