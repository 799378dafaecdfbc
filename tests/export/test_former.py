"""A sampler.onnx that the version before wrote (format 1, commit 5eff963; see tests/ddpm/test_former_runs.py)."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from ddpm import load_run
from ddpm.metrics import distance
from export import bundle, run

FORMER = Path(__file__).parents[1] / "ddpm" / "former"
TOO_OLD = tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 29)
reads_it = pytest.mark.skipif(TOO_OLD, reason="its Cos in double came with onnxruntime 1.29; see the test of that line")


@reads_it
def test_it_still_draws_its_pictures(export, tmp_path):
    how = ("--n", 4, "--context", "all", "--guidance", 2, "--seed", 7)
    answer = export("run", FORMER / "sampler.onnx", *how, "--npy", tmp_path / "x.npy")
    assert answer.code == 0, answer.err
    assert distance(np.load(tmp_path / "x.npy"), np.load(FORMER / "images.npy")) <= 1e-4


@reads_it
def test_it_is_verified_against_its_run_and_told_of(export):
    answer = export("verify", FORMER / "sampler.onnx", FORMER / "run")
    assert answer.code == 0, answer.err
    assert "context_unet" in export("info", FORMER / "sampler.onnx").out


def test_one_class_of_it_is_class_0():
    metadata = {"format_version": run.FORMER_VERSION, "n_cfeat": 1, "classes": []}
    assert run.contexts("0", metadata, np.arange(2)).tolist() == [[1.0], [1.0]]
    with pytest.raises(run.UsageError, match="got '1'"):
        run.contexts("1", metadata, np.arange(2))


@pytest.mark.skipif(not TOO_OLD, reason="this onnxruntime reads it")
def test_an_older_runtime_is_told_which_it_needs(export):
    answer = export("info", FORMER / "sampler.onnx")
    assert answer.code == 3
    assert answer.err.endswith(f"which onnxruntime {onnxruntime.__version__} lacks; needs onnxruntime 1.29 or newer\n")


@pytest.mark.long
def test_its_run_is_exported_again(tmp_path):
    opened = load_run(FORMER / "run")
    assert len(bundle.write(opened, tmp_path / "onnx", {})["parity"]) == 5
