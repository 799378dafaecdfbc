"""What a network may predict, each from any other: of floats, arrays and tensors alike.

    x = signal x0 + noise eps           signal = sqrt(a), noise = sqrt(1 - a), a = alpha_bar
    v = signal eps - noise x0           (Salimans & Ho 2022, section 4)

m is the network's output, `prediction` what it predicts, eps, v or x0.
"""

from typing import Any


def x0_of(prediction: str, x: Any, m: Any, signal: Any, noise: Any) -> Any:
    """x0 of x and m; of v without a division by the signal, which may be small."""
    if prediction == "x0":
        return m
    return signal * x - noise * m if prediction == "v" else (x - noise * m) / signal


def eps_of(prediction: str, x: Any, m: Any, signal: Any, noise: Any) -> Any:
    """eps of x and m."""
    if prediction == "eps":
        return m
    return noise * x + signal * m if prediction == "v" else (x - signal * m) / noise


def target_of(prediction: str, x0: Any, eps: Any, signal: Any, noise: Any) -> Any:
    """m of x0 and eps, what the network shall output."""
    if prediction == "eps":
        return eps
    return x0 if prediction == "x0" else signal * eps - noise * x0
