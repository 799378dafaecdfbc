"""Does what was exported compute what the run computes?

fp32 by parity (`ddpm.metrics.distance`). A lower precision by its quality: PSNR, relative L2, class accuracy, Frechet
distance. Samples of both are drawn from the same noise, so they differ by the precision alone: two along
each file's own table, and many, for the statistics, by that table's solver in fewer steps.
"""

import copy
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from ddpm import evaluation, training
from ddpm.data import Dataset
from ddpm.errors import BadInput, WorkFailed
from ddpm.metrics import CALL_TOLERANCE, ENGINE_TOLERANCE, distance, psnr, relative_l2, worst
from ddpm.networks.protocol import (
    condition_shape,
    in_type,
    network_times,
    one_hot_conditions,
    recalls,
    sample_shape,
)
from ddpm.progress import Bar
from ddpm.runs import Run
from ddpm.sampling import sample
from ddpm.table import StepTable
from export.cuda import StepLoop
from export.graph import FLOAT
from export.models import described_table
from export.precision import trajectory_calls
from export.run import COLUMNS, draw, metadata_of, open_session

DENOISER_TOLERANCE, SAMPLER_TOLERANCE = CALL_TOLERANCE, ENGINE_TOLERANCE
# Where eager itself is further than a tolerance from a float64 run, so many times its distance is allowed (the design's
# rule for engines), but never more than the last number: from there on eager is no reference.
OWN_DISTANCES, OWN_ADDED, MOST_ALLOWED = 4, 1e-6, 1e-2
COMPARED = (
    ("sampler", "sampler.onnx, whole trajectory", SAMPLER_TOLERANCE),
    ("alone", "sampler.onnx, one sample alone", DENOISER_TOLERANCE),
    ("step", "step.onnx, whole trajectory", SAMPLER_TOLERANCE),
)
CASE_SEED = 11
# The trajectory that is compared: two samples, far from sample 0, of the last classes, guided.
FIRST_SAMPLE, SAMPLES, GUIDANCE, SEED = 1000, 2, 2.0, 7
# What is compared instead of GUIDANCE where a file takes it: each sample's weight, and how its output is rescaled.
GUIDANCES, RESCALE = np.array([2.0, 3.5]), 0.5
# Of the statistics. Another seed than the calibration's: the calls that are judged were not calibrated on.
QUALITY_SEED, CHUNK, STEPS = 2_000_003, 20, 50
PSNR_MOST = 200.0  # dB, of equal images: JSON has no infinity
# Of a quality: of sampler.onnx, and of denoiser.onnx.
FIGURES = ("samples", "solver", "steps", "guidance", "psnr_db", "accuracy", "accuracy_fp32", "frechet", "frechet_fp32")
FIGURES += ("relative_l2",)

Denoise = Callable[..., np.ndarray]  # of (x, t, c), and x0_previous where the network reads it
# precision, skipped (why there is no evaluation), trajectories (PSNR of each file along its own table) and FIGURES,
# None where they belong to a file that was not measured, or to the evaluation.
Quality = dict[str, Any]


class Floor(NamedTuple):
    """Below which an export fails: PSNR of samples, relative L2 of the network's output, accuracy lost to fp32."""

    psnr_db: float
    relative_l2: float
    accuracy_loss: float


# Measured on the sprites run, with room: see docs/export.md.
FLOORS = {"fp16": Floor(45.0, 0.005, 0.02), "int8": Floor(25.0, 0.06, 0.03)}


