"""What an engine is: a way to run a table. One file, one class under `@engine`, and every command knows it by its name.

name                              for --engine
lacks(device, dtype, ...)         why it cannot run there, or None
Engine(model, count, table, dtype, form)
engine(x_T, samples, context, guidance, noise, callback, negative, rescale) -> x_0
refresh(model)                    take over the model's present weights

A subclass states the first two and overrides `prepare`, `run` and `refresh`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ddpm.errors import register
from ddpm.inference import Form, make_form
from ddpm.networks.protocol import broadcast, network_times, recalls
from ddpm.noise import Noise
from ddpm.table import StepTable
from kernels.guidance_rescale import reference as rescaled
from kernels.solver_step import guide

Callback = Callable[[int, Tensor], None]
FormOf = Callable[..., Form]  # (model, dtype), and layout=

ENGINES: dict[str, type["Engine"]] = {}


def engine(kind: type["Engine"]) -> type["Engine"]:
    """Register an engine's class under its `name`."""
    return register(ENGINES, kind.name, "engine")(kind)


@dataclass(frozen=True, eq=False)
class Chunk:
    """Samples that run together, x [n, ...] at timesteps[0], which stays as it is; callback(i, x0) after every row."""

    x: Tensor
    samples: Tensor  # int64 [n], global indices
    context: Tensor | None  # [n, ...]
    guidance: float | Tensor  # 1 = none; or float64 [n] on the CPU
    noise: Noise
    callback: Callback | None = None
    negative: Tensor | None = None  # [n, ...], instead of the null condition
    rescale: float | None = None  # phi of `kernels.guidance_rescale`

    @property
    def guided(self) -> bool:
        """Whether there is a condition to guide towards, and a weight that is not 1."""
        return self.context is not None and guides(self.guidance)


def only_counts(callback: Callback) -> bool:
    """Whether it has an attribute `only_counts` that is true: an engine may call it for the last of several rows that
    are done, and with None for x0."""
    return getattr(callback, "only_counts", False)


def guides(guidance: float | Tensor) -> bool:
    """Whether any weight is not 1, which is no guidance."""
    return bool((guidance != 1.0).any()) if isinstance(guidance, Tensor) else guidance != 1.0


def shaped(weight: float | Tensor, x: Tensor) -> float | Tensor:
    """A row's weight as `guided` takes it: one a sample as [n, 1, ...] in the type of x, where that is."""
    return broadcast(weight.to(x), x) if isinstance(weight, Tensor) else weight


def guided(m: Tensor, m_uncond: Tensor, guidance: float | Tensor, rescale: float | Tensor | None) -> Tensor:
    """Guidance, rescaled if it shall be. guidance: a number, or [n, 1, ...]."""
    return guide(m, m_uncond, guidance) if rescale is None else rescaled(m, m_uncond, guidance, rescale)


class Engine:
    """Prepared for a model on its device, T of its schedule and a table, called once per chunk.

    dtype: what the network computes in. form: how to come by the form that is run, for engines that run one.
    live: whether it runs the module itself, in the mode and with the weights that this has at the time.
    in_operators: whether it takes only forms that are written in operators alone, see `Form`.
    """

    name: ClassVar[str]
    in_operators: ClassVar[bool] = False
    live: bool = False

    def __init__(
        self, model: nn.Module, count: int, table: StepTable, dtype: torch.dtype, form: FormOf = make_form
    ) -> None:
        self.count, self.table, self.dtype = count, table, dtype
        self.recalls = recalls(model)  # the network itself reads the x0 before it
        self.noisy, self.memory = table.noisy, table.has_memory or self.recalls
        self.times = network_times(model, table.timesteps, count)
        self.prepare(model, form)

    @classmethod
    def lacks(cls, device: torch.device, dtype: torch.dtype = torch.float32, custom_noise: bool = False) -> str | None:
        """What it lacks to run there in a type, with a noise of the caller's own or with Philox; None if nothing."""
        return None

    def __call__(self, *parts: Any) -> Tensor:
        """The fields of a `Chunk` -> x [n, ...] at 0."""
        return self.run(Chunk(*parts))

    def weights(self, chunk: Chunk) -> Tensor:
        """Guidance of every row in the state's type, where it is: [S], or [S, n] with one a sample."""
        weights = self.table.weights_of_guidance(chunk.guidance)
        if isinstance(chunk.guidance, Tensor):
            return torch.stack(weights).to(chunk.x)
        return torch.tensor(weights, dtype=torch.float64, device="cpu").to(chunk.x)

    def prepare(self, model: nn.Module, form: FormOf) -> None:
        """What is done once, before the first chunk."""
        self.refresh(model)

    def run(self, chunk: Chunk) -> Tensor:
        """The whole table on a chunk."""
        raise NotImplementedError

    def refresh(self, model: nn.Module) -> None:
        """Nothing where the module itself is run."""
