"""solver_step against its equation in float64, its noise from an independent Philox."""

import numpy as np
import pytest
import torch

from kernels import philox, solver_step

SHAPES = [(3, 1, 16, 16), (5, 3, 7, 9), (4, 17), (2, 1), (1, 2, 3, 5, 2)]
SEED = 2**45 + 1
TIMES = (900, 31, 1)
pytestmark = pytest.mark.usefixtures("on_cpu", "poisoned")


@pytest.fixture(params=["triton_device", "cpu"])
def device(request, on_cpu):
    """Where the operator is in Triton, and the CPU."""
    if request.param == "cpu":
        return torch.device("cpu")
    if on_cpu == "reference":
        pytest.skip("it is in Triton")
    return request.getfixturevalue(request.param)


def arguments(shape, dtype=torch.float32):
    """x, m, m_uncond, x0_prev, samples of a seeded batch."""
    generator = torch.Generator().manual_seed(6)
    fields = (torch.randn(shape, generator=generator).to(dtype) for _ in range(4))
    return (*fields, 2**32 - 1 + torch.arange(shape[0]))


def random_table(dtype=torch.float32):
    """Three rows: random coefficients, then t."""
    coefficients = torch.randn(3, 7, generator=torch.Generator().manual_seed(7))
    return torch.cat([coefficients, torch.tensor(TIMES)[:, None]], dim=1).to(dtype)


def equation(x, m, table, index, z, x0_prev=0.0, clip=np.inf):
    """(x_new, x0) in float64."""
    c = table[index].double().numpy()
    x, m = x.double().numpy(), m.double().numpy()
    x0 = np.clip(c[0] * x + c[1] * m, -clip, clip)
    return c[2] * x + c[3] * x0 + c[4] * m + c[5] * x0_prev + c[6] * z, x0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_equation(plain_normals, shape, index):
    x, m, _, x0_prev, samples = arguments(shape)
    table = random_table()
    z = plain_normals(SEED, samples, TIMES[index], 1, shape[1:])
    expected, x0 = equation(x, m, table, index, z, x0_prev.double().numpy(), clip=0.7)
    solver_step(x, m, table, index, SEED, samples, x0_prev=x0_prev, clip=0.7)
    np.testing.assert_allclose(x, expected, atol=2e-5, rtol=0)
    np.testing.assert_allclose(x0_prev, x0, atol=2e-6, rtol=0)
    assert np.abs(x0).max() <= 0.7


def test_float64_is_computed_in_float64(plain_normals):
    x, m, _, x0_prev, samples = arguments((4, 3, 5), torch.float64)
    table = random_table(torch.float64)
    z = plain_normals(SEED, samples, TIMES[1], 1, (3, 5))
    expected, _ = equation(x, m, table, 1, z, x0_prev.numpy())
    solver_step(x, m, table, 1, SEED, samples, x0_prev=x0_prev)
    np.testing.assert_allclose(x, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_state_is_the_rounded_float32_step(dtype):
    x, m, uncond, x0_prev, samples = arguments((4, 9), dtype)
    wide = [field.float() for field in (x, m, uncond, x0_prev)]
    table = random_table()
    solver_step(wide[0], wide[1], table, 0, SEED, samples, wide[2], 2.5, wide[3], 1.0)
    solver_step(x, m, table, 0, SEED, samples, uncond, 2.5, x0_prev, 1.0)
    assert torch.equal(x, wide[0].to(dtype))
    assert torch.equal(x0_prev, wide[3].to(dtype))


def test_x_is_changed_in_place_and_nothing_else():
    x, m, uncond, _, samples = arguments((3, 4))
    table = random_table()
    before, rest = x.clone(), [value.clone() for value in (m, uncond, table, samples)]
    got = solver_step(x, m, table, 0, SEED, samples, m_uncond=uncond, guidance=2.0)
    assert got is x
    assert not torch.equal(x, before)
    assert all(torch.equal(a, b) for a, b in zip((m, uncond, table, samples), rest, strict=True))


def test_autograd_sees_that_x_was_changed():
    x, m, _, x0_prev, samples = arguments((3, 4))
    for index, kept in enumerate((x, x0_prev)):
        y = torch.ones(3, 4, requires_grad=True)
        loss = (y * kept).sum()
        solver_step(x, m, random_table(), index, SEED, samples, x0_prev=x0_prev)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_step_records_no_graph(mode):
    x, m, uncond, x0_prev, samples = arguments((3, 4))
    expected = solver_step(x.clone(), m, random_table(), 1, SEED, samples, uncond, 2.0, x0_prev.clone())
    with mode():
        m = m.clone().requires_grad_()
        got = solver_step(x.clone(), m, random_table(), 1, SEED, samples, uncond, 2.0, x0_prev.clone())
    assert not got.requires_grad
    assert torch.equal(got, expected)


def test_a_strided_view_is_refused_and_left_alone():
    whole = torch.zeros(3, 8)
    _, m, *_, samples = arguments((3, 4))
    with pytest.raises(ValueError, match="x: has strides"):
        solver_step(whole[:, ::2], m, random_table(), 0, SEED, samples)
    assert not whole.any()


def test_without_x0_prev_the_memory_is_zero():
    x, m, _, x0_prev, samples = arguments((3, 4))
    other = x.clone()
    solver_step(x, m, random_table(), 0, SEED, samples)
    solver_step(other, m, random_table(), 0, SEED, samples, x0_prev=x0_prev.zero_())
    assert torch.equal(x, other)


def test_two_steps_pass_x0_on(plain_normals):
    x, m, _, x0_prev, samples = arguments((2, 5))
    table = random_table()
    z = [plain_normals(SEED, samples, t, 1, (5,)) for t in TIMES]
    first, x0 = equation(x, m, table, 0, z[0], x0_prev.double().numpy())
    second, _ = equation(torch.from_numpy(first), m, table, 1, z[1], x0)
    for index in (0, 1):
        solver_step(x, m, table, index, SEED, samples, x0_prev=x0_prev)
    np.testing.assert_allclose(x, second, atol=5e-5, rtol=0)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.5, -1.0])
