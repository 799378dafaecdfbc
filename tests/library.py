"""denoising_diffusion_pytorch itself, beside which ours is tested; and a checkpoint of its Trainer, kept in tests.

`python -m tests.library` writes the checkpoint and what the library draws from it into tests/ddpm/library/, where
tests find both without the library. docs/contributing.md says how it is installed. `python -m tests.library FOLDER`
writes what former releases draw, from FOLDER/0.27.12 and others (pip install --no-deps --target FOLDER/0.27.12 ...).
"""

import hashlib
import inspect
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
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
FORMER = FOLDER / "former.npz"
# At least the first and the last release with each network.
RELEASES = (
    "0.22.0",
    "0.25.3",
    "0.26.1",
    "0.26.4",
    "0.26.5",
    "0.27.0",
    "0.27.3",
    "0.27.12",
    "0.28.0",
    "0.31.1",
    "0.32.0",
)
RELEASES += ("1.0.7", "1.6.4", "1.7.1", "1.7.3", "1.7.7", "1.8.0", "1.8.15", "1.9.0", "1.11.1", "2.0.0")
FORMER_NETWORK = {"dim": 8, "dim_mults": (1, 2), "channels": 1}
FORMER_DIFFUSION = {"image_size": 8, "timesteps": 6, "objective": "pred_x0", "beta_schedule": "cosine"}


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


def filled(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of order 1 for these names and shapes, always the same."""
    rng, found = np.random.default_rng(0), {}
    for name in sorted(state):
        shape = tuple(state[name].shape)
        values = rng.standard_normal(shape) / np.sqrt(max(4.0, np.prod(shape[1:])))
        is_gain = name.endswith((".g", "norm.weight"))
        found[name] = torch.from_numpy(1 + values if is_gain else values).float()
    return found


def names_of(state: Mapping[str, Tensor]) -> str:
    """What the names and shapes of a state dict are, in short."""
    return hashlib.sha256(repr(sorted((name, tuple(each.shape)) for name, each in state.items())).encode()).hexdigest()


def former_options(release: str) -> dict[str, Any]:
    """Arguments of Unet that this release needs beside FORMER_NETWORK: its own default was for four levels."""
    return {"full_attn": (False, True)} if release in ("1.8.0", "1.8.15", "1.9.0") else {}


def former(folder: Path) -> None:
    """Write FORMER: what the releases in a folder draw, and the names of their networks' entries."""
    found = {}
    for release in RELEASES:
        for name in [name for name in sys.modules if name.partition(".")[0] == NAME]:
            del sys.modules[name]
        with patch.object(sys, "path", [str(folder / release), *sys.path]):
            library = load()
        assert Path(library.__file__).is_relative_to(folder / release), library.__file__
        network = library.Unet(**FORMER_NETWORK, **former_options(release))
        network.load_state_dict(filled(network.state_dict()))
        more = {"channels": 1} if "channels" in inspect.signature(library.GaussianDiffusion).parameters else {}
        theirs = library.GaussianDiffusion(network, **FORMER_DIFFUSION, **more).eval()
        with our_noise(range(FORMER_DIFFUSION["timesteps"], 0, -1), N):
            images = theirs.sample(N).numpy()
        found |= {f"{release} images": images, f"{release} names": names_of(network.state_dict())}
        print(release, images.std(), found[f"{release} names"][:8])
    np.savez_compressed(FORMER, **found)


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
    former(Path(sys.argv[1])) if len(sys.argv) > 1 else main()
