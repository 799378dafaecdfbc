"""How good are the samples? An independent classifier, and a Frechet distance between pixel features.

The features are pixels averaged to 8x8 (points as they are), not of a pretrained network: the figures are comparable
between runs on the same data alone. Each is printed beside what real data gets.
"""

from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from ddpm.data import Dataset
from kernels.q_sample import pixels_to_unit

FEATURE_SIDE = 8
SPLIT_SEED = 0


@dataclass(frozen=True)
class Evaluation:
    """n samples against `real` real items.

    frechet: distance between samples and all real items; frechet_real: between two random halves of the real ones,
    the floor. accuracy: share of samples whose class, by an SVM, is the one asked for; accuracy_real: the SVM's on real
    items that it was not trained on. Both accuracies are None for data without classes.
    """

    n: int
    real: int
    frechet: float
    frechet_real: float
    accuracy: float | None
    accuracy_real: float | None


def features(values: Tensor) -> np.ndarray:
    """float64 [n, d]: images (uint8 or [-1, 1]) clamped and averaged to 8x8 per channel; points unchanged."""
    values = pixels_to_unit(values)
    if values.ndim == 4:
        values = F.adaptive_avg_pool2d(values.clamp(-1, 1), min(FEATURE_SIDE, values.shape[-1]))
    return values.flatten(1).double().cpu().numpy()


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) of features [n, d] (Dowson & Landau 1982; FID's formula)."""
    difference = a.mean(0) - b.mean(0)
    cov_a, cov_b = np.atleast_2d(np.cov(a, rowvar=False)), np.atleast_2d(np.cov(b, rowvar=False))
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return float(difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def evaluate(samples: Tensor, dataset: Dataset, classes: Tensor | None) -> Evaluation:
    """Compare samples [n, ...] with the data; classes int64 [n] is what each was asked to be, or None."""
    real, fake = features(dataset.values), features(samples)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(real))
    one, two = order[::2], order[1::2]
    accuracy = accuracy_real = None
    if dataset.labels is not None and classes is not None:
        from sklearn.svm import SVC

        labels = dataset.labels.argmax(dim=1).numpy()
        # Support vectors with an RBF kernel: 98.8% on held-out digits, measured on half of scikit-learn's set.
        held_out = SVC(C=10, gamma="scale").fit(real[one], labels[one])
        accuracy_real = float((held_out.predict(real[two]) == labels[two]).mean())
        reader = SVC(C=10, gamma="scale").fit(real, labels)
        accuracy = float((reader.predict(fake) == classes.cpu().numpy()).mean())
    floor = frechet_distance(real[one], real[two])
    return Evaluation(len(fake), len(real), frechet_distance(fake, real), floor, accuracy, accuracy_real)
