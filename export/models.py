"""The three ONNX models of a run: denoiser, sampler (the whole trajectory as one Scan) and step; their metadata.

All are wrapped around the graphs of `export.traced`; a precision is a change of the network's graph alone. Everything
around it is float32 (the noise float64 inside).
"""

import hashlib
from contextlib import suppress
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from ddpm.data import DEPTHS
from ddpm.networks.protocol import condition_shape, in_type, network_times, recalls, sample_shape
from ddpm.runs import MODEL, Run, taken_options
from ddpm.solvers import make_table
from ddpm.table import StepTable
from export import conditions
from export.graph import BOOL, FLOAT, INT64, Builder, model_of
from export.philox_graph import counters, normals, step_word
from export.run import COLUMNS, FORMAT_VERSION, RUNTIME
from export.traced import Traced, example_times
from kernels.philox import Stream

RNG = "Philox4x32-10 by the noise contract of fused-ddpm"

# What viewers and `ddpm-export info` show of every file, input and output.
ABOUT = {
    "denoiser": "One call of the network.",
    "sampler": "A whole trajectory: noise, network, guidance and solver; the same seed gives the pictures of `ddpm "
    "sample`. Needs onnxruntime " + RUNTIME + " or newer; seed, first_sample, guidance and context are checked where "
    "the runtime checks the indices of Gather.",
    "step": "One step of a trajectory, for a loop of the caller's. Values are not checked.",
}
IMAGES = "in -1..1, not clamped"
TIMES = {FLOAT: "t / T of every row, in (0, 1]", INT64: "t - 1 of every row, in 0..T-1"}
CONTEXT = "a condition for every sample: a class as its one-hot vector; finite numbers"
GUIDANCE = "w of classifier-free guidance, finite; 1 is none, and half the work"
GUIDANCES = "w of classifier-free guidance of every sample, finite; 1 in all is none, and half the work"
NEGATIVE = "what guidance leads away from, for every sample; the null condition (zeros, or as the metadata say)"
PHI = "how far guidance keeps the spread of the output, 0 (not at all) to 1 (Lin et al. 2024)"
TABLE = "a row for every step: seven coefficients (see ddpm/solvers.py) and the step's t, a whole number in 1..T"
RECALLED = "x0 of the step before; zeros at first"
CLIP = "bound of the predicted x0; infinity for none"


def denoiser(model: nn.Module, traced: Traced, metadata: str) -> onnx.ModelProto:
    """x [batch, C, H, W], t [batch] as forward gets it, context [batch, ...] (if there is one) -> m.

    x0_previous like x is the last input of networks that read it. A t of another length than x's batch is an error of
    its Reshape, not a broadcast.
    """
    b = Builder()
    shape, condition = ("batch", *sample_shape(model)), condition_shape(model)
    kind = INT64 if example_times(model).dtype == torch.int64 else FLOAT
    x, t = b.input("x", FLOAT, shape, "noisy images x_t"), b.input("t", kind, ["batch"], TIMES[kind])
    batch = _at_least(b, b.op("Shape", x, start=0, end=1), 1, "batch")
    times = b.op("Reshape", t, batch, allowzero=1)
    arguments = [x, *b.inline(traced.tables.graph, [times], "time.")]
    if condition is not None:
        context = _of_batch(b, b.input("context", FLOAT, ["batch", *condition], CONTEXT), batch, condition)
        arguments += conditions.rows(b, traced, context, b.op("Concat", b.integers(1), batch, axis=0))
    if recalls(model):
        arguments.append(b.op("Reshape", b.input("x0_previous", FLOAT, shape, RECALLED), b.op("Shape", x), allowzero=1))
    (m,) = b.inline(traced.network.graph, arguments, "network.")
    b.output(m, "m", FLOAT, shape, "what the network predicts: see `prediction` in the metadata")
    return model_of(b, "denoiser", metadata, ABOUT["denoiser"])


def _of_batch(b: Builder, value: str, batch: str, shape: tuple[int, ...]) -> str:
    """A value [batch, *shape]; one of another batch is an error of its Reshape, not a broadcast. batch: int64 [1]."""
    return b.op("Reshape", value, b.op("Concat", batch, b.integers(*shape), axis=0), allowzero=1)


def opens(table: StepTable) -> bool:
    """Whether another table may take this one's place: nothing but its rows is in the graph."""
    times = not table.timesteps.is_floating_point() and torch.equal(table.timesteps, table.noise_steps)
    return times and bool((table.guidance_scale == 1).all())


