"""A network of somebody else's: whole indices for times, images that are no squares, conditions of two axes."""

import json

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from ddpm import NoiseSchedule, make_table, runs, sample
from ddpm.errors import BadInput, WorkFailed
from ddpm.metrics import distance
from ddpm.networks import NETWORKS, network
from ddpm.table import StepTable
from export import bundle, models, packages, run, traced
from export.cuda import StepLoop
from export.models import describe
from export.traced import trace
from export.verification import DENOISER_TOLERANCE, SAMPLER_TOLERANCE

T = 10


class Foreign(nn.Module):
    """3 x 5 x 7 images (105 numbers, no multiple of 4), conditions [3, 2] whose absence is 0.5 everywhere."""

    sample_shape, condition_shape, time, continuous_time = (3, 5, 7), (3, 2), "index", False

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width = width
        self.inp, self.out = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.time_embedding, self.condition = nn.Embedding(T, width), nn.Linear(6, width)

    def config(self) -> dict[str, object]:
        return {"width": self.width}

    def null_condition(self, n: int) -> torch.Tensor:
        return torch.full((n, 3, 2), 0.5)

    def forward(self, x, t, c=None):
        c = self.null_condition(len(x)).to(x) if c is None else c
        hidden = self.inp(x) + (self.time_embedding(t) + self.condition(c.flatten(1)))[:, :, None, None]
        return self.out(nn.functional.silu(hidden))


@pytest.fixture
def foreign(tmp_path):
    """A run of it, opened; its class is registered for the test alone."""
    network("foreign")(Foreign)
    try:
        torch.manual_seed(0)
        made, schedule = Foreign(), NoiseSchedule.make("cosine", T)
        folder = tmp_path / "run"
        folder.mkdir()
        runs.start_run(folder, runs.make_config(made, schedule, "v", sampling={"clip": 1.0}), made)
        yield runs.load_run(folder)
    finally:
        del NETWORKS["foreign"]


def conditions(n):
    return torch.rand(n, 3, 2, generator=torch.Generator().manual_seed(1))


def test_every_file_of_it_draws_its_pictures(foreign, tmp_path):
    options = foreign.options(steps=6)
    table = make_table(foreign.schedule, **options)
    out = tmp_path / "onnx"
    manifest = bundle.write(foreign, out, {"steps": 6})
    assert len(manifest["parity"]) == 5
    c = conditions(3)
    expected = sample(foreign.model, foreign.schedule, 3, context=c, guidance=2.0, seed=4, engine="eager", **options)
    session = run.open_session(out / "sampler.onnx", threads=1)
    metadata = run.metadata_of(session, out, "sampler")
    images = run.draw(session, metadata, np.arange(3), c.numpy(), seed=4, guidance=2.0)
    assert distance(images, expected) <= SAMPLER_TOLERANCE
    loop = StepLoop(out / "step.onnx", table.rows().numpy(), 1.0, 3, guided=True, provider="cpu")
    assert distance(loop(np.arange(3), c.numpy(), seed=4, guidance=2.0), expected) <= SAMPLER_TOLERANCE
    nothing = sample(foreign.model, foreign.schedule, 2, seed=4, engine="eager", **options)
    unconditional = run.draw(session, metadata, np.arange(2), run.contexts(None, metadata, np.arange(2)), seed=4)
    assert distance(unconditional, nothing) <= SAMPLER_TOLERANCE


def test_its_denoiser_takes_whole_indices(foreign, tmp_path):
    onnx.save(models.denoiser(foreign.model, traced.trace(foreign.model), "{}"), tmp_path / "denoiser.onnx")
    session = run.open_session(tmp_path / "denoiser.onnx", threads=1)
    assert {value.name: value.type for value in session.get_inputs()}["t"] == "tensor(int64)"
    x, t, c = torch.randn(4, 3, 5, 7), torch.tensor([0, 9, 3, 3]), conditions(4)
    (m,) = session.run(["m"], {"x": x.numpy(), "t": t.numpy(), "context": c.numpy()})
    with torch.no_grad():
        assert distance(m, foreign.model(x, t, c)) <= DENOISER_TOLERANCE


def test_torch_export_takes_it(foreign, tmp_path):
    assert packages.write_torch(foreign, tmp_path / "denoiser.pt2").good


def test_a_condition_on_the_command_line_is_all_its_numbers(foreign):
    assert torch.equal(foreign.context("1,2,3,4,5,6"), torch.tensor([[1.0, 2], [3, 4], [5, 6]]))
    metadata = {"format_version": run.FORMAT_VERSION, "condition_shape": [3, 2], "classes": []}
    assert run.contexts("1,2,3,4,5,6", metadata, np.arange(2)).tolist() == [[[1, 2], [3, 4], [5, 6]]] * 2
    for text in ("all", "1", "1,2"):
        with pytest.raises(run.UsageError, match=r"needs 6 finite numbers"):
            run.contexts(text, metadata, np.arange(2))
    with pytest.raises(BadInput, match="needs 6"):
        foreign.context("1")


def test_a_limited_guidance_and_repeated_timesteps_are_in_the_graph(foreign, tmp_path):
    """Rows without guidance, and noise steps that are no timesteps."""
    made = make_table(foreign.schedule, "ddpm", 5, prediction="v", clip=1.0)
    table = StepTable(
        made.timesteps[[0, 1, 1, 2, 3, 4]],
        made.coefficients[[0, 1, 1, 2, 3, 4]],
        1.0,
        "v",
        guidance_scale=torch.tensor([0, 1, 1, 0.5, 0, 1.0]),
        noise_steps=torch.tensor([10, 8, 8 | 1 << 20, 6, 4, 2]),
    )
    note = {"options": {"solver": "x"}, "steps": 6, "clip": 1.0}
    metadata = describe(foreign, "sampler", "fp32", noise="philox", table=note)
    graphs = traced.trace(foreign.model)
    onnx.save(models.sampler(foreign.model, graphs, table, T, "philox", json.dumps(metadata)), tmp_path / "s.onnx")
    session, c = run.open_session(tmp_path / "s.onnx", threads=1), conditions(2)
    images = run.draw(session, metadata, np.arange(2), c.numpy(), seed=3, guidance=3.0)
    eager = sample(foreign.model, foreign.schedule, 2, table=table, context=c, guidance=3.0, seed=3, engine="eager")
    assert distance(images, eager) <= SAMPLER_TOLERANCE


def test_what_the_exporter_cannot_follow_is_one_clear_error():
    class Reading(nn.Module):
        sample_shape = (1, 4, 4)

        def forward(self, x, t, c=None):
            return x * 2 if float(x.sum()) > 0 else x

    with pytest.raises(WorkFailed, match=r"^Reading: PyTorch's exporter cannot follow its forward: [^\n]*$"):
        trace(Reading())
