"""diffusers' DDPMScheduler and DDIMScheduler on the fused operator: the same constructor, configuration and calls.

    scheduler = FusedDDIMScheduler.from_config(pipeline.scheduler.config)

Grids, alphas_cumprod, `add_noise`, configuration and files are diffusers' own, inherited. What differs is `step`: a row
of a table, computed once, that `kernels.solver_step` runs in one kernel and without a synchronisation, and the noise:
that of the noise contract instead of torch.randn, so a seed gives the same noise on every device and for every batch
size. diffusers counts t from 0; its t is our t - 1, and the noise of its step t is drawn at our step t + 1.
"""

import math
from collections.abc import Callable, Sequence
from functools import wraps
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ddpm.errors import check_choice, check_integer
from ddpm.noise import PhiloxNoise, RowNoise
from ddpm.solvers import ddim, ddpm
from ddpm.table import StepTable
from kernels import philox, solver_step
from kernels.solver_step import reference

try:
    # The two mixins are what diffusers looks for in the module of a saved pipeline's scheduler, to load it by them.
    from diffusers import ConfigMixin, DDIMScheduler, DDPMScheduler, SchedulerMixin  # noqa: F401
    from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
    from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
except ModuleNotFoundError as error:
    raise ImportError(f"ddpm.schedulers: {error}: they are for diffusers, needs it: pip install diffusers") from error

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
# The names with "_log" are the same standard deviation by a detour; fixed_large_log is NaN in diffusers.
VARIANCES = {"fixed_small": "posterior", "fixed_small_log": "posterior", "fixed_large": "beta"}

Generators = torch.Generator | Sequence[torch.Generator] | None


