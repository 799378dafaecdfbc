"""Kernels in C++ for the CPU: built by the machine's compiler at first use, kept on disk, loaded.

A library is named by what it is made from (source and headers, compiler, instruction set), so it is never stale and may
be shared by processes. Built by g++ it runs on the threads of the OpenMP runtime that PyTorch has loaded.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

# Named, not "native": the libraries of a home that several machines share must run on each.
INSTRUCTIONS = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
}
COMPILERS = ("g++", "clang++", "c++")
LANGUAGE = ("-std=c++17", "-O3", "-fopenmp", "-shared", "-fPIC")


class Unavailable(RuntimeError):
    """This machine cannot build or run a native kernel; the message says what is missing."""


def cache_folder() -> Path:
    """Where libraries are kept: FUSED_DDPM_CACHE, else fused-ddpm in the user's cache folder."""
    named = os.environ.get("FUSED_DDPM_CACHE")
    folder = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fused-ddpm"
    return folder.resolve()


def instructions() -> tuple[str, ...]:
    """The compiler's options for this CPU. Raises Unavailable where there are none."""
    capability = torch.backends.cpu.get_cpu_capability()
    if platform.system() != "Linux" or platform.machine() != "x86_64" or capability not in INSTRUCTIONS:
        found = f"{platform.system()} on {platform.machine()}, {capability}"
        raise Unavailable(f"native kernels: found {found}; they need Linux on x86-64 with AVX2 or AVX-512")
    return INSTRUCTIONS[capability]


def compiler() -> list[str]:
    """The command CXX, or the first of COMPILERS that is there. Raises Unavailable if none is."""
    named = shlex.split(os.environ.get("CXX", ""))
    program, *options = named or [next(filter(shutil.which, COMPILERS), "")]
    if shutil.which(program) is None:
        raise Unavailable(f"native kernels need a C++ compiler: found no {program or ', '.join(COMPILERS)} (set CXX)")
    return [program, *options]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)  # noqa: S603
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise Unavailable(f"native kernels: {command[0]} failed: {said[0]}")
    return done.stdout


def source_of(operator: str) -> Path:
    """The C++ source of an operator."""
    return Path(__file__).with_name(f"{operator}.cpp")


@cache
def load(source: Path) -> ctypes.CDLL:
    """The library of a C++ source, built if it, the headers beside it, compiler and machine have none yet (seconds).

    Raises: Unavailable if the machine lacks something, or the cache folder cannot be written.
    """
    command = [*compiler(), *LANGUAGE, *instructions()]
    try:
        texts = (file.read_text() for file in (source, *sorted(source.parent.glob("*.h"))))
        made_from = "\n".join((*texts, *command, _run(*compiler(), "--version")))
        library = cache_folder() / f"{source.stem}-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.so"
        if not library.exists():
            library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=library.parent) as folder:
                built = Path(folder) / library.name
                _run(*command, str(source), "-o", str(built))
                built.replace(library)
        return ctypes.CDLL(str(library))
    except Unavailable:
        raise
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody's home folder
        raise Unavailable(f"native kernels: {error}") from error
