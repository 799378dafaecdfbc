"""The demo as a newcomer runs it: it is quick, leaves what it promises, and an independent reader knows its digits."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from ddpm import engines, load_run, sample
from ddpm.inference import form_of

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
PROMISED_SECONDS = 240
SLACK = 1.5  # for a machine that is doing something else as well
ENVIRONMENT = os.environ | {"TRITON_INTERPRET": "0"}  # as a newcomer's: tests/conftest.py turns the interpreter on
pytestmark = [pytest.mark.long, pytest.mark.alone]


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, str, float]:
    """The demo's folder, what it printed, and the seconds it took."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    own = BIN == ROOT / ".venv" / "bin"
    # In another environment than the project's own, `make` is told that setup is done and where the programs are.
    settings = [] if own else [f"BIN={BIN}", "-o", "setup"]
    began = time.monotonic()
    command = ["make", "demo", f"RUN={folder}", *settings]
    made = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=1200)
    seconds = time.monotonic() - began
    assert made.returncode == 0, made.stderr
    print(f"make demo took {seconds:.0f} s on {os.cpu_count()} cores")
    return folder, made.stdout + made.stderr, seconds


def test_demo_leaves_what_it_promises(demo):
    folder, printed, _ = demo
    left = {path.name for path in folder.iterdir()}
    assert left >= {"samples.png", "trajectory.gif", "loss.png", "model.safetensors", "config.json"}
    assert json.loads((folder / "config.json").read_text())["format_version"] == 2
    with Image.open(folder / "trajectory.gif") as gif:
        assert gif.n_frames > 10
    for name in ("samples.png", "trajectory.gif", "loss.png"):
        assert str(folder / name) in printed
    assert "ddpm sample" in printed, "says nothing of what to try next"
    assert all(word in printed for word in ("loss", "images/s", "left")), "no progress"


def test_demo_takes_less_than_four_minutes(demo):
    assert demo[2] < PROMISED_SECONDS * SLACK


def test_guided_samples_of_the_demo_are_read_as_what_was_asked_for(demo, tmp_path):
    figures = tmp_path / "figures.json"
    recipe = ["--guidance", "2", "--solver", "dpmpp_2m", "--steps", "30"]  # as the demo itself samples
    command = [BIN / "ddpm", "evaluate", demo[0], *recipe, "--n", "500", "--json", figures]
    made = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=1200)
    assert made.returncode == 0, made.stderr
    result = json.loads(figures.read_text())
    assert result["n"] == 500
    assert result["accuracy"] >= 0.95
    assert result["accuracy_real"] >= 0.95
    assert 0 <= result["frechet_real"] < result["frechet"]


@pytest.mark.parametrize("recipe", [{}, {"solver": "ddim", "steps": 50}, {"solver": "dpmpp_2m", "steps": 30}])
def test_trained_samples_do_not_depend_on_batches_splits_or_threads(demo, recipe):
    run = load_run(demo[0])
    options = run.sampling | recipe | {"guidance": 2.0, "seed": 3}
    contexts = torch.eye(10)[[0, 3, 7, 8]]

    def draw(first, n, **more):
        part = contexts[first : first + n]
        return sample(run.model, run.schedule, n, context=part, first_sample=first, **options, **more)

    whole = draw(0, 4)
    split = torch.cat([draw(0, 1), draw(1, 3)])
    batched = draw(0, 4, batch_size=3)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    lone = draw(0, 4)
    torch.set_num_threads(before)
    for other in (split, batched, lone):
        assert (other - whole).abs().max() <= 1e-5 * max(1, whole.abs().max())


RECIPES = ({"solver": "ddpm"}, {"solver": "ddim", "steps": 50}, {"solver": "dpmpp_2m", "steps": 30})


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe["solver"])
def test_every_engine_draws_eagers_pictures_with_trained_weights(demo, recipe, guidance):
    """The design's bounds: 1e-4, and from eager no further than four times its own distance from float64, plus 1e-6."""
    run = load_run(demo[0])
    options = run.sampling | recipe | {"guidance": guidance, "seed": 3, "context": torch.eye(10)[[0, 3, 7, 8]]}

    def draw(engine, dtype=torch.float32):
        return sample(run.model, run.schedule, 4, engine=engine, dtype=dtype, **options)

    def distance(images, others):
        return float((images - others).abs().max() / others.abs().max().clamp(min=1))

    eager = draw("eager")
    allowed = min(1e-4, 4 * distance(eager, draw("eager", torch.float64)) + 1e-6)
    found = {name: draw(name) for name in ("eager", *engines.competitors(torch.device("cpu"), form=form_of(run.model)))}
    assert {"eager", "fused"} <= found.keys()
    assert {name: distance(images, eager) for name, images in found.items() if distance(images, eager) > allowed} == {}
