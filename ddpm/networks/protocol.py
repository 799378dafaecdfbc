"""What a network states of itself, and the only places that act on it.

    sample_shape       of one sample: (3, 16, 16), (2,), ...
    condition_shape    of one condition: (classes,), (tokens, width), ..., or None; unstated: whatever is given
    time               what forward gets: "fraction", t / T as a float in (0, 1] (unstated: this), or "index", t - 1 as
                       int64, what other libraries' networks take
    continuous_time    False where only whole steps have an embedding; unstated: True
    self_condition     True where forward takes a fourth argument, x0_previous [n, *sample_shape] or None = zeros: the
                       estimate of x0 in the row before; unstated: False
    null_condition(n)  [n, *condition_shape] of "no condition"; unstated: zeros
    config()           the arguments that build it again
    for_data(shape, classes, n_feat)   classmethod: the network for samples of this shape, for `ddpm train`, whose
                       options of its own are further arguments with defaults
    forward(x, t, c)   x [n, *sample_shape], t [n], c [n, *condition_shape] or None = no condition -> x's shape

A module with `sample_shape` alone samples, compiles and exports; a run folder also needs a name, config and for_data.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ddpm.errors import check_choice, register

NETWORKS: dict[str, type[nn.Module]] = {}
TIMES = ("fraction", "index")
FORMER_NAMES = {"point_mlp": "mlp"}  # what config.json said before format 2


def network(name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register a class under the name that config.json shall hold. Raises ValueError if another class has it."""
    return register(NETWORKS, name, "network")


def name_of(model: nn.Module) -> str:
    """The name of a network's class. Raises ValueError for a class that has none."""
    name = next((name for name, kind in NETWORKS.items() if kind is type(model)), None)
    if name is None:
        raise ValueError(f"network: {type(model).__name__} has no name, needs @ddpm.networks.network(...) on its class")
    return name


def _class_of(name: str) -> type[nn.Module]:
    name = FORMER_NAMES.get(name, name)
    check_choice("network", name, NETWORKS)
    return NETWORKS[name]


def build_network(name: str, config: Mapping[str, object]) -> nn.Module:
    """The network that `config()` described. Raises ValueError for an unknown name or arguments that do not fit."""
    kind = _class_of(name)
    try:
        return kind(**config)
    except TypeError as error:
        raise ValueError(f"network {name}: {error}") from error


def own_options(kind: type[nn.Module]) -> tuple[str, ...]:
    """What its for_data takes beyond shape, classes and n_feat."""
    return tuple(inspect.signature(kind.for_data).parameters)[3:] if hasattr(kind, "for_data") else ()


def network_for(name: str | None, shape: tuple[int, ...], classes: int, n_feat: int, **own: object) -> nn.Module:
    """A fresh network for data of this shape; None takes the usual one. own: see `own_options`.

    Raises ValueError if it is for other data or does not take an option.
    """
    name = name or ("mlp" if len(shape) == 1 else "context_unet")
    kind = _class_of(name)
    if not hasattr(kind, "for_data"):
        raise ValueError(f"network: {name!r} cannot be made for data, needs a classmethod for_data")
    for option, value in own.items():
        if option not in own_options(kind):
            takes = " and ".join(other for other, each in NETWORKS.items() if option in own_options(each))
            raise ValueError(f"{option}: got {value}, but network {name} does not take it, needs {takes}")
    made = kind.for_data(shape, classes, n_feat, **own)
    if tuple(made.sample_shape) != tuple(shape):
        raise ValueError(f"network: {name!r} is for samples {list(made.sample_shape)}, the data have {list(shape)}")
    return made


class ZeroIsNone(nn.Module):
    """The base of networks to which zeros are no condition. A subclass sets `condition_shape`."""

    condition_shape: tuple[int, ...] | None

    def null_condition(self, n: int) -> Tensor:
        """Zeros [n, ...], made where the network is: a captured graph copies nothing from the host."""
        return torch.zeros(n, *(self.condition_shape or (0,)), device=next(self.parameters()).device)


def sample_shape(model: nn.Module) -> tuple[int, ...]:
    """Shape of one sample: the model's `sample_shape`, or (in_channels, height, height)."""
    if not hasattr(model, "sample_shape"):
        if hasattr(model, "in_channels") and hasattr(model, "height"):
            return model.in_channels, model.height, model.height
        raise TypeError(f"model: {type(model).__name__} needs an attribute sample_shape, or in_channels and height")
    return _shape(model, "sample_shape")


def condition_shape(model: nn.Module) -> tuple[int, ...] | None:
    """Shape of one condition; None for a network without one, or that does not say."""
    return None if getattr(model, "condition_shape", None) is None else _shape(model, "condition_shape")


def _shape(model: nn.Module, name: str) -> tuple[int, ...]:
    value = getattr(model, name)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{name}: got {value!r}, needs a tuple of sizes")
    return tuple(value)


def one_hot_conditions(model: nn.Module, numbers: Tensor) -> Tensor | None:
    """float32 [n, *condition_shape], a single 1 each, at numbers int64 [n] modulo its size; None: no condition."""
    shape = condition_shape(model)
    size = 0 if shape is None else math.prod(shape)
    return torch.eye(size, device=numbers.device)[numbers % size].reshape(len(numbers), *shape) if size else None


