"""The three ONNX models of a run: denoiser, sampler (the whole trajectory as one Scan) and step.

All are wrapped around one network graph, (x, time1, time2[, context1, context2]) -> m, traced from `GatedNetwork`; a
precision is a change of that graph alone. Everything around it is float32 (the noise float64 inside).
"""

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import onnx
import torch
from torch.export import Dim

from ddpm.networks import ContextUnet
from ddpm.solvers import StepTable
from export.graph import FLOAT, INT64, OPSET, Builder, model_of
from export.network import GatedNetwork, embeddings
from export.philox_graph import counters, normals, step_word
from export.run import COLUMNS
from kernels.philox import Stream


def network_inputs(model: ContextUnet) -> list[str]:
    """Names of the network graph's inputs."""
    return ["x", "time1", "time2"] + (["context1", "context2"] if model.n_cfeat else [])


def gates(model: ContextUnet, t: torch.Tensor, *contexts: torch.Tensor) -> list[torch.Tensor]:
    """The gates of times t [1 or n] and of one context [n, n_cfeat] per copy, as `GatedNetwork` takes them."""
    time = [embed(t) for embed in embeddings(model, "time")]
    if not model.n_cfeat:
        return time
    return time + [torch.stack([embed(c) for c in contexts]) for embed in embeddings(model, "context")]


