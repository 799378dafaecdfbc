"""What a newcomer adds is one class or one function: a network, a solver, an engine, known everywhere by their names.

And a module of somebody else's, which registers nothing, is sampled and trained as it is.
"""

import copy
import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from ddpm import NoiseSchedule, engines, load_run, make_table, sample
from ddpm.data import Dataset
from ddpm.distributed import World
from ddpm.engines import ENGINES, EagerEngine, engine
from ddpm.inference import PlainForm
from ddpm.metrics import distance
from ddpm.networks import NETWORKS, network
from ddpm.solvers import SOLVERS, solver, to_eps, to_x0
from ddpm.training import CompileTrainer, TrainOptions, make_trainer

CPU = torch.device("cpu")
SHAPE, CONDITION, T = (1, 4, 8), (3, 2), 12
SCHEDULE = NoiseSchedule.make("cosine", T)


class Foreign(nn.Module):
    """Somebody's network: a table of embeddings, tokens as condition, images that are not square."""

    sample_shape, condition_shape, time = SHAPE, CONDITION, "index"

    def __init__(self, width=6):
        super().__init__()
        self.width = width
        self.steps, self.tokens = nn.Embedding(T, width), nn.Linear(CONDITION[1], width)
        self.into, self.out = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 1, 3, padding=1)
        self.register_buffer("nothing", torch.full(CONDITION, 0.25))

    def null_condition(self, n):
        return self.nothing.expand(n, *CONDITION)

    def forward(self, x, t, c=None):
        c = self.null_condition(len(x)) if c is None else c
        embedding = self.steps(t) + self.tokens(c).square().sum(1)
        return self.out(torch.tanh(self.into(x) + embedding[:, :, None, None]))


# --- one file --------------------------------------------------------------------------------------------------


class ToyNetwork(Foreign):
    def config(self):
        return {"width": self.width}

    @classmethod
    def for_data(cls, shape, classes, n_feat):
        return cls(n_feat)


def toy_solver(alpha_bars, prediction, *, strength=1.0):
    """DDIM with less of the network's noise."""
    rows = []
    for a, s in pairwise(alpha_bars):
        p, q = (strength * math.sqrt(1 - s) * factor for factor in to_eps(prediction, a))
        rows.append([*to_x0(prediction, a), p, math.sqrt(s), q, 0.0, 0.0])
    return rows


class ToyEngine(EagerEngine):
    name = "toy"
    runs = 0

    @classmethod
    def lacks(cls, device, dtype=torch.float32, custom_noise=False):
        return "a noise of its own" if custom_noise else None

    def __call__(self, *arguments, **more):
        ToyEngine.runs += 1
        return super().__call__(*arguments, **more)


@pytest.fixture
def toys():
    """The three of them, registered as a file that is imported would, until the test ends."""
    registries = (NETWORKS, SOLVERS, ENGINES)
    before = [dict(registry) for registry in registries]
    network("toy")(ToyNetwork)
    solver("toy")(toy_solver)
    engine(ToyEngine)
    yield
    for registry, known in zip(registries, before, strict=True):
        registry.clear()
        registry.update(known)


# ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tokens():
    """16 images with a condition of two axes each."""
    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.integers(0, 256, (16, *SHAPE), dtype=np.uint8))
    return Dataset("tokens", values, torch.from_numpy(rng.normal(size=(16, *CONDITION)).astype(np.float32)), ())


def contexts(n):
    return torch.randn(n, *CONDITION, generator=torch.Generator().manual_seed(1))


def seeded(kind=Foreign):
    torch.manual_seed(0)
    return kind().eval()


