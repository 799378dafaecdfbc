"""`ddpm import` of denoising_diffusion_pytorch: what a checkpoint tells of network, schedule and objective."""

import re
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm import runs
from ddpm.commands.weight_files import places_of, say_left_out, shape_of, take_network
from ddpm.diffusion_loops import sampling_options
from ddpm.errors import BadInput, check_choice, check_integer
from ddpm.gaussian_diffusion import PREDICTIONS as OBJECTIVES
from ddpm.networks import Unet
from ddpm.networks.protocol import fit_state_dict
from ddpm.networks.unet_versions import GROUPS, STRUCTURES, release_of
from ddpm.schedule import NoiseSchedule
from ddpm.sizes import asked_sides
from ddpm.table import PREDICTIONS
from ddpm.training.objective import min_snr_weights

LIBRARY = "denoising_diffusion_pytorch"
FAMILY = "mid_block1.block1.proj.weight"  # every network of that library but KarrasUnet has it, and so tells its place
LEVELS_MAX = 16
DIM_HEAD = 32  # of attention, unless said
# Arguments that weights do not tell, and what --unet makes of their text.
UNTOLD = {"version": str, "resnet_block_groups": int, "attn_dim_head": int, "sinusoidal_pos_emb_theta": float}
# Where its network is in a GaussianDiffusion, of old too, also one that was compiled or made parallel.
WRAPPED = re.compile(r"(?<![^.])(?:model|denoise_fn)\.(?:(?:_orig_mod|module)\.)*$")
# Of the loss weight from that of an objective: 1 - alpha_bar of the first steps, in float32, is off by 1e-3.
WEIGHT_TOLERANCE = 1e-2
# Whose weights have such an entry: said when they are brought to us.
OTHERS = {
    "to_time_emb.0.weights": f"KarrasUnet of {LIBRARY}",
    "vit.layers.0.0.q_scale": f"UViT (SimpleDiffusion) of {LIBRARY}",
    "mid_block1.block1.block.0.weight": f"the network of {LIBRARY} before 0.16",
    "mid_block1.ds_conv.weight": f"a network of {LIBRARY} 0.7 to 0.12 (ConvNeXt)",
    "time_embedding.linear_1.weight": "a network of diffusers",
    "input_blocks.0.0.weight": "guided-diffusion's or Stable Diffusion's U-Net",
    "temb.dense.0.weight": "the U-Net of Ho et al. or of ermongroup/ddim",
    "all_modules.0.weight": "score_sde's network",
    "map_layer0.weight": "EDM's network",
    "x_embedder.proj.weight": "a diffusion transformer (DiT)",
    "to_time_hiddens.0.weights": "imagen-pytorch's U-Net",
}


def other_library(entries: Mapping[str, Tensor]) -> str | None:
    """Whose weights these look like, and by which entry."""
    return next((f"{whose} ({entry})" for entry, whose in OTHERS.items() if places_of(entry, entries)), None)


def variant_of(state: Mapping[str, Tensor], place: str, has_schedule: bool) -> str | None:
    """What a network of this family is, if it is not the one that Unet and GaussianDiffusion are about."""
    rank = state[FAMILY].ndim
    if rank != 4:
        return {3: "a one-dimensional variant (Unet1D)", 5: "a variant for video"}.get(rank, "no network of images")
    if f".{place}".endswith(".net."):
        return "ElucidatedDiffusion (Karras et al.)"
    if "null_classes_emb" in state:
        return "the variant with classes (classifier_free_guidance)"
    if "time_mlp.0.weights" in state:
        timed = "learned_sinusoidal_cond or random_fourier_features" if has_schedule else "a continuous-time variant"
        return f"{timed} (time_mlp.0.weights)"
    last = state.get("ups.0.3.weight")
    if "ups.0.3.1.weight" not in state and (last is None or last.shape[-1] != 3):
        return "the network of 0.16 to 0.21, before its second skips"
    return None


def stated(options: Sequence[str]) -> dict[str, Any]:
    """What --unet says: NAME=VALUE of UNTOLD. Raises BadInput."""
    found: dict[str, Any] = {}
    for option in options:
        name, _, text = option.partition("=")
        check_choice("--unet", name, UNTOLD)
        try:
            found[name] = UNTOLD[name](text)
        except ValueError:
            raise BadInput(f"--unet: got {option}, needs {name}=NUMBER") from None
    return found


