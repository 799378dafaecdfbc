"""The three ONNX models of a run: denoiser, sampler (the whole trajectory as one Scan) and step; their metadata.

All are wrapped around the graphs of `export.traced`; a precision is a change of the network's graph alone. Everything
around it is float32 (the noise float64 inside).
"""

import hashlib
import math
from contextlib import suppress
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from ddpm.networks.protocol import condition_shape, in_type, network_times, null_condition, sample_shape
from ddpm.runs import MODEL, Run, taken_options
from ddpm.solvers import make_table
from ddpm.table import StepTable
from export.graph import FLOAT, INT64, Builder, model_of
from export.philox_graph import counters, normals, step_word
from export.run import COLUMNS, FORMAT_VERSION
from export.traced import Traced, example_times
from kernels.philox import Stream

RNG = "Philox4x32-10 by the noise contract of fused-ddpm"


def null_of(model: nn.Module, shape: tuple[int, ...]) -> np.ndarray:
    """ "No condition", float32 [*shape]."""
    return null_condition(model, torch.zeros(1, *shape))[0].float().numpy()


def _rows(b: Builder, traced: Traced, conditions: str, leading: str) -> list[str]:
    """What the network reads of conditions [copies * batch, ...], each [copies, batch, ...]; leading: those two."""
    results = b.inline(traced.rows.graph, [conditions], "condition.")
    return [b.op("Reshape", row, b.op("Concat", leading, b.op("Shape", row, start=2), axis=0)) for row in results]


def denoiser(model: nn.Module, traced: Traced, metadata: str) -> onnx.ModelProto:
    """x [batch, C, H, W], t [batch] as forward gets it, context [batch, ...] (if there is one) -> m.

    A t of another length than x's batch is an error of its Reshape, not a broadcast.
    """
    b = Builder()
    shape, condition = ("batch", *sample_shape(model)), condition_shape(model)
    kind = INT64 if example_times(model).dtype == torch.int64 else FLOAT
    x, t = b.input("x", FLOAT, shape), b.input("t", kind, ["batch"])
    batch = b.op("Shape", x, start=0, end=1)
    times = b.op("Reshape", t, batch, allowzero=1)
    arguments = [x, *b.inline(traced.tables.graph, [times], "time.")]
    if condition is not None:
        context = b.input("context", FLOAT, ["batch", *condition])
        context = b.op("Reshape", context, b.op("Concat", batch, b.integers(*condition), axis=0), allowzero=1)
        arguments += _rows(b, traced, context, b.op("Concat", b.integers(1), batch, axis=0))
    (m,) = b.inline(traced.network.graph, arguments, "network.")
    b.output(m, "m", FLOAT, shape)
    return model_of(b, "denoiser", metadata)


def _table_inputs(b: Builder, table: StepTable) -> tuple[str, str]:
    """The overridable defaults: rows [steps, 8] and the bound of x0 (infinity = none)."""
    rows = b.input("table", FLOAT, ["steps", COLUMNS], table.rows().numpy())
    return rows, b.input("clip", FLOAT, [], math.inf if table.clip is None else table.clip)


def _tables(
    b: Builder, model: nn.Module, traced: Traced, table: StepTable, count: int, rows: str, numbers: str
) -> list[str]:
    """What the network reads of table rows [k, 8] with these numbers, int64 [k]: each [k, ...]. count: T.

    Times come from a list of all of them, as PyTorch computes it; those of a table whose noise steps are no timesteps
    are its own, by row.
    """
    whole = not table.timesteps.is_floating_point() and torch.equal(table.timesteps, table.noise_steps)
    known, index = table.timesteps, numbers
    if whole:
        known = torch.arange(count + 1)
        column = b.op("Slice", rows, b.integers(COLUMNS - 1), b.integers(COLUMNS), b.integers(1))
        index = b.op("Cast", b.op("Reshape", column, b.integers(-1)), to=INT64)
        index = b.op("Clip", index, b.constant(0, np.int64), b.constant(count, np.int64))  # NaN becomes any number
    times = in_type(network_times(model, known, count)).numpy()
    return b.inline(traced.tables.graph, [b.op("Gather", b.constant(times, times.dtype), index, axis=0)], "time.")


def _weights(b: Builder, table: StepTable, guidance: str) -> str | None:
    """w of every row [steps], 1 + scale (w - 1); None where it is w in all of them."""
    if bool((table.guidance_scale == 1).all()):
        return None
    scale, one = b.constant(table.guidance_scale.numpy(), np.float32), b.constant(1.0, np.float32)
    return b.op("Add", one, b.op("Mul", scale, b.op("Sub", guidance, one)))