def test_guidance(guidance):
    x, m, uncond, _, samples = arguments((3, 2, 4))
    expected = solver_step(x.clone(), uncond + guidance * (m - uncond), random_table(), 1, SEED, samples)
    got = solver_step(x, m, random_table(), 1, SEED, samples, m_uncond=uncond, guidance=guidance)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_guidance_as_a_tensor():
    x, m, uncond, _, samples = arguments((3, 4))
    got = solver_step(x.clone(), m, random_table(), 1, SEED, samples, uncond, torch.tensor(2.5))
    torch.testing.assert_close(got, solver_step(x, m, random_table(), 1, SEED, samples, uncond, 2.5))


def test_guidance_by_row(device):
    x, m, uncond, _, samples = (tensor.to(device) for tensor in arguments((3, 4)))
    table, weights = random_table().to(device), torch.tensor([2.5, 0.0, -1.0], device=device)
    results = []
    for index, weight in enumerate(weights.tolist()):
        at = torch.tensor(index, device=device)
        results.append(solver_step(x.clone(), m, table, at, SEED, samples, uncond, weights))
        assert torch.equal(results[-1], solver_step(x.clone(), m, table, index, SEED, samples, uncond, weight))
        wide = weights.repeat_interleave(2).double()[::2]
        assert torch.equal(results[-1], solver_step(x.clone(), m, table, at, SEED, samples, uncond, wide))
    assert not torch.equal(results[0], solver_step(x.clone(), m, table, 0, SEED, samples, uncond, weights.flip(0)))


def test_guidance_by_row_and_sample(device):
    x, m, uncond, _, samples = (tensor.to(device) for tensor in arguments((5, 3, 7, 9)))
    table, weights = random_table().to(device), torch.linspace(-2, 5, 15, device=device).reshape(3, 5)
    for index in range(3):
        whole = solver_step(x.clone(), m, table, index, SEED, samples, uncond, weights)
        for k in range(5):
            one = slice(k, k + 1)
            given = (m[one], table, index, SEED, samples[one], uncond[one], weights[index, k].item())
            torch.testing.assert_close(whole[one], solver_step(x[one].clone(), *given), atol=1e-6, rtol=0)
        given = (m, table, index, SEED, samples, uncond, weights.T.contiguous().T)
        assert torch.equal(solver_step(x.clone(), *given), whole)


@pytest.mark.parametrize("weights", [torch.ones(2), torch.ones(3, 1), torch.ones(0), torch.ones(3).long()])
def test_guidance_of_another_length_than_the_table(weights):
    x, m, uncond, _, samples = arguments((3, 4))
    with pytest.raises(ValueError, match=r"guidance: got .* needs a number or a floating \[3\]"):
        solver_step(x, m, random_table(), 1, SEED, samples, uncond, weights)