@torch.no_grad()
def by_hand(model, table, n, normals, context=None, guidance=1.0, seed=3):
    """The table in float64 with the network called once for each half."""
    double, c = copy.deepcopy(model).double(), None if context is None else context.double()
    x = torch.from_numpy(normals(seed, range(n), 0, 0, SHAPE))
    for t, k in zip(table.timesteps.tolist(), table.coefficients.tolist(), strict=True):
        t_index = torch.full((n,), t - 1)
        m = double(x, t_index, c)
        if guidance != 1:
            without = double(x, t_index, torch.full((n, *CONDITION), 0.25, dtype=torch.float64))
            m = guidance * m + (1 - guidance) * without
        z = torch.from_numpy(normals(seed, range(n), t, 1, SHAPE))
        x = k[2] * x + k[3] * (k[0] * x + k[1] * m) + k[4] * m + k[6] * z
    return x


def test_a_solver_is_one_function(toys, plain_normals):
    model, table = seeded(), make_table(SCHEDULE, "toy", 5, strength=0.5, prediction="v")
    assert (table.solver, table.steps, table.made_for["strength"]) == ("toy", 5, 0.5)
    plain = make_table(SCHEDULE, "ddim", 5, prediction="v").coefficients
    assert torch.equal(table.coefficients[:, [2, 4]], 0.5 * plain[:, [2, 4]])
    for name in ("eager", "fused"):
        images = sample(model, SCHEDULE, 2, solver="toy", steps=5, strength=0.5, prediction="v", seed=3, engine=name)
        assert distance(images, by_hand(model, table, 2, plain_normals)) < 1e-5
    assert torch.equal(make_table(SCHEDULE, "toy", 5, prediction="v", strength=None).coefficients, plain)


def test_its_options_are_refused_and_named_like_any_other(toys):
    with pytest.raises(ValueError, match=r"eta: got 0\.5, but solver 'toy' takes only .*guidance_interval, strength"):
        make_table(SCHEDULE, "toy", 5, eta=0.5)
    with pytest.raises(
        ValueError, match=r"strength: got 0\.5, .* 'ddim' takes only .*guidance_interval, eta, rederive, ends$"
    ):
        make_table(SCHEDULE, "ddim", 5, strength=0.5)
    with pytest.raises(ValueError, match=r"solver: got 'toys', needs one of ddpm, .*toy"):
        make_table(SCHEDULE, "toys", 5)


def test_an_engine_is_one_class(toys):
    model, before = seeded(), ToyEngine.runs
    options = {"steps": 4, "prediction": "v", "context": contexts(3), "guidance": 2.0}
    images = sample(model, SCHEDULE, 3, engine="toy", **options)
    assert ToyEngine.runs == before + 1
    assert torch.equal(images, sample(model, SCHEDULE, 3, engine="eager", **options))
    assert "toy" in engines.competitors(CPU)
    with pytest.raises(RuntimeError, match="engine: 'toy' in float32 needs a noise of its own"):
        sample(model, SCHEDULE, 3, engine="toy", noise=lambda samples, *_: torch.zeros(len(samples), *SHAPE))


def test_a_network_is_one_class_and_all_three_are_known_to_the_command_line(toys, ddpm, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainOptions, "load_data", lambda self: tokens)
    options = ("--network", "toy", "--n-feat", 5, "--timesteps", T, "--schedule", "cosine", "--device", "cpu")
    run = tmp_path / "run"
    answer = ddpm("train", "--out", run, "--epochs", 2, "--batch-size", 8, *options)
    assert answer.code == 0, answer.err
    config = json.loads((run / "config.json").read_text())
    assert (config["network"], config["model"]) == ("toy", {"width": 5})

    opened = load_run(run)
    assert type(opened.model) is ToyNetwork
    condition = opened.context("1,2,3,4,5,6")
    assert condition.tolist() == [[1, 2], [3, 4], [5, 6]]
    before, npy = ToyEngine.runs, tmp_path / "x.npy"
    how = ("--context", "1,2,3,4,5,6", "--guidance", 2, "--solver", "toy", "--steps", 3, "--engine", "toy")
    answer = ddpm("sample", run, "--n", 2, "--npy", npy, *how)
    assert answer.code == 0, answer.err
    assert ToyEngine.runs == before + 1
    expected = sample(
        opened.model, opened.schedule, 2, context=condition, guidance=2.0, **opened.options(solver="toy", steps=3)
    )
    assert distance(np.load(npy), expected) < 1e-5

    NETWORKS.pop("toy")
    answer = ddpm("sample", run, "--n", 2, "--npy", npy)
    assert (answer.code, len(answer.err.splitlines())) == (2, 1)
    assert "network: got 'toy', needs one of context_unet, mlp" in answer.err


