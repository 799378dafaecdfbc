"""Suite `peers` on a small network: every competitor draws eager's pictures, and a wrong one is noticed."""

import importlib.util
import sys

import pytest
import torch

from bench import library
from bench.registry import selected
from bench.run import run_here
from bench.suites import networks, peers
from ddpm import ContextUnet, Unet

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    """n_feat 8, and no compiler. The runtimes, which run the export of the real network, are tested with that."""
    torch.manual_seed(0)
    model = ContextUnet(3, 8, 5, 16).eval()
    monkeypatch.setattr(peers, "network", lambda device: model)
    monkeypatch.setattr(peers, "competitors", lambda *where, **of: ["fused"])
    monkeypatch.setattr(peers, "RUNTIMES", {})
    return model


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_every_loop_draws_what_eager_draws(small, solver, guidance):
    pytest.importorskip("diffusers", reason="diffusers is optional and not installed here")
    bench = peers._build(solver, 5, 2, guidance, CPU)
    names = {f"diffusers {solver.upper()}Scheduler", f"Fused{solver.upper()}Scheduler", "fused"}
    assert set(bench.candidates) == names | {"torch.compile of eager"}
    for name in names:
        candidate = bench.candidates[name]
        assert candidate.error(candidate.make()) <= candidate.tolerance, name


def test_a_loop_that_draws_something_else_has_no_parity(small):
    pytest.importorskip("diffusers", reason="diffusers is optional and not installed here")
    candidate = peers._build("ddim", 5, 2, 1.0, CPU).candidates["diffusers DDIMScheduler"]
    call = candidate.make()
    assert candidate.error(lambda: call() * 1.001) > candidate.tolerance
    assert not candidate.error(lambda: call() * torch.nan) <= candidate.tolerance


def test_diffusers_draws_its_own_noise_when_it_is_timed(small):
    pytest.importorskip("diffusers", reason="diffusers is optional and not installed here")
    candidate = peers._build("ddpm", 5, 2, 1.0, CPU).candidates["diffusers DDPMScheduler"]
    call = candidate.make()
    candidate.error(call)
    assert not torch.equal(call(), call())


@pytest.mark.long
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_runtime_draws_what_eager_draws(runtime, guidance):
    pytest.importorskip(runtime, reason=f"{runtime} is optional and not installed here")
    candidate = peers._build("ddpm", 2, 2, guidance, CPU).candidates[runtime]
    assert candidate.error(candidate.make()) <= candidate.tolerance


def test_who_is_not_installed_is_said_and_left_out(small, monkeypatch):
    own = importlib.util.find_spec
    monkeypatch.setattr(peers, "find_spec", lambda name: None if name in peers.PACKAGES else own(name))
    monkeypatch.setattr(library, "missing", lambda: "einops")
    found, left_out = selected("peers", True, "")
    assert set(left_out) == {"diffusers", "openvino", "onnxruntime", library.NAME}
    assert left_out[library.NAME].endswith("needs einops, see docs/contributing.md")
    assert not any("unet" in workload.name for workload in found)
    assert left_out["openvino"] == "suite peers: openvino is not installed, needs: pip install 'fused-ddpm[peers]'"
    for name in ("diffusers", "bench.suites.export"):
        monkeypatch.setitem(sys.modules, name, None)  # whoever imports it all the same gets an ImportError
    assert set(found[0].build(CPU).candidates) == {"torch.compile of eager", "fused"}


def test_the_library_draws_what_eager_draws_with_its_own_noise_or_ours(monkeypatch):
    if (name := library.missing()) is not None:
        pytest.skip(f"{name} is not installed here: docs/contributing.md says how it is")
    monkeypatch.setattr(networks, "UNET", {"dim": 4, "dim_mults": (1, 2), "attn_dim_head": 4})
    monkeypatch.setitem(networks.OTHERS, "unet", lambda: Unet(**networks.UNET, image_size=8))
    monkeypatch.setattr(peers, "competitors", lambda *where, **of: ["fused"])
    found = {workload.name: workload for workload in selected("peers", True, "unet")[0]}
    bench = found["peers/unet/ddim2/batch1"].build(CPU)
    assert list(bench.candidates) == ["fused", library.NAME]
    for candidate in bench.candidates.values():
        call = candidate.make()
        assert candidate.error(call) <= candidate.tolerance
        assert candidate.error(lambda call=call: call() + 1) > candidate.tolerance


@pytest.mark.long
def test_the_suite_is_measured_as_the_others_are(small, monkeypatch):
    pytest.importorskip("diffusers", reason="diffusers is optional and not installed here")
    monkeypatch.setattr(torch, "compile", lambda model: model)
    content = run_here("peers", quick=True, pattern="ddpm2/batch1$", rounds=1, quiet=True)
    assert content["parity"]
    assert content["failed"] == 0
    assert content["seed"] == peers.SEED
    rows = [record["candidate"] for record in content["records"]]
    assert rows == ["eager", "torch.compile of eager", "diffusers DDPMScheduler", "FusedDDPMScheduler", "fused"]
