"""diffusers' pixel pipelines as runs, and runs as pipelines: the same pictures as diffusers' own loop, both ways.

Tables are compared with diffusers' step in float64, pictures with its whole pipelines in float32 under the noise of the
contract.
"""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from ddpm import NoiseSchedule, PointMLP, extras, load_run, make_table, runs, sample
from ddpm.metrics import distance
from ddpm.networks import NETWORKS
from kernels import philox
from kernels.solver_step import reference

diffusers = pytest.importorskip("diffusers", reason="diffusers is optional and not installed here")

from diffusers import DDIMPipeline, DDPMPipeline, DiffusionPipeline, UNet2DModel  # noqa: E402

T, SEED, N = 100, 5, 2
TINY = {
    "sample_size": 8,
    "in_channels": 2,
    "out_channels": 2,
    "layers_per_block": 1,
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
BETAS = {"num_train_timesteps": T, "beta_end": 0.2}
V0 = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "clip_sample": False}
# (pipeline, its scheduler's options, steps)
WAYS = {
    "ddpm": ("DDPM", {}, 20),
    "ddpm, all steps": ("DDPM", {"beta_schedule": "squaredcos_cap_v2", "variance_type": "fixed_large"}, T),
    "ddpm, steps that do not divide T": ("DDPM", {"variance_type": "fixed_small_log"}, 7),
    "ddpm, zero terminal SNR": ("DDPM", V0 | {"timestep_spacing": "trailing"}, 7),
    "ddpm, x0": ("DDPM", {"prediction_type": "sample", "beta_schedule": "sigmoid", "steps_offset": 1}, 10),
    "ddpm, betas of one's own": (
        "DDPM",
        {"timestep_spacing": "linspace", "trained_betas": (np.linspace(0.02, 0.3, T) ** 2).tolist()},
        9,
    ),
    "ddim": ("DDIM", {}, 10),
    "ddim, linspace": ("DDIM", {"timestep_spacing": "linspace", "clip_sample_range": 2.0}, 7),
    "ddim, trailing": ("DDIM", V0 | {"timestep_spacing": "trailing"}, 9),
    "ddim, as of Stable Diffusion": (
        "DDIM",
        {"beta_schedule": "scaled_linear", "set_alpha_to_one": False, "steps_offset": 1},
        12,
    ),
    "ddim, x0": ("DDIM", {"prediction_type": "sample", "set_alpha_to_one": False, "clip_sample_range": 0.5}, 20),
}
KINDS = {"DDPM": DDPMPipeline, "DDIM": DDIMPipeline}
FAST = ("ddpm", "ddpm, steps that do not divide T", "ddim, linspace", "ddim, as of Stable Diffusion")


def tiny(**options):
    """Weights as after training, not zero where they begin as zeros."""
    torch.manual_seed(0)
    model = UNet2DModel(**TINY | options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.05)
    return model


def pipeline_of(kind="DDIM", unet=None, **options):
    scheduler = getattr(diffusers, f"{kind}Scheduler")(**BETAS | options)
    made = KINDS.get(kind, DDPMPipeline)(tiny() if unet is None else unet, scheduler)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def imported(ddpm, tmp_path):
    """imported(pipeline, *options) -> (the run, what the command said)."""

    def call(pipeline, *options, **how):
        pipeline.save_pretrained(tmp_path / "pipeline", **how)
        answer = ddpm("import", tmp_path / "pipeline", "--out", tmp_path / "run", *options)
        assert answer.code == 0, answer.err
        return load_run(tmp_path / "run"), answer.err

    return call


