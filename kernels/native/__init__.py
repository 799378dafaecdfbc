"""Kernels in C++ for the CPU: built by the machine's compiler at first use, kept on disk, loaded.

A library is named by what it is made from (source and headers, compiler, instruction set), so it is never stale and may
be shared by processes. Behind the code stands its digest: a file that was cut off or damaged would end the process as
it is loaded, so it is built again. Built by g++ it runs on the threads of the OpenMP runtime that PyTorch has loaded.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger("kernels")

# Named, not "native": the libraries of a home that several machines share must run on each.
INSTRUCTIONS = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
}
COMPILERS = ("g++", "clang++", "c++")
PATIENCE = 60  # seconds that a compiler may take: it takes two (one core of a Xeon at 2.5 GHz)
BUILDERS = 4  # compilers at once, of some 200 MB each
DIGEST = hashlib.sha256().digest_size
LANGUAGE = ("-std=c++17", "-O3", "-fopenmp", "-shared", "-fPIC")


PROCESS = os.getpid()  # that imported this: another one is its fork


def _alone() -> None:
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)


# OpenMP's threads do not follow into a forked process, and whoever waits for them there waits for ever: PyTorch's
# operators on the CPU as well as ours.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_alone)


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
    named = os.environ.get("CXX", "").strip()
    try:
        program, *options = shlex.split(named) or [next(filter(shutil.which, COMPILERS), "")]
    except ValueError as error:
        raise Unavailable(f"native kernels: CXX is {named!r}, needs a command: {error}") from error
    if shutil.which(program) is None:
        found = program or named or ", ".join(COMPILERS)
        raise Unavailable(f"native kernels need a C++ compiler: found no {found} (set CXX)")
    return [program, *options]


_hung: set[str] = set()  # compilers that did not end in time: asked no more, each kernel would wait as long again


def _run(*command: str) -> str:
    lack = f"native kernels: {command[0]} did not end in {PATIENCE} seconds"
    if command[0] in _hung:
        raise Unavailable(lack)
    # In a session of its own: what the compiler started ends with it.
    started = subprocess.Popen(  # noqa: S603
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    with started:
        try:
            out, err = started.communicate(timeout=PATIENCE)
        except BaseException as stop:
            os.killpg(started.pid, signal.SIGKILL)
            if not isinstance(stop, subprocess.TimeoutExpired):
                raise
            _hung.add(command[0])
            raise Unavailable(lack) from stop
    if started.returncode:
        said = err.strip().splitlines() or [f"exit code {started.returncode}"]
        raise Unavailable(f"native kernels: {command[0]} failed: {said[0]}")
    return out


@cache
def missing_any() -> str | None:
    """What this machine lacks to run kernels, or None; builds all of them, several at a time."""
    sources = sorted(Path(__file__).parent.glob("*.cpp"))
    try:
        with ThreadPoolExecutor(min(BUILDERS, os.cpu_count() or 1)) as pool:
            for _ in pool.map(load, sources):
                pass
    except Unavailable as lack:
        return str(lack)
    return None


def source_of(operator: str) -> Path:
    """The C++ source of an operator."""
    return Path(__file__).with_name(f"{operator}.cpp")


def _is_whole(library: Path) -> bool:
    """Whether the file is there and ends in the digest of what stands before."""
    try:
        content = library.read_bytes()
    except OSError:
        return False
    return content[-DIGEST:] == hashlib.sha256(content[:-DIGEST]).digest()


@cache
def _version(*command: str) -> str:
    return _run(*command, "--version")


@cache
def _say_once(folder: Path) -> None:
    logger.info("building kernels in C++, once, into %s", folder)


def _build(source: Path, command: list[str], library: Path) -> ctypes.CDLL:
    """The library, loaded before anybody else may find it."""
    library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _say_once(library.parent)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        _run(*command, str(source), "-o", str(built))
        if not built.exists():
            raise Unavailable(f"native kernels: {command[0]} wrote no library, needs a C++ compiler (set CXX)")
        with built.open("rb+") as file:
            file.write(hashlib.sha256(file.read()).digest())
            file.flush()
            os.fsync(file.fileno())
        loaded = _loaded(source, built)
        built.replace(library)
    return loaded


def _loaded(source: Path, library: Path) -> ctypes.CDLL:
    """Raises Unavailable if it has no function of the source's name."""
    loaded = ctypes.CDLL(str(library))
    if not hasattr(loaded, source.stem):
        raise Unavailable(f"native kernels: {library} has no function {source.stem}, needs another compiler (set CXX)")
    return loaded


@cache
def missing(source: Path) -> str | None:
    """What this machine lacks to run the kernel of a source, or None; builds it. Without it there is the reference."""
    try:
        load(source)
    except Unavailable as lack:
        return str(lack)
    return None


@cache
def function(source: Path) -> ctypes._CFuncPtr:
    """The kernel of a source: (address of its call, threads) -> 0, or 1 without memory. Raises Unavailable."""
    found = getattr(load(source), source.stem)
    found.argtypes, found.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_int
    return found


@cache
def load(source: Path) -> ctypes.CDLL:
    """The library of a C++ source, whose function has the file's name.

    Built if it, the headers beside it, compiler and machine have none yet, or a damaged one (seconds).
    Raises: Unavailable if the machine lacks something, or the cache folder cannot be written.
    """
    try:
        command = [*compiler(), *LANGUAGE, *instructions()]
        texts = (file.read_text() for file in (source, *sorted(source.parent.glob("*.h"))))
        made_from = "\n".join((*texts, *command, _version(*compiler())))
        library = cache_folder() / f"{source.stem}-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.so"
        return _loaded(source, library) if _is_whole(library) else _build(source, command, library)
    except Unavailable:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: nobody's home folder
        raise Unavailable(f"native kernels: {' '.join(str(error).split())}") from error
