"""Trainer: a folder of pictures by the library's arguments, on our loop: kills, milestones, what is refused."""

import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm import GaussianDiffusion, Trainer, Unet, load_run, sample
from ddpm.errors import BadInput
from ddpm.files import read_noted

STEPS, BATCH = 6, 4
FINISHED = ("config.json", "loss.csv", "model.safetensors", "training.safetensors")


@pytest.fixture
def folder(tmp_path):
    """Ten pictures of 8x8, half of them in a subfolder."""
    rng = np.random.default_rng(0)
    (tmp_path / "pictures" / "more").mkdir(parents=True)
    for k in range(10):
        values = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(values).save(tmp_path / "pictures" / ("more" if k % 2 else "") / f"{k}.png")
    return tmp_path / "pictures"


@pytest.fixture
def made(folder, tmp_path):
    """made(results="run", model={...}, **options): a trainer of a small diffusion of always the same weights."""

    def make(results="run", model=None, network=None, kind=GaussianDiffusion, **options):
        torch.manual_seed(0)
        net = Unet(**{"dim": 4, "dim_mults": (1, 2), "attn_dim_head": 4, "attn_heads": 1} | (network or {}))
        described = {"image_size": 8, "timesteps": 20, "sampling_timesteps": 2} | (model or {})
        given = {"train_batch_size": BATCH, "train_num_steps": STEPS, "calculate_fid": False, "num_samples": 2}
        given |= {"train_lr": 1e-2, "ema_update_every": 2, "save_and_sample_every": 3} | options
        given = {name: value for name, value in given.items() if value is not None}
        return Trainer(kind(net, **described), folder, results_folder=tmp_path / results, **given)

    return make


def content(folder, names=FINISHED):
    return {name: (folder / name).read_bytes() for name in names}


def losses(folder):
    return [float(line.split(",")[2]) for line in (folder / "loss.csv").read_text().splitlines()[1:]]


@pytest.fixture
def straight(made, tmp_path):
    """The content of a run that nothing stopped."""
    made("straight").train()
    return content(tmp_path / "straight")


def test_what_it_leaves_is_a_run_of_the_averaged_weights(made, tmp_path):
    trainer = made(model={"sampling_timesteps": 5, "ddim_sampling_eta": 0.5, "objective": "pred_noise"})
    before = {name: value.clone() for name, value in trainer.model.model.state_dict().items()}
    trainer.train()
    run = load_run(tmp_path / "run")
    assert trainer.step == STEPS
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        *FINISHED, "sample-1.png", "sample-2.png", "model-1.safetensors", "model-2.safetensors"
    }  # fmt: skip
    average, trained = trainer.ema.ema_model, trainer.model
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, average.model.state_dict()[name])
        assert not torch.equal(value, trained.model.state_dict()[name])
        assert not torch.equal(value, before[name])
    expected = average.sample(2, seed=4)
    drawn = sample(run.model, run.schedule, 2, seed=4, **run.options())
    torch.testing.assert_close((drawn + 1) / 2, expected, rtol=0, atol=1e-6)
    assert run.config["sampling"]["steps"] == 5


def test_a_step_is_the_diffusion_s_loss_of_the_next_pictures(made, folder, tmp_path, plain_words):
    """Order by stream 5, mirrored by stream 6; t and noise as `diffusion(images)` draws them."""
    trainer = made(train_num_steps=1, model={"seed": 3, "offset_noise_strength": 0.2, "loss_type": "huber"})
    ordered = [np.asarray(Image.open(path)) for path in sorted(folder.rglob("*.png"))]
    order = np.argsort([plain_words(3, k, 0, 5, 1)[0] for k in range(10)], kind="stable")[:BATCH]
    images = np.stack([ordered[k] for k in order]).transpose(0, 3, 1, 2) / 255
    for k in range(BATCH):
        if plain_words(3, k, 0, 6, 1)[0] >> 31:
            images[k] = images[k, :, :, ::-1]
    diffusion = made("other").model
    alike = GaussianDiffusion(diffusion.model, image_size=8, timesteps=20, seed=3, offset_noise_strength=0.2,
                              loss_type="huber")  # fmt: skip
    with torch.no_grad():
        expected = float(alike(torch.from_numpy(images).float(), samples=torch.arange(BATCH)))
    trainer.train()
    assert losses(tmp_path / "run") == [pytest.approx(expected, rel=1e-5)]


