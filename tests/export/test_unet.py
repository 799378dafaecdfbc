"""A Unet leaves PyTorch as other networks do: denoiser and sampler, with and without its own estimate as an input."""

import numpy as np
import onnx
import pytest
import torch

from ddpm import GaussianDiffusion, Unet, load_run
from ddpm.metrics import distance
from export import bundle, packages, run, traced
from export.precision import in_precision
from export.verification import DENOISER_TOLERANCE, SAMPLER_TOLERANCE

pytestmark = pytest.mark.long  # tracing takes its time
T = 6


@pytest.fixture(params=[False, True], ids=["plain", "its own estimate"])
def diffusion(request):
    torch.manual_seed(0)
    model = Unet(4, dim_mults=(1, 2), channels=2, attn_dim_head=4, self_condition=request.param)
    return GaussianDiffusion(model, image_size=(4, 8), timesteps=T, beta_schedule="cosine", sampling_timesteps=4)


@pytest.fixture
def opened(diffusion, tmp_path):
    diffusion.save_run(tmp_path / "run")
    return load_run(tmp_path / "run")


def test_denoiser_sampler_and_step_compute_what_the_run_does(diffusion, opened, tmp_path):
    manifest = bundle.write(opened, tmp_path / "out", {})
    assert len(manifest["parity"]) == 5
    assert all(result["good"] for result in manifest["parity"])
    inputs = {value.name for value in onnx.load(tmp_path / "out" / "denoiser.onnx").graph.input}
    assert inputs == {"x", "t"} | ({"x0_previous"} if diffusion.self_condition else set())
    session = run.open_session(tmp_path / "out" / "sampler.onnx", threads=1)
    images = run.draw(session, run.metadata_of(session, tmp_path), np.arange(3, 5), None, seed=2)
    expected = diffusion.sample(2, seed=2, first_sample=3, engine="eager")
    assert distance(diffusion.unnormalize(torch.from_numpy(images)), expected) <= SAMPLER_TOLERANCE
    if diffusion.self_condition:
        session = run.open_session(tmp_path / "out" / "denoiser.onnx", threads=1)
        x, previous = np.random.default_rng(0).standard_normal((2, 2, 2, 4, 8)).astype(np.float32)
        feeds = {"x": x, "t": np.array([0, T - 1]), "x0_previous": previous}
        with torch.no_grad():
            m = opened.model(*map(torch.from_numpy, (x, feeds["t"], previous)))
        assert distance(session.run(None, feeds)[0], m) <= DENOISER_TOLERANCE
        with pytest.raises(Exception, match="Reshape"):
            session.run(None, feeds | {"x0_previous": previous[:1]})


def test_the_denoiser_as_a_program_and_in_eight_bits(opened, tmp_path):
    assert packages.write_torch(opened, tmp_path / "denoiser.pt2").good
    eight = in_precision(traced.trace(opened.model), "int8", opened)
    assert any(node.op_type == "QuantizeLinear" for node in eight.network.graph.node)
