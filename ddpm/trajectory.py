"""Trajectory: a run of a table, prepared once and run many times."""

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ddpm.engines import Engine, choose
from ddpm.engines.engine import Callback, FormOf, guides
from ddpm.errors import WorkFailed, check_integer, check_number
from ddpm.inference import device_of, form_of, has_form, lock_of, make_form
from ddpm.networks.protocol import rows_of_condition, sample_shape
from ddpm.noise import Noise, PhiloxNoise
from ddpm.schedule import NoiseSchedule
from ddpm.table import FLOAT32_MAX, StepTable
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


# What PyTorch says of an allocation that failed: for CPU tensors there is no exception of its own.
NO_MEMORY = ("can't allocate memory", "not enough memory", "bad_alloc", "ALLOC_FAILED")
# All that oneDNN says of one; "could not create a primitive descriptor .." is another matter.
NO_PRIMITIVE = ("could not create a primitive", "could not execute a primitive")


def _without_primitive(error: Exception) -> bool:
    return str(error).strip() in NO_PRIMITIVE


def _out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed."""
    said = any(words in str(error) for words in NO_MEMORY) or _without_primitive(error)
    return said or isinstance(error, MemoryError | torch.OutOfMemoryError)


def _numbers(name: str, values: Any, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """As a tensor on the device. Raises TypeError for what is none."""
    try:
        return None if values is None else torch.as_tensor(values, dtype=dtype, device=device)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{name}: got a {type(values).__name__}, needs a tensor or numbers ({error})") from error


def weights_of(guidance: Any, n: int) -> float | Tensor:
    """A weight for all n samples, or one for each, float64 [n] on the CPU. Raises ValueError or TypeError."""
    shape = tuple(getattr(guidance, "shape", ()))
    if not isinstance(guidance, list | tuple) and shape != (n,) and math.prod(shape) == 1:
        return check_number("guidance", guidance, -FLOAT32_MAX, FLOAT32_MAX, "a finite number in float32")
    weights = _numbers("guidance", guidance, torch.device("cpu"), torch.float64)
    if weights.shape != (n,):
        raise ValueError(f"guidance: got weights {list(weights.shape)}, needs a number or [{n}], one for each sample")
    for k in (~(weights.abs() <= FLOAT32_MAX)).nonzero().flatten().tolist():
        raise ValueError(f"guidance: got {weights[k]:g} for sample {k} of the {n}, needs finite numbers in float32")
    return weights


def check_room(name: str, n: int, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise ValueError at once for more samples than the memory of the whole machine could hold."""
    size, total = 4 * n * math.prod(shape), math.inf
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf"):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > total:
        needs = f"at most {total // (size // n)}: the {total / 1e9:.0f} GB of {device} hold no more"
        raise ValueError(f"{name}: got {n}, which are {size / 1e9:.3g} GB of samples, needs {needs}")


