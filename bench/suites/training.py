"""Suite `training`: one optimiser step (forward, backward, Adam, EMA) on random 16x16 images.

Parity is of the losses of the first four steps: the later ones depend on the earlier steps' gradients.
"""

from functools import cache, partial

import torch

from bench.registry import Bench, Candidate, Workload
from bench.suites.networks import CHANNELS, N_CFEAT, N_FEAT, SEED, SIDE, forward_flops
from ddpm.data import Dataset
from ddpm.distributed import World
from ddpm.training import Trainer, TrainOptions
from kernels.backend import Cost

IMAGES = 512
EPOCHS = 10_000  # more steps than a benchmark will take
PARITY_STEPS = 4
# Rounding to bf16 moved the loss by 0.3% in the worst of four steps (batch 8, this network).
BF16_TOLERANCE = 2e-2
BATCHES = (32, 100)
QUICK_BATCHES = (8,)


class Step:
    """A call: one step of a training run of its own."""

    def __init__(self, batch: int, precision: str, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(SEED)
        images = torch.randint(0, 256, (IMAGES, CHANNELS, SIDE, SIDE), generator=generator, dtype=torch.uint8)
        labels = torch.eye(N_CFEAT)[torch.arange(IMAGES) % N_CFEAT]
        dataset = Dataset("random", images, labels, tuple("abcde"))
        options = TrainOptions(
            data="random", n_feat=N_FEAT, epochs=EPOCHS, batch_size=batch, precision=precision, seed=SEED
        )
        network = options.make_network(dataset)
        self.trainer = Trainer(network, dataset, options.make_schedule(), options, device, World())

    def __call__(self) -> None:
        self.trainer.step()

    def first_losses(self) -> torch.Tensor:
        """float64 [PARITY_STEPS]; takes the steps that are missing."""
        while self.trainer.index < PARITY_STEPS:
            self()
        return self.trainer.losses[:PARITY_STEPS].double().cpu()


def _build(batch: int, device: torch.device) -> Bench:
    expected = cache(lambda: Step(batch, "fp32", device).first_losses())

    def error(call: Step) -> float:
        return float(((call.first_losses() - expected()) / expected()).abs().max())

    reference = Step(batch, "fp32", device)
    parameters = sum(parameter.numel() for parameter in reference.trainer.network.parameters())
    # Forward, and backward at twice its operations; weights, gradients, two moments and EMA, each read and written.
    cost = Cost(bytes=parameters * 4 * 10, flops=3 * batch * forward_flops())
    candidates = {"bf16": Candidate(partial(Step, batch, "bf16", device), error, BF16_TOLERANCE)}
    return Bench([()], reference, candidates, cost, images=batch)


def workloads(quick: bool) -> list[Workload]:
    """By batch size."""
    return [
        Workload(f"training/batch{batch}", "training", partial(_build, batch))
        for batch in (QUICK_BATCHES if quick else BATCHES)
    ]