# --- a module of somebody else's --------------------------------------------------------------------------------

HERE = [
    pytest.param(name, marks=pytest.mark.long if name == "compile" else ())
    for name in ENGINES
    if engines.unavailable_reason(name, CPU, form=PlainForm) is None
]
WAYS = {
    "ddpm": {},
    "ddim guided": {"solver": "ddim", "guidance": 2.5},
    "ddpm guided": {"guidance": 2.5},
    "without a condition": {"context": None},
}


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("way", WAYS)
def test_a_foreign_module_samples_on_every_engine(plain_normals, name, way):
    model, options = seeded(), {"solver": "ddpm", "steps": 6, "context": contexts(3)} | WAYS[way]
    images = sample(model, SCHEDULE, 3, prediction="v", seed=3, engine=name, **options)
    table = make_table(SCHEDULE, options.pop("solver"), options.pop("steps"), prediction="v")
    assert distance(images, by_hand(model, table, 3, plain_normals, **options)) < 1e-4


class Recorder(Foreign):
    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, t, c=None):
        self.calls.append((x.clone(), t.clone(), c.clone()))
        return super().forward(x, t, c)


@pytest.mark.parametrize("name", ["eager", "fused"])
def test_it_receives_t_minus_1_and_its_own_null_condition(name):
    model, c = seeded(Recorder), contexts(2)
    sample(model, SCHEDULE, 2, steps=3, prediction="v", context=c, guidance=3.0, engine=name)
    assert [(t.dtype, t.tolist()) for _, t, _ in model.calls] == [(torch.int64, [i] * 4) for i in (11, 7, 3)]
    for x, _, condition in model.calls:
        assert torch.equal(x[:2], x[2:])
        assert torch.equal(condition, torch.cat((c, torch.full((2, *CONDITION), 0.25))))


def trainer_of(model, dataset, name, **options):
    chosen = TrainOptions(
        timesteps=T, schedule="cosine", batch_size=8, epochs=4, context_dropout=0.5, seed=5, engine=name, **options
    )
    return make_trainer(model, dataset, chosen, CPU, World())


def test_in_training_it_receives_the_same(tokens, plain_words):
    model = seeded(Recorder)
    trainer = trainer_of(model, tokens, "eager")
    for _ in range(3):
        trainer.step()
    for k, (_, t, c) in enumerate(model.calls):
        samples = range(8 * k, 8 * k + 8)
        # Streams 3 and 4 of the noise contract.
        assert t.tolist() == [plain_words(5, g, 0, 3, 1)[0] * T >> 32 for g in samples]
        assert t.dtype == torch.int64
        assert c.shape == (8, *CONDITION)
        dropped = torch.tensor([plain_words(5, g, 0, 4, 1)[0] < 1 << 31 for g in samples])
        assert torch.equal((c == 0.25).all(-1).all(-1), dropped)
    assert 0 < int(dropped.sum()) < 8


def test_it_trains_alike_on_both_engines(tokens, monkeypatch):
    monkeypatch.setattr(CompileTrainer, "compiler", "aot_eager")
    eager, compiled = (trainer_of(seeded(), tokens, name, lr=0.02) for name in ("eager", "compile"))
    for _ in range(8):
        eager.step()
        compiled.step()
    assert eager.done
    assert distance(compiled.losses, eager.losses) < 1e-5
    assert eager.losses[-4:].mean() < eager.losses[:4].mean()
