"""Engines of training: the numbers of the eager path, its losses within rounding, one compilation, one graph."""

import json
import logging
import re
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from ddpm import engines, runs, training
from ddpm.data import Dataset
from ddpm.distributed import World
from ddpm.errors import BadInput
from ddpm.training import CompileTrainer, Ema, GraphTrainer, Trainer, TrainOptions, make_trainer
from kernels import philox, q_sample
from kernels.q_sample import pixels_to_unit

CPU = torch.device("cpu")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEFAULTS = {"n_feat": 8, "timesteps": 20, "schedule": "cosine", "batch_size": 8, "epochs": 7, "seed": 5}


@pytest.fixture
def points() -> Dataset:
    """30 points of 2 classes: a network that compiles quickly."""
    values = torch.from_numpy(np.random.default_rng(1).normal(size=(30, 2)).astype(np.float32))
    return Dataset("points", values, torch.eye(2)[torch.arange(30) % 2], ("a", "b"))


@pytest.fixture
def make(monkeypatch):
    """make(dataset, engine, ...): a trainer; `compile` traces and differentiates ahead, without generating code."""
    monkeypatch.setattr(CompileTrainer, "compiler", "aot_eager")

    def call(dataset: Dataset, engine: str, device: torch.device = CPU, **options: object) -> Trainer:
        chosen = TrainOptions(**DEFAULTS | options, engine=engine)
        return make_trainer(chosen.make_network(dataset), dataset, chosen, device, World())

    return call


def run(trainer: Trainer, steps: int, warm: int = 1) -> torch.Tensor:
    """The losses of these steps; after `warm` of them, compiling anything again raises."""
    while trainer.index < warm:
        trainer.step()
    with torch.compiler.set_stance("fail_on_recompile"):
        while trainer.index < steps:
            trainer.step()
    return trainer.losses[:steps].cpu()


def assert_same_bits(one: Trainer, other: Trainer) -> None:
    a, b = one.state(), other.state()
    assert a.keys() == b.keys()
    # Losses of steps to come are NaN.
    assert [name for name in a if not torch.equal(a[name].nan_to_num(nan=-1), b[name].nan_to_num(nan=-1))] == []


def as_in_a_file(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in trainer.state().items()}


# --- the same numbers -------------------------------------------------------------------------------------------


