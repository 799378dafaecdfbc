"""Named ranges in a profile: around every module of a network and around an engine's calls.

`module:PATH|CLASS` is a module's forward (the root's PATH is empty). An engine whose network is not called module by
module may emit ranges named like PARTS itself; they are read the same way.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.profiler import record_function

from ddpm.noise import PhiloxNoise

MODULE = "module:"
STEP, WARM_UP = "step ", "warm-up "
PARTS = ("encoder", "bottleneck", "decoder", "head", "embeddings", "solver", "noise")
OTHER, GAPS = "other", "gaps"

# The first component of a module's path, without its number, of the networks in ddpm/networks/ and of the inference
# form. What the root itself does (gates, concatenations) happens around the up stages.
COMPONENTS = {
    "init_conv": "encoder",
    "down": "encoder",
    "to_vec": "bottleneck",
    "up0": "bottleneck",
    "up": "decoder",
    "out": "head",
    "timeembed": "embeddings",
    "contextembed": "embeddings",
    "inp": "encoder",
    "embed": "embeddings",
    "blocks": "decoder",
    "initial": "encoder",
    "shortcut": "encoder",
    "downs": "encoder",
    "upsamplings": "decoder",
    "ups": "decoder",
    "bottleneck": "bottleneck",
    "head": "head",
    "normalisation": "head",
    "last": "head",
    "embeddings": "embeddings",
    "": "decoder",
}
# Operators of the inference form, for compiled code, which has no modules.
OPERATORS = {"fused_ddpm::bottleneck": "bottleneck", "fused_ddpm::group_norm_relu": "head"}


def part_of(path: str) -> str:
    """The part that a module belongs to; `other` for a network that is not known here."""
    first = path.split(".", 1)[0]
    return COMPONENTS.get(first) or COMPONENTS.get(re.sub(r"\d+$", "", first), OTHER)


@contextmanager
def module_ranges(model: nn.Module) -> Iterator[None]:
    """While open, the forward of every module of the model is a range."""
    opened: list[record_function] = []

    def hooks(name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(module: nn.Module, arguments: Any) -> None:
            opened.append(record_function(name))
            opened[-1].__enter__()

        def after(module: nn.Module, arguments: Any, output: Any) -> None:
            opened.pop().__exit__(None, None, None)

        return before, after

    handles = []
    for path, module in model.named_modules():
        before, after = hooks(f"{MODULE}{path}|{type(module).__name__}")
        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class RangedNoise(PhiloxNoise):
    """The same noise, each draw of it a range."""

    def __call__(self, samples: Tensor, step: int | Tensor, stream: int, shape: tuple[int, ...]) -> Tensor:
        with record_function("noise"):
            return super().__call__(samples, step, stream, shape)
