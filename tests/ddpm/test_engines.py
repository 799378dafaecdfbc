"""Every engine that this machine can run makes eager's pictures; asking for one that it cannot is one clear error."""

import copy
import gc
import logging

import pytest
import torch

from ddpm import NoiseSchedule, PointMLP, engines, inference, precision, sample
from ddpm.metrics import distance
from ddpm.noise import PhiloxNoise

SCHEDULE = NoiseSchedule.make("cosine", 20)
CPU = torch.device("cpu")
# v-prediction with a network of order 1 keeps trajectories of order 1, as trained weights do.
WAYS = {
    "ddpm": {"solver": "ddpm"},
    "ddim": {"solver": "ddim", "steps": 8, "clip": 1.0},
    "ddim, eta": {"solver": "ddim", "steps": 8, "eta": 0.5},
    "dpmpp_2m": {"solver": "dpmpp_2m", "steps": 8},
    "ddpm guided": {"solver": "ddpm", "guidance": 2.0},
    "dpmpp_2m guided": {"solver": "dpmpp_2m", "steps": 8, "guidance": 2.0},
}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.fixture(scope="module")
def model(unet):
    """Wide enough for `winograd`."""
    return unet(n_feat=32)


def draw(model, n=3, **options):
    context = torch.eye(5)[torch.arange(n) % 5] if getattr(model, "n_cfeat", 0) == 5 else None
    return sample(model, SCHEDULE, n, **({"prediction": "v", "context": context, "seed": 3} | options))


def here(name):
    """Compiling takes its time: those tests are long ones."""
    lack = engines.unavailable_reason(name, CPU)
    skip = pytest.mark.skipif(lack is not None, reason=f"needs {lack}")
    return pytest.param(name, marks=[skip, pytest.mark.long] if name == "compile" else skip)


ENGINES = [here(name) for name in engines.ENGINES if name != "eager"]


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("engine", ENGINES)
def test_the_same_picture(model, engine, way):
    expected, exact = draw(model, engine="eager", **way), draw(model, engine="eager", dtype=torch.float64, **way)
    actual = draw(model, engine=engine, **way)
    assert distance(actual, expected) < 1e-4
    assert distance(actual, exact) <= 4 * distance(expected, exact) + 1e-6


SIZES = [
    {"height": (8, 20)},
    {"height": 28, "in_channels": 1, "n_cfeat": 0},
    {"height": 64},
    {"height": 32},
    {"n_feat": 64},
]


@pytest.mark.parametrize("shape", SIZES)
def test_the_same_picture_at_other_sizes(unet, shape):
    model = unet(**shape)
    expected = draw(model, 2, engine="eager")
    for engine in ("fused", "native"):
        if engines.unavailable_reason(engine, CPU) is None:
            assert distance(draw(model, 2, engine=engine), expected) < 1e-4


@pytest.mark.parametrize("engine", ENGINES)
def test_neither_batch_size_nor_split_matters(model, engine):
    whole = draw(model, 5, engine=engine)
    assert distance(draw(model, 5, engine=engine, batch_size=2), whole) < 1e-5
    context = torch.eye(5)[torch.arange(5)]
    assert distance(draw(model, 2, engine=engine, context=context[3:], first_sample=3), whole[3:]) < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
def test_float64_agrees_to_its_own_rounding(model, engine):
    if engine in ("graph", "native"):
        pytest.skip("its state is float32")
    way = WAYS["ddpm guided"] | {"dtype": torch.float64}
    assert distance(draw(model, engine=engine, **way), draw(model, engine="eager", **way)) < 1e-7  # float32 output


@pytest.mark.parametrize("engine", ENGINES)
def test_another_noise_is_taken(model, engine):
    if engine in ("graph", "native"):
        pytest.skip("it draws its own noise")
    calls = []

    def noise(samples, step, stream, shape):
        calls.append((step, stream))
        generator = torch.Generator().manual_seed(int(step))
        return torch.randn(len(samples), *shape, generator=generator)

    expected = draw(model, engine="eager", noise=noise)
    asked = calls.copy()
    calls.clear()
    assert distance(draw(model, engine=engine, noise=noise), expected) < 1e-4
    assert calls == asked


