"""Guidance in exported files, as `ddpm.sample` has it: by sample, away from conditions, in an interval, rescaled."""

import json

import numpy as np
import onnx
import pytest
import torch

from ddpm import make_table, sample
from ddpm.metrics import distance
from export import models, run, traced
from export.cuda import StepLoop
from export.models import describe
from export.verification import SAMPLER_TOLERANCE

CONTEXT, NEGATIVE = np.eye(3, dtype=np.float32)[[0, 1, 2]], np.eye(3, dtype=np.float32)[[2, 2, 0]]
WEIGHTS = np.array([2.5, 1.0, -1.5])
WAYS = {
    "a number": {"guidance": 2.0},
    "one a sample": {"guidance": WEIGHTS},
    "negative": {"guidance": 2.0, "negative": NEGATIVE},
    "rescale": {"guidance": 3.0, "guidance_rescale": 0.7},
    "all": {"guidance": WEIGHTS, "negative": NEGATIVE, "guidance_rescale": 0.4},
    "none": {"guidance": np.ones(3)},
}
INTERVALS = {"everywhere": None, "in an interval": (0.2, 0.8)}


@pytest.fixture(scope="module", params=INTERVALS)
def open_files(request, opened, tmp_path_factory):
    """(sampler.onnx, step.onnx, table) with guidance by sample."""
    options = opened.options(guidance_interval=INTERVALS[request.param])
    table, folder = make_table(opened.schedule, **options), tmp_path_factory.mktemp("open")
    note = {"options": options, "steps": len(table), "clip": table.clip, "rows": table.rows().tolist()}
    graphs = traced.trace(opened.model)
    for kind, noise, made in (("sampler", ("philox",), models.sampler), ("step", (), models.step)):
        metadata = json.dumps(
            describe(opened, kind, "fp32", noise="input" if kind == "step" else "philox", rng=models.RNG, table=note)
        )
        model = made(opened.model, graphs, table, 12, *noise, metadata, by_sample=True)
        onnx.save(model, folder / f"{kind}.onnx")
    return folder / "sampler.onnx", folder / "step.onnx", table


def eager(opened, table, **how):
    more = {"table": table, "seed": 4, "first_sample": 7, "engine": "eager"}
    return sample(opened.model, opened.schedule, 3, context=CONTEXT, **more, **how)


@pytest.mark.parametrize("way", WAYS)
def test_files_with_open_guidance_draw_what_sample_draws(open_files, opened, way):
    sampler, step, table = open_files
    expected, numbers = eager(opened, table, **WAYS[way]), np.arange(7, 10)
    session = run.open_session(sampler, threads=1)
    metadata = run.metadata_of(session, sampler, "sampler")
    found = run.draw(session, metadata, numbers, CONTEXT, seed=4, **WAYS[way])
    assert distance(found, expected) <= SAMPLER_TOLERANCE
    parts = {name: value[1:] if np.ndim(value) else value for name, value in WAYS[way].items()}
    if way != "none" and np.any(np.asarray(parts["guidance"]) != 1):
        alone = run.draw(session, metadata, numbers[1:], CONTEXT[1:], seed=4, **parts)
        assert distance(alone, found[1:]) <= 1e-5
    loop = StepLoop(step, batch=3, guided=True, provider="cpu")
    assert distance(loop(numbers, CONTEXT, seed=4, **WAYS[way]), expected) <= SAMPLER_TOLERANCE


def test_an_interval_is_in_files_whose_guidance_is_a_number(opened, tmp_path):
    options = opened.options(guidance_interval=(0.3, 0.9), solver="ddim", steps=6)
    table = make_table(opened.schedule, **options)
    note = {"options": options, "steps": 6, "clip": table.clip, "rows": table.rows().tolist()}
    metadata = json.loads(json.dumps(describe(opened, "sampler", "fp32", noise="none", rng=models.RNG, table=note)))
    model = models.sampler(opened.model, traced.trace(opened.model), table, 12, "none", json.dumps(metadata))
    onnx.save(model, tmp_path / "sampler.onnx")
    session = run.open_session(tmp_path / "sampler.onnx", threads=1)
    found = run.draw(session, metadata, np.arange(7, 10), CONTEXT, seed=4, guidance=3.0)
    assert distance(found, eager(opened, table, guidance=3.0)) <= SAMPLER_TOLERANCE
    assert distance(found, eager(opened, make_table(opened.schedule, "ddim", 6, clip=1.0), guidance=3.0)) > 1e-3
    again = models.described_table(metadata["table"], opened)
    assert torch.equal(again.guidance_scale, table.guidance_scale)
    assert not models.opens(table)


def test_a_step_of_any_export_takes_negative_conditions(exported, opened):
    """They are the second copy of its contexts."""
    table = make_table(opened.schedule, **opened.options())
    loop = StepLoop(exported / "step.onnx", batch=3, guided=True, provider="cpu")
    how = {"guidance": 2.0, "negative": NEGATIVE}
    assert distance(loop(np.arange(7, 10), CONTEXT, seed=4, **how), eager(opened, table, **how)) <= SAMPLER_TOLERANCE
    with pytest.raises(run.UsageError, match=r"^guidance: got .* takes one weight alone, needs a model of"):
        loop(np.arange(7, 10), CONTEXT, guidance=WEIGHTS)


