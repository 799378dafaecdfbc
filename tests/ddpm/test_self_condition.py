"""Networks that read their own estimate of x0: engines keep it for them, training gives it to half of the samples."""

import copy

import numpy as np
import pytest
import torch

from ddpm import NoiseSchedule, make_table, sample
from ddpm.data import Dataset
from ddpm.distributed import World
from ddpm.engines import ENGINES, unavailable_reason
from ddpm.inference import PlainForm
from ddpm.metrics import distance
from ddpm.training import CompileTrainer, TrainOptions, make_trainer

CPU = torch.device("cpu")
T, SHAPE = 12, (2, 4, 4)
SCHEDULE = NoiseSchedule.make("cosine", T)
HERE = [
    pytest.param(name, marks=pytest.mark.long if name == "compile" else ())
    for name in ENGINES
    if unavailable_reason(name, CPU, form=PlainForm) is None
]


class Recalling(torch.nn.Module):
    """Somebody's network with a condition that reads its own estimate."""

    sample_shape, condition_shape, time, self_condition = SHAPE, (3,), "index", True

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.given = []
        self.conv, self.linear = torch.nn.Conv2d(4, 2, 3, padding=1), torch.nn.Linear(3, 2)

    def forward(self, x, t, c=None, x0_previous=None):
        if not torch.compiler.is_compiling():
            self.given.append(x0_previous)
        c = x.new_zeros(len(x), 3) if c is None else c
        x0_previous = torch.zeros_like(x) if x0_previous is None else x0_previous
        y = self.conv(torch.cat((x, x0_previous), 1)) + self.linear(c)[:, :, None, None]
        return y * (1 + t / 12)[:, None, None, None]


@pytest.mark.parametrize("engine", HERE)
@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_the_estimate_of_the_row_before_is_the_fourth_argument(plain_normals, engine, guidance, solver):
    """The table by hand in float64: zeros on the first row, then the guided and clipped x0; both halves get it."""
    model = Recalling().eval()
    table = make_table(SCHEDULE, solver, 5, prediction="v", clip=1.0)
    context, double = torch.eye(3)[:2], copy.deepcopy(model).double()
    x = torch.from_numpy(plain_normals(3, range(2), 0, 0, SHAPE))
    x0 = torch.zeros_like(x)
    with torch.no_grad():
        for t, k in zip(table.timesteps, table.coefficients.tolist(), strict=True):
            m, uncond = (double(x, (t - 1).expand(2), c, x0) for c in (context.double(), None))
            m = uncond + guidance * (m - uncond)
            new = (k[0] * x + k[1] * m).clamp(-1, 1)
            x, x0 = k[2] * x + k[3] * new + k[4] * m + k[5] * x0, new
    drawn = sample(model, SCHEDULE, 2, table=table, context=context, guidance=guidance, seed=3, engine=engine)
    assert distance(drawn, x) < 1e-5


def trained(engine, **options):
    values = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (16, *SHAPE), dtype=np.uint8))
    dataset = Dataset("tiny", values, torch.eye(3)[torch.arange(16) % 3], ("a", "b", "c"))
    chosen = TrainOptions(timesteps=T, schedule="cosine", batch_size=8, epochs=2, seed=5, engine=engine, **options)
    trainer = make_trainer(Recalling(), dataset, chosen, CPU, World())
    while not trainer.done:
        trainer.step()
    return trainer


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_in_training_half_of_the_samples_get_the_first_estimate(plain_words, prediction):
    trainer = trained("eager", prediction=prediction)
    given = trainer.network.given
    assert [previous is None for previous in given] == [True, False] * 4
    for step, previous in enumerate(given[1::2]):
        kept = torch.tensor([plain_words(5, 8 * step + k, 0, 8, 1)[0] < 1 << 31 for k in range(8)])
        assert torch.equal(previous.flatten(1).any(1), kept)
        assert not previous.requires_grad
    assert all(bool(parameter.grad.any()) for parameter in trainer.network.parameters())


def test_the_estimate_leaves_gradients_of_bfloat16():
    trainer = trained("eager", precision="bf16")
    assert all(bool(parameter.grad.any()) for parameter in trainer.network.parameters())


def test_it_trains_alike_on_both_engines(monkeypatch):
    monkeypatch.setattr(CompileTrainer, "compiler", "aot_eager")
    assert distance(trained("compile").losses, trained("eager").losses) < 1e-5
