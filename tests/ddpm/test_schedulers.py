"""The schedulers for diffusers, against diffusers' own: grids, rows, noise, configuration, pipelines."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from kernels import philox

diffusers = pytest.importorskip("diffusers", reason="diffusers is optional and not installed here")

from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel  # noqa: E402

from ddpm.schedulers import FusedDDIMScheduler, FusedDDPMScheduler  # noqa: E402

SHAPE = (3, 2, 8, 8)
PAIRS = {"ddim": (FusedDDIMScheduler, DDIMScheduler), "ddpm": (FusedDDPMScheduler, DDPMScheduler)}
# (spacing, S, options of the grid) with S that divides T = 100 and S that does not.
GRIDS = [
    ("leading", 20, {}),
    ("leading", 7, {}),
    ("leading", 10, {"steps_offset": 1}),
    ("trailing", 20, {}),
    ("trailing", 7, {}),
    ("linspace", 20, {}),
    ("linspace", 1, {}),
    ("trailing", 100, {}),
]


def network(x, t):
    """Some smooth function of the state and the time that stays bounded, so that trajectories can be compared."""
    return torch.tanh(0.7 * x.roll(1, -1) + 0.01 * float(t))


def start(seed=0):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def trajectory(scheduler, **options):
    """Every prev_sample and pred_original_sample of a run."""
    x, seen = start(), []
    for t in scheduler.timesteps:
        out = scheduler.step(network(x, t), t, x, **options)
        x = out.prev_sample
        seen += [x, out.pred_original_sample]
    return torch.stack(seen)


def close(actual, expected, tolerance=1e-5):
    """The design's parity: max|difference| / max(1, max|expected|)."""
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert error <= tolerance, float(error)


@pytest.fixture
def shared_noise(monkeypatch):
    """diffusers draws what we draw: its randn becomes the noise contract, step by step, from `steps`."""
    steps = []

    def randn_tensor(shape, **_):
        return philox.normal(5, torch.arange(shape[0]), steps.pop(0), philox.Stream.SAMPLING, tuple(shape[1:]))

    for name in ("ddpm", "ddim"):
        monkeypatch.setattr(f"diffusers.schedulers.scheduling_{name}.randn_tensor", randn_tensor)
    return steps


