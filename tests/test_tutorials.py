"""The tutorials' snippets in docs/coming_from.md compute what ours do: run as they stand there, only smaller.

Their random numbers are those of the noise contract here, so that both can be compared.
"""

import copy

import numpy as np
import pytest
import torch

from ddpm import ContextUnet, NoiseSchedule, sample
from ddpm.forward import chain
from ddpm.metrics import distance
from tests.test_docs import COMING_FROM, SMALLER_CODE, blocks

TRAINING, CHAIN, SAMPLER = (
    next(block.text for block in blocks(COMING_FROM) if words in block.text)
    for words in ("SimpleUNet(", "ddpm.forward", "sample_ddpm_context")
)


class Torch:
    """torch, whose normals are taken from a list."""

    def __init__(self, draws):
        self.draws = iter(draws)

    def __getattr__(self, name):
        return getattr(torch, name)

    def randn(self, *shape):
        return next(self.draws).reshape(shape)

    def randn_like(self, x):
        return self.randn(*x.shape)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(text, **names): the names after a snippet made smaller; `torch` in names is what it imports."""
    monkeypatch.chdir(tmp_path)

    def execute(text, **names):
        for size, small in SMALLER_CODE.items():
            text = text.replace(size, small)
        if "torch" in names:
            text = text.replace("import torch\n", "")
        exec(compile(text, "coming_from.md", "exec"), names)  # noqa: S102 (the page's own)
        return names

    return execute


def test_the_training_loop_learns_and_what_it_learned_is_sampled_as_the_tutorial_would(run, plain_normals):
    torch.manual_seed(0)
    left = run(TRAINING)
    model, steps = left["model"], left["T"]
    assert float(left["loss"].detach()) < 0.9  # 1 is knowing nothing
    assert left["digits"].shape == (20, 1, 8, 8)

    def normals(t, stream):
        return torch.from_numpy(plain_normals(1, range(5), t, stream, (1, 8, 8)))

    # Equation 11 of Ho et al. with t from 0, in float64.
    exact, classes = copy.deepcopy(model).double().eval(), left["classes"][:5].double()
    betas = torch.linspace(0.0001, 0.02, steps, dtype=torch.float64)
    alpha_bars = torch.cumprod(1 - betas, dim=0)
    before = torch.cat((torch.ones(1, dtype=torch.float64), alpha_bars[:-1]))
    x = normals(0, 0)
    with torch.no_grad():
        for t in reversed(range(steps)):
            times = torch.full((5,), t)
            with_class, without = exact(x, times, classes), exact(x, times)
            eps = without + 2 * (with_class - without)
            x = (x - betas[t] / (1 - alpha_bars[t]).sqrt() * eps) / (1 - betas[t]).sqrt()
            if t:
                variance = betas[t] * (1 - before[t]) / (1 - alpha_bars[t])
                x = x + variance.sqrt() * normals(t + 1, 1)
    assert distance(left["digits"][:5], x) < 1e-4


def test_the_forward_chain_is_ours(run, plain_normals):
    data = type("Data", (), {"values": torch.from_numpy(np.random.default_rng(0).integers(0, 256, (9, 1, 4, 4)))})
    draws = [torch.from_numpy(plain_normals(1, range(8), t, 1, (1, 4, 4))) for t in range(1, 21)]
    names = {"T": 20, "betas": torch.linspace(0.0001, 0.02, 20), "NoiseSchedule": NoiseSchedule}
    left = run(CHAIN, torch=Torch(draws), data=data, **names)
    assert distance(left["end"], left["x"]) < 1e-5
    assert distance(left["start"], left["x_0"]) < 1e-6
    assert torch.equal(left["middle"], chain(left["x_0"], NoiseSchedule.make("linear", 20), [10], seed=1)[0])


def test_the_courses_sampler_is_our_table(run, plain_normals, tmp_path):
    torch.manual_seed(0)
    (tmp_path / "weights").mkdir()
    weights = ContextUnet(3, 8, 5, 16).state_dict()
    published = {name: tensor for name, tensor in weights.items() if "shortcut" not in name}
    torch.save(published, tmp_path / "weights" / "context_model_trained.pth")
    n, steps = 32, 9
    draws = [torch.from_numpy(plain_normals(0, range(n), t, 1, (3, 16, 16))).float() for t in range(steps, 1, -1)]
    first = torch.from_numpy(plain_normals(0, range(n), 0, 0, (3, 16, 16))).float()
    names = {"F": torch.nn.functional, "NoiseSchedule": NoiseSchedule, "sample": sample}
    with pytest.warns(UserWarning, match=r"no init_conv\.shortcut"):
        left = run(SAMPLER, torch=Torch([first, *draws]), **names)
    # The last step of the table goes to x0 itself, that of the notebook leaves the noise of b_0.
    x, alpha_bar = torch.from_numpy(left["intermediate"][-2]), left["ab_t"][1]
    with torch.no_grad():
        eps = left["nn_model"](x, torch.full((n,), 1 / steps), left["ctx"])
    assert distance(left["sprites"], (x - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()) < 1e-4
    assert distance(left["sprites"], left["samples"]) < 0.05
