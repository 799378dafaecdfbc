"""`ddpm-bench peers` on a small network: every competitor draws eager's pictures, and a wrong one is noticed."""

import types

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is optional and not installed here")

from bench import peers
from bench.cli import main
from ddpm import ContextUnet, NoiseSchedule, PointMLP, Trajectory, make_table
from ddpm.metrics import distance
from ddpm.runs import make_config, start_run

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    """n_feat 8, and no compiler."""
    torch.manual_seed(0)
    model = ContextUnet(3, 8, 5, 16).eval()
    monkeypatch.setattr(peers, "network", lambda device: model)
    engines = peers.competitors
    monkeypatch.setattr(peers, "competitors", lambda *where: [name for name in engines(*where) if name != "compile"])
    return model


def write(folder, network, classes=()):
    schedule = NoiseSchedule.make("linear", 20, 1e-4, 0.35)
    folder.mkdir()
    start_run(folder, make_config(network, schedule, "eps", classes=classes), network)
    return folder


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_every_loop_draws_what_eager_draws(small, solver, guidance):
    bench = peers._build(None, solver, 5, 2, guidance, CPU)
    names = {f"diffusers {solver.upper()}Scheduler", f"Fused{solver.upper()}Scheduler", "fused"}
    assert names < bench.candidates.keys()
    assert "compile" not in bench.candidates
    for name in names:
        candidate = bench.candidates[name]
        assert candidate.error(candidate.make()) <= candidate.tolerance, name


def test_a_loop_that_draws_something_else_has_no_parity(small):
    candidate = peers._build(None, "ddim", 5, 2, 1.0, CPU).candidates["diffusers DDIMScheduler"]
    call = candidate.make()
    assert candidate.error(lambda: call() * 1.001) > candidate.tolerance
    assert not candidate.error(lambda: call() * torch.nan) <= candidate.tolerance


@pytest.mark.parametrize(("classes", "guidance"), [(("a", "b"), 2.0), ((), 1.0)])
def test_a_run_s_network_and_classes_are_sampled(small, tmp_path, classes, guidance):
    torch.manual_seed(1)
    own = ContextUnet(1, 8, len(classes), 16).eval()
    run = peers._opened(write(tmp_path / "run", own, classes), guidance)
    bench = peers._build(run, "ddim", 5, 3, guidance, CPU)
    table = make_table(run.schedule, "ddim", 5)
    context = torch.eye(2)[[0, 1, 0]] if classes else None
    expected = Trajectory(own, run.schedule, table, engine="eager", guided=True)(3, context, guidance, peers.SEED)
    assert distance(bench.reference(), expected) <= 1e-5
    candidate = bench.candidates["diffusers DDIMScheduler"]
    assert candidate.error(candidate.make()) <= candidate.tolerance


def test_a_run_of_points_and_guidance_without_classes_are_refused(small, tmp_path, capsys):
    points = write(tmp_path / "points", PointMLP(2, 8))
    plain = write(tmp_path / "plain", ContextUnet(1, 8, 0, 16))
    for arguments, words in (
        ([points], "its samples are [2], needs a run of images"),
        ([plain, "--guidance"], "class"),
    ):
        asked = ["peers", "--run", *map(str, arguments), "--steps", "5", "--out", str(tmp_path / "p.json")]
        assert main(asked) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
    assert not (tmp_path / "p.json").exists()


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
