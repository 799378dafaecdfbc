"""What a stored figure needs to be repeated: commit, versions, device."""

import os
import platform
import shutil
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy
import torch

from bench.packages import OURS, ROOT, is_ours

RESULTS = "bench/results"
# Suffixes of what Python runs, and of what it compiles.
SOURCES = (".py", ".pyx", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp")


def git(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[bytes] | None:
    """git in the repository, or in another folder; None where there is no git."""
    program = shutil.which("git")
    if program is None:
        return None
    command = [program, "-C", str(folder or repository()), *arguments]
    return subprocess.run(command, capture_output=True, check=False)  # noqa: S603


@cache
def repository() -> Path:
    """The git checkout whose code is measured: the one around the working directory, else this project's folder."""
    done = git("rev-parse", "--show-toplevel", folder=Path.cwd())
    return Path(done.stdout.decode().strip()) if done is not None and done.returncode == 0 else ROOT


def _said(*arguments: str) -> str | None:
    done = git(*arguments)
    return None if done is None or done.returncode else done.stdout.decode(errors="replace").strip("\n")


def changed() -> list[str] | None:
    """Source files that are not as in the commit, untracked ones too; None outside a checkout.

    Of this project those of its packages, of another one all. What no measurement runs does not count: results, the
    documents' pictures, runs/, the file that is being written, and what git ignores.
    """
    paths = ["--", *OURS, f":(exclude){RESULTS}"] if is_ours(repository()) else []
    status = _said("status", "--porcelain", "-z", "--no-renames", "--untracked-files=all", *paths)
    if status is None:
        return None
    return [line[3:] for line in status.split("\0") if line.endswith(SOURCES)]


def _version(distribution: str) -> str | None:
    """Of what is installed, without importing it; None if it is not."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe(device: torch.device) -> dict[str, Any]:
    """The machine, the versions and the commit of a measurement.

    Outside a checkout the commit is what FUSED_DDPM_COMMIT says, or None. dirty: whether source files differ from the
    commit (see `changed`), None outside a checkout.
    """
    sources = changed()
    record = {
        "commit": _said("rev-parse", "HEAD") or os.environ.get("FUSED_DDPM_COMMIT"),
        "dirty": None if sources is None else bool(sources),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": numpy.__version__,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "device": device.type,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record |= {
            "device": properties.name,
            "cuda": torch.version.cuda,
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        }
    return record
