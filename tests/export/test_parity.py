"""The same picture: exported graphs against `ddpm.sample` and the module itself, at every edge that users reach."""

import copy
import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from ddpm import make_table, sample
from ddpm.metrics import distance
from export import models, run, traced
from export.cuda import StepLoop
from export.models import describe
from export.traced import Denoiser
from export.verification import DENOISER_TOLERANCE, SAMPLER_TOLERANCE, Parity, denoiser_cases, denoiser_parity

CALL_OPTIONS = ("context", "guidance", "seed", "first_sample")


def sampler_of(opened, folder, noise="philox", **options):
    """(session, metadata) of a sampler with these table options, not through the command line."""
    options = opened.options(**options)
    table = make_table(opened.schedule, **options)
    note = {"options": options, "steps": len(table), "clip": table.clip, "rows": table.rows().tolist()}
    metadata = describe(opened, "sampler", "fp32", noise=noise, table=note)
    graphs = traced.trace(opened.model)
    model = models.sampler(opened.model, graphs, table, opened.schedule.timesteps, noise, json.dumps(metadata))
    path = folder / "sampler.onnx"
    onnx.save(model, path)
    return run.open_session(path, threads=1), metadata


def eager(opened, n, **options):
    given = {name: options.pop(name) for name in CALL_OPTIONS if name in options}
    return sample(opened.model, opened.schedule, n, engine="eager", **given, **opened.options(**options)).numpy()


def test_the_folded_network_is_the_module(opened, unconditional):
    for each in (opened, unconditional):
        with torch.no_grad():
            for name, x, t, c in denoiser_cases(each.model, each.schedule.timesteps):
                error = distance(Denoiser(each.model)(x, t, c).numpy(), each.model(x, t, c).numpy())
                assert error <= DENOISER_TOLERANCE, name


@pytest.mark.parametrize("optimise", [True, False])
def test_denoiser_case_by_case(exported, opened, optimise):
    session = run.open_session(exported / "denoiser.onnx", threads=1, optimise=optimise)
    cases = list(denoiser_cases(opened.model, opened.schedule.timesteps))
    assert len(cases) == 3 * 3 * 3
    with torch.no_grad():
        for name, x, t, c in cases:
            (m,) = session.run(["m"], {"x": x.numpy(), "t": t.numpy(), "context": c.numpy()})
            assert distance(m, opened.model(x, t, c).numpy()) <= DENOISER_TOLERANCE, name


def test_denoiser_refuses_batches_that_differ(exported):
    session = run.open_session(exported / "denoiser.onnx", threads=1)
    x, context = np.zeros((2, 3, 16, 16), np.float32), np.zeros((2, 3), np.float32)
    for t_rows, context_rows in ((1, 2), (2, 1)):
        with pytest.raises(Exception, match="Reshape"):
            session.run(None, {"x": x, "t": np.ones(t_rows, np.float32), "context": context[:context_rows]})


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_sampler_is_ddpm_sample(exported, opened, guidance):
    session = run.open_session(exported / "sampler.onnx", threads=1)
    context = torch.eye(3)[[2, 0, 1]]
    options = {"context": context, "guidance": guidance, "seed": 2**62 + 5, "first_sample": 2**33}
    feeds = {"seed": np.array(2**62 + 5), "first_sample": np.array(2**33), "context": context.numpy()}
    (images,) = session.run(["images"], feeds | {"guidance": np.array(guidance, np.float32)})
    reference = eager(opened, 3, **options)
    assert images.dtype == np.float32
    assert distance(images, reference) <= SAMPLER_TOLERANCE
    assert np.abs(images - eager(opened, 3, **(options | {"seed": 1}))).max() > 0.1  # the seed matters


def test_a_sample_does_not_depend_on_its_batch(exported):
    session = run.open_session(exported / "sampler.onnx", threads=1)
    context = np.eye(3, dtype=np.float32)[np.arange(7) % 3]

    def draw(part):
        feeds = {"seed": np.array(3), "first_sample": np.array(part.start), "context": context[part]}
        return session.run(["images"], feeds | {"guidance": np.array(2, np.float32)})[0]

    together = draw(slice(0, 7))
    parts = np.concatenate([draw(slice(0, 1)), draw(slice(1, 3)), draw(slice(3, 7))])
    assert distance(parts, together) <= 1e-5


@pytest.mark.parametrize(
    ("options", "clip"),
    [
        ({"solver": "dpmpp_2m", "steps": 7}, None),
        ({"solver": "ddim", "steps": 5, "eta": 0.7}, 1.0),
        ({"steps": 1}, 0.5),
    ],
)
def test_one_open_file_runs_any_table(exported_open, opened, options, clip):
    session = run.open_session(exported_open / "sampler.onnx", threads=1)
    metadata = run.metadata_of(session, exported_open)
    options = opened.options(**options) | {"clip": clip}
    table = make_table(opened.schedule, **options)
    context = np.eye(3, dtype=np.float32)[:2]
    images = run.draw(session, metadata, np.arange(2), context, seed=4, table=table.rows().numpy(), clip=clip)
    same = {"context": torch.eye(3)[:2], "seed": 4, "engine": "eager"}
    assert distance(images, sample(opened.model, opened.schedule, 2, **same, **options)) <= SAMPLER_TOLERANCE


