"""Checkpoints: a run stopped anywhere and resumed ends bit for bit as if nothing had happened; nothing is ever torn."""

import errno
import json
import math
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ddpm import runs, training
from ddpm.distributed import World
from ddpm.errors import BadInput, WorkFailed
from ddpm.files import locked, replacing, write_text
from ddpm.training import Trainer, TrainOptions

STEPS = 9


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> tuple[str, str]:
    """24 images of 3 classes in two .npy files."""
    folder, rng = tmp_path_factory.mktemp("source"), np.random.default_rng(1)
    images, labels = folder / "images.npy", folder / "labels.npy"
    np.save(images, rng.integers(0, 256, (24, 16, 16, 1), dtype=np.uint8))
    np.save(labels, np.arange(24) % 3)
    return str(images), str(labels)


@pytest.fixture(scope="module")
def options(source) -> TrainOptions:
    images, labels = source
    return TrainOptions(images, labels, n_feat=8, timesteps=20, schedule="cosine", batch_size=8, epochs=3, seed=2)


@pytest.fixture
def train(options):
    """train(folder, resume=True, ...): training.train of the small run."""

    def call(folder: Path, **more) -> None:
        training.train(options, folder, device=torch.device("cpu"), world=World(), **more)

    return call


def after_step(patch: pytest.MonkeyPatch, k: int, act: Callable[[], None]) -> None:
    """Call act() at the end of step k of any trainer, once."""
    step = Trainer.step

    def stepping(trainer: Trainer) -> None:
        step(trainer)
        if trainer.index == k:
            patch.setattr(Trainer, "step", step)
            act()

    patch.setattr(Trainer, "step", stepping)