def test_accumulated_gradients_are_those_of_the_whole_batch(made):
    whole = made("whole", train_num_steps=1)
    parts = made("parts", train_num_steps=1, train_batch_size=1, gradient_accumulate_every=BATCH)
    for trainer in (whole, parts):
        trainer.train()
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


class Stopped(Exception):
    """A kill, as far as one process can show it."""


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_a_stopped_program_goes_on_where_it_was(made, tmp_path, straight, monkeypatch, number):
    reach = Trainer.reach

    def and_stop(self, milestone):
        reach(self, milestone)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(Trainer, "reach", and_stop)
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
        made().train()
    monkeypatch.setattr(Trainer, "reach", reach)
    assert read_noted(tmp_path / "run" / "training.safetensors")[1]["step"] == 3
    made().train()
    assert content(tmp_path / "run") == straight
    made().train()  # finished
    assert content(tmp_path / "run") == straight


class Halved(GaussianDiffusion):
    """Times of one's own, made of the diffusion's."""

    def random_times(self, batch_size):
        return super().random_times(batch_size) // 2


class Former(Halved):
    """And a loss by the library's signature, which knows no samples."""

    def p_losses(self, x_start, t, noise=None, offset_noise_strength=None, loss_reduction="mean"):
        return super().p_losses(x_start, t, noise, offset_noise_strength, loss_reduction)


def test_a_subclass_s_times_and_losses_are_those_of_the_pictures_and_go_on(made, tmp_path, monkeypatch, plain_words):
    seen, p_losses = [], Former.p_losses
    made("halved", kind=Halved).train()
    monkeypatch.setattr(Former, "p_losses", lambda self, x, t: seen.extend(t.tolist()) or p_losses(self, x, t))
    made("straight", kind=Former).train()
    assert seen == [(plain_words(0, k, 0, 3, 1)[0] * 20 >> 32) // 2 for k in range(STEPS * BATCH)]
    assert (tmp_path / "straight" / "loss.csv").read_text() == (tmp_path / "halved" / "loss.csv").read_text()
    made("run", kind=Former, train_num_steps=4).train()
    made("run", kind=Former).train()
    assert load_run(tmp_path / "run").digest() == load_run(tmp_path / "straight").digest()


@pytest.mark.long
def test_a_kill_before_the_first_checkpoint_begins_again(made, tmp_path, straight, monkeypatch):
    reach = Trainer.reach
    monkeypatch.setattr(Trainer, "reach", lambda *_: (_ for _ in ()).throw(Stopped))
    with pytest.raises(Stopped):
        made().train()
    monkeypatch.setattr(Trainer, "reach", reach)
    assert not (tmp_path / "run" / "training.safetensors").exists()
    made().train()
    assert content(tmp_path / "run") == straight


@pytest.mark.long
def test_more_steps_go_on_and_a_milestone_can_be_gone_back_to(made, tmp_path, straight):
    made(train_num_steps=4).train()
    assert load_run(tmp_path / "run").digest() != load_run(tmp_path / "straight").digest()
    made().train()
    assert load_run(tmp_path / "run").digest() == load_run(tmp_path / "straight").digest()
    back = made()
    back.load(1)
    assert back.step == 3
    back.train()
    assert load_run(tmp_path / "run").digest() == load_run(tmp_path / "straight").digest()
    assert (tmp_path / "run" / "loss.csv").read_bytes() == straight["loss.csv"]


@pytest.mark.long
def test_load_gives_the_averaged_weights_of_a_milestone(made, tmp_path):
    made().train()
    trainer = made("run")
    trainer.load(1)
    averaged = trainer.ema.ema_model.model.state_dict()
    third = made("third", train_num_steps=3)
    third.train()
    for name, value in load_run(tmp_path / "third").model.state_dict().items():
        assert torch.equal(value, averaged[name])
    trainer.save("again")
    kept = (tmp_path / "run" / f"model-{name}.safetensors" for name in ("again", 1))
    assert len({path.read_bytes() for path in kept}) == 1


PROGRAM = """
    import sys
    import torch
    from ddpm import GaussianDiffusion, Trainer, Unet

    torch.manual_seed(0)
    network = Unet(4, dim_mults=(1, 2), attn_dim_head=4, attn_heads=1)
    diffusion = GaussianDiffusion(network, image_size=8, timesteps=20, sampling_timesteps=2)
    options = {"train_batch_size": int(sys.argv[3]), "train_num_steps": 6, "calculate_fid": False, "num_samples": 2}
    options |= {"train_lr": 1e-2, "ema_update_every": 2, "save_and_sample_every": 3}
    trainer = Trainer(diffusion, sys.argv[1], results_folder=sys.argv[2], **options)
    trainer.train()
    assert trainer.step == 6
"""


def under_torchrun(*arguments, folder):
    """(exit code, stderr) of PROGRAM on two ranks."""
    (folder / "program.py").write_text(textwrap.dedent(PROGRAM))
    run = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", folder / "program.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, (*run, *arguments))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return done.returncode, done.stderr