@pytest.mark.parametrize("noise", ["philox", "input", "none"])
def test_networks_without_classes(unconditional, tmp_path, noise):
    options = {"solver": "dpmpp_2m", "steps": 6} if noise == "none" else {}
    session, metadata = sampler_of(unconditional, tmp_path, noise, **options)
    images = run.draw(session, metadata, np.arange(5, 8), None, seed=9)
    assert distance(images, eager(unconditional, 3, seed=9, first_sample=5, **options)) <= SAMPLER_TOLERANCE


@pytest.mark.long
def test_noise_as_an_input_is_the_same_noise(opened, tmp_path):
    session, metadata = sampler_of(opened, tmp_path, "input")
    assert {value.name for value in session.get_inputs()} == {"x_T", "noise", "context", "guidance"}
    context = np.eye(3, dtype=np.float32)[:2]
    images = run.draw(session, metadata, np.arange(2), context, seed=9, guidance=3.0)
    reference = eager(opened, 2, context=torch.eye(3)[:2], seed=9, guidance=3.0)
    assert distance(images, reference) <= SAMPLER_TOLERANCE


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_step_advances_by_itself_between_two_buffer_pairs(exported, opened, guidance, monkeypatch):
    monkeypatch.setattr("export.cuda.WINDOW", 5)  # 12 steps: the noise is refilled twice, the last window is short
    table = make_table(opened.schedule, **opened.sampling)
    loop = StepLoop(exported / "step.onnx", table.rows().numpy(), 1.0, 2, guided=guidance != 1, provider="cpu")
    context = np.eye(3, dtype=np.float32)[:2]
    for seed in (1, 2):  # a second call starts afresh
        images = loop(np.arange(4, 6), context, seed=seed, guidance=guidance)
        options = {"context": torch.eye(3)[:2], "seed": seed, "first_sample": 4, "guidance": guidance}
        assert distance(images, eager(opened, 2, **options)) <= SAMPLER_TOLERANCE


def test_the_weights_lie_in_the_body_of_one_scan(exported):
    graph = onnx.load(exported / "sampler.onnx").graph
    assert max(numpy_helper.to_array(tensor).size for tensor in graph.initializer) < 2000
    (scan,) = [node for node in graph.node if node.op_type == "Scan"]
    body = next(attribute.g for attribute in scan.attribute if attribute.name == "body")
    convolutions = [node for node in body.node if node.op_type == "Conv"]
    assert len(convolutions) == 22  # the encoder once, whatever the guidance
    assert {node.input[1] for node in convolutions} <= {tensor.name for tensor in body.initializer}


def test_files_tell_no_paths(exported, run_folder):
    for name in ("denoiser.onnx", "sampler.onnx", "step.onnx"):
        content = (exported / name).read_bytes()
        for secret in (str(run_folder.parent), "site-packages", "networks.py", "/home", "/root"):
            assert secret.encode() not in content, (name, secret)


def test_parity_is_false_for_nan_on_either_side(opened):
    nan = float("nan")
    assert not Parity("x", nan, 1.0).good
    assert not denoiser_parity("x", lambda x, t, c: np.full(x.shape, nan, np.float32), opened).good
    broken = copy.deepcopy(opened.model)
    torch.nn.init.constant_(broken.out[3].bias, nan)
    spoiled = replace(opened, model=broken)
    for denoise in (lambda x, t, c: x.numpy(), lambda x, t, c: broken(x, t, c).numpy()):
        assert not denoiser_parity("x", denoise, spoiled).good


@pytest.mark.long
def test_five_hundred_steps_of_a_wide_network(tmp_path):
    """Item 3 at full length, on random weights small enough not to blow up: n_feat 64, 3x16x16, 500 steps, guided."""
    from ddpm.networks import ContextUnet
    from ddpm.runs import load_run, make_config, start_run
    from ddpm.schedule import NoiseSchedule

    torch.manual_seed(0)
    folder = tmp_path / "wide"
    folder.mkdir()
    network = ContextUnet(3, 64, 5, 16)
    start_run(folder, make_config(network, NoiseSchedule.make("linear", 500), "eps", sampling={"clip": 1.0}), network)
    opened = load_run(folder)
    session, metadata = sampler_of(opened, tmp_path)
    context = np.eye(5, dtype=np.float32)[:2]
    images = run.draw(session, metadata, np.arange(2), context, seed=1, guidance=2.0)
    reference = eager(opened, 2, context=torch.eye(5)[:2], seed=1, guidance=2.0)
    assert distance(images, reference) <= SAMPLER_TOLERANCE
