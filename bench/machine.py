"""What a stored figure needs to be repeated: commit, versions, device."""

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import numpy
import torch

from bench.packages import OURS, ROOT, is_ours  # noqa: F401 (ROOT: imported from here)
from bench.processor import children_seconds

RESULTS = "bench/results"
# The share of the cores that others may keep busy without a warning.
BUSY = 0.4
# Suffixes of what Python runs, and of what it compiles.
SOURCES = (".py", ".pyx", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp")


# What a hook of git sets; it would lead away from the folder that is asked about. Its configuration stays.
LOCAL = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY", "GIT_PREFIX")


def without_git(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which git goes by the working directory alone."""
    return {name: value for name, value in environment.items() if name not in LOCAL}


def git(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[bytes] | None:
    """git in the repository, or in another folder; None where there is no git."""
    program = shutil.which("git")
    if program is None:
        return None
    command = [program, "-C", str(folder or repository()), *arguments]
    return subprocess.run(command, capture_output=True, check=False, env=without_git(os.environ))  # noqa: S603


@cache
def repository() -> Path:
    """The git checkout around the working directory, whose code is measured; without one, the working directory.

    Never another repository in its place: where git refuses, what is asked of git there fails with git's own words.
    """
    done = git("rev-parse", "--show-toplevel", folder=Path.cwd())
    found = done is not None and done.returncode == 0
    return Path(done.stdout.decode().removesuffix("\n")) if found else Path.cwd()


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


# What a processor can compute with, of the flags that Linux lists: not how it was booted, nor what mends its faults.
ISA = re.compile(r"s?sse|avx|amx|fma|f16c|bmi|abm|popcnt|v?aes|gfni|vpclmul|asimd|sve|sme(?!p)|neon|bf16|i8mm|fphp")


def _cpuinfo(key: str) -> str:
    """The first value of a key of /proc/cpuinfo; empty where there is none."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def _processor() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _flags() -> list[str]:
    return (_cpuinfo("flags") or _cpuinfo("Features")).split()


def cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _busy_seconds() -> float | None:
    """Processor time of the whole machine so far, other virtual machines' on its processors too; None but on Linux."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _, _, interrupts, soft, stolen = map(int, stat.read_text().split(maxsplit=9)[1:9])
    return (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")


def _now() -> tuple[float, float | None, float]:
    return time.monotonic(), _busy_seconds(), time.process_time() + children_seconds()


class Load:
    """What runs on the machine beside this process and its children, from now on."""

    def __init__(self) -> None:
        self._began, self._begin = _now(), _average()

    def others(self) -> float | None:
        """Processors that others kept busy since then, on average; None where the system does not say."""
        (began, busy, own), (now, busy_now, own_now) = self._began, _now()
        if busy is None or busy_now is None or now <= began:
            return None
        return max((busy_now - busy - (own_now - own)) / (now - began), 0.0)

    def record(self) -> dict[str, float | None]:
        """The system's load average at the beginning and now, and `others`."""
        others = self.others()
        return {"begin": self._begin, "end": _average(), "others": None if others is None else round(others, 2)}


def overall(loads: Sequence[Mapping[str, Any] | None]) -> dict[str, float | None] | None:
    """The load of several processes, one after the other, from the first one's beginning to the last one's end."""
    known = [load for load in loads if load is not None]
    if not known:
        return None
    others = [load["others"] for load in known if load["others"] is not None]
    return {"begin": known[0]["begin"], "end": known[-1]["end"], "others": median(others) if others else None}


def _average() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def busy_warning(seconds: float = 0.5) -> str | None:
    """A line if others keep this machine busy, watched for so long now; None if they do not.

    Where the system does not say it goes by the load average of the last minute.
    """
    load = Load()
    time.sleep(seconds)
    others = load.others()
    return warning_of(_average() if others is None else others)


def warn(warning: str | None) -> bool:
    """Print it on stderr, if there is one. Returns whether."""
    if warning is not None:
        print(warning, file=sys.stderr)
    return warning is not None


def warning_of(load: float | None) -> str | None:
    """The same of a load that was measured: processors kept busy by others."""
    if load is None or load < BUSY * cores():
        return None
    return (
        f"warning: this machine is busy, load {load:.1f} on {cores()} cores by others: times vary more than they need"
    )


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
        "cores": cores(),
        "flags": " ".join(sorted(flag for flag in _flags() if ISA.match(flag))),
        "capability": torch.backends.cpu.get_cpu_capability(),
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