@pytest.fixture(scope="module")
def made(options, tmp_path_factory) -> Path:
    """Two runs: `undisturbed`, and `interrupted` by Ctrl-C after four of its nine steps. Copy before changing."""
    folder, here = tmp_path_factory.mktemp("made"), {"device": torch.device("cpu"), "world": World()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as every test here
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kernels.backend.INTERPRETED", False)
        training.train(options, folder / "undisturbed", **here)
        after_step(patch, 4, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(training.Interrupted):
            training.train(options, folder / "interrupted", **here)
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def undisturbed(made) -> Path:
    return made / "undisturbed"


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(k, act): see `after_step`."""
    return partial(after_step, monkeypatch)


@pytest.fixture
def interrupted(made, tmp_path) -> Path:
    """A copy of the run stopped after four of its nine steps."""
    return Path(shutil.copytree(made / "interrupted", tmp_path / "interrupted"))


def assert_same_run(one: Path, other: Path) -> None:
    for name in (runs.MODEL, runs.TRAINING):
        a, b = load_file(one / name), load_file(other / name)
        assert a.keys() == b.keys()
        assert [key for key in a if not torch.equal(a[key], b[key])] == []
    assert (one / runs.LOSS_CSV).read_bytes() == (other / runs.LOSS_CSV).read_bytes()
    assert (one / runs.CONFIG).read_bytes() == (other / runs.CONFIG).read_bytes()


def step_of(folder: Path) -> int:
    return int(load_file(folder / runs.TRAINING)["step"])


# --- resuming ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_interrupted_at_any_step_and_resumed_is_as_undisturbed(tmp_path, train, undisturbed, stop_at, k, number):
    folder = tmp_path / "run"
    stop_at(k, lambda: signal.raise_signal(number))
    with pytest.raises(training.Interrupted, match=f"{number.name} at step {k}") as caught:
        train(folder)
    assert caught.value.exit_code == 128 + number
    assert step_of(folder) == k
    train(folder, resume=True)
    assert_same_run(folder, undisturbed)


def test_interrupted_in_every_step_and_resumed_is_as_undisturbed(tmp_path, train, undisturbed, stop_at):
    folder = tmp_path / "run"
    for k in range(1, STEPS):
        stop_at(k, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(training.Interrupted):
            train(folder, resume=True)
    train(folder, resume=True)
    assert_same_run(folder, undisturbed)


def test_saving_after_every_step_changes_nothing(tmp_path, train, undisturbed):
    train(tmp_path / "run", save_every=1e-9)
    assert_same_run(tmp_path / "run", undisturbed)


def test_signal_handlers_are_put_back(tmp_path, train):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train(tmp_path / "run")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_training_in_a_thread_works(tmp_path, train):
    folder = tmp_path / "run"
    worker = threading.Thread(target=train, args=(folder,))
    worker.start()
    worker.join(timeout=60)
    assert step_of(folder) == STEPS


def test_a_kill_between_the_two_files_is_healed_by_resume(tmp_path, train, undisturbed, monkeypatch):
    def killed(folder: Path, trainer: Trainer) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("ddpm.training.loop.write_model", killed)
        with pytest.raises(KeyboardInterrupt):
            train(folder)
    assert step_of(folder) == STEPS
    assert not (folder / runs.MODEL).exists()
    train(folder, resume=True)
    assert_same_run(folder, undisturbed)


def test_a_kill_between_the_two_files_midway_leaves_the_older_model_whole(interrupted, train, undisturbed, monkeypatch):
    def killed(folder: Path, trainer: Trainer) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ddpm.training.loop.write_model", killed)
        with pytest.raises(KeyboardInterrupt):
            train(interrupted, resume=True, save_every=1e-9)
    assert step_of(interrupted) == 5
    runs.load_run(interrupted)
    train(interrupted, resume=True)
    assert_same_run(interrupted, undisturbed)


def test_resume_without_a_folder_starts_from_zero(tmp_path, train, undisturbed):
    train(tmp_path / "new", resume=True)
    assert_same_run(tmp_path / "new", undisturbed)


def test_resume_with_only_a_config_starts_from_zero(tmp_path, train, undisturbed):
    (tmp_path / "new").mkdir()
    shutil.copy(undisturbed / runs.CONFIG, tmp_path / "new")
    train(tmp_path / "new", resume=True)
    assert_same_run(tmp_path / "new", undisturbed)


def test_resume_of_a_finished_run_says_so_and_changes_nothing(ddpm, digits_run, tmp_path, snapshot):
    run = shutil.copytree(digits_run, tmp_path / "run")
    before = snapshot(run)
    answer = ddpm("train", "--out", run, "--resume")
    assert answer.code == 0
    assert answer.out.startswith(f"finished before: {run} (")
    after = snapshot(run)
    assert before.keys() == after.keys()
    # The order of a safetensors file's metadata is not fixed, so its bytes may differ; the tensors may not.
    assert {name for name in before if before[name] != after[name]} <= {runs.LOSS_PNG, runs.MODEL}
    assert_same_run(run, digits_run)


def test_resume_with_other_options_is_refused(interrupted, ddpm, snapshot):
    before = snapshot(interrupted)
    for name, value, stored in (("--lr", "0.5", "0.001"), ("--epochs", "9", "3"), ("--prediction", "v", "eps")):
        answer = ddpm("train", "--out", interrupted, "--resume", name, value)
        assert answer.code == 2
        assert re.fullmatch(rf"error: {name}: got {value}, but .*{stored}.*\n", answer.err)
    assert snapshot(interrupted) == before


def test_resume_with_the_same_options_goes_on(interrupted, ddpm, undisturbed, source):
    same = ("--data", source[0], "--labels", source[1], "--seed", "2", "--epochs", "3")
    assert ddpm("train", "--out", interrupted, "--resume", *same).code == 0
    assert_same_run(interrupted, undisturbed)


def test_resume_finds_moved_data_where_it_is_told(interrupted, ddpm, undisturbed, source, tmp_path):
    images = shutil.copy(source[0], tmp_path / "elsewhere.npy")
    assert ddpm("train", "--out", interrupted, "--resume", "--data", images).code == 0
    for name in (runs.MODEL, runs.TRAINING):
        a, b = load_file(interrupted / name), load_file(undisturbed / name)
        assert all(torch.equal(a[key], b[key]) for key in b)


def test_resume_with_other_data_is_refused(interrupted, ddpm, source, tmp_path, snapshot):
    other = np.load(source[0])
    other[0, 0, 0, 0] ^= 1
    np.save(tmp_path / "other.npy", other)
    before = snapshot(interrupted)
    answer = ddpm("train", "--out", interrupted, "--resume", "--data", tmp_path / "other.npy")
    assert answer.code == 2
    assert re.fullmatch(r"error: .*other data than .*other\.npy.*\n", answer.err)
    assert snapshot(interrupted) == before


@pytest.mark.parametrize(
    "damage",
    [lambda whole: b"", lambda whole: whole[:-1], lambda whole: whole[: len(whole) // 2], lambda whole: b"x" * 999],
    ids=["empty", "one-byte-short", "half", "garbage"],
)
def test_damaged_training_state_is_refused(interrupted, ddpm, snapshot, damage):
    path = interrupted / runs.TRAINING
    path.write_bytes(damage(path.read_bytes()))
    before = snapshot(interrupted)
    answer = ddpm("train", "--out", interrupted, "--resume")
    assert answer.code == 2
    assert re.fullmatch(r"error: .*training\.safetensors: .*\n", answer.err)
    assert snapshot(interrupted) == before


def test_training_state_of_another_network_is_refused(interrupted, digits_run, ddpm, snapshot):
    shutil.copy(digits_run / runs.TRAINING, interrupted)
    before = snapshot(interrupted)
    answer = ddpm("train", "--out", interrupted, "--resume")
    assert answer.code == 2
    assert re.fullmatch(r"error: .*training.* does not fit.*\n", answer.err)
    assert snapshot(interrupted) == before


def test_resume_without_the_training_state_is_refused(interrupted, ddpm, snapshot):
    (interrupted / runs.TRAINING).unlink()
    before = snapshot(interrupted)
    answer = ddpm("train", "--out", interrupted, "--resume")
    assert answer.code == 2
    assert re.fullmatch(r"error: .*training\.safetensors: is missing.*--overwrite.*\n", answer.err)
    assert snapshot(interrupted) == before


def test_overwrite_leaves_nothing_of_the_run_before(interrupted, undisturbed, train, ddpm):
    (interrupted / runs.LOSS_PNG).write_bytes(b"old")
    train(interrupted, overwrite=True)
    assert_same_run(interrupted, undisturbed)
    assert not (interrupted / runs.LOSS_PNG).exists()


# --- a full disk, a loss that is lost ---------------------------------------------------------------------------


@contextmanager
def full_disk(where: str) -> Iterator[None]:
    """Until it ends, writing one byte or syncing fails as on a full disk: half is written, the error names no file."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write_half(path: Path, content: bytes | str, encoding: str | None = None) -> None:
        raw = content.encode() if isinstance(content, str) else content
        with path.open("wb") as file:
            file.write(raw[: len(raw) // 2])
        if raw:
            raise full

    def fail(*_: object) -> None:
        raise full

    with pytest.MonkeyPatch.context() as patch:
        if where == "write":
            patch.setattr(Path, "write_bytes", write_half)
            patch.setattr(Path, "write_text", write_half)
        else:
            patch.setattr(os, "fsync", fail)
        yield


@pytest.mark.parametrize("where", ["write", "fsync"])
def test_a_full_disk_leaves_the_previous_checkpoint(interrupted, undisturbed, ddpm, snapshot, where):
    before = snapshot(interrupted)
    with full_disk(where):
        answer = ddpm("train", "--out", interrupted, "--resume", "--save-every", "1e-9")
    errors = [line for line in answer.err.splitlines() if not line.startswith("train ")]
    assert answer.code == 2
    assert len(errors) == 1
    assert re.fullmatch(r"error: .*interrupted.*No space left on device.*", errors[0])
    assert snapshot(interrupted) == before
    runs.load_run(interrupted)
    assert ddpm("train", "--out", interrupted, "--resume").code == 0
    assert_same_run(interrupted, undisturbed)


@pytest.mark.parametrize("where", ["write", "fsync"])
def test_overwriting_on_a_full_disk_leaves_the_run_before(interrupted, ddpm, snapshot, where):
    before = snapshot(interrupted)
    with full_disk(where):
        answer = ddpm("train", "--data", "digits", "--out", interrupted, "--overwrite")
    assert snapshot(interrupted) == before
    assert answer.code == 2
    assert re.fullmatch(r"error: .*interrupted.*No space left on device.*\n", answer.err)


def test_a_lost_loss_fails_and_leaves_the_previous_checkpoint(interrupted, train, stop_at, snapshot, monkeypatch):
    before = snapshot(interrupted)
    step = Trainer.step

    def poisoned(trainer: Trainer) -> None:
        step(trainer)
        with torch.no_grad():
            next(trainer.network.parameters()).fill_(float("nan"))

    monkeypatch.setattr(Trainer, "step", poisoned)
    with pytest.raises(WorkFailed, match="not finite since step 6"):
        train(interrupted, resume=True)
    assert snapshot(interrupted) == before


def test_a_diverging_run_exits_1_with_one_line_and_saves_no_model(tmp_path, ddpm, tiny_options):
    answer = ddpm("train", "--out", tmp_path / "run", *tiny_options, "--lr", "1e30", "--clip-grad", "0")
    errors = [line for line in answer.err.splitlines() if not line.startswith("train ")]
    assert answer.code == 1
    assert len(errors) == 1
    assert re.match(r"error: loss is not finite since step \d+", errors[0])
    assert not (tmp_path / "run" / runs.MODEL).exists()


# --- whole files ------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file_and_no_partial_one(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def fail_halfway() -> None:
        with replacing(path) as partial:
            partial.write_text("half")
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        fail_halfway()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_replaced_only_when_it_is_whole(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert partial.suffix == path.suffix
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_second_run_in_the_folder_is_refused(interrupted, train, snapshot):
    before = snapshot(interrupted)
    with pytest.raises(BadInput, match=r"already holds a run .*needs --resume .*--overwrite or another --out"):
        train(interrupted)
    assert snapshot(interrupted) == before


# --- real processes ---------------------------------------------------------------------------------------------


def wait_for(condition, process, seconds: float = 120) -> None:
    """Poll until the condition holds; fail if the process ends or the time runs out before."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def saved_at(folder: Path) -> int:
    path = folder / runs.TRAINING
    return path.stat().st_mtime_ns if path.exists() else 0


def test_ctrl_c_saves_says_how_to_resume_and_exits_130(tmp_path, spawn, ddpm, options, source, undisturbed):
    folder = tmp_path / "run"
    process = spawn(
        *("train", "--out", folder, "--data", source[0], "--labels", source[1], "--n-feat", 8, "--seed", 2),
        *("--timesteps", 20, "--schedule", "cosine", "--batch-size", 8, "--epochs", 1000, "--save-every", 0.1),
    )
    wait_for(lambda: saved_at(folder), process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert f"ddpm train --out {folder} --resume" in out
    # What a process saved, this one continues: two more steps of each must agree bit for bit.
    stopped = step_of(folder)
    assert f"step {stopped}" in out
    long = TrainOptions(**{**vars(options), "epochs": 1000})
    data = long.load_data()
    whole, resumed = (Trainer(long.make_network(data), data, long, torch.device("cpu"), World()) for _ in range(2))
    training.resume_from(folder, resumed)
    for trainer in (whole, resumed):
        while trainer.index < stopped + 2:
            trainer.step()
    assert all(torch.equal(tensor, resumed.state()[name]) for name, tensor in whole.state().items() if name != "losses")


@pytest.mark.long
def test_killed_at_random_moments_and_resumed_is_bit_identical(tmp_path, spawn):
    options = ("--n-feat", 8, "--epochs", 16, "--timesteps", 100, "--schedule", "cosine", "--device", "cpu")
    reference = spawn("train", "--out", tmp_path / "undisturbed", *options)
    rng, folder, kills = np.random.default_rng(2024), tmp_path / "killed", 0
    for _ in range(5):
        before = saved_at(folder)
        process = spawn("train", "--out", folder, "--resume", *options, "--save-every", 0.3)
        wait_for(lambda: saved_at(folder) > before, process)  # noqa: B023
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills == 5, "a run that ends before it is killed proves nothing"
    assert step_of(folder) < 16 * 1797 // 100
    last = spawn("train", "--out", folder, "--resume", "--save-every", 0.3)
    for process in (last, reference):
        _, err = process.communicate(timeout=400)
        assert process.returncode == 0, err
    assert_same_run(folder, tmp_path / "undisturbed")
    assert not [path for path in folder.iterdir() if "partial" in path.name]


def test_a_folder_in_use_by_another_process_is_refused(interrupted, ddpm, snapshot):
    before = snapshot(interrupted)
    with locked(interrupted):
        answer = ddpm("train", "--out", interrupted, "--resume")
    assert answer.code == 2
    assert re.fullmatch(r"error: .*interrupted: another process is writing to it.*\n", answer.err)
    assert snapshot(interrupted) == before


@pytest.mark.parametrize("name", [runs.LOSS_CSV, runs.LOSS_PNG])
def test_a_file_of_a_runs_name_is_not_taken_for_ours(tmp_path, ddpm, name):
    (tmp_path / name).write_text("mine")
    answer = ddpm("train", "--data", "digits", "--out", tmp_path)
    assert answer.code == 2
    assert name in answer.err
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("data", {}, "has no digest"),
        ("data", 5, "has no digest"),
        ("classes", [1] * 10, "needs names"),
        ("schedule", {"kind": "linear", "timesteps": 10**14}, ": .+"),
    ],
)
def test_a_damaged_config_is_named(interrupted, ddpm, key, value, words):
    path = interrupted / runs.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    answer = ddpm("sample", interrupted, "--n", "1", "--out", interrupted / "a.png")
    assert answer.code == 2
    assert re.fullmatch(rf"error: .*config\.json.*{words}.*\n", answer.err)


@pytest.mark.parametrize("spoil", [lambda t: t * math.nan, lambda t: t.to(torch.int32)], ids=["nan", "integer"])
def test_spoiled_weights_are_refused(interrupted, ddpm, spoil):
    path = interrupted / runs.MODEL
    tensors = load_file(path)
    tensors["out.3.bias"] = spoil(tensors["out.3.bias"])
    save_file(tensors, path)
    answer = ddpm("sample", interrupted, "--n", "1", "--out", interrupted / "a.png")
    assert answer.code == 2
    assert "out.3.bias" in answer.err
