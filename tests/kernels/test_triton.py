"""Every Triton kernel against float64 mathematics: interpreted on the CPU, compiled where there is a GPU."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.kernels import TOLERANCE
from kernels import backend, guidance_rescale, noise_mse, philox, q_sample, q_sample_rows, solver_step
from kernels.backend import jit, launch, tl
from kernels.items import division
from kernels.noise_mse import backward_operator

SEED = 2**62 + 12345
TIMESTEPS = 500

shapes = st.one_of(
    st.tuples(st.integers(1, 5), st.integers(1, 37)),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 7), st.integers(1, 9)),
    st.sampled_from([(2, 3, 16, 16), (1, 1, 28, 28), (3, 3, 8, 8), (0, 3, 8, 8), (1, 2, 33, 64), (2, 4, 4, 6)]),
    # More channels than a thread interleaves; a last run cut short behind several chunks.
    st.sampled_from([(2, 5, 8, 8), (3, 5, 7), (2, 1, 29, 31), (2, 7, 3, 3)]),
)
float_types = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
inputs = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.uint8])
many = settings(
    max_examples=18, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
few = settings(many, max_examples=7)  # about a second each


def close(actual, expected, dtype):
    expected = torch.as_tensor(expected)
    if expected.numel():
        error = (actual.double().cpu() - expected).abs() / expected.abs().clamp(min=1)
        assert error.max() <= TOLERANCE[dtype], float(error.max())
    assert actual.shape == expected.shape
    assert actual.dtype == dtype


def data_of(shape, dtype, generator, channels_last=False):
    if dtype == torch.uint8:
        values = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    else:
        values = torch.randn(shape, generator=generator).to(dtype)
    return values.contiguous(memory_format=torch.channels_last) if channels_last and values.ndim == 4 else values


def setting(shape, dtype, device, channels_last=False):
    """(x0, t, alpha_bars, samples) on the device, with sample indices around 2^32."""
    generator = torch.Generator().manual_seed(sum(shape))
    n = shape[0]
    x0 = data_of(shape, dtype, generator, channels_last)
    t = torch.randint(1, TIMESTEPS + 1, (n,), generator=generator)
    alpha_bars = torch.linspace(1, 1e-3, TIMESTEPS + 1)
    samples = torch.arange(n) * 3 + 2**32 - 2
    return [tensor.to(device) for tensor in (x0, t, alpha_bars, samples)]


def unit(x0):
    x0 = x0.cpu()
    return x0.double() / 127.5 - 1 if x0.dtype == torch.uint8 else x0.double()


def diffused(x0, t, alpha_bars, noise):
    ab = alpha_bars.cpu().double()[t.cpu()].reshape(-1, *(1,) * (x0.ndim - 1))
    return ab.sqrt() * unit(x0) + (1 - ab).sqrt() * noise


@jit
def words_kernel(out, seed, samples, step, STREAM: tl.constexpr, BLOCKS: tl.constexpr):
    block = tl.arange(0, BLOCKS)
    sample = tl.load(samples + tl.program_id(0))
    r0, r1, r2, r3 = philox.tl_words(tl.load(seed), step, sample, STREAM, block)
    place = out + tl.program_id(0) * BLOCKS * 4 + block * 4
    tl.store(place, r0.to(tl.int64))
    tl.store(place + 1, r1.to(tl.int64))
    tl.store(place + 2, r2.to(tl.int64))
    tl.store(place + 3, r3.to(tl.int64))


@pytest.mark.parametrize("seed", [0, 7, 1234567890123, 2**63 - 1])
@pytest.mark.parametrize("step", [0, 500, 2**31 - 1])
def test_words_are_bit_exact(triton_device, seed, step):
    samples = torch.tensor([0, 5, 2**32, 2**56 - 1], device=triton_device)
    out = torch.empty(4, 64, dtype=torch.int64, device=triton_device)
    seed_tensor = torch.tensor(seed, device=triton_device)
    launch(words_kernel, (4,), out, seed_tensor, samples, step, STREAM=1, BLOCKS=16, num_warps=1)
    for row, sample in zip(out.cpu().numpy(), samples.tolist(), strict=True):
        assert np.array_equal(row.astype(np.uint32), philox.words(seed, sample, step, 1, 64))


@many
@given(shape=shapes, dtype=inputs, out=float_types, channels_last=st.booleans())
def test_q_sample(triton_device, plain_normals, shape, dtype, out, channels_last):
    x0, t, alpha_bars, samples = setting(shape, dtype, triton_device, channels_last)
    x_t, noise = q_sample(x0, t, alpha_bars, SEED, samples, out)
    expected = torch.from_numpy(plain_normals(SEED, samples.tolist(), 0, 2, shape[1:]))
    close(noise, expected, out)
    close(x_t, diffused(x0, t, alpha_bars, expected), out)
    assert x_t.stride() == x0.stride()


@few
@given(shape=shapes, dtype=inputs, out=float_types, channels_last=st.booleans(), flip=st.booleans())
def test_q_sample_rows(triton_device, plain_normals, shape, dtype, out, channels_last, flip):
    shape = (max(shape[0], 1), *shape[1:])
    data, _, alpha_bars, _ = setting(shape, dtype, triton_device, channels_last)
    rows = torch.tensor([0, shape[0] - 1, 0, shape[0] // 2], device=triton_device)
    samples = torch.arange(4, device=triton_device) + 2**33
    x_t, t, noise = q_sample_rows(data, rows, alpha_bars, SEED, samples, flip=flip, keep_noise=True, dtype=out)
    words = {stream: [int(philox.words(SEED, k, 0, stream, 1)[0]) for k in samples.tolist()] for stream in (3, 6)}
    assert t.tolist() == [1 + (word * TIMESTEPS >> 32) for word in words[3]]
    x0 = data[rows]
    if flip:
        x0 = torch.stack([x.flip(-1) if word >> 31 else x for x, word in zip(x0, words[6], strict=True)])
    expected = torch.from_numpy(plain_normals(SEED, samples.tolist(), 0, 2, shape[1:]))
    close(noise, expected, out)
    close(x_t, diffused(x0, t, alpha_bars, expected), out)
    plain, same_t, none = q_sample_rows(data, rows, alpha_bars, SEED, samples, flip=flip, dtype=out)
    assert torch.equal(plain, x_t)
    assert torch.equal(same_t, t)
    assert none is None


@few
@given(shape=shapes.filter(lambda s: s[0] > 0), dtype=float_types, weighted=st.booleans(), channels_last=st.booleans())
def test_noise_mse_and_its_gradient(triton_device, plain_normals, shape, dtype, weighted, channels_last):
    pred, _, _, samples = setting(shape, dtype, triton_device, channels_last)
    weight = torch.linspace(0.5, 2, shape[0], device=triton_device) if weighted else None
    pred.requires_grad_()
    loss = noise_mse(pred, SEED, samples, weight)
    (gradient,) = torch.autograd.grad(loss, pred)
    noise = torch.from_numpy(plain_normals(SEED, samples.tolist(), 0, 2, shape[1:]))
    error = pred.detach().double().cpu() - noise
    w = torch.ones(shape[0]) if weight is None else weight.cpu()
    w = w.double().reshape(-1, *(1,) * (len(shape) - 1))
    close(loss.detach(), (w * error**2).mean(), torch.float32)
    # Brought to order one, so that the tolerance means the same for every shape.
    close((gradient.double() * pred.numel()).to(dtype), 2 * w * error, dtype)
    assert gradient.stride() == pred.stride()
    assert torch.equal(loss, noise_mse(pred, SEED, samples, weight))


@many
@given(
    shape=shapes,
    dtype=float_types,
    output=float_types,
    guided=st.booleans(),
    memory=st.booleans(),
    clip=st.sampled_from([None, 0.7]),
    noisy=st.booleans(),
    channels_last=st.booleans(),
)
def test_solver_step(triton_device, plain_normals, shape, dtype, output, guided, memory, clip, noisy, channels_last):
    x, _, _, samples = setting(shape, dtype, triton_device, channels_last)
    m, uncond, previous = (x.flip(0).to(output) * k for k in (0.5, -0.25, 0.125))
    m, uncond, previous = m.contiguous(), uncond.contiguous(), previous.to(dtype)
    previous = torch.empty_like(x).copy_(previous)
    table = torch.tensor([[0.0] * 7 + [400], [1.3, -0.6, 0.4, 0.5, 0.2, -0.3, 0.9 * noisy, 123]], device=triton_device)
    old, old_previous = x.double().cpu(), previous.double().cpu()
    index = torch.tensor(1, device=triton_device)
    options = {"m_uncond": uncond, "guidance": 2.5} if guided else {}
    if memory:
        options["x0_prev"] = previous
    result = solver_step(x, m, table, index, SEED, samples, clip=clip, **options)
    c = table[1].tolist()
    m64, u64 = m.double().cpu(), uncond.double().cpu()
    m64 = u64 + 2.5 * (m64 - u64) if guided else m64
    x0 = c[0] * old + c[1] * m64
    x0 = x0 if clip is None else x0.clamp(-clip, clip)
    z = torch.from_numpy(plain_normals(SEED, samples.tolist(), 123, 1, shape[1:]))
    expected = c[2] * old + c[3] * x0 + c[4] * m64 + (c[5] * old_previous if memory else 0) + c[6] * z
    assert result is x
    close(x, expected, dtype)
    close(previous, x0 if memory else old_previous, dtype)


def test_a_seed_on_the_device_is_read_at_run_time(triton_device):
    x0, t, alpha_bars, samples = setting((2, 8), torch.float32, triton_device)
    seed = torch.tensor(1, device=triton_device)
    first = q_sample(x0, t, alpha_bars, seed, samples)[1]
    seed.fill_(2)
    second = q_sample(x0, t, alpha_bars, seed, samples)[1]
    assert torch.equal(second, q_sample(x0, t, alpha_bars, 2, samples)[1])
    assert not torch.equal(first, second)


def test_the_gradient_of_x0_is_sqrt_alpha_bar(triton_device):
    x0, t, alpha_bars, samples = setting((3, 5), torch.float32, triton_device)
    x0.requires_grad_()
    q_sample(x0, t, alpha_bars, SEED, samples)[0].sum().backward()
    torch.testing.assert_close(x0.grad, alpha_bars[t].sqrt()[:, None].expand(3, 5))


@pytest.mark.parametrize("n", [1, 3, 100, 2**31 - 2**17])
@pytest.mark.parametrize("per_row", [1, 2, 3, 5, 7, 48, 192, 255, 257, 49152, 2**20 + 1, 2**29 - 3])
def test_rows_are_found_by_an_exact_division(n, per_row):
    magic, shift = division(per_row)
    assert magic < 2**32
    numbers = {0, 1, per_row - 1, per_row, per_row + 1, n - 1, n // 2, n // per_row * per_row, 2**31 - 2**17}
    for q in numbers:
        assert q * magic >> shift == q // per_row


def arguments_of_operators(n, device="cpu"):
    """name -> (operator, arguments) of every registered operator, on a device."""
    x, t, alpha_bars, samples = setting((n, 3, 4, 4), torch.float32, device)
    seed, index, guidance = (torch.tensor(value, device=device) for value in (5, 1, 2.0))
    weights = torch.linspace(0, 3, 11, device=device)
    table = (torch.rand(11, 8) * 10).to(device)
    data = torch.randint(0, 256, (7, 3, 4, 4), dtype=torch.uint8).to(device)
    rows = torch.arange(n, device=device) % 7
    ops = torch.ops.fused_ddpm
    return {
        "q_sample": (ops.q_sample.default, (x.clone().requires_grad_(), t, alpha_bars, seed, samples, torch.float32)),
        "q_sample_rows": (
            ops.q_sample_rows.default,
            (data, rows, alpha_bars, seed, samples, True, True, torch.float32),
        ),
        "noise_mse": (ops.noise_mse.default, (x.clone().requires_grad_(), seed, samples, torch.rand(n, device=device))),
        "noise_mse_backward": (
            backward_operator,
            (torch.tensor(1.0, device=device), x, seed, samples, None),
        ),
        "solver_step": (
            ops.solver_step.default,
            (x.clone(), x * 2, table, index, seed, samples, x * 3, guidance, torch.zeros_like(x), 1.0),
        ),
        "solver_step, guidance by row": (
            ops.solver_step.default,
            (x.clone(), x * 2, table, index, seed, samples, x * 3, weights, None, None),
        ),
        "solver_step, guidance by row and sample": (
            ops.solver_step.default,
            (x.clone(), x * 2, table, index, seed, samples, x * 3, weights[:, None].repeat(1, n), None, None),
        ),
        "guidance_rescale": (ops.guidance_rescale.default, (x, x * 2 + 1, weights[:n], guidance / 4)),
    }


@pytest.mark.parametrize("name", list(arguments_of_operators(2)))
def test_opcheck(name):
    operator, arguments = arguments_of_operators(3)[name]
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("name", list(arguments_of_operators(2)))
def test_opcheck_of_the_kernel(name, triton_device):
    torch.use_deterministic_algorithms(False)  # poisoned outputs differ where opcheck compares two calls
    operator, arguments = arguments_of_operators(3, triton_device)[name]
    torch.library.opcheck(operator, arguments)


def test_outputs_have_the_strides_that_the_fake_promises(triton_device):
    torch.use_deterministic_algorithms(False)
    x0 = torch.randn(4, 5, 3, device=triton_device).transpose(1, 2)
    _, t, alpha_bars, samples = setting((4, 3), torch.float32, triton_device)
    seed = torch.tensor(5, device=triton_device)
    ops = torch.ops.fused_ddpm
    torch.library.opcheck(ops.q_sample.default, (x0, t, alpha_bars, seed, samples, torch.float32))
    torch.library.opcheck(backward_operator, (torch.ones((), device=triton_device), x0, seed, samples, None))


def test_strided_and_expanded_vectors_are_read_as_they_are(triton_device):
    """Every per-row argument as every second entry of a longer tensor, or one value expanded."""
    n = 4
    x0, t, alpha_bars, samples = setting((n, 3, 4, 4), torch.float32, triton_device)
    spread = {"t": t, "alpha_bars": alpha_bars, "samples": samples}
    wide = {name: torch.stack([value, torch.zeros_like(value)], 1).flatten()[::2] for name, value in spread.items()}
    plain, strided = q_sample(x0, **spread, seed=SEED), q_sample(x0, **wide, seed=SEED)
    assert torch.equal(plain[0], strided[0])
    one = q_sample(x0, t[:1].expand(n), alpha_bars, SEED, samples)[0]
    assert torch.equal(one, q_sample(x0, t[:1].repeat(n), alpha_bars, SEED, samples)[0])
    assert torch.equal(one, q_sample(x0, t[:1].expand(n), alpha_bars, SEED, wide["samples"])[0])

    weight = torch.rand(2 * n, device=triton_device)
    loss = noise_mse(x0, SEED, wide["samples"], weight[::2])
    assert torch.equal(loss, noise_mse(x0, SEED, samples, weight[::2].clone()))
    data = torch.randint(0, 256, (9, 3, 4, 4), dtype=torch.uint8, device=triton_device)
    rows = torch.arange(2 * n, device=triton_device)
    gathered = q_sample_rows(data, rows[::2], wide["alpha_bars"], SEED, wide["samples"])
    expected = q_sample_rows(data, rows[::2].clone(), alpha_bars, SEED, samples)
    assert torch.equal(gathered[0], expected[0])
    assert torch.equal(gathered[1], expected[1])
    table = torch.rand(3, 8, device=triton_device)
    step = solver_step(x0.clone(), x0, table, 0, SEED, wide["samples"])
    assert torch.equal(step, solver_step(x0.clone(), x0, table, 0, SEED, samples))


def test_narrow_sample_indices_are_widened(triton_device):
    x0, t, alpha_bars, _ = setting((3, 8), torch.float32, triton_device)
    samples = torch.arange(3, device=triton_device)
    wide = q_sample(x0, t, alpha_bars, SEED, samples)
    for narrow in (torch.int32, torch.uint8):
        assert torch.equal(q_sample(x0, t, alpha_bars, SEED, samples.to(narrow))[0], wide[0])


def test_scalars_on_another_device_are_refused():
    x0, t, alpha_bars, samples = setting((2, 8), torch.float32, "cpu")
    with pytest.raises(ValueError, match="seed: got 1 elements on meta, needs one on cpu"):
        q_sample(x0, t, alpha_bars, torch.tensor(1, device="meta"), samples)


def test_debug_mode_reads_values_wherever_they_are(monkeypatch):
    monkeypatch.setattr("kernels.backend.DEBUG", True)
    assert backend.reads_values(torch.zeros(1, device="meta"))
    monkeypatch.setattr("kernels.backend.DEBUG", False)
    assert not backend.reads_values(torch.zeros(1, device="meta"))


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs and synchronisation need a GPU")


@needs_cuda
def test_a_graph_replays_with_its_own_step_and_another_seed(triton_device):
    x0, _, _, samples = setting((3, 3, 16, 16), torch.float32, triton_device)
    table = torch.rand(4, 8, device=triton_device) / 2
    table[:, 7] = torch.tensor([400.0, 300.0, 200.0, 100.0])
    m, x = x0 * 0.5, x0.clone()
    seed, index = torch.tensor(1, device=triton_device), torch.tensor(0, device=triton_device)
    solver_step(x, m, table, index, seed, samples)  # compiles outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        solver_step(x, m, table, index, seed, samples)
        index.add_(1)
    for number in (1, 2):
        x.copy_(x0)
        index.zero_()
        seed.fill_(number)
        for _ in range(4):
            graph.replay()
        expected = x0.clone()
        for row in range(4):
            solver_step(expected, m, table, row, number, samples)
        assert torch.equal(x, expected)


@needs_cuda
@pytest.mark.parametrize("name", list(arguments_of_operators(2)))
def test_no_operator_synchronises(name, triton_device):
    operator, arguments = arguments_of_operators(3, triton_device)[name]
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    operator(*arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        operator(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_normals_keep_the_contract(triton_device):
    """1e-5 absolute on every normal, large ones too: 10^6 on a GPU, where sine and cosine are the hardware's."""
    n, numel = (1000, 1024) if triton_device.type == "cuda" else (8, 1024)
    x0 = torch.zeros(n, numel, device=triton_device)
    t, samples = torch.ones(n, dtype=torch.int64, device=triton_device), torch.arange(n, device=triton_device)
    noise = q_sample(x0, t, torch.ones(3, device=triton_device), SEED, samples)[1]
    exact = philox.normal(SEED, samples.cpu(), 0, 2, (numel,), dtype=torch.float64)
    assert (noise.double().cpu() - exact).abs().max() <= 1e-5


