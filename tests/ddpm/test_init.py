"""`ddpm train --init RUN`: training begins with another run's weights."""

import json
import shutil

import pytest
import torch

from ddpm import ContextUnet, load_run

STANDS_STILL = ("--lr", "1e-30")


@pytest.fixture
def train(ddpm, tmp_path, tiny_options):
    """train("--init", run, ...): the answer of training into tmp_path / "new"."""
    return lambda *options: ddpm("train", "--out", tmp_path / "new", *tiny_options, *options)


def test_training_begins_with_the_weights_of_the_run_and_says_so(train, digits_run, tmp_path):
    answer = train("--init", digits_run, "--timesteps", 30, *STANDS_STILL)
    assert answer.code == 0, answer.err
    first, new = load_run(digits_run), load_run(tmp_path / "new")
    begun, ended = (dict(run.model.named_parameters()) for run in (first, new))
    assert all(torch.equal(begun[name], ended[name]) for name in begun)
    assert new.config["init"] == {"run": str(digits_run), "digest": first.digest()}
    assert new.config["training"]["init"] == str(digits_run)
    assert new.schedule.timesteps == 30


def test_imported_widths_are_kept_and_a_resumed_run_needs_the_other_no_more(ddpm, train, tmp_path):
    torch.manual_seed(0)
    torch.save(ContextUnet(1, 8, 10, 16, multipliers=(2, 1)).state_dict(), tmp_path / "w.pth")
    assert ddpm("import", tmp_path / "w.pth", "--out", tmp_path / "imported").code == 0
    assert train("--init", tmp_path / "imported").code == 0
    assert load_run(tmp_path / "new").model.multipliers == (2, 1)
    weights = (tmp_path / "new" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "imported")
    answer = train("--resume")
    assert (answer.code, answer.out.startswith("finished before")) == (0, True), answer.err
    assert (tmp_path / "new" / "model.safetensors").read_bytes() == weights
    (tmp_path / "new" / "training.safetensors").unlink()
    (tmp_path / "new" / "model.safetensors").unlink()
    assert "imported: no such run folder" in train("--resume").err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--n-feat", 16), "has n_feat 8, this run 16"),
        (("--prediction", "v"), "has prediction eps, this run v"),
        (("--network", "mlp"), "has network context_unet, this run mlp"),
        (("--image-size", 8), "has samples of shape [1, 16, 16], this run [1, 8, 8]"),
        (("--data", "swiss-roll"), "has samples of shape [1, 16, 16], this run [2]"),
    ],
)
def test_runs_that_do_not_match_are_named_with_both(train, digits_run, tmp_path, options, words):
    answer = train("--init", digits_run, *options)
    assert answer.code == 2
    assert answer.err.strip().splitlines()[-1] == f"error: --init: {digits_run} {words}, needs the same"
    assert not (tmp_path / "new" / "config.json").exists()


def test_a_run_does_not_begin_with_itself(train, digits_run, tmp_path):
    run = shutil.copytree(digits_run, tmp_path / "new")
    config = json.loads((run / "config.json").read_text())
    assert "which is --out, needs another folder" in train("--init", run, "--overwrite").err
    assert json.loads((run / "config.json").read_text()) == config
