"""Packages that only some commands need, and the extra of this distribution that brings each."""

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


def lacks(module: str) -> str:
    """What to do where an import of this module failed: one line."""
    package = module.partition(".")[0]
    if package not in EXTRAS:
        return f"{package} is not installed, needs pip install {package}"
    return f"{package} is not installed, needs pip install 'fused-ddpm[{EXTRAS[package]}]'"
