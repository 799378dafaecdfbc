"""diffusers' UNet2DModel leaves PyTorch as other networks do: denoiser, step and sampler, for any batch."""

import pytest
import torch

from ddpm import runs
from ddpm.networks import NETWORKS
from export import packages
from tests.export.test_simple_unet import check_files

pytestmark = pytest.mark.long  # tracing takes its time
pytest.importorskip("diffusers", reason="diffusers is optional and not installed here")


@pytest.fixture(params=[0, 3], ids=["plain", "classes"])
def opened(request, make_run, tmp_path):
    torch.manual_seed(0)
    network = NETWORKS["unet2d"].for_data((2, 16, 8), request.param, 8)
    how = {"solver": "ddim", "steps": 5, "spacing": "leading+1", "ends": 1, "clip": 1.0}
    return runs.load_run(make_run(tmp_path / "run", network, **how))


def test_denoiser_sampler_and_step_compute_what_the_run_does(opened, tmp_path):
    check_files(opened, tmp_path)


def test_the_denoiser_as_a_program(opened, tmp_path):
    assert packages.write_torch(opened, tmp_path / "denoiser.pt2").good
