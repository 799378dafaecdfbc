"""placed: in C++ and by PyTorch against slices; bad input."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from kernels import native
from kernels.placed import SOURCE, placed

LAST = torch.channels_last


@pytest.mark.parametrize("in_cpp", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("channels", [2, 17])
@pytest.mark.parametrize(
    ("sides", "top", "left"),
    [((8, 9), 2, 1), ((3, 2), -1, -2), ((7, 3), 1, -1), ((5, 4), 1, 0), ((4, 9), -3, 5), ((5, 4), 0, 0)],
)
def test_images_on_a_canvas(poisoned, monkeypatch, in_cpp, threads, channels, sides, top, left):
    if in_cpp and native.missing(SOURCE) is not None:
        pytest.skip(native.missing(SOURCE))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x = torch.randn(3, channels, 5, 4, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=LAST if in_cpp else torch.contiguous_format)
    expected = torch.zeros(3, channels, 40, 40)
    expected[:, :, 20:25, 20:24] = x
    expected = expected[:, :, 20 - top : 20 - top + sides[0], 20 - left : 20 - left + sides[1]]
    out = placed(x, sides, top, left)
    assert torch.equal(out, expected)
    assert out.is_contiguous(memory_format=LAST) or not in_cpp


@pytest.mark.parametrize(("shape", "sides"), [((2, 3, 4), (4, 4)), ((1, 2, 3, 4), (0, 4)), ((1, 2, 3, 4), (4,))])
def test_bad_sides(shape, sides):
    with pytest.raises(ValueError, match=r"x: got .* needs"):
        placed(torch.zeros(shape), sides, 0, 0)


def test_tensors_without_memory_have_shapes_alone():
    with FakeTensorMode():
        x = torch.zeros(2, 3, 4, 4).contiguous(memory_format=LAST)
        assert placed(x, (5, 6), 1, 1).shape == (2, 3, 5, 6)
