"""Folders of the version before (commit 5eff963, config format 1) still load, sample, resume and are still checked.

`former/run` was trained by `ddpm train --data digits --n-feat 8 --epochs 1 --batch-size 128 --timesteps 20 --beta-end
0.35` and killed after step 11 of 15, `former/roll` by the same on `swiss-roll`. Of them images.npy is `ddpm sample run
--n 4 --context all --guidance 2 --seed 7 --engine eager`, resumed.npy the same after `--resume`, points.npy
`ddpm sample roll --n 8 --seed 7`, sampler.onnx the export of run: all by that version.
"""

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from ddpm import ContextUnet, PointMLP, load_run
from ddpm.metrics import distance

FORMER = Path(__file__).parent / "former"
IMAGES = ("--n", 4, "--context", "all", "--guidance", 2, "--seed", 7)
POINTS = ("--n", 8, "--seed", 7)


@pytest.fixture
def copy(tmp_path):
    """copy("run"): a folder of its own."""
    return lambda name: Path(shutil.copytree(FORMER / name, tmp_path / name))


@pytest.fixture
def draw(ddpm, tmp_path):
    """draw(run, ...): what `ddpm sample --npy` writes."""

    def call(run, *options):
        answer = ddpm("sample", run, "--npy", tmp_path / "x.npy", "--device", "cpu", *options)
        assert answer.code == 0, answer.err
        return np.load(tmp_path / "x.npy")

    return call


def test_they_are_of_the_format_before():
    for name in ("run", "roll"):
        config = json.loads((FORMER / name / "config.json").read_text())
        assert (config["format_version"], "network" in config) == (1, False)


@pytest.mark.parametrize("engine", ["eager", "fused"])
def test_they_draw_the_same_pictures(draw, engine):
    images = draw(FORMER / "run", *IMAGES, "--engine", engine)
    assert distance(images, np.load(FORMER / "images.npy")) < 1e-4
    points = draw(FORMER / "roll", *POINTS, "--engine", engine)
    assert distance(points, np.load(FORMER / "points.npy")) < 1e-4


def test_they_load_as_what_they_were():
    run, roll = load_run(FORMER / "run"), load_run(FORMER / "roll")
    assert (type(run.model), run.model.config()["n_cfeat"], run.classes) == (ContextUnet, 10, tuple("0123456789"))
    assert (type(roll.model), roll.model.sample_shape, roll.classes) == (PointMLP, (2,), ())
    assert run.sampling == {"solver": "ddpm", "steps": None, "clip": 1.0, "prediction": "eps"}
    assert roll.sampling == {"solver": "ddpm", "steps": None, "clip": None, "prediction": "eps"}
    # What the former version wrote whatever the solver took is no option of another solver.
    assert run.options(solver="dpmpp_2m", steps=4) == {
        "solver": "dpmpp_2m",
        "steps": 4,
        "clip": 1.0,
        "prediction": "eps",
    }


def test_options_that_were_chosen_are_kept(copy):
    run = copy("run")
    config = json.loads((run / "config.json").read_text())
    config["sampling"] |= {"variance": "beta", "eta": 0.5, "spacing": "linspace", "steps": 7}
    (run / "config.json").write_text(json.dumps(config))
    # eta was no option of ddpm, which ignored it.
    expected = {"solver": "ddpm", "steps": 7, "clip": 1.0, "variance": "beta", "spacing": "linspace"}
    assert load_run(run).options() == expected | {"prediction": "eps"}
    config["sampling"] |= {"solver": "ddim"}
    (run / "config.json").write_text(json.dumps(config))
    expected = {"solver": "ddim", "steps": 7, "clip": 1.0, "eta": 0.5, "spacing": "linspace"}
    assert load_run(run).options() == expected | {"prediction": "eps"}


def test_an_interrupted_one_is_resumed_to_the_end_that_it_had(ddpm, draw, copy):
    run = copy("run")
    answer = ddpm("train", "--out", run, "--resume", "--device", "cpu")
    assert answer.code == 0, answer.err
    assert "(15 steps, loss of the last epoch 0.8207)" in answer.out
    with (run / "loss.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["epoch"], row["step"]) == ("1", "15")
    assert float(row["loss"]) == pytest.approx(0.820671, abs=1e-4)
    # Bit for bit on one machine; the rounding of another CPU's four training steps is 3e-4 in these pictures.
    expected = np.load(FORMER / "resumed.npy")
    assert distance(draw(run, *IMAGES), expected) < 3e-3
    assert distance(np.load(FORMER / "images.npy"), expected) > 0.1
    answer = ddpm("train", "--out", run, "--resume", "--device", "cpu")
    assert (answer.code, "finished before" in answer.out) == (0, True)
    assert ddpm("train", "--out", run, "--resume", "--n-feat", 16).code == 2


def test_a_finished_one_is_finished(ddpm, copy):
    answer = ddpm("train", "--out", copy("roll"), "--resume", "--device", "cpu")
    assert (answer.code, "finished before" in answer.out) == (0, True)


@pytest.mark.parametrize("name", ["intruder", "intruder.Net", "intruder:Net", "os.system", "ddpm.networks.ContextUnet"])
def test_a_name_that_is_no_network_s_is_refused_and_nothing_is_imported(ddpm, copy, tmp_path, monkeypatch, name):
    (tmp_path / "intruder.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run = copy("run")
    path = run / "config.json"
    former = json.loads(path.read_text())
    now = former | {"format_version": 2, "network": name, "sampling": {}}
    for config in (former | {"model": former["model"] | {"kind": name}}, now):
        path.write_text(json.dumps(config))
        for command in (("sample", run, "--n", 1, "--npy", "x.npy"), ("evaluate", run)):
            answer = ddpm(*command)
            assert (answer.code, len(answer.err.splitlines())) == (2, 1)
            assert f"network: got {name!r}, needs one of context_unet, mlp" in answer.err
    assert "intruder" not in sys.modules
    assert not (tmp_path / "ran").exists()
