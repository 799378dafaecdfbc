"""One export: denoiser.onnx, sampler.onnx, step.onnx, run.py and manifest.json of a run, all or none of them."""

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx

from ddpm.commands.sampling_options import is_table_file, table_of
from ddpm.errors import BadInput, check_choice, check_integer
from ddpm.files import json_text, replacing_all
from ddpm.networks import condition_shape, sample_shape
from ddpm.runs import Run, held
from ddpm.table import StepTable
from export import models, run
from export.models import RNG, describe, sha256, versions
from export.precision import PRECISIONS, in_precision
from export.traced import trace
from export.verification import (
    Parity,
    Quality,
    dataset_of,
    nothing_written,
    parities,
    quality,
    require,
    require_quality,
)

SAMPLES = 100  # that fp16 and int8 are judged by
NAMES = ("denoiser.onnx", "sampler.onnx", "step.onnx", "run.py", "manifest.json")
DENOISER, SAMPLER, STEP, RUNNER, MANIFEST = NAMES


def check_network(opened: Run) -> None:
    """Raise BadInput for a run of points."""
    shape = sample_shape(opened.model)
    if len(shape) != 3:
        name = opened.config["network"]
        raise BadInput(f"{opened.folder}: its network ({name}) has samples {list(shape)}, needs images [C, H, W]")


def write(
    opened: Run,
    out: Path,
    asked: dict[str, Any],
    *,
    precision: str = "fp32",
    noise: str = "philox",
    open_table: bool = False,
    open_guidance: bool = False,
    verify: bool = True,
    evaluate: int | None = None,
    data: str | None = None,
    labels: str | None = None,
) -> dict[str, Any]:
    """Export a run into the folder `out`, with the table that was asked for (see `table_of`), and return the manifest.

    evaluate: how many samples fp16 and int8 are judged by, default SAMPLES; data, labels: what beside.
    open_table makes the table and its clip inputs of sampler.onnx and step.onnx, constants otherwise. open_guidance
    makes guidance one number a sample, and negative conditions and the rescale of guidance inputs of theirs.

    Everything is written beside its place, opened and measured there, and renamed only if it passed; otherwise the
    folder is left as it was. Raises BadInput for what cannot be exported, before any work, or WorkFailed if a
    comparison fails.
    """
    options, table = table_of(opened, asked)
    check_network(opened)
    check_choice("--precision", precision, PRECISIONS)
    check_choice("--noise", noise, run.NOISE_MODES)
    judged = verify and precision != "fp32"
    samples = _samples_of(evaluate, data, labels, judged, f"--precision {precision}{'' if verify else ' --no-verify'}")
    if noise == "none" and any(table.noisy):
        solver = options["solver"]
        raise BadInput(f"--noise: got none, but {solver} adds noise in its steps; use --solver ddim or dpmpp_2m")
    if open_table and not models.opens(table):
        needs = "one of whole timesteps, each once, and guidance everywhere"
        raise BadInput(f"--open-table: {options['solver']} is more than its rows, needs {needs}")
    if open_guidance and condition_shape(opened.model) is None:
        raise BadInput(f"--open-guidance: {opened.folder} has no conditions, needs a run that has")
    dataset = dataset_of(opened, data, labels) if judged else (None, None)
    # A table by the options of `make_table` that make it, or whole.
    described = {"options": options, "steps": len(table), "clip": table.clip}
    described |= {"stored": table.asdict()} if is_table_file(asked.get("solver")) else {}
    if open_table:  # from which run.py makes other tables
        described["alpha_bars"] = opened.schedule.alpha_bars.tolist()
    with_rows = described | {"rows": table.rows().tolist()}
    of_step = with_rows | {"starts": _starts(table, opened)}
    opens = (open_table, open_guidance)

    def note(kind: str, **more: Any) -> str:
        return json.dumps(describe(opened, kind, precision, **more))

    with held(out), nothing_written(), replacing_all([out / name for name in NAMES]) as partials:
        if out.resolve() == opened.folder.resolve():
            opened.check_present()
        paths = dict(zip(NAMES, partials, strict=True))
        model, count = opened.model, opened.schedule.timesteps
        traced = in_precision(trace(model), precision, opened)
        onnx.save(models.denoiser(model, traced, note("denoiser")), paths[DENOISER])
        noted = note("sampler", noise=noise, rng=RNG, table=with_rows if noise == "input" or open_table else described)
        onnx.save(models.sampler(model, traced, table, count, noise, noted, *opens), paths[SAMPLER])
        noted = note("step", noise="input", rng=RNG, table=of_step)
        onnx.save(models.step(model, traced, table, count, noted, *opens), paths[STEP])
        shutil.copyfile(run.__file__, paths[RUNNER])
        files = {kind: paths[f"{kind}.onnx"] for kind in run.KINDS}
        parity, measured = _judged(files, opened, precision, samples, *dataset) if verify else ([], None)
        require(parity)
        manifest = {
            "format_version": run.FORMAT_VERSION,
            "run": opened.folder.resolve().name,
            "precision": precision,
            "noise": noise,
            "table": with_rows,
            "open_guidance": open_guidance,
            "verified": verify,
            "parity": [asdict(result) | {"good": result.good} for result in parity],
            "quality": measured,
            "files": {name: _describe_file(paths[name]) for name in NAMES if name != MANIFEST},
            "versions": versions(),
        }
        paths[MANIFEST].write_text(json_text(manifest), encoding="utf-8")
    return manifest


