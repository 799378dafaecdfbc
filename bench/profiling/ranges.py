"""Named ranges in a profile: around every module of a network and around an engine's calls.

`module:PATH|CLASS` is a module's forward (the root's PATH is empty). An engine whose network is not called module by
module may emit ranges named like PARTS itself; they are read the same way.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.profiler import record_function

from ddpm.noise import PhiloxNoise

MODULE = "module:"
STEP, WARM_UP = "step ", "warm-up "
PARTS = ("encoder", "bottleneck", "decoder", "head", "embeddings", "solver", "noise")
OTHER, GAPS = "other", "gaps"
AHEAD = "noise ahead"  # of several steps: what happens inside belongs to all of them, not to the step around it

# Part -> first component of a module's path, without its number, of the networks in ddpm/networks/ and of the inference
# form. What the root itself does (gates, concatenations) happens around the up stages.
COMPONENTS = {
    "encoder": ("init_conv", "down", "inp", "initial", "shortcut", "downs"),
    "bottleneck": ("to_vec", "up0", "bottleneck"),
    "decoder": ("up", "blocks", "upsamplings", "ups", ""),
    "head": ("out", "head", "normalisation", "last"),
    "embeddings": ("timeembed", "contextembed", "embed", "embeddings"),
}
PART_OF = {component: part for part, components in COMPONENTS.items() for component in components}
# Operators of the inference form, for compiled code, which has no modules.
OPERATORS = {"fused_ddpm::bottleneck": "bottleneck", "fused_ddpm::group_norm_relu": "head"}


def part_of(path: str) -> str:
    """The part that a module belongs to; `other` for a network that is not known here."""
    first = path.split(".", 1)[0]
    return PART_OF.get(first) or PART_OF.get(first.rstrip("0123456789"), OTHER)


@contextmanager
def module_ranges(model: nn.Module) -> Iterator[None]:
    """While open, the forward of every module of the model is a range."""
    opened: list[record_function] = []

    def enter(name: str) -> None:
        opened.append(record_function(name))
        opened[-1].__enter__()

    handles = []
    for path, module in model.named_modules():
        name = f"{MODULE}{path}|{type(module).__name__}"
        handles += [
            module.register_forward_pre_hook(lambda *_, name=name: enter(name)),
            module.register_forward_hook(lambda *_: opened.pop().__exit__(None, None, None), always_call=True),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class RangedNoise(PhiloxNoise):
    """The same noise, each draw of it a range. ahead: (steps, seconds) of every draw for several steps at once."""

    ahead: list[tuple[int, float]] = field(default_factory=list)

    def __call__(self, samples: Tensor, step: int | Tensor, stream: int, shape: tuple[int, ...]) -> Tensor:
        steps = step.unique().numel() if isinstance(step, Tensor) else 1
        began = time.perf_counter()
        with record_function("noise" if steps == 1 else AHEAD):
            drawn = super().__call__(samples, step, stream, shape)
        if steps > 1:
            self.ahead.append((steps, time.perf_counter() - began))
        return drawn
