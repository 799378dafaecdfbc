"""One export: denoiser.onnx, sampler.onnx, step.onnx, run.py and manifest.json of a run, all or none of them."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from ddpm.errors import BadInput
from ddpm.files import json_text, locked, replacing_all
from ddpm.networks import sample_shape
from ddpm.runs import Run, make_folder
from ddpm.table import StepTable
from export import models, quality, run
from export.metadata import RNG, describe, describe_table, described_table, sha256, versions
from export.parity import (
    Parity,
    denoiser_parity,
    known_samples,
    require,
    sampler_parity,
    session_denoiser,
    step_parity,
)
from export.precision import PRECISIONS, in_precision
from export.run import FORMAT_VERSION
from export.traced import trace

DENOISER, SAMPLER, STEP, RUNNER, MANIFEST = "denoiser.onnx", "sampler.onnx", "step.onnx", "run.py", "manifest.json"


@dataclass(frozen=True)
class Request:
    """What `ddpm-export onnx` was asked for. options, table: as `ddpm.commands.sampling_options.table_of` returns them.

    stored: whether the table came from a file rather than from the options.
    """

    options: dict[str, Any]
    table: StepTable
    stored: bool = False
    precision: str = "fp32"
    noise: str = "philox"
    verify: bool = True
    evaluate: int = 100
    data: str | None = None
    labels: str | None = None


def check_network(opened: Run) -> None:
    """Raise BadInput for a run of points."""
    shape = sample_shape(opened.model)
    if len(shape) != 3:
        name = opened.config["network"]
        raise BadInput(
            f"{opened.folder}: its network ({name}) has samples {list(shape)}, export needs images [C, H, W]"
        )


def check(opened: Run, request: Request) -> None:
    """Raise BadInput for what cannot be exported, before any work."""
    check_network(opened)
    if request.precision not in PRECISIONS:
        raise BadInput(f"--precision: got {request.precision!r}, needs one of {', '.join(PRECISIONS)}")
    if request.noise not in run.NOISE_MODES:
        raise BadInput(f"--noise: got {request.noise!r}, needs one of {', '.join(run.NOISE_MODES)}")
    if request.noise == "none" and any(request.table.noisy):
        solver = request.options["solver"]
        raise BadInput(f"--noise: got none, but {solver} adds noise in its steps; use --solver ddim or dpmpp_2m")
    if request.precision == "fp32" and (request.data or request.labels):
        raise BadInput("--data, --labels: got them with --precision fp32, needs fp16 or int8, which are judged by data")
    if request.evaluate < 2:
        raise BadInput(f"--evaluate: got {request.evaluate}, needs at least 2 samples for a covariance")


def write(opened: Run, out: Path, request: Request) -> dict[str, Any]:
    """Export a run into the folder `out` and return the manifest.

    Everything is written beside its place, opened and measured there, and renamed only if it passed; otherwise the
    folder is left as it was. Raises BadInput, or WorkFailed if a comparison fails.
    """
    check(opened, request)
    judged = request.verify and request.precision != "fp32"
    dataset, skipped = quality.dataset_of(opened, request.data, request.labels) if judged else (None, None)
    made = not out.exists()
    make_folder(out)
    names = (DENOISER, SAMPLER, STEP, RUNNER, MANIFEST)
    try:
        with locked(out), replacing_all([out / name for name in names]) as partials:
            paths = dict(zip(names, partials, strict=True))
            sampler_metadata = _save_models(opened, request, paths)
            paths[RUNNER].write_bytes(Path(run.__file__).read_bytes())
            parity, measured = [], None
            if request.verify and request.precision == "fp32":
                parity = measure_parity(opened, paths, sampler_metadata)
                require(parity)
            elif request.verify:
                files = {}
                for kind in run.KINDS:
                    path = paths[f"{kind}.onnx"]
                    session = run.open_session(path)
                    files[kind] = session, run.metadata_of(session, path, kind)
                measured = quality.measure(request.precision, files, opened, request.evaluate, dataset, skipped)
                quality.require(measured)
            manifest = _manifest(opened, request, paths, parity, measured)
            paths[MANIFEST].write_text(json_text(manifest), encoding="utf-8")
    except BaseException:
        if made and not any(out.iterdir()):
            out.rmdir()
        raise
    return manifest


def _save_models(opened: Run, request: Request, paths: dict[str, Path]) -> dict[str, Any]:
    """Write the three models; returns the sampler's metadata."""
    table, model, timesteps = request.table, opened.model, opened.schedule.timesteps
    traced = in_precision(trace(model), request.precision, opened)

    def note(kind: str, noise: str | None) -> dict[str, Any]:
        more = {} if noise is None else {"noise": noise, "rng": RNG}
        if noise is not None:
            more["table"] = describe_table(table, request.options, request.stored, rows=noise == "input")
        return describe(opened, kind, request.precision, **more)

    metadata = note("sampler", request.noise)
    onnx.save(models.denoiser(model, traced, json.dumps(note("denoiser", None))), paths[DENOISER])
    sampler = models.sampler(model, traced, table, timesteps, request.noise, json.dumps(metadata))
    onnx.save(sampler, paths[SAMPLER])
    onnx.save(models.step(model, traced, table, timesteps, json.dumps(note("step", "input"))), paths[STEP])
    return metadata


