"""The schedulers for diffusers: steps against float64 formulas, grids, rows, noise, configuration, pipelines.

diffusers' float32 is no reference: it takes 1 - a / s of numbers close to 1, and is up to 4e-5 from its own formulas.
What is compared with it runs in float64.
"""

import math
import subprocess
import sys
from copy import deepcopy

import numpy as np
import pytest
import torch

from kernels import philox

diffusers = pytest.importorskip("diffusers", reason="diffusers is optional and not installed here")

from diffusers import (  # noqa: E402
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    UNet2DModel,
)

from ddpm import schedulers  # noqa: E402
from ddpm.schedulers import FusedDDIMScheduler, FusedDDPMScheduler  # noqa: E402
from kernels import solver_step  # noqa: E402

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
    """Some smooth function of the state and the time that stays bounded, so that trajectories can be compared.

    Computed in float64: the last bit of a float32 tanh differs by CPU, and 1 / sqrt(a) carries it to 1e-5.
    """
    return torch.tanh(0.7 * x.double().roll(1, -1) + 0.01 * float(t)).to(x.dtype)


def start(seed=0):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def trajectory(scheduler, dtype=torch.float32, **options):
    """Every prev_sample and pred_original_sample of a run."""
    x, seen = start().to(dtype), []
    for t in scheduler.timesteps:
        out = scheduler.step(network(x, t), t, x, **options)
        x = out.prev_sample
        seen += [x, out.pred_original_sample]
    return torch.stack(seen)


def noise(t):
    """What a run of seed 5 draws at diffusers' timestep t."""
    return philox.normal(5, torch.arange(SHAPE[0]), t + 1, philox.Stream.SAMPLING, SHAPE[1:], dtype=torch.float64)


def predicted(m, x, a, prediction):
    """(x0, eps) from x = sqrt(a) x0 + sqrt(1 - a) eps and the network's m; v = sqrt(a) eps - sqrt(1 - a) x0."""
    signal, spread = math.sqrt(a), math.sqrt(1 - a)
    if prediction == "epsilon":
        return (x - spread * m) / signal, m
    if prediction == "v_prediction":
        return signal * x - spread * m, signal * m + spread * x
    return m, (x - signal * m) / spread


def close(actual, expected, tolerance=1e-5):
    """The design's parity, of each state [n, c, h, w]: max|difference| / max(1, max|expected|)."""
    images = (-4, -3, -2, -1)
    error = (actual - expected).abs().amax(images) / expected.abs().amax(images).clamp(min=1)
    assert (error <= tolerance).all(), error.tolist()


def room(a):
    """What float32 may lose of x0 = (x - sqrt(1 - a) m) / sqrt(a): two factors and two products round by 2^-24 each.

    For |x| and |m| up to 1, as clipping leaves smaller ones alone; at a = 4e-5 it is 4e-5.
    """
    return 1e-5 + 4 * 2**-24 / math.sqrt(a)


def formulas(scheduler, eta=0.0):
    """`trajectory` in float64, by DDPM's eq. 7 or DDIM's eq. 12 and 16, and what float32 may lose of each state.

    Of diffusers' scheduler it has the numbers alphas_cumprod, the timesteps, and which timestep comes before which.
    """
    config, grid, bars = scheduler.config, scheduler.timesteps.tolist(), scheduler.alphas_cumprod.double().tolist()
    clean = 1.0 if config.get("set_alpha_to_one", True) else bars[0]
    x, seen, rooms = start().double(), [], []
    for t, after in zip(grid, [*grid[1:], -1], strict=True):
        ddpm = isinstance(scheduler, DDPMScheduler)
        previous = after if ddpm else t - config.num_train_timesteps // len(grid)
        a, s = bars[t], bars[previous] if previous >= 0 else clean
        x0, eps = predicted(network(x, t), x, a, config.prediction_type)
        if config.clip_sample:
            x0 = x0.clamp(-config.clip_sample_range, config.clip_sample_range)
        beta = 1 - a / s
        variance = (1 - s) / (1 - a) * beta
        if ddpm:
            mean = (math.sqrt(s) * beta * x0 + math.sqrt(a / s) * (1 - s) * x) / (1 - a)
            if config.variance_type == "fixed_large":
                variance = beta
            sigma = math.sqrt(variance) if t > 0 else 0.0
        else:
            sigma = eta * math.sqrt(variance)
            mean = math.sqrt(s) * x0 + math.sqrt(1 - s - sigma**2) * eps
        x = mean + sigma * noise(t) if sigma else mean
        seen += [x, x0]
        rooms += [1e-5, room(a) if config.prediction_type == "epsilon" else 1e-5]
    return torch.stack(seen), torch.tensor(rooms)


