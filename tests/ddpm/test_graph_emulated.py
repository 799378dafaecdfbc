"""The graph engine without a GPU: what is captured is recorded operator by operator, and a replay runs it again.

Like a graph it reads and writes the memory that it was captured with, knows nothing of Python, and cannot be captured
where a value is read on the host.
"""

import threading
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddpm import NoiseSchedule, Trajectory, Unet, edit, inference, make_table, sample
from ddpm.engines import GraphEngine, choose, graph
from ddpm.inference import ContextUnetForm, Layout, PlainForm, kept_form
from ddpm.metrics import distance
from ddpm.networks import NETWORKS

SCHEDULE = NoiseSchedule.make("cosine", 30)
ON_HOST = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.nonzero.default}
CONTEXT = torch.eye(5)[:2]


class Recorder(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function in ON_HOST:
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        run = partial(function, *arguments, **keywords or {})
        out = run()
        self.graph.tape.append((run, out))
        return out


class Graph:
    def __init__(self):
        self.tape = []

    def replay(self):
        for run, out in self.tape:
            for held, new in zip(tree_leaves(out), tree_leaves(run()), strict=True):
                if isinstance(held, torch.Tensor) and held.data_ptr() != new.data_ptr():
                    held.copy_(new)


@contextmanager
def emulated(monkeypatch):
    """Emulates what the engine takes of torch.cuda. -> [(stream of the warm-up, stream, mode) of every capture]."""
    seen, warm, inside = [], [], threading.Lock()

    @contextmanager
    def capture(graph, pool=None, stream=None, capture_error_mode="global"):
        assert inside.acquire(blocking=False), "two captures at once on one stream"
        seen.append((warm[-1], stream, capture_error_mode))
        try:
            with Recorder(graph):
                yield
        finally:
            inside.release()

    class Stream(SimpleNamespace):
        def __init__(self, device=None):
            super().__init__(device=device, wait_stream=lambda other: None)

    def on_stream(stream):
        warm.append(stream)
        return nullcontext()

    fake = SimpleNamespace(
        Stream=Stream,
        stream=on_stream,
        current_stream=Stream,
        graph=capture,
        graph_pool_handle=lambda: None,
        CUDAGraph=Graph,
        device=nullcontext,
    )
    monkeypatch.setattr(graph, "torch", _Torch(fake))
    # oneDNN's tensors have no address.
    for form in ("context_unet", "simple_unet", "unet"):
        monkeypatch.setattr(f"ddpm.inference.{form}.Layout", partial(Layout, pack=False))
    monkeypatch.setattr("kernels.backend.reads_values", lambda tensor: False)  # as on CUDA
    monkeypatch.setattr(GraphEngine, "lacks", classmethod(lambda cls, *_: None))
    graph._side_stream.cache_clear()
    yield seen
    graph._side_stream.cache_clear()


@pytest.fixture
def captures(monkeypatch):
    with emulated(monkeypatch) as seen:
        yield seen


class _Torch:
    """torch with another `cuda`."""

    def __init__(self, cuda):
        self.cuda = cuda

    def __getattr__(self, name):
        return getattr(torch, name)


def draw(model, engine="graph", **options):
    given = {"steps": 23, "solver": "dpmpp_2m", "prediction": "v", "seed": 3, "context": CONTEXT} | options
    return sample(model, SCHEDULE, 2, engine=engine, **given)


def test_it_draws_eager_s_pictures_from_two_captures(unet, captures):
    """Ten steps at a time and single ones; other seeds, tables, guidance and weights by the same capture."""
    model = unet()
    ddpm = {"solver": "ddpm", "steps": 7}
    for way in ({}, {"seed": 4}, ddpm, ddpm | {"steps": 14, "context": CONTEXT.flip(0)}):
        assert distance(draw(model, **way), draw(model, "eager", **way)) < 1e-5
    assert len(captures) == 2 * 2  # with the memory of dpmpp_2m and without
    with torch.no_grad():
        model.out[3].weight.mul_(0.5)
    assert distance(draw(model), draw(model, "eager")) < 1e-5
    assert len(captures) == 4
    assert distance(draw(model, guidance=2.0), draw(model, "eager", guidance=2.0)) < 1e-5
    assert len(captures) == 6


def test_weights_of_samples_negatives_intervals_and_rescale_are_in_its_buffers(unet, captures):
    model, both = unet(), {"solver": "ddpm", "steps": 7}
    for way in (
        {"guidance": [2.5, -1.0], "negative": CONTEXT.flip(0), "guidance_rescale": 0.7},
        {"guidance": [0.5, 3.0], "negative": CONTEXT[:1].expand(2, 5), "guidance_rescale": 0.2, "seed": 4},
        {"guidance": [2.0, 1.0], "guidance_rescale": 1.0, "guidance_interval": (0.2, 0.8)},
    ):
        assert distance(draw(model, **both | way), draw(model, "eager", **both | way)) < 1e-5
    assert len(captures) == 2
    for way in ({"guidance": [2.0, 5.0]}, {"guidance": 2.0}, {"guidance": 2.0, "guidance_rescale": 0.5}):
        assert distance(draw(model, **both | way), draw(model, "eager", **both | way)) < 1e-5
    assert len(captures) == 8


def test_edited_pictures_are_captured_too(unet, captures):
    """From the middle, and with known pixels in every row."""
    model, image, mask = unet(), torch.linspace(-1, 1, 3 * 16 * 16).reshape(3, 16, 16).sin(), torch.zeros(16, 16)
    mask[:, 9:] = 1
    for way in ({"strength": 0.5, "solver": "pc"}, {"strength": 1.0, "mask": mask, "solver": "ddpm", "resample": 2}):
        how = {"steps": 7, "prediction": "v", "clip": 1.0, "seed": 3, "context": CONTEXT, "guidance": 2.0} | way
        found = edit(model, SCHEDULE, image, 2, engine="graph", **how)
        assert distance(found, edit(model, SCHEDULE, image, 2, engine="eager", **how)) < 1e-5
    assert torch.equal(found[:, :, :, :9], image[:, :, :9].expand(2, 3, 16, 9))
    assert captures


@pytest.mark.long
def test_diffusers_network_is_captured_as_it_is(captures):
    """With its classes under guidance; the indices of steps and "no class" are made where the network is."""
    pytest.importorskip("diffusers", reason="diffusers is optional and not installed here")
    torch.manual_seed(0)
    model = NETWORKS["unet2d"].for_data((2, 16, 16), 5, 8).eval()
    for way in ({}, {"seed": 4}, {"guidance": 2.0}):
        assert distance(draw(model, **way), draw(model, "eager", **way)) < 1e-5
    assert captures


def test_captures_are_on_the_stream_of_their_warm_up_one_a_device(unet, captures):
    for n_feat in (8, 16):
        draw(unet(n_feat=n_feat), steps=2)
    streams = {id(stream) for warm, stream, mode in captures if warm is stream and mode == "thread_local"}
    assert len(captures) == 4
    assert len(streams) == 1


def test_a_callback_that_samples_gets_buffers_of_its_own(unet, captures):
    model = unet()
    expected, inner = draw(model, "eager", steps=3), []
    outer = draw(model, steps=3, callback=lambda row, x0: inner.append(draw(model, steps=3, callback=lambda *_: None)))
    assert distance(outer, expected) < 1e-5
    assert all(distance(image, expected) < 1e-5 for image in inner)
    assert len(kept_form(model, torch.float32).states) == 1


def test_threads_that_share_a_trajectory_or_a_device(unet, captures):
    model = unet()
    prepared = Trajectory(model, SCHEDULE, make_table(SCHEDULE, "ddim", 12, prediction="v"), engine="graph")
    others = [unet(seed) for seed in (1, 2)]
    expected = {seed: draw(model, "eager", solver="ddim", steps=12, seed=seed) for seed in range(3)}
    expected |= {k: draw(other, "eager") for k, other in enumerate(others, 3)}
    images, start = {}, threading.Barrier(5)

    def work(k):
        start.wait()
        images[k] = prepared(2, CONTEXT, seed=k) if k < 3 else draw(others[k - 3])

    workers = [threading.Thread(target=work, args=(k,)) for k in range(5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(distance(images[k], expected[k]) < 1e-5 for k in range(5))


def test_an_interrupted_run_leaves_no_capture_half_way(unet, captures):
    model = unet()

    def stop(row, x0):
        raise KeyboardInterrupt

    expected = draw(model, callback=lambda *_: None)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            draw(model, callback=stop)
    assert torch.equal(draw(model, callback=lambda *_: None), expected)
    inference.release(model)


def test_a_capture_is_another_where_float32_is_computed_otherwise(unet, captures):
    """Also by PyTorch's newer settings, after which the older flags cannot be read."""
    model, conv = unet(), torch.backends.cudnn.conv
    draw(model, steps=2)
    before = conv.fp32_precision
    try:
        conv.fp32_precision = "tf32"
        with pytest.raises(RuntimeError, match="TF32"):
            assert not torch.backends.cudnn.allow_tf32
        draw(model, steps=2)
    finally:
        conv.fp32_precision = before
    assert len(captures) == 4
    draw(model, steps=2)
    assert len(captures) == 4


def test_auto_captures_only_what_has_a_form(monkeypatch, caplog):
    """On CUDA: a network that is run as it is may read values on the host, and each call would capture it anew."""
    monkeypatch.setattr("kernels.backend.triton", object())
    device = torch.device("cuda", 0)
    with caplog.at_level("INFO", logger="ddpm"):
        assert [choose("auto", device, form=form).name for form in (ContextUnetForm, PlainForm)] == ["graph", "fused"]
    assert "fused on cuda:0 (graph, where asked for: this network has no form of its own)" in caplog.text


@pytest.mark.parametrize("self_condition", [False, True])
def test_a_unet_draws_eager_s_pictures(captures, self_condition):
    torch.manual_seed(0)
    model = Unet(4, dim_mults=(1, 2), attn_dim_head=4, self_condition=self_condition, image_size=8).eval()
    for way in ({"solver": "ddpm"}, {"solver": "ddim", "steps": 12, "seed": 4}):
        way |= {"context": None, "clip": 1.0}
        assert distance(draw(model, **way), draw(model, "eager", **way)) < 1e-5
    assert len(captures) == 2
