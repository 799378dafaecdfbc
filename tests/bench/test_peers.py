"""`ddpm-bench peers` on a small network: every competitor draws eager's pictures, and a wrong one is noticed."""

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
