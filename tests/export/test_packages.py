"""torch.export programs and AOTInductor packages, and what `info` tells of every kind of file."""

import resource
import shutil
import zipfile

import numpy as np
import pytest
import torch

from ddpm import make_table, runs
from ddpm.engines.compile import compiler_missing
from ddpm.errors import BadInput
from export import bundle
from tests.export.test_commands import line


@pytest.fixture(scope="module")
def program(run_folder, tmp_path_factory):
    """denoiser.pt2 of run_folder."""
    from export.__main__ import main

    path = tmp_path_factory.mktemp("program") / "d.pt2"
    assert main(["torch", str(run_folder), "--out", str(path)]) == 0
    return path


def test_a_full_disk_is_one_line(run_folder, export, tmp_path):
    """Files of 64 KB at most, which Python reports as it does a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    (tmp_path / "d.pt2").write_text("before")
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, limits[1]))
    try:
        answer = export("torch", run_folder, "--out", tmp_path / "d.pt2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{tmp_path / 'd.pt2'}: cannot be written (File too large)" in line(answer, 2)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"d.pt2": "before"}


def test_info_tells_all_kinds_apart(exported, exported_open, program, opened, export, tmp_path):
    make_table(opened.schedule, "ddim", 5).save(tmp_path / "fast.json")
    np.save(tmp_path / "rows.npy", make_table(opened.schedule, "ddim", 5).rows().numpy())
    kinds = {
        exported / "denoiser.onnx": ("denoiser", "One call of the network"),
        exported / "sampler.onnx": ("sampler", "--noise input", "runs in onnxruntime 1.21.1 or newer", "; constant"),
        exported_open / "sampler.onnx": ("sampler", "others may be given"),
        exported / "step.onnx": ("step", "index_next"),
        program: ("denoiser, torch.export program", "(x, t, context), by position", "3x16x16", "a, b, c"),
        tmp_path / "fast.json": ("table of a solver", "ddim, 5 steps"),
        tmp_path / "rows.npy": ("rows of a table", "5", "12 to 2"),
    }
    for path, (kind, *more) in kinds.items():
        answer = export("info", path)
        assert answer.code == 0, answer.err
        words = " ".join(answer.out.replace("│", " ").split())
        assert f" kind {kind} size" in words, words
        for text in more:
            assert text in words, (path, text, words)


@pytest.mark.parametrize("cut", [30, 2000, -30])
def test_info_of_a_damaged_package(program, export, tmp_path, cut):
    (tmp_path / "cut.pt2").write_bytes(program.read_bytes()[:cut])
    assert f"{tmp_path / 'cut.pt2'}: damaged" in line(export("info", tmp_path / "cut.pt2"), 3)


@pytest.mark.parametrize("where", [0.2, 0.5, 0.8])
def test_info_of_a_package_with_a_flipped_bit(program, export, tmp_path, where):
    content = bytearray(program.read_bytes())
    content[int(where * len(content))] ^= 64
    (tmp_path / "flipped.pt2").write_bytes(content)
    assert f"{tmp_path / 'flipped.pt2'}: damaged" in line(export("info", tmp_path / "flipped.pt2"), 3)


def packed(path, text, compression=zipfile.ZIP_STORED):
    """A package that notes this of itself."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("d/extra/fused_ddpm.json", text)


@pytest.mark.parametrize("text", ["[" * 100_000, "{}", "[]", "1", "\0", '{"kind": []}'])
def test_info_of_a_package_that_lies(export, tmp_path, text):
    packed(tmp_path / "a.pt2", text)
    assert f"{tmp_path / 'a.pt2'}: damaged" in line(export("info", tmp_path / "a.pt2"), 3)


def test_info_unpacks_no_more_than_the_file_holds(export, tmp_path, monkeypatch):
    packed(tmp_path / "a.pt2", " " * (1 << 20), zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(zipfile.ZipFile, "testzip", None)
    assert "damaged (BadZipFile)" in line(export("info", tmp_path / "a.pt2"), 3)


@pytest.mark.parametrize("shape", [(10**12, 8), (0, 8)])
def test_info_of_rows_that_are_not_there(export, tmp_path, shape):
    with (tmp_path / "rows.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": shape})
    assert f"{tmp_path / 'rows.npy'}: " in line(export("info", tmp_path / "rows.npy"), 3)