def _starts(table: StepTable, opened: Run) -> list[list[float]]:
    """[row, share of T, alpha_bar] of every row that a trajectory may begin with: none of a learned table."""
    times = table.timesteps.tolist() if table.weights is None else []
    begins = [(k, t) for k, t in enumerate(times) if bool(table.begins[k])]
    return [[k, t / opened.schedule.timesteps, opened.schedule.alpha_bar(t)] for k, t in begins]


def _samples_of(evaluate: int | None, data: str | None, labels: str | None, judged: bool, what: str) -> int:
    """How many samples a file is judged by. Raises BadInput for what was given to judge one that is not."""
    if not judged and not evaluate is data is labels is None:
        raise BadInput(f"--data, --labels, --evaluate: got them for {what}, needs a verified fp16 or int8 sampler")
    samples = SAMPLES if evaluate is None else evaluate
    check_integer("--evaluate", samples, 2)
    return samples


def _judged(
    files: dict[str, Path], opened: Run, precision: str, evaluate: int, *dataset: Any
) -> tuple[list[Parity], Quality | None]:
    """(the parities of fp32, the quality of what is lower). Raises WorkFailed for a quality below its floor."""
    if precision == "fp32":
        return parities(files, opened), None
    measured = quality(precision, files, opened, evaluate, *dataset)
    require_quality(measured)
    return [], measured


def _describe_file(path: Path) -> dict[str, Any]:
    """Size and hash; of a model also the seconds that onnxruntime takes to open it."""
    described = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    if path.suffix == ".onnx":
        began = time.perf_counter()
        run.open_session(path)
        described["open_s"] = round(time.perf_counter() - began, 3)
    return described


def precision_of(graph: onnx.GraphProto) -> str:
    """What the graph computes in, the bodies of its control flow included."""
    bodies = (attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g"))
    found = set(map(precision_of, bodies))
    found |= {"int8" for node in graph.node if node.op_type == "QuantizeLinear"}
    found |= {"fp16" for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT16}
    return next((precision for precision in ("int8", "fp16") if precision in found), "fp32")


def verify(
    path: Path, opened: Run, data: str | None = None, labels: str | None = None, evaluate: int | None = None
) -> tuple[list[Parity], Quality | None]:
    """Measure one exported file against a run again: (parities, quality or None).

    A file of lower precision is judged by what its kind can tell. Raises ModelError, BadInput, WorkFailed.
    """
    metadata = run.metadata_of(run.open_session(path), path)
    # Files of format 1 have the network's name among its arguments.
    told = {name: value for name, value in metadata["model"].items() if name != "kind"}
    if told != opened.model.config() or metadata.get("network", opened.config["network"]) != opened.config["network"]:
        raise BadInput(f"{path}: holds another network than {opened.folder}, needs the run that it was exported from")
    kind, found = metadata["kind"], precision_of(onnx.load(path).graph)
    if metadata["precision"] != found:
        raise run.ModelError(f"{path}: says {metadata['precision']}, its weights are {found}; export it again")
    by_data = found != "fp32" and kind == "sampler"
    samples = _samples_of(evaluate, data, labels, by_data, f"a {found} {kind}")
    dataset = dataset_of(opened, data, labels) if by_data else (None, None)
    return _judged({kind: path}, opened, found, samples, *dataset)
