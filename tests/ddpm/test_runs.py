"""Run folders: one writer, from before it looks; one run's files together; no memory for what a config says."""

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm import ContextUnet, NoiseSchedule, files, load_run, runs, training
from ddpm.distributed import World
from ddpm.errors import BadInput
from ddpm.files import digest_of, locked, read_noted
from ddpm.networks import NETWORKS
from ddpm.training import TrainOptions

SCHEDULES = [NoiseSchedule.make("cosine", timesteps) for timesteps in (20, 500)]


def make_run(folder: Path, k: int) -> Path:
    """Run k: of its own schedule and weights."""
    torch.manual_seed(k)
    network = ContextUnet(1, 8, 3, 16)
    with runs.held(folder):
        runs.start_run(folder, runs.make_config(network, SCHEDULES[k], "eps"), network)
    return folder


@pytest.fixture
def two(tmp_path) -> list[Path]:
    return [make_run(tmp_path / name, k) for k, name in enumerate("ab")]


@pytest.fixture
def data(tmp_path) -> Path:
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (8, 16, 16, 1), dtype=np.uint8))
    return tmp_path / "images.npy"


@pytest.fixture
def is_held():
    """is_held(folder): whether it is refused to another writer."""

    def ask(folder: Path) -> bool:
        try:
            with locked(folder):
                return False
        except BadInput:
            return True

    return ask


# --- one writer -------------------------------------------------------------------------------------------------


def test_who_is_refused_leaves_the_folder_to_the_one_that_has_it(tmp_path, monkeypatch):
    """Both found no folder: the one that comes second must not remove what the first is about to write to."""
    folder = tmp_path / "run"
    first, make = runs.held(folder), runs.make_folder

    def slow(path: Path) -> list[Path]:
        made = make(path)
        monkeypatch.setattr(runs, "make_folder", make)
        first.__enter__()
        return made

    monkeypatch.setattr(runs, "make_folder", slow)
    with pytest.raises(BadInput, match="another process is writing to it"), runs.held(folder):
        pass
    assert folder.is_dir()
    first.__exit__(None, None, None)


@pytest.mark.parametrize("when", ["before it is opened", "before it is locked"])
def test_a_folder_that_is_removed_before_it_is_held_is_made_again(tmp_path, monkeypatch, is_held, when):
    folder = tmp_path / "run"
    module, name = (runs, "make_folder") if when == "before it is opened" else (files, "_lock")
    real = getattr(module, name)

    def removed(*arguments: object, **more: object) -> object:
        result = real(*arguments, **more)
        monkeypatch.setattr(module, name, real)
        folder.rmdir()
        return result

    monkeypatch.setattr(module, name, removed)
    with runs.held(folder):
        assert folder.is_dir()
        assert is_held(folder)
    assert folder.is_dir()


def test_training_holds_the_folder_from_before_it_looks_until_its_last_file(tmp_path, data, ddpm, is_held, monkeypatch):
    folder, seen = tmp_path / "run", []

    def noting(module: str, name: str) -> None:
        target = __import__(module, fromlist=[name])
        real = getattr(target, name)

        def call(*arguments: object, **more: object) -> object:
            seen.append((name, is_held(folder)))
            return real(*arguments, **more)

        monkeypatch.setattr(target, name, call)

    noting("ddpm.runs", "free_folder")
    noting("ddpm.runs", "start_run")
    noting("ddpm.training.loop", "write_model")
    noting("ddpm.pictures", "save_loss_plot")
    options = ("--data", data, "--n-feat", 8, "--epochs", 1, "--timesteps", 20, "--schedule", "cosine")
    assert ddpm("train", "--out", folder, *options, "--device", "cpu").code == 0
    assert seen == [(name, True) for name in ("free_folder", "start_run", "write_model", "save_loss_plot")]
    assert not is_held(folder)
    torch.save(ContextUnet(1, 8, 3, 16).state_dict(), tmp_path / "w.pth")
    seen.clear()
    assert ddpm("import", tmp_path / "w.pth", "--out", folder, "--overwrite").code == 0
    assert seen == [("free_folder", True), ("start_run", True)]


def test_a_run_that_ended_between_the_look_and_the_lock_is_not_wiped(tmp_path, data, monkeypatch):
    """The second process is let in only when the first has ended, and looks then."""
    options = TrainOptions(str(data), n_feat=8, epochs=1, timesteps=20, schedule="cosine")
    how, real, before = {"device": torch.device("cpu"), "world": World()}, runs.make_folder, []

    def slow(folder: Path) -> list[Path]:
        monkeypatch.setattr(runs, "make_folder", real)
        training.train(options, folder, **how)
        before.append((folder / runs.MODEL).read_bytes())
        return real(folder)

    monkeypatch.setattr(runs, "make_folder", slow)
    with pytest.raises(BadInput, match="already holds a run"):
        training.train(replace(options, seed=7), tmp_path / "run", **how)
    assert [(tmp_path / "run" / runs.MODEL).read_bytes()] == before


