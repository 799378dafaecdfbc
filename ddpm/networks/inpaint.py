"""Inpaint: a network that knows some pixels, so that any solver, engine and export fills in the others."""

import torch
from torch import Tensor, nn

from ddpm.networks.protocol import broadcast, predict, recalls, sample_shape
from ddpm.schedule import NoiseSchedule
from ddpm.solvers import ALPHA_BAR_MIN, to_x0


class Known(nn.Module):
    """What a network predicts at pixels that are known: the m with c0 x + c1 m = known, see `ddpm.solvers`."""

    def __init__(self, known: Tensor, keep: Tensor, schedule: NoiseSchedule, prediction: str, time: str) -> None:
        super().__init__()
        self.timesteps, self.time = schedule.timesteps, time
        pairs = [to_x0(prediction, a) for a in schedule.alpha_bars[1:].clamp(min=ALPHA_BAR_MIN).tolist()]
        of_x, of_known = torch.tensor([(-c0 / c1, 1 / c1) for c0, c1 in pairs], dtype=torch.float64, device="cpu").T
        held = {"known": known.detach(), "of_x": of_x, "of_known": of_known}
        for name, value in held.items():
            self.register_buffer(name, value.to(known.device, torch.float32), persistent=False)
        self.register_buffer("keep", keep.to(known.device).expand(known.shape).clone(), persistent=False)

    def factors(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(of x, of known), float32 [n], at times [n] as networks get them."""
        index = t if self.time == "index" else (t * self.timesteps).round().to(torch.int64) - 1
        return self.of_x[index], self.of_known[index]

    def forward(self, m: Tensor, x: Tensor, of_x: Tensor, of_known: Tensor) -> Tensor:
        """m [.., n, *sample_shape], what is known in its place, in the wider type; x [n, ...]; factors [n] or [1]."""
        there = broadcast(of_x, x) * x + broadcast(of_known, x) * self.known
        return torch.where(self.keep, there, m.to(there.dtype))


def check_keep(name: str, keep: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError, which begins with the name, unless it says of some pixels, but not of all, that they stay."""
    sizes = zip(reversed(keep.shape), reversed(shape), strict=False)
    if keep.ndim > len(shape) or any(size not in (1, whole) for size, whole in sizes):
        raise ValueError(f"{name}: got shape {list(keep.shape)}, needs {list(shape)}, or what broadcasts to it")
    if not bool(keep.any()) or bool(keep.all()):
        all_or_none = "every" if bool(keep.any()) else "no"
        raise ValueError(f"{name}: {all_or_none} pixel is known, needs some that are and some that are not")


class Inpaint(nn.Module):
    """A network whose x0 is `known` where `keep` is true; elsewhere it is the network's own.

    Every solver's rows carry known pixels to each timestep by themselves, and ancestral ones noise them anew (RePaint,
    Lugmayr et al. 2022).

    network: see `ddpm.networks.protocol`. schedule: the one it was trained with. known: [*sample_shape], in [-1, 1].
    keep: bool, of that shape or broadcast to it. prediction: what the network outputs. Raises ValueError.
    """

    continuous_time = False

    def __init__(
        self, network: nn.Module, schedule: NoiseSchedule, known: Tensor, keep: Tensor, prediction: str = "eps"
    ) -> None:
        super().__init__()
        shape = sample_shape(network)
        if tuple(known.shape) != shape or not known.is_floating_point() or not bool(known.isfinite().all()):
            raise ValueError(f"known: got {known.dtype} {list(known.shape)}, needs finite numbers {list(shape)}")
        if keep.dtype != torch.bool:
            raise ValueError(f"keep: got {keep.dtype}, needs bool")
        check_keep("keep", keep, shape)
        self.network, self.sample_shape = network, shape
        # What the network does not state, this does not either.
        if hasattr(network, "condition_shape"):
            self.condition_shape = network.condition_shape
        if hasattr(network, "null_condition"):
            self.null_condition = network.null_condition
        self.time, self.self_condition = getattr(network, "time", "fraction"), recalls(network)
        here = known.to(next(network.parameters(), known).device)
        self.given = Known(here, keep, schedule, prediction, self.time)

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None, *recalled: Tensor) -> Tensor:
        """As the network's, of the same shapes."""
        return self.given(predict(self.network, x, t, c, *recalled), x, *self.given.factors(t)).to(x.dtype)