class _Fused:
    """What both schedulers share. The class that follows it in the bases is diffusers'."""

    def _check(self) -> None:
        """Refuse, when the scheduler is made, what no row of numbers can do."""
        config = self.config
        if config.thresholding:
            raise ValueError("thresholding: got True, needs False (a quantile per image is no row of a table)")
        check_choice("prediction_type", config.prediction_type, PREDICTIONS)
        if isinstance(self, DDPMScheduler):
            check_choice("variance_type", config.get("variance_type", "fixed_small"), VARIANCES)
        if config.rescale_betas_zero_snr and config.prediction_type == "epsilon":
            raise ValueError("rescale_betas_zero_snr: got True, needs prediction_type v_prediction or sample with it")
        self._begin(None, 0)

    def _begin(self, seed: int | None, first_sample: int) -> None:
        """Forget tables and noise: a trajectory over new timesteps."""
        if seed is not None:
            philox.check_seed(seed)
        check_integer("first_sample", first_sample, 0)
        self._asked_seed, self._first_sample = seed, first_sample
        self._seeds: list[Tensor] = []  # one for the batch, or one a row
        self._draws: list[RowNoise] = []  # of the present seeds, on the CPU
        self._last = math.inf  # the last noisy timestep
        self._versions, self._numbers = None, None
        self._read()

    def _read(self) -> None:
        """Take over timesteps and alphas_cumprod if they were exchanged or edited since they were read.

        People cut and replace them, and add_noise of diffusers moves alphas_cumprod. To ask costs no synchronisation,
        except for tensors of inference mode, which count no edits.
        """
        own = self.timesteps, self.alphas_cumprod
        if not isinstance(own[0], Tensor) or own[0].ndim != 1 or own[0].is_floating_point():
            raise ValueError(f"scheduler.timesteps: got {str(own[0])[:80]}, needs a tensor of integers [S]")
        versions = [(id(tensor), object() if tensor.is_inference() else tensor._version) for tensor in own]
        if versions == self._versions:
            return
        self._versions, self._own = versions, own  # held, so that no other tensor gets their ids
        read = own[0].tolist(), own[1].tolist()
        if read != self._numbers:
            self._numbers, (self._grid, self._alpha_bars) = read, read
            self._held: tuple[Any, ...] = (None,)  # what the steps of one batch read on its device, behind its key

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
        *,
        seed: int | None = None,
        first_sample: int = 0,
    ) -> None:
        """As diffusers' (where DDIM takes no timesteps); seed and first_sample choose the noise of the noise contract.

        seed: 0 <= seed < 2^63 for all runs over these timesteps, or None: each run draws one from `step`'s generator
        (without one, from PyTorch's default generator). first_sample: global index of the batch's first row. A
        scheduler runs one trajectory at a time: two that take turns would share their noise.
        """
        if timesteps is None:
            check_integer("num_inference_steps", num_inference_steps)
        super().set_timesteps(num_inference_steps, device, *([] if timesteps is None else [timesteps]))
        self._begin(seed, first_sample)

    def _index(self, timestep: int | Tensor) -> int:
        """The row of a timestep; a view of `timesteps`, as loops give, is located without waiting for the device."""
        self._read()
        own, t = self.timesteps, None
        if isinstance(timestep, Tensor) and timestep.is_cuda and timestep.dtype == own.dtype and timestep.ndim == 0:
            index = (timestep.data_ptr() - own.data_ptr()) // own.element_size()
            held = timestep.untyped_storage().data_ptr() == own.untyped_storage().data_ptr() and own.is_contiguous()
            t = self._numbers[0][index] if held and 0 <= index < len(own) else None
        t = int(timestep) if t is None else t
        if t not in self._grid:
            self._widen(t)
        return self._grid.index(t)

    def _widen(self, t: int) -> None:
        """Give a timestep that is not of the grid a row, where rows do not depend on each other."""
        raise ValueError(f"timestep: got {t}, needs one of scheduler.timesteps (see set_timesteps)")

    def _table(self, eta: float) -> StepTable:
        """The rows of this grid."""
        past = next((t for t in self._grid if not 0 <= t < len(self._alpha_bars)), None)
        if past is not None:
            raise ValueError(f"timesteps: got {past}, needs 0 <= t < {len(self._alpha_bars)} (see steps_offset)")
        clip = float(self.config.clip_sample_range) if self.config.clip_sample else None
        return StepTable(torch.tensor(self._grid) + 1, torch.tensor(self._rows(eta), dtype=torch.float64), clip)

    def _seeds_for(self, t: int, generators: Sequence[torch.Generator | None], device: torch.device) -> list[Tensor]:
        """The trajectory's seeds, int64 [] each: as asked for, or drawn where one begins: where t does not fall."""
        count = len(generators) if self._asked_seed is None else 1
        if len(self._seeds) != count or t >= self._last or self._seeds[0].device != device:
            if self._asked_seed is not None:
                self._seeds = [torch.full((), self._asked_seed, dtype=torch.int64, device=device)]
            else:
                self._seeds = [_drawn_seed(generator).to(device) for generator in generators]
            self._draws = []
        self._last = t
        return self._seeds

    def _step(
        self, m: Tensor, timestep: int | Tensor, sample: Tensor, generator: Generators, eta: float
    ) -> tuple[Tensor, Tensor]:
        """(x_new, x0) of one row, out of place; both have the type of `sample`."""
        if m.shape != sample.shape:
            raise ValueError(f"model_output: got {list(m.shape)}, needs the shape of sample {list(sample.shape)}")
        index, n, device = self._index(timestep), sample.shape[0], sample.device
        generators = generator if isinstance(generator, list | tuple) else [generator]
        if len(generators) not in (1, n):
            raise ValueError(f"generator: got a list of {len(generators)}, needs one, or one for each of the {n} rows")
        key = sample.shape, sample.dtype, device, eta, self.num_inference_steps
        if self._held[0] != key:
            table = self._table(eta)
            rows = table.rows(device) if sample.is_cuda else table.coefficients
            indices = torch.arange(len(table), device=device).split(1)
            samples = torch.arange(self._first_sample, self._first_sample + n, device=device)
            self._held, self._draws = (key, table, rows, indices, samples), []
        _, table, rows, indices, samples = self._held
        noisy = bool(table.coefficients[index, 6])
        if noisy:
            seeds = self._seeds_for(self._grid[index], generators, device)
        else:
            seeds = [torch.zeros((), dtype=torch.int64, device=device)]
        # With a seed of its own every row is the first of a batch of one.
        size = n // len(seeds)
        if sample.is_cuda:
            x_new, x0 = sample.clone(), torch.zeros_like(sample)
            parts = (tensor.split(size) for tensor in (x_new, m, x0))
            for seed, x_part, m_part, x0_part in zip(seeds, *parts, strict=True):
                more = {"x0_prev": x0_part, "clip": table.clip}
                solver_step(x_part, m_part, rows, indices[index], seed, samples[:size], **more)
            return x_new, x0
        kind = torch.promote_types(sample.dtype, torch.float32)
        if noisy and not self._draws:
            shape = tuple(sample.shape[1:])
            self._draws = [RowNoise(PhiloxNoise(seed, kind), samples[:size], table, shape) for seed in seeds]
        z = torch.cat([draws(index) for draws in self._draws]) if noisy else None
        x_new, x0 = reference(sample.to(kind), m.to(kind), rows[index].tolist(), z, None, table.clip)
        return x_new.to(sample.dtype), x0.to(sample.dtype)


