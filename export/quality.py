"""What a lower precision costs and gives: PSNR, relative L2, class accuracy, Frechet distance, beside speed.

Samples of both are drawn from the same noise, so they differ by the precision alone: two along each file's own table,
and many, for the statistics, by that table's solver in fewer steps.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
import torch

from ddpm import evaluation, training
from ddpm.data import Dataset
from ddpm.errors import BadInput, WorkFailed
from ddpm.metrics import psnr, relative_l2
from ddpm.networks import condition_shape, one_hot_conditions, sample_shape
from ddpm.progress import Bar
from ddpm.runs import Run
from ddpm.sampling import sample
from export.metadata import described_table
from export.parity import known_samples, sampler_images, session_denoiser, step_images
from export.precision import trajectory_calls
from export.run import draw
from export.traced import example_times

# Another seed than the calibration's: the calls that are judged were not calibrated on.
SEED, GUIDANCE, CHUNK = 2_000_003, 2.0, 20
STEPS = 50
PSNR_MOST = 200.0  # dB, of equal images
TIMED_BATCH, TIMED_ROUNDS = 8, 7

File = tuple[onnxruntime.InferenceSession, dict[str, Any]]  # and its metadata


@dataclass(frozen=True)
class Floor:
    """Below which an export fails: PSNR of samples, relative L2 of the network's output, accuracy lost to fp32."""

    psnr_db: float
    relative_l2: float
    accuracy_loss: float


# Measured on the sprites run, with room: see docs/export.md.
FLOORS = {"fp16": Floor(45.0, 0.005, 0.02), "int8": Floor(25.0, 0.06, 0.03)}


@dataclass(frozen=True)
class Quality:
    """Files of a precision against the eager fp32 run.

    `trajectories` is the PSNR of sampler.onnx and step.onnx along their own tables. What belongs to a file that was not
    measured is None, and so are the figures of evaluation where `skipped` says why.
    """

    precision: str
    skipped: str | None
    trajectories: dict[str, float]
    # of sampler.onnx
    samples: int | None = None
    solver: str | None = None
    steps: int | None = None
    guidance: float | None = None
    psnr_db: float | None = None
    accuracy: float | None = None
    accuracy_fp32: float | None = None
    frechet: float | None = None
    frechet_fp32: float | None = None
    # of denoiser.onnx
    relative_l2: float | None = None
    batch: int | None = None
    eager_ms: float | None = None
    denoiser_ms: float | None = None


def dataset_of(run: Run, data: str | None, labels: str | None) -> tuple[Dataset | None, str | None]:
    """The data that the run was trained on, or why it is not there."""
    if not isinstance(run.config.get("training"), dict):
        return None, "an imported run knows no training data"
    try:
        return training.training_data(run, data, labels), None
    except training.OtherData:
        raise
    except BadInput as error:
        if data or labels:
            raise
        return None, f"{error} (--data, --labels)"


def _relative_l2(denoiser: onnxruntime.InferenceSession, run: Run) -> float:
    """|m - m_fp32| / |m_fp32| over the calls of trajectories."""
    denoise, shape = session_denoiser(denoiser), condition_shape(run.model)
    found, exact = [], []
    with torch.no_grad():
        for x, t, c in trajectory_calls(run, SEED):
            c = torch.zeros(len(x), *shape) if c is None and shape is not None else c
            found.append(denoise(x, t, c))
            exact.append(run.model(x, t, c).numpy())
    return relative_l2(np.concatenate(found), np.concatenate(exact))


def _decibels(images: np.ndarray, exact: np.ndarray) -> float:
    """PSNR, at most PSNR_MOST: JSON has no infinity."""
    return min(psnr(images, exact), PSNR_MOST)


def _times(denoiser: onnxruntime.InferenceSession, run: Run) -> tuple[float, float]:
    """Milliseconds of a call of a batch, eager and exported, in alternating rounds: medians."""
    x, t = torch.zeros(TIMED_BATCH, *sample_shape(run.model)), example_times(run.model, TIMED_BATCH)
    shape = condition_shape(run.model)
    c = None if shape is None else torch.zeros(TIMED_BATCH, *shape)
    denoise = session_denoiser(denoiser)

    def seconds(call: Callable[..., object]) -> float:
        began = time.perf_counter()
        call(x, t, c)
        return time.perf_counter() - began

    with torch.inference_mode():
        rounds = [(seconds(run.model), seconds(denoise)) for _ in range(TIMED_ROUNDS + 1)][1:]
    return tuple(1e3 * median(column) for column in zip(*rounds, strict=True))


