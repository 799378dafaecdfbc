"""What an exported file tells of itself: one JSON object, and what stands beside it in manifest.json."""

import hashlib
from contextlib import suppress
from importlib import metadata as packages
from pathlib import Path
from typing import Any

from ddpm.networks import condition_shape, sample_shape
from ddpm.runs import MODEL, Run, taken_options
from ddpm.solvers import make_table
from ddpm.table import StepTable
from export.models import null_of
from export.run import FORMAT_VERSION

RNG = "Philox4x32-10 by the noise contract of fused-ddpm"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def versions() -> dict[str, str]:
    """Of what made the file; ONNX Runtime is whichever of its distributions is installed."""
    found = {}
    for name in ("fused-ddpm", "torch", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime"):
        with suppress(packages.PackageNotFoundError):
            found[name] = packages.version(name)
    return found


def describe_table(table: StepTable, options: dict[str, Any], stored: bool = False) -> dict[str, Any]:
    """A table by the options of `make_table` that make it; one that was `stored` whole."""
    described = {"options": options, "steps": len(table), "clip": table.clip}
    return described | ({"stored": table.asdict()} if stored else {})


def described_table(described: dict[str, Any], run: Run, **changed: Any) -> StepTable:
    """The table that `describe_table` described; changed: options of `make_table` instead of those that made it."""
    if "stored" in described:
        return StepTable.of(described["stored"])
    return make_table(run.schedule, **(taken_options(described["options"]) | changed))


def describe(run: Run, kind: str, precision: str, **more: Any) -> dict[str, Any]:
    """The metadata of a file of this kind (denoiser, sampler, step); `more` is added."""
    condition = condition_shape(run.model)
    if condition is not None and (null := null_of(run.model, condition)).any():
        more["null_condition"] = null.tolist()
    return {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        **dict(zip(("channels", "height", "width"), sample_shape(run.model), strict=True)),
        "value_range": [-1, 1],
        "clamped": False,
        "condition_shape": None if condition is None else list(condition),
        "classes": list(run.classes),
        "network": run.config["network"],
        "model": run.model.config(),
        "schedule": run.schedule.config(),
        "prediction": run.config["prediction"],
        "precision": precision,
        "weights_sha256": sha256(run.folder / MODEL),
        "versions": versions(),
        **more,
    }
