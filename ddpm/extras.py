"""Packages that only some commands need, and the extra of this distribution that brings each."""

from importlib.util import find_spec

EXTRAS = {
    "PIL": "pictures",
    "matplotlib": "pictures",
    "sklearn": "train",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "onnx",
    "diffusers": "diffusers",
    "openvino": "peers",
}
POSIX = ("fcntl", "resource")  # Python's own, without Windows


def lacks(module: str, extra: str | None = None) -> str:
    """What to do where this module cannot be imported, in one line. extra: the one to name, if not its own."""
    package = module.partition(".")[0]
    if package in POSIX:
        return f"{package} is a part of Python on Linux and macOS only, needs one of them (or WSL)"
    extra = extra or EXTRAS.get(package)
    return f"{package} is not installed, needs: pip install " + (f"'fused-ddpm[{extra}]'" if extra else package)


def need(*modules: str, extra: str | None = None) -> None:
    """Raise ModuleNotFoundError, before any work is done, if one of these is not installed."""
    for module in modules:
        if find_spec(module) is None:
            raise ModuleNotFoundError(lacks(module, extra), name=module)
