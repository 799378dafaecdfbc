"""Every operator names the argument that is no tensor, or no number where it needs one."""

from inspect import signature

import pytest
import torch

from kernels import (
    bottleneck,
    convolution,
    group_norm_relu,
    guidance_rescale,
    noise_mse,
    philox,
    q_sample,
    q_sample_rows,
    solver_step,
    winograd,
)

X, SAMPLES, GRID = torch.ones(2, 8, 4, 4), torch.arange(2), torch.linspace(1, 0.1, 11)
VECTOR, WEIGHT = torch.ones(8), torch.ones(8, 8, 3, 3)
CALLS = {
    q_sample: {"x0": X, "t": SAMPLES + 1, "alpha_bars": GRID, "seed": 0, "samples": SAMPLES},
    q_sample_rows: {"data": X, "rows": SAMPLES, "alpha_bars": GRID, "seed": 0, "samples": SAMPLES},
    noise_mse: {"pred": X, "seed": 0, "samples": SAMPLES, "weight": torch.ones(2)},
    solver_step: {
        "x": X.clone(),
        "m": X,
        "table": torch.zeros(3, 8),
        "index": 0,
        "seed": 0,
        "samples": SAMPLES,
        "m_uncond": X,
        "guidance": 2.0,
        "x0_prev": X.clone(),
        "clip": 1.0,
    },
    guidance_rescale: {"m": X, "m_uncond": X, "guidance": 2.0, "rescale": 0.5},
    group_norm_relu: {"x": X, "weight": VECTOR, "bias": VECTOR, "groups": 8, "eps": 1e-5},
    bottleneck: {
        "x": X,
        "up_weight": torch.ones(8, 8, 4, 4),
        "up_bias": VECTOR,
        "norm_weight": VECTOR,
        "norm_bias": VECTOR,
        "film_scale": torch.ones(1, 8),
        "film_shift": torch.ones(1, 8),
    },
    convolution: {
        "x": X,
        "weight": WEIGHT,
        "bias": VECTOR,
        "skip": X,
        "skip_weight": WEIGHT,
        "film_scale": torch.ones(2, 8),
        "film_shift": torch.ones(2, 8),
        "onto": X,
        "then": "keep",
    },
    winograd: {"x": torch.ones(1, 32, 4, 4), "weights": [torch.ones(1, 36, 32, 32)], "biases": [torch.ones(32)]},
    philox.normal: {"seed": 0, "samples": SAMPLES, "step": 0, "stream": 0, "shape": (3,), "dtype": torch.float32},
    philox.words: {"seed": 0, "sample": 0, "step": 0, "stream": 0, "numel": 4},
}
CASES = [(call, name) for call, arguments in CALLS.items() for name in arguments]


@pytest.mark.parametrize(("call", "name"), CASES, ids=lambda value: value if isinstance(value, str) else value.__name__)
def test_nonsense_is_named(call, name):
    call(**CALLS[call])
    optional = signature(call).parameters[name].default is None or name == "film_scale"
    for nonsense in ("x", [1.5], 10**400, object(), *(() if optional else (None,))):
        with pytest.raises((TypeError, ValueError), match=rf"^{name}\b.*(got|needs)"):
            call(**CALLS[call] | {name: nonsense})
