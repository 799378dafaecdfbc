"""The network graph in other precisions. Both change the weights of the fp32 graph after BatchNorm was folded into it.

fp16: every weight and operator, half the size; a CPU computes it in fp32. int8: static QDQ of the convolutions,
activations uint8, weights int8 per channel (the pair that VNNI multiplies), calibrated on real trajectories.
"""

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor

from ddpm.networks.protocol import condition_shape, one_hot_conditions
from ddpm.runs import Run
from ddpm.sampling import sample
from export.graph import FLOAT, FLOAT16
from export.traced import Traced, exported_form, quiet

PRECISIONS = ("fp32", "fp16", "int8")
# Calibration: samples of every class along as many steps, guided, so that the zero context is seen too.
CALIBRATION_PER_CLASS, CALIBRATION_STEPS, CALIBRATION_GUIDANCE, CALIBRATION_SEED = 2, 20, 2.0, 1_000_003

QUANTISED = ["Conv"]  # MaxPool too: 1% faster, MatMul too: 2% slower (n_feat 64, batch 32, VNNI)

Call = tuple[Tensor | None, ...]


def trajectory_calls(run: Run, seed: int) -> list[Call]:
    """What the network is called with on real trajectories of every class: (x [n, ...], t [n], c [n, ...]) each.

    x0_previous [n, ...] comes last where it is read.
    """
    calls: list[Call] = []

    def note(_: torch.nn.Module, arguments: Call) -> None:
        calls.append(tuple(None if a is None else a.detach().clone() for a in arguments))

    shape = condition_shape(run.model)
    n = CALIBRATION_PER_CLASS * (1 if shape is None else math.prod(shape))
    given = {"context": one_hot_conditions(run.model, torch.arange(n)), "seed": seed, "engine": "eager"}
    given["guidance"] = 1.0 if shape is None else CALIBRATION_GUIDANCE
    options = run.options(steps=min(CALIBRATION_STEPS, run.schedule.timesteps), spacing="trailing")
    hook = run.model.register_forward_pre_hook(note)
    try:
        sample(run.model, run.schedule, n, **given, **options)
    finally:
        hook.remove()
    return calls


def to_fp16(network: onnx.ModelProto) -> onnx.ModelProto:
    """The flat network with fp16 weights and arithmetic between casts at its inputs and its output."""
    half = onnx.ModelProto()
    half.CopyFrom(network)
    graph = half.graph
    del graph.value_info[:]
    for tensor in graph.initializer:
        if tensor.data_type == FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    floats = (value.name for value in graph.input if value.type.tensor_type.elem_type == FLOAT)
    inputs = {name: f"{name}.fp16" for name in floats}
    (output,) = graph.output
    for node in graph.node:
        for names in (node.input, node.output):
            renamed = [inputs.get(name, "m.fp16" if name == output.name else name) for name in names]
            del names[:]
            names.extend(renamed)
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == FLOAT:
                attribute.i = FLOAT16
    casts = [helper.make_node("Cast", [old], [new], name=new, to=FLOAT16) for old, new in inputs.items()]
    nodes = [*casts, *graph.node, helper.make_node("Cast", ["m.fp16"], [output.name], name="m.fp32", to=FLOAT)]
    del graph.node[:]
    graph.node.extend(nodes)
    return half


def to_int8(network: onnx.ModelProto, names: Sequence[str], run: Run) -> onnx.ModelProto:
    """The flat network with its convolutions between quantise and dequantise nodes, calibrated on the run."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    form = exported_form(run.model)

    def feeds() -> Iterator[dict[str, np.ndarray]]:
        for x, t, c, *recalled in trajectory_calls(run, CALIBRATION_SEED):
            with torch.no_grad():
                values = (x, *form.tables(t[:1]), *(form.rows(c, len(x), False) or ()), *recalled)
            yield {name: value.numpy() for name, value in zip(names, values, strict=True)}

    calls = feeds()

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(calls, None)

    with tempfile.TemporaryDirectory() as folder, quiet():
        source, target = Path(folder) / "network.onnx", Path(folder) / "int8.onnx"
        onnx.save(network, source)
        how = {"op_types_to_quantize": QUANTISED, "per_channel": True, "quant_format": QuantFormat.QDQ}
        kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(source, target, Reader(), **how, **kinds)
        return onnx.load(target)


def in_precision(traced: Traced, precision: str, run: Run) -> Traced:
    """The fp32 graphs with their network in one of PRECISIONS."""
    if precision == "fp32":
        return traced
    network = to_fp16(traced.network) if precision == "fp16" else to_int8(traced.network, traced.names, run)
    return replace(traced, network=network)
