"""`ddpm-bench peers` on a small network: every competitor draws eager's pictures, and a wrong one is noticed."""

import types

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is optional and not installed here")

from bench import peers
from bench.cli import main
from ddpm import ContextUnet
from ddpm.engines.compile import CompileEngine

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    """n_feat 8, and no compiler."""
    torch.manual_seed(0)
    model = ContextUnet(3, 8, 5, 16).eval()
    monkeypatch.setattr(peers, "network", lambda device: model)
    engines = {name: kind for name, kind in peers.ENGINES.items() if kind is not CompileEngine}
    monkeypatch.setattr(peers, "ENGINES", engines)
    return model


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_every_loop_draws_what_eager_draws(small, solver, guidance):
    bench = peers._build(None, solver, 5, 2, guidance, CPU)
    names = {f"diffusers {solver.upper()}Scheduler", f"Fused{solver.upper()}Scheduler", "fused"}
    assert names < bench.candidates.keys()
    for name in names:
        candidate = bench.candidates[name]
        assert candidate.error(candidate.make()) <= candidate.tolerance, name


def test_a_loop_that_draws_something_else_has_no_parity(small):
    candidate = peers._build(None, "ddim", 5, 2, 1.0, CPU).candidates["diffusers DDIMScheduler"]
    call = candidate.make()
    assert candidate.error(lambda: call() * 1.001) > candidate.tolerance


def test_diffusers_draws_its_own_noise_when_it_is_timed(small):
    candidate = peers._build(None, "ddpm", 5, 2, 1.0, CPU).candidates["diffusers DDPMScheduler"]
    call = candidate.make()
    candidate.error(call)
    assert not torch.equal(call(), call())


def test_gaussian_diffusion_gets_what_it_asks_for(small, monkeypatch):
    """A stand-in with the constructor and the two methods that are used of the real one."""

    class GaussianDiffusion(torch.nn.Module):
        def __init__(
            self, model, *, image_size, timesteps, sampling_timesteps, objective, beta_schedule, auto_normalize
        ):
            super().__init__()
            assert model.channels == model.out_dim == 3
            assert (objective, beta_schedule, auto_normalize) == ("pred_noise", "linear", False)
            self.model, self.timesteps = model, timesteps
            scale = 1000 / timesteps
            betas = torch.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=torch.float64)
            self.alpha_bars = (1 - betas).cumprod(0).float()

        def model_predictions(self, x, t):
            a = self.alpha_bars[t][:, None, None, None]
            found = (x - (1 - a).sqrt() * self.model(x, t)) / a.sqrt()
            return types.SimpleNamespace(pred_x_start=found)

    monkeypatch.setattr(peers, "_gaussian_diffusion", lambda: GaussianDiffusion)
    candidate = peers._build(None, "ddim", 5, 2, 1.0, CPU).candidates["GaussianDiffusion"]
    assert candidate.error(None) <= candidate.tolerance


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "3", "--out", "here.json"], "error: --steps: got 3, needs a divisor of T = 500"),
        (["--out", "nowhere/here.json"], "error: --out: nowhere/here.json cannot be written"),
    ],
)
def test_bad_input_is_one_line(small, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["peers", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(message)
    assert not list(tmp_path.iterdir())