def _statistics(file: File, run: Run, precision: str, samples: int, dataset: Dataset | None) -> dict[str, Any]:
    """Draw `samples` samples with both and compare them; without a dataset there is no evaluation."""
    session, metadata = file
    steps = min(STEPS, metadata["table"]["steps"])
    table = described_table(metadata["table"], run, steps=steps, spacing="trailing")
    shape = condition_shape(run.model)
    classes = 0 if shape is None else math.prod(shape)
    asked = torch.arange(samples) % classes if classes else None
    context = one_hot_conditions(run.model, torch.arange(samples))
    guidance = GUIDANCE if classes else 1.0
    found, reference = [], []
    with Bar(f"quality {precision}", samples, "images/s") as bar:
        for start in range(0, samples, CHUNK):
            part = slice(start, min(start + CHUNK, samples))
            numbers, c = np.arange(part.start, part.stop), None if context is None else context[part]
            same = {"guidance": guidance, "seed": SEED}
            eager = sample(
                run.model,
                run.schedule,
                len(numbers),
                table=table,
                context=c,
                first_sample=start,
                engine="eager",
                **same,
            )
            rows = None if c is None else c.numpy()
            found.append(draw(session, metadata, numbers, rows, table=table.rows().numpy(), clip=table.clip, **same))
            reference.append(eager.numpy())
            bar.update(part.stop)
    images, exact = np.concatenate(found), np.concatenate(reference)
    judged = [evaluation.evaluate(torch.from_numpy(i), dataset, asked) for i in (images, exact)] if dataset else None
    return {
        "samples": samples,
        "solver": table.solver,
        "steps": table.steps,
        "guidance": guidance,
        "psnr_db": _decibels(images, exact),
        "accuracy": judged and judged[0].accuracy,
        "accuracy_fp32": judged and judged[1].accuracy,
        "frechet": judged and judged[0].frechet,
        "frechet_fp32": judged and judged[1].frechet,
    }


def measure(
    precision: str, files: Mapping[str, File], run: Run, samples: int, dataset: Dataset | None, skipped: str | None
) -> Quality:
    """Measure files {kind: (session, metadata)} of one precision. dataset None: no evaluation, `skipped` says why."""
    figures: dict[str, Any] = {}
    if "denoiser" in files:
        denoiser = files["denoiser"][0]
        eager_ms, denoiser_ms = _times(denoiser, run)
        figures |= {"batch": TIMED_BATCH, "eager_ms": eager_ms, "denoiser_ms": denoiser_ms}
        figures["relative_l2"] = _relative_l2(denoiser, run)
    trajectories, known, described = {}, None, None
    for kind in ("sampler", "step"):
        if kind not in files:
            continue
        session, metadata = files[kind]
        if known is None or metadata["table"]["options"] != described["options"]:
            described = metadata["table"]
            table = described_table(described, run)
            known = known_samples(run, table)
        if kind == "sampler":
            images = sampler_images(session, metadata, known, slice(None))
        else:
            images = step_images(session, table.rows().numpy(), known)
        trajectories[f"{kind}.onnx"] = _decibels(images, known.reference)
    if "sampler" in files:
        figures |= _statistics(files["sampler"], run, precision, samples, dataset)
    return Quality(precision, skipped, trajectories, **figures)


def require(quality: Quality) -> None:
    """Raise WorkFailed if a figure is below the precision's floor."""
    floor = FLOORS[quality.precision]
    problems = [
        f"PSNR of {name} {psnr:.1f} dB, needs {floor.psnr_db:g}"
        for name, psnr in [("the samples", quality.psnr_db), *quality.trajectories.items()]
        if psnr is not None and not psnr >= floor.psnr_db
    ]
    if quality.relative_l2 is not None and not quality.relative_l2 <= floor.relative_l2:
        problems.append(f"relative L2 {quality.relative_l2:.2g}, needs at most {floor.relative_l2:g}")
    if quality.accuracy is not None:
        lost = quality.accuracy_fp32 - quality.accuracy
        if not lost <= floor.accuracy_loss:
            problems.append(f"class accuracy {lost:.1%} below fp32, needs at most {floor.accuracy_loss:.0%}")
    if problems:
        raise WorkFailed(f"quality of {quality.precision}: {'; '.join(problems)}; the files that were there stay")
