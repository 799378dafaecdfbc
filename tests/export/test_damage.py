"""Files that were exported and then changed: every command says so, and none computes with them."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from ddpm.errors import WorkFailed
from export import models, run, verification
from tests.export.test_commands import line


def metadata(path):
    return json.loads(onnx.load(path).metadata_props[0].value)


def with_metadata(path, content):
    model = onnx.load(path)
    model.metadata_props[0].value = json.dumps(content)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format_version": 99}, "format 99"),
        ({"kind": "banana"}, "'banana'"),
        ({"condition_shape": "ten"}, "condition_shape is 'ten'"),
        ({"condition_shape": [0]}, "condition_shape is [0]"),
        ({"condition_shape": [4]}, "conditions are [4], the graph takes [[3]]"),
        ({"condition_shape": None}, "conditions are [], the graph takes [[3]]"),
        ({"null_condition": [1, 2]}, "null_condition"),
        ({"format_version": 1, "n_cfeat": "ten"}, "n_cfeat is 'ten'"),
        ({"format_version": 1, "n_cfeat": 4}, "conditions are [4], the graph takes [[3]]"),
        ({"height": 8}, "images are [3, 8, 16]"),
        ({"classes": None}, "classes is None"),
        ({"noise": "pink"}, "noise is 'pink'"),
        ({"noise": "input"}, "noise is 'input', the graph's inputs are seed"),
        ({"table": {}}, "steps None"),
        ({"schedule": {}}, "timesteps"),
        ({"kind": ["sampler"]}, "damaged"),
        ({"classes": [1, 2, 3]}, "classes are [1, 2, 3]"),
        ({"format_version": True}, "format True"),
        ({"table": {"steps": 10**12, "clip": 1.0, "options": {"solver": "ddpm"}}}, "steps 1000000000000"),
        ({"table": {"steps": 12, "clip": -1.0, "options": {"solver": "ddpm"}}}, "clip -1.0"),
        ({"table": {"steps": 12, "clip": 1.0, "options": {}}}, "options {}"),
    ],
)
def test_metadata_that_does_not_fit_its_graph(copied, run_folder, export, change, says):
    path = with_metadata(copied / "sampler.onnx", metadata(copied / "sampler.onnx") | change)
    commands = (("run", path, "--n", 1, "--out", copied / "g.png"), ("info", path), ("verify", path, run_folder))
    for command in commands:
        assert says in line(export(*command), 3)


def test_metadata_of_almost_nothing(copied, export):
    path = with_metadata(copied / "sampler.onnx", {"kind": "sampler"})
    assert "damaged" in line(export("run", path, "--n", 1, "--out", copied / "g.png"), 3)
    path = with_metadata(path, {"kind": "sampler", "format_version": run.FORMAT_VERSION})
    assert "prediction is None" in line(export("info", path), 3)


def test_a_path_is_not_mistaken_for_a_reason(tmp_path, export):
    path = tmp_path / "opset_ir_version.onnx"
    path.write_bytes(b"x" * 500)
    # As onnxruntime up to 1.21 and from then on put it.
    reasons = ("ModelProto does not have a graph.", "No graph was found in the protobuf.")
    said = line(export("info", path), 3)
    assert any(f"not a whole ONNX model ({reason})" in said for reason in reasons)
    assert "no regular file" in line(export("info", tmp_path), 3)


def test_reasons_come_without_onnxruntimes_sources(copied, export):
    model = onnx.load(copied / "step.onnx")
    model.opset_import[0].version = 99
    onnx.save(model, copied / "step.onnx")
    said = line(export("info", copied / "step.onnx"), 3)
    assert "it has opset 99" in said
    assert "onnxruntime_src" not in said


@pytest.fixture(scope="module")
def half(run_folder, tmp_path_factory):
    """run_folder in fp16."""
    from export.__main__ import main

    out = tmp_path_factory.mktemp("half") / "fp16"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kernels.backend.INTERPRETED", False)
        assert main(["onnx", str(run_folder), "--out", str(out), "--precision", "fp16", "--evaluate", "2"]) == 0
    return out


def with_half_the_weights(model):
    for graph in (model.graph, *(a.g for node in model.graph.node for a in node.attribute if a.name == "body")):
        for tensor in graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT16:
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) / 2, tensor.name))


@pytest.mark.parametrize(
    ("kind", "says"), [("denoiser", "relative L2"), ("sampler", "sampler.onnx"), ("step", "step.onnx")]
)
def test_every_file_of_a_lower_precision_is_measured_itself(half, run_folder, export, tmp_path, kind, says):
    evaluate = ("--evaluate", 2) if kind == "sampler" else ()
    assert export("verify", half / f"{kind}.onnx", run_folder, *evaluate).code == 0
    model = onnx.load(half / f"{kind}.onnx")
    with_half_the_weights(model)
    onnx.save(model, tmp_path / "ruined.onnx")
    answer = export("verify", tmp_path / "ruined.onnx", run_folder, *evaluate)
    assert answer.code == 1
    assert says in answer.err.splitlines()[-1]


@pytest.mark.parametrize("kind", ["sampler", "step"])
def test_a_lower_precision_with_a_wrong_table_is_not_written(run_folder, export, tmp_path, monkeypatch, kind):
    build = getattr(models, kind)

    def wrong(model, network, table, *more):
        return build(model, network, replace(table, coefficients=table.coefficients * 0.9), *more)

    monkeypatch.setattr(models, kind, wrong)
    answer = export("onnx", run_folder, "--out", tmp_path / "x", "--precision", "fp16", "--evaluate", 2)
    assert answer.code == 1
    assert f"PSNR of {kind}.onnx" in answer.err.splitlines()[-1]
    assert not (tmp_path / "x").exists()


def test_a_precision_that_is_only_claimed_is_not_believed(copied, half, run_folder, export):
    for path, claimed, found in ((copied / "denoiser.onnx", "int8", "fp32"), (copied / "half.onnx", "fp32", "fp16")):
        if not path.exists():
            path.write_bytes((half / "sampler.onnx").read_bytes())
        with_metadata(path, metadata(path) | {"precision": claimed})
        assert f"says {claimed}, its weights are {found}" in line(export("verify", path, run_folder), 3)


def test_lower_precisions_without_noise(run_folder, export, tmp_path):
    arguments = ("--precision", "fp16", "--noise", "none", "--solver", "ddim", "--evaluate", 4)
    answer = export("onnx", run_folder, "--out", tmp_path / "x", *arguments)
    assert answer.code == 0, answer.err
    assert json.loads((tmp_path / "x" / "manifest.json").read_text())["quality"]["solver"] == "ddim"


@pytest.mark.parametrize("option", ["--data", "--labels", "--evaluate"])
def test_what_judges_is_refused_where_nothing_is_judged_by_it(exported, half, run_folder, export, tmp_path, option):
    for words, what in (
        (("verify", exported / "sampler.onnx", run_folder), "a fp32 sampler"),
        (("verify", half / "denoiser.onnx", run_folder), "a fp16 denoiser"),
        (("onnx", run_folder, "--out", tmp_path / "x"), "--precision fp32"),
        (("onnx", run_folder, "--out", tmp_path / "x", "--precision", "fp16", "--no-verify"), "fp16 --no-verify"),
    ):
        said = line(export(*words, option, 5), 2)
        assert "--data, --labels, --evaluate: got them for " in said
        assert f"{what}, needs a verified fp16 or int8 sampler" in said


def test_steps_refuse_noise_of_another_batch(exported):
    session = run.open_session(exported / "step.onnx", threads=1)
    x = np.zeros((2, 3, 16, 16), np.float32)
    feeds = {"x": x, "x0_previous": x, "index": np.zeros(1, np.int64), "noise_start": np.zeros(1, np.int64)}
    feeds |= {"contexts": np.zeros((1, 2, 3), np.float32), "guidance": np.ones(1, np.float32)}
    session.run(None, feeds | {"noise": x[None]})
    with pytest.raises(Exception, match="Reshape"):
        session.run(None, feeds | {"noise": x[None, :1]})


@pytest.mark.long
def test_class_accuracy_and_frechet_distance_of_a_trained_run(tmp_path, export, monkeypatch):
    """Tiny and hardly trained, so floors are lowered; fp16 keeps what fp32 has."""
    from ddpm.commands import main as ddpm

    monkeypatch.setattr("kernels.backend.INTERPRETED", False)
    folder, tiny = tmp_path / "digits", ("--n-feat", "8", "--epochs", "1", "--timesteps", "20", "--beta-end", "0.35")
    assert ddpm(["train", "--data", "digits", "--out", str(folder), *tiny, "--device", "cpu"]) == 0
    monkeypatch.setitem(verification.FLOORS, "int8", verification.Floor(-50.0, 5.0, 1.0))
    for precision in ("fp16", "int8"):
        out = tmp_path / precision
        answer = export("onnx", folder, "--out", out, "--precision", precision, "--evaluate", 60)
        assert answer.code == 0, answer.err
        measured = json.loads((out / "manifest.json").read_text())["quality"]
        assert measured["skipped"] is None
        assert measured["samples"] == 60
        assert 0 < measured["accuracy_fp32"] <= 1
        assert measured["frechet"] > 0
        assert set(measured["trajectories"]) == {"sampler.onnx", "step.onnx"}
        assert "class accuracy (SVM)" in answer.out
        assert "Frechet distance" in answer.out
        if precision == "fp16":
            assert abs(measured["accuracy"] - measured["accuracy_fp32"]) <= 1 / 60
            assert measured["frechet"] == pytest.approx(measured["frechet_fp32"], rel=0.01)


@pytest.mark.parametrize(
    ("figures", "says"),
    [
        ({"accuracy": 0.5, "accuracy_fp32": 0.54}, "class accuracy 4.0% below fp32"),
        ({"psnr_db": 24.0}, "PSNR of the samples 24.0 dB"),
        ({"psnr_db": float("nan")}, "PSNR"),
        ({"relative_l2": 0.07}, "relative L2 0.07"),
        ({"trajectories": {"step.onnx": 3.0}}, "PSNR of step.onnx"),
    ],
)
def test_each_floor_holds(figures, says):
    good = {"precision": "int8", "trajectories": {"step.onnx": 30.0}, "psnr_db": 30.0, "relative_l2": 0.03}
    good |= {"accuracy": 0.52, "accuracy_fp32": 0.54}
    verification.require_quality(good)
    with pytest.raises(WorkFailed, match=says):
        verification.require_quality(good | figures)


def test_the_denoiser_of_int8_is_not_a_copy_of_fp32(run_folder, opened, export, tmp_path, monkeypatch):
    monkeypatch.setitem(verification.FLOORS, "int8", verification.Floor(-50.0, 5.0, 1.0))
    arguments = ("--precision", "int8", "--no-verify")
    assert export("onnx", run_folder, "--out", tmp_path / "x", *arguments).code == 0
    session = run.open_session(tmp_path / "x" / "denoiser.onnx", threads=1)
    x, t, c = torch.randn(2, 3, 16, 16), torch.full((2,), 0.5), torch.eye(3)[:2]
    (m,) = session.run(["m"], {"x": x.numpy(), "t": t.numpy(), "context": c.numpy()})
    with torch.no_grad():
        exact = opened.model(x, t, c).numpy()
    error = np.linalg.norm(m - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.5
