"""run.py beside its manifest, names in any form of Unicode, folders, and what killed processes left."""

import fcntl
import json
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from export import run
from tests.export.test_commands import line

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bundle(exported, tmp_path):
    """A copy of the export, manifest included."""
    return shutil.copytree(exported, tmp_path / "bundle")


def flipped(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 64
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["sampler.onnx", "denoiser.onnx", "step.onnx"])
@pytest.mark.parametrize("where", [0.3, 0.6, 0.95])
def test_a_flipped_bit_is_seen(bundle, run_folder, export, name, where):
    path = bundle / name
    flipped(path, int(where * path.stat().st_size))
    commands = [("info", path), ("verify", path, run_folder), ("run", path, "--n", 1, "--npy", bundle / "x.npy")]
    for command in commands:
        assert f"{path}: its sha256 is not the one in manifest.json" in line(export(*command), 3)
    assert not (bundle / "x.npy").exists()


def test_a_file_of_another_export_is_seen(bundle, exported_open, export):
    shutil.copyfile(exported_open / "sampler.onnx", bundle / "sampler.onnx")
    assert "exchanged" in line(export("run", bundle, "--n", 1, "--npy", bundle / "x.npy"), 3)


def test_a_damaged_manifest_is_seen(bundle, export):
    (bundle / "manifest.json").write_text("{")
    said = line(export("run", bundle, "--n", 1, "--npy", bundle / "x.npy"), 3)
    assert f"{bundle / 'manifest.json'}: cannot be read" in said


@pytest.mark.parametrize("manifest", [None, "[]", '{"name": "a web page"}', '{"files": {"other.onnx": {}}}'])
def test_that_nobody_knows_a_digest_is_said(copied, export, manifest):
    if manifest is not None:
        (copied / "manifest.json").write_text(manifest)
    answer = export("run", copied, "--n", 1, "--npy", copied / "x.npy")
    assert answer.code == 0
    assert answer.err == "note: no manifest.json knows the sha256 of sampler.onnx: damage would go unnoticed\n"


def test_a_folder_is_its_sampler(bundle, run_folder, export):
    assert export("run", bundle, "--n", 1, "--npy", bundle / "x.npy").code == 0
    said = line(export("run", run_folder, "--n", 1, "--npy", bundle / "y.npy"), 3)
    assert said == f"error: {run_folder}: has no sampler.onnx, needs a folder that `ddpm-export onnx RUN --out` wrote"


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
@pytest.mark.parametrize("typed", ["NFC", "NFD"])
def test_names_are_compared_as_they_read(stored, typed):
    names = [unicodedata.normalize(stored, name) for name in ("Bär", "Löwe")]
    metadata = {"format_version": 2, "condition_shape": [2], "classes": names}
    assert run.contexts(unicodedata.normalize(typed, "Löwe"), metadata, np.arange(1)).tolist() == [[0, 1]]


def test_what_killed_processes_left_is_swept(bundle, export):
    """Of a process that is gone, of one that writes, and files that only look alike."""
    names = [f".fused-ddpm-{number:016x}.partial.{suffix}" for number, suffix in enumerate(("png", "npy", "png"))]
    for name in (*names, ".x.partial.png"):
        (bundle / name).touch()
    with (bundle / names[2]).open("rb") as writing:
        fcntl.flock(writing, fcntl.LOCK_EX)
        assert export("run", bundle, "--n", 1, "--npy", bundle / "x.npy").code == 0
    assert {path.name for path in bundle.iterdir() if ".partial." in path.name} == {names[2], ".x.partial.png"}


@pytest.mark.parametrize("option", ["--npy", "--out"])
def test_a_process_that_is_killed_while_it_writes_leaves_one_file_that_the_next_removes(bundle, export, option):
    path = bundle / f"x.{'npy' if option == '--npy' else 'png'}"
    code = (
        "import os, sys; from export import run; import pathlib\n"
        "def save(file): file.write(b'half'); file.flush(); os.kill(os.getpid(), 9)\n"
        "run._write(pathlib.Path(sys.argv[1]), save)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, check=False)
    assert killed.returncode == -9
    assert not path.exists()
    assert len(list(bundle.glob(".*.partial.*"))) == 1
    assert export("run", bundle, "--n", 1, option, path).code == 0
    assert not list(bundle.glob(".*.partial.*"))


def test_the_manifest_is_read_as_written(bundle):
    files = json.loads((bundle / "manifest.json").read_text())["files"]
    for name in ("sampler.onnx", "run.py"):
        assert run.known_digest(bundle / name) == files[name]["sha256"]
