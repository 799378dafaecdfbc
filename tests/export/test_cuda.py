"""step.onnx under CUDA graphs, and the providers; part of `make gpu` where onnxruntime sees a CUDA device."""

import numpy as np
import pytest
import torch

from ddpm import make_table, sample
from export import run
from export.cuda import StepLoop
from export.verification import SAMPLER_TOLERANCE, distance


@pytest.fixture
def cuda_step(exported):
    """step.onnx, where a CUDA session of it starts; else the reason is the skip's."""
    try:
        run.open_session(exported / "step.onnx", "cuda")
    except run.ProviderError as error:
        pytest.skip(str(error))
    return exported / "step.onnx"


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_cuda_graphs_draw_the_same_pictures(cuda_step, opened, guidance):
    table = make_table(opened.schedule, **opened.sampling)
    loop = StepLoop(cuda_step, table.rows().numpy(), table.clip, 4, guided=guidance != 1)
    context = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]
    for seed in (1, 2, 3):  # capture, then replays with new noise
        images = loop(np.arange(4), context, seed=seed, guidance=guidance)
        options = opened.sampling | {"context": torch.from_numpy(context), "guidance": guidance, "seed": seed}
        reference = sample(opened.model, opened.schedule, 4, engine="eager", **options).numpy()
        assert distance(images, reference) <= SAMPLER_TOLERANCE


def test_sampler_on_cuda(cuda_step, exported, opened):
    session = run.open_session(exported / "sampler.onnx", "cuda")
    metadata = run.metadata_of(session, exported)
    images = run.draw(session, metadata, np.arange(2), np.eye(3, dtype=np.float32)[:2], seed=5)
    options = opened.sampling | {"context": torch.eye(3)[:2], "seed": 5}
    reference = sample(opened.model, opened.schedule, 2, engine="eager", **options).numpy()
    assert distance(images, reference) <= SAMPLER_TOLERANCE
