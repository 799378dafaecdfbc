"""What clients of every language are asked for: plain inputs that say what they are, and refuse what they cannot be."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from ddpm import make_table, sample
from ddpm.metrics import distance
from ddpm.table import StepTable
from export import models, run, traced
from export.cuda import StepLoop
from export.verification import SAMPLER_TOLERANCE

KINDS = ("denoiser", "sampler", "step")
SHAPE = (3, 16, 16)


def graphs(graph):
    """The graph and the bodies of its control flow."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from graphs(attribute.g)


@pytest.mark.parametrize("kind", KINDS)
def test_every_input_is_plain_and_says_what_it_is(exported, kind):
    path = exported / f"{kind}.onnx"
    model, session = onnx.load(path), run.open_session(path, threads=1)
    assert session.get_overridable_initializers() == []
    assert model.doc_string
    for value in (*model.graph.input, *model.graph.output):
        assert value.doc_string, value.name
    if kind == "sampler":
        assert "1.21.1" in model.doc_string
        assert [value.name for value in session.get_inputs()] == ["seed", "first_sample", "context", "guidance"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_node_binds_more_than_eight_buffers_of_a_split(exported, exported_open, kind):
    for folder in (exported, exported_open):
        for graph in graphs(onnx.load(folder / f"{kind}.onnx").graph):
            assert all(len(node.output) <= 7 for node in graph.node if node.op_type == "Split")


@pytest.fixture(scope="module")
def given_noise(opened, tmp_path_factory):
    """sampler.onnx with --noise input."""
    table = make_table(opened.schedule, **opened.options())
    note = {"options": opened.options(), "steps": len(table), "clip": table.clip, "rows": table.rows().tolist()}
    described = models.describe(opened, "sampler", "fp32", noise="input", rng=models.RNG, table=note)
    model = models.sampler(opened.model, traced.trace(opened.model), table, 12, "input", run.json.dumps(described))
    path = tmp_path_factory.mktemp("input") / "sampler.onnx"
    onnx.save(model, path)
    return path


def test_the_scan_reads_nothing_from_outside(given_noise):
    (scan,) = [node for node in onnx.load(given_noise).graph.node if node.op_type == "Scan"]
    (body,) = [attribute.g for attribute in scan.attribute if attribute.name == "body"]
    known = {""} | {value.name for value in body.input} | {tensor.name for tensor in body.initializer}
    for node in body.node:
        assert set(node.input) <= known, node.op_type
        known |= set(node.output)


def test_openvino_draws_the_same_pictures(given_noise, opened):
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(given_noise), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    session = run.open_session(given_noise, threads=1)
    metadata = run.metadata_of(session, given_noise)

    class Session:
        get_inputs, get_overridable_initializers = session.get_inputs, session.get_overridable_initializers

        def run(self, names, feeds):
            return [compiled(feeds)[name].copy() for name in names]

    context = torch.eye(3)[:2]
    for guidance in (1.0, 2.0):
        images = run.draw(Session(), metadata, np.arange(2), context.numpy(), seed=5, guidance=guidance)
        options = opened.options() | {"context": context, "seed": 5, "guidance": guidance, "engine": "eager"}
        assert distance(images, sample(opened.model, opened.schedule, 2, **options)) <= SAMPLER_TOLERANCE


WRONG = {
    "seed": (np.array(-1), "seed: needs 0 or more"),
    "first_sample": (np.array(-1), "first_sample: needs 0 or more"),
    "guidance": (np.array(np.nan, np.float32), "guidance, context: need finite numbers"),
    "context": (np.full((2, 3), np.inf, np.float32), "guidance, context: need finite numbers"),
    "context, none": (np.zeros((0, 3), np.float32), "batch: needs 1 or more"),
    "table": (np.full((2, 8), 0.5, np.float32), "table: column 7 needs whole timesteps in 1..12"),
    "table, nan": (np.full((2, 8), np.nan, np.float32), "table: column 7 needs whole timesteps in 1..12"),
    "table, late": (np.full((2, 8), 13, np.float32), "table: column 7 needs whole timesteps in 1..12"),
}


@pytest.mark.parametrize("what", WRONG)
def test_the_sampler_itself_refuses(exported_open, what):
    session = run.open_session(exported_open / "sampler.onnx", threads=1)
    feeds = {"seed": np.array(1), "first_sample": np.array(0), "context": np.eye(3, dtype=np.float32)[:2]}
    rows = run.metadata_of(session, "")["table"]["rows"]
    feeds |= {"guidance": np.array(2, np.float32), "table": np.array(rows, np.float32), "clip": np.array(1, np.float32)}
    assert session.run(["images"], feeds)[0].shape == (2, *SHAPE)
    value, says = WRONG[what]
    with pytest.raises(Exception, match=says):
        session.run(["images"], feeds | {what.partition(",")[0]: value})


@pytest.mark.parametrize("name", ["x_T", "noise", "context"])
def test_no_batch_of_one_is_broadcast_over_the_others(given_noise, name):
    session, x = run.open_session(given_noise, threads=1), np.zeros((2, *SHAPE), np.float32)
    feeds = {"x_T": x, "noise": np.zeros((12, *x.shape), np.float32), "context": np.eye(3, dtype=np.float32)[:2]}
    feeds["guidance"] = np.array(2, np.float32)
    session.run(None, feeds)
    feeds[name] = feeds[name][:, :1] if name == "noise" else feeds[name][:1]
    with pytest.raises(Exception, match="Reshape"):
        session.run(None, feeds)


@pytest.mark.parametrize("name", ["x", "x0_previous", "contexts"])
def test_no_batch_of_one_is_broadcast_in_a_step(exported, name):
    session, x = run.open_session(exported / "step.onnx", threads=1), np.zeros((2, *SHAPE), np.float32)
    feeds = {"x": x, "x0_previous": x, "index": np.zeros(1, np.int64), "noise_start": np.zeros(1, np.int64)}
    feeds |= {"contexts": np.zeros((2, 2, 3), np.float32), "guidance": np.ones(1, np.float32), "noise": x[None]}
    session.run(None, feeds)
    feeds[name] = feeds[name][:, :1] if name == "contexts" else feeds[name][:1]
    with pytest.raises(Exception, match="Reshape"):
        session.run(None, feeds)


def test_inputs_that_a_program_froze_are_not_fed(exported, tmp_path):
    """As onnxslim did to files whose inputs had defaults: what it froze may be asked for, and nothing else."""
    model, path = onnx.load(exported / "sampler.onnx"), tmp_path / "slim.onnx"
    values = {"guidance": np.array(1, np.float32), "first_sample": np.array(0)}
    kept = [value for value in model.graph.input if value.name not in values]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())
    onnx.save(model, path)
    session, context = run.open_session(path, threads=1), np.eye(3, dtype=np.float32)
    whole, metadata = run.open_session(exported / "sampler.onnx", threads=1), run.metadata_of(session, path)
    same = [run.draw(s, metadata, np.arange(3), context, seed=3) for s in (session, whole)]
    assert np.array_equal(*same)
    with pytest.raises(run.UsageError, match=r"^guidance: got 2, but it is a constant"):
        run.draw(session, metadata, np.arange(3), context, guidance=2.0)
    with pytest.raises(run.UsageError, match=r"^first_sample: got 4, but it is a constant"):
        run.draw(session, metadata, np.arange(4, 7), context)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize(
    "options",
    [
        {"solver": "ddpm"},
        {"solver": "ddpm", "variance": "beta", "steps": 5},
        {"solver": "ddim", "eta": 0.7, "steps": 7},
        {"solver": "ddim", "steps": 6, "spacing": "leading"},
        {"solver": "dpmpp_2m", "steps": 5, "spacing": "linspace"},
        {"solver": "dpmpp_2m", "steps": 1},
        {"solver": "ddim", "eta": 0.7, "steps": 5, "spacing": "leading+0", "ends": 1},
        {"solver": "ddim", "steps": 7, "spacing": "linspace", "ends": 0},
    ],
    ids=str,
)
def test_run_py_makes_the_tables_of_make_table(opened, options, prediction):
    expected = make_table(opened.schedule, prediction=prediction, **options).rows()
    steps = options.get("steps", 12)
    note = {"options": options, "steps": steps, "alpha_bars": opened.schedule.alpha_bars.tolist()}
    metadata = {"table": note, "schedule": {"timesteps": 12}, "prediction": prediction, "noise": "philox"}
    assert run.check_table(run.make_rows(metadata, None, steps), metadata).tolist() == expected.tolist()
    whole = make_table(opened.schedule, "ddpm", prediction=prediction, spacing=options.get("spacing")).rows()
    if options["solver"] != "ddpm":  # another solver takes none of its options over but the spacing
        assert run.check_table(run.make_rows(metadata, "ddpm", None), metadata).tolist() == whole.tolist()


