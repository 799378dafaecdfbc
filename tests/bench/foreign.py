"""Another project's repository, as adopters have them, and its user's environment: what tests of the gate compare in.

The package `mine` lies in the sub-folder python/, with an extension that setuptools compiles; the suite lies in a
folder bench/ of the repository's own, with a helper beside it. Each of its rows takes some milliseconds.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import rich

ROOT = Path(__file__).resolve().parents[2]
# Where what is installed beside this interpreter lies: torch and the rest, and setuptools.
INSTALLED = Path(rich.__file__).resolve().parent.parent

PROJECT = """\
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "mine"
version = "1.0"
dependencies = ["torch"]

[tool.setuptools]
packages = ["mine"]
"""
SETUP = """\
from setuptools import Extension, setup

setup(ext_modules=[Extension("mine.native", ["mine/native.c"])])
"""
PLAIN = """\
def digest(values):
    total = 0
    for value in values:
        total = (31 * total + value) % 1000003
    return total
"""
TENSORS = """\
import torch


def softmax(x):
    weights = torch.exp(x - x.amax(1, keepdim=True))
    return weights / weights.sum(1, keepdim=True)
"""
COMPILED = """\
import torch

from mine import native


def sine(x):
    result = torch.empty_like(x)
    native.sine(x.numpy(), result.numpy())
    return result
"""
NATIVE = """\
#include <Python.h>
#include <math.h>

static void sines(const double *from, double *to, Py_ssize_t n) {
    for (Py_ssize_t i = 0; i < n; i++)
        to[i] = sin(from[i]);
}

static PyObject *sine(PyObject *self, PyObject *arguments) {
    Py_buffer from, to;
    if (!PyArg_ParseTuple(arguments, "y*w*", &from, &to))
        return NULL;
    Py_ssize_t n = from.len / sizeof(double);
    sines(from.buf, to.buf, n);
    PyBuffer_Release(&from);
    PyBuffer_Release(&to);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {{"sine", sine, METH_VARARGS, NULL}, {NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "native", NULL, -1, methods};

PyMODINIT_FUNC PyInit_native(void) { return PyModule_Create(&module); }
"""
HELPER = """\
import torch


def uniform(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def digest(values):
    total = 0
    for value in values:
        total = (31 * total + value) % 1000003
    return total
"""
SUITE = """\
import inputs
import torch
from bench import Bench, Candidate, Cost, Workload
from mine.compiled import sine
from mine.plain import digest
from mine.tensors import softmax


def row(name, call, reference, argument, cost):
    exact = torch.as_tensor(reference(argument))

    def error(call):
        return float((torch.as_tensor(call(argument)) - exact).abs().max())

    def build(device):
        return Bench([(argument,)], reference, {"mine": Candidate(lambda: call, error, 1e-6)}, cost, frozen=True)

    return Workload(name, "speed", build)


def workloads(quick):
    integers = (1000 * inputs.uniform(100000)).long().tolist()
    x, angles = inputs.uniform(1000, 1000), inputs.uniform(500000).double()
    return [
        row("digest/100000", digest, inputs.digest, integers, Cost(bytes=8e5, flops=3e5)),
        row("softmax/1000", softmax, lambda x: x.softmax(1), x, Cost(bytes=8e6, flops=4e6)),
        row("sine/500000", sine, torch.sin, angles, Cost(bytes=8e6, flops=5e6)),
    ]
"""
FILES = {
    "pyproject.toml": '[tool.ddpm-bench]\nsuites = ["bench/speed.py"]\ntimeout = 60\n',
    ".gitignore": "__pycache__/\nbuild/\n*.egg-info/\n*.so\n",
    "bench/speed.py": SUITE,
    "bench/inputs.py": HELPER,
    "python/pyproject.toml": PROJECT,
    "python/setup.py": SETUP,
    "python/mine/__init__.py": '__version__ = "1.0"\n',
    "python/mine/plain.py": PLAIN,
    "python/mine/tensors.py": TENSORS,
    "python/mine/compiled.py": COMPILED,
    "python/mine/native.c": NATIVE,
}


def git(root: Path, *arguments: str) -> str:
    names = {f"GIT_{who}_{what}": "tests" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | names).stdout.strip()


def commit(root: Path, branch: str) -> None:
    """All there is as a commit, with a branch of this name at it."""
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", branch)
    git(root, "branch", branch)


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def make_repository(root: Path, files: dict[str, str] = FILES) -> None:
    """Commit `base` of a repository with these files; no commit is checked out by name."""
    root.mkdir(parents=True)
    write(root, files)
    git(root, "init", "-q")
    commit(root, "base")
    git(root, "checkout", "-q", "--detach", "base")


def make_environment(folder: Path, *packages: Path) -> dict[str, str]:
    """The variables of a shell in a virtual environment that has what is installed here, and these packages.

    fused-ddpm is what this file belongs to, with its command, as `pip install` would leave them. The packages are
    installed by pip, not editable.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    site = sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)})
    (Path(site) / "installed.pth").write_text(f"{INSTALLED}\n{ROOT}\n")
    write(
        Path(site), {"fused_ddpm-0.1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: fused-ddpm\nVersion: 0.1.0\n"}
    )
    command = folder / "bin" / "ddpm-bench"
    command.write_text(f"#!{python}\nimport sys\n\nfrom bench.__main__ import main\n\nsys.exit(main())\n")
    command.chmod(0o755)
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    variables |= {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "VIRTUAL_ENV": str(folder)}
    for package in packages:
        line = [str(python), "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", str(package)]
        subprocess.run(line, check=True, env=variables, capture_output=True)
    return variables
