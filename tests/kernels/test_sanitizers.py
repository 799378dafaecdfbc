"""The C++ under the compiler's sanitizers: its own tests once more, in a process where every access is looked at."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import native

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(native.missing_any() is not None, reason=str(native.missing_any())),
]
TESTS = Path(__file__).parents[1]
PROGRAMS = ("kernels/test_program.py", "ddpm/test_native_engine.py")
OPERATORS = [f"kernels/test_{source.stem}.py" for source in sorted(Path(native.__file__).parent.glob("*.cpp"))]
# What threads of OpenMP's own library wait for is not seen: it was built without the sanitizer.
SUPPRESSED = "race:run_team\nrace:_omp_fn\ncalled_from_lib:libgomp\n"


def sanitized(kind, library, tests, tmp_path, **options):
    """What pytest says of these tests under a sanitizer. Skips where its library is not installed."""
    program, *_ = native.compiler()
    found = subprocess.check_output([program, f"-print-file-name={library}"], text=True).strip()
    if not Path(found).is_absolute():
        pytest.skip(f"{program} has no {library}")
    environment = os.environ | options
    environment |= {"CXX": f"{program} -g1 -fno-omit-frame-pointer -fsanitize={kind}", "LD_PRELOAD": found}
    environment |= {
        "FUSED_DDPM_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": str(TESTS.parent),
    }
    files = [str(TESTS / test) for test in tests if (TESTS / test).exists()]
    # Addresses are not moved about: the sanitizer of threads (g++ 12) does not start where they may lie anywhere.
    command = ["setarch", "-R", sys.executable, "-m", "pytest", "-q", "-x", "-m", "not long", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *files], env=environment, capture_output=True, text=True, timeout=1800, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_addresses(tmp_path):
    options = {"ASAN_OPTIONS": "detect_leaks=0,halt_on_error=1", "UBSAN_OPTIONS": "halt_on_error=1"}
    code, said = sanitized("address,undefined", "libasan.so", [*PROGRAMS, *OPERATORS], tmp_path, **options)
    assert code == 0, said[-4000:]


def test_races(tmp_path):
    (tmp_path / "suppressed").write_text(SUPPRESSED)
    options = {"TSAN_OPTIONS": f"suppressions={tmp_path / 'suppressed'},halt_on_error=0,exitcode=66"}
    code, said = sanitized("thread", "libtsan.so", PROGRAMS, tmp_path, **options)
    assert code == 0, said[-4000:]
    assert "WARNING: ThreadSanitizer" not in said
