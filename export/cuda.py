"""step.onnx under IOBinding and CUDA graphs: the state never leaves the device, a step is one replay.

Two buffer pairs alternate, A -> B and B -> A, each captured once under its own annotation id; x, x0 and the row's index
advance on the device. The host only refills the window of noise, so results are those of sampler.onnx. With provider
`cpu` the same loop runs without graphs, which is how it is tested where there is no GPU.
"""

from pathlib import Path

import numpy as np
import onnxruntime as ort

from export import run

# Steps of noise on the device at a time. Untuned.
WINDOW = 50
STATE = ("x", "x0_previous", "index")
RESULTS = ("x_next", "x0", "index_next")


class StepLoop:
    """Samples a fixed batch with step.onnx.

    Args:
        path: step.onnx. rows: float32 [steps, 8], the table to run (and its clip, None = none); None: the file's own,
        and the only one unless it was exported with --open-table.
        batch: samples per call. guided: whether the unconditional half is computed too.
        provider: cuda, or cpu. Raises ProviderError where it is missing.
    """

    def __init__(
        self,
        path: str | Path,
        rows: np.ndarray | None = None,
        clip: float | None = None,
        batch: int = 1,
        *,
        guided: bool = False,
        provider: str = "cuda",
    ) -> None:
        if provider not in ("cuda", "cpu"):
            raise run.UsageError(f"provider: got {provider!r}, needs cuda or cpu")
        graphs = provider == "cuda"
        self.session = run.open_session(path, provider, cuda_graph=graphs)
        self.metadata = run.metadata_of(self.session, path, "step")
        self.device, self.batch, self.guided = provider, batch, guided
        if type(batch) is not int or batch < 1:
            raise run.UsageError(f"batch: got {batch!r}, needs a whole number >= 1")
        run.check_clip(clip, rows)
        own = np.asarray(self.metadata["table"]["rows"], np.float32), self.metadata["table"]["clip"]
        self.rows, clip = own if rows is None else (run.check_table(rows, self.metadata, "rows"), clip)
        required = {value.name for value in self.session.get_inputs()}
        overridable = {value.name for value in self.session.get_overridable_initializers()}
        given = rows is not None and not (np.array_equal(self.rows, own[0]) and clip == own[1])
        if given and "table" not in required | overridable:
            raise run.UsageError(
                f"rows: got other ones than the model's, which are constants, needs {run.OPEN['table']}"
            )
        self.shape = tuple(self.metadata[side] for side in ("channels", "height", "width"))
        images = np.zeros((batch, *self.shape), np.float32)
        fixed = {"noise": np.zeros((WINDOW, *images.shape), np.float32), "noise_start": np.zeros(1, np.int64)}
        if given or "table" in required:  # the clip is a scalar input of the graph: rank 0
            fixed |= {"table": self.rows, "clip": np.array(np.inf if clip is None else clip, np.float32)}
        condition = run.condition_shape(self.metadata)
        if condition is not None:
            fixed["contexts"] = np.zeros((2 if guided else 1, batch, *condition), np.float32)
            by_sample = "guidance_rescale" in required
            fixed["guidance"] = np.ones(batch if by_sample else 1, np.float32)
            fixed |= {"guidance_rescale": np.zeros(1, np.float32)} if by_sample else {}
        self.fixed = {name: self._value(array) for name, array in fixed.items()}
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
        self,
        samples: np.ndarray,
        context: np.ndarray | None = None,
        *,
        seed: int = 0,
        guidance: float | np.ndarray = 1.0,
        negative: np.ndarray | None = None,
        guidance_rescale: float = 0.0,
    ) -> np.ndarray:
        """Images float32 [batch, C, H, W], not clamped, of consecutive global samples [batch]; else as `run.draw`."""
        if len(samples) != self.batch:
            raise run.UsageError(f"samples: got {len(samples)}, this loop was built for {self.batch}")
        run.check_draw(self.metadata, samples, context, seed, guidance)
        if np.any(np.asarray(guidance) != 1.0) and not self.guided:
            raise run.UsageError(f"guidance: got {guidance}, but this loop was built without guided=True")
        if context is not None:
            given = (self.metadata, context, guidance, negative, guidance_rescale, self.fixed)
            for name, value in run.step_conditions(*given, copies=2 if self.guided else 1).items():
                self.fixed[name].update_inplace(value)
        x, x0, index = self.buffers[0]
        x.update_inplace(run.normals(seed, samples, 0, 0, self.shape))
        x0.update_inplace(np.zeros((self.batch, *self.shape), np.float32))
        index.update_inplace(np.zeros(1, np.int64))
        for i in range(len(self.rows)):
            if i % WINDOW == 0:
                part = self.rows[i : i + WINDOW]
                padded = np.pad(part, ((0, WINDOW - len(part)), (0, 0)))
                self.fixed["noise"].update_inplace(run.step_noise(padded, seed, samples, self.shape))
                self.fixed["noise_start"].update_inplace(np.array([i], np.int64))
            self.session.run_with_iobinding(self.bindings[i % 2], self.options[i % 2])
        return self.buffers[len(self.rows) % 2][0].numpy().copy()