@pytest.mark.parametrize(("spacing", "steps", "grid"), GRIDS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("clip", [None, 1.0, 0.5])
def test_ddim_walks_as_diffusers_does(spacing, steps, grid, prediction, clip):
    options = {"num_train_timesteps": 100, "timestep_spacing": spacing, "prediction_type": prediction, **grid}
    options |= {"clip_sample": clip is not None, "clip_sample_range": clip or 1.0}
    fused, theirs = FusedDDIMScheduler(**options), DDIMScheduler(**options)
    for scheduler in (fused, theirs):
        scheduler.set_timesteps(steps)
    assert fused.timesteps.tolist() == theirs.timesteps.tolist()
    close(trajectory(fused), trajectory(theirs))


@pytest.mark.parametrize(
    "options",
    [
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"set_alpha_to_one": False, "steps_offset": 1},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        {"trained_betas": np.linspace(1e-4, 0.02, 1000).tolist()},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim_with_noise_and_other_schedules(options, eta, shared_noise):
    fused, theirs = FusedDDIMScheduler(**options), DDIMScheduler(**options)
    fused.set_timesteps(25, seed=5)
    theirs.set_timesteps(25)
    shared_noise += [t + 1 for t in theirs.timesteps.tolist()]
    close(trajectory(fused, eta=eta), trajectory(theirs, eta=eta))
    assert len(shared_noise) == (0 if eta else 25)


@pytest.mark.parametrize(("spacing", "steps", "grid"), GRIDS)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddpm_walks_as_diffusers_does_with_the_same_noise(spacing, steps, grid, variance, prediction, shared_noise):
    options = {"num_train_timesteps": 100, "timestep_spacing": spacing, "variance_type": variance, **grid}
    options |= {"prediction_type": prediction, "clip_sample": prediction == "epsilon"}
    fused, theirs = FusedDDPMScheduler(**options), DDPMScheduler(**options)
    fused.set_timesteps(steps, seed=5)
    theirs.set_timesteps(steps)
    noisy = [t + 1 for t in theirs.timesteps.tolist()]
    actual = trajectory(fused)
    shared_noise[:] = noisy
    # diffusers takes 1 - a / s of float32 numbers close to 1: measured 1.8e-5 at S = T, where ours is within 2e-6 of
    # its formulas in float64.
    close(actual, trajectory(theirs), 5e-5)
    theirs.alphas_cumprod, theirs.one = theirs.alphas_cumprod.double(), theirs.one.double()
    shared_noise[:] = noisy
    close(actual, trajectory(theirs), 2e-6)


def test_ddpm_takes_a_grid_of_ones_own_and_none(shared_noise):
    fused, theirs = FusedDDPMScheduler(), DDPMScheduler()
    fused.set_timesteps(timesteps=[900, 400, 399, 3], seed=5)
    theirs.set_timesteps(timesteps=[900, 400, 399, 3])
    shared_noise += [901, 401, 400, 4]
    close(trajectory(fused), trajectory(theirs))
    x = start()
    shared_noise.append(1000)
    ours, others = (s.step(network(x, 999), 999, x) for s in (FusedDDPMScheduler(), DDPMScheduler()))
    close(ours.pred_original_sample, others.pred_original_sample)


def test_step_leaves_its_arguments_alone_and_can_return_a_tuple():
    for fused, _ in PAIRS.values():
        scheduler = fused()
        scheduler.set_timesteps(10, seed=1)
        x, m = start(), start(1)
        before = x.clone(), m.clone()
        new, clean = scheduler.step(m, scheduler.timesteps[0], x, return_dict=False)
        assert torch.equal(x, before[0])
        assert torch.equal(m, before[1])
        out = scheduler.step(m, int(scheduler.timesteps[0]), x)
        assert torch.equal(out.prev_sample, new)
        assert torch.equal(out.pred_original_sample, clean)


def test_half_precision_computes_in_float32():
    scheduler = FusedDDPMScheduler()
    scheduler.set_timesteps(10, seed=1)
    x, m, t = start(), start(1), scheduler.timesteps[3]
    exact = scheduler.step(m.bfloat16().float(), t, x.bfloat16().float()).prev_sample
    half = scheduler.step(m.bfloat16(), t, x.bfloat16()).prev_sample
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, exact.bfloat16())


def test_a_row_of_a_batch_depends_on_its_global_index_alone():
    scheduler = FusedDDPMScheduler(num_train_timesteps=100)
    scheduler.set_timesteps(10, seed=3)
    x = start()
    whole, last = x, x[2:]
    for t in scheduler.timesteps:
        whole = scheduler.step(network(whole, t), t, whole).prev_sample
    scheduler.set_timesteps(10, seed=3, first_sample=2)
    for t in scheduler.timesteps:
        last = scheduler.step(network(last, t), t, last).prev_sample
    close(last, whole[2:], 1e-6)


def test_the_generator_gives_the_seed_and_every_run_another():
    scheduler = FusedDDPMScheduler(num_train_timesteps=100)
    scheduler.set_timesteps(10)

    def two_runs(seed):
        generator = torch.Generator().manual_seed(seed)
        return [trajectory(scheduler, generator=generator) for _ in range(2)]

    first, again, other = two_runs(1), two_runs(1), two_runs(2)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])
    torch.manual_seed(4)
    default = trajectory(scheduler)
    torch.manual_seed(4)
    assert torch.equal(default, trajectory(scheduler))
    assert not torch.equal(default, trajectory(scheduler))


def test_add_noise_and_scaling_are_diffusers_own():
    fused, theirs = FusedDDPMScheduler(beta_schedule="scaled_linear"), DDPMScheduler(beta_schedule="scaled_linear")
    x, noise, t = start(), start(1), torch.tensor([0, 500, 999])
    assert torch.equal(fused.add_noise(x, noise, t), theirs.add_noise(x, noise, t))
    assert fused.scale_model_input(x, 5) is x
    assert fused.init_noise_sigma == 1.0
    assert len(fused) == 1000