@pytest.mark.parametrize("weights", [torch.ones(3, device="meta"), torch.ones((), device="meta")])
def test_guidance_elsewhere(weights):
    x, m, uncond, _, samples = arguments((3, 4))
    with pytest.raises(ValueError, match=r"guidance: .* on meta"):
        solver_step(x, m, random_table(), 1, SEED, samples, uncond, weights)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_tensor_index_and_seed(shape):
    x, m, *_, samples = arguments((3, 4))
    got = solver_step(x.clone(), m, random_table(), torch.full(shape, 2), torch.full(shape, SEED), samples)
    assert torch.equal(got, solver_step(x, m, random_table(), 2, SEED, samples))


def test_a_row_without_noise_ignores_the_seed():
    x, m, *_, samples = arguments((3, 4))
    table = random_table()
    noisy = [solver_step(x.clone(), m, table, 0, seed, samples) for seed in (1, 2)]
    assert not torch.equal(*noisy)
    table[0, 6] = 0
    silent = [solver_step(x.clone(), m, table, 0, seed, samples) for seed in (1, 2)]
    assert torch.equal(*silent)


def test_noise_is_drawn_for_noisy_rows_only(monkeypatch, on_cpu):
    if on_cpu == "native":
        pytest.skip("the kernel draws it itself")
    x, m, *_, samples = arguments((3, 4))
    table = random_table()
    table[0, 6] = 0
    drawn = []
    normal = philox.normal
    monkeypatch.setattr(philox, "normal", lambda *given, **options: drawn.append(given) or normal(*given, **options))
    solver_step(x, m, table, 0, SEED, samples)
    assert not drawn
    solver_step(x, m, table, 1, SEED, samples)
    ((seed, _, step, stream, _),) = drawn
    assert (int(seed), int(step), int(stream)) == (SEED, TIMES[1], 1)


def test_rows_do_not_depend_on_the_batch():
    x, m, *_, samples = arguments((4, 3, 5))
    order = torch.tensor([3, 1])
    part = solver_step(x[order], m[order], random_table(), 0, SEED, samples[order])
    solver_step(x, m, random_table(), 0, SEED, samples)
    torch.testing.assert_close(part, x[order], atol=1e-6, rtol=0)


def test_memory_format_does_not_matter():
    x, m, *_, samples = arguments((2, 3, 4, 5))
    last = x.contiguous(memory_format=torch.channels_last)
    solver_step(last, m, random_table(), 0, SEED, samples)
    assert torch.equal(last, solver_step(x, m, random_table(), 0, SEED, samples))


def test_no_samples():
    x, m, *_, samples = arguments((0, 3, 4))
    assert solver_step(x, m, random_table(), 0, SEED, samples).shape == (0, 3, 4)


X, SAMPLES = torch.zeros(2, 3), torch.arange(2)
BAD = [
    ({"x": torch.zeros(2, 3, dtype=torch.int64)}, "x: got"),
    ({"x": torch.zeros(2)}, "x: got"),
    ({"m": torch.zeros(2, 4)}, "m: got"),
    ({"m": torch.zeros(2, 3, dtype=torch.int64)}, "m: got"),
    ({"m_uncond": torch.zeros(3)}, "m_uncond: got"),
    ({"x0_prev": torch.zeros(1, 3)}, "x0_prev: got"),
    ({"table": torch.zeros(3, 7)}, "table: got"),
    ({"table": torch.zeros(8)}, "table: got"),
    ({"table": torch.zeros(3, 8, dtype=torch.int64)}, "table: got"),
    ({"index": 3}, "index: got 3, needs 0..2"),
    ({"index": -1}, "index: got"),
    ({"index": torch.tensor([0, 1])}, "index: got"),
    ({"index": torch.tensor(0.0)}, "index: got"),
    ({"samples": torch.arange(3)}, "samples: got"),
    ({"samples": torch.arange(2.0)}, "samples: got"),
    ({"samples": torch.tensor([0, 2**56])}, "samples: got"),
    ({"seed": -1}, "seed: got"),
    ({"seed": torch.zeros(2, dtype=torch.int64)}, "seed: got"),
    ({"clip": -1.0}, "clip: got"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments(change, message):
    good = {"x": X.clone(), "m": X, "table": torch.zeros(3, 8), "index": 0, "seed": 0, "samples": SAMPLES}
    with pytest.raises((TypeError, ValueError), match=message):
        solver_step(**good | change)


def test_a_refused_call_leaves_x_alone():
    x, m, *_, samples = arguments((2, 3))
    before = x.clone()
    with pytest.raises(ValueError, match="samples: got"):
        solver_step(x, m, random_table(), 0, SEED, samples - 2**33)
    assert torch.equal(x, before)