def _guided(b: Builder, m: str, guidance: str, x: str) -> str:
    """m_uncond + guidance (m_cond - m_uncond); with one copy both are the same rows and m stays as it is."""
    copies = b.op("Reshape", m, b.op("Concat", b.integers(-1), b.op("Shape", x), axis=0))
    conditional, unconditional = (b.op("Gather", copies, b.constant(k, np.int64), axis=0) for k in (0, -1))
    return b.op("Add", unconditional, b.op("Mul", guidance, b.op("Sub", conditional, unconditional)))


def _update(b: Builder, row: str, x: str, m: str, x0_previous: str, clip: str) -> tuple[str, str, str, str]:
    """(x_new without noise, x0, c6 [1], t [1]): the equations of ddpm/solvers.py in the eager path's order."""
    c = b.many("Split", row, outputs=COLUMNS, axis=0, num_outputs=COLUMNS)
    x0 = b.sum_of(b.op("Mul", c[0], x), b.op("Mul", c[1], m))
    x0 = b.op("Max", b.op("Min", x0, clip), b.op("Neg", clip))
    terms = zip(c[2:6], (x, x0, m, x0_previous), strict=True)
    return b.sum_of(*(b.op("Mul", weight, value) for weight, value in terms)), x0, c[6], c[7]


def _halves(b: Builder, model: nn.Module, traced: Traced, context: str, guidance: str) -> list[str]:
    """Rows of context [batch, ...] and, only where guidance is not 1, of no condition: each [copies, batch, ...]."""
    shape, zero = condition_shape(model), b.integers(0)
    guided = b.op("Cast", b.op("Not", b.op("Equal", guidance, b.constant(1.0, np.float32))), to=INT64)
    copies = b.op("Reshape", b.op("Add", guided, b.constant(1, np.int64)), b.integers(1))
    nothing = b.op("Expand", b.constant(null_of(model, shape)[None], np.float32), b.op("Shape", context))
    batch = b.op("Shape", context, start=0, end=1)
    both = b.op("Concat", context, nothing, axis=0)
    used = b.op("Slice", both, zero, b.op("Mul", copies, batch), zero)
    return _rows(b, traced, used, b.op("Concat", copies, batch, axis=0))


def _noisy(b: Builder, x_new: str, c6: str, z: str, x: str | None = None) -> str:
    """x_new + c6 z. With x: z that a caller gave; of another batch it is an error of its Reshape, not a broadcast."""
    if x is not None:
        z = b.op("Reshape", z, b.op("Shape", x), allowzero=1)
    return b.op("Add", x_new, b.op("Mul", c6, z))


def sampler(
    model: nn.Module, traced: Traced, table: StepTable, count: int, noise: str, metadata: str
) -> onnx.ModelProto:
    """The whole trajectory as one Scan over the table's rows. count: T of the schedule.

    Inputs: seed and first_sample (int64 scalars), context [batch, ...] and guidance (float scalar) or, without
    conditions, n (int64 scalar); table [steps, 8] and clip (float scalar) override the defaults. Output: images.
    noise: `philox` draws in the graph; `input` takes x_T [batch, C, H, W] and noise [steps, batch, C, H, W] in place of
    seed and first_sample; `none` draws x_T alone, for tables without noise.

    The weights lie in the Scan's body: onnxruntime blocks no convolution (NCHWc) whose weights are in the outer graph.
    """
    shape, condition, drawn = sample_shape(model), condition_shape(model), noise != "input"
    images = ("batch", *shape)
    b = Builder()
    if drawn:
        seed, first_sample = b.input("seed", INT64, []), b.input("first_sample", INT64, [], 0)
    else:
        start, z_given = b.input("x_T", FLOAT, images), b.input("noise", FLOAT, ("steps", *images))
    if condition is not None:
        context, guidance = b.input("context", FLOAT, ["batch", *condition]), b.input("guidance", FLOAT, [], 1.0)
        batch = b.op("Shape", context, start=0, end=1)
    elif drawn:
        batch = b.input("n", INT64, [])
    rows, clip = _table_inputs(b, table)
    if drawn:
        shared = counters(b, seed, first_sample, b.op("Squeeze", batch))
        start = normals(b, shared, b.constant(0, np.uint64), Stream.INITIAL, shape)
    numbers = b.integers(*range(len(table)))
    at_rows = _tables(b, model, traced, table, count, rows, numbers)
    tables = [b.op("Unsqueeze", each, b.integers(1)) for each in at_rows]
    halves = _halves(b, model, traced, context, guidance) if condition is not None else []

    body = Builder("body.")
    x, x0_previous = body.input("x", FLOAT, images), body.input("x0_previous", FLOAT, images)
    row = body.input("row", FLOAT, [COLUMNS])
    at = []
    for k, value in enumerate(traced.tables.graph.output, start=1):
        kind = value.type.tensor_type
        at.append(body.input(f"table{k}", kind.elem_type, [1, *(dim.dim_value or None for dim in kind.shape.dim[1:])]))
    scanned = [rows, *tables]
    if condition is not None and (weights := _weights(b, table, guidance)) is not None:
        scanned.append(weights)
        guidance = body.input("weight", FLOAT, [])
    (m,) = body.inline(traced.network.graph, [x, *at, *halves], "network.")
    if condition is not None:
        m = _guided(body, m, guidance, x)
    x_new, x0, c6, t = _update(body, row, x, m, x0_previous, clip)
    if noise == "input":
        scanned.append(z_given)
        x_new = _noisy(body, x_new, c6, body.input("z", FLOAT, images), x)
    elif noise == "philox":
        noisy, quiet = Builder("body.noisy."), Builder("body.quiet.")
        z = normals(noisy, shared, step_word(noisy, t), Stream.SAMPLING, shape)
        noisy.output(_noisy(noisy, x_new, c6, z), "body.noisy.x", FLOAT, images)
        quiet.output(x_new, "body.quiet.x", FLOAT, images)
        has_noise = body.op("Not", body.op("Equal", c6, body.constant(0.0, np.float32)))
        x_new = body.op("If", has_noise, then_branch=noisy.graph("noisy"), else_branch=quiet.graph("quiet"))
    body.output(x_new, "x_new", FLOAT, images)
    body.output(x0, "x0", FLOAT, images)

    memory = b.op("Mul", start, b.constant(0.0, np.float32))
    final, _ = b.many("Scan", start, memory, *scanned, outputs=2, body=body.graph("step"), num_scan_inputs=len(scanned))
    b.output(final, "images", FLOAT, images)
    return model_of(b, "sampler", metadata)


