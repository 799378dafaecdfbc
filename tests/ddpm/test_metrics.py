"""Every measure against numbers that were computed by hand; what cannot be compared never passes."""

import math

import numpy as np
import pytest
import torch

from ddpm import metrics
from ddpm.metrics import distance, elementwise, engine_error, psnr, relative_l2, worst

A, B = torch.tensor([1.0, 2.0, 8.0]), torch.tensor([1.0, 3.0, 4.0])
CASES = [
    # |difference| is [0, 1, 4], over max(1, 4).
    (distance, A, B, 1.0),
    (distance, B, A, 0.5),
    # Below 1 it is absolute.
    (distance, torch.tensor([0.5]), torch.tensor([0.25]), 0.25),
    (distance, A, A, 0.0),
    (distance, torch.zeros(2, 0), torch.zeros(2, 0), 0.0),
    # [0/1, 1/3, 4/4]
    (elementwise, A, B, 1.0),
    (elementwise, B, A, 0.5),
    (elementwise, torch.tensor([0.5, -3.0]), torch.tensor([0.25, -2.0]), 0.5),
    (elementwise, torch.zeros(0), torch.zeros(0), 0.0),
    # sqrt(0 + 1 + 16) / sqrt(1 + 9 + 16)
    (relative_l2, A, B, math.sqrt(17 / 26)),
    (relative_l2, A, A, 0.0),
    (relative_l2, torch.zeros(3), torch.zeros(3), 0.0),
    (relative_l2, A, torch.zeros(3), math.inf),
    # Errors 0.5 and 0 of a range of 2: 10 log10(4 / 0.125).
    (psnr, torch.tensor([0.5, 0.2]), torch.tensor([0.0, 0.2]), 10 * math.log10(32)),
    # Clamped first: 3 and 1 are the same white.
    (psnr, torch.tensor([3.0, -2.0]), torch.tensor([1.0, -1.0]), math.inf),
    (psnr, torch.tensor([2.0, -1.0]), torch.tensor([-5.0, 1.0]), 0.0),
]


@pytest.mark.parametrize(("measure", "actual", "expected", "value"), CASES)
def test_by_hand(measure, actual, expected, value):
    assert measure(actual, expected) == pytest.approx(value, rel=1e-7)
    assert measure(actual.numpy(), expected.double()) == pytest.approx(value, rel=1e-7)
    assert type(measure(actual, expected)) is float


@pytest.mark.parametrize("measure", [distance, elementwise, relative_l2, lambda *pair: -psnr(*pair)])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_never_pass_on_either_side(measure, bad):
    spoilt = B.clone()
    spoilt[0] = bad
    for pair in ((spoilt, B), (B, spoilt), (spoilt, spoilt)):
        assert measure(*pair) == math.inf


@pytest.mark.parametrize("measure", [distance, elementwise, relative_l2, lambda *pair: -psnr(*pair)])
def test_another_shape_never_passes(measure):
    for other in (A[:2], A[None], A[:1], torch.tensor(1.0), torch.zeros(0)):
        assert measure(other, A) == math.inf
        assert measure(A, other) == math.inf


def test_it_is_computed_in_float64():
    one, other = torch.tensor([1.0], dtype=torch.float64), torch.tensor([1.0 + 1e-12], dtype=torch.float64)
    assert distance(one, other) == pytest.approx(1e-12, rel=1e-3)
    half = torch.tensor([60000.0, 1.0], dtype=torch.float16)
    assert relative_l2(half, half + torch.tensor([0, 1.0], dtype=torch.float16)) == pytest.approx(1 / 60000, rel=1e-3)
    assert distance(torch.tensor([3]), np.array([1])) == 2.0
    assert distance(torch.ones(2, requires_grad=True), torch.ones(2)) == 0.0


def test_the_worst_of_several_is_lost_to_no_nan():
    assert worst([0.1, 0.3, 0.2]) == 0.3
    assert worst([]) == 0.0
    for errors in ([0.1, math.nan], [math.nan, 0.1], [math.nan], [0.1, math.inf]):
        assert worst(errors) == math.inf
    assert worst(error for error in (0.1, 0.2)) == 0.2


def test_an_engine_is_judged_by_its_type():
    for dtype in (torch.float32, torch.float64):
        assert engine_error(A, B, dtype) == 1.0
    for dtype in (torch.bfloat16, torch.float16):
        assert engine_error(A, B, dtype) == pytest.approx(math.sqrt(17 / 26))


def test_the_tolerances_are_the_design_s():
    assert (metrics.ENGINE_TOLERANCE, metrics.SPLIT_TOLERANCE) == (1e-4, 1e-5)