def _drawn_seed(generator: torch.Generator | None) -> Tensor:
    device = "cpu" if generator is None else generator.device
    return torch.randint(0, philox.SEED_LIMIT - 1, (), generator=generator, device=device)


def _checked(construct: Callable[..., None]) -> Callable[..., None]:
    """A constructor that checks afterwards. It keeps the signature, from which diffusers reads what to save."""

    @wraps(construct)
    def checked(self: Any, *arguments: object, **options: object) -> None:
        construct(self, *arguments, **options)
        self._check()

    return checked


class FusedDDPMScheduler(_Fused, DDPMScheduler):
    """diffusers' DDPMScheduler on the fused operator.

    Constructor, `config`, `from_config`, `from_pretrained`, `save_pretrained`, `add_noise`: diffusers'. A ValueError
    refuses thresholding, learned variances, and zero terminal SNR with noise prediction.
    """

    __init__ = _checked(DDPMScheduler.__init__)

    def _rows(self, _: float) -> list[list[float]]:
        prediction, variance = PREDICTIONS[self.config.prediction_type], VARIANCES[self.config.variance_type]
        rise = next((pair for pair in pairwise(self._grid) if pair[0] < pair[1]), None)
        if rise is not None:
            raise ValueError(f"timesteps: got {rise[1]} after {rise[0]}, needs falling ones")
        rows = ddpm([*(self._alpha_bars[t] for t in self._grid), 1.0], prediction, variance=variance)
        for t, row in zip(self._grid, rows, strict=True):
            if t == 0:
                row[6] = 0.0  # diffusers adds no noise here, and with fixed_large at the end of every other grid
        return rows

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> "DDPMSchedulerOutput | tuple[Tensor, Tensor]":
        """x at the next timestep (`prev_sample`) and the estimate of clean data (`pred_original_sample`).

        generator: where a run's seed comes from if `set_timesteps` was given none; never the noise itself. A list of
        one for each row gives each its own seed, and the picture that it is alone. Raises ValueError for another
        shape, another number of generators, or a timestep that is not of `timesteps` as they are now.
        """
        x_new, x0 = self._step(model_output, timestep, sample, generator, 0.0)
        return DDPMSchedulerOutput(prev_sample=x_new, pred_original_sample=x0) if return_dict else (x_new, x0)


class FusedDDIMScheduler(_Fused, DDIMScheduler):
    """diffusers' DDIMScheduler on the fused operator: as there, a step goes from t to t - T // S, whatever the grid."""

    __init__ = _checked(DDIMScheduler.__init__)

    def _widen(self, t: int) -> None:
        count = len(self._alpha_bars)
        if not 0 <= t < count:
            raise ValueError(f"timestep: got {t}, needs 0 <= t < {count}")
        self._grid, self._held = list(range(count))[::-1], (None,)

    def _rows(self, eta: float) -> list[list[float]]:
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps: got None, needs a call of set_timesteps first")
        stride = self.config.num_train_timesteps // self.num_inference_steps
        final, prediction = float(self.final_alpha_cumprod), PREDICTIONS[self.config.prediction_type]
        steps = [(self._alpha_bars[t], self._alpha_bars[t - stride] if t >= stride else final) for t in self._grid]
        return [row for step in steps for row in ddim(step, prediction, eta=eta)]

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> "DDIMSchedulerOutput | tuple[Tensor, Tensor]":
        """As `FusedDDPMScheduler.step`. eta: 0..1, 0 is deterministic.

        The timestep may be any of 0..T-1, as there. Raises ValueError also for `use_clipped_model_output` with
        clip_sample, and for `variance_noise`.
        """
        if use_clipped_model_output and self.config.clip_sample:
            raise ValueError("use_clipped_model_output: got True, needs False, or clip_sample=False")
        if variance_noise is not None:
            raise ValueError("variance_noise: got a tensor, needs None (the noise comes from the seed)")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta: got {eta}, needs 0 <= eta <= 1")
        x_new, x0 = self._step(model_output, timestep, sample, generator, float(eta))
        return DDIMSchedulerOutput(prev_sample=x_new, pred_original_sample=x0) if return_dict else (x_new, x0)
