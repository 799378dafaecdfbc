"""Kernels in C++ for the CPU: built by the machine's compiler at first use, kept on disk, loaded.

A library is named by what it is made from (source, compiler, instruction set), so it is never stale and may be shared
by processes. It links the OpenMP runtime that PyTorch has loaded, and its threads.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

# Named, not "native": the libraries of a home that several machines share must run on each.
ARCHITECTURES = {"AVX2": "x86-64-v3", "AVX512": "x86-64-v4"}
COMPILERS = ("g++", "clang++", "c++")
LANGUAGE = ("-std=c++17", "-O3", "-fopenmp", "-shared", "-fPIC")


class Unavailable(RuntimeError):
    """This machine cannot build or run a native kernel; the message says what is missing."""


def cache_folder() -> Path:
    """Where libraries are kept: FUSED_DDPM_CACHE, else fused-ddpm in the user's cache folder."""
    named = os.environ.get("FUSED_DDPM_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fused-ddpm"


def _architecture() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    if platform.system() != "Linux" or platform.machine() != "x86_64" or capability not in ARCHITECTURES:
        found = f"{platform.system()} on {platform.machine()}, {capability}"
        raise Unavailable(f"native kernels: found {found}; they need Linux on x86-64 with AVX2 or AVX-512")
    return ARCHITECTURES[capability]


def _compiler() -> str:
    named = os.environ.get("CXX")
    found = next(filter(None, map(shutil.which, [named] if named else COMPILERS)), None)
    if found is None:
        raise Unavailable(f"native kernels need a C++ compiler: found no {named or ', '.join(COMPILERS)} (set CXX)")
    return found


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        raise Unavailable(f"native kernels: {' '.join(command)} failed: {said[0] if said else error}") from error


@cache
def load(source: Path) -> ctypes.CDLL:
    """The library of a C++ source, built if this source, compiler and machine have none yet (about a second).

    Raises: Unavailable if the machine lacks something, or the cache folder cannot be written.
    """
    flags = (*LANGUAGE, f"-march={_architecture()}")
    compiler = _compiler()
    made_from = "\n".join((source.read_text(), *flags, _run(compiler, "--version")))
    library = cache_folder() / f"{source.stem}-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.so"
    try:
        if not library.exists():
            library.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=library.parent) as folder:
                built = Path(folder) / library.name
                _run(compiler, *flags, str(source), "-o", str(built))
                built.replace(library)
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise Unavailable(f"native kernels: {error}") from error