@pytest.fixture
def walks_by_the_formulas(monkeypatch):
    """Ours in float32 (1e-5, see `room`), ours in float64 and diffusers' in float64 (1e-9) against `formulas`."""

    def check(kind, options, *arguments, eta=None, **grid):
        fused, theirs = (make(**options) for make in PAIRS[kind])
        fused.set_timesteps(*arguments, **grid, seed=5)
        theirs.set_timesteps(*arguments, **grid)
        assert fused.timesteps.tolist() == theirs.timesteps.tolist()
        eta = {} if eta is None else {"eta": eta}
        expected, rooms = formulas(theirs, **eta)
        close(trajectory(fused, **eta), expected, rooms)
        close(trajectory(fused, torch.float64, **eta), expected, 1e-9)
        theirs.alphas_cumprod = theirs.alphas_cumprod.double()
        for one in {"final_alpha_cumprod", "one"} & vars(theirs).keys():
            setattr(theirs, one, getattr(theirs, one).double())
        noisy = iter(theirs.timesteps.tolist())
        randn = f"diffusers.schedulers.scheduling_{kind}.randn_tensor"
        monkeypatch.setattr(randn, lambda *_, **__: noise(next(noisy)))  # diffusers draws what we draw
        close(trajectory(theirs, torch.float64, **eta), expected, 1e-9)  # its least variance is 1e-20

    return check


@pytest.mark.parametrize(
    ("grid", "prediction", "clip"),
    [
        *((grid, "epsilon", 1.0) for grid in GRIDS),
        *(
            (GRIDS[1], prediction, clip)
            for prediction in ("epsilon", "v_prediction", "sample")
            for clip in (None, 1.0, 0.5)
        ),
        (GRIDS[-1], "v_prediction", None),
        (GRIDS[-1], "sample", None),
    ],
)
def test_ddim_walks_by_its_formula_as_diffusers_does(grid, prediction, clip, walks_by_the_formulas):
    spacing, steps, options = grid
    options = {"num_train_timesteps": 100, "timestep_spacing": spacing, "prediction_type": prediction, **options}
    options |= {"clip_sample": clip is not None, "clip_sample_range": clip or 1.0}
    walks_by_the_formulas("ddim", options, steps)


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
def test_ddim_with_noise_and_other_schedules(options, eta, walks_by_the_formulas):
    walks_by_the_formulas("ddim", options, 25, eta=eta)


@pytest.mark.parametrize(
    ("grid", "variance", "prediction"),
    [
        *((grid, variance, "epsilon") for grid in GRIDS for variance in ("fixed_small", "fixed_large")),
        *((GRIDS[1], "fixed_small_log", prediction) for prediction in ("epsilon", "v_prediction", "sample")),
        (GRIDS[-1], "fixed_small", "v_prediction"),
        (GRIDS[-1], "fixed_large", "sample"),
    ],
)
def test_ddpm_walks_by_its_formula_as_diffusers_does(grid, variance, prediction, walks_by_the_formulas):
    spacing, steps, options = grid
    options = {"num_train_timesteps": 100, "timestep_spacing": spacing, "variance_type": variance, **options}
    options |= {"prediction_type": prediction, "clip_sample": prediction == "epsilon"}
    walks_by_the_formulas("ddpm", options, steps)