def test_a_folder_of_which_nothing_came_is_not_left(tmp_path):
    def fail() -> None:
        with runs.held(tmp_path / "a" / "b"):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not list(tmp_path.iterdir())
    (tmp_path / "a").mkdir()
    with pytest.raises(KeyError):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_overwriting_takes_what_was_exported_of_the_run_before(two):
    for name in (*runs.EXPORTS, "grid.png"):
        (two[0] / name).write_bytes(b"of the run before")
    with pytest.raises(BadInput, match="already holds a run"):
        runs.free_folder(two[0])
    make_run(two[0], 1)
    assert {path.name for path in two[0].iterdir()} == {runs.CONFIG, runs.MODEL, "grid.png"}


# --- one run's files --------------------------------------------------------------------------------------------


def test_the_same_run_has_the_same_bytes_and_another_another_id(two, tmp_path):
    again = make_run(tmp_path / "again", 0)
    assert (again / runs.CONFIG).read_bytes() == (two[0] / runs.CONFIG).read_bytes()
    assert (again / runs.MODEL).read_bytes() == (two[0] / runs.MODEL).read_bytes()
    ids = [json.loads((run / runs.CONFIG).read_text())["run_id"] for run in two]
    assert ids[0] != ids[1]
    assert [read_noted(run / runs.MODEL)[1]["run_id"] for run in two] == ids
    torch.manual_seed(5)
    other = runs.make_config(ContextUnet(1, 8, 3, 16), SCHEDULES[0], "eps")["run_id"]
    assert other not in ids, "the weights count too"


def test_a_run_that_was_replaced_since_it_was_loaded_is_told_from_what_is_there(two):
    opened = load_run(two[0])
    opened.check_present()
    make_run(two[0], 1)
    with pytest.raises(BadInput, match="another run has taken its place"):
        opened.check_present()


def test_a_run_is_loaded_to_the_cpu_whatever_the_default_device_is(two):
    right = load_run(two[0]).digest()
    torch.set_default_device("meta")
    try:
        run = load_run(two[0])
    finally:
        torch.set_default_device(None)
    assert {tensor.device.type for tensor in run.model.state_dict().values()} == {"cpu"}
    assert run.digest() == right


def test_files_of_two_runs_are_not_mixed(two):
    shutil.copy(two[1] / runs.MODEL, two[0])
    with pytest.raises(BadInput, match=r"model\.safetensors: is of another run than config\.json"):
        load_run(two[0])


def test_a_run_that_is_replaced_while_it_is_loaded_is_the_one_or_the_other(two, monkeypatch):
    expected = [load_run(run) for run in two]
    real = runs.read_config

    def slow(folder: Path) -> dict:
        config = real(folder)
        monkeypatch.setattr(runs, "read_config", real)
        make_run(two[0], 1)
        return config

    monkeypatch.setattr(runs, "read_config", slow)
    found = load_run(two[0])
    assert found.schedule.timesteps == expected[1].schedule.timesteps == 500
    assert found.digest() == expected[1].digest() != expected[0].digest()


def test_a_checked_run_says_nothing_and_a_former_one_that_it_is_not(two):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = load_run(two[0])
    assert read_noted(two[0] / runs.MODEL)[1]["digest"] == run.digest() == digest_of(run.model.state_dict())
    with pytest.warns(UserWarning, match=r"model\.safetensors: has no digest"):
        load_run(Path(__file__).parent / "former" / "run")


# --- what a config says -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lie", [{"n_feat": 8192}, {"height": 4096, "multipliers": None}, {"n_cfeat": 10**9}])
def test_a_config_that_lies_costs_no_memory(two, lie, monkeypatch):
    made = []
    real = runs.build_network

    def building(*arguments: object) -> torch.nn.Module:
        made.append(real(*arguments))
        return made[-1]

    monkeypatch.setattr(runs, "build_network", building)
    path = two[0] / runs.CONFIG
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"model": config["model"] | lie}))
    with pytest.raises(BadInput, match=r"model\.safetensors: "):
        load_run(two[0])
    assert [
        parameter.device.type for network in made for parameter in network.parameters() if not parameter.is_meta
    ] == []
    assert len(made) == 1


class Reading(ContextUnet):
    """A network whose constructor reads a tensor, which one without memory cannot be."""

    def __init__(self, **arguments: object) -> None:
        super().__init__(**arguments)
        self.first = float(next(self.parameters()).detach().sum())


def test_a_network_that_reads_its_weights_when_it_is_made_loads(two, monkeypatch):
    monkeypatch.setitem(NETWORKS, "context_unet", Reading)
    assert isinstance(load_run(two[0]).model, Reading)
