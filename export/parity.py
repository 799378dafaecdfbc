"""Does what was exported compute what the run computes? Measured as max|difference| / max(1, max|reference|)."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from ddpm.errors import WorkFailed
from ddpm.networks import ContextUnet
from ddpm.progress import Bar
from ddpm.runs import Run
from ddpm.sampling import sample
from export.run import draw, normals

DENOISER_TOLERANCE, SAMPLER_TOLERANCE = 1e-5, 1e-4
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


def distance(found: np.ndarray, reference: np.ndarray) -> float:
    """max|difference| / max(1, max|reference|); infinite for another shape or NaN."""
    if found.shape != reference.shape or not np.isfinite(found).all():
        return float("inf")
    found, reference = found.astype(np.float64), reference.astype(np.float64)
    return float(np.abs(found - reference).max() / max(1.0, np.abs(reference).max()))


def require(results: list[Parity]) -> None:
    """Raise WorkFailed naming the worst of the comparisons that failed."""
    failed = [result for result in results if not result.good]
    if failed:
        worst = max(failed, key=lambda result: result.error / result.tolerance)
        raise WorkFailed(
            f"parity: {worst.name} is off by {worst.error:.2g}, needs {worst.tolerance:.0e} "
            f"({len(failed)} of {len(results)} comparisons failed); the files that were there stay"
        )


def denoiser_cases(model: ContextUnet, timesteps: int) -> Iterator[tuple[str, Tensor, Tensor, Tensor | None]]:
    """(name, x, t, c): batches 1, 2, 5; t at both ends, and mixed; contexts zero, one-hot and random."""
    generator = torch.Generator().manual_seed(CASE_SEED)
    for n, end, kind in product(BATCHES, ("first", "last", "mixed"), CONTEXTS if model.n_cfeat else CONTEXTS[:1]):
        x = torch.randn(n, *model.sample_shape, generator=generator)
        low, high = 1 / timesteps, 1.0
        t = {"first": torch.full((n,), low), "last": torch.full((n,), high), "mixed": torch.linspace(low, high, n)}[end]
        c = None
        if model.n_cfeat:
            c = torch.zeros(n, model.n_cfeat)
            if kind == "one-hot":
                c = torch.eye(model.n_cfeat)[torch.arange(n) % model.n_cfeat]
            elif kind == "random":
                c = torch.randn(n, model.n_cfeat, generator=generator)
        yield f"batch {n}, t {end}, context {kind}", x, t, c


def denoiser_parity(name: str, denoise: Denoise, run: Run) -> Parity:
    """The worst case of `denoise` against the run's own module."""
    worst = 0.0
    with torch.no_grad():
        for _, x, t, c in denoiser_cases(run.model, run.schedule.timesteps):
            worst = max(worst, distance(denoise(x, t, c), run.model(x, t, c).numpy()))
    return Parity(name, worst, DENOISER_TOLERANCE)


def session_denoiser(session: object) -> Denoise:
    """A denoiser.onnx session as a function."""

    def denoise(x: Tensor, t: Tensor, c: Tensor | None) -> np.ndarray:
        feeds = {"x": x.numpy(), "t": t.numpy()} | ({} if c is None else {"context": c.numpy()})
        return session.run(["m"], feeds)[0]

    return denoise


@dataclass(frozen=True)
class Trajectory:
    """The samples that sampler and step are compared on, and what `ddpm sample` makes of them."""

    samples: np.ndarray
    context: np.ndarray | None
    guidance: float
    reference: np.ndarray


SEED = 7


def trajectory(run: Run, options: dict[str, object], steps: int) -> Trajectory:
    """The eager engine's samples with these options of `ddpm.sample`."""
    samples = np.arange(FIRST_SAMPLE, FIRST_SAMPLE + SAMPLES)
    classes = run.model.n_cfeat
    context = np.eye(classes, dtype=np.float32)[-1 - np.arange(SAMPLES) % classes] if classes else None
    guidance = GUIDANCE if classes else 1.0
    with Bar("eager reference", steps, "steps/s") as bar:
        images = sample(
            run.model,
            run.schedule,
            SAMPLES,
            context=None if context is None else torch.from_numpy(context),
            guidance=guidance,
            seed=SEED,
            first_sample=FIRST_SAMPLE,
            engine="eager",
            callback=lambda i, _: bar.update(i + 1),
            **options,
        )
    return Trajectory(samples, context, guidance, images.numpy())


def sampler_images(session: object, metadata: dict[str, object], known: Trajectory, only: slice) -> np.ndarray:
    """What sampler.onnx makes of these samples of the trajectory."""
    context = None if known.context is None else known.context[only]
    return draw(session, metadata, known.samples[only], context, seed=SEED, guidance=known.guidance)


def sampler_parity(session: object, metadata: dict[str, object], known: Trajectory) -> list[Parity]:
    """sampler.onnx against `ddpm sample`, and its last sample alone against the same drawn with others."""
    together = sampler_images(session, metadata, known, slice(None))
    alone = sampler_images(session, metadata, known, slice(-1, None))
    return [
        Parity("sampler.onnx, whole trajectory", distance(together, known.reference), SAMPLER_TOLERANCE),
        Parity("sampler.onnx, one sample alone", distance(alone, together[-1:]), DENOISER_TOLERANCE),
    ]


def step_images(session: object, rows: np.ndarray, known: Trajectory) -> np.ndarray:
    """What step.onnx makes of the trajectory's samples in a plain loop, fed with its own outputs; NaN if it is lost."""
    shape = known.reference.shape[1:]
    x = normals(SEED, known.samples, 0, 0, shape)
    state = {"x": x, "x0_previous": np.zeros_like(x), "index": np.zeros(1, np.int64)}
    fixed = {}
    if known.context is not None:
        fixed["contexts"] = np.stack([known.context, np.zeros_like(known.context)])
        fixed["guidance"] = np.array([known.guidance], np.float32)
    for i, row in enumerate(rows):
        z = normals(SEED, known.samples, int(row[7]), 1, shape) if row[6] != 0 else np.zeros_like(x)
        feeds = state | fixed | {"noise": z[None], "noise_start": np.array([i], np.int64)}
        state = dict(zip(("x", "x0_previous", "index"), session.run(None, feeds), strict=True))
    return state["x"] if state["index"][0] == len(rows) else np.full_like(x, np.nan)


def step_parity(session: object, rows: np.ndarray, known: Trajectory) -> Parity:
    """step.onnx against `ddpm sample`."""
    error = distance(step_images(session, rows, known), known.reference)
    return Parity("step.onnx, whole trajectory", error, SAMPLER_TOLERANCE)
