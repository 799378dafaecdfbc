"""Trajectory: a run of a table, prepared once and run many times."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ddpm.engines import Engine, choose
from ddpm.engines.engine import Callback, FormOf
from ddpm.errors import check_integer
from ddpm.inference import FORMS, device_of, has_form, make_form
from ddpm.networks.protocol import rows_of_condition, sample_shape
from ddpm.noise import Noise, PhiloxNoise
from ddpm.schedule import NoiseSchedule
from ddpm.table import StepTable
from kernels import philox

logger = logging.getLogger("ddpm")

# Rows per chunk when `batch_size` is None: untuned, 256 keeps a 64-wide 16x16 network's activations below 1 GiB.
CHUNK_PIXELS = 256 * 16 * 16


def chunk_size(shape: tuple[int, ...]) -> int:
    """Samples per chunk by default."""
    return max(1, CHUNK_PIXELS // math.prod(shape[1:]))


def _checked(noise: Noise, dtype: torch.dtype) -> Noise:
    """The same noise in the state's type; ValueError if it comes in another shape. Philox stays what engines know."""
    if isinstance(noise, PhiloxNoise):
        return replace(noise, dtype=dtype)

    def draw(samples: Tensor, step: int, stream: int, shape: tuple[int, ...]) -> Tensor:
        z = noise(samples, step, stream, shape)
        if tuple(z.shape) != (len(samples), *shape):
            raise ValueError(f"noise: returned {list(z.shape)}, needs {[len(samples), *shape]}")
        return z.to(dtype)

    return draw


