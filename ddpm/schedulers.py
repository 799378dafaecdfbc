"""diffusers' DDPMScheduler and DDIMScheduler on the fused operator: the same constructor, configuration and calls.

    scheduler = FusedDDIMScheduler.from_config(pipeline.scheduler.config)

Grids, alphas_cumprod, `add_noise`, configuration and files are diffusers' own, inherited. What differs is `step`: a row
of a table, computed once, that `kernels.solver_step` runs in one kernel and without a synchronisation, and the noise:
that of the noise contract instead of torch.randn, so a seed gives the same noise on every device and for every batch
size. diffusers counts t from 0; its t is our t - 1, and the noise of its step t is drawn at our step t + 1.
"""

from collections.abc import Callable
from functools import wraps
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
    from diffusers import DDIMScheduler, DDPMScheduler
    from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
    from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
except ModuleNotFoundError as error:
    raise ImportError(f"ddpm.schedulers: {error}: they are for diffusers, needs it: pip install diffusers") from error

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
# The names with "_log" are the same standard deviation by a detour; fixed_large_log is NaN in diffusers.
VARIANCES = {"fixed_small": "posterior", "fixed_small_log": "posterior", "fixed_large": "beta"}


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
        # add_noise of diffusers moves alphas_cumprod to its argument's device; these stay.
        self._alpha_bars: list[float] = self.alphas_cumprod.tolist()
        self._begin(None, 0)

    def _begin(self, seed: int | None, first_sample: int) -> None:
        """Forget tables and noise: the timesteps are new."""
        if seed is not None:
            philox.check_seed(seed)
        check_integer("first_sample", first_sample, 0)
        self._asked_seed, self._first_sample = seed, first_sample
        self._seed: Tensor | None = None
        self._draws: RowNoise | None = None  # of the present seed, on the CPU
        self._last = -1
        self._grid: list[int] = self.timesteps.tolist()
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
        own = self.timesteps
        if isinstance(timestep, Tensor) and timestep.is_cuda and timestep.dtype == own.dtype and timestep.ndim == 0:
            index = (timestep.data_ptr() - own.data_ptr()) // own.element_size()
            if timestep.untyped_storage().data_ptr() == own.untyped_storage().data_ptr() and 0 <= index < len(own):
                return index
        t = int(timestep)
        if t not in self._grid:
            raise ValueError(f"timestep: got {t}, needs one of scheduler.timesteps (see set_timesteps)")
        return self._grid.index(t)

    def _table(self, eta: float) -> StepTable:
        """The rows of this grid."""
        past = max(self._grid)
        if past >= len(self._alpha_bars):
            raise ValueError(f"timesteps: got {past}, needs t < {len(self._alpha_bars)} (see steps_offset)")
        clip = float(self.config.clip_sample_range) if self.config.clip_sample else None
        return StepTable(torch.tensor(self._grid) + 1, torch.tensor(self._rows(eta), dtype=torch.float64), clip)

    def _seed_for(self, index: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """The trajectory's seed, int64 []: as asked for, or drawn where one begins: where the row does not grow."""
        if self._seed is None or index <= self._last or self._seed.device != device:
            source = "cpu" if generator is None else generator.device
            if self._asked_seed is not None:
                self._seed = torch.full((), self._asked_seed, dtype=torch.int64, device=device)
            else:
                drawn = torch.randint(0, philox.SEED_LIMIT - 1, (), generator=generator, device=source)
                self._seed = drawn.to(device)
            self._draws = None
        self._last = index
        return self._seed

    def _step(
        self, m: Tensor, timestep: int | Tensor, sample: Tensor, generator: torch.Generator | None, eta: float
    ) -> tuple[Tensor, Tensor]:
        """(x_new, x0) of one row, out of place; both have the type of `sample`."""
        if m.shape != sample.shape:
            raise ValueError(f"model_output: got {list(m.shape)}, needs the shape of sample {list(sample.shape)}")
        if isinstance(generator, list):
            if len(generator) != 1:
                raise ValueError("generator: got a list, needs one generator (noise is already drawn per sample)")
            generator = generator[0]
        index, n, device = self._index(timestep), sample.shape[0], sample.device
        key = sample.shape, sample.dtype, device, eta
        if self._held[0] != key:
            table = self._table(eta)
            rows = table.rows(device) if sample.is_cuda else table.coefficients
            indices = torch.arange(len(table), device=device).split(1)
            samples = torch.arange(self._first_sample, self._first_sample + n, device=device)
            self._held, self._draws = (key, table, rows, indices, samples), None
        _, table, rows, indices, samples = self._held
        noisy = bool(table.coefficients[index, 6])
        seed = self._seed_for(index, generator, device) if noisy else torch.zeros((), dtype=torch.int64, device=device)
        if sample.is_cuda:
            x_new, x0 = sample.clone(), torch.zeros_like(sample)
            solver_step(x_new, m, rows, indices[index], seed, samples, x0_prev=x0, clip=table.clip)
            return x_new, x0
        kind = torch.promote_types(sample.dtype, torch.float32)
        if noisy and self._draws is None:
            self._draws = RowNoise(PhiloxNoise(seed, kind), samples, table, tuple(sample.shape[1:]))
        z = self._draws(index) if noisy else None
        x_new, x0 = reference(sample.to(kind), m.to(kind), rows[index].tolist(), z, None, table.clip)
        return x_new.to(sample.dtype), x0.to(sample.dtype)


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
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> "DDPMSchedulerOutput | tuple[Tensor, Tensor]":
        """x at the next timestep (`prev_sample`) and the estimate of clean data (`pred_original_sample`).

        generator: where a run's seed comes from if `set_timesteps` was given none; never the noise itself. Raises
        ValueError for another shape, a timestep that is not of the grid, or several generators.
        """
        x_new, x0 = self._step(model_output, timestep, sample, generator, 0.0)
        return DDPMSchedulerOutput(prev_sample=x_new, pred_original_sample=x0) if return_dict else (x_new, x0)


class FusedDDIMScheduler(_Fused, DDIMScheduler):
    """diffusers' DDIMScheduler on the fused operator: as there, a step goes from t to t - T // S, whatever the grid."""

    __init__ = _checked(DDIMScheduler.__init__)

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
        generator: torch.Generator | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> "DDIMSchedulerOutput | tuple[Tensor, Tensor]":
        """As `FusedDDPMScheduler.step`. eta: 0..1, 0 is deterministic.

        Raises ValueError also for `use_clipped_model_output` with clip_sample, and for `variance_noise`.
        """
        if use_clipped_model_output and self.config.clip_sample:
            raise ValueError("use_clipped_model_output: got True, needs False, or clip_sample=False")
        if variance_noise is not None:
            raise ValueError("variance_noise: got a tensor, needs None (the noise comes from the seed)")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta: got {eta}, needs 0 <= eta <= 1")
        x_new, x0 = self._step(model_output, timestep, sample, generator, float(eta))
        return DDIMSchedulerOutput(prev_sample=x_new, pred_original_sample=x0) if return_dict else (x_new, x0)
