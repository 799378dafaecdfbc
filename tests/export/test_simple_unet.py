"""A SimpleUNet leaves PyTorch as other networks do, at sides that are padded: denoiser, step and sampler, any batch."""

import numpy as np
import pytest
import torch

from ddpm import SimpleUNet, runs, sample
from ddpm.metrics import distance
from export import bundle, packages, run, traced
from export.precision import in_precision
from export.verification import DENOISER_TOLERANCE, SAMPLER_TOLERANCE

pytestmark = pytest.mark.long  # tracing takes its time


@pytest.fixture(params=[0, 3], ids=["plain", "classes"])
def opened(request, make_run, tmp_path):
    torch.manual_seed(0)
    network = SimpleUNet(2, 8, request.param, (9, 14), (1, 2))
    return runs.load_run(make_run(tmp_path / "run", network, solver="ddpm", steps=5, clip=1.0))


def check_files(opened, folder):
    """Denoiser, sampler and step of a run of two channels, with three classes or none, compute what it does."""
    manifest = bundle.write(opened, folder / "out", {})
    assert all(result["good"] for result in manifest["parity"])
    session = run.open_session(folder / "out" / "sampler.onnx", threads=1)
    classes, guided = None, {}
    if opened.model.condition_shape:
        classes, guided = torch.eye(3)[:2], {"guidance": 2.0}
    context = None if classes is None else classes.numpy()
    images = run.draw(session, run.metadata_of(session, folder), np.arange(3, 5), context, seed=2, **guided)
    options = opened.options() | {"context": classes, "seed": 2, "first_sample": 3, "engine": "eager"} | guided
    assert distance(images, sample(opened.model, opened.schedule, 2, **options)) <= SAMPLER_TOLERANCE
    session = run.open_session(folder / "out" / "denoiser.onnx", threads=1)
    x, t = (
        np.random.default_rng(0).standard_normal((70, *opened.model.sample_shape)).astype(np.float32),
        np.arange(70) % 12,
    )
    feeds = {"x": x, "t": t} | ({} if classes is None else {"context": np.eye(3, dtype=np.float32)[np.arange(70) % 3]})
    with torch.no_grad():
        m = opened.model(*map(torch.from_numpy, feeds.values()))
    assert distance(session.run(None, feeds)[0], m) <= DENOISER_TOLERANCE


def test_denoiser_sampler_and_step_compute_what_the_run_does(opened, tmp_path):
    check_files(opened, tmp_path)


def test_the_denoiser_as_a_program_and_in_eight_bits(opened, tmp_path):
    assert packages.write_torch(opened, tmp_path / "denoiser.pt2").good
    eight = in_precision(traced.trace(opened.model), "int8", opened)
    assert any(node.op_type == "QuantizeLinear" for node in eight.network.graph.node)
