"""shifted: in C++ and by PyTorch against float64; bad input."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from kernels import native
from kernels.shifted import SOURCE, shifted

LAST = torch.channels_last


@pytest.mark.parametrize("in_cpp", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rows", ["one", "rows"])
@pytest.mark.parametrize(("copies", "shape"), [(1, (3, 5, 4, 3)), (2, (2, 32, 1, 1)), (3, (1, 17, 2, 5))])
def test_copies_have_their_shifts(poisoned, monkeypatch, in_cpp, threads, rows, copies, shape):
    if in_cpp and native.missing(SOURCE) is not None:
        pytest.skip(native.missing(SOURCE))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).contiguous(memory_format=LAST if in_cpp else torch.contiguous_format)
    shift = torch.randn(copies, shape[0] if rows == "rows" else 1, shape[1], generator=generator)
    out = shifted(x, shift)
    expected = torch.cat([x.double() + each.double()[:, :, None, None] for each in shift])
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=0)
    assert out.is_contiguous(memory_format=LAST) or not in_cpp


@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 2, 7), (2, 8)])
def test_bad_shifts(shape):
    with pytest.raises(ValueError, match=r"shift: got .* needs \[k, n or 1, C\]"):
        shifted(torch.zeros(2, 8, 4, 4), torch.zeros(shape))


def test_tensors_without_memory_have_shapes_alone():
    with FakeTensorMode():
        x = torch.zeros(2, 3, 4, 4).contiguous(memory_format=LAST)
        assert shifted(x, torch.zeros(2, 2, 3)).shape == (4, 3, 4, 4)