@dataclass(frozen=True)
class Parity:
    """One comparison: what, the error measured, the error allowed."""

    name: str
    error: float
    tolerance: float

    @property
    def good(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


def require(results: list[Parity]) -> None:
    """Raise WorkFailed naming the worst of the comparisons that failed."""
    failed = [result for result in results if not result.good]
    if failed:
        first = max(failed, key=lambda result: result.error / result.tolerance)
        raise WorkFailed(
            f"parity: {first.name} is off by {first.error:.2g}, needs {first.tolerance:.0e} "
            f"({len(failed)} of {len(results)} comparisons failed)"
        )


@contextmanager
def nothing_written() -> Iterator[None]:
    """Failures of this work say that it left no file."""
    try:
        yield
    except WorkFailed as error:
        raise WorkFailed(f"{error}; nothing was written") from error


def allowed(tolerance: float, error: float, own: Callable[[], float]) -> float:
    """What an error may be: the tolerance, or more where eager's own distance from float64, own(), is larger."""
    if error <= tolerance or not math.isfinite(error):
        return tolerance
    exact = own()
    return min(max(tolerance, OWN_DISTANCES * exact + OWN_ADDED), MOST_ALLOWED) if math.isfinite(exact) else tolerance


def denoiser_cases(model: nn.Module, timesteps: int) -> Iterator[tuple[Any, ...]]:
    """(name, x, t, c): batches 1, 2, 5; t at both ends, and mixed; conditions zero, one-hot and random.

    Where the network reads it also x0_previous, random.
    """
    generator = torch.Generator().manual_seed(CASE_SEED)
    shape = condition_shape(model)
    kinds = ("zero",) if shape is None else ("zero", "one-hot", "random")
    for n, end, kind in product((1, 2, 5), ("first", "last", "mixed"), kinds):
        x = torch.randn(n, *sample_shape(model), generator=generator)
        first, last = {"first": (1, 1), "last": (timesteps, timesteps), "mixed": (1, timesteps)}[end]
        t = in_type(network_times(model, torch.linspace(first, last, n).round().long(), timesteps))
        c = None if shape is None else torch.zeros(n, *shape)
        if kind == "one-hot":
            c = one_hot_conditions(model, torch.arange(n))
        elif kind == "random":
            c = torch.randn(n, *shape, generator=generator)
        recalled = (torch.randn(x.shape, generator=generator),) if recalls(model) else ()
        yield f"batch {n}, t {end}, context {kind}", x, t, c, *recalled


def denoiser_parity(name: str, denoise: Denoise, run: Run) -> Parity:
    """The worst case of `denoise` against the run's own module."""

    def furthest(call: Denoise) -> float:
        cases = denoiser_cases(run.model, run.schedule.timesteps)
        return worst(distance(call(*given), run.model(*given)) for _, *given in cases)

    with torch.no_grad():
        error = furthest(denoise)
        return Parity(name, error, allowed(DENOISER_TOLERANCE, error, lambda: furthest(_in_float64(run.model))))


def _in_float64(model: nn.Module) -> Denoise:
    precise = copy.deepcopy(model).double()
    return lambda *given: precise(*(v.double() if v is not None and v.is_floating_point() else v for v in given))


def file_denoiser(path: Path, optimise: bool = True) -> Denoise:
    """A denoiser.onnx as a function."""
    session = open_session(path, optimise=optimise)

    def denoise(*call: Tensor | None) -> np.ndarray:
        feeds = dict(zip(("x", "t", "context", "x0_previous"), call, strict=False))
        return session.run(["m"], {name: value.numpy() for name, value in feeds.items() if value is not None})[0]

    return denoise


def _opened(files: Mapping[str, Path], kind: str) -> tuple[Any, dict[str, Any]]:
    """(session, metadata) of a file."""
    session = open_session(files[kind])
    return session, metadata_of(session, files[kind], kind)


def _eager_trajectory(run: Run, table: StepTable, dtype: torch.dtype = torch.float32, **how: Any) -> Tensor:
    """The trajectory that is compared, of SAMPLES samples."""
    with Bar("eager reference", len(table), "steps/s") as bar:
        return sample(
            run.model,
            run.schedule,
            SAMPLES,
            table=table,
            seed=SEED,
            first_sample=FIRST_SAMPLE,
            engine="eager",
            dtype=dtype,
            callback=lambda i, _: bar.update(i + 1),
            **how,
        )


def own_trajectories(
    files: Mapping[str, Path], run: Run
) -> tuple[np.ndarray, dict[str, np.ndarray], Callable[[], float]]:
    """What eager and each file make of SAMPLES by the files' own table, and eager's distance from float64.

    `alone`: of the last sample without the others.
    """
    session, metadata = _opened(files, "sampler" if "sampler" in files else "step")
    table = described_table(metadata["table"], run)
    last = -1 - torch.arange(SAMPLES)
    context = one_hot_conditions(run.model, last)
    rows: dict[str, Any] = {"context": None if context is None else context.numpy()}
    how = {"guidance": 1.0 if context is None else GUIDANCE}
    if "guidance_rescale" in {value.name for value in session.get_inputs()}:
        rows |= {"guidance": GUIDANCES, "negative": one_hot_conditions(run.model, last - 1).numpy()}
        how = {"guidance_rescale": RESCALE}
    eager = partial(_eager_trajectory, run, table, **rows, **how)
    reference, how, numbers = eager().numpy(), how | {"seed": SEED}, np.arange(FIRST_SAMPLE, FIRST_SAMPLE + SAMPLES)
    found = {}
    if "sampler" in files:
        found["sampler"] = draw(session, metadata, numbers, **rows, **how)
        alone = {name: None if value is None else value[-1:] for name, value in rows.items()}
        found["alone"] = draw(session, metadata, numbers[-1:], **alone, **how)
    if "step" in files:
        loop = StepLoop(files["step"], batch=SAMPLES, guided=context is not None, provider="cpu")
        found["step"] = loop(numbers, **rows, **how)
    return reference, found, cache(lambda: distance(reference, eager(dtype=torch.float64)))


def parities(files: Mapping[str, Path], run: Run) -> list[Parity]:
    """Every fp32 file, {kind: path}, against the run."""
    results = []
    if "denoiser" in files:  # at the optimisation level that is shipped (onnxruntime's default) and at none
        for name, optimise in (("optimised", True), ("not optimised", False)):
            denoise = file_denoiser(files["denoiser"], optimise)
            results.append(denoiser_parity(f"denoiser.onnx, {name}", denoise, run))
    if set(files) != {"denoiser"}:
        reference, found, own = own_trajectories(files, run)
        for kind, name, tolerance in COMPARED:
            if kind in found:
                error = distance(found[kind], found["sampler"][-1:] if kind == "alone" else reference)
                results.append(Parity(name, error, allowed(tolerance, error, own)))
    return results


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


def _of_denoiser(path: Path, run: Run) -> float:
    """Relative L2 over the calls of trajectories."""
    denoise, shape, pairs = file_denoiser(path), condition_shape(run.model), []
    with torch.no_grad():
        for x, t, c, *recalled in trajectory_calls(run, QUALITY_SEED):
            c = torch.zeros(len(x), *shape) if c is None and shape is not None else c
            pairs.append((denoise(x, t, c, *recalled), run.model(x, t, c, *recalled).numpy()))
    return relative_l2(*map(np.concatenate, zip(*pairs, strict=True)))


def _any_table(path: Path) -> Any:
    """A session of a sampler that takes other tables: one that is a constant becomes the default of an input."""
    model = onnx.load(path)
    if "table" not in {value.name for value in model.graph.input}:
        model.graph.input.append(onnx.helper.make_tensor_value_info("table", FLOAT, ["steps", COLUMNS]))
    with tempfile.TemporaryDirectory() as folder:
        opened = Path(folder) / "sampler.onnx"
        onnx.save(model, opened)
        return open_session(opened)


def _of_samples(files: Mapping[str, Path], run: Run, samples: int, dataset: Dataset | None) -> Quality:
    """Draw `samples` samples with both and compare them; without a dataset there is no evaluation."""
    session, metadata = _opened(files, "sampler")
    steps = min(STEPS, metadata["table"]["steps"])
    table = described_table(metadata["table"], run, steps=steps, spacing="trailing")
    other = {}
    if "stored" not in metadata["table"]:
        session, other = _any_table(files["sampler"]), {"table": table.rows().numpy(), "clip": table.clip}
    context = one_hot_conditions(run.model, torch.arange(samples))
    given = {"seed": QUALITY_SEED, "guidance": 1.0 if context is None else GUIDANCE}
    asked = None if context is None else torch.arange(samples) % math.prod(condition_shape(run.model))
    pairs = []
    with Bar(f"quality {metadata['precision']}", samples, "images/s") as bar:
        for start in range(0, samples, CHUNK):
            numbers = np.arange(start, min(start + CHUNK, samples))
            c = None if context is None else context[numbers]
            more = {"table": table, "context": c, "first_sample": start, "engine": "eager"}
            exact = sample(run.model, run.schedule, len(numbers), **more, **given).numpy()
            c = None if c is None else c.numpy()
            pairs.append((draw(session, metadata, numbers, c, **other, **given), exact))
            bar.update(start + len(numbers))
    images, exact = map(np.concatenate, zip(*pairs, strict=True))
    figures = {"samples": samples, "solver": table.solver, "steps": table.steps, "guidance": given["guidance"]}
    figures["psnr_db"] = min(psnr(images, exact), PSNR_MOST)
    for suffix, drawn in (("", images), ("_fp32", exact)) if dataset else ():
        judged = evaluation.evaluate(torch.from_numpy(drawn), dataset, asked)
        figures |= {f"accuracy{suffix}": judged.accuracy, f"frechet{suffix}": judged.frechet}
    return figures


def quality(
    precision: str, files: Mapping[str, Path], run: Run, samples: int, dataset: Dataset | None, skipped: str | None
) -> Quality:
    """Measure files {kind: path} of a lower precision. dataset None: no evaluation, `skipped` says why."""
    measured = {"precision": precision, "skipped": skipped, "trajectories": {}, **dict.fromkeys(FIGURES)}
    if "denoiser" in files:
        measured["relative_l2"] = _of_denoiser(files["denoiser"], run)
    if set(files) != {"denoiser"}:
        reference, found, _ = own_trajectories(files, run)
        decibels = {kind: min(psnr(found[kind], reference), PSNR_MOST) for kind in ("sampler", "step") if kind in files}
        measured["trajectories"] = {f"{kind}.onnx": value for kind, value in decibels.items()}
    if "sampler" in files:
        measured |= _of_samples(files, run, samples, dataset)
    return measured


def require_quality(measured: Quality) -> None:
    """Raise WorkFailed if a figure is below the precision's floor."""
    floor = FLOORS[measured["precision"]]
    problems = [
        f"PSNR of {name} {psnr:.1f} dB, needs {floor.psnr_db:g}"
        for name, psnr in [("the samples", measured["psnr_db"]), *measured["trajectories"].items()]
        if psnr is not None and not psnr >= floor.psnr_db
    ]
    error, accuracy = measured["relative_l2"], measured["accuracy"]
    if error is not None and not error <= floor.relative_l2:
        problems.append(f"relative L2 {error:.2g}, needs at most {floor.relative_l2:g}")
    if accuracy is not None and not measured["accuracy_fp32"] - accuracy <= floor.accuracy_loss:
        lost = measured["accuracy_fp32"] - accuracy
        problems.append(f"class accuracy {lost:.1%} below fp32, needs at most {floor.accuracy_loss:.0%}")
    if problems:
        raise WorkFailed(f"quality of {measured['precision']}: {'; '.join(problems)}")
