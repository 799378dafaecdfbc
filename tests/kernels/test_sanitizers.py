"""The C++ under the compiler's sanitizers: its own tests once more, in a process where every access is looked at."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import native

pytestmark = [
    pytest.mark.long,
    pytest.mark.sanitize,
    pytest.mark.skipif(native.missing_any() is not None, reason=str(native.missing_any())),
]
TESTS = Path(__file__).parents[1]
PROGRAMS = ["kernels/test_program.py", "ddpm/test_native_engine.py"]
# What builds them, and waits for compilers that hang, is Python's.
OTHERS = {Path(__file__).name, "test_native.py"}
OPERATORS = [p for p in TESTS.glob("kernels/test_*.py") if "native" in p.read_text() and p.name not in OTHERS]
# What threads of OpenMP's and of C's own library wait for is not seen: they were built without the sanitizer.
OPENMP = "race:gomp_thread_start\nrace:GOMP_parallel\nrace:_dl_deallocate_tls\n"


def reported(kind, library, tests, folder, options):
    """(what pytest and the sanitizer say of these tests, pytest's exit code)."""
    program, *_ = native.compiler()
    names = (library, "libstdc++.so.6")  # the sanitizer must find the latter's exceptions as it starts
    found = [subprocess.check_output([program, f"-print-file-name={name}"], text=True).strip() for name in names]
    if not all(Path(path).is_absolute() for path in found):
        pytest.skip(f"{program} has no {library}")
    environment = os.environ | {f"{kind[0].upper()}SAN_OPTIONS": f"log_path={folder / 'log'},{options}"}
    environment |= {"CXX": f"{program} -g1 -fno-omit-frame-pointer -fsanitize={kind}", "LD_PRELOAD": " ".join(found)}
    environment |= {"FUSED_DDPM_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "2", "PYTHONPATH": str(TESTS.parent)}
    environment["UBSAN_OPTIONS"] = "halt_on_error=1"
    # setarch: with addresses that are moved about the sanitizer of threads (g++ 12) does not start everywhere.
    command = ["setarch", "-R", sys.executable, "-m", "pytest", "-q", "-m", "not long", "-p", "no:cacheprovider"]
    command += ["-k", "not no_memory and not no_room"]  # asking for more than there is ends a process here
    command += [str(TESTS / test) for test in tests]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    logs = [path.read_text(errors="replace") for path in folder.glob("log*")]
    return "\n".join((done.stdout[-3000:], done.stderr[-1000:], *logs)), done.returncode


def test_addresses(tmp_path):
    said, code = reported(
        "address,undefined", "libasan.so", [*PROGRAMS, *OPERATORS], tmp_path, "detect_leaks=0,halt_on_error=1"
    )
    assert code == 0, said[:6000]


def test_races(tmp_path):
    (tmp_path / "openmp").write_text(OPENMP)
    options = f"suppressions={tmp_path / 'openmp'},die_after_fork=0,exitcode=66"
    said, code = reported("thread", "libtsan.so", PROGRAMS, tmp_path, options)
    assert code == 0, said[:6000]
    assert "ThreadSanitizer" not in said
