"""Native kernels: built once, kept, and what is said where they cannot be."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from kernels import native
from kernels.winograd import SOURCE, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache folder, and nothing loaded yet."""
    monkeypatch.setenv("FUSED_DDPM_CACHE", str(tmp_path / "cache"))
    native.load.cache_clear()
    yield tmp_path / "cache"
    native.load.cache_clear()


def source(tmp_path, text):
    path = tmp_path / "answer.cpp"
    path.write_text(text)
    return path


def answer(tmp_path, number):
    return native.load(source(tmp_path, f'extern "C" int answer() {{ return {number}; }}')).answer()


def test_every_kernel_builds_where_one_does():
    """Elsewhere tests of kernels are skipped: one that a compiler refuses would go unseen."""
    assert native.missing_any() is None


def test_a_library_is_built_once_and_kept(folder, tmp_path):
    assert answer(tmp_path, 1) == 1
    (built,) = folder.iterdir()
    before = built.stat()
    native.load.cache_clear()
    assert answer(tmp_path, 1) == 1
    assert list(folder.iterdir()) == [built]
    assert built.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("size", [0, 31, 4096, 8192])
@pytest.mark.parametrize("damage", ["cut", "zeroed"])
def test_a_damaged_library_is_built_again(folder, tmp_path, damage, size):
    """Cut off or zeroed the dynamic loader ends the process, so that nothing less than the right answer will do."""
    assert answer(tmp_path, 1) == 1
    (built,) = folder.iterdir()
    whole = built.read_bytes()
    content = whole[:size] if damage == "cut" else bytes(size + 1) + whole[size + 1 :]
    built.unlink()  # the loaded one is still mapped
    built.write_bytes(content)
    native.load.cache_clear()
    assert answer(tmp_path, 1) == 1
    assert len(built.read_bytes()) == len(whole)
    assert list(folder.iterdir()) == [built]


def test_another_compiler_s_garbage_is_not_kept(folder, monkeypatch, tmp_path):
    """A compiler that leaves out the function, or writes what is no library."""
    script = tmp_path / "writes"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && exit\nfor last; do :; done\necho no library > "$last"\n')
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(native.Unavailable, match=r"native kernels: .*(ELF|file too short)"):
        native.load(SOURCE)
    monkeypatch.delenv("CXX")
    with pytest.raises(native.Unavailable, match="has no function answer"):
        native.load(source(tmp_path, 'extern "C" int other() { return 0; }'))
    assert list(folder.iterdir()) == []


def test_another_source_is_another_library(folder, tmp_path):
    assert answer(tmp_path, 1) == 1
    native.load.cache_clear()
    assert answer(tmp_path, 2) == 2
    assert len(list(folder.iterdir())) == 2


def test_another_header_is_another_library(folder, tmp_path):
    header = tmp_path / "number.h"
    for number in (1, 2):
        header.write_text(f"constexpr int NUMBER = {number};")
        path = source(tmp_path, '#include "number.h"\nextern "C" int answer() { return NUMBER; }')
        assert native.load(path).answer() == number
        native.load.cache_clear()
    assert len(list(folder.iterdir())) == 2


def test_where_libraries_are_kept(monkeypatch):
    monkeypatch.delenv("FUSED_DDPM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/there")
    assert native.cache_folder() == Path("/there/fused-ddpm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert native.cache_folder() == Path.home() / ".cache" / "fused-ddpm"


def test_no_compiler(folder, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(native.Unavailable, match="found no no-such-compiler"):
        native.load(SOURCE)


@pytest.mark.parametrize("named", ["g++ 'x", "''", "g++ \\", "/", "true", "false"])
def test_what_is_no_compiler_is_one_line(folder, monkeypatch, named):
    monkeypatch.setenv("CXX", named)
    with pytest.raises(native.Unavailable, match=r"^native kernels.*") as error:
        native.load(SOURCE)
    assert "\n" not in str(error.value)
    assert not folder.exists() or list(folder.iterdir()) == []


def test_a_compiler_that_hangs_is_ended_with_what_it_started(folder, monkeypatch, tmp_path):
    script, pid = tmp_path / "hangs", tmp_path / "pid"
    script.write_text(f"#!/bin/sh\nsleep 1000 & echo $! > {pid}\nwait\n")
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setattr(native, "PATIENCE", 0.3)
    with pytest.raises(native.Unavailable, match=r"hangs did not end in 0\.3 seconds"):
        native.load(SOURCE)
    other = pid.read_text()
    with pytest.raises(native.Unavailable, match=r"hangs did not end in"):
        native.load(source(tmp_path, ""))
    assert pid.read_text() == other, "every kernel waits for it again"
    deadline = time.monotonic() + 10
    while _runs(int(other)):
        assert time.monotonic() < deadline


def _runs(pid):
    """Whether the process is there and no zombie that nobody has asked about."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(state.strip()) and not state.startswith("Z")


def test_a_compiler_with_arguments(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", f"{native.compiler()[0]} -DNUMBER=5")
    assert native.load(source(tmp_path, 'extern "C" int answer() { return NUMBER; }')).answer() == 5


def test_nobodys_home_folder(folder, monkeypatch):
    for name in ("FUSED_DDPM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("kernels.native.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(native.Unavailable, match="no home"):
        native.load(SOURCE)


def test_a_compiler_that_fails(folder, tmp_path):
    with pytest.raises(native.Unavailable, match=r"failed: .*answer\.cpp"):
        native.load(source(tmp_path, "this is no C++"))
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(folder):
    folder.mkdir(mode=0o500)
    with pytest.raises(native.Unavailable, match="Permission denied"):
        native.load(SOURCE)


def test_a_file_in_the_place_of_the_folder(folder):
    folder.write_text("")
    with pytest.raises(native.Unavailable, match=str(folder)):
        native.load(SOURCE)


def test_a_machine_without_vectors(folder, monkeypatch):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "DEFAULT")
    with pytest.raises(native.Unavailable, match="need Linux on x86-64 with AVX2 or AVX-512"):
        native.load(SOURCE)