def theirs(pipeline, steps, monkeypatch, labels=None):
    """The state after diffusers' last step [N, 2, 8, 8], from x_T of stream 0 with the noise of stream 1."""
    grid, shape, last = [], (2, 8, 8), []

    def draw(*_, **__):
        step = grid.pop(0) + 1 if grid else 0
        stream = philox.Stream.SAMPLING if step else philox.Stream.INITIAL
        return philox.normal(SEED, torch.arange(N), step, stream, shape)

    scheduler = pipeline.scheduler
    own_step, own_grid = scheduler.step, scheduler.set_timesteps

    def set_timesteps(*arguments, **more):
        own_grid(*arguments, **more)
        grid.extend(scheduler.timesteps.tolist())

    def step(*arguments, **more):
        out = own_step(*arguments, **more)
        last[:] = [out.prev_sample]
        return out

    for module in ("pipelines.ddpm.pipeline_ddpm", "pipelines.ddim.pipeline_ddim", "schedulers.scheduling_ddpm"):
        monkeypatch.setattr(f"diffusers.{module}.randn_tensor", draw)
    monkeypatch.setattr(scheduler, "set_timesteps", set_timesteps)
    monkeypatch.setattr(scheduler, "step", step)
    pictures = pipeline(batch_size=N, num_inference_steps=steps, output_type="pt").images
    assert torch.equal(pictures, (last[0] / 2 + 0.5).clamp(0, 1))
    return last[0]


@pytest.mark.parametrize("way", [pytest.param(way, marks=() if way in FAST else pytest.mark.long) for way in WAYS])
def test_an_imported_run_draws_what_its_pipeline_draws(way, imported):
    kind, options, steps = WAYS[way]
    pipeline = pipeline_of(kind, **options)
    run, _ = imported(pipeline)
    own = sample(run.model, run.schedule, N, seed=SEED, engine="eager", **run.options(steps=steps))
    with pytest.MonkeyPatch.context() as patch:
        expected = theirs(pipeline, steps, patch)
    assert expected.std() > 0.1
    assert distance(own, expected) < 1e-4
    for eta in (0.0, 0.6) if kind == "DDIM" else (0.0,):
        rows_are_their_steps(run, pipeline.scheduler, steps, eta)