def test_run_py_draws_other_steps_where_the_table_is_open(exported_open, opened, export, tmp_path):
    how = ("--solver", "ddim", "--steps", 5, "--context", "b", "--n", 2, "--seed", 3)
    answer = export("run", exported_open, *how, "--npy", tmp_path / "x.npy")
    assert answer.code == 0, answer.err
    options = opened.options(solver="ddim", steps=5) | {"context": torch.eye(3)[[1, 1]], "seed": 3, "engine": "eager"}
    assert distance(np.load(tmp_path / "x.npy"), sample(opened.model, opened.schedule, 2, **options)) <= 1e-4
    for wrong, says in (
        (("--steps", 13), "--steps: got 13, needs 1..12"),
        (("--solver", "heun"), "--solver: got 'heun'"),
    ):
        answer = export("run", exported_open, *wrong, "--npy", tmp_path / "y.npy")
        assert (answer.code, says in answer.err) == (2, True), answer.err


def test_a_step_loop_runs_other_tables_where_they_are_open(exported, exported_open, opened):
    table = make_table(opened.schedule, "ddim", 5, clip=1.0)
    context = torch.eye(3)[:2]
    loop = StepLoop(exported_open / "step.onnx", table.rows().numpy(), table.clip, 2, provider="cpu")
    eager = sample(opened.model, opened.schedule, 2, table=table, context=context, seed=4, engine="eager")
    assert distance(loop(np.arange(2), context.numpy(), seed=4), eager) <= SAMPLER_TOLERANCE
    with pytest.raises(run.UsageError, match=r"^rows: got other ones than the model's, which are constants"):
        StepLoop(exported / "step.onnx", table.rows().numpy(), table.clip, 2, provider="cpu")
    for clip, rows in ((1.0, None), (np.nan, table.rows().numpy()), (-1, table.rows().numpy())):
        with pytest.raises(run.UsageError, match=r"^clip: got"):
            StepLoop(exported_open / "step.onnx", rows, clip, provider="cpu")
    for batch in (0, 1.5, True):
        with pytest.raises(run.UsageError, match=rf"^batch: got {batch}, needs a whole number >= 1"):
            StepLoop(exported / "step.onnx", batch=batch, provider="cpu")


def test_tables_that_are_more_than_their_rows_stay_closed(opened):
    table = make_table(opened.schedule, "ddpm", 4)
    assert models.opens(table)
    assert not models.opens(replace(table, guidance_scale=torch.tensor([0, 1, 1, 1.0])))
    assert not models.opens(
        StepTable(torch.tensor([3, 3]), torch.zeros(2, 7), noise_steps=torch.tensor([3, 3 | 1 << 20]))
    )


def test_the_denoiser_refuses_a_batch_of_none(exported):
    session = run.open_session(exported / "denoiser.onnx", threads=1)
    feeds = {
        "x": np.zeros((0, *SHAPE), np.float32),
        "t": np.ones(0, np.float32),
        "context": np.zeros((0, 3), np.float32),
    }
    with pytest.raises(Exception, match="batch: needs 1 or more"):
        session.run(None, feeds)
