"""denoising_diffusion_pytorch itself, which suite `peers` and tests run beside ours: whether it is here, its import."""

import importlib
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch

NAME = "denoising_diffusion_pytorch"
NEEDS = (NAME, "torchvision", "einops", "ema_pytorch", "accelerate", "pytorch_fid")
_operators: list[torch.library.Library] = []


def missing() -> str | None:
    """What is not installed of it, or None. docs/contributing.md says how it is installed."""
    return next((name for name in NEEDS if find_spec(name) is None), None)


def load() -> ModuleType:
    """The library. torchvision's wheel is built for CUDA, without whose operators its import fails: they get names."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        text = (Path(find_spec("torchvision").origin).parent / "_meta_registrations.py").read_text("utf-8")
        _operators.append(torch.library.Library("torchvision", "DEF"))
        for name in sorted(set(re.findall(r'(?:torchvision::|register_meta\(")(\w+)"', text))):
            _operators[0].define(f"{name}() -> ()")
    return importlib.import_module(NAME)