@pytest.mark.long
def test_two_ranks_train_as_one_does(straight, folder, tmp_path):
    """The same pictures and noise, so the same losses but for rounding; one of the two writes."""
    code, errors = under_torchrun(folder, tmp_path / "run", BATCH, folder=tmp_path)
    assert code == 0, errors
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        path.name for path in (tmp_path / "straight").iterdir()
    }
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "straight"), rel=1e-4)
    code, errors = under_torchrun(folder, tmp_path / "odd", 3, folder=tmp_path)
    assert code != 0
    assert "train_batch_size: got 3, needs a multiple of the 2 ranks" in errors


def test_without_auto_normalize_pictures_are_of_both_signs(made, tmp_path, monkeypatch):
    """They reach the diffusion as it says that images are outside of it; what is drawn is shown as it is."""
    seen = []
    p_losses = GaussianDiffusion.p_losses
    monkeypatch.setattr(
        GaussianDiffusion, "p_losses", lambda self, x, *a, **k: seen.append(x) or p_losses(self, x, *a, **k)
    )
    for auto_normalize in (True, False):
        name = f"run-{auto_normalize}"
        made(name, train_num_steps=3, model={"auto_normalize": auto_normalize}).train()
    assert torch.equal(seen[0], seen[3])
    assert seen[0].min() < -0.9
    assert load_run(tmp_path / "run-True").digest() == load_run(tmp_path / "run-False").digest()
    pictures = [(tmp_path / f"run-{kind}" / "sample-1.png").read_bytes() for kind in (True, False)]
    assert pictures[0] == pictures[1]


def test_arguments_of_former_versions(made, caplog):
    former = {"fp16": True, "update_ema_every": 5, "step_start_ema": 2000, "image_size": 8, "use_lion": False}
    trainer = made(ema_update_every=None, **former)
    assert (trainer.options.precision, trainer.settings["ema_update_every"]) == ("bf16", 5)
    assert "step_start_ema: 2000 has no effect: the average begins at once" in caplog.text


@pytest.mark.long
def test_amp_is_bfloat16_and_said(made, caplog, tmp_path):
    trainer = made(amp=True, calculate_fid=True)
    assert "amp: computes in bfloat16" in caplog.text
    assert "no FID is calculated" in caplog.text
    kinds = set()
    trainer.model.model.final_conv.register_forward_hook(lambda _, __, output: kinds.add(output.dtype))
    trainer.train()
    assert torch.bfloat16 in kinds


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pictures_get_the_channels_of_the_diffusion(made, folder, channels):
    for path in folder.glob("*.png"):
        path.unlink()
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(grey).save(folder / "a.png")
    trainer = made(network={"channels": channels})
    paths = sorted(folder.rglob("*.png"), key=lambda path: path.name)
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    expected = [np.atleast_3d(Image.open(path).convert(mode)).transpose(2, 0, 1) for path in paths]
    assert len(paths) == 6
    np.testing.assert_array_equal(np.sort(trainer.ds.values, 0), np.sort(np.stack(expected), 0))