def test_ddpm_takes_a_grid_of_ones_own_and_none(walks_by_the_formulas):
    walks_by_the_formulas("ddpm", {}, timesteps=[900, 400, 399, 3])
    x, a = start(), float(DDPMScheduler().alphas_cumprod[999])
    x0, _ = predicted(network(x, 999).double(), x.double(), a, "epsilon")
    out = FusedDDPMScheduler().step(network(x, 999), 999, x)
    close(out.pred_original_sample, x0.clamp(-1, 1), room(a))


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


class OnCuda(torch.Tensor):
    """On the CPU, but says otherwise: the branches for CUDA on a machine without."""

    is_cuda = True


@pytest.fixture(params=["cpu", "cuda"])
def placed(request, monkeypatch):
    """Timesteps or samples as the branches for this device take them."""
    if request.param == "cpu":
        return lambda tensor: tensor

    def plain(*tensors, x0_prev, clip):
        tensors = [tensor.as_subclass(torch.Tensor) for tensor in (*tensors, x0_prev)]
        solver_step(*tensors[:-1], x0_prev=tensors[-1], clip=clip)

    monkeypatch.setattr(schedulers, "solver_step", plain)
    return lambda tensor: tensor.as_subclass(OnCuda)


def cut(scheduler):
    scheduler.timesteps = scheduler.timesteps[4:]


def thinned(scheduler):
    scheduler.timesteps = scheduler.timesteps[1::3]


def replaced(scheduler):
    scheduler.timesteps = torch.tensor([990, 700, 333, 40])


def edited(scheduler):
    scheduler.timesteps[1] = 777


def of_other_betas(scheduler):
    scheduler.alphas_cumprod = scheduler.alphas_cumprod**1.5


def of_edited_betas(scheduler):
    scheduler.alphas_cumprod.mul_(0.75)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("change", [cut, thinned, replaced, edited, of_other_betas, of_edited_betas])
@pytest.mark.parametrize("kind", PAIRS)
def test_what_was_changed_since_set_timesteps_is_followed(kind, change, inference, placed, monkeypatch):
    fused, theirs = (make() for make in PAIRS[kind])
    walks = []
    with torch.inference_mode(inference):
        for scheduler in (theirs, fused):
            scheduler.set_timesteps(10, **({"seed": 5} if scheduler is fused else {}))
            scheduler.step(start(), scheduler.timesteps[0], start())  # a table of the former is there
            change(scheduler)
            if scheduler is theirs:
                scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
                noisy = iter(scheduler.timesteps.tolist())
                randn = f"diffusers.schedulers.scheduling_{kind}.randn_tensor"
                monkeypatch.setattr(randn, lambda *_, noisy=noisy, **__: noise(next(noisy)))
            else:
                scheduler.timesteps = placed(scheduler.timesteps)
            walks.append(trajectory(scheduler, torch.float64))
    close(walks[1], walks[0], 1e-6)  # alphas_cumprod is float32, and 1 - a / s of numbers close to 1


def test_ddim_takes_any_timestep_as_diffusers_does(placed):
    fused, theirs = (make() for make in PAIRS["ddim"])
    for scheduler in (fused, theirs):
        scheduler.set_timesteps(10)
    theirs.alphas_cumprod = theirs.alphas_cumprod.double()
    x, m = start().double(), start(1).double()
    for t in (999, 7, 900, 0, 99):
        given = placed(torch.tensor(t))
        close(fused.step(m, given, x).prev_sample, theirs.step(m, t, x).prev_sample, 1e-9)