def rows_are_their_steps(run, scheduler, steps, eta):
    """In float64. The last row adds no noise, by our contract: where diffusers' would, it is left out of both."""
    table = make_table(run.schedule, **run.options(steps=steps, eta=eta or None))
    scheduler.set_timesteps(steps)
    assert (table.timesteps - 1).tolist() == scheduler.timesteps.tolist()
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    ddim = "DDIM" in type(scheduler).__name__
    if ddim:
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0] ** (not scheduler.config.set_alpha_to_one)
    rng = torch.Generator().manual_seed(1)
    x, m, z = (torch.randn(N, 2, 4, 4, dtype=torch.float64, generator=rng) for _ in range(3))
    for i, t in enumerate(scheduler.timesteps):
        noise = z if i < steps - 1 else torch.zeros_like(z)
        more = {"eta": eta, "variance_noise": noise} if ddim else {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, noise=noise, **__: noise)
            out = scheduler.step(m, t, x, **more)
        new, x0 = reference(x, m, table.coefficients[i, :7].tolist(), noise, None, table.clip)
        torch.testing.assert_close(new, out.prev_sample, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(x0, out.pred_original_sample, rtol=1e-9, atol=1e-9)


def test_what_the_run_keeps_of_the_pipeline(imported):
    run, said = imported(pipeline_of("DDPM", variance_type="fixed_large", clip_sample_range=1.5))
    assert run.options() == {
        "solver": "ddpm", "prediction": "eps", "clip": 1.5, "spacing": "leading+0", "variance": "beta"
    }  # fmt: skip
    assert run.schedule.timesteps == T
    assert said == ""
    run, _ = imported(pipeline_of("DDIM", steps_offset=2, prediction_type="sample"), "--overwrite")
    assert run.options() == {
        "solver": "ddim", "steps": 33, "prediction": "x0", "clip": 1.0, "spacing": "leading+2", "ends": 0
    }  # fmt: skip
    run, _ = imported(DDIMPipeline(tiny(), pipeline_of("DDPM").scheduler), "--overwrite")
    assert run.options()["solver"] == "ddim"  # what that pipeline makes of every scheduler


def test_other_schedulers_give_their_betas_which_is_said(imported):
    for name, solver in (("PNDM", "ddim"), ("DPMSolverMultistep", "dpmpp_2m")):
        run, said = imported(pipeline_of(name, prediction_type="v_prediction"), "--overwrite")
        assert f"{name}Scheduler has no table here: its betas are taken, the run samples by {solver} with" in said
        assert run.options()["solver"] == solver
        assert run.options()["prediction"] == "v"
        bars = torch.cumprod(1 - torch.linspace(1e-4, 0.2, T, dtype=torch.float64), 0)
        torch.testing.assert_close(run.schedule.alpha_bars[1:], bars, rtol=1e-4, atol=0)


def test_published_weights_have_attention_by_its_former_names_in_a_pickle(imported, ddpm, tmp_path):
    pipeline = pipeline_of()
    run, _ = imported(pipeline)
    unet = tmp_path / "pipeline" / "unet"
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    former = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    state = {}
    for name, value in pipeline.unet.state_dict().items():
        for new, old in former.items():
            name = name.replace(new, old)
        state[name] = value
    assert any(".query." in name for name in state)
    torch.save(state, unet / "diffusion_pytorch_model.bin")
    assert ddpm("import", tmp_path / "pipeline", "--out", tmp_path / "other").code == 0
    assert load_run(tmp_path / "other").digest() == run.digest()


def test_published_pipelines_may_have_all_files_beside_the_index(imported, ddpm, tmp_path):
    run, _ = imported(pipeline_of())
    for name in (UNET, WEIGHTS, SCHEDULER):
        (tmp_path / "pipeline" / name).rename(tmp_path / "pipeline" / name.partition("/")[2])
    for name in ("unet", "scheduler"):
        (tmp_path / "pipeline" / name).rmdir()
    answer = ddpm("import", tmp_path / "pipeline", "--out", tmp_path / "other")
    assert answer.code == 0, answer.err
    other = load_run(tmp_path / "other")
    assert (other.digest(), other.sampling) == (run.digest(), run.sampling)


# --- conditions -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_class_is_its_one_hot_condition(imported):
    unet = tiny(num_class_embeds=4)
    run, _ = imported(pipeline_of(unet=unet), "--classes", "a,b,c,e\u0301")
    x, t, labels = torch.randn(3, 2, 8, 8), torch.tensor([3, 50, 99]), torch.tensor([2, 0, 3])
    assert run.model.condition_shape == (4,)
    expected = unet(x, t, class_labels=labels).sample
    assert torch.equal(run.model(x, t, torch.eye(4)[labels]), expected)
    assert torch.equal(run.context("c"), torch.eye(4)[2])
    assert run.classes == ("a", "b", "c", "\u00e9")
    # Zeros, which are no condition, add no embedding.
    unet.class_embedding.weight.data.zero_()
    torch.testing.assert_close(run.model(x, t), unet(x, t, class_labels=labels).sample)
    assert torch.equal(run.model(x, t), run.model(x, t, run.model.null_condition(3)))


@torch.no_grad()
def test_guidance_takes_the_class_that_means_none(imported):
    unet = tiny(num_class_embeds=4)
    run, _ = imported(pipeline_of(unet=unet), "--null-class", 3)
    x, t = torch.randn(2, 2, 8, 8), torch.tensor([3, 50])
    assert torch.equal(run.model(x, t), unet(x, t, class_labels=torch.tensor([3, 3])).sample)
    options = run.options(steps=4) | {"seed": SEED, "engine": "eager"}
    table = make_table(run.schedule, **run.options(steps=4))
    state = philox.normal(SEED, torch.arange(N), 0, philox.Stream.INITIAL, (2, 8, 8))
    for t, row in zip(table.timesteps.tolist(), table.coefficients.tolist(), strict=True):
        at = torch.full((N,), t - 1)
        with_class, without = (unet(state, at, class_labels=torch.full((N,), k)).sample for k in (1, 3))
        state, _ = reference(state, without + 2.5 * (with_class - without), row[:7], None, None, table.clip)
    guided = sample(run.model, run.schedule, N, context=torch.eye(4)[1], guidance=2.5, **options)
    assert distance(guided, state) < 1e-4


@torch.no_grad()
def test_an_identity_embedding_is_the_condition_itself(imported):
    unet = tiny(class_embed_type="identity")
    run, _ = imported(pipeline_of(unet=unet))
    x, t, c = torch.randn(2, 2, 8, 8), torch.tensor([3, 50]), torch.randn(2, 32)
    assert run.model.condition_shape == (32,)
    assert torch.equal(run.model(x, t, c), unet(x, t, class_labels=c).sample)


# --- engines, training, commands ------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["fused", pytest.param("compile", marks=pytest.mark.long)])
def test_engines_draw_what_eager_draws(engine, imported):
    run, _ = imported(pipeline_of("DDPM", unet=tiny(num_class_embeds=3)))
    options = run.options(steps=5) | {"context": torch.eye(3)[:2], "guidance": 2.0, "seed": 3}
    eager = sample(run.model, run.schedule, 2, engine="eager", **options)
    assert distance(sample(run.model, run.schedule, 2, engine=engine, **options), eager) < 1e-4


@pytest.mark.long
def test_an_imported_run_is_trained_on(imported, ddpm, tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "images.npy", rng.integers(0, 256, (16, 8, 8, 1), dtype=np.uint8))
    run, _ = imported(pipeline_of("DDPM", unet=tiny(in_channels=1, out_channels=1)))
    how = ("--data", tmp_path / "images.npy", "--epochs", 1, "--batch-size", 8, "--timesteps", 20, "--device", "cpu")
    how += ("--schedule", "cosine")
    answer = ddpm("train", "--init", tmp_path / "run", "--out", tmp_path / "more", *how)
    assert answer.code == 0, answer.err
    more = load_run(tmp_path / "more")
    assert more.config["network"] == "unet2d"
    assert more.model.config() == run.model.config()
    assert more.digest() != run.digest()
    answer = ddpm("train", "--network", "unet2d", "--n-feat", 8, "--out", tmp_path / "fresh", *how)
    assert answer.code == 0, answer.err
    assert load_run(tmp_path / "fresh").model.sample_shape == (1, 8, 8)


def test_a_network_for_data_halves_what_can_be_halved():
    make = NETWORKS["unet2d"].for_data
    with torch.device("meta"):
        assert make((3, 64, 32), 0, 32).arguments["block_out_channels"] == [32, 64, 128]
        assert make((3, 28, 28), 10, 32).condition_shape == (10,)
        assert make((1, 7, 7), 0, 8).arguments["block_out_channels"] == [8]
    with pytest.raises(ValueError, match="unet2d is for images"):
        make((2,), 0, 8)


def test_without_diffusers_the_extra_is_named(imported, ddpm, monkeypatch, tmp_path):
    run, _ = imported(pipeline_of())
    own = extras.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "diffusers" else own(name))
    needs = "diffusers is not installed, needs: pip install 'fused-ddpm[diffusers]'\n"
    for arguments, names in (
        (("import", tmp_path / "pipeline", "--out", tmp_path / "x"), ""),
        (("export-diffusers", run.folder, tmp_path / "x"), ""),
        (("sample", run.folder, "--n", 1, "--npy", tmp_path / "x.npy"), f"{run.folder / 'config.json'}: "),
    ):
        answer = ddpm(*arguments)
        assert answer.code in (1, 2)
        assert answer.err == f"error: {names}{needs}"
    assert not (tmp_path / "x").exists()