def test_pictures_are_cropped_to_the_shape_of_the_diffusion(made, folder, tmp_path):
    trainer = made(model={"image_size": (8, 4)}, train_num_steps=3)
    shown = [np.asarray(Image.open(path)).transpose(2, 0, 1) for path in sorted(folder.rglob("*.png"))]
    expected = {image[:, :, 2:6].tobytes() for image in shown}
    assert {value.numpy().tobytes() for value in trainer.ds.values} == expected
    trainer.train()
    run = load_run(tmp_path / "run")
    assert run.config["training"]["image_size"] == "8x4"
    assert run.model.sample_shape == (3, 8, 4)
    made(model={"image_size": (8, 4)}, train_num_steps=4).train()
    with Image.open(tmp_path / "run" / "sample-1.png") as picture:
        assert picture.size == (2 * 32 + 4 + 20, 64 + 20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_batch_size": 0}, "train_batch_size: got 0, needs an integer >= 1"),
        ({"train_num_steps": 1.5}, r"train_num_steps: got 1\.5, needs an integer >= 1"),
        ({"train_lr": -1}, "train_lr: got -1, needs a finite rate > 0"),
        ({"ema_decay": 2}, r"ema_decay: got 2, needs 0\.\.1"),
        ({"adam_betas": (0.9, 1)}, "adam_betas: got 1, needs 0 <= beta < 1"),
        ({"adam_betas": 0.9}, r"adam_betas: got 0\.9, needs two numbers"),
        ({"max_grad_norm": 0}, "max_grad_norm: got 0, needs a finite norm > 0"),
        ({"mixed_precision_type": "fp8"}, "mixed_precision_type: got 'fp8', needs one of fp16, bf16"),
        ({"split_batches": False}, "split_batches: got False, which is not built, needs True"),
        ({"save_best_and_latest_only": True}, "save_best_and_latest_only: got True, which is not built"),
        ({"image_size": 16}, r"image_size: got 16, but the diffusion has \(8, 8\), needs that or none"),
        ({"use_lion": True}, "use_lion: got True, an argument of former versions, needs False: Adam"),
        ({"update_ema_every": 2}, "update_ema_every: got 2 beside ema_update_every, which it is the former name of"),
        ({"num_fid_samples": 100}, "num_fid_samples: got 100, which is not built, needs 50000"),
        ({"convert_image_to": "L"}, "convert_image_to: got 'L' and 3 channels, needs None, L and 1"),
        ({"network": {"channels": 2}}, "convert_image_to: got None and 2 channels"),
    ],
)
def test_arguments_that_do_not_fit(made, options, message):
    with pytest.raises(ValueError, match=message):
        made(**options)


def test_folders_and_runs_that_do_not_fit(made, tmp_path, ddpm, folder):
    made(train_num_steps=1).train()
    for options, message in (
        ({"train_lr": 1e-3}, r"train_lr: got 0\.001, but .*run was begun with 0\.01, needs the same"),
        ({"model": {"loss_type": "l1"}}, "loss_type: got l1, but .*run was begun with l2"),
        ({"model": {"min_snr_loss_weight": True}}, "loss_weight: got"),
        ({"network": {"attn_heads": 2}}, "'model' and 'schedule', needs one run's"),
        ({"model": {"timesteps": 30}}, "timesteps: got 30|loss_weight: got"),
        ({"train_num_steps": 0}, "train_num_steps: got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            made(**options).train()
    with pytest.raises(BadInput, match=r"model-9\.safetensors: no such file"):
        made().load(9)
    torch.save({}, tmp_path / "run" / "model-9.pt")
    with pytest.raises(BadInput, match=r"model-9\.pt: is a checkpoint of denoising_diffusion_pytorch"):
        made().load(9)
    answer = ddpm("train", "--out", tmp_path / "run", "--resume")
    assert (answer.code, "was begun by a program with ddpm.Trainer" in answer.err) == (2, True)
    GaussianDiffusion(Unet(4, dim_mults=(1,)), image_size=8).save_run(tmp_path / "saved")
    with pytest.raises(BadInput, match="saved: is of no Trainer's run, needs another results_folder"):
        made("saved").train()
    with pytest.raises(BadInput, match="nowhere: no such folder"):
        Trainer(made().model, tmp_path / "nowhere")
    with pytest.raises(TypeError, match="diffusion_model: got a Unet"):
        Trainer(made().model.model, folder)