@pytest.mark.parametrize("kind", PAIRS)
def test_a_generator_for_each_row_makes_the_picture_that_it_makes_alone(kind, placed):
    def walk(seeds, x):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        scheduler, x = PAIRS[kind][0](), placed(x.contiguous(memory_format=torch.channels_last))
        scheduler.set_timesteps(10, first_sample=3)
        for t in scheduler.timesteps:
            options = {"generator": generators} | ({"eta": 0.5} if kind == "ddim" else {})
            x = scheduler.step(network(x, t), t, x, **options).prev_sample
        return x

    together = walk((7, 8, 9), start())
    for row, seed in enumerate((7, 8, 9)):
        assert torch.equal(together[row], walk((seed,), start()[row : row + 1])[0])
    assert not torch.equal(walk((7, 7), start()[[0, 0]])[0], walk((7, 8), start()[[0, 0]])[1])
    same = walk((7, 7), start()[[0, 0]])
    assert torch.equal(same[0], same[1])


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
    theirs = DDIMPipeline(deepcopy(unet).double(), DDIMScheduler())
    theirs.scheduler.alphas_cumprod = theirs.scheduler.alphas_cumprod.double()
    expected = images(theirs)
    # The pipeline's constructor makes every scheduler a DDIMScheduler of its own; afterwards it can be exchanged.
    theirs.scheduler = FusedDDIMScheduler.from_config(theirs.scheduler.config)
    close(torch.from_numpy(images(theirs)), torch.from_numpy(expected), 1e-9)
    noisy = DDPMPipeline(unet, FusedDDPMScheduler())
    first = images(noisy)
    assert np.array_equal(first, images(noisy))
    assert np.isfinite(first).all()
    assert first.std() > 0.05
    noisy.save_pretrained(tmp_path)
    assert (tmp_path / "scheduler" / "scheduler_config.json").is_file()
    again = DDPMPipeline(unet, FusedDDPMScheduler.from_pretrained(tmp_path, subfolder="scheduler"))
    assert np.array_equal(first, images(again))
    for loader in (DDPMPipeline, DiffusionPipeline):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded.scheduler) is FusedDDPMScheduler
        assert np.array_equal(first, images(loaded))


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
    with pytest.raises(ValueError, match=r"timestep: got 7, needs one of scheduler\.timesteps"):
        ddpm.step(x, 7, x)
    for t in (-1, 1000):
        with pytest.raises(ValueError, match=f"timestep: got {t}, needs 0 <= t < 1000"):
            ddim.step(x, t, x)
    with pytest.raises(ValueError, match="model_output: got"):
        ddpm.step(torch.cat((x, x), 1), 900, x)
    with pytest.raises(ValueError, match=r"eta: got 1\.5"):
        ddim.step(x, 900, x, eta=1.5)
    with pytest.raises(ValueError, match="use_clipped_model_output"):
        ddim.step(x, 900, x, use_clipped_model_output=True)
    with pytest.raises(ValueError, match="variance_noise"):
        ddim.step(x, 900, x, eta=1.0, variance_noise=x)
    with pytest.raises(ValueError, match="generator: got a list of 2, needs one, or one for each of the 3 rows"):
        ddpm.step(x, 900, x, generator=[torch.Generator()] * 2)
    with pytest.raises(ValueError, match="first_sample: got -1"):
        ddpm.set_timesteps(10, first_sample=-1)
    with pytest.raises(ValueError, match="num_inference_steps: got 0"):
        ddpm.set_timesteps(0)
    ddpm = FusedDDPMScheduler(steps_offset=200)
    ddpm.set_timesteps(10)
    with pytest.raises(ValueError, match="timesteps: got 1100"):
        ddpm.step(x, 900, x)
    for timesteps, message in (
        ([40, 700], "got 700 after 40"),
        ([700.0], r"scheduler\.timesteps: got tensor"),
        ([40, -1], "got -1"),
    ):
        ddpm.timesteps = torch.tensor(timesteps)
        with pytest.raises(ValueError, match=message):
            ddpm.step(x, 40, x)


def test_diffusers_stays_optional():
    """In a fresh process: ddpm does not import it; without it the import of the schedulers says what to do."""
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
try:
    import ddpm.schedulers
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == (
        "ddpm.schedulers: No module named 'diffusers': they are for diffusers, needs it: pip install diffusers\n"
    )
