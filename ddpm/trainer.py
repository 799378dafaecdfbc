"""Trainer: by the arguments of denoising_diffusion_pytorch's, on our training loop.

results_folder becomes a run, which commands and export take. What stops training, a kill too, costs a minute: the same
program goes on from the last checkpoint, bit for bit. Beside the run lie sample-K.png and model-K.safetensors, the
training state of milestone K, which `load` goes back to.
"""

import copy
import logging
import math
import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddpm import runs, training
from ddpm.data import Dataset
from ddpm.diffusion_loops import warn_of_own_steps
from ddpm.distributed import World, pick_device, world
from ddpm.errors import BadInput, check_choice, check_integer, check_number
from ddpm.extras import need
from ddpm.files import digest_of, read_noted, write_tensors
from ddpm.former_arguments import also, only, renamed, understands, without_effect
from ddpm.gaussian_diffusion import LOSSES, GaussianDiffusion
from ddpm.networks.protocol import broadcast, name_of
from ddpm.schedule import GIVEN, NoiseSchedule
from ddpm.sizes import short, sides_of
from ddpm.table import FLOAT32_MAX
from ddpm.training import TrainOptions, loop
from kernels import philox

logger = logging.getLogger("ddpm")

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# Arguments that are not built, and what means without them.
WITHOUT = {"split_batches": True, "inception_block_idx": 2048, "num_fid_samples": 50000}
WITHOUT |= {"save_best_and_latest_only": False}
OF_DIFFUSION = ("objective", "loss_type", "auto_normalize", "offset_noise_strength")
# Of Pillow's grey: red, green and blue in 1/65536.
LUMINANCE = (19595, 38470, 7471)


class _Loss(nn.Module):
    """The diffusion's own loss of rows of a data set, in the place of `ddpm.training.Objective`."""

    def __init__(self, diffusion: GaussianDiffusion, options: TrainOptions) -> None:
        super().__init__()
        self.diffusion, self.options = diffusion, options

    def forward(self, values: Tensor, labels: Tensor | None, rows: Tensor, samples: Tensor) -> Tensor:
        images = values[rows]
        images = images / 255 if images.dtype == torch.uint8 else (images + 1) / 2
        if self.options.flip:
            mirrored = broadcast(philox.flipped(self.options.seed, samples), images)
            images = torch.where(mirrored, images.flip(-1), images)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.options.precision == "bf16"):
            # Without auto_normalize, images are -1..1 outside the diffusion as well.
            return self.diffusion(images if self.diffusion.auto_normalize else images * 2 - 1, samples=samples)