@pytest.mark.parametrize("way", ["ddpm", "dpmpp_2m guided", "ddim"])
@pytest.mark.parametrize("engine", ENGINES)
def test_previews_are_eager_s(model, engine, way):
    previews = {}
    for name in ("eager", engine):
        seen = previews[name] = []
        draw(
            model,
            engine=name,
            callback=lambda step, x0, seen=seen: seen.append((step, x0.clone())),
            **WAYS[way],
        )
    for (step, x0), (expected_step, expected) in zip(previews[engine], previews["eager"], strict=True):
        assert step == expected_step
        assert distance(x0, expected) < 1e-4


def test_noise_drawn_ahead_is_the_same_noise():
    noise, samples = PhiloxNoise(9), torch.tensor([0, 7, 1 << 40])
    steps = torch.tensor([500, 3]).repeat_interleave(3)
    both = noise(samples.repeat(2), steps, 1, (3, 5, 7))
    assert torch.equal(both, torch.cat((noise(samples, 500, 1, (3, 5, 7)), noise(samples, 3, 1, (3, 5, 7)))))


@pytest.mark.parametrize("engine", [here("fused"), here("compile")])
def test_any_network_runs(engine):
    torch.manual_seed(1)
    points = PointMLP(2, n_feat=16, n_cfeat=5).eval()
    for way in ("ddpm", "dpmpp_2m guided"):
        expected = draw(points, engine="eager", **WAYS[way])
        assert distance(draw(points, engine=engine, **WAYS[way]), expected) < 1e-4


@pytest.mark.parametrize("engine", [here("compile")])
def test_steps_seeds_and_batches_do_not_compile_again(unet, engine):
    model = unet(n_feat=16)
    counters = torch._dynamo.utils.counters["stats"]
    draw(model, 1, engine=engine, steps=3)
    draw(model, 4, engine=engine, steps=3)
    before = counters["unique_graphs"]
    for n, options in ((2, {"seed": 8}), (1, {"steps": 7}), (6, {"steps": 9}), (3, {"first_sample": 1 << 40})):
        draw(model, n, engine=engine, **options)
    assert counters["unique_graphs"] == before


@pytest.mark.long
def test_the_time_that_compiling_took_is_said(model, caplog):
    if engines.unavailable_reason("compile", CPU):
        pytest.skip(engines.unavailable_reason("compile", CPU))
    torch._dynamo.reset()
    with caplog.at_level(logging.INFO, logger="ddpm"):
        draw(model, engine="compile", steps=2)
    assert any("were compiling" in message for message in caplog.messages)


NO_ROOM = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError("winograd: no memory"),
    RuntimeError("std::bad_alloc"),
]


@pytest.mark.parametrize("error", NO_ROOM)
def test_running_out_of_memory_halves_the_chunk(model, caplog, error):
    class Greedy(torch.nn.Module):
        sample_shape = (3, 16, 16)
        rows = ()

        def forward(self, x, t, c=None):
            self.rows += (len(x),)
            if len(x) > 3:
                raise error
            return model(x, t, c)

    expected = draw(model, 7, engine="eager", context=None)
    greedy = Greedy().eval()
    with caplog.at_level(logging.INFO, logger="ddpm"):
        actual = draw(greedy, 7, engine="fused", context=None)
    assert distance(actual, expected) < 1e-5
    assert greedy.rows[:2] == (7, 3)
    assert any("out of memory with 7 samples at a time: going on with 3" in message for message in caplog.messages)


class Starved(torch.nn.Module):
    """Fails as oneDNN does, with more rows than `room`."""

    sample_shape = (2,)

    def __init__(self, room, text):
        super().__init__()
        self.room, self.text, self.rows = room, text, []

    def forward(self, x, t, c=None):
        self.rows.append(len(x))
        if len(x) > self.room:
            raise RuntimeError(self.text)
        return 0.1 * x


