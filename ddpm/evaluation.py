"""How good are the samples? An independent classifier, and a Frechet distance between pixel features.

The features are pixels averaged to 8x8 (points as they are), not of a pretrained network: the figures are comparable
between runs on the same data alone. Each is printed beside what real data gets.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm.data import Dataset
from ddpm.errors import BadInput, WorkFailed
from ddpm.progress import Bar
from kernels.q_sample import pixels_to_unit

FEATURE_SIDE = 8
SPLIT_SEED = 0
LEAST = 4  # real items: two in each half, for a covariance
# Real items that the classifier learns from, and that it is tried on: its time grows with their square. Of 16,000 32x32
# pictures it took 108 s of processor time with all, 2.7 s with 3,000 (one thread of a Xeon at 2.5 GHz).
LEARNED_MAX = 4000
CHUNK = 1024  # images whose features are made at a time; untuned


@dataclass(frozen=True)
class Evaluation:
    """n samples against `real` real items.

    frechet: distance between samples and all real items; frechet_real: between two random halves of the real ones,
    the floor. accuracy: of the samples that were asked to be of a class that the data have, the share whose class, by
    an SVM, is that; accuracy_real: the SVM's on real items that it was not trained on. It learns from at most
    LEARNED_MAX items, drawn at random. Both accuracies are None for data without classes. energy: distance between
    samples and held-out items; energy_real: between the real and the held-out ones. None without such.
    """

    n: int
    real: int
    frechet: float
    frechet_real: float
    accuracy: float | None
    accuracy_real: float | None
    energy: float | None = None
    energy_real: float | None = None


def features(values: Tensor) -> np.ndarray:
    """float64 [n, d]: images (uint8 or [-1, 1]) clamped and averaged to 8x8 per channel; points unchanged.

    Colours weigh by the fourth channel, opacity: what is not seen counts for nothing.
    """

    def of(part: Tensor) -> Tensor:
        part = pixels_to_unit(part)
        if part.ndim == 4:
            part = part.clamp(-1, 1)
            if part.shape[1] == 4:
                part = torch.cat(((part[:, :3] + 1) * (part[:, 3:] + 1) / 2 - 1, part[:, 3:]), dim=1)
            part = F.adaptive_avg_pool2d(part, [min(FEATURE_SIDE, side) for side in part.shape[2:]])
        return part.flatten(1).double().cpu()

    return torch.cat([of(part) for part in values.split(CHUNK)]).numpy()


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) of features [n, d] (Dowson & Landau 1982; FID's formula)."""
    difference = a.mean(0) - b.mean(0)
    cov_a, cov_b = np.atleast_2d(np.cov(a, rowvar=False)), np.atleast_2d(np.cov(b, rowvar=False))
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return float(difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def energy_distance(a: np.ndarray, b: np.ndarray) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| of points [n, d] and [m, d] (Szekely & Rizzo 2013), without each with itself.

    0 for equal distributions, larger for others: also where means and covariances, which Frechet's has, are equal.
    """

    def mean(one: np.ndarray, other: np.ndarray) -> float:
        first, second = torch.from_numpy(one), torch.from_numpy(other)
        pairs = len(one) * (len(one) - 1) if one is other else len(one) * len(other)
        exact = partial(torch.cdist, x2=second, compute_mode="donot_use_mm_for_euclid_dist")
        return sum(float(exact(part).sum()) for part in first.split(CHUNK)) / pairs

    return 2 * mean(a, b) - mean(a, a) - mean(b, b)


def evaluate(
    samples: Tensor, dataset: Dataset, classes: Tensor | None, quiet: bool = True, held_out: Tensor | None = None
) -> Evaluation:
    """Compare samples [n, ...] with the data; classes int64 [n] is what each was asked to be, or None.

    held_out: points [m, d] that nobody trained on, for the energy distance. quiet False shows a bar. Raises WorkFailed
    for samples that are not finite.
    """
    if not samples.isfinite().all():
        raise WorkFailed("the samples have NaN or infinite values: try less guidance or another solver")
    if len(dataset) < LEAST:
        raise BadInput(f"{dataset.name}: has {len(dataset)} items, evaluation needs at least {LEAST}")
    by_class = classes is not None and dataset.has_classes
    with Bar("evaluate", 5 if by_class else 3, "steps/s", quiet=quiet) as bar:
        real, fake = features(dataset.values), features(samples)
        bar.update(1)
        order = np.random.default_rng(SPLIT_SEED).permutation(len(real))
        one, two = order[::2], order[1::2]
        floor = frechet_distance(real[one], real[two])
        bar.update(2)
        distance = frechet_distance(fake, real)
        bar.update(3)
        accuracy = accuracy_real = None
        if by_class:
            asked, labels = classes.cpu().numpy(), dataset.labels.argmax(dim=1).numpy()
            counted = np.isin(asked, labels)
            one, two = one[:LEARNED_MAX], two[:LEARNED_MAX]
            accuracy_real = _accuracy(real[one], labels[one], real[two], labels[two])
            bar.update(4)
            if counted.any():
                learned = np.sort(order[:LEARNED_MAX])
                accuracy = _accuracy(real[learned], labels[learned], fake[counted], asked[counted])
            bar.update(5)
        energy = energy_real = None
        if held_out is not None:
            others = features(held_out)
            energy, energy_real = energy_distance(fake, others), energy_distance(real, others)
    return Evaluation(len(fake), len(real), distance, floor, accuracy, accuracy_real, energy, energy_real)


def _accuracy(known: np.ndarray, labels: np.ndarray, values: np.ndarray, expected: np.ndarray) -> float:
    """Share of values [n, d] whose class, by an SVM that learned the known ones, is the expected one."""
    from sklearn.svm import SVC

    if len(np.unique(labels)) < 2:
        return float((expected == labels[0]).mean())
    # Support vectors with an RBF kernel: 98.8% on held-out digits, measured on half of scikit-learn's set.
    read = SVC(C=10, gamma="scale").fit(known, labels).predict(values)
    return float((read == expected).mean())
