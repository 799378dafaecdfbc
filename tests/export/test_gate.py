"""What the comparison with the run allows: a tolerance, or what eager's own distance from float64 makes of it."""

import copy
from dataclasses import replace
from math import inf, nan

import numpy as np
import pytest
import torch

from ddpm.errors import WorkFailed
from export import bundle, verification
from export.verification import MOST_ALLOWED, Parity, allowed, denoiser_parity
from tests.export.test_commands import line

NEVER = pytest.fail


@pytest.mark.parametrize(
    ("error", "own", "expected"),
    [
        (9e-5, None, 1e-4),  # good: nobody measures
        (nan, None, 1e-4),
        (inf, None, 1e-4),
        (1.6e-4, 6e-5, 4 * 6e-5 + 1e-6),
        (1.6e-4, 1e-6, 1e-4),
        (0.3, 0.2, MOST_ALLOWED),  # eager is no reference there
        (0.3, inf, 1e-4),  # which an error of NaN or infinity reads as
    ],
)
def test_what_is_allowed(error, own, expected):
    measured = (lambda: own) if own is not None else (lambda: NEVER("measured without need"))
    assert allowed(1e-4, error, measured) == pytest.approx(expected)


def off_by(model, error, own):
    """(a denoiser that is off by `error` of eager, a model whose float64 result is off by `own`)."""

    class Eager(torch.nn.Module):
        sample_shape, condition_shape, time, config = (
            model.sample_shape,
            model.condition_shape,
            model.time,
            model.config,
        )

        def __init__(self):
            super().__init__()
            self.inner = model

        def null_condition(self, n):
            return model.null_condition(n)

        def forward(self, x, t, c=None):
            m = self.inner(x, t, c)
            return m + own * m.abs().max() if x.dtype == torch.float64 else m

    def denoise(x, t, c):
        m = model(x, t, c)
        return (m + error * m.abs().max().clamp(min=1)).numpy()

    return denoise, Eager()


@pytest.mark.parametrize(("error", "own", "good"), [(3e-5, 1e-5, True), (3e-5, 0.0, False), (nan, 1e-5, False)])
def test_one_call_of_the_network(opened, error, own, good):
    denoise, eager = off_by(copy.deepcopy(opened.model), error, own)
    assert denoiser_parity("x", denoise, replace(opened, model=eager)).good == good


@pytest.mark.parametrize(("own", "good"), [(6e-5, True), (1e-6, False), (nan, False)])
def test_whole_trajectories(exported, opened, monkeypatch, own, good):
    eager = verification._eager_trajectory

    def trajectory(run, table, dtype=torch.float32, **how):
        images = eager(run, table, **how)
        return images.double() + own * max(1, float(images.abs().max())) if dtype == torch.float64 else images

    loop = verification.StepLoop

    def off(*given, **more):
        draw = loop(*given, **more)
        return lambda *a, **k: draw(*a, **k) + np.float32(1.6e-4)

    monkeypatch.setattr(verification, "_eager_trajectory", trajectory)
    monkeypatch.setattr(verification, "StepLoop", off)
    (step,) = verification.parities({"step": exported / "step.onnx"}, opened)
    assert step.good == good
    assert 1e-4 < step.error < 2e-4


def test_float64_is_the_same_trajectory_more_exactly(exported, opened):
    _, _, own = verification.own_trajectories({"step": exported / "step.onnx"}, opened)
    assert 0 < own() < 1e-5


def test_only_who_writes_says_that_nothing_was_written(exported, run_folder, export, monkeypatch, tmp_path):
    monkeypatch.setattr(verification, "parities", lambda *_: [Parity("x", nan, 1.0)])
    monkeypatch.setattr(bundle, "parities", lambda *_: [Parity("x", nan, 1.0)])
    said = line(export("verify", exported / "sampler.onnx", run_folder), 1)
    assert said == "error: parity: x is off by nan, needs 1e+00 (1 of 1 comparisons failed)"
    said = line(export("onnx", run_folder, "--out", tmp_path / "x"), 1)
    assert said.endswith("(1 of 1 comparisons failed); nothing was written")
    with pytest.raises(WorkFailed, match="x is off by"):
        verification.require([Parity("x", nan, 1.0)])
