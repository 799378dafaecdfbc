"""On a CUDA device: every engine draws eager's pictures there, and those of the CPU."""

from functools import cache

import pytest
import torch

from ddpm import NoiseSchedule, engines, sample
from ddpm.metrics import distance

CUDA = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
SCHEDULE = NoiseSchedule.make("linear", 500)
# v-prediction with a network of order 1 keeps trajectories of order 1, as trained weights do.
OPTIONS = {"prediction": "v", "seed": 3}
WAYS = {
    "ddpm": {"solver": "ddpm", "steps": 50},
    "ddim": {"solver": "ddim", "steps": 20, "clip": 1.0},
    "dpmpp_2m": {"solver": "dpmpp_2m", "steps": 20},
    "dpmpp_2m guided": {"solver": "dpmpp_2m", "steps": 20, "guidance": 2.0},
}


@pytest.fixture(scope="module")
def draw(unet):
    """draw(device, engine, ...): with one network, so that what was compiled for it serves all tests."""
    model = unet(n_feat=16)

    def call(device, engine, n=3, **options):
        context = torch.eye(5, device=device)[torch.arange(n) % 5]
        return sample(model.to(device), SCHEDULE, n, engine=engine, context=context, **OPTIONS | options).cpu()

    return call


@pytest.fixture(scope="module")
def on_the_cpu(draw):
    return cache(lambda guidance: draw(torch.device("cpu"), "eager", guidance=guidance))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("engine", ["eager", "fused", "graph"])
def test_cpu_and_gpu_draw_the_same_picture_in_500_steps(draw, on_the_cpu, engine, guidance):
    assert distance(draw(CUDA, engine, guidance=guidance), on_the_cpu(guidance)) < 1e-3


@pytest.mark.parametrize("engine", ["fused", "graph", "compile"])
def test_engines_draw_eager_s_pictures(draw, engine):
    """All solvers in one test: compiling, once in a process, is most of its time."""
    assert engines.unavailable_reason(engine, CUDA) is None
    errors = {name: distance(draw(CUDA, engine, **way), draw(CUDA, "eager", **way)) for name, way in WAYS.items()}
    assert all(error < 1e-4 for error in errors.values()), errors