def evaluating(model: nn.Module, work: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """work(*arguments) with the model in eval mode; every submodule gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]

    def restore() -> None:
        for module, training in modes:
            module.training = training

    try:
        try:
            model.eval()
            return work(*arguments)
        finally:
            restore()
    except BaseException:  # an interrupt, which may have fallen into that
        restore()
        raise


@contextmanager
def _computing(device: torch.device) -> Iterator[None]:
    """Without gradients or autocast."""
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
    Threads that sample one model take turns; none may train it or change its weights meanwhile.

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
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype: got {dtype!r}, needs a floating type of torch")
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(f"schedule: got a {type(schedule).__name__}, needs a NoiseSchedule")
        start, end = float(table.timesteps[0]), schedule.timesteps
        if start > end:
            raise ValueError(f"table: starts at timestep {start:g}, the schedule ends at {end}, needs a table for it")
        self.model, self.schedule, self.table = model, schedule, table
        self.dtype, self.guided = dtype, guided
        self.shape, self.device = sample_shape(model), device_of(model)
        if self.device.type == "meta":
            raise ValueError("model: is on the device meta, which holds no weights, needs another device")
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
            kind = choose(self._asked, self.device, self.dtype, custom_noise, form_of(self.model))
            engine = next(iter(self._engines.values()), None)
            if type(engine) is not kind:
                form = (lambda *_, held=engine, **__: held.form) if hasattr(engine, "form") else self._form
                with _computing(self.device):
                    engine = kind(self.model, self.schedule.timesteps, self.table, self.dtype, form)
            self._engines[custom_noise] = engine
        return self._engines[custom_noise]

    def refresh(self) -> None:
        """Take over the model's present weights. What was compiled or captured is kept where it serves them."""
        engines, self._engines = self._engines, {}  # until all is taken over: after an interrupt they are prepared anew
        with lock_of(self.model), _computing(self.device):
            folded = any(hasattr(engine, "form") and not engine.form.live for engine in engines.values())
            if folded and not has_form(self.model):  # modules were exchanged, or hooked
                self._prepared(custom_noise=False)
                return
            for engine in set(engines.values()):
                engine.refresh(self.model)
            self._engines = engines

    def __call__(
        self,
        n: int,
        context: Tensor | None = None,
        guidance: float | Sequence[float] | Tensor = 1.0,
        seed: int = 0,
        first_sample: int = 0,
        batch_size: int | None = None,
        noise: Noise | None = None,
        x_T: Tensor | None = None,  # noqa: N803 (its name in the papers)
        callback: Callback | None = None,
        negative: Tensor | None = None,
        guidance_rescale: float = 0.0,
    ) -> Tensor:
        """Draw n samples. Sample k depends on (weights, table, seed, first_sample + k) alone.

        Args:
            n: how many, >= 1.
            context: a condition for all, or [n, ...] one a sample; None = unconditional.
            guidance: w in m_uncond + w (m_cond - m_uncond), for all or [n] one a sample; 1 = conditional only. Any
                other needs a context. The table's `guidance_scale` says how much of it a row has.
            seed: 0 <= seed < 2^63. first_sample: global index of the first sample, >= 0.
            batch_size: samples per chunk, default by image size; results do not depend on it. A chunk that runs out of
                memory starts again with half as many, which is logged.
            noise: noise(samples, step, stream, shape) -> [n, *shape] instead of Philox, or a `PhiloxNoise`.
            x_T: [n, *sample_shape] to start from instead of noise.
            callback: callback(row, x0) after every row 0..len(table)-1 of every chunk; x0 [chunk, *shape], the present
                estimate, is overwritten by later rows. It costs a state in memory, and with `graph` and
                `native` runs of single rows.
            negative: conditions to guide away from, as context is, in place of "no condition"; not with guidance 1.
            guidance_rescale: phi in 0..1 of Lin et al. 2024, see `kernels.guidance_rescale`; not with guidance 1.

        Returns float32 [n, *sample_shape] on the model's device, not clamped. Raises as the constructor does, and
        WorkFailed (a RuntimeError) if a sample is not finite, naming it and its first such step.
        """
        check_integer("n", n)
        check_integer("batch_size", 1 if batch_size is None else batch_size)
        check_integer("first_sample", first_sample, 0)
        philox.check_seed(seed)
        if first_sample > philox.SAMPLE_LIMIT - n:
            raise ValueError(f"first_sample: got {first_sample}, needs 0..2^56 - n")
        guidance = weights_of(guidance, n)
        given = f"{guidance}" if isinstance(guidance, float) else f"{guidance.tolist()}"[:80]
        if guides(guidance) and context is None:
            raise ValueError(f"guidance: got {given} without a context, needs a context to guide towards")
        if guides(guidance) and not self.guided:
            raise ValueError(f"guidance: got {given}, but this trajectory was prepared without guided=True")
        phi = check_number("guidance_rescale", guidance_rescale, 0, 1, "0 <= phi <= 1") or None
        for name, value in (("negative", negative), ("guidance_rescale", phi)):
            if value is not None and isinstance(guidance, float) and not guides(guidance):
                what = "conditions" if name == "negative" else value
                raise ValueError(f"{name}: got {what} without guidance, needs a guidance other than 1")
        if x_T is not None and (not isinstance(x_T, Tensor) or tuple(x_T.shape) != (n, *self.shape)):
            found = list(x_T.shape) if isinstance(x_T, Tensor) else f"a {type(x_T).__name__}"
            raise ValueError(f"x_T: got {found}, needs {[n, *self.shape]}")
        for name, called in (("noise", noise), ("callback", callback)):
            if called is not None and not callable(called):
                raise TypeError(f"{name}: got a {type(called).__name__}, needs a function")
        check_room("n", n, self.shape, self.device)
        contexts, negatives = (
            rows_of_condition(self.model, _numbers(name, value, self.device), n, self.device, name)
            for name, value in (("context", context), ("negative", negative))
        )
        batch_size = chunk_size(self.shape) if batch_size is None else batch_size
        draw = _checked(PhiloxNoise(seed) if noise is None else noise, self.state_dtype)

        def chunks(engine: Engine, first: int, end: int, size: int, called: Callback | None) -> Tensor:
            """Samples first..end - 1 of the n, `size` at a time."""
            images = torch.empty(end - first, *self.shape, dtype=torch.float32, device=self.device)
            start, starved = first, False
            while start < end:
                stop = min(start + size, end)
                samples = torch.arange(first_sample + start, first_sample + stop, device=self.device)
                c, away = (None if each is None else each[start:stop] for each in (contexts, negatives))
                w = guidance if isinstance(guidance, float) else guidance[start:stop]
                try:
                    if x_T is None:
                        x = draw(samples, 0, philox.Stream.INITIAL, self.shape)
                    else:
                        x = x_T[start:stop].to(self.device, self.state_dtype)
                    images[start - first : stop - first] = engine(x, samples, c, w, draw, called, away, phi)
                except (MemoryError, RuntimeError) as error:
                    count = stop - start
                    if count == 1 or not _out_of_memory(error):
                        raise
                    # What was freed stays in the heap, where oneDNN generates no code: with nothing left beside that
                    # it fails for every size, and code that it generated in part was seen never to end (torch 2.13).
                    if starved and _without_primitive(error):
                        raise MemoryError(f"no memory for oneDNN, needs a new process and batch_size {size}") from error
                    size, starved = count // 2, _without_primitive(error)
                    logger.info("out of memory with %d samples at a time: going on with %d", count, size)
                    continue
                start, starved = stop, False
            return images

        with lock_of(self.model), _computing(self.device):
            engine = self._prepared(custom_noise=not isinstance(draw, PhiloxNoise))
            run = partial(evaluating, self.model, chunks, engine) if engine.live else partial(chunks, engine)
            images = run(0, n, batch_size, callback)
            if not bool(images.isfinite().all()):
                self._refuse(images, first_sample, lambda k, watch: run(k, k + 1, 1, watch))
        return images

    def _refuse(self, images: Tensor, first_sample: int, again: Callable[[int, Callback], Tensor]) -> None:
        """Raise WorkFailed for samples that are not finite; the first of them runs again, watched, to find the step."""
        bad = (~images.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
        rows: list[int] = []

        def watch(row: int, x0: Tensor) -> None:
            if not rows and not bool(x0.isfinite().all()):
                rows.append(row)

        again(bad[0], watch)
        at = "".join(f" from step {i + 1} of {len(self.table)} (t = {self.table.timesteps[i]:g}) on" for i in rows)
        found = f"sample {first_sample + bad[0]} is not finite{at or ' at the end'}"
        more = f", nor are {len(bad) - 1} more of {len(images)}" if len(bad) > 1 else ""
        raise WorkFailed(f"{found}{more}: needs other weights, a smaller guidance or context, a clip, or float32")
