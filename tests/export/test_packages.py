"""torch.export programs and AOTInductor packages, and what `info` tells of every kind of file."""

import resource
import zipfile

import numpy as np
import pytest
import torch

from ddpm import make_table
from ddpm.engines.compile import compiler_missing
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
        assert {name.partition("/")[0] for name in archive.namelist()} == {"d"}
    assert "denoiser, AOTInductor package" in export("info", tmp_path / "d.pt2").out