def release_told(state: Mapping[str, Tensor], buffers: Mapping[str, Tensor], version: str | None) -> str:
    """The release (of STRUCTURES) whose network has these entries. Raises ValueError if that is none or unclear."""
    halves = [state[name].shape[-1] for name in ("downs.0.3.weight", "downs.0.3.1.weight") if name in state]
    has = {"groups": "downs.0.0.block1.norm.weight" in state, "nested": "downs.0.2.fn.fn.to_qkv.weight" in state}
    has |= {"memory": "downs.0.2.mem_kv" in state, "bias": "downs.0.2.fn.norm.b" in state}
    if "downs.1.3.weight" in state or "downs.1.3.1.weight" in state:  # of a single level nothing is halved
        has["strided"] = halves == [4]
    fits = [name for name, form in STRUCTURES.items() if all(getattr(form, key) == is_so for key, is_so in has.items())]
    if "loss_weight" in buffers or "p2_loss_weight" in buffers:  # the latter until 1.5
        fits = [name for name in fits if "loss_weight" in buffers or name <= "1.5"]
    if version is not None:
        release = release_of("0.32.0" if version.startswith("0.1.") else version)  # as 0.32.1 to 0.32.9 were numbered
        if release not in fits:
            raise ValueError(f"is not of release {version}, whose network has other entries")
        return release
    if len(fits) != 1:
        which = f"could be of {' or '.join(reversed(fits))} and after: needs --unet version=" if fits else "is of none"
        raise ValueError(f"does not tell its release, {which}")
    return fits[0]


