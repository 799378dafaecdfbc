"""The score, and the other things that a network may predict (`ddpm.predictions`), each from any other.

    score = grad log q(x) = -eps / sqrt(1 - alpha_bar)

It is exact for the expectations that networks learn (Tweedie's formula; Song et al. 2021, SDE, section 3.3).
"""

import torch
from torch import Tensor, nn

from ddpm.errors import check_choice, check_integer
from ddpm.networks.protocol import broadcast, in_type, network_times, rows_of_condition, sample_shape
from ddpm.predictions import eps_of, target_of, x0_of
from ddpm.schedule import NoiseSchedule
from ddpm.table import PREDICTIONS
from ddpm.trajectory import evaluating

KINDS = (*PREDICTIONS, "score")


def convert(value: Tensor, x: Tensor, alpha_bar: float | Tensor, source: str, target: str) -> Tensor:
    """What `value` is as another of KINDS.

    Args:
        value, x: [n, ...], the prediction and the noisy x that it was made of. alpha_bar: between 0 and 1, one or [n].
        source, target: of KINDS, `eps`, `v`, `x0` or `score`.

    Returns [n, ...] in value's dtype; factors are computed in float64. Raises ValueError naming the argument.
    """
    check_choice("source", source, KINDS)
    check_choice("target", target, KINDS)
    if value.shape != x.shape:
        raise ValueError(f"value: got shape {list(value.shape)}, needs that of x, {list(x.shape)}")
    a = torch.as_tensor(alpha_bar, dtype=torch.float64, device=x.device)
    if a.numel() != 1 and tuple(a.shape) != x.shape[:1]:
        raise ValueError(f"alpha_bar: got shape {list(a.shape)}, needs a number or [{x.shape[0]}]")
    if not bool(((a > 0) & (a < 1)).all()):
        raise ValueError(f"alpha_bar: got {a.flatten()[:4].tolist()}, needs numbers between 0 and 1")
    signal, noise = (broadcast(part, x) if part.ndim else part for part in (a.sqrt(), (1 - a).sqrt()))
    if source == target:
        return value
    given, state = value.to(torch.float64), x.to(torch.float64)
    if source == "score":
        source, given = "eps", -noise * given
    parts = signal, noise
    eps, x0 = eps_of(source, state, given, *parts), x0_of(source, state, given, *parts)
    found = -eps / noise if target == "score" else target_of(target, x0, eps, *parts)
    return found.to(value.dtype)


def score(
    model: nn.Module,
    schedule: NoiseSchedule,
    x: Tensor,
    t: int,
    context: Tensor | None = None,
    prediction: str = "eps",
) -> Tensor:
    """grad log q_t(x) as a network that was trained on this schedule knows it.

    x: [n, *sample_shape], noisy as at timestep t in 1..T, on the model's device. context: a condition for all or
    [n, ...]. prediction: what the network outputs. Returns [n, *sample_shape] in x's dtype. Raises ValueError.
    """
    check_integer("t", t, 1, schedule.timesteps)
    check_choice("prediction", prediction, PREDICTIONS)
    n = x.shape[0]
    if tuple(x.shape[1:]) != sample_shape(model):
        raise ValueError(f"x: got shape {list(x.shape)}, needs [n, {', '.join(map(str, sample_shape(model)))}]")
    times = in_type(network_times(model, torch.full((n,), t, device="cpu"), schedule.timesteps), x.dtype).to(x.device)
    conditions = rows_of_condition(model, context, n, x.device)
    with torch.no_grad():
        output = evaluating(model, model, x, times, conditions)
    return convert(output, x, float(schedule.alpha_bars[t]), prediction, "score")