@contextmanager
def quiet() -> Iterator[None]:
    """Exporter and quantiser tell of every pass they make, and warn of what does not concern us (torchvision, axes)."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def network_graph(model: ContextUnet) -> onnx.ModelProto:
    """The fp32 network as a flat ONNX model with a dynamic batch and any number of copies."""
    network = GatedNetwork(model).eval()
    x = torch.zeros(3, *model.sample_shape)
    contexts = [torch.zeros(3, model.n_cfeat)] * 2
    with torch.no_grad(), quiet():
        arguments = (x, *gates(model, torch.ones(1), *contexts))
        batch, copies = Dim("batch"), Dim("copies")
        time, context = [{}, {}], [{0: copies, 1: batch}] * (2 if model.n_cfeat else 0)
        program = torch.onnx.export(
            network,
            arguments,
            dynamo=True,
            optimize=True,
            external_data=False,
            opset_version=OPSET,
            input_names=network_inputs(model),
            output_names=["m"],
            dynamic_shapes=({0: batch}, (*time, *context)),
            verbose=False,
        )
    return program.model_proto


def _embed(b: Builder, model: ContextUnet, kind: str, value: str) -> list[str]:
    """Linear, GELU, Linear of every gated level: value [rows, features] -> one [rows, width] each."""
    results = []
    for embed in embeddings(model, kind):
        hidden = value
        for position in (0, 2):
            layer = embed.model[position]
            weight, bias = (b.constant(p.detach().numpy(), np.float32) for p in (layer.weight, layer.bias))
            hidden = b.op("Gemm", hidden, weight, bias, transB=1)
            if position == 0:
                hidden = b.op("Gelu", hidden)
        results.append(hidden)
    return results


def denoiser(model: ContextUnet, network: onnx.ModelProto, metadata: str) -> onnx.ModelProto:
    """x [batch, C, H, W], t [batch] in (0, 1], context [batch, n_cfeat] (if there is one) -> m, as `forward(x, t, c)`.

    A t of another length than x's batch is an error of its Reshape, not a broadcast.
    """
    b = Builder()
    shape = ("batch", *model.sample_shape)
    x, t = b.input("x", FLOAT, shape), b.input("t", FLOAT, ["batch"])
    batch = b.op("Shape", x, start=0, end=1)
    times = b.op("Reshape", t, b.op("Concat", batch, b.integers(1), axis=0), allowzero=1)
    arguments = [x, *_embed(b, model, "time", times)]
    if model.n_cfeat:
        context = b.input("context", FLOAT, ["batch", model.n_cfeat])
        rows = b.op("Concat", batch, b.integers(model.n_cfeat), axis=0)
        context = b.op("Reshape", context, rows, allowzero=1)
        arguments += [b.op("Unsqueeze", gate, b.integers(0)) for gate in _embed(b, model, "context", context)]
    (m,) = b.inline(network.graph, arguments, "network.")
    b.output(m, "m", FLOAT, shape)
    return model_of(b, "denoiser", metadata)


def _table_inputs(b: Builder, table: StepTable) -> tuple[str, str]:
    """The overridable defaults: rows [steps, 8] and the bound of x0 (infinity = none)."""
    rows = b.input("table", FLOAT, ["steps", COLUMNS], table.rows().numpy())
    return rows, b.input("clip", FLOAT, [], math.inf if table.clip is None else table.clip)


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


def _times(b: Builder, rows: str, timesteps: int) -> str:
    """t / T of table rows [k, 8]: [k, 1]."""
    t = b.op("Slice", rows, b.integers(COLUMNS - 1), b.integers(COLUMNS), b.integers(1))
    return b.op("Div", t, b.constant(timesteps, np.float32))


def _context_gates(b: Builder, model: ContextUnet, context: str, guidance: str) -> list[str]:
    """Gates [copies, batch, width] of context [batch, n_cfeat]: the unconditional copy only where guidance is not 1."""
    one, zero = b.constant(1.0, np.float32), b.integers(0)
    guided = b.op("Cast", b.op("Not", b.op("Equal", guidance, one)), to=INT64)
    copies = b.op("Reshape", b.op("Add", guided, b.constant(1, np.int64)), b.integers(1))
    given = _embed(b, model, "context", context)
    nothing = _embed(b, model, "context", b.op("Mul", context, b.constant(0.0, np.float32)))
    pairs = zip(given, nothing, strict=True)
    both = [b.op("Concat", *(b.op("Unsqueeze", gate, zero) for gate in pair), axis=0) for pair in pairs]
    return [b.op("Slice", gate, zero, copies, zero) for gate in both]


def _noisy(b: Builder, x_new: str, c6: str, z: str) -> str:
    return b.op("Add", x_new, b.op("Mul", c6, z))


def _given(b: Builder, z: str, x: str) -> str:
    """Noise that a caller gave: of another batch than x it is an error of its Reshape, not a broadcast."""
    return b.op("Reshape", z, b.op("Shape", x), allowzero=1)


def sampler(
    model: ContextUnet, network: onnx.ModelProto, table: StepTable, timesteps: int, noise: str, metadata: str
) -> onnx.ModelProto:
    """The whole trajectory as one Scan over the table's rows.

    Inputs: seed and first_sample (int64 scalars), context [batch, n_cfeat] and guidance (float scalar) or, without
    contexts, n (int64 scalar); table [steps, 8] and clip (float scalar) override the defaults. Output: images.
    noise: `philox` draws in the graph; `input` takes x_T [batch, C, H, W] and noise [steps, batch, C, H, W] in place of
    seed and first_sample; `none` draws x_T alone, for tables without noise.

    The weights lie in the Scan's body: onnxruntime blocks no convolution (NCHWc) whose weights are in the outer graph.
    """
    shape, drawn = model.sample_shape, noise != "input"
    images = ("batch", *shape)
    b = Builder()
    if drawn:
        seed, first_sample = b.input("seed", INT64, []), b.input("first_sample", INT64, [], 0)
    else:
        start, z_given = b.input("x_T", FLOAT, images), b.input("noise", FLOAT, ("steps", *images))
    if model.n_cfeat:
        context, guidance = b.input("context", FLOAT, ["batch", model.n_cfeat]), b.input("guidance", FLOAT, [], 1.0)
        batch = b.op("Shape", context, start=0, end=1)
    elif drawn:
        batch = b.input("n", INT64, [])
    rows, clip = _table_inputs(b, table)
    if drawn:
        shared = counters(b, seed, first_sample, b.op("Squeeze", batch))
        start = normals(b, shared, b.constant(0, np.uint64), Stream.INITIAL, shape)
    times = [b.op("Unsqueeze", gate, b.integers(1)) for gate in _embed(b, model, "time", _times(b, rows, timesteps))]
    contexts = _context_gates(b, model, context, guidance) if model.n_cfeat else []

    body = Builder("body.")
    x, x0_previous = body.input("x", FLOAT, images), body.input("x0_previous", FLOAT, images)
    row = body.input("row", FLOAT, [COLUMNS])
    time = [body.input(f"time{k}", FLOAT, [1, None]) for k, _ in enumerate(times, start=1)]
    (m,) = body.inline(network.graph, [x, *time, *contexts], "network.")
    if model.n_cfeat:
        m = _guided(body, m, guidance, x)
    x_new, x0, c6, t = _update(body, row, x, m, x0_previous, clip)
    scanned = [rows, *times]
    if noise == "input":
        scanned.append(z_given)
        x_new = _noisy(body, x_new, c6, _given(body, body.input("z", FLOAT, images), x))
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


def step(
    model: ContextUnet, network: onnx.ModelProto, table: StepTable, timesteps: int, metadata: str
) -> onnx.ModelProto:
    """One self-advancing step, for IOBinding and CUDA graphs: no Scan, no Philox, nothing read on the host.

    Inputs: x, x0_previous [batch, C, H, W]; index int64 [1], the table's row; noise [window, batch, C, H, W], whose
    entry index - noise_start (int64 [1]) is this step's; contexts [copies, batch, n_cfeat] (two copies, the second of
    zeros, for guidance); guidance [1]; table and clip as in the sampler. Outputs: x_next, x0, index_next = index + 1.
    """
    b = Builder()
    images = ("batch", *model.sample_shape)
    x, x0_previous = b.input("x", FLOAT, images), b.input("x0_previous", FLOAT, images)
    index = b.input("index", INT64, [1])
    noise, noise_start = b.input("noise", FLOAT, ("window", *images)), b.input("noise_start", INT64, [1])
    if model.n_cfeat:
        contexts = b.input("contexts", FLOAT, ["copies", "batch", model.n_cfeat])
        guidance = b.input("guidance", FLOAT, [1])
    rows, clip = _table_inputs(b, table)
    row = b.op("Gather", rows, index, axis=0)
    arguments = [x, *_embed(b, model, "time", _times(b, row, timesteps))]
    if model.n_cfeat:
        flat = b.op("Reshape", contexts, b.integers(-1, model.n_cfeat))
        leading = b.op("Shape", contexts, start=0, end=2)
        for gate in _embed(b, model, "context", flat):
            arguments.append(b.op("Reshape", gate, b.op("Concat", leading, b.integers(-1), axis=0)))
    (m,) = b.inline(network.graph, arguments, "network.")
    if model.n_cfeat:
        m = _guided(b, m, guidance, x)
    x_new, x0, c6, _ = _update(b, b.op("Squeeze", row, b.integers(0)), x, m, x0_previous, clip)
    z = b.op("Squeeze", b.op("Gather", noise, b.op("Sub", index, noise_start), axis=0), b.integers(0))
    b.output(_noisy(b, x_new, c6, _given(b, z, x)), "x_next", FLOAT, images)
    b.output(x0, "x0", FLOAT, images)
    b.output(b.op("Add", index, b.integers(1)), "index_next", INT64, [1])
    return model_of(b, "step", metadata)
