"""denoising_diffusion_pytorch itself, beside which ours is tested; and a checkpoint of its Trainer, kept in tests.

`python -m tests.library` writes the checkpoint and what the library draws from it into tests/ddpm/library/, where
tests find both without the library. docs/contributing.md says how it is installed.
"""

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from bench.library import NAME, load
from ddpm import GaussianDiffusion, Unet
from kernels import philox

FOLDER = Path(__file__).parent / "ddpm" / "library"
CHECKPOINT, PICTURES = FOLDER / "model-1.pt", FOLDER / "pictures.npz"
SEED, N = 5, 2
NETWORK = {"dim": 4, "dim_mults": (1, 2), "channels": 1, "attn_dim_head": 4, "attn_heads": 2, "self_condition": True}
DIFFUSION = {"image_size": 8, "timesteps": 20, "objective": "pred_v", "beta_schedule": "cosine"}
DIFFUSION |= {"min_snr_loss_weight": True}
DDIM_STEPS = 7


@contextmanager
def our_noise(steps: Iterable[int], n: int, seed: int = SEED) -> Iterator[None]:
    """In the block the library draws the contract's noise: x_T, then that of these steps."""
    calls = iter([(0, 0), *((step, 1) for step in steps)])

    def normals(like: Any, **_: object) -> Tensor:
        (step, stream), shape = next(calls), tuple(like.shape if isinstance(like, Tensor) else like)
        return philox.normal(seed, torch.arange(n), step, stream, shape[1:])

    inside = f"{NAME}.{NAME}.tqdm"
    with patch(inside, lambda steps, **_: steps), patch("torch.randn", normals), patch("torch.randn_like", normals):
        yield


def train(folder: Path, **options: Any) -> dict[str, Any]:
    """What its Trainer saves, after two steps on 100 pictures: the file is folder/model-1.pt."""
    from PIL import Image

    library = load()
    torch.manual_seed(0)
    diffusion = library.GaussianDiffusion(library.Unet(**NETWORK), **(DIFFUSION | options))
    for k, picture in enumerate(np.random.default_rng(0).integers(0, 256, (100, 8, 8), dtype=np.uint8)):
        Image.fromarray(picture).save(folder / f"{k}.png")
    how = {"train_num_steps": 2, "save_and_sample_every": 2, "num_samples": 1, "calculate_fid": False}
    # The average is updated once, so it is not what training ended with.
    how |= {"train_lr": 1e-2, "ema_update_every": 2, "results_folder": str(folder)}
    library.Trainer(diffusion, str(folder), **how).train()
    return torch.load(folder / "model-1.pt", weights_only=True)


def draw(held: dict[str, Any], weights: str, steps: int | None, **options: Any) -> np.ndarray:
    """What the library draws by the weights of a checkpoint, ema or online, with the contract's noise."""
    library, prefix = load(), "ema_model."
    average = {key.removeprefix(prefix): value for key, value in held["ema"].items() if key.startswith(prefix)}
    made = DIFFUSION | options | {"sampling_timesteps": steps}
    theirs = library.GaussianDiffusion(library.Unet(**NETWORK), **made).eval()
    theirs.load_state_dict(average if weights == "ema" else held["model"])
    ours = GaussianDiffusion(Unet(**NETWORK), **made)
    with our_noise(ours.table().noise_steps.tolist(), N):
        return theirs.sample(N).numpy()


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        held = train(Path(name))
        CHECKPOINT.write_bytes((Path(name) / CHECKPOINT.name).read_bytes())
    kinds = product(("ema", "online"), (None, DDIM_STEPS))
    drawn = {f"{weights}_{steps}": draw(held, weights, steps) for weights, steps in kinds}
    np.savez(PICTURES, **drawn)
    print(f"{CHECKPOINT}: {CHECKPOINT.stat().st_size} bytes; {', '.join(drawn)}")


if __name__ == "__main__":
    main()