def denoiser_results(opened: Run, path: Path) -> list[Parity]:
    """denoiser.onnx at the optimisation level that is shipped (onnxruntime's default) and at none."""
    return [
        denoiser_parity(f"denoiser.onnx, {name}", session_denoiser(run.open_session(path, optimise=optimise)), opened)
        for name, optimise in (("optimised", True), ("not optimised", False))
    ]


def measure_parity(opened: Run, paths: dict[str, Path], metadata: dict[str, Any]) -> list[Parity]:
    """Every fp32 file against the run."""
    table = described_table(metadata["table"], opened)
    known = known_samples(opened, table)
    return [
        *denoiser_results(opened, paths[DENOISER]),
        *sampler_parity(run.open_session(paths[SAMPLER]), metadata, known),
        step_parity(run.open_session(paths[STEP]), table.rows().numpy(), known),
    ]


def _describe_file(path: Path) -> dict[str, Any]:
    """Size and hash; of a model also the seconds that onnxruntime takes to open it."""
    described = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    if path.suffix == ".onnx":
        began = time.perf_counter()
        run.open_session(path)
        described["open_s"] = round(time.perf_counter() - began, 3)
    return described


def _manifest(
    opened: Run, request: Request, paths: dict[str, Path], parity: list[Parity], measured: quality.Quality | None
) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "run": opened.folder.resolve().name,
        "precision": request.precision,
        "noise": request.noise,
        "table": describe_table(request.table, request.options, request.stored, rows=True),
        "verified": request.verify,
        "parity": [result.asdict() for result in parity],
        "quality": None if measured is None else asdict(measured),
        "files": {name: _describe_file(path) for name, path in paths.items() if name != MANIFEST},
        "versions": versions(),
    }


def precision_of(graph: onnx.GraphProto) -> str:
    """What the graph computes in, the bodies of its control flow included."""
    found = {"int8" for node in graph.node if node.op_type == "QuantizeLinear"}
    found |= {"fp16" for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT16}
    found |= {
        precision_of(attribute.g) for node in graph.node for attribute in node.attribute if attribute.HasField("g")
    }
    return next((precision for precision in ("int8", "fp16") if precision in found), "fp32")


def verify(path: Path, opened: Run, data: str | None, labels: str | None, evaluate: int) -> tuple[list[Parity], Any]:
    """Measure one exported file against a run again: (parities, quality or None).

    A file of lower precision is judged by what its kind can tell. Raises ModelError, BadInput, WorkFailed.
    """
    session = run.open_session(path)
    metadata = run.metadata_of(session, path)
    # Files of format 1 have the network's name among its arguments.
    told = {name: value for name, value in metadata["model"].items() if name != "kind"}
    if told != opened.model.config() or metadata.get("network", opened.config["network"]) != opened.config["network"]:
        raise BadInput(f"{path}: holds another network than {opened.folder}, needs the run that it was exported from")
    found = precision_of(onnx.load(path).graph)
    if metadata["precision"] != found:
        raise run.ModelError(f"{path}: says {metadata['precision']}, its weights are {found}; export it again")
    if (data or labels) and (found == "fp32" or metadata["kind"] != "sampler"):
        raise BadInput(
            "--data, --labels: got them for a file that is not judged by data, needs an fp16 or int8 sampler"
        )
    if found != "fp32":
        dataset, skipped = quality.dataset_of(opened, data, labels) if metadata["kind"] == "sampler" else (None, None)
        files = {metadata["kind"]: (session, metadata)}
        measured = quality.measure(metadata["precision"], files, opened, evaluate, dataset, skipped)
        quality.require(measured)
        return [], measured
    if metadata["kind"] == "denoiser":
        results = denoiser_results(opened, path)
    else:
        table = described_table(metadata["table"], opened)
        known = known_samples(opened, table)
        if metadata["kind"] == "sampler":
            results = sampler_parity(session, metadata, known)
        else:
            results = [step_parity(session, table.rows().numpy(), known)]
    return results, None
