"""Files: whole or not there, whoever else writes and dies; what is read is what was written."""

import errno
import io
import os
import signal
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ddpm.errors import BadInput
from ddpm.files import (
    check_writable,
    digest_of,
    read_noted,
    replacing,
    replacing_all,
    warn_if_unchecked,
    write_array,
    write_tensors,
    write_text,
)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def halfway(tmp_path):
    """A process that has written half of x.npy and is stopped."""
    path = tmp_path / "x.npy"
    child = os.fork()
    if child == 0:
        with replacing(path) as partial:
            partial.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGSTOP)
            partial.write_bytes(b"half and half")
        os._exit(0)
    os.waitpid(child, os.WUNTRACED)
    yield child, path
    with suppress(ProcessLookupError, ChildProcessError):  # the test has ended it
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_two_writers_of_one_file_publish_each_their_own(halfway):
    child, path = halfway
    write_text(path, "whole")
    assert path.read_text() == "whole"
    assert len(names(path.parent)) == 2, "what a living writer has begun stays"
    os.kill(child, signal.SIGCONT)
    assert os.waitpid(child, 0)[1] == 0
    assert path.read_text() == "half and half"
    assert names(path.parent) == {"x.npy"}


def test_what_a_killed_writer_left_goes_with_the_next_file_in_the_folder(halfway):
    child, path = halfway
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    (left,) = names(path.parent)
    others = {".fused-ddpm-mine.partial.npy", ".x.partial.npy", f"{left}.txt".removeprefix(".")}
    for name in others:
        (path.parent / name).write_text("mine")
    write_text(path.with_name("y.txt"), "whole")
    assert names(path.parent) == {"y.txt"} | others


def test_nested_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "x.txt"
    with replacing(path) as outer:
        outer.write_text("outer")
        write_text(path, "inner")
        assert outer.read_text() == "outer"
    assert path.read_text() == "outer"
    assert names(tmp_path) == {"x.txt"}


def test_nothing_written_is_no_file(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("before")
    with pytest.raises(BadInput, match=r"x\.txt: cannot be written \(nothing was written\)"), replacing(path):
        pass
    assert path.read_text() == "before"
    assert names(tmp_path) == {"x.txt"}


def test_files_are_made_as_the_umask_has_it(tmp_path):
    write_text(tmp_path / "x.txt", "new")
    (tmp_path / "y.txt").write_text("plain")
    assert (tmp_path / "x.txt").stat().st_mode == (tmp_path / "y.txt").stat().st_mode


def test_an_error_names_the_file_that_it_is_of_or_else_the_folder(tmp_path):
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]

    def write(name: bool) -> None:
        with replacing_all(paths) as (first, second):
            first.write_text("a")
            raise OSError(errno.ENOSPC, "full", *([str(second)] if name else []))

    with pytest.raises(BadInput, match=r"/b\.txt: cannot be written \(full\)"):
        write(True)
    with pytest.raises(BadInput) as caught:
        write(False)
    assert str(caught.value) == f"{tmp_path}: cannot be written (full)"
    with pytest.raises(BadInput, match="gone: cannot be written"):
        write_text(tmp_path / "gone" / "x.txt", "x")


def test_the_longest_name_can_be_written(tmp_path):
    path = tmp_path / f"{'n' * 251}.npy"
    check_writable(path)
    write_array(path, np.arange(3))
    assert np.array_equal(np.load(path), np.arange(3))
    with pytest.raises(BadInput, match="File name too long"):
        check_writable(tmp_path / f"{'n' * 252}.npy")
    assert names(tmp_path) == {path.name}


@pytest.mark.parametrize("array", [np.ones((2, 3), np.float32), np.arange(12.0).reshape(3, 4).T, np.zeros((0, 2))])
def test_arrays_are_what_numpy_writes(tmp_path, array):
    write_array(tmp_path / "x.npy", array)
    expected = io.BytesIO()
    np.save(expected, np.ascontiguousarray(array))
    assert (tmp_path / "x.npy").read_bytes() == expected.getvalue()


# --- tensors ----------------------------------------------------------------------------------------------------

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor([1, -2]),
    "c": torch.tensor(True),
    "d": torch.ones(2, dtype=torch.bfloat16),
}


def test_tensors_come_back_with_what_was_noted(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS, step=3)
    found, metadata = read_noted(path)
    assert metadata == {"step": 3, "digest": digest_of(TENSORS)}
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_unchecked(path, metadata)


def test_a_flipped_bit_anywhere_is_refused_or_harmless(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS)
    whole, refused = path.read_bytes(), 0
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            found, _ = read_noted(path)
        except BadInput as error:
            refused += str(error).startswith(f"{path}: ")
        else:
            assert digest_of(found) == digest_of(TENSORS), position
    assert refused > len(whole) // 2
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(BadInput, match="not a whole safetensors file"):
            read_noted(path)


def test_a_file_without_a_digest_is_read_and_said(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    found, metadata = read_noted(path)
    assert digest_of(found) == digest_of(TENSORS)
    with pytest.warns(UserWarning, match="has no digest"):
        warn_if_unchecked(path, metadata)