def functions(n):
    """Python functions through each operator, with tensor seed and index."""
    x, t, alpha_bars, samples = setting((n, 3, 4, 4), torch.float32, "cpu")
    seed, index = torch.tensor(5), torch.tensor(1)
    table = torch.rand(11, 8) * 10
    data = torch.randint(0, 256, (7, 3, 4, 4), dtype=torch.uint8)
    return {
        "q_sample": (lambda *a: q_sample(*a), (x, t, alpha_bars, seed, samples)),
        "q_sample_rows": (lambda *a: q_sample_rows(*a)[0], (data, torch.arange(n) % 7, alpha_bars, seed, samples)),
        "noise_mse": (lambda *a: noise_mse(*a), (x, seed, samples)),
        "solver_step": (lambda x, *a: solver_step(x.clone(), *a), (x, x * 2, table, index, seed, samples)),
        "guidance_rescale": (lambda *a: guidance_rescale(*a), (x, x * 2 + 1, torch.rand(n), torch.tensor(0.5))),
        "normal": (
            lambda seed, samples, step: philox.normal(seed, samples, step, 1, (3, 4, 4)),
            (seed, samples, torch.tensor(3)),
        ),
    }


@pytest.mark.parametrize("name", list(functions(1)))
def test_two_graphs_serve_every_batch_seed_and_step(name):
    torch._dynamo.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(functions(1)[name][0], backend=count, fullgraph=True, dynamic=None)
    for n in (1, 2, 3, 5, 1, 8):
        function, arguments = functions(n)[name]
        for tensor in arguments:
            if n > 1 and tensor.ndim and tensor.shape[0] == n:
                torch._dynamo.mark_dynamic(tensor, 0)
        expected = function(*arguments)
        for actual, plain in zip(_tuple(compiled(*arguments)), _tuple(expected), strict=True):
            torch.testing.assert_close(actual, plain)
    assert len(graphs) <= 2
    torch._dynamo.reset()