def test_inputs_say_what_they_are_and_refuse_what_they_cannot_be(open_files):
    sampler, step, _ = open_files
    session = run.open_session(sampler, threads=1)
    names = ["seed", "first_sample", "context", "guidance", "negative", "guidance_rescale"]
    assert [value.name for value in session.get_inputs()] == names
    for path in (sampler, step):
        assert all(value.doc_string for value in onnx.load(path).graph.input)
    feeds = {"seed": np.array(1), "first_sample": np.array(0), "context": CONTEXT, "negative": NEGATIVE}
    feeds |= {"guidance": WEIGHTS.astype(np.float32), "guidance_rescale": np.array(0.5, np.float32)}
    session.run(None, feeds)
    nan = np.array(np.nan, np.float32)
    for wrong in ({"guidance": np.full(3, nan)}, {"negative": np.full((3, 3), nan)}, {"guidance_rescale": nan}):
        with pytest.raises(Exception, match="guidance, context, negative, guidance_rescale: need finite numbers"):
            session.run(None, feeds | wrong)
    for wrong in ({"guidance": np.ones(1, np.float32)}, {"negative": NEGATIVE[:1]}):
        with pytest.raises(Exception, match="Reshape"):
            session.run(None, feeds | wrong)


BAD = [
    ({"guidance": WEIGHTS}, "guidance: got array([ 2.5,  1. , -1.5]), but this model takes one weight alone"),
    ({"guidance": 2.0, "negative": NEGATIVE}, "negative: got conditions, but this model has its own, needs a model of"),
    ({"guidance": 2.0, "guidance_rescale": 0.5}, "guidance_rescale: got 0.5, but this model takes one weight alone"),
    ({"negative": NEGATIVE}, "negative: got conditions without guidance"),
    ({"guidance_rescale": 0.5}, "guidance_rescale: got 0.5 without guidance"),
    ({"guidance": 2.0, "guidance_rescale": 2}, "guidance_rescale: got 2, needs 0..1"),
    ({"guidance": 2.0, "guidance_rescale": np.nan}, "guidance_rescale: got nan, needs 0..1"),
    ({"guidance": WEIGHTS[:2]}, "guidance: got array([2.5, 1. ]), needs a finite float32, or 3, one for each sample"),
    ({"guidance": WEIGHTS * np.nan}, "guidance: got array([nan, nan, nan]), needs a finite float32"),
    ({"guidance": 2.0, "negative": NEGATIVE[:2]}, "negative: got [2, 3], needs [3, 3] finite float32"),
]


@pytest.mark.parametrize(("how", "words"), BAD)
def test_what_a_file_has_not_is_refused_by_name(exported, how, words):
    session = run.open_session(exported / "sampler.onnx", threads=1)
    with pytest.raises(run.UsageError) as caught:
        run.draw(session, run.metadata_of(session, exported), np.arange(3), CONTEXT, **how)
    assert str(caught.value).startswith(words)


def test_the_commands(run_folder, opened, export, tmp_path):
    out, path = tmp_path / "onnx", tmp_path / "x.npy"
    answer = export("onnx", run_folder, "--out", out, "--open-guidance", "--guidance-interval", "0.2,0.9", "--steps", 6)
    assert answer.code == 0, answer.err
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["open_guidance"] is True
    assert manifest["table"]["options"]["guidance_interval"] == [0.2, 0.9]
    assert len(manifest["parity"]) == 5
    for name in ("sampler.onnx", "step.onnx"):
        assert export("verify", out / name, run_folder).code == 0
        assert "negative" in export("info", out / "sampler.onnx").out
    asked = ("--n", 3, "--seed", 4, "--context", "b", "--guidance=2,1,-3", "--negative", "all", "--first-sample", 2)
    answer = export("run", out, *asked, "--guidance-rescale", 0.7, "--batch-size", 1, "--npy", path)
    assert answer.code == 0, answer.err
    how = {"guidance": [2, 1, -3], "negative": torch.eye(3)[[2, 0, 1]], "guidance_rescale": 0.7}
    options = opened.options(steps=6, guidance_interval=(0.2, 0.9)) | {"seed": 4, "first_sample": 2}
    expected = sample(opened.model, opened.schedule, 3, context=torch.eye(3)[1], **how, **options)
    assert distance(np.load(path), expected) <= SAMPLER_TOLERANCE


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("--context a --negative b", "--negative: got b without guidance, needs a --guidance other than 1"),
        ("--context a --guidance-rescale .5", "--guidance-rescale: got 0.5 without guidance"),
        ("--context a --guidance 2,3,4", "--guidance: got 2,3,4, needs a finite number, or 2, one for each sample"),
        ("--context a --guidance 2,nan", "--guidance: got 2,nan, needs a finite number"),
        ("--context a --guidance 2,x", "--guidance: got '2,x', needs a number"),
        ("--guidance 2,3", "--guidance: got 2,3 without --context"),
        ("--context a --guidance 2 --negative d", "--negative: got 'd', needs a class"),
        ("--context a --guidance 2,3", "guidance: got array([2., 3.]), but this model takes one weight alone"),
        ("--context a --guidance 2 --negative b", "negative: got conditions, but this model has its own"),
    ],
)
def test_wrong_input_is_one_line(exported, export, tmp_path, asked, words):
    answer = export("run", exported, "--n", 2, "--npy", tmp_path / "x.npy", *asked.split())
    assert (answer.code, answer.err.count("\n")) == (2, 1), answer.err
    assert answer.err.startswith(f"error: {words}")
    assert not (tmp_path / "x.npy").exists()


def test_a_run_without_conditions_has_no_guidance_to_open(unconditional, export, tmp_path):
    answer = export("onnx", unconditional.folder, "--out", tmp_path / "x", "--open-guidance")
    assert answer.code == 2
    assert "--open-guidance: " in answer.err
    answer = export(
        "onnx", unconditional.folder, "--out", tmp_path / "x", "--open-table", "--guidance-interval", "0,.5"
    )
    assert "--open-table: ddpm is more than its rows" in answer.err