def arguments_of(state: Mapping[str, Tensor], release: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the Unet of a release that has these weights, with `given`. Raises ValueError if there is none."""
    form, dim_head = STRUCTURES[release], given.get("attn_dim_head", DIM_HEAD)
    check_integer("attn_dim_head", dim_head)

    def shape(name: str, rank: int) -> tuple[int, ...]:
        found = shape_of(state, name, rank)
        if 0 in found:
            raise ValueError(f"{name} is {list(found)}")
        return found

    levels = next(level for level in count() if f"downs.{level}.0.block1.proj.weight" not in state)
    if not 1 <= levels <= LEVELS_MAX:
        raise ValueError(f"{levels} levels, 1 to {LEVELS_MAX} can be")
    dim = shape("time_mlp.1.weight", 2)[1]
    (init_dim, taken), channels = shape("init_conv.weight", 4)[:2], shape("final_conv.weight", 4)[0]
    variants = {
        2 * taken: "LearnedGaussianDiffusion (learned variance)",
        2 * taken + 2: "WeightedObjectiveGaussianDiffusion",
    }
    if channels in variants:
        raise ValueError(f"looks like {variants[channels]}: {channels} channels out of {taken}, needs as many")
    found = {"dim": dim, "init_dim": init_dim, "channels": channels, "self_condition": taken == 2 * channels}
    if form.groups or "resnet_block_groups" in given:
        found |= {"version": release, "resnet_block_groups": given.get("resnet_block_groups", GROUPS)}
    if "sinusoidal_pos_emb_theta" in given:
        found["sinusoidal_pos_emb_theta"] = given["sinusoidal_pos_emb_theta"]
    found |= {"dim_mults": [], "full_attn": [], "attn_heads": [], "attn_dim_head": []}
    for level in range(levels):
        plain = level == levels - 1 or form.strided
        width = shape(f"downs.{level}.3.weight" if plain else f"downs.{level}.3.1.weight", 4)[0]
        if width % dim:
            raise ValueError(f"level {level + 1} is {width} wide, no multiple of dim, {dim}")
        attention = f"downs.{level}.2.fn.fn" if form.nested else f"downs.{level}.2"
        whole = f"{attention}.to_out.weight" in state
        if form.memory:
            _, heads, *memory = shape(f"{attention}.mem_kv", 4)
            dim_head = memory[1 if whole else 0]
            if given.get("attn_dim_head", dim_head) != dim_head:
                told = f"the memory of level {level + 1} has {dim_head}"
                raise ValueError(f"attn_dim_head: got {given['attn_dim_head']}, but {told}")
        else:
            heads = shape(f"{attention}.to_qkv.weight", 4)[0] // (3 * dim_head)
        of_level = (width // dim, whole, heads, dim_head)
        for name, value in zip(("dim_mults", "full_attn", "attn_heads", "attn_dim_head"), of_level, strict=True):
            found[name].append(value)
    return found


def objective_of(weight: Tensor, alpha_bars: Tensor) -> str | None:
    """eps, v or x0: whose loss weight [T] this is, clipped anywhere or not; None: of none, or of several."""
    weight, snr = weight.double(), alpha_bars[1:] / (1 - alpha_bars[1:])
    of_one = {"eps": snr, "v": snr + 1, "x0": torch.ones_like(snr)}  # weight * that = min(SNR, gamma)
    fits = []
    for name, divisor in of_one.items():
        expected = min_snr_weights(alpha_bars, name, float((weight * divisor).max()))[1:]
        if torch.allclose(weight, expected, rtol=WEIGHT_TOLERANCE, atol=0):
            fits.append(name)
    return fits[0] if len(fits) == 1 else None


def image_sides(text: str | None, path: Path) -> list[int]:
    """[height, width] of --image-size. Raises BadInput."""
    if text is None:
        raise BadInput(f"--image-size: {path} does not tell the size of its images, needs a side in pixels")
    return list(asked_sides(text))


def _prediction(path: Path, buffers: Mapping[str, Tensor], alpha_bars: Tensor, asked: str | None) -> tuple[str, str]:
    """(eps, v or x0, how that is known). Raises BadInput if nobody says it, or the file says another."""
    weight = buffers.get("loss_weight")
    told = None if weight is None or weight.shape != alpha_bars[1:].shape else objective_of(weight, alpha_bars)
    if told is None and asked is None:
        why = "has none, as former versions'" if weight is None else "is that of no single objective"
        needs = f"{', '.join(PREDICTIONS[:-1])} or {PREDICTIONS[-1]}"
        raise BadInput(f"--prediction: loss_weight, which tells it, {why} in {path}: needs {needs}")
    if told is not None and asked not in (None, told):
        raise BadInput(f"--prediction: got {asked}, but {path} has the loss_weight of {told}")
    return (told, "as its loss_weight says") if told is not None else (asked, "as you say")


def import_unet(
    path: Path,
    entries: dict[str, Tensor],
    out: Path,
    *,
    online: bool,
    prediction: str | None,
    image_size: str | None,
    sampling_timesteps: int | None,
    unet: Sequence[str] | None,
    version: str | None,
    overwrite: bool,
) -> None:
    """Make a run of the network of this family in a file, whose version it may state. Raises BadInput."""
    place, state = take_network(path, entries, places_of(FAMILY, entries), online)
    above = WRAPPED.sub("", place)
    buffers = {name.removeprefix(above): value for name, value in entries.items() if name.startswith(above)}
    variant = variant_of(state, place, "alphas_cumprod" in buffers)
    if variant is not None:
        raise BadInput(f"{path}: looks like {variant}, needs Unet and GaussianDiffusion of {LIBRARY}")
    if "alphas_cumprod" not in buffers:
        needs = f"a checkpoint of {LIBRARY}'s Trainer, or GaussianDiffusion's state dict"
        raise BadInput(f"{path}: holds a Unet alone, without the noise schedule (alphas_cumprod), needs {needs}")
    sides, asked, given = image_sides(image_size, path), OBJECTIVES.get(prediction, prediction), stated(unet or ())
    if asked is not None:
        check_choice("--prediction", asked, PREDICTIONS)
    try:
        release = release_told(state, buffers, given.get("version", version))
        found, schedule = arguments_of(state, release, given), NoiseSchedule.from_alpha_bars(buffers["alphas_cumprod"])
        predicts, known = _prediction(path, buffers, schedule.alpha_bars, asked)
        with torch.device("meta"):  # what the file claims costs no memory; it takes over the tensors themselves
            network = Unet(**found, image_size=sides)
        for name in sorted(state.keys() - network.state_dict().keys()):
            raise ValueError(f"{name!r} is no entry of a Unet")
        fit_state_dict(network, state)
        sampling = sampling_options(sampling_timesteps)
        which = "online" if online else "ema" if "ema" in place else "imported"
        config = runs.make_config(network, schedule, predicts, weights=which, sampling=sampling)
    except BadInput:
        raise
    except (ValueError, RuntimeError, OverflowError) as error:  # sizes beyond what PyTorch counts
        options = {"image_size": "--image-size", "steps": "--sampling-timesteps"}
        options |= {name: f"--unet {name}" for name in UNTOLD}
        option = options.get(str(error).partition(":")[0])
        raise BadInput(f"{option}:{str(error).partition(':')[2]}" if option else f"{path}: {error}") from error
    say_left_out(path, place, {name: value for name, value in entries.items() if not name.startswith(above)})
    with runs.held(out):
        runs.free_folder(out, overwrite)
        runs.start_run(out, config, network)
    print(f"imported: {out} ({', '.join(f'{name} {value}' for name, value in found.items())})")
    if not STRUCTURES[release].memory and "attn_dim_head" not in given:
        print(f"attn_dim_head {DIM_HEAD} as by default: the weights do not tell (--unet attn_dim_head=...)")
    if STRUCTURES[release].groups and "resnet_block_groups" not in given:
        print(f"resnet_block_groups {GROUPS} as by default: the weights do not tell (--unet resnet_block_groups=...)")
    print(
        f"predicts {predicts}, {known}; {schedule.timesteps} timesteps; weights: {place.rstrip('.') or 'the only ones'}"
    )
    print(f"sample it with: ddpm sample {out} --n 64 --out grid.png")
