"""A small builder of ONNX graphs: operators as calls, constants and copied weights as initialisers."""

from collections.abc import Sequence
from functools import partial, reduce
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

OPSET = 20  # keeps GroupNorm as Reshape + InstanceNormalization (21 expands it) and has Gelu
IR_VERSION = 10  # what goes with opset 20-22: every onnxruntime since 1.18 reads it
FLOAT, FLOAT16, DOUBLE = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE
INT64, UINT64, BOOL = onnx.TensorProto.INT64, onnx.TensorProto.UINT64, onnx.TensorProto.BOOL


class Builder:
    """Nodes and initialisers of one graph; values are names. A body gets its own Builder with another prefix."""

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.initialisers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self._known: dict[tuple, str] = {}
        self._count = 0

    def _name(self, kind: str) -> str:
        self._count += 1
        return f"{self.prefix}{kind}_{self._count}"

    def many(self, kind: str, *inputs: str, outputs: int, name: str | None = None, **attributes: Any) -> list[str]:
        """An operator with several outputs: their names. name: the node's own, which errors of it show."""
        names = [self._name(kind) for _ in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, name=name or names[0], **attributes))
        return names

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """An operator with one output: its name."""
        return self.many(kind, *inputs, outputs=1, **attributes)[0]

    def constant(self, value: Any, dtype: Any) -> str:
        """An initialiser, shared by equal constants."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._known:
            self._known[key] = self._name("constant")
            self.initialisers.append(numpy_helper.from_array(array, self._known[key]))
        return self._known[key]

    def integers(self, *values: int) -> str:
        """An int64 vector."""
        return self.constant(values, np.int64)

    def sum_of(self, *terms: str) -> str:
        """Left to right, as the eager path adds."""
        return reduce(partial(self.op, "Add"), terms)

    def refused(self, value: str, wrong: str, says: str, dtype: Any) -> str:
        """The value; where `wrong` (bool) is true the graph fails, in a node that is named what it says.

        Nothing is gathered from outside of a list of one number. Clients that do not check indices do not fail.
        """
        index = self.op("Cast", wrong, to=INT64)
        return self.op("Add", value, self.op("Gather", self.constant([0], dtype), index, axis=0, name=says))

    def input(self, name: str, dtype: int, shape: Sequence[int | str | None], doc: str = "") -> str:
        """A graph input."""
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape, doc))
        return name

    def output(self, value: str, name: str, dtype: int, shape: Sequence[int | str | None], doc: str = "") -> None:
        """A graph output of this name."""
        self.nodes.append(helper.make_node("Identity", [value], [name], name=f"{self.prefix}{name}"))
        self.outputs.append(helper.make_tensor_value_info(name, dtype, shape, doc))

    def inline(self, graph: onnx.GraphProto, arguments: Sequence[str], prefix: str) -> list[str]:
        """Copy a flat graph with its weights into this one, its inputs bound in order: the names of its outputs."""
        prefix = self.prefix + prefix
        names = {"": ""} | {tensor.name: prefix + tensor.name for tensor in graph.initializer}
        open_inputs = [value.name for value in graph.input if value.name not in names]
        names |= dict(zip(open_inputs, arguments, strict=True))
        for tensor in graph.initializer:
            copied = onnx.TensorProto()
            copied.CopyFrom(tensor)
            copied.name, copied.doc_string = names[tensor.name], ""
            self.initialisers.append(copied)
        for node in graph.node:
            names |= {output: prefix + output for output in node.output if output}
            # Without what exporters note in it: stack traces hold local paths.
            plain = onnx.NodeProto(op_type=node.op_type, domain=node.domain, name=prefix + node.name)
            plain.input.extend(map(names.__getitem__, node.input))
            plain.output.extend(map(names.__getitem__, node.output))
            plain.attribute.extend(node.attribute)
            self.nodes.append(plain)
        return [names[value.name] for value in graph.output]

    def graph(self, name: str, doc: str = "") -> onnx.GraphProto:
        return helper.make_graph(self.nodes, name, self.inputs, self.outputs, self.initialisers, doc)


def model_of(builder: Builder, name: str, metadata: str, doc: str = "") -> onnx.ModelProto:
    """The model of a finished graph, checked; `metadata` is stored under the key `fused_ddpm`, doc is for readers."""
    model = helper.make_model(
        builder.graph(name, doc),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="fused-ddpm",
        model_version=1,
        doc_string=doc,
    )
    helper.set_model_props(model, {"fused_ddpm": metadata})
    onnx.checker.check_model(model)
    return model
