"""What an exported file tells of itself, whatever kind it is: ONNX models, PyTorch's packages, tables of solvers."""

import json
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddpm.table import StepTable
from export import run

PROGRAM, PACKAGE = "torch.export program", "AOTInductor package"
PT2, NUMPY = b"PK\x03\x04", b"\x93NUMPY"  # how such files begin


def rows_of(path: Path) -> dict[str, str]:
    """What to show, by name. Raises ModelError or BadInput for what cannot be read."""
    beginning = b""
    if path.is_file():
        with path.open("rb") as file:
            beginning = file.read(len(NUMPY))
    if beginning.startswith(PT2):
        rows = _of_package(path)
    elif beginning == NUMPY:
        rows = _of_rows(path)
    elif beginning.lstrip().startswith(b"{"):
        rows = _of_table(StepTable.load(path))
    else:
        rows = _of_onnx(path)
    kind = rows.pop("kind")
    return {"kind": kind, "size": f"{path.stat().st_size:,} bytes"} | {n: text for n, text in rows.items() if text}


def _pairs(described: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value!s:.200}" for key, value in described.items() if value is not None)


def _of_metadata(metadata: dict[str, Any]) -> dict[str, str]:
    return {
        "image": "x".join(str(metadata[side]) for side in ("channels", "height", "width")),
        "values": "-1..1, not clamped",
        "condition": str(list(run.condition_shape(metadata) or ())),
        "classes": ", ".join(metadata["classes"]),
        "network": f"{metadata.get('network', '')}, {_pairs(metadata['model'])}",
        "schedule": _pairs(metadata["schedule"]),
        "prediction": metadata["prediction"],
        "precision": metadata["precision"],
        "weights": f"sha256 {metadata['weights_sha256']}",
        "made with": _pairs(metadata["versions"]),
    }


def _of_onnx(path: Path) -> dict[str, str]:
    session = run.open_session(path)
    metadata = run.metadata_of(session, path)
    rows = {"kind": metadata["kind"], "about": session.get_modelmeta().description} | _of_metadata(metadata)
    inputs, overridable = session.get_inputs(), session.get_overridable_initializers()
    if "table" in metadata:
        steps, clip = (metadata["table"][name] for name in ("steps", "clip"))
        taken = {value.name for value in (*inputs, *overridable)}
        which = "others may be given" if "table" in taken else "constant"
        rows["table"] = f"{metadata['table']['options']['solver']}, {steps} steps, clip {clip}; {which}"
        rows["noise"] = f"{metadata['noise']} ({metadata['rng']})"
    if "onnxruntime" in metadata:
        rows["runs in"] = f"onnxruntime {metadata['onnxruntime']} or newer"
        if metadata["kind"] == "sampler":
            given = metadata["noise"] == "input"
            rows["runs in"] += ", OpenVINO" if given else "; OpenVINO, and CUDA at speed, need --noise input"
    return rows | {
        "inputs": _values(inputs),
        "overridable": _values(overridable),
        "outputs": _values(session.get_outputs()),
    }


def _values(values: Sequence[Any]) -> str:
    """A line for each input or output: x float [batch, 3, 16, 16]."""
    kinds = ((v.name, re.sub(r"tensor\((.*)\)", r"\1", v.type), ", ".join(map(str, v.shape))) for v in values)
    return "\n".join(f"{name} {kind} [{shape}]" for name, kind, shape in kinds)


def _of_package(path: Path) -> dict[str, str]:
    """Of a .pt2: nothing in it is loaded but the JSON that was noted."""
    try:
        with zipfile.ZipFile(path) as archive:
            names, entries = archive.namelist(), archive.infolist()
            if min((entry.header_offset for entry in entries), default=1):
                raise zipfile.BadZipFile  # its end is that of an archive inside it
            compiled = [name for name in names if "/data/aotinductor/" in name and name.endswith("_metadata.json")]
            noted = next((name for name in names if name.endswith("/extra/fused_ddpm.json")), None)
            if not compiled and noted is None:
                raise run.ModelError(f"{path}: an archive of another program, needs a file that ddpm-export wrote")
            # Such files are not compressed, and PyTorch compares no checksums.
            if sum(entry.file_size for entry in entries) > path.stat().st_size or archive.testzip() is not None:
                raise zipfile.BadZipFile
            text = archive.read(noted) if noted else json.loads(archive.read(compiled[0])).get(run.KEY)
        if text is None:
            return {"kind": f"denoiser, {PACKAGE} of an earlier version, which noted nothing"}
        metadata = json.loads(text)
        kind = f"{metadata['kind']}, {PACKAGE if compiled else PROGRAM}"
        names = ["x", "t", *([] if run.condition_shape(metadata) is None else ["context"])]
        if metadata.get("self_condition"):
            names += [*(["None"] if len(names) == 2 else []), "x0_previous"]
        return {"kind": kind, "call": f"({', '.join(names)}), by position"} | _of_metadata(metadata)
    except run.ModelError:
        raise
    except Exception as error:  # zipfile, and what such a file says of itself, raise nearly anything
        raise run.ModelError(f"{path}: damaged ({type(error).__name__}), needs to be exported again") from error


def _of_table(table: StepTable) -> dict[str, str]:
    return {
        "kind": "table of a solver",
        "solver": f"{table.solver}, {table.steps} steps, {len(table)} rows, clip {table.clip}",
        "prediction": table.prediction,
        "timesteps": f"{float(table.timesteps[0]):g} to {float(table.timesteps[-1]):g}",
        "made for": _pairs(dict(table.made_for)),
        "weights": table.weights or "any",
    }


def _of_rows(path: Path) -> dict[str, str]:
    try:
        rows = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError) as error:
        raise run.ModelError(f"{path}: damaged ({type(error).__name__}), needs a whole .npy file") from error
    if rows.dtype.kind != "f" or rows.shape[1:] != (run.COLUMNS,) or not len(rows):
        raise run.ModelError(f"{path}: {rows.dtype} {list(rows.shape)}, needs a table's floats [steps, {run.COLUMNS}]")
    return {"kind": "rows of a table", "rows": f"{len(rows)}", "timesteps": f"{rows[0, 7]:g} to {rows[-1, 7]:g}"}