def step(model: nn.Module, traced: Traced, table: StepTable, count: int, metadata: str) -> onnx.ModelProto:
    """One self-advancing step, for IOBinding and CUDA graphs: no Scan, no Philox, nothing read on the host.

    Inputs: x, x0_previous [batch, C, H, W]; index int64 [1], the table's row; noise [window, batch, C, H, W], whose
    entry index - noise_start (int64 [1]) is this step's; contexts [copies, batch, ...] (two copies, the second of no
    condition, for guidance); guidance [1]; table and clip as in the sampler. count: T.
    Outputs: x_next, x0, index_next = index + 1.
    """
    b = Builder()
    images, condition = ("batch", *sample_shape(model)), condition_shape(model)
    x, x0_previous = b.input("x", FLOAT, images), b.input("x0_previous", FLOAT, images)
    index = b.input("index", INT64, [1])
    noise, noise_start = b.input("noise", FLOAT, ("window", *images)), b.input("noise_start", INT64, [1])
    if condition is not None:
        contexts = b.input("contexts", FLOAT, ["copies", "batch", *condition])
        guidance = b.input("guidance", FLOAT, [1])
    rows, clip = _table_inputs(b, table)
    row = b.op("Gather", rows, index, axis=0)
    arguments = [x, *_tables(b, model, traced, table, count, row, index)]
    if condition is not None:
        flat = b.op("Reshape", contexts, b.integers(-1, *condition))
        arguments += _rows(b, traced, flat, b.op("Shape", contexts, start=0, end=2))
    (m,) = b.inline(traced.network.graph, arguments, "network.")
    if condition is not None:
        weights = _weights(b, table, guidance)
        m = _guided(b, m, guidance if weights is None else b.op("Gather", weights, index, axis=0), x)
    x_new, x0, c6, _ = _update(b, b.op("Squeeze", row, b.integers(0)), x, m, x0_previous, clip)
    z = b.op("Squeeze", b.op("Gather", noise, b.op("Sub", index, noise_start), axis=0), b.integers(0))
    b.output(_noisy(b, x_new, c6, z, x), "x_next", FLOAT, images)
    b.output(x0, "x0", FLOAT, images)
    b.output(b.op("Add", index, b.integers(1)), "index_next", INT64, [1])
    return model_of(b, "step", metadata)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def versions() -> dict[str, str]:
    """Of what made the file; ONNX Runtime is whichever of its distributions is installed."""
    found = {}
    for name in ("fused-ddpm", "torch", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime"):
        with suppress(packages.PackageNotFoundError):
            found[name] = packages.version(name)
    return found


def described_table(described: dict[str, Any], run: Run, **changed: Any) -> StepTable:
    """The table of a file's metadata; changed: options of `make_table` instead of those that made it."""
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