def test_onednn_without_memory_is_halved_once_and_then_named():
    """Again and again it would come to code that oneDNN could not finish."""
    halved = Starved(4, "could not create a primitive")
    assert draw(halved, 8, context=None).shape == (8, 2)
    assert halved.rows[:2] == [8, 4]
    starved = Starved(0, "could not create a primitive")
    with pytest.raises(MemoryError, match="no memory for oneDNN, needs a new process and batch_size 4"):
        draw(starved, 8, context=None)
    assert starved.rows == [8, 4]
    other = Starved(0, "could not create a primitive descriptor for a convolution")
    with pytest.raises(RuntimeError, match="descriptor"):
        draw(other, 8, context=None)
    assert other.rows == [8]


def test_other_errors_are_not_taken_for_a_lack_of_memory(model):
    def forward(x, t, c=None):
        raise RuntimeError("broken")

    broken = torch.nn.Module()
    broken.sample_shape, broken.forward = (3, 16, 16), forward
    with pytest.raises(RuntimeError, match="broken"):
        draw(broken, 4, engine="fused")


def test_one_sample_without_room_is_an_error():
    class Full(torch.nn.Module):
        sample_shape = (2,)

        def forward(self, x, t, c=None):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        draw(Full(), 4)


def test_modes_and_weights_are_left_alone(model):
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    draw(model, engine="fused", steps=3)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    model.eval()


def test_auto_says_what_it_chose_and_why(model, caplog):
    with caplog.at_level(logging.INFO, logger="ddpm"):
        draw(model, steps=2)
    name = "fused" if engines.unavailable_reason("native", CPU) else "native"
    assert any(message.startswith(f"engine auto: {name} on cpu (") for message in caplog.messages)


def test_an_unknown_engine_is_refused(model):
    with pytest.raises(ValueError, match="engine: got 'warp', needs one of auto, ") as refusal:
        draw(model, engine="warp")
    assert all(name in str(refusal.value) for name in ("eager", "fused", "compile", "graph"))


def test_graph_needs_cuda(model):
    with pytest.raises(RuntimeError, match="engine: 'graph' in float32 needs a CUDA device, the model is on cpu"):
        draw(model, engine="graph")


