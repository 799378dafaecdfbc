"""Does what was exported compute what the run computes? By `ddpm.metrics.distance`."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn

from ddpm.errors import WorkFailed
from ddpm.metrics import CALL_TOLERANCE, ENGINE_TOLERANCE, distance, worst
from ddpm.networks import condition_shape, network_times, one_hot_conditions, sample_shape
from ddpm.networks.protocol import in_type
from ddpm.progress import Bar
from ddpm.runs import Run
from ddpm.table import StepTable
from ddpm.trajectory import Trajectory
from export.models import null_of
from export.run import draw, normals

DENOISER_TOLERANCE, SAMPLER_TOLERANCE = CALL_TOLERANCE, ENGINE_TOLERANCE
BATCHES = (1, 2, 5)
CONTEXTS = ("zero", "one-hot", "random")
CASE_SEED = 11
# The trajectory that is compared: two samples, far from sample 0, of the last classes, guided.
FIRST_SAMPLE, SAMPLES, GUIDANCE = 1000, 2, 2.0

Denoise = Callable[[Tensor, Tensor, Tensor | None], np.ndarray]


@dataclass(frozen=True)
class Parity:
    """One comparison: what, the error measured, the error allowed."""

    name: str
    error: float
    tolerance: float

    @property
    def good(self) -> bool:
        return self.error <= self.tolerance  # False for NaN

    def asdict(self) -> dict[str, object]:
        return asdict(self) | {"good": self.good}


def require(results: list[Parity]) -> None:
    """Raise WorkFailed naming the worst of the comparisons that failed."""
    failed = [result for result in results if not result.good]
    if failed:
        first = max(failed, key=lambda result: result.error / result.tolerance)
        raise WorkFailed(
            f"parity: {first.name} is off by {first.error:.2g}, needs {first.tolerance:.0e} "
            f"({len(failed)} of {len(results)} comparisons failed); the files that were there stay"
        )


def denoiser_cases(model: nn.Module, timesteps: int) -> Iterator[tuple[str, Tensor, Tensor, Tensor | None]]:
    """(name, x, t, c): batches 1, 2, 5; t at both ends, and mixed; conditions zero, one-hot and random."""
    generator = torch.Generator().manual_seed(CASE_SEED)
    shape = condition_shape(model)
    kinds = CONTEXTS if shape is not None else CONTEXTS[:1]
    for n, end, kind in product(BATCHES, ("first", "last", "mixed"), kinds):
        x = torch.randn(n, *sample_shape(model), generator=generator)
        low, high = torch.ones(n, dtype=torch.int64), torch.full((n,), timesteps)
        mixed = torch.linspace(1, timesteps, n).round().long()
        t = in_type(network_times(model, {"first": low, "last": high, "mixed": mixed}[end], timesteps))
        c = None if shape is None else torch.zeros(n, *shape)
        if c is not None and kind == "one-hot":
            c = one_hot_conditions(model, torch.arange(n))
        elif c is not None and kind == "random":
            c = torch.randn(n, *shape, generator=generator)
        yield f"batch {n}, t {end}, context {kind}", x, t, c


def denoiser_parity(name: str, denoise: Denoise, run: Run) -> Parity:
    """The worst case of `denoise` against the run's own module."""
    with torch.no_grad():
        cases = denoiser_cases(run.model, run.schedule.timesteps)
        errors = [distance(denoise(x, t, c), run.model(x, t, c)) for _, x, t, c in cases]
    return Parity(name, worst(errors), DENOISER_TOLERANCE)


def session_denoiser(session: object) -> Denoise:
    """A denoiser.onnx session as a function."""

    def denoise(x: Tensor, t: Tensor, c: Tensor | None) -> np.ndarray:
        feeds = {"x": x.numpy(), "t": t.numpy()} | ({} if c is None else {"context": c.numpy()})
        return session.run(["m"], feeds)[0]

    return denoise


@dataclass(frozen=True)
class Known:
    """The samples that sampler and step are compared on, and what `ddpm sample` makes of them."""

    samples: np.ndarray
    context: np.ndarray | None
    null: np.ndarray | None
    guidance: float
    reference: np.ndarray


SEED = 7


def known_samples(run: Run, table: StepTable) -> Known:
    """The eager engine's samples of a table."""
    samples = np.arange(FIRST_SAMPLE, FIRST_SAMPLE + SAMPLES)
    shape = condition_shape(run.model)
    context = null = None
    if shape is not None:
        context = one_hot_conditions(run.model, -1 - torch.arange(SAMPLES)).numpy()
        null = null_of(run.model, shape)[None].repeat(SAMPLES, 0)
    guidance = 1.0 if context is None else GUIDANCE
    eager = Trajectory(run.model, run.schedule, table, engine="eager", guided=guidance != 1.0)
    with Bar("eager reference", len(table), "steps/s") as bar:
        images = eager(
            SAMPLES,
            None if context is None else torch.from_numpy(context),
            guidance,
            SEED,
            FIRST_SAMPLE,
            callback=lambda i, _: bar.update(i + 1),
        )
    return Known(samples, context, null, guidance, images.numpy())


def sampler_images(session: object, metadata: dict[str, object], known: Known, only: slice) -> np.ndarray:
    """What sampler.onnx makes of these samples of the trajectory."""
    context = None if known.context is None else known.context[only]
    return draw(session, metadata, known.samples[only], context, seed=SEED, guidance=known.guidance)


def sampler_parity(session: object, metadata: dict[str, object], known: Known) -> list[Parity]:
    """sampler.onnx against `ddpm sample`, and its last sample alone against the same drawn with others."""
    together = sampler_images(session, metadata, known, slice(None))
    alone = sampler_images(session, metadata, known, slice(-1, None))
    return [
        Parity("sampler.onnx, whole trajectory", distance(together, known.reference), SAMPLER_TOLERANCE),
        Parity("sampler.onnx, one sample alone", distance(alone, together[-1:]), DENOISER_TOLERANCE),
    ]


def step_images(session: object, rows: np.ndarray, known: Known) -> np.ndarray:
    """What step.onnx makes of the trajectory's samples in a plain loop, fed with its own outputs; NaN if it is lost."""
    shape = known.reference.shape[1:]
    x = normals(SEED, known.samples, 0, 0, shape)
    state = {"x": x, "x0_previous": np.zeros_like(x), "index": np.zeros(1, np.int64)}
    fixed = {}
    if known.context is not None:
        fixed["contexts"] = np.stack([known.context, known.null])
        fixed["guidance"] = np.array([known.guidance], np.float32)
    for i, row in enumerate(rows):
        z = normals(SEED, known.samples, int(row[7]), 1, shape) if row[6] != 0 else np.zeros_like(x)
        feeds = state | fixed | {"noise": z[None], "noise_start": np.array([i], np.int64)}
        state = dict(zip(("x", "x0_previous", "index"), session.run(None, feeds), strict=True))
    return state["x"] if state["index"][0] == len(rows) else np.full_like(x, np.nan)


def step_parity(session: object, rows: np.ndarray, known: Known) -> Parity:
    """step.onnx against `ddpm sample`."""
    error = distance(step_images(session, rows, known), known.reference)
    return Parity("step.onnx, whole trajectory", error, SAMPLER_TOLERANCE)