class _Ema(training.Ema):
    """Updated at every so many steps only, the first one among them."""

    def __init__(self, network: nn.Module, decay: float, every: int) -> None:
        super().__init__(network, decay)
        self.every = every

    def update(self, network: nn.Module, k: int) -> None:
        if k % self.every == 0:
            super().update(network, k // self.every)


class _Steps(training.Trainer):
    """The eager engine on that loss: as many steps as are asked for, at one rate, gradients summed over parts."""

    def __init__(self, asked: "Trainer", options: TrainOptions, world: World) -> None:
        self.asked = asked
        super().__init__(asked.model.model, asked.ds, options, asked.device, world)
        self.ema = _Ema(self.network, options.ema_decay, asked.settings["ema_update_every"])
        self.more = {"sampling": asked.model.sampling(), "trainer": asked.settings}

    def _schedule(self) -> NoiseSchedule:
        return self.asked.model.schedule

    def _total(self) -> int:
        return self.asked.train_num_steps

    def _objective(self) -> nn.Module:
        return _Loss(self.asked.model.to(self.device), self.options)

    def _adam(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.network.parameters(), self.options.lr, self.asked.settings["adam_betas"])

    def learning_rate(self, index: int) -> float:
        return self.options.lr

    def _step(self) -> None:
        values, labels, rows, samples = self.inputs(self.index)
        loss, parts = torch.zeros((), device=self.device), self.asked.settings["gradient_accumulate_every"]
        self.optimizer.zero_grad(set_to_none=True)
        for part in zip(rows.chunk(parts), samples.chunk(parts), strict=True):
            share = self.parallel(values, labels, *part) * (len(part[0]) / len(rows))
            share.backward()
            loss += share.detach()
        self.update(self.index)
        self.losses[self.index] = self.world.mean(loss)
        self.index += 1

    def step(self) -> None:
        super().step()
        milestone, rest = divmod(self.index, self.asked.save_and_sample_every)
        if rest == 0 and self.world.is_main:
            self.asked.reach(milestone)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """A run may get more steps than it began with: there are as many losses."""
        losses = state.get("losses")
        if losses is not None and losses.ndim == 1:
            more = losses.new_full((max(0, self.total - len(losses)),), math.nan)
            state = {**state, "losses": torch.cat((losses, more))[: self.total]}
        super().load_state(state)


class Trainer:
    """Train a GaussianDiffusion on a folder of pictures: `Trainer(diffusion, "pictures").train()`.

    Args:
        diffusion_model: what is trained. folder: pictures in it and below, see `ddpm.data`; they are cropped to the
            central part of its image_size's shape and resized. augment_horizontal_flip: mirror half of them.
        train_batch_size: images at a time; gradient_accumulate_every: so often, in one step of Adam (train_lr,
            adam_betas, max_grad_norm). train_num_steps: how many steps; a later, larger number goes on.
        ema_update_every, ema_decay: of the moving average, which is what is sampled.
        save_and_sample_every: steps from a milestone to the next, which leaves num_samples as a picture and its state.
        results_folder: the run. amp: bfloat16, whatever mixed_precision_type is: it needs no scaling of the loss.
        convert_image_to: None, or what the channels say (L, RGB, RGBA).
        image_size: of former versions: that of the diffusion.
        calculate_fid: taken, and said to be left out: Inception's weights are not here. What else belongs to it, and
            split_batches, is refused unless left at its default.
    Raises ValueError naming the argument, BadInput naming the file.

    `ema.ema_model` is a GaussianDiffusion with the averaged weights, those of the last milestone, `load` or end.
    """

    @understands(
        fp16=also("amp"),
        update_ema_every=renamed("ema_update_every"),
        step_start_ema=without_effect("the average begins at once, and follows closely at first"),
        use_lion=only(False, "False: Adam"),
    )
    def __init__(
        self,
        diffusion_model: GaussianDiffusion,
        folder: str | Path,
        *,
        train_batch_size: int = 16,
        gradient_accumulate_every: int = 1,
        augment_horizontal_flip: bool = True,
        train_lr: float = 1e-4,
        train_num_steps: int = 100000,
        ema_update_every: int = 10,
        ema_decay: float = 0.995,
        adam_betas: Sequence[float] = (0.9, 0.99),
        save_and_sample_every: int = 1000,
        num_samples: int = 25,
        results_folder: str | Path = "./results",
        amp: bool = False,
        mixed_precision_type: str = "fp16",
        split_batches: bool = True,
        convert_image_to: str | None = None,
        calculate_fid: bool = True,
        inception_block_idx: int = 2048,
        max_grad_norm: float = 1.0,
        num_fid_samples: int = 50000,
        save_best_and_latest_only: bool = False,
        image_size: int | Sequence[int] | None = None,
    ) -> None:
        need("PIL", extra="train")
        if not isinstance(diffusion_model, GaussianDiffusion):
            raise TypeError(f"diffusion_model: got a {type(diffusion_model).__name__}, needs a GaussianDiffusion")
        counts = {"train_batch_size": train_batch_size, "gradient_accumulate_every": gradient_accumulate_every}
        counts |= {"train_num_steps": train_num_steps, "ema_update_every": ema_update_every}
        counts |= {"save_and_sample_every": save_and_sample_every, "num_samples": num_samples}
        for name, value in counts.items():
            check_integer(name, value)
            counts[name] = int(value)
        left = split_batches, inception_block_idx, num_fid_samples, save_best_and_latest_only
        for (name, default), value in zip(WITHOUT.items(), left, strict=True):
            if value != default:
                raise ValueError(f"{name}: got {value!r}, which is not built, needs {default!r}")
        train_lr = check_number("train_lr", train_lr, math.ulp(0), FLOAT32_MAX, "a finite rate > 0")
        ema_decay = check_number("ema_decay", ema_decay, 0, 1, "0..1")
        max_grad_norm = check_number("max_grad_norm", max_grad_norm, math.ulp(0), FLOAT32_MAX, "a finite norm > 0")
        if not isinstance(adam_betas, list | tuple) or len(adam_betas) != 2:
            raise ValueError(f"adam_betas: got {adam_betas!r}, needs two numbers")
        betas = [check_number("adam_betas", beta, 0, math.nextafter(1, 0), "0 <= beta < 1") for beta in adam_betas]
        check_choice("mixed_precision_type", mixed_precision_type, ("fp16", "bf16"))
        if amp and mixed_precision_type == "fp16":
            logger.warning("amp: computes in bfloat16, which needs no scaling of the loss, instead of fp16")
        if calculate_fid:
            logger.warning("calculate_fid: needs Inception's weights, which are not here: no FID is calculated")
        channels, sides = diffusion_model.channels, diffusion_model.image_size
        if channels not in MODES or convert_image_to not in (None, MODES[channels]):
            got = f"{convert_image_to!r} and {channels} channels"
            raise ValueError(f"convert_image_to: got {got}, needs None, L and 1, RGB and 3 or RGBA and 4")
        if image_size is not None and sides_of(image_size) != sides:
            raise ValueError(f"image_size: got {image_size}, but the diffusion has {sides}, needs that or none")
        self.model, self.ds = diffusion_model, _pictures(Path(folder), sides, channels)
        self.results_folder, self.device = Path(results_folder), pick_device("auto")
        self.batch_size, self.train_num_steps = counts["train_batch_size"], counts.pop("train_num_steps")
        self.save_and_sample_every, self.num_samples = counts.pop("save_and_sample_every"), counts.pop("num_samples")
        # What a run goes on with only if it is the same.
        self.settings = counts | {"augment_horizontal_flip": bool(augment_horizontal_flip), "train_lr": train_lr}
        self.settings |= {"ema_decay": ema_decay, "adam_betas": betas, "max_grad_norm": max_grad_norm}
        self.settings |= {"amp": bool(amp)}
        self.settings |= {name: getattr(diffusion_model, name) for name in OF_DIFFUSION}
        self.settings["loss_weight"] = digest_of({"loss_weight": diffusion_model.loss_weight})[:16]
        diffusion_model.tell_model()
        warn_of_own_steps(diffusion_model, "Trainer")
        batch = counts["train_batch_size"] * counts["gradient_accumulate_every"]
        described = {"data": str(folder), "image_size": short(sides), "alpha": channels == 4}
        described |= {"network": name_of(diffusion_model.model), "loss": LOSSES[diffusion_model.loss_type]}
        described |= {"schedule": GIVEN, "timesteps": diffusion_model.num_timesteps, "seed": diffusion_model.seed}
        described |= {"prediction": diffusion_model.prediction, "batch_size": batch, "lr": train_lr}
        described |= {"epochs": math.ceil(self.train_num_steps * batch / len(self.ds)), "clip_grad": max_grad_norm}
        described |= {"ema_decay": ema_decay, "flip": bool(augment_horizontal_flip), "context_dropout": 0.0}
        self.options = TrainOptions(**described, precision="bf16" if amp else "fp32")
        self.ema = SimpleNamespace(ema_model=copy.deepcopy(diffusion_model).eval().to(self.device))
        self._steps: _Steps | None = None
        self._went_back = False

    @property
    def step(self) -> int:
        """Steps done."""
        return 0 if self._steps is None else self._steps.index

    def _checked(self, where: Path, begun: object) -> None:
        """Raise BadInput unless what was begun there had these settings."""
        if not isinstance(begun, dict):
            raise BadInput(f"{where}: is of no Trainer's run, needs another results_folder")
        for name, value in self.settings.items():
            if begun.get(name) != value:
                other = f"{where} was begun with {begun.get(name)}, needs the same or another results_folder"
                raise BadInput(f"{name}: got {value}, but {other}")

    def _average(self) -> None:
        """Let ema_model have the averaged weights."""
        self.ema.ema_model.model.load_state_dict(self._steps.ema.tensors)

    def train(self) -> None:
        """Train to train_num_steps, from the checkpoint in results_folder if there is one.

        Raises BadInput for a folder of another run, WorkFailed if the loss is not finite; a signal saves, and ends the
        program as signals do.
        """
        folder = self.results_folder
        with world(self.device) as ranks:
            if self.options.batch_size % ranks.size:
                raise BadInput(f"train_batch_size: got {self.batch_size}, needs a multiple of the {ranks.size} ranks")
            if self._went_back and ranks.is_main:
                with runs.held(folder):
                    config = loop.make_config(self._steps)
                    runs.start_run(folder, config)
                    self._steps.run_id = config["run_id"]
                    loop.save_checkpoint(folder, self._steps)
            self._went_back = ranks.any(False, self.device)  # they wait for each other
            options = self.options
            if (folder / runs.CONFIG).exists():
                self._checked(folder, runs.read_config(folder).get("trainer"))
                options = replace(options, epochs=loop.resumed_options(folder, {}).epochs)

            def make(*given: Any) -> _Steps:
                self._steps = _Steps(self, options, given[-1])
                return self._steps

            how = {"device": self.device, "world": ranks, "dataset": self.ds, "network": self.model.model}
            try:
                training.train(options, folder, resume=True, make=make, **how)
            except training.Interrupted as stopped:
                logger.warning("%s, saved in %s: the same program goes on from there", stopped, folder)
                if stopped.exit_code == 128 + signal.SIGINT:
                    raise KeyboardInterrupt from None
                raise SystemExit(stopped.exit_code) from None
        self._average()

    def reach(self, milestone: int) -> None:
        """What is left at a milestone: sample-K.png and model-K.safetensors."""
        from ddpm import pictures  # needs Pillow

        self._average()
        average = self.ema.ema_model
        images = average.normalize(average.sample(self.num_samples))
        pictures.save_png(self.results_folder / f"sample-{milestone}.png", pictures.render(images))
        self.save(milestone)

    def save(self, milestone: int | str) -> None:
        """Write the training state as model-{milestone}.safetensors into results_folder."""
        steps = self._steps or _Steps(self, self.options, World())
        if steps.world.is_main:
            runs.make_folder(self.results_folder)
            write_tensors(self._file(milestone), steps.state(), step=steps.index, trainer=self.settings)

    def load(self, milestone: int | str) -> None:
        """Go back to what `save` wrote: `train` goes on from there, and so does the run. Raises BadInput."""
        path = self._file(milestone)
        if not path.exists() and path.with_suffix(".pt").exists():
            needs = f"{path.name}, or a run made of it by `ddpm import`"
            raise BadInput(f"{path.with_suffix('.pt')}: is a checkpoint of denoising_diffusion_pytorch, needs {needs}")
        state, metadata = read_noted(path)
        self._checked(path, metadata.get("trainer"))
        steps = _Steps(self, self.options, World())
        try:
            steps.load_state(state)
        except BadInput as error:
            raise BadInput(f"{path}: {error}") from error
        self._steps, self._went_back = steps, True
        self._average()

    def _file(self, milestone: int | str) -> Path:
        return self.results_folder / f"model-{milestone}.safetensors"


def _pictures(folder: Path, sides: tuple[int, int], channels: int) -> Dataset:
    """All pictures in a folder and below, with so many channels. Raises BadInput."""
    from ddpm import image_files  # needs Pillow

    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder, needs one with pictures")
    values, _, _, note = image_files.image_folder(folder, sides, None, alpha=channels == 4, classes=False)
    if values.shape[1] < channels:
        values = np.repeat(values, channels, axis=1)
    elif values.shape[1] > channels:
        values = _grey(values)
    logger.log(logging.WARNING if note else logging.INFO, f"{folder}: {len(values)} pictures{note}")
    return Dataset(folder.stem, torch.from_numpy(values), None, ())


def _grey(values: np.ndarray) -> np.ndarray:
    """[N, 3, H, W] -> [N, 1, H, W] as Pillow does it, of bytes to the last bit."""
    weights = np.array(LUMINANCE).reshape(3, 1, 1)
    if values.dtype == np.uint8:
        return ((values * weights).sum(1, keepdims=True) + (1 << 15) >> 16).astype(np.uint8)
    return (values * (weights / (1 << 16))).sum(1, keepdims=True).astype(np.float32)
