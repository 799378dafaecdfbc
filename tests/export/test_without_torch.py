"""run.py and `ddpm-export run` in an environment that holds numpy, pillow and onnxruntime, and no PyTorch."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "export.md"
PACKAGES = ("numpy", "PIL", "onnxruntime")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A folder with those three packages alone; under `python -S` it is all there is beside the standard library."""
    folder = tmp_path_factory.mktemp("packages")
    for name in PACKAGES:
        place = Path(importlib.util.find_spec(name).origin).parent
        (folder / name).symlink_to(place)
        # Wheels keep their shared libraries in a folder beside the package.
        for libraries in place.parent.glob(f"{'pillow' if name == 'PIL' else name}.libs"):
            (folder / libraries.name).symlink_to(libraries)
    return folder


def python(environment, *arguments, also=(), cwd):
    path = os.pathsep.join(map(str, (environment, *also)))
    clean = {"PYTHONPATH": path, "PATH": os.environ["PATH"], "PYTHONNOUSERSITE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-S", *map(str, arguments)]
    return subprocess.run(command, env=clean, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def test_the_environment_has_no_torch(environment, tmp_path):
    for name in ("torch", "onnx", "typer", "rich"):
        done = python(environment, "-c", f"import {name}", also=[ROOT], cwd=tmp_path)
        assert done.returncode == 1
        assert f"No module named '{name}'" in done.stderr


def test_run_py_beside_the_model(environment, exported, tmp_path):
    arguments = ("--n", 3, "--seed", 7, "--context", "all", "--out", tmp_path / "g.png", "--npy", tmp_path / "g.npy")
    done = python(environment, exported / "run.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert np.load(tmp_path / "g.npy").shape == (3, 3, 16, 16)
    failed = python(environment, exported / "run.py", "--n", 0, "--out", tmp_path / "h.png", cwd=tmp_path)
    assert failed.returncode == 2
    assert failed.stderr == f"error: --n: got 0, needs 1..{2**31}\n"


def test_ddpm_export_run(environment, exported, tmp_path):
    command = ("-m", "export", "run", exported / "sampler.onnx", "--n", 2, "--npy", tmp_path / "g.npy")
    done = python(environment, *command, also=[ROOT], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "g.npy").shape == (2, 3, 16, 16)
    shown = python(environment, "-m", "export", "run", "--help", also=[ROOT], cwd=tmp_path)
    assert shown.returncode == 0
    assert "--provider" in shown.stdout


def test_without_onnxruntime_there_is_one_line(environment, exported, tmp_path):
    packages = tmp_path / "packages"
    packages.mkdir()
    for entry in environment.iterdir():
        if not entry.name.startswith("onnxruntime"):
            (packages / entry.name).symlink_to(entry)
    arguments = ("--n", 1, "--out", tmp_path / "g.png")
    commands = {
        (exported / "run.py", *arguments): (),
        ("-m", "export", "run", exported / "sampler.onnx", *arguments): [ROOT],
    }
    for command, also in commands.items():
        done = python(packages, *command, also=also, cwd=tmp_path)
        assert done.returncode == 4
        assert done.stderr.startswith("error: onnxruntime is not installed, needs: pip install ")
        assert done.stderr.count("\n") == 1


@pytest.mark.long
def test_the_pages_example_runs_as_printed(environment, make_run, tmp_path):
    from ddpm.networks import ContextUnet
    from export.__main__ import main

    (block,) = re.findall(r"```python\n(import numpy as np\nimport onnxruntime.*?)```", PAGE.read_text(), re.S)
    folder = make_run(tmp_path / "sprites", ContextUnet(3, 8, 5, 16), tuple("abcde"), clip=1.0)
    assert main(["onnx", str(folder), "--out", str(tmp_path / "sprites-onnx"), "--no-verify"]) == 0
    done = python(environment, "-c", block, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "five.png").size == (640, 128)
