"""Scores and the other predictions against autograd of log q of a Gaussian mixture, all in float64."""

import math
import re

import pytest
import torch

from ddpm import NoiseSchedule, make_table
from ddpm.score import KINDS, convert, score

SCHEDULE = NoiseSchedule.make("cosine", 50)
MEANS = torch.tensor([[2.0, 0.0], [-1.0, 1.5], [0.5, -2.0]], dtype=torch.float64)
SHARES = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
SPREAD = 0.3


def log_q(x, a):
    """log q_t of the mixture of N(mean, SPREAD^2 I), diffused: float64 [n]."""
    variance = a * SPREAD**2 + 1 - a
    squares = (x[:, None] - math.sqrt(a) * MEANS).square().sum(-1)
    return torch.logsumexp(SHARES.log() - squares / (2 * variance) - math.log(2 * math.pi * variance), dim=1)


def truth(x, a):
    """All KINDS at x: the score by autograd, x0 as the posterior's mean, component by component."""
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(log_q(leaf, a).sum(), leaf)
    variance = a * SPREAD**2 + 1 - a
    offsets = x[:, None] - math.sqrt(a) * MEANS
    shares = torch.softmax(SHARES.log() - offsets.square().sum(-1) / (2 * variance), dim=1)
    x0 = (shares[..., None] * (MEANS + math.sqrt(a) * SPREAD**2 / variance * offsets)).sum(1)
    eps = (shares[..., None] * (math.sqrt(1 - a) / variance * offsets)).sum(1)
    return {"score": gradient, "x0": x0, "eps": eps, "v": math.sqrt(a) * eps - math.sqrt(1 - a) * x0}


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", KINDS)
def test_every_prediction_from_every_other(source, target):
    x = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    for t in (1, 10, 25, 40, 49):
        a = SCHEDULE.alpha_bars[t].item()
        known = truth(x, a)
        torch.testing.assert_close(convert(known[source], x, a, source, target), known[target], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_time_for_each_row_and_float32(kind):
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
    a = SCHEDULE.alpha_bars[[5, 20, 45]]
    known = [truth(row[None].double(), each) for row, each in zip(x, a.tolist(), strict=True)]
    given = torch.cat([each["eps"] for each in known]).float()
    found = convert(given, x, a, "eps", kind)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.cat([each[kind] for each in known]).float(), rtol=1e-5, atol=1e-5)


class Mixture(torch.nn.Module):
    """The exact prediction of a kind; in train mode, which scores must not run in, NaN."""

    sample_shape = (2,)

    def __init__(self, kind, time="fraction"):
        super().__init__()
        self.kind, self.time = kind, time

    def forward(self, x, t, c=None):
        step = t[0].item() + 1 if self.time == "index" else round(t[0].item() * SCHEDULE.timesteps)
        value = truth(x.double(), SCHEDULE.alpha_bars[step].item())[self.kind].to(x.dtype)
        return value * math.nan if self.training else value


@pytest.mark.parametrize("time", ["fraction", "index"])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_the_score_of_a_network(prediction, time):
    x = torch.randn(32, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    model = Mixture(prediction, time).train()
    found = score(model, SCHEDULE, x, 30, prediction=prediction)
    torch.testing.assert_close(found, truth(x, SCHEDULE.alpha_bars[30].item())["score"], rtol=1e-9, atol=1e-9)
    assert model.training


BAD = [
    ({"source": "noise"}, "source: got 'noise', needs one of eps, v, x0, score"),
    ({"target": "flow"}, "target: got 'flow'"),
    ({"alpha_bar": 1.0}, "alpha_bar: got [1.0], needs numbers between 0 and 1"),
    ({"alpha_bar": float("nan")}, "alpha_bar: got [nan]"),
    ({"alpha_bar": torch.full((3,), 0.5)}, "alpha_bar: got shape [3], needs a number or [2]"),
    ({"value": torch.zeros(2, 3)}, "value: got shape [2, 3], needs that of x, [2, 2]"),
]


@pytest.mark.parametrize(("change", "words"), BAD)
def test_bad_arguments(change, words):
    x = torch.zeros(2, 2)
    arguments = {"value": x, "x": x, "alpha_bar": 0.5, "source": "eps", "target": "score"} | change
    with pytest.raises(ValueError, match=re.escape(words)):
        convert(**arguments)


@pytest.mark.parametrize(("t", "shape"), [(0, (2, 2)), (51, (2, 2)), (1.5, (2, 2)), (3, (2, 3))])
def test_bad_times_and_shapes(t, shape):
    with pytest.raises(ValueError, match=r"^[tx]: got"):
        score(Mixture("eps"), SCHEDULE, torch.zeros(shape), t)


def test_rows_of_a_corrected_table_are_steps_of_langevin_dynamics():
    """x + h score + sqrt(2 h) z, h = 2 (snr sigma)^2, whatever the network predicts."""
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    for prediction in ("eps", "v", "x0"):
        table = make_table(SCHEDULE, "pc", 5, corrections=2, snr=0.2, prediction=prediction)
        assert table.timesteps.tolist() == [50, 40, 40, 40, 30, 30, 30, 20, 20, 20, 10, 10, 10]
        assert (table.steps, len(table)) == (5, 13)
        for row in range(len(table)):
            a = SCHEDULE.alpha_bars[table.timesteps[row]].item()
            if table.begins[row]:
                continue
            h = 2 * 0.04 * (1 - a)
            known, c = truth(x, a), table.coefficients[row].tolist()
            m, x0 = known[prediction], known["x0"]
            torch.testing.assert_close(c[0] * x + c[1] * m, x0, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(c[2] * x + c[3] * x0 + c[4] * m, x + h * known["score"], rtol=1e-9, atol=1e-9)
            assert c[5:] == [0.0, pytest.approx(math.sqrt(2 * h))]