# --- what is refused ------------------------------------------------------------------------------------------------

INDEX, UNET, SCHEDULER = "model_index.json", "unet/config.json", "scheduler/scheduler_config.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
REFUSED = {
    "autoencoder": (INDEX, {"vae": ["diffusers", "AutoencoderKL"]}, "latent: not a pixel model"),
    "vq": (INDEX, {"vqvae": ["diffusers", "VQModel"]}, "latent: not a pixel model"),
    "text": (INDEX, {"unet": ["diffusers", "UNet2DConditionModel"]}, "latent: not a pixel model"),
    "prompt": (INDEX, {"text_encoder": ["transformers", "T5"]}, "has a text_encoder (T5)"),
    "sound": (INDEX, {"unet": ["diffusers", "UNet1DModel"]}, f"{INDEX}: its unet is a UNet1DModel"),
    "no unet": (INDEX, {"unet": [None, None]}, f"{INDEX}: DDIMPipeline has no unet"),
    "index": (INDEX, None, f"{INDEX}: not readable JSON"),
    "sigmas": (
        INDEX, {"_class_name": "X", "scheduler": ["diffusers", "KarrasVeScheduler"]}, "KarrasVeScheduler, whose noise"
    ),
    "thresholding": (SCHEDULER, {"thresholding": True}, "thresholding: got True"),
    "zero SNR": (SCHEDULER, {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr: got True"),
    "objective": (SCHEDULER, {"prediction_type": "flow"}, "prediction_type: got 'flow'"),
    "former objective": (SCHEDULER, {"predict_epsilon": False}, "predict_epsilon false"),
    "betas": (SCHEDULER, {"trained_betas": [0.1, 0.2]}, "trained_betas: got 2"),
    "NaN": (SCHEDULER, {"beta_start": float("nan")}, "alpha_bars: got"),
    "text for a number": (SCHEDULER, {"beta_start": "x"}, SCHEDULER),
    "kind of betas": (SCHEDULER, {"beta_schedule": "x"}, "x is not implemented"),
    "T": (SCHEDULER, {"num_train_timesteps": 10**12}, "num_train_timesteps: got 1000000000000"),
    "clip": (SCHEDULER, {"clip_sample_range": -1.0}, "clip: got -1.0"),
    "text for a clip": (SCHEDULER, {"clip_sample": "no"}, "clip_sample: got 'no'"),
    "spacing": (SCHEDULER, {"timestep_spacing": "x"}, "timestep_spacing: got 'x'"),
    "offset": (SCHEDULER, {"steps_offset": -1}, "steps_offset: got -1"),
    "far offset": (SCHEDULER, {"steps_offset": 1000}, "steps_offset: got 1000, needs less than"),
    "scheduler": (SCHEDULER, None, f"{SCHEDULER}: not readable JSON"),
    "learned variance": (UNET, {"out_channels": 4}, "out_channels: got 4, which is a learned variance"),
    "sides": (UNET, {"sample_size": 9}, "sample_size: got 9, needs a multiple of 2"),
    "no sides": (UNET, {"sample_size": None}, "sample_size: got None"),
    "dimensions": (UNET, {"sample_size": [8, 8, 8]}, "sample_size: got [8, 8, 8]"),
    "noise levels": (UNET, {"time_embedding_type": "fourier"}, "time_embedding_type: got 'fourier'"),
    "label's kind": (UNET, {"class_embed_type": "timestep"}, "class_embed_type: got 'timestep'"),
    "layers": (UNET, {"layers_per_block": 10**9}, "layers_per_block: got 1000000000, needs at most"),
    "levels": (UNET, {"block_out_channels": [8] * 99}, "block_out_channels: got"),
    "blocks": (UNET, {"down_block_types": ["XBlock2D", "DownBlock2D"]}, "XBlock2D does not exist"),
    "cross attention": (UNET, {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]}, "cross_attention_dim"),
    "unet": (UNET, None, f"{UNET}: not readable JSON"),
    "wider": (UNET, {"block_out_channels": [8, 16]}, f"{WEIGHTS}: 'unet."),
    "immense": (UNET, {"block_out_channels": [8, 1 << 40]}, "error: "),
    "weights": (WEIGHTS, None, f"{WEIGHTS}: not a whole safetensors file"),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    pipeline_of().save_pretrained(folder)
    return folder


@pytest.fixture
def damaged(saved, tmp_path):
    """damaged(file, changes or None = cut off): a copy of a saved pipeline."""

    def make(name, changes):
        folder = tmp_path / "pipeline"
        shutil.copytree(saved, folder)
        path = folder / name
        if changes is None:
            path.write_bytes(path.read_bytes()[:100])
        else:
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return folder

    return make


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_refused_is_one_line_that_names_it(fault, damaged, ddpm, tmp_path):
    name, changes, says = REFUSED[fault]
    answer = ddpm("import", damaged(name, changes), "--out", tmp_path / "run")
    assert answer.code == 2
    assert says in answer.err
    assert answer.err.splitlines()[-1].startswith(f"error: {tmp_path / 'pipeline'}")
    assert answer.err.count("error: ") == 1
    assert not (tmp_path / "run").exists()


def test_learned_variances_are_refused(ddpm, tmp_path):
    pipeline_of("DDPM", variance_type="learned_range").save_pretrained(tmp_path / "pipeline")
    answer = ddpm("import", tmp_path / "pipeline", "--out", tmp_path / "run")
    assert (answer.code, "variance_type: got 'learned_range'" in answer.err) == (2, True)


def test_folders_and_options_that_do_not_fit(saved, damaged, ddpm, tmp_path):
    out = ("--out", tmp_path / "run")
    for arguments, says in (
        ((tmp_path, *out), f"{tmp_path}: has no model_index.json"),
        ((saved, *out, "--timesteps", 500), f"--timesteps: {saved} is a pipeline, which tells that itself"),
        ((saved, *out, "--null-class", 0), "--null-class: null_class: got 0, needs one of the network's 0 classes"),
        ((saved, *out, "--classes", "a,b"), "--classes: got 2 names, needs 0"),
        ((saved / UNET, *out, "--null-class", 0), "is no folder of a pipeline"),
    ):
        answer = ddpm("import", *arguments)
        assert (answer.code, says in answer.err) == (2, True), answer.err
    folder = damaged(UNET, {"dropout": 0.1, "new_option": 3})
    (folder / WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    answer = ddpm("import", folder, *out)
    assert "(but diffusion_pytorch_model.fp16.safetensors), needs one" in answer.err
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").rename(folder / WEIGHTS)
    answer = ddpm("import", folder, *out)
    assert answer.code == 0, answer.err
    assert "UNet2DModel does not know new_option: left out" in answer.err
    assert "dropout 0.1 is left out" in answer.err


# --- the other way --------------------------------------------------------------------------------------------------

LOADS = """
import sys, json, torch
import {module}
from diffusers import DiffusionPipeline
from kernels import philox
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
steps, shape = int(sys.argv[3]), tuple(json.loads(sys.argv[4]))
seeded = {{"seed": 7}} if type(pipeline.scheduler).__module__ == "ddpm.schedulers" else {{}}
pipeline.scheduler.set_timesteps(steps, **seeded)
x = philox.normal(7, torch.arange(2), 0, 0, shape)
with torch.no_grad():
    for t in pipeline.scheduler.timesteps:
        x = pipeline.scheduler.step(pipeline.unet(x, t).sample, t, x).prev_sample
torch.save(x, sys.argv[2])
print(type(pipeline).__name__, type(pipeline.unet).__name__, type(pipeline.scheduler).__name__)
"""


def loaded_elsewhere(folder, module, tmp_path, steps, shape):
    """(names of the classes, x0 [2, ...] of seed 7) by diffusers in a fresh process."""
    arguments = (folder, tmp_path / "x.pt", steps, json.dumps(shape))
    line = [sys.executable, "-c", LOADS.format(module=module), *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split(), torch.load(tmp_path / "x.pt")


def test_an_imported_pipeline_is_exported_as_one_of_diffusers_own(imported, ddpm, tmp_path):
    pipeline = pipeline_of("DDIM", unet=tiny(num_class_embeds=3), steps_offset=1, timestep_spacing="leading")
    run, _ = imported(pipeline)
    answer = ddpm("export-diffusers", run.folder, tmp_path / "back")
    assert answer.code == 0, answer.err
    back = DDIMPipeline.from_pretrained(tmp_path / "back")
    assert type(back.unet) is UNet2DModel
    for name, value in pipeline.unet.state_dict().items():
        assert torch.equal(back.unet.state_dict()[name], value), name
    for name in ("num_train_timesteps", "steps_offset", "timestep_spacing", "clip_sample", "set_alpha_to_one"):
        assert back.scheduler.config[name] == pipeline.scheduler.config[name]
    torch.testing.assert_close(back.scheduler.alphas_cumprod, pipeline.scheduler.alphas_cumprod, rtol=2e-5, atol=0)
    assert ddpm("import", tmp_path / "back", "--out", tmp_path / "again").code == 0
    assert load_run(tmp_path / "again").digest() == run.digest()


@pytest.fixture
def run_of(tmp_path):
    """run_of(network, **sampling): a run of random weights, T = 20."""

    def make(network, **sampling):
        schedule = NoiseSchedule.make("context_unet", 20, 1e-4, 0.35)
        with runs.held(tmp_path / "made"):
            runs.start_run(tmp_path / "made", runs.make_config(network, schedule, "v", sampling=sampling), network)
        return load_run(tmp_path / "made")

    return make


@pytest.fixture
def context_unet(unet):
    return unet(in_channels=1, n_cfeat=3, height=(8, 16), multipliers=(1, 2))


SAMPLINGS = {"ddpm": {"clip": 1.0}, "ddim": {"solver": "ddim", "steps": 10, "spacing": "leading+1", "ends": 1}}


@pytest.mark.long
@pytest.mark.parametrize("solver", SAMPLINGS)
def test_any_run_is_exported_with_our_scheduler(solver, context_unet, run_of, ddpm, tmp_path):
    run = run_of(context_unet, **SAMPLINGS[solver])
    answer = ddpm("export-diffusers", run.folder, tmp_path / "pipeline")
    assert answer.code == 0, answer.err
    names, x = loaded_elsewhere(tmp_path / "pipeline", "ddpm.pipelines", tmp_path, 10, (1, 8, 16))
    assert names == ["DDPMPipeline", "RunModel", f"Fused{solver.upper()}Scheduler"]
    own = sample(run.model, run.schedule, 2, seed=7, **run.options(steps=10))
    assert distance(x, own) < 1e-4
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(batch_size=1, num_inference_steps=5, output_type="np").images
    assert pictures.shape == (1, 8, 16, 1)


def test_its_model_takes_conditions_as_labels(context_unet, run_of, ddpm, tmp_path):
    run = run_of(context_unet)
    assert ddpm("export-diffusers", run.folder, tmp_path / "pipeline").code == 0
    unet = DiffusionPipeline.from_pretrained(tmp_path / "pipeline").unet
    x, c = torch.randn(2, 1, 8, 16), torch.eye(3)[:2]
    with torch.no_grad():
        expected = run.model(x, torch.full((2,), 5 / 20), c)
        torch.testing.assert_close(unet(x, torch.tensor(4), class_labels=c).sample, expected)
        torch.testing.assert_close(unet(x, 4, c, return_dict=False)[0], expected)


def test_an_occupied_folder_is_refused_and_left_alone(imported, run_of, ddpm, snapshot, tmp_path, monkeypatch):
    run, _ = imported(pipeline_of())
    points = run_of(PointMLP(2, 8))
    before = snapshot(tmp_path)
    for folder, says in (("pipeline", "already holds a pipeline (model_index.json), needs --overwrite"),
                         ("run", "holds a run (config.json), needs another folder")):  # fmt: skip
        answer = ddpm("export-diffusers", run.folder, tmp_path / folder)
        assert (answer.code, says in answer.err) == (2, True), answer.err
    assert ddpm("export-diffusers", run.folder, run.folder, "--overwrite").code == 2
    answer = ddpm("export-diffusers", points.folder, tmp_path / "points")
    assert (answer.code, "has samples of shape [2], diffusers' pipelines need images" in answer.err) == (2, True)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ddpm.files.os.fsync", full)
        assert ddpm("export-diffusers", run.folder, tmp_path / "new").code == 2
    assert snapshot(tmp_path) == before
    (tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"old")
    assert ddpm("export-diffusers", run.folder, tmp_path / "pipeline", "--overwrite").code == 0
    assert not (tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.bin").exists()
    assert type(DDIMPipeline.from_pretrained(tmp_path / "pipeline").unet) is UNet2DModel


def test_what_a_scheduler_does_not_know_is_said(context_unet, run_of, ddpm, tmp_path):
    run = run_of(context_unet, solver="dpmpp_2m", steps=5, spacing="lucidrains")
    answer = ddpm("export-diffusers", run.folder, tmp_path / "pipeline")
    assert answer.code == 0, answer.err
    assert "does not know solver dpmpp_2m (ddpm takes its place)" in answer.out
    assert "does not know spacing lucidrains (trailing takes its place)" in answer.out
    run = run_of(context_unet, solver="ddim", steps=7, eta=0.5)
    answer = ddpm("export-diffusers", run.folder, tmp_path / "pipeline", "--overwrite")
    assert "does not know steps to the next timestep" in answer.out
    assert "does not know eta 0.5 (an argument of its step)" in answer.out
