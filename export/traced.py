"""A network as flat ONNX graphs, traced from its inference form: `ddpm.inference` is the only description there is.

tables    times [S], what forward gets                     -> what depends on the step alone, each [S, ...]
rows      conditions [r, *condition_shape]                 -> what depends on the condition alone, each [1, r, ...]
network   x [n, ...], a row of each table, rows [k, n, ..] -> m [k * n, ...]; x0_previous [n, ..] last, if it is read
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.export import Dim

from ddpm.errors import WorkFailed
from ddpm.inference import EXPORTED, Form, make_form
from ddpm.interrupts import interrupts_wait
from ddpm.networks.protocol import condition_shape, in_type, network_times, recalls, sample_shape
from export.graph import OPSET

EXAMPLE_ROWS = 3  # any but 0 and 1, which tracing would take for fixed


@dataclass(frozen=True)
class Traced:
    """The three graphs of a network; rows is None without a condition. names: the network's inputs."""

    tables: onnx.ModelProto
    rows: onnx.ModelProto | None
    network: onnx.ModelProto
    names: tuple[str, ...]


class _Part(nn.Module):
    """A function of (form, *arguments) as a module whose weights are the form's."""

    def __init__(self, form: Form, call: Callable[..., Any]) -> None:
        super().__init__()
        self.form, self.call = form, call

    def forward(self, first: Tensor, *more: Tensor) -> Any:
        return self.call(self.form, first, *more)


class Denoiser(nn.Module):
    """forward(x, t[, context, x0_previous]) -> m by the network's form: what torch.export and AOTInductor take."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.form = exported_form(model)

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None, x0_previous: Tensor | None = None) -> Tensor:
        recalled = () if x0_previous is None else (x0_previous,)
        return self.form(x, self.form.tables(t), self.form.rows(context, x.shape[0], False), *recalled)


def exported_form(model: nn.Module) -> Form:
    """The float32 form of plain operators."""
    return make_form(model, torch.float32, EXPORTED).eval()


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


def example_times(model: nn.Module, count: int = 1) -> Tensor:
    """Times as forward gets them, float32 or int64 [count]."""
    return in_type(network_times(model, torch.ones(count, dtype=torch.int64), 1))


def _graph(part: _Part, arguments: Sequence[Tensor], names: Sequence[str], outputs: Sequence[str], *shapes: Any) -> Any:
    with torch.no_grad(), quiet(), interrupts_wait():
        program = torch.onnx.export(
            part.eval(),
            tuple(arguments),
            dynamo=True,
            optimize=True,
            external_data=False,
            opset_version=OPSET,
            input_names=list(names),
            output_names=list(outputs),
            dynamic_shapes=(shapes[0], shapes[1:])[: len(shapes)],
            verbose=False,
        )
    return program.model_proto


def trace(model: nn.Module) -> Traced:
    """The graphs of a network on the CPU, float32, with a dynamic batch and any number of copies.

    Raises WorkFailed for a network that the exporter cannot follow, with its reason.
    """
    try:
        form, shape, n = exported_form(model), condition_shape(model), EXAMPLE_ROWS
        batch, copies = Dim("batch"), Dim("copies")
        times = example_times(model, n)
        conditions = None if shape is None else torch.zeros(n, *shape)
        with torch.no_grad():
            table_row = form.tables(times[:1])
            rows = () if conditions is None else form.rows(conditions, n, True)
        table_names = tuple(f"table{k}" for k, _ in enumerate(table_row, start=1))
        row_names = tuple(f"rows{k}" for k, _ in enumerate(rows, start=1))
        of_times = _Part(form, lambda form, times: tuple(table.clone() for table in form.tables(times)))
        tables = _graph(of_times, (times,), ("times",), table_names, {0: Dim("steps")})
        rows_graph = None
        if conditions is not None:
            of_rows = _Part(form, lambda form, c: tuple(row.clone() for row in form.rows(c, c.shape[0], False)))
            rows_graph = _graph(of_rows, (conditions,), ("conditions",), row_names, {0: batch})
        x, recalled = torch.zeros(n, *sample_shape(model)), ("x0_previous",) if recalls(model) else ()
        cut, end, names = len(table_row), len(table_row) + len(rows), ("x", *table_names, *row_names, *recalled)
        of_x = _Part(form, lambda form, x, *more: form(x, more[:cut], more[cut:end] or None, *more[end:]))
        dynamic = ({0: batch}, *({} for _ in table_row), *({0: copies, 1: batch} for _ in rows))
        dynamic += tuple({0: batch} for _ in recalled)
        arguments = (x, *table_row, *rows, *(torch.zeros_like(x) for _ in recalled))
        return Traced(tables, rows_graph, _graph(of_x, arguments, names, ("m",), *dynamic), names)
    except Exception as error:  # the exporter raises nearly anything on code that it cannot follow
        reason = " ".join((str(error) or type(error).__name__).split())[:300]
        raise WorkFailed(f"{type(model).__name__}: PyTorch's exporter cannot follow its forward: {reason}") from error
