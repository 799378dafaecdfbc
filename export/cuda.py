"""step.onnx under IOBinding and CUDA graphs: the state never leaves the device, a step is one replay.

Two buffer pairs alternate, A -> B and B -> A, each captured once under its own annotation id; x, x0 and the row's index
advance on the device. The host only refills the window of noise, so results are those of sampler.onnx. With provider
`cpu` the same loop runs without graphs, which is how it is tested where there is no GPU.
"""

from pathlib import Path

import numpy as np
import onnxruntime as ort

from export.run import (
    COLUMNS,
    UsageError,
    check_draw,
    condition_shape,
    metadata_of,
    normals,
    null_conditions,
    open_session,
)

# Steps of noise on the device at a time. Untuned.
WINDOW = 50
STATE = ("x", "x0_previous", "index")
RESULTS = ("x_next", "x0", "index_next")


class StepLoop:
    """Samples a fixed batch with step.onnx.

    Args:
        path: step.onnx. rows: float32 [steps, 8], the table to run (and its clip, None = none).
        batch: samples per call. guided: whether the unconditional half is computed too.
        provider: cuda, or cpu. Raises ProviderError where it is missing.
    """

    def __init__(
        self,
        path: str | Path,
        rows: np.ndarray,
        clip: float | None,
        batch: int,
        *,
        guided: bool = False,
        provider: str = "cuda",
        threads: int = 0,
    ) -> None:
        if provider not in ("cuda", "cpu"):
            raise UsageError(f"provider: got {provider!r}, needs cuda or cpu")
        rows = np.ascontiguousarray(rows, np.float32)
        if rows.ndim != 2 or rows.shape[1] != COLUMNS or not len(rows):
            raise UsageError(f"rows: got {list(rows.shape)}, needs [steps, {COLUMNS}]")
        if batch < 1:
            raise UsageError(f"batch: got {batch}, needs at least 1")
        graphs = provider == "cuda"
        self.session = open_session(path, provider, threads, cuda_graph=graphs)
        self.metadata = metadata_of(self.session, path, "step")
        self.device, self.batch, self.guided = provider, batch, guided
        self.rows = rows
        self.shape = tuple(self.metadata[side] for side in ("channels", "height", "width"))
        images = np.zeros((batch, *self.shape), np.float32)
        self.fixed = {
            "noise": self._value(np.zeros((WINDOW, *images.shape), np.float32)),
            "noise_start": self._value(np.zeros(1, np.int64)),
            "table": self._value(self.rows),
            # A scalar input of the graph: rank 0.
            "clip": self._value(np.array(np.inf if clip is None else clip, np.float32)),
        }
        condition = condition_shape(self.metadata)
        if condition is not None:
            copies = 2 if guided else 1
            self.fixed["contexts"] = self._value(np.zeros((copies, batch, *condition), np.float32))
            self.fixed["guidance"] = self._value(np.ones(1, np.float32))
        self.buffers = [[self._value(v) for v in (images, images, np.zeros(1, np.int64))] for _ in "AB"]
        self.bindings = [self._binding(*self.buffers), self._binding(*reversed(self.buffers))]
        self.options = [ort.RunOptions() for _ in self.bindings]
        if graphs:
            for number, options in enumerate(self.options):
                options.add_run_config_entry("gpu_graph_id", str(number))

    def _value(self, array: np.ndarray) -> ort.OrtValue:
        """A buffer of its own on the device: a value on the CPU is a view of the array it is made from."""
        return ort.OrtValue.ortvalue_from_numpy(array.copy(), self.device, 0)

    def _binding(self, source: list[ort.OrtValue], target: list[ort.OrtValue]) -> ort.IOBinding:
        binding = self.session.io_binding()
        for name, value in (*self.fixed.items(), *zip(STATE, source, strict=True)):
            binding.bind_ortvalue_input(name, value)
        for name, value in zip(RESULTS, target, strict=True):
            binding.bind_ortvalue_output(name, value)
        return binding

    def __call__(
        self, samples: np.ndarray, context: np.ndarray | None = None, *, seed: int = 0, guidance: float = 1.0
    ) -> np.ndarray:
        """Images float32 [batch, C, H, W], not clamped, of consecutive global samples [batch]."""
        if len(samples) != self.batch:
            raise UsageError(f"samples: got {len(samples)}, this loop was built for {self.batch}")
        if guidance != 1.0 and not self.guided:
            raise UsageError(f"guidance: got {guidance}, but this loop was built without guided=True")
        check_draw(self.metadata, samples, context, seed, guidance)
        if context is not None:
            context = np.ascontiguousarray(context, np.float32)
            nothing = null_conditions(self.metadata, self.batch)
            copies = np.stack([context, nothing]) if self.guided else context[None]
            self.fixed["contexts"].update_inplace(copies)
            self.fixed["guidance"].update_inplace(np.array([guidance], np.float32))
        x, x0, index = self.buffers[0]
        x.update_inplace(normals(seed, samples, 0, 0, self.shape))
        x0.update_inplace(np.zeros((self.batch, *self.shape), np.float32))
        index.update_inplace(np.zeros(1, np.int64))
        for i in range(len(self.rows)):
            if i % WINDOW == 0:
                self.fixed["noise"].update_inplace(self._noise(seed, samples, i))
                self.fixed["noise_start"].update_inplace(np.array([i], np.int64))
            self.session.run_with_iobinding(self.bindings[i % 2], self.options[i % 2])
        return self.buffers[len(self.rows) % 2][0].numpy().copy()

    def _noise(self, seed: int, samples: np.ndarray, start: int) -> np.ndarray:
        """The next WINDOW steps of noise; zeros where the table adds none."""
        noise = np.zeros((WINDOW, len(samples), *self.shape), np.float32)
        for k, row in enumerate(self.rows[start : start + WINDOW]):
            if row[6] != 0:
                noise[k] = normals(seed, samples, int(row[7]), 1, self.shape)
        return noise
