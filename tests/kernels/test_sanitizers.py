"""The C++ under the compiler's sanitizers: its own tests once more, in a process where every access is looked at."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from kernels import native
from tests.kernels.test_program import TINY, WORKER

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(native.missing_any() is not None, reason=str(native.missing_any())),
]
TESTS, VECTORS = Path(__file__).parents[1], WORKER.with_name("vectors.h")
# Every operator over ragged shapes; programs, their teams, forks, interrupts, several at once.
FILES = [
    *(f"kernels/test_{name}.py" for name in ("program", "placed", "shifted", "native_noise", "convolution_native")),
    "kernels/test_winograd.py",
    "kernels/test_group_norm_relu.py::test_in_cpp",
    "kernels/test_bottleneck.py::test_in_cpp",
    "ddpm/test_native_engine.py",
]
# Of the CPU, by PyTorch's names: each has code of its own.
CAPABILITIES = ["avx512", "avx2"] if torch.backends.cpu.get_cpu_capability() == "AVX512" else ["avx2"]
# Who asks for more memory than there is ends the process here; without C++ there is nothing to look at.
OTHERS = ("no_memory", "no_room", "triton", "without_a_compiler", "cannot_be_built")
# Operators as they are called at once, by OpenMP's threads, and in a program, by its own.
CALLS = {
    "at once": "chain.call(chain.begin, chain.table[:1])",
    "program": "chain.drawn()",
}
RUN = """
import sys
from pathlib import Path
import torch
from tests.kernels.test_program import Chain
torch.set_num_threads(2)
chain = Chain(Path(sys.argv[1]))
{call}
"""
# It takes the compiler several times as long as without.
BUILD = """
import sys
from kernels import native
native.PATIENCE = 600
sys.exit(native.missing_any())
"""


@dataclass(frozen=True)
class Sanitizer:
    """Runs Python on kernels that were built with it."""

    folder: Path
    environment: dict[str, str]

    def run(self, *arguments: str) -> tuple[int, str]:
        """-> the exit code, and what Python and the sanitizer said."""
        for log in self.folder.glob("log*"):
            log.unlink()
        # With addresses that are moved about the sanitizer of threads (g++ 12) does not start everywhere; some
        # containers do not allow to leave them alone.
        still = ["setarch", "-R"]
        allowed = subprocess.run([*still, "true"], capture_output=True, check=False).returncode == 0
        command = [*(still if allowed else []), sys.executable, *arguments]
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=900, check=False, cwd=TESTS.parent
        )
        logs = [path.read_text(errors="replace")[:6000] for path in self.folder.glob("log*")]
        return done.returncode, "\n".join((done.stdout[-3000:], done.stderr[-1000:], *logs))

    def tests(self) -> None:
        """All that are to be seen pass, and nothing is reported."""
        chosen = " and ".join(f"not {name}" for name in OTHERS)
        paths = [str(TESTS / file) for file in FILES]
        code, said = self.run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not long", "-k", chosen, *paths)
        assert code == 0, said
        assert "Sanitizer" not in said, said
        assert "runtime error" not in said, said

    def tiny(self, call: str, source: str) -> tuple[int, str]:
        """The same of one call of an operator."""
        path = self.folder / "tiny.cpp"
        path.write_text(source)
        return self.run("-c", RUN.format(call=CALLS[call]), str(path))


def built(folder: Path, kind: str, libraries: list[str], options: str, **more: str) -> Sanitizer:
    """All kernels, once, so that one that the compiler does not build is an error here and no test that is skipped."""
    program, *_ = native.compiler()
    found = [subprocess.check_output([program, f"-print-file-name={name}"], text=True).strip() for name in libraries]
    if not all(Path(path).is_absolute() for path in found):
        pytest.skip(f"{program} has no {libraries[0]}")
    environment = os.environ | {
        f"{kind[0].upper()}SAN_OPTIONS": f"log_path={folder / 'log'},{options}",
        "UBSAN_OPTIONS": f"log_path={folder / 'log'},halt_on_error=1",
        # The compiler itself runs without: it takes many times as long.
        "CXX": f"env -u LD_PRELOAD {program} -g1 -fno-omit-frame-pointer -fsanitize={kind}",
        "LD_PRELOAD": " ".join(found),
        "FUSED_DDPM_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": str(TESTS.parent),
        "TRITON_INTERPRET": "0",
    }
    sanitizer = Sanitizer(folder, environment | more)
    code, said = sanitizer.run("-c", BUILD)
    assert code == 0, said
    return sanitizer


@pytest.fixture(scope="module", params=CAPABILITIES)
def addresses(request, tmp_path_factory):
    # Of "undefined" what is cheap: all of it takes the compiler three times as long, a minute where others are busy.
    kind = "address,bounds,shift,integer-divide-by-zero,signed-integer-overflow"
    # The library of C++: the sanitizer must find its exceptions as it starts. Leaks: Python leaves memory as it ends.
    libraries, more = ["libasan.so", "libstdc++.so.6"], {"ATEN_CPU_CAPABILITY": request.param}
    return built(tmp_path_factory.mktemp("address"), kind, libraries, "detect_leaks=0", **more)


@pytest.fixture(scope="module")
def races(tmp_path_factory):
    folder = tmp_path_factory.mktemp("thread")
    openmp = folder / "openmp_seen.so"
    source = Path(__file__).with_name("openmp_seen.cpp")
    subprocess.run([native.compiler()[0], "-O1", "-shared", "-fPIC", str(source), "-o", str(openmp)], check=True)
    # The memory of a thread that has ended is freed by another one, after a lock within C's library, which is not seen.
    (folder / "known").write_text("race:_dl_deallocate_tls\n")
    options = f"suppressions={folder / 'known'},die_after_fork=0,exitcode=66"
    return built(folder, "thread", ["libtsan.so", "libstdc++.so.6", str(openmp)], options)


def test_addresses(addresses):
    addresses.tests()


def test_races(races):
    races.tests()


# One element beyond what there is; the first lanes of a vector, of which one is; a number too large to shift by.
WRITES = {
    "element": ("c.y[i] =", "c.y[i + 1] =", "heap-buffer-overflow"),
    "lanes": ("c.y[i] =", "store(c.y + i, Vec{}, 2), c.y[i] =", "heap-buffer-overflow"),
    "shift": ("c.y[i] =", "c.y[i] = (1 << (c.count + 30)) *", "runtime error"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("planted", WRITES)
def test_an_access_beyond_the_end_is_reported(addresses, call, planted):
    before, after, reported = WRITES[planted]
    code, said = addresses.tiny(call, f'#include "{VECTORS}"\n' + TINY.replace(before, after))
    assert code != 0
    assert reported in said
    assert "tiny" in said


@pytest.mark.parametrize("call", CALLS)
def test_a_race_is_reported(races, call):
    code, said = races.tiny(call, TINY)
    assert code == 0, said
    code, said = races.tiny(call, TINY.replace("worker.barrier();", ""))
    assert code == 66
    assert "ThreadSanitizer: data race" in said
    assert "tiny" in said