def network_times(model: nn.Module, timesteps: Tensor, count: int) -> Tensor:
    """What forward gets for timesteps in (0, T], count = T: t / T in float64, or t - 1 (float32 where fractional)."""
    kind = getattr(model, "time", "fraction")
    if kind not in TIMES:
        raise ValueError(f"time: {type(model).__name__} has {kind!r}, needs one of {', '.join(TIMES)}")
    fractional = timesteps.is_floating_point()
    if fractional and not getattr(model, "continuous_time", True):
        kind = type(model).__name__
        raise ValueError(f"timesteps: {kind} takes whole timesteps only, needs a table without fractions")
    if kind == "fraction":
        return timesteps.to(torch.float64) / count
    return (timesteps - 1).to(torch.float32) if fractional else timesteps - 1


def in_type(times: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What forward gets in a network of this type: fractions, which are float64, are cast, indices stay as they are."""
    return times.to(dtype) if times.dtype == torch.float64 else times


def null_condition(model: nn.Module, condition: Tensor) -> Tensor:
    """What stands for no condition, for as many rows as this one has, in its type: guidance's unconditional half."""
    if not hasattr(model, "null_condition"):
        return torch.zeros_like(condition)
    nothing = model.null_condition(condition.shape[0])
    if nothing.shape != condition.shape:
        raise ValueError(f"null_condition: returned {list(nothing.shape)}, needs {list(condition.shape)}")
    return nothing.to(condition)


def recalls(model: nn.Module) -> bool:
    """Whether the network takes the estimate of x0 that came before."""
    return bool(getattr(model, "self_condition", False))


def predict(model: nn.Module, x: Tensor, t: Tensor, c: Tensor | None, x0_previous: Tensor | None = None) -> Tensor:
    """The network's output; x0_previous reaches those that take it."""
    return model(x, t, c, x0_previous) if recalls(model) else model(x, t, c)


def broadcast(values: Tensor, like: Tensor) -> Tensor:
    """[n] -> [n, 1, ...] with as many dimensions as `like`."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def rows_of_condition(
    model: nn.Module, context: Tensor | None, n: int, device: torch.device, name: str = "context"
) -> Tensor | None:
    """float32 [n, *condition_shape] from one condition for all or one a row; None: none. Raises ValueError."""
    if context is None:
        return None
    context = torch.as_tensor(context, dtype=torch.float32, device=device)
    if not context.isfinite().all():
        raise ValueError(f"{name}: got NaN or infinite values, needs finite ones")
    if not hasattr(model, "condition_shape"):
        rows = context.expand(n, -1) if context.ndim == 1 else context
        if context.ndim < 1 or rows.shape[0] != n:
            needs = f"one vector or [{n}, ...], a row a sample"
            raise ValueError(f"{name}: got shape {list(context.shape)}, needs {needs}")
        return rows
    shape = condition_shape(model) or (0,)
    rows = context.expand(n, *shape) if tuple(context.shape) == shape else context
    if tuple(rows.shape) != (n, *shape):
        stated = "" if math.prod(shape) else ": this network has no condition"
        raise ValueError(f"{name}: got shape {list(context.shape)}, needs {[n, *shape]} or {list(shape)}{stated}")
    return rows if math.prod(shape) else None


def check_call(model: nn.Module, x: Tensor, t: Tensor, c: Tensor | None) -> Tensor:
    """What a network's forward asks of its arguments. Raises ValueError naming the argument.

    Returns t; one time for all rows, [1, 1, ..] with as many axes as x, [n] times.
    """
    shape, n = sample_shape(model), x.shape[0]
    if tuple(x.shape[1:]) != shape:
        raise ValueError(f"x: got shape {list(x.shape)}, needs [n, {', '.join(map(str, shape))}]")
    if tuple(t.shape) == (1,) * x.ndim:
        t = t.reshape(1).expand(n)
    if t.numel() != n:
        raise ValueError(f"t: got shape {list(t.shape)}, needs [{n}], one time per row of x")
    condition = condition_shape(model) or (0,)
    if c is not None and tuple(c.shape) != (n, *condition):
        raise ValueError(f"c: got shape {list(c.shape)}, needs {[n, *condition]}")
    return t


def check_state_dict(model: nn.Module, given: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless a state dict fits exactly, naming the first entry that does not."""
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in given:
            raise ValueError(f"has no entry {name!r}, the network needs {list(tensor.shape)}: from another network?")
        if given[name].shape != tensor.shape:
            raise ValueError(f"{name!r} is {list(given[name].shape)}, the network needs {list(tensor.shape)}")
        if given[name].is_floating_point() != tensor.is_floating_point():
            raise ValueError(f"{name!r} is {given[name].dtype}, the network needs {tensor.dtype}")
        value = given[name].to(tensor.dtype)
        if not value.isfinite().all():
            raise ValueError(f"{name!r} has NaN or infinite values, the network needs finite ones of {tensor.dtype}")
        if name.endswith("running_var") and (value < 0).any():
            raise ValueError(f"{name!r} has negative values, the network needs variances")
    extra = next((name for name in given if name not in own), None)
    if extra is not None:
        raise ValueError(f"has {extra!r}, which the network does not: from another network?")


def fit_state_dict(model: nn.Module, given: Mapping[str, Tensor]) -> None:
    """Load a state dict that must fit exactly; a network on the meta device takes over its tensors.

    Raises ValueError as `check_state_dict` does.
    """
    check_state_dict(model, given)
    own = model.state_dict()
    values = {name: given[name].to(tensor.dtype).contiguous() for name, tensor in own.items()}
    model.load_state_dict(values, assign=any(tensor.is_meta for tensor in own.values()))