def _out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed; for CPU tensors PyTorch has no exception of its own."""
    words = ("can't allocate memory", "bad_alloc")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in words)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, without gradients or autocast; every submodule gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with _computing(device_of(model)):
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _computing(device: torch.device) -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


class Trajectory:
    """A table prepared to be run on a model: trajectory(n, seed=7) -> samples.

    Args:
        model: a network (see `ddpm.networks.protocol`), on its device. schedule: the one it was trained with.
        table: what to run, see `make_table`. engine: see `ddpm.engines`; `auto` chooses and logs what it chose.
        dtype: what the network computes in. The state is float32, or float64 for float64.
        guided: whether it may be called with a guidance other than 1.

    It holds the inference form, what was compiled or captured, and the buffers: a second call of the same shapes
    prepares nothing. The form keeps the weights that it was made with until `refresh()`; engine `eager`, and the form
    of a network without one of its own, follow the live module (its copy, where dtype is not the module's, until then).

    Raises ValueError or TypeError naming the argument; RuntimeError if the engine cannot run here.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: NoiseSchedule,
        table: StepTable,
        *,
        engine: str = "auto",
        dtype: torch.dtype = torch.float32,
        guided: bool = False,
        form: FormOf = make_form,
    ) -> None:
        if not isinstance(table, StepTable):
            raise TypeError(f"table: got a {type(table).__name__}, needs a StepTable (see make_table)")
        if getattr(model, "self_condition", False):
            raise ValueError("self_condition: got True, which engines do not keep an estimate for yet, needs False")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype: got {dtype!r}, needs a floating type of torch")
        start, end = float(table.timesteps[0]), schedule.timesteps
        if start > end:
            raise ValueError(f"table: starts at timestep {start:g}, the schedule ends at {end}, needs a table for it")
        self.model, self.schedule, self.table = model, schedule, table
        self.dtype, self.guided = dtype, guided
        self.shape, self.device = sample_shape(model), device_of(model)
        self.state_dtype = torch.promote_types(dtype, torch.float32)
        self._asked, self._form = engine, form
        self._engines: dict[bool, Engine] = {}
        self._prepared(custom_noise=False)

    @property
    def engine(self) -> str:
        """The name of the engine that runs it with the noise contract's noise."""
        return self._prepared(custom_noise=False).name

    def _prepared(self, custom_noise: bool) -> Engine:
        """The engine for this kind of noise; a second one shares the form of the first."""
        if custom_noise not in self._engines:
            # What is hooked matters where graphs capture.
            captures = self._asked == "auto" and self.device.type == "cuda"
            plain = type(self.model) not in FORMS or (captures and not has_form(self.model))
            kind = choose(self._asked, self.device, self.dtype, custom_noise, plain)
            engine = next(iter(self._engines.values()), None)
            if type(engine) is not kind:
                form = (lambda *_, held=engine: held.form) if hasattr(engine, "form") else self._form
                with _computing(self.device):
                    engine = kind(self.model, self.schedule.timesteps, self.table, self.dtype, form)
            self._engines[custom_noise] = engine
        return self._engines[custom_noise]

    def refresh(self) -> None:
        """Take over the model's present weights. What was compiled or captured is kept where it serves them."""
        forms = [engine.form for engine in self._engines.values() if hasattr(engine, "form")]
        if any(not form.live for form in forms) and not has_form(self.model):  # modules were exchanged, or hooked
            self._engines.clear()
            self._prepared(custom_noise=False)
            return
        with _computing(self.device):
            for engine in set(self._engines.values()):
                engine.refresh(self.model)

    def __call__(
        self,
        n: int,
        context: Tensor | None = None,
        guidance: float = 1.0,
        seed: int = 0,
        first_sample: int = 0,
        batch_size: int | None = None,
        noise: Noise | None = None,
        x_T: Tensor | None = None,  # noqa: N803 (its name in the papers)
        callback: Callback | None = None,
    ) -> Tensor:
        """Draw n samples. Sample k depends on (weights, table, seed, first_sample + k) alone.

        Args:
            n: how many, >= 1.
            context: a condition for all, or [n, ...] one a sample; None = unconditional.
            guidance: w in m_uncond + w (m_cond - m_uncond); 1 = conditional only. Any other needs a context.
            seed: 0 <= seed < 2^63. first_sample: global index of the first sample, >= 0.
            batch_size: samples per chunk, default by image size; results do not depend on it. A chunk that runs out of
                memory starts again with half as many, which is logged.
            noise: noise(samples, step, stream, shape) -> [n, *shape] instead of Philox, or a `PhiloxNoise`.
            x_T: [n, *sample_shape] to start from instead of noise.
            callback: callback(row, x0) after every row 0..len(table)-1 of every chunk; x0 [chunk, *shape], the present
                estimate, is overwritten by later rows. It costs a state in memory, `graph` replays single rows.

        Returns float32 [n, *sample_shape] on the model's device, not clamped. Raises as the constructor does.
        """
        check_integer("n", n)
        check_integer("batch_size", 1 if batch_size is None else batch_size)
        check_integer("first_sample", first_sample, 0)
        philox.check_seed(seed)
        if first_sample > philox.SAMPLE_LIMIT - n:
            raise ValueError(f"first_sample: got {first_sample}, needs 0..2^56 - n")
        if isinstance(guidance, str) or guidance is None or not math.isfinite(guidance):
            raise ValueError(f"guidance: got {guidance!r}, needs a finite number")
        if guidance != 1.0 and context is None:
            raise ValueError(f"guidance: got {guidance} without a context, needs a context to guide towards")
        if guidance != 1.0 and not self.guided:
            raise ValueError(f"guidance: got {guidance}, but this trajectory was prepared without guided=True")
        if x_T is not None and tuple(x_T.shape) != (n, *self.shape):
            raise ValueError(f"x_T: got {list(x_T.shape)}, needs {[n, *self.shape]}")
        contexts = rows_of_condition(self.model, context, n, self.device)
        batch_size = chunk_size(self.shape) if batch_size is None else batch_size
        draw = _checked(PhiloxNoise(seed) if noise is None else noise, self.state_dtype)
        engine = self._prepared(custom_noise=not isinstance(draw, PhiloxNoise))
        with evaluating(self.model) if engine.live else _computing(self.device):
            chunks, start = [], 0
            while start < n:
                part = slice(start, min(start + batch_size, n))
                samples = torch.arange(first_sample + part.start, first_sample + part.stop, device=self.device)
                c = None if contexts is None else contexts[part]
                try:
                    if x_T is None:
                        x = draw(samples, 0, philox.Stream.INITIAL, self.shape)
                    else:
                        x = x_T[part].to(self.device, self.state_dtype)
                    chunks.append(engine(x, samples, c, guidance, draw, callback).to(torch.float32))
                except (MemoryError, RuntimeError) as error:
                    count = part.stop - part.start
                    if count == 1 or not _out_of_memory(error):
                        raise
                    batch_size = count // 2
                    logger.info("out of memory with %d samples at a time: going on with %d", count, batch_size)
                    continue
                start = part.stop
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks)