def _tuple(value):
    return value if isinstance(value, tuple) else (value,)


def test_gradcheck_in_float64_on_the_references():
    x, t, alpha_bars, samples = setting((2, 5), torch.float32, "cpu")
    x = x.double().requires_grad_()
    weight = torch.tensor([0.5, 2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: q_sample(x, t, alpha_bars.double(), SEED, samples, torch.float64)[0], x)
    assert torch.autograd.gradcheck(lambda x: noise_mse(x, SEED, samples, weight), x)


def test_mixed_devices_are_refused():
    x, t, alpha_bars, samples = setting((2, 8), torch.float32, "cpu")
    with pytest.raises(ValueError, match="samples: is on meta"):
        q_sample(x, t, alpha_bars, SEED, samples.to("meta"))


def test_rows_outside_the_data_are_refused():
    data = torch.zeros(3, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"rows: got 0\.\.3, needs 0\.\.2"):
        q_sample_rows(data, torch.tensor([0, 3]), torch.ones(5), SEED, torch.arange(2))


BAD_ROWS = [
    ({"data": torch.zeros(3, dtype=torch.uint8)}, "data: got"),
    ({"data": torch.zeros(3, 4, dtype=torch.int32)}, "data: got"),
    ({"data": torch.zeros(3, 8, dtype=torch.uint8)[:, ::2]}, "data: has strides"),
    ({"rows": torch.zeros(2)}, "rows: got"),
    ({"alpha_bars": torch.ones(5, 1)}, "alpha_bars: got"),
    ({"samples": torch.arange(3)}, "samples: got"),
    ({"dtype": torch.int8}, "dtype: got"),
]


@pytest.mark.parametrize(("change", "message"), BAD_ROWS)
def test_bad_arguments_of_q_sample_rows(change, message):
    arguments = {
        "data": torch.zeros(3, 4, dtype=torch.uint8),
        "rows": torch.tensor([0, 2]),
        "alpha_bars": torch.ones(5),
        "seed": SEED,
        "samples": torch.arange(2),
    } | change
    with pytest.raises((TypeError, ValueError), match=message):
        q_sample_rows(**arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="12 GiB of device memory")
def test_offsets_beyond_2_to_the_31(triton_device, plain_normals):
    n, numel = 2**21 + 5, 1024
    x0 = torch.full((n, numel), 200, dtype=torch.uint8, device=triton_device)
    t = torch.full((n,), 100, device=triton_device)
    alpha_bars = torch.linspace(1, 1e-3, TIMESTEPS + 1, device=triton_device)
    samples = torch.arange(n, device=triton_device)
    x_t, noise = q_sample(x0, t, alpha_bars, SEED, samples, torch.bfloat16)
    expected = torch.from_numpy(plain_normals(SEED, range(n - 3, n), 0, 2, (numel,)))
    close(noise[-3:], expected, torch.bfloat16)
    close(x_t[-3:], diffused(x0[-3:], t[-3:], alpha_bars, expected), torch.bfloat16)