def test_a_run_that_is_written_to_is_not_exported_into_its_folder(run_folder, export, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / "run")
    with runs.held(run):
        assert "another process is writing to it" in line(export("torch", run), 2)
        assert "another process is writing to it" in line(export("aoti", run, "--out", run / "x.pt2"), 2)
        assert export("torch", run, "--out", tmp_path / "d.pt2", "--no-verify").code == 0
    assert {path.name for path in run.iterdir()} == {path.name for path in run_folder.iterdir()}


def test_a_run_that_was_replaced_is_not_exported_into_its_folder(run_folder, unconditional, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / "run")
    opened = runs.load_run(run)
    runs.start_run(run, unconditional.config, unconditional.model)
    with pytest.raises(BadInput, match="another run has taken its place"):
        bundle.write(opened, run, {})
    assert {path.name for path in run.iterdir()} == {runs.CONFIG, runs.MODEL}


def test_info_of_somebody_elses_files(export, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x", "y")
    assert "archive of another program" in line(export("info", tmp_path / "a.zip"), 3)
    np.save(tmp_path / "x.npy", np.zeros((2, 3)))
    assert "float64 [2, 3], needs a table's" in line(export("info", tmp_path / "x.npy"), 3)
    (tmp_path / "x.json").write_text("{}")
    assert "no usable step table" in line(export("info", tmp_path / "x.json"), 2)


def test_torch_export_reads_back(run_folder, opened, export, tmp_path):
    answer = export("torch", run_folder, "--out", tmp_path / "d.pt2")
    assert answer.code == 0, answer.err
    module = torch.export.load(tmp_path / "d.pt2").module()
    x, t, c = torch.randn(4, 3, 16, 16), torch.rand(4), torch.rand(4, 3)
    with torch.no_grad():
        torch.testing.assert_close(module(x, t, c), opened.model(x, t, c), rtol=0, atol=1e-5)
    with zipfile.ZipFile(tmp_path / "d.pt2") as archive:
        for name in archive.namelist():
            content = name.encode() + archive.read(name)
            for secret in (str(run_folder.parent), str(tmp_path), "site-packages", "networks.py", "partial"):
                assert secret.encode() not in content, (name, secret)


def test_aoti_needs_a_compiler(run_folder, export, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in line(export("aoti", run_folder, "--out", tmp_path / "d.pt2"), 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.long
@pytest.mark.skipif(compiler_missing() is not None, reason=f"needs {compiler_missing()}")
def test_aoti_runs_without_the_module(run_folder, opened, export, tmp_path):
    answer = export("aoti", run_folder, "--out", tmp_path / "d.pt2")
    assert answer.code == 0, answer.err
    package = torch._inductor.aoti_load_package(str(tmp_path / "d.pt2"))
    x, t, c = torch.randn(4, 3, 16, 16), torch.rand(4), torch.rand(4, 3)
    with torch.no_grad():
        torch.testing.assert_close(package(x, t, c), opened.model(x, t, c), rtol=0, atol=1e-5)
    metadata = package.get_metadata()
    assert '"kind": "denoiser"' in metadata["fused_ddpm"]
    with torch.no_grad():
        one = package(x[:1], t[:1], c[:1])
        torch.testing.assert_close(one, opened.model(x[:1], t[:1], c[:1]), rtol=0, atol=1e-5)
    wide = torch.randn(4, 3, 16, 32)
    wrong = {
        "channels last": (x.contiguous(memory_format=torch.channels_last), t, c),
        "expanded": (x[:1].expand(4, 3, 16, 16), t, c),
        "sliced": (wide[..., :16], t, c),
        "8x8": (torch.randn(4, 3, 8, 8), t, c),
        "float64": (x.double(), t, c),
        "three axes": (x[0], t, c),
        "one time": (x, t[:1], c),
        "one condition": (x, t, c[:1]),
        "a transposed condition": (x, t, torch.rand(3, 4).T),
    }
    for name, given in wrong.items():
        with pytest.raises(RuntimeError):
            print(name, package(*given))
    with zipfile.ZipFile(tmp_path / "d.pt2") as archive:
        assert {name.partition("/")[0] for name in archive.namelist()} == {"archive"}
    assert "denoiser, AOTInductor package" in export("info", tmp_path / "d.pt2").out
