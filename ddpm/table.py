"""StepTable: a sampler as data, see `ddpm.solvers`. Every engine, the ONNX graph and the tests execute it."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm.errors import BadInput, check_choice, check_number
from ddpm.files import read_json, write_json
from kernels.philox import is_integer

PREDICTIONS = ("eps", "v", "x0")
KIND, FORMAT_VERSION = "fused-ddpm step table", 1
REQUIRED = ("timesteps", "coefficients", "clip", "weights", "made_for")
COLUMNS = 7
NOISE_STEPS_LIMIT = 1 << 24  # exact in float32
VISIT_BITS, VISITS_MAX = 20, 16
FLOAT32_MIN, FLOAT32_MAX = 2.0**-149, torch.finfo(torch.float32).max
FLOAT64_MAX = sys.float_info.max  # integers beyond it have no float64


@dataclass(frozen=True, eq=False)
class StepTable:
    """A sampler, ready to run: row i goes from timesteps[i] to timesteps[i + 1], the last one to 0.

    timesteps: what the network sees, int64 [S] (float64 where fractional), never ascending.
    coefficients: float64 [S, 7], see `ddpm.solvers`. clip: bound of x0, or None. prediction: what the network outputs.
    guidance_scale: float64 [S], multiplies w - 1 of guidance in each row (ones).
    noise_steps: int64 [S], the steps of the noise contract: the timesteps, or the row's number where those have
    fractions. begins: bool [S], whether a row begins a step of the solver or continues one.
    made_for: the solver, its options and the schedule. weights: digest of those that it was learned for, or None.
    All tensors live on the CPU.
    """

    timesteps: Tensor
    coefficients: Tensor
    clip: float | None = None
    prediction: str = "eps"
    guidance_scale: Tensor | None = None
    noise_steps: Tensor | None = None
    begins: Tensor | None = None
    made_for: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None

    def __post_init__(self) -> None:
        """Fill in what was not given. Raises ValueError naming the field that does not fit."""
        count, times = len(self.timesteps), self.timesteps
        fractional = times.is_floating_point()
        filled = {
            "timesteps": times.to(torch.float64) if fractional else times,
            "guidance_scale": torch.ones(count, dtype=torch.float64, device="cpu"),
            "noise_steps": torch.arange(count, device="cpu") if fractional else times.to(torch.int64),
            "begins": torch.ones(count, dtype=torch.bool, device="cpu"),
        }
        for name, value in filled.items():
            if name == "timesteps" or getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if not count or tuple(self.coefficients.shape) != (count, COLUMNS):
            needs = f"[{max(count, 1)}, {COLUMNS}]: a row for every timestep"
            raise ValueError(f"coefficients: got {list(self.coefficients.shape)}, needs {needs}")
        for name in filled:
            if tuple(getattr(self, name).shape) != (count,):
                raise ValueError(f"{name}: got {list(getattr(self, name).shape)}, needs [{count}]")
        check_choice("prediction", self.prediction, PREDICTIONS)
        if self.clip is not None:
            clip = check_number("clip", self.clip, FLOAT32_MIN, FLOAT32_MAX, "a finite bound > 0 in float32, or None")
            object.__setattr__(self, "clip", clip)

    def __len__(self) -> int:
        """Rows: evaluations of the network."""
        return self.timesteps.shape[0]

    @property
    def steps(self) -> int:
        """Steps of the solver; one that evaluates the network twice has two rows."""
        return int(self.begins.sum())

    @property
    def noisy(self) -> list[bool]:
        """Which rows add noise."""
        return (self.coefficients[:, 6] != 0).tolist()

    @property
    def has_memory(self) -> bool:
        """Whether any row reads the x0 before it."""
        return bool((self.coefficients[:, 5] != 0).any())

    @property
    def solver(self) -> str:
        """The name that pictures and reports show."""
        return str(self.made_for.get("solver", "table"))

    def rows(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """What `kernels.solver_step` reads: [S, 8], the seven coefficients and the noise step, cast once."""
        table = torch.cat([self.coefficients, self.noise_steps[:, None].to(torch.float64)], dim=1)
        return table.to(device=device, dtype=dtype)

    def weights_of_guidance(self, guidance: float | Tensor) -> list[float] | list[Tensor]:
        """w of every row, 1 + scale (w - 1): numbers, or [n] each for weights [n]."""
        scales = self.guidance_scale.tolist()
        return [guidance if scale == 1 else 1 + scale * (guidance - 1) for scale in scales]

    def from_row(self, k: int) -> "StepTable":
        """From row k on, where x0 is its own x0_previous. Raises ValueError inside a step, or for a learned table."""
        if not is_integer(k) or not 0 <= k < len(self):
            raise ValueError(f"row: got {k}, needs 0..{len(self) - 1}")
        if self.weights is not None:
            raise ValueError("from_row: got a learned table, whose rows belong together, needs one of a solver")
        if not bool(self.begins[k]):
            raise ValueError(f"row: got {k}, which continues a step, needs one that begins one")
        coefficients = self.coefficients[k:].clone()
        coefficients[0, 3] += coefficients[0, 5]
        coefficients[0, 5] = 0.0
        parts = {name: getattr(self, name)[k:] for name in ("timesteps", "guidance_scale", "noise_steps", "begins")}
        return replace(self, coefficients=coefficients, **parts, made_for={**self.made_for, "from_row": k})

    def asdict(self) -> dict[str, Any]:
        """The table as JSON has it; numbers keep all their digits."""
        plain = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in vars(self).items()}
        first = {"kind": KIND, "format_version": FORMAT_VERSION, "prediction": self.prediction, "clip": self.clip}
        return first | plain | {"made_for": dict(self.made_for)}

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "StepTable":
        """From `asdict`. Raises ValueError naming what is damaged."""

        def need(fits: bool, message: str) -> None:
            if not fits:
                raise ValueError(message)

        for name, needed in (("kind", KIND), ("format_version", FORMAT_VERSION)):
            need(content.get(name) == needed, f"{name}: got {content.get(name)!r}, needs {needed!r}")
        for name in REQUIRED:
            need(name in content, f"{name}: is missing")
        times, rows, clip, weights, made_for = map(content.get, REQUIRED)
        scale, noise, begins = map(content.get, ("guidance_scale", "noise_steps", "begins"))
        whole = _numbers("timesteps", times) and all(isinstance(t, int) for t in times)
        fall = times and all(a >= b for a, b in pairwise(times)) and times[-1] > 0 and times[0] < NOISE_STEPS_LIMIT
        need(fall, f"timesteps: got {str(times)[:80]}, needs numbers > 0 and < 2^24 that never ascend")
        seven = isinstance(rows, list) and rows and all(_numbers("coefficients", r) and len(r) == COLUMNS for r in rows)
        need(seven, f"coefficients: needs rows of {COLUMNS} finite numbers")
        _numbers("guidance_scale", scale)
        steps = _numbers("noise_steps", noise) and all(type(n) is int and 0 <= n < NOISE_STEPS_LIMIT for n in noise)
        need(steps, f"noise_steps: got {noise}, needs integers in 0..2^24 - 1")
        flags = isinstance(begins, list) and all(type(b) is bool for b in begins) and begins and begins[0]
        need(flags, f"begins: got {begins}, needs true or false for every row, the first true")
        bound = clip is None or (_numbers("clip", [clip]) and FLOAT32_MIN <= clip <= FLOAT32_MAX)
        need(bound, f"clip: got {clip!r}, needs a bound > 0 in float32, or null")
        known = isinstance(weights, str | None) and isinstance(made_for, dict)
        need(known, "weights, made_for: needs a digest or null, and an object")
        schedule = made_for.get("schedule", {})
        need(isinstance(schedule, dict), f"made_for: its schedule is {str(schedule)[:80]}, needs an object")
        need(rows[-1][6] == 0, f"coefficients: the last row adds noise ({rows[-1][6]}), needs c6 = 0 there")
        tensor = partial(torch.tensor, device="cpu")
        coefficients = tensor(rows, dtype=torch.float64)
        finite = bool(coefficients.to(torch.float32).isfinite().all())
        need(finite, "coefficients: beyond float32, needs numbers that it holds")
        kept = tensor(times, dtype=torch.int64 if whole else torch.float64)
        scales, steps = tensor(scale, dtype=torch.float64), tensor(noise, dtype=torch.int64)
        prediction = str(content.get("prediction"))
        return cls(kept, coefficients, clip, prediction, scales, steps, tensor(begins), made_for, weights)

    def save(self, path: str | Path) -> None:
        """Write the table as JSON, whole or not at all."""
        write_json(Path(path), self.asdict())

    @classmethod
    def load(cls, path: str | Path) -> "StepTable":
        """The table in a JSON file. Raises BadInput naming the file and what is wrong with it."""
        try:
            return cls.of(read_json(Path(path)))
        except BadInput:
            raise
        except ValueError as error:
            raise BadInput(f"{path}: no usable step table: {error}") from error


def noise_step(timestep: int, visit: int) -> int:
    """Which noise the `visit`-th row at a timestep draws: t | visit << 20."""
    return timestep | visit << VISIT_BITS


def _numbers(name: str, values: object) -> bool:
    """True. Raises ValueError unless this is a list of finite numbers."""
    if not isinstance(values, list) or not all(type(v) in (int, float) and abs(v) <= FLOAT64_MAX for v in values):
        raise ValueError(f"{name}: got {str(values)[:80]}, needs finite numbers")
    return True