def public(config):
    """Without what diffusers notes about the class and its defaults."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


@pytest.mark.parametrize("kind", PAIRS)
def test_configuration_goes_to_files_and_to_diffusers_and_back(kind, tmp_path):
    fused, theirs = PAIRS[kind]
    options = {"num_train_timesteps": 200, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    scheduler = fused(**options)
    scheduler.save_pretrained(tmp_path)
    for copy in (
        fused.from_pretrained(tmp_path),
        fused.from_config(scheduler.config),
        fused.from_config(theirs(**options).config),
        theirs.from_pretrained(tmp_path),
        theirs.from_config(scheduler.config),
    ):
        assert public(copy.config) == public(scheduler.config)
        assert all(copy.config[key] == value for key, value in options.items())
    assert fused.from_config(scheduler.config, clip_sample_range=2.0).config.clip_sample_range == 2.0


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip


def images(pipeline, **options):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(batch_size=2, generator=generator, num_inference_steps=10, output_type="np", **options).images


def test_in_diffusers_pipelines(unet, tmp_path):
    theirs = DDIMPipeline(unet, DDIMScheduler())
    expected = images(theirs)
    # The pipeline's constructor makes every scheduler a DDIMScheduler of its own; afterwards it can be exchanged.
    theirs.scheduler = FusedDDIMScheduler.from_config(theirs.scheduler.config)
    close(torch.from_numpy(images(theirs)), torch.from_numpy(expected))
    noisy = DDPMPipeline(unet, FusedDDPMScheduler())
    first = images(noisy)
    assert np.array_equal(first, images(noisy))
    assert np.isfinite(first).all()
    assert first.std() > 0.05
    noisy.save_pretrained(tmp_path)
    assert (tmp_path / "scheduler" / "scheduler_config.json").is_file()
    again = DDPMPipeline(unet, FusedDDPMScheduler.from_pretrained(tmp_path, subfolder="scheduler"))
    assert np.array_equal(first, images(again))


@pytest.mark.parametrize(
    ("fused", "options", "message"),
    [
        (FusedDDPMScheduler, {"thresholding": True}, "thresholding: got True"),
        (FusedDDIMScheduler, {"thresholding": True}, "thresholding: got True"),
        (FusedDDPMScheduler, {"variance_type": "learned_range"}, "variance_type: got 'learned_range'"),
        (FusedDDPMScheduler, {"variance_type": "fixed_large_log"}, "variance_type: got 'fixed_large_log'"),
        (FusedDDPMScheduler, {"prediction_type": "flow"}, "prediction_type: got 'flow'"),
        (FusedDDIMScheduler, {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr: got True"),
    ],
)
def test_what_no_table_can_do_is_refused_at_construction(fused, options, message):
    with pytest.raises(ValueError, match=message):
        fused(**options)


def test_wrong_calls_say_what_they_got():
    ddim, ddpm = FusedDDIMScheduler(), FusedDDPMScheduler()
    x = start()
    with pytest.raises(ValueError, match="set_timesteps first"):
        ddim.step(x, 999, x)
    for scheduler in (ddim, ddpm):
        scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="timestep: got 7"):
        ddim.step(x, 7, x)
    with pytest.raises(ValueError, match="model_output: got"):
        ddpm.step(torch.cat((x, x), 1), 900, x)
    with pytest.raises(ValueError, match=r"eta: got 1\.5"):
        ddim.step(x, 900, x, eta=1.5)
    with pytest.raises(ValueError, match="use_clipped_model_output"):
        ddim.step(x, 900, x, use_clipped_model_output=True)
    with pytest.raises(ValueError, match="variance_noise"):
        ddim.step(x, 900, x, eta=1.0, variance_noise=x)
    with pytest.raises(ValueError, match="needs one generator"):
        ddpm.step(x, 900, x, generator=[torch.Generator()] * 3)
    with pytest.raises(ValueError, match="first_sample: got -1"):
        ddpm.set_timesteps(10, first_sample=-1)
    with pytest.raises(ValueError, match="num_inference_steps: got 0"):
        ddpm.set_timesteps(0)
    ddpm = FusedDDPMScheduler(steps_offset=200)
    ddpm.set_timesteps(10)
    with pytest.raises(ValueError, match="timesteps: got 1100"):
        ddpm.step(x, 900, x)


def test_diffusers_stays_optional():
    """In a fresh process: ddpm does not import it; without it the module imports and a scheduler says what to do."""
    code = """
import sys
import ddpm
assert "diffusers" not in sys.modules
sys.modules["diffusers"] = None
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "diffusers":
            raise ModuleNotFoundError("No module named 'diffusers'", name="diffusers")
del sys.modules["diffusers"]
sys.meta_path.insert(0, Finder())
from ddpm.schedulers import FusedDDIMScheduler, FusedDDPMScheduler
for make in (FusedDDIMScheduler, FusedDDPMScheduler, FusedDDPMScheduler.from_pretrained):
    try:
        make()
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all(line.endswith("pip install diffusers") for line in lines)
