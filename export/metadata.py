"""What an exported file tells of itself: one JSON object, and what stands beside it in manifest.json."""

import hashlib
from importlib import metadata as packages
from pathlib import Path
from typing import Any

from ddpm.runs import MODEL, Run
from ddpm.solvers import StepTable
from export.run import FORMAT_VERSION

RNG = "Philox4x32-10 by the noise contract of fused-ddpm"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def versions() -> dict[str, str]:
    """Of what made the file; ONNX Runtime is whichever of its distributions is installed."""
    found = {}
    for name in ("fused-ddpm", "torch", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime"):
        try:
            found[name] = packages.version(name)
        except packages.PackageNotFoundError:
            continue
    return found


def describe_table(table: StepTable, options: dict[str, Any], rows: bool = False) -> dict[str, Any]:
    """A table by the options of `make_table` that make it; with `rows` also the numbers."""
    described = {"options": options, "steps": len(table), "clip": table.clip}
    return described | ({"rows": table.rows().tolist()} if rows else {})


def describe(run: Run, kind: str, precision: str, **more: Any) -> dict[str, Any]:
    """The metadata of a file of this kind (denoiser, sampler, step); `more` is added."""
    channels, height, width = run.model.sample_shape
    return {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "channels": channels,
        "height": height,
        "width": width,
        "value_range": [-1, 1],
        "clamped": False,
        "n_cfeat": run.model.n_cfeat,
        "classes": list(run.classes),
        "model": run.model.config(),
        "schedule": run.schedule.config(),
        "prediction": run.config["prediction"],
        "precision": precision,
        "weights_sha256": sha256(run.folder / MODEL),
        "versions": versions(),
        **more,
    }