def test_compile_needs_a_compiler(model, monkeypatch):
    """The one that torch.compile will take: with g++ there and CXX set otherwise it would fail much later."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match=r"'compile' in float32 needs a C\+\+ compiler, found no 'no-such-compiler'"):
        draw(model, engine="compile")


def test_float16_needs_a_cpu_that_has_it(model, monkeypatch):
    monkeypatch.setattr(engines, "has_float16", lambda: False)
    for engine in ("eager", "fused", "auto"):
        with pytest.raises(RuntimeError, match="needs a CPU with AVX512-FP16 for float16"):
            draw(model, engine=engine, dtype=torch.float16)


@pytest.mark.parametrize(
    ("limit", "machine", "expected"),
    [
        ({}, "x86_64", True),
        ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, "x86_64", False),
        ({"ONEDNN_MAX_CPU_ISA": "avx512_core_vnni"}, "x86_64", False),
        ({"DNNL_MAX_CPU_ISA": "AVX2"}, "AMD64", False),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "DNNL_MAX_CPU_ISA": "AVX2"}, "x86_64", True),
        ({"ONEDNN_MAX_CPU_ISA": "DEFAULT"}, "x86_64", True),
        ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, "aarch64", True),
    ],
)
def test_bfloat16_is_in_hardware_where_onednn_may_use_it(monkeypatch, limit, machine, expected):
    """As on a CPU with AVX512-BF16: oneDNN, which convolves, may be held back by its environment."""
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in limit.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert precision.has_bfloat16() is expected


@pytest.mark.parametrize("hardware", [False, True])
def test_a_cpu_that_emulates_bfloat16_computes_in_float32_and_says_so(model, monkeypatch, caplog, hardware):
    monkeypatch.setattr("ddpm.precision.has_bfloat16", lambda: hardware)
    expected = draw(model, engine="fused", steps=3)
    with caplog.at_level(logging.INFO, logger="ddpm"):
        images = draw(model, engine="fused", steps=3, dtype=torch.bfloat16)
    assert images.dtype == torch.float32
    assert torch.equal(images, expected) == (not hardware)
    assert distance(images, expected) < 0.1
    assert ("fused computes in float32" in caplog.text) == (not hardware)


def test_so_does_a_network_that_is_not_folded(monkeypatch):
    monkeypatch.setattr("ddpm.precision.has_bfloat16", lambda: False)
    points = PointMLP(2, n_feat=16, n_cfeat=5).eval()
    expected = draw(points, engine="fused", steps=3)
    assert torch.equal(draw(points, engine="fused", steps=3, dtype=torch.bfloat16), expected)


@needs_cuda
def test_a_graph_serves_other_seeds_tables_and_weights(unet):
    model = unet().cuda()
    for options in ({}, {"seed": 4}, {"solver": "ddim", "steps": 7}, {"solver": "dpmpp_2m", "guidance": 2.0}):
        expected = draw(model.cpu(), engine="eager", **options)
        actual = draw(model.cuda(), engine="graph", **options)
        assert distance(actual.cpu(), expected) < 1e-3
    first = draw(model, engine="graph")
    kept = first.clone()
    with torch.no_grad():
        model.out[3].weight.mul_(0.5)
    second = draw(model, engine="graph")
    assert torch.equal(first, kept)
    assert distance(second, draw(model, engine="eager")) < 1e-3
    assert distance(second, first) > 1e-3


@needs_cuda
def test_a_graph_s_memory_comes_back(unet):
    model = unet().cuda()

    def held():
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()  # 32 MiB for every stream that it was called on
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()

    before = held()
    draw(model, engine="graph")
    inference.release(model)
    assert held() - before < 1 << 22


def test_a_model_in_bfloat16_is_folded_before_it_is_rounded(model):
    small = copy.deepcopy(model).to(torch.bfloat16)
    expected = draw(small, engine="eager", solver="ddim", steps=5)
    assert distance(draw(small, engine="fused", solver="ddim", steps=5), expected) < 1e-4


def test_inference_mode_leaves_the_model_usable(model):
    with torch.inference_mode():
        inside = draw(model, engine="fused", steps=3)
    assert torch.equal(draw(model, engine="fused", steps=3), inside)


def test_noise_of_another_shape_or_type(model):
    def wide(samples, step, stream, shape):
        return torch.ones(len(samples), *shape, dtype=torch.float64)

    assert draw(model, engine="eager", steps=3, noise=wide).dtype == torch.float32

    def one(samples, step, stream, shape):
        return torch.zeros(len(samples) if stream == 0 else 1, *shape)

    for engine in ("eager", "fused"):
        with pytest.raises(ValueError, match=r"noise: returned \[1, 3, 16, 16\], needs \[3, 3, 16, 16\]"):
            draw(model, engine=engine, steps=3, noise=one)


@pytest.mark.parametrize(
    ("dtype", "own_noise", "triton", "chosen"),
    [
        (torch.float32, False, True, "graph"),
        (torch.float64, False, True, "eager"),
        (torch.float32, True, True, "fused"),
        (torch.float32, False, False, "eager"),
    ],
)
def test_auto_takes_what_can_run(monkeypatch, dtype, own_noise, triton, chosen):
    if not triton:
        monkeypatch.setattr("kernels.backend.triton", None)
    assert engines.choose("auto", torch.device("cuda"), dtype, own_noise) is engines.ENGINES[chosen]


def test_autocast_around_it_changes_nothing(model):
    expected = draw(model, steps=3, guidance=2.0)
    with torch.autocast("cpu", torch.bfloat16):
        for engine in ("eager", "fused"):
            assert distance(draw(model, engine=engine, steps=3, guidance=2.0), expected) < 1e-5


def test_an_unconditional_network_ignores_guidance(unet):
    model = unet(n_cfeat=0)
    options = {"context": torch.zeros(0), "guidance": 2.0, "steps": 3}
    assert distance(draw(model, 2, engine="fused", **options), draw(model, 2, engine="eager", **options)) < 1e-5
    with pytest.raises(ValueError, match=r"got shape \[3\], needs \[2, 0\] or \[0\]: this network has no condition"):
        draw(model, 2, engine="fused", context=torch.zeros(3))