def _table_rows(b: Builder, table: StepTable, is_open: bool) -> str:
    """Rows [steps, 8]: an input, or a constant of that name."""
    if is_open:
        return b.input("table", FLOAT, ["steps", COLUMNS], TABLE)
    b.initialisers.append(numpy_helper.from_array(table.rows().numpy(), "table"))
    return "table"


def _bound(b: Builder, table: StepTable) -> str | None:
    """The bound of x0 as a constant, if there is one."""
    return None if table.clip is None else b.constant(table.clip, np.float32)


def _tables(
    b: Builder, model: nn.Module, traced: Traced, table: StepTable, count: int, rows: str, numbers: str, is_open: bool
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
        index = b.op("Clip", index, b.constant(1, np.int64), b.constant(count, np.int64))
        if is_open:
            wrong = b.op("Not", b.op("Equal", b.op("Cast", index, to=FLOAT), b.op("Reshape", column, b.integers(-1))))
            worst = b.op("Cast", b.op("ReduceMax", b.op("Cast", wrong, to=INT64), keepdims=0), to=BOOL)
            index = b.refused(index, worst, f"table: column 7 needs whole timesteps in 1..{count}", np.int64)
    times = in_type(network_times(model, known, count)).numpy()
    return b.inline(traced.tables.graph, [b.op("Gather", b.constant(times, times.dtype), index, axis=0)], "time.")


def _update(b: Builder, row: str, x: str, m: str, x0_previous: str, clip: str | None) -> tuple[str, str, str, str]:
    """(x_new without noise, x0, c6, t): the equations of ddpm/solvers.py in the eager path's order.

    A Gather for every number: a Split into eight has more outputs than WebGPU binds.
    """
    c = [b.op("Gather", row, b.constant(k, np.int64), axis=0) for k in range(COLUMNS)]
    x0 = b.sum_of(b.op("Mul", c[0], x), b.op("Mul", c[1], m))
    x0 = x0 if clip is None else b.op("Max", b.op("Min", x0, clip), b.op("Neg", clip))
    terms = zip(c[2:6], (x, x0, m, x0_previous), strict=True)
    return b.sum_of(*(b.op("Mul", weight, value) for weight, value in terms)), x0, c[6], c[7]


def _noisy(b: Builder, x_new: str, c6: str, z: str, x: str | None = None) -> str:
    """x_new + c6 z. With x: z that a caller gave; of another batch it is an error of its Reshape, not a broadcast."""
    if x is not None:
        z = b.op("Reshape", z, b.op("Shape", x), allowzero=1)
    return b.op("Add", x_new, b.op("Mul", c6, z))


def _rank(value: onnx.ValueInfoProto) -> int:
    return len(value.type.tensor_type.shape.dim)


def _at_least(b: Builder, value: str, least: int, name: str) -> str:
    """An int64 that is not below `least`, or an error."""
    return b.refused(
        value, b.op("Less", value, b.constant(least, np.int64)), f"{name}: needs {least} or more", np.int64
    )


def sampler(
    model: nn.Module,
    traced: Traced,
    table: StepTable,
    count: int,
    noise: str,
    metadata: str,
    is_open: bool = False,
    by_sample: bool = False,
) -> onnx.ModelProto:
    """The whole trajectory as one Scan over the table's rows. count: T of the schedule.

    Inputs: seed and first_sample (int64 scalars), context [batch, ...] and guidance (float scalar) or, without
    conditions, n (int64 scalar). is_open: also table [steps, 8] and clip (float scalar), which are constants
    otherwise; only for a table that `opens`. by_sample: guidance is [batch], and there are negative [batch, ...] and
    guidance_rescale (float scalar). Output: images.
    noise: `philox` draws in the graph; `input` takes x_T [batch, C, H, W] and noise [steps, batch, C, H, W] in place of
    seed and first_sample; `none` draws x_T alone, for tables without noise.

    The weights lie in the Scan's body: onnxruntime blocks no convolution (NCHWc) whose weights are in the outer graph.
    What else the body reads is a state that it hands on: OpenVINO takes no Scan that reads values from outside.
    """
    shape, condition, drawn = sample_shape(model), condition_shape(model), noise != "input"
    images = ("batch", *shape)
    b = Builder()
    if drawn:
        seed = _at_least(b, b.input("seed", INT64, [], "0 or more: names the noise"), 0, "seed")
        first_sample = b.input(
            "first_sample", INT64, [], "number of the first sample, 0 or more: each has its own noise"
        )
        first_sample = _at_least(b, first_sample, 0, "first_sample")
    else:
        start = b.input("x_T", FLOAT, images, "normal noise that the trajectory starts from")
        z_given = b.input("noise", FLOAT, ("steps", *images), "normal noise of every step of the table")
    if condition is not None:
        context = b.input("context", FLOAT, ["batch", *condition], CONTEXT)
        negative, others = None, {}
        if by_sample:
            guidance = b.input("guidance", FLOAT, ["batch"], GUIDANCES)
            negative = b.input("negative", FLOAT, ["batch", *condition], NEGATIVE)
            phi = b.input("guidance_rescale", FLOAT, [], PHI)
            batch = b.op("Shape", context, start=0, end=1)
            guidance, negative = b.op("Reshape", guidance, batch), _of_batch(b, negative, batch, condition)
            others = {"negative": negative, "guidance_rescale": phi}
        else:
            guidance = b.input("guidance", FLOAT, [], GUIDANCE)
        guidance = conditions.finite(b, guidance, context=context, **others)
    if drawn and condition is None:
        batch = b.op("Reshape", b.input("n", INT64, [], "how many samples"), b.integers(1))
    else:
        batch = b.op("Shape", context if drawn else start, start=0, end=1)
    batch = _at_least(b, batch, 1, "batch")
    rows = _table_rows(b, table, is_open)
    if drawn:
        shared = counters(b, seed, first_sample, b.op("Squeeze", batch))
        start = normals(b, shared, b.constant(0, np.uint64), Stream.INITIAL, shape)
    else:
        start = _of_batch(b, start, batch, shape)
    at_rows = _tables(b, model, traced, table, count, rows, b.integers(*range(len(table))), is_open)
    scanned = [rows, *(b.op("Unsqueeze", each, b.integers(1)) for each in at_rows)]
    kept: list[tuple[str, int]] = []  # what the body reads of the outer graph, and its rank
    halves, weights = [], None
    if condition is not None:
        halves = conditions.halves(b, model, traced, _of_batch(b, context, batch, condition), guidance, negative)
        # [copies, batch, ...] where the traced rows are [1, batch, ...].
        kept += [(half, _rank(value)) for half, value in zip(halves, traced.rows.graph.output, strict=True)]
        rank = len(images) if by_sample else 0
        guidance = conditions.one_each(b, guidance, batch, rank) if by_sample else guidance
        weights = conditions.weights(b, table, guidance, rank)
        if weights is None:
            kept.append((guidance, rank))
        if by_sample:
            kept.append((phi, 0))
    if is_open:
        kept.append((b.input("clip", FLOAT, [], CLIP), 0))

    body = Builder("body.")
    x, x0_previous = body.input("x", FLOAT, images), body.input("x0_previous", FLOAT, images)
    inside = [body.input(f"kept{k}", FLOAT, [None] * rank) for k, (_, rank) in enumerate(kept, start=1)]
    row = body.input("row", FLOAT, [COLUMNS])
    at = []
    for k, value in enumerate(traced.tables.graph.output, start=1):
        kind = value.type.tensor_type
        at.append(body.input(f"table{k}", kind.elem_type, [1, *(dim.dim_value or None for dim in kind.shape.dim[1:])]))
    if weights is not None:
        scanned.append(weights)
        guidance = body.input("weight", FLOAT, [None] * rank)
    elif condition is not None:
        guidance = inside[len(halves)]
    recalled = [x0_previous] if recalls(model) else []
    (m,) = body.inline(traced.network.graph, [x, *at, *inside[: len(halves)], *recalled], "network.")
    if condition is not None:
        m = conditions.guided(body, m, guidance, x, inside[-2 if is_open else -1] if by_sample else None)
    x_new, x0, c6, t = _update(body, row, x, m, x0_previous, inside[-1] if is_open else _bound(body, table))
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
    for name, (_, rank) in zip(inside, kept, strict=True):
        body.output(name, f"{name}_next", FLOAT, [None] * rank)

    memory = b.op("Mul", start, b.constant(0.0, np.float32))
    states = [start, memory, *(value for value, _ in kept)]
    how = {"outputs": len(states), "body": body.graph("step"), "num_scan_inputs": len(scanned)}
    b.output(b.many("Scan", *states, *scanned, **how)[0], "images", FLOAT, images, IMAGES)
    return model_of(b, "sampler", metadata, ABOUT["sampler"])


def step(
    model: nn.Module,
    traced: Traced,
    table: StepTable,
    count: int,
    metadata: str,
    is_open: bool = False,
    by_sample: bool = False,
) -> onnx.ModelProto:
    """One self-advancing step, for IOBinding and CUDA graphs: no Scan, no Philox, nothing read on the host.

    Inputs: x, x0_previous [batch, C, H, W]; index int64 [1], the table's row; noise [window, batch, C, H, W], whose
    entry index - noise_start (int64 [1]) is this step's; contexts [copies, batch, ...] (two copies, the second of no
    condition or of negative ones, for guidance); guidance [1], or with by_sample [batch], and guidance_rescale [1];
    with is_open table and clip as in the sampler. count: T.
    Outputs: x_next, x0, index_next = index + 1.
    """
    b = Builder()
    images, condition = ("batch", *sample_shape(model)), condition_shape(model)
    x = b.input("x", FLOAT, images, "images so far; normal noise at first")
    x0_previous = b.input("x0_previous", FLOAT, images, RECALLED)
    index = b.input("index", INT64, [1], "row of the table; 0 at first")
    noise = b.input("noise", FLOAT, ("window", *images), "normal noise of some steps")
    noise_start = b.input("noise_start", INT64, [1], "row of the table that the first noise belongs to")
    batch = b.op("Shape", x, start=0, end=1)
    if condition is not None:
        doc = f"{CONTEXT}; for guidance two copies, the second of no condition"
        contexts = b.input("contexts", FLOAT, ["copies", "batch", *condition], doc)
        about = "w of classifier-free guidance; 1 with one copy"
        guidance = b.input("guidance", FLOAT, ["batch"] if by_sample else [1], about)
        phi = b.input("guidance_rescale", FLOAT, [1], PHI) if by_sample else None
    rows = _table_rows(b, table, is_open)
    clip = b.input("clip", FLOAT, [], CLIP) if is_open else _bound(b, table)
    row = b.op("Gather", rows, index, axis=0)
    arguments = [x, *_tables(b, model, traced, table, count, row, index, is_open)]
    if condition is not None:
        leading = b.op("Concat", b.op("Shape", contexts, start=0, end=1), batch, axis=0)
        flat = b.op("Reshape", contexts, b.op("Concat", leading, b.integers(*condition), axis=0), allowzero=1)
        arguments += conditions.rows(b, traced, b.op("Reshape", flat, b.integers(-1, *condition)), leading)
    arguments += [x0_previous] if recalls(model) else []
    (m,) = b.inline(traced.network.graph, arguments, "network.")
    if condition is not None:
        rank = len(images) if by_sample else 0
        guidance = conditions.one_each(b, guidance, batch, rank) if by_sample else guidance
        weights = conditions.weights(b, table, guidance, rank)
        if weights is not None:
            guidance = b.op("Gather", weights, index, axis=0)
            guidance = b.op("Squeeze", guidance, b.integers(0)) if by_sample else guidance
        m = conditions.guided(b, m, guidance, x, phi)
    x0_previous = _of_batch(b, x0_previous, batch, sample_shape(model))
    x_new, x0, c6, _ = _update(b, b.op("Squeeze", row, b.integers(0)), x, m, x0_previous, clip)
    z = b.op("Squeeze", b.op("Gather", noise, b.op("Sub", index, noise_start), axis=0), b.integers(0))
    b.output(_noisy(b, x_new, c6, z, x), "x_next", FLOAT, images, "x of the next step; at last the images, not clamped")
    b.output(x0, "x0", FLOAT, images, "x0_previous of the next step")
    b.output(b.op("Add", index, b.integers(1)), "index_next", INT64, [1], "index of the next step")
    return model_of(b, "step", metadata, ABOUT["step"])


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
    """The metadata of a file of this kind (denoiser, sampler, step); `more` is added.

    `onnxruntime` is the oldest that runs it; denoisers and steps may run in older ones.
    """
    condition = condition_shape(run.model)
    if condition is not None and (null := conditions.null_of(run.model, condition)).any():
        more["null_condition"] = null.tolist()
    if recalls(run.model):
        more["self_condition"] = True
    if run.depth != DEPTHS[0]:
        more["depth"] = run.depth
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
        "onnxruntime": RUNTIME,
        "versions": versions(),
        **more,
    }