def rows_of(dataset: Dataset, samples: torch.Tensor) -> torch.Tensor:
    """The rows of training samples, by the contract: item j of epoch k is sample k N + j."""
    orders = {k: philox.epoch_order(DEFAULTS["seed"], k, len(dataset)) for k in (samples // len(dataset)).tolist()}
    return torch.stack([orders[g // len(dataset)][g % len(dataset)] for g in samples.tolist()])


@pytest.mark.parametrize(("engine", "resident"), [("eager", True), ("compile", True), ("compile", False)])
@pytest.mark.parametrize("flip", [False, True])
def test_batches_have_the_bits_of_the_contract(make, tiny_data, monkeypatch, flip, engine, resident):
    monkeypatch.setattr("ddpm.training.engines.has_room", lambda size, device: resident)
    trainer = make(tiny_data, engine, flip=flip, batch_size=7, context_dropout=0.5)
    objective = trainer.objective
    assert trainer.resident == resident
    for index in range(8):  # over the ends of epochs
        values, labels, rows, samples = trainer.inputs(index)
        assert torch.equal(samples, torch.arange(7 * index, 7 * index + 7))
        expected = rows_of(tiny_data, samples)
        x0 = tiny_data.values[expected]
        if flip:
            mirrored = philox.flipped(5, samples)
            x0[mirrored] = x0[mirrored].flip(-1)
        t = philox.training_timesteps(5, samples, 20)
        x_t, noise = q_sample(x0, t, objective.alpha_bars, 5, samples)
        for a, b in zip(objective.diffused(values, rows, samples), (x_t, t, noise), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(objective.clean(values, rows, samples), pixels_to_unit(x0))
        context = torch.where(philox.condition_dropped(5, samples, 0.5)[:, None], 0.0, tiny_data.labels[expected])
        assert torch.equal(objective.context(labels, rows, samples), context)


@pytest.mark.parametrize("channels", [1, 3])
def test_eager_keeps_the_strides_of_its_data(make, tiny_data, channels):
    """Of one channel they may be those of either layout, and PyTorch rounds a convolution by them."""
    values = tiny_data.values.as_strided(tiny_data.values.shape, (256, 1, 16, 1)).expand(-1, channels, -1, -1)
    if channels > 1:
        values = values.contiguous(memory_format=torch.channels_last)
    trainer = make(replace(tiny_data, values=values), "eager")
    x_t, _, noise = trainer.objective.diffused(trainer.data[0], *trainer.inputs(0)[2:])
    assert x_t.stride() == noise.stride() == values.stride() == (256 * channels, 1, 16 * channels, channels)


@pytest.mark.parametrize("batch_size", [7, 24, 100])
def test_rows_are_those_of_the_contract(make, tiny_data, batch_size):
    trainer = make(tiny_data, "compile", batch_size=batch_size)
    for index in range(5):
        assert torch.equal(trainer.rows(index), rows_of(tiny_data, torch.arange(*trainer.span(index))))


def test_the_average_by_a_tensor_is_the_average_by_a_number(tiny_data):
    network = TrainOptions(n_feat=8).make_network(tiny_data)
    one, other = Ema(network, 0.999), Ema(network, 0.999)
    for k in (0, 5, 20_000):
        with torch.no_grad():
            for tensor in network.state_dict().values():
                tensor.add_(1)
        one.update(network, k)
        other.update(network, torch.tensor(k))
        for name, tensor in one.tensors.items():
            torch.testing.assert_close(other.tensors[name], tensor, rtol=1e-5, atol=1e-6)


# --- the same losses --------------------------------------------------------------------------------------------


def test_twenty_compiled_steps_lose_as_eager_without_recompiling(make, tiny_data):
    expected, losses = (run(make(tiny_data, engine, flip=True), 20) for engine in ("eager", "compile"))
    assert (losses - expected).abs().max() <= 1e-4
    assert expected[-3:].mean() < expected[:3].mean()


@pytest.mark.parametrize(
    ("prediction", "loss", "min_snr", "redraws"),
    [
        ("eps", "mse", 0.0, True),  # what CUDA does: the target is drawn again
        pytest.param("eps", "mse", 2.0, True, marks=pytest.mark.long),
        pytest.param("eps", "l1", 0.0, False, marks=pytest.mark.long),
        ("v", "huber", 2.0, False),
        ("x0", "mse", 0.0, False),
    ],
)
def test_every_loss_is_that_of_eager(make, points, prediction, loss, min_snr, redraws):
    options = {"prediction": prediction, "loss": loss, "min_snr": min_snr}
    expected, trainer = run(make(points, "eager", **options), 6), make(points, "compile", **options)
    trainer.objective.redraws = redraws
    assert (run(trainer, 6) - expected).abs().max() <= 1e-5


@pytest.mark.long
def test_more_trainers_than_torch_compile_keeps_of_one_function(make, points):
    with torch._dynamo.config.patch(recompile_limit=2):
        for batch_size in range(2, 6):
            assert run(make(points, "compile", batch_size=batch_size), 2).isfinite().all()


@pytest.mark.long
def test_generated_code_trains_as_eager_and_resumes_bit_for_bit(make, tiny_data, monkeypatch):
    monkeypatch.setattr(CompileTrainer, "compiler", "inductor")
    expected = run(make(tiny_data, "eager"), 20)
    whole, first, second = (make(tiny_data, "compile") for _ in range(3))
    assert (run(whole, 20) - expected).abs().max() <= 1e-4
    run(first, 9)
    second.load_state(as_in_a_file(first))
    run(second, 20, warm=10)
    assert_same_bits(whole, second)


@pytest.mark.long
def test_resuming_keeps_every_bit(make, tiny_data):
    whole, second = (make(tiny_data, "compile") for _ in range(2))
    run(whole, 3)
    # Files are contiguous, the parameters are channels_last.
    second.load_state(as_in_a_file(whole))
    run(whole, 6)
    run(second, 6, warm=4)
    assert_same_bits(whole, second)


# --- the captured step ------------------------------------------------------------------------------------------


class FakeStream:
    def wait_stream(self, other: "FakeStream") -> None:
        assert isinstance(other, FakeStream)


@pytest.fixture
def fake_cuda(monkeypatch):
    """CUDA graphs without CUDA: a capture leaves no trace in the trainer, a replay runs its body."""
    made, warm = [], []

    def prepare(trainer: GraphTrainer) -> GraphTrainer:
        class FakeGraph:
            def __init__(self) -> None:
                made.append(self)

            def replay(self) -> None:
                trainer._body()

        @contextmanager
        def capturing(graph: FakeGraph, stream: FakeStream):
            assert stream is warm[-1]
            before = {name: tensor.clone() for name, tensor in trainer.state().items()}
            yield
            for name, tensor in trainer.state().items():
                tensor.copy_(before[name])
            trainer.k.fill_(trainer.index)

        for name, fake in {
            "Stream": lambda device: FakeStream(),
            "current_stream": lambda device: FakeStream(),
            "stream": lambda stream: warm.append(stream) or nullcontext(),
            "CUDAGraph": FakeGraph,
            "graph": torch.no_grad()(capturing),
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        # capturable: only for CUDA, and only there of any effect on fused Adam.
        trainer.optimizer = CompileTrainer._adam(trainer)
        trainer.optimizer.param_groups[0]["lr"] = torch.tensor(0.0)
        return trainer

    monkeypatch.setattr(engines, "unavailable_reason", lambda name, device: None)
    prepare.made = made
    return prepare


@pytest.mark.long
def test_warm_up_and_capture_leave_no_trace_in_the_losses(make, tiny_data, fake_cuda):
    trainer = fake_cuda(make(tiny_data, "graph", flip=True))
    expected = run(make(tiny_data, "eager", flip=True), 20)
    assert (run(trainer, 20) - expected).abs().max() <= 1e-4
    assert len(fake_cuda.made) == 1
    assert int(trainer.network.init_conv.conv1[1].num_batches_tracked) == 20
    assert trainer.losses[20:].isnan().all()
    assert trainer.index == 20


def test_a_loaded_state_is_captured_anew(make, points, fake_cuda):
    expected = run(make(points, "eager"), 6)
    first, second = make(points, "eager"), make(points, "graph")
    run(first, 3)
    trainer = fake_cuda(second)
    trainer.step()
    trainer.load_state(as_in_a_file(first))
    run(trainer, 6, warm=4)
    assert len(fake_cuda.made) == 2
    assert (trainer.losses[:6] - expected).abs().max() <= 1e-4


def test_a_step_takes_algorithms_that_repeat_their_bits(make, points, monkeypatch):
    cudnn, seen = torch.backends.cudnn, []
    monkeypatch.setattr(cudnn, "benchmark", True)
    monkeypatch.setattr(Trainer, "_step", lambda self: seen.append((cudnn.deterministic, cudnn.benchmark)))
    make(points, "eager").step()
    assert seen == [(True, False)]
    assert (cudnn.deterministic, cudnn.benchmark) == (False, True)


@CUDA
@pytest.mark.parametrize("engine", ["compile", "graph"])
def test_engines_lose_as_eager_on_cuda(make, tiny_data, monkeypatch, engine):
    monkeypatch.setattr(CompileTrainer, "compiler", "inductor")
    device = torch.device("cuda")
    expected, trainer = run(make(tiny_data, "eager", device), 20), make(tiny_data, engine, device)
    assert (run(trainer, 20, warm=2) - expected).abs().max() <= 1e-4
    again = make(tiny_data, engine, device)
    run(again, 9, warm=2)
    resumed = make(tiny_data, engine, device)
    resumed.load_state(as_in_a_file(again))
    run(resumed, 20, warm=11)
    assert_same_bits(trainer, resumed)


# --- what is said -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_graph_without_cuda_is_one_line(ddpm, tmp_path):
    answer = ddpm("train", "--out", tmp_path / "run", "--engine", "graph", "--device", "cpu")
    assert answer.code == 2
    assert answer.err == "error: --engine: 'graph' needs a CUDA device, the model is on cpu\n"
    assert not (tmp_path / "run").exists()


def test_an_unknown_engine_is_one_line(ddpm, tmp_path):
    answer = ddpm("train", "--out", tmp_path / "run", "--engine", "warp")
    assert answer.code == 2
    assert answer.err == "error: --engine: got 'warp', needs one of eager, compile, graph\n"


def test_graph_under_torchrun_is_refused(tiny_data, monkeypatch):
    monkeypatch.setattr(engines, "unavailable_reason", lambda name, device: None)
    options = TrainOptions(**DEFAULTS, engine="graph")
    with pytest.raises(BadInput, match=r"--engine: 'graph' needs a single process, there are 2 ranks"):
        make_trainer(options.make_network(tiny_data), tiny_data, options, CPU, World(0, 2))


def test_a_trainer_of_another_engine_is_refused(tiny_data):
    options = TrainOptions(**DEFAULTS, engine="compile")
    with pytest.raises(ValueError, match="engine: got 'compile', Trainer needs 'eager'"):
        Trainer(options.make_network(tiny_data), tiny_data, options, CPU, World())


@pytest.mark.parametrize("hardware", [False, True])
def test_emulated_bf16_is_said(make, points, monkeypatch, caplog, hardware):
    monkeypatch.setattr("ddpm.precision.has_bfloat16", lambda: hardware)
    with caplog.at_level(logging.INFO, "ddpm"):
        make(points, "eager", precision="bf16")
    assert ("emulated" in caplog.text) == (not hardware)


def test_compiling_and_data_left_on_the_host_are_said(make, points, monkeypatch, caplog):
    monkeypatch.setattr("ddpm.training.engines.has_room", lambda size, device: False)
    with caplog.at_level(logging.INFO, "ddpm"):
        run(make(points, "compile"), 2)
    assert "stay on the host" in caplog.text
    assert caplog.text.count("compiling in the first step") == 1
    assert re.search(r"engine compile: ready after \d+\.\d s", caplog.text)


def test_a_run_goes_on_with_another_engine_and_keeps_its_own_in_config(ddpm, make, tmp_path, monkeypatch, caplog):
    folder = tmp_path / "run"
    arguments = ("train", "--data", "swiss-roll", "--out", folder, "--device", "cpu")
    few = ("--n-feat", 8, "--epochs", 1, "--batch-size", 512, "--timesteps", 20, "--schedule", "cosine")
    step = Trainer.step

    def stopping(trainer: Trainer) -> None:
        step(trainer)
        if trainer.index == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stopping)
        assert ddpm(*arguments, *few, "--save-every", "1e-9").code == 130
    with caplog.at_level(logging.INFO, "ddpm"):
        answer = ddpm("train", "--out", folder, "--resume", "--engine", "compile", "--device", "cpu")
    assert answer.code == 0, answer.err
    assert "engine compile: ready" in caplog.text
    assert re.search(r"trained: .* \(8 steps, ", answer.out)
    config = json.loads((folder / runs.CONFIG).read_text())
    assert config["training"]["engine"] == "eager"
    del config["training"]["engine"]  # as runs from before there were engines
    (folder / runs.CONFIG).write_text(json.dumps(config))
    assert training.resumed_options(folder, {}).engine == "eager"


# --- torchrun ---------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_two_ranks_compile_and_lose_as_two_eager_ranks(tmp_path, spawn):
    tiny = ("--data", "swiss-roll", "--n-feat", 8, "--epochs", 1, "--batch-size", 512, "--timesteps", 20)
    losses = []
    for engine in ("eager", "compile"):
        folder = tmp_path / engine
        process = spawn("train", "--out", folder, *tiny, "--schedule", "cosine", "--engine", engine, ranks=2)
        _, err = process.communicate(timeout=400)
        assert process.returncode == 0, err
        losses.append(float((folder / runs.LOSS_CSV).read_text().splitlines()[1].split(",")[2]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
