"""The noise contract: every random number is a pure function of what it is for.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011):

    key     = (seed & 0xffffffff, seed >> 32)
    counter = (e // 4, step, sample & 0xffffffff, stream | (sample >> 32) << 8)        word e % 4

with e the flat index inside one sample in logical C, H, W order and `sample` the global index of the
sample, so a number depends neither on the batch, the device, nor on what was drawn before it. Words
(r0, r1) and (r2, r3) become normals by Box-Muller (1958):

    u1 = r0 * 2^-32 + 2^-33      u2 = r1 * 2^-32          in float32, round to nearest
    z0 = sqrt(-2 ln u1) cos(2 pi u2)      z1 = sqrt(-2 ln u1) sin(2 pi u2)
"""

import math
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from kernels import backend, native
from kernels.backend import jit, libdevice, tl

SOURCE = native.source_of("philox")
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
MASK = 0xFFFFFFFF

# Per normal: two uniforms, logarithm, root, sine or cosine, product, counted as one operation each; Philox is integer.
NORMAL_FLOPS = 6

SEED_LIMIT = 1 << 63
STEP_LIMIT = 1 << 32
STREAM_LIMIT = 1 << 8
SAMPLE_LIMIT = 1 << 56


class Stream(IntEnum):
    """What a number is for; part of its counter, so that no two uses share numbers."""

    INITIAL = 0
    SAMPLING = 1
    TRAINING_NOISE = 2
    TIMESTEP = 3
    CONDITION_DROPOUT = 4
    ORDER = 5
    AUGMENTATION = 6
    LATENT = 7
    SELF_CONDITION = 8
    OFFSET = 9


def is_integer(value: object) -> bool:
    """An integer proper: no bool, no float that happens to be whole."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_integer(name: str, value: int | Tensor, limit: int, n: int = 1) -> None:
    """Raise unless it is an integer in [0, limit), or an int64 tensor of 1 or n elements (not read)."""
    if isinstance(value, Tensor):
        if value.dtype != torch.int64 or value.numel() not in (1, n):
            raise TypeError(f"{name}: got a {value.dtype} tensor of {value.numel()} elements, needs one int64 or {n}")
    elif not is_integer(value):
        raise TypeError(f"{name}: got {value!r}, needs an integer")
    elif not 0 <= int(value) < limit:  # int: Dynamo of torch 2.11 compares no member of an enumeration
        raise ValueError(f"{name}: got {value}, needs 0..{limit - 1}")


def check_seed(seed: int | Tensor) -> None:
    """Raise unless `seed` is an integer in [0, 2^63), or a one-element int64 tensor."""
    check_integer("seed", seed, SEED_LIMIT)


def seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    """The seed as operators take it: an int64 scalar on the device. Raises as `check_seed` and `backend.scalar` do."""
    check_seed(seed)
    return backend.scalar("seed", seed, torch.int64, device)


def check_samples(samples: Tensor, n: int | None = None, of: str = "") -> None:
    """Raise unless `samples` is an integer tensor [n] of indices in [0, 2^56), one per row `of` an argument.

    Their values are read where `backend.reads_values` is true.
    """
    backend.check_tensors(samples=samples)
    if samples.ndim != 1 or samples.is_floating_point() or samples.dtype == torch.bool:
        raise TypeError(f"samples: got {samples.dtype} {list(samples.shape)}, needs an int64 tensor [n]")
    if not torch.compiler.is_compiling():
        backend.check_range("samples", samples, 0, SAMPLE_LIMIT - 1)
    if n is not None and samples.shape != (n,):
        raise ValueError(f"samples: got {list(samples.shape)}, needs [{n}], one index per row of {of}")


def words(seed: int, sample: int, step: int, stream: int, numel: int) -> np.ndarray:
    """The first `numel` words of one sample: uint32 array [numel].

    Raises ValueError for a seed, sample, step or stream outside its range.
    """
    check_integer("sample", sample, SAMPLE_LIMIT)
    check_integer("numel", numel, SAMPLE_LIMIT)
    samples = torch.tensor([int(sample)], device="cpu")
    return word_tensor(seed, samples, step, stream, numel)[0].numpy().astype(np.uint32)


def word_tensor(seed: int | Tensor, samples: Tensor, step: int | Tensor, stream: int, numel: int) -> Tensor:
    """The words of many samples: int64 tensor [n, numel] of values in [0, 2^32).

    samples: int64 [n] on the device that shall compute. seed and step may be one-element int64 tensors, step also one
    of n, for each sample its own.
    """
    counters = _counters(seed, samples, step, stream)
    return operator(*counters, numel, False) if _runs_native(samples) else _words(*counters, numel)


def _counters(seed: int | Tensor, samples: Tensor, step: int | Tensor, stream: int) -> tuple[Tensor, ...]:
    """(seed [1], samples [n], step [1 or n], stream), checked, the tensors int64 on the device of the samples."""
    check_seed(seed)
    check_samples(samples)
    check_integer("step", step, STEP_LIMIT, samples.shape[0])
    check_integer("stream", stream, STREAM_LIMIT)

    def vector(value: int | Tensor) -> Tensor:
        return torch.as_tensor(value, dtype=torch.int64, device=samples.device).reshape(-1)

    return vector(seed), samples.to(torch.int64), vector(step), stream


def _runs_native(samples: Tensor) -> bool:
    """Under torch.compile the reference is inline, where Inductor fuses it with what follows."""
    return samples.device.type == "cpu" and not torch.compiler.is_compiling() and native.missing(SOURCE) is None


def _words(seed: Tensor, samples: Tensor, step: Tensor, stream: int, numel: int) -> Tensor:
    device, n, blocks = samples.device, samples.shape[0], (numel + 3) // 4
    seed, block = seed[:, None], torch.arange(blocks, device=device)[None, :].expand(n, blocks)
    counter = [block, step[:, None], samples[:, None] & MASK, (samples[:, None] >> 32) << 8 | stream]
    key = [seed & MASK, seed >> 32]
    for _ in range(ROUNDS):
        # int64 products wrap, which leaves the low 64 bits right: the mask after the arithmetic shift
        # therefore yields the same high word as unsigned arithmetic.
        product0, product1 = counter[0] * MULTIPLIERS[0], counter[2] * MULTIPLIERS[1]
        high0, high1 = product0 >> 32 & MASK, product1 >> 32 & MASK
        counter = [high1 ^ counter[1] ^ key[0], product1 & MASK, high0 ^ counter[3] ^ key[1], product0 & MASK]
        key = [word + weyl & MASK for word, weyl in zip(key, WEYL, strict=True)]
    stacked = torch.stack([word.expand(n, blocks) for word in counter], dim=-1)
    return stacked.reshape(n, 4 * blocks)[:, :numel]


def box_muller(words: Tensor) -> Tensor:
    """Normals from words: int64 [..., 2k] -> float64 [..., 2k], uniforms in float32 as the contract says."""
    pairs = words.unflatten(-1, (-1, 2)).to(torch.float32)
    u1 = (pairs[..., 0] * 2.0**-32 + 2.0**-33).to(torch.float64)
    u2 = (pairs[..., 1] * 2.0**-32).to(torch.float64)
    radius, angle = torch.sqrt(-2.0 * torch.log(u1)), 2.0 * math.pi * u2
    return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1).flatten(-2)


def _draw(seed: Tensor, samples: Tensor, step: Tensor, stream: int, numel: int, normal: bool) -> Tensor:
    """The kernel in native/philox.cpp."""
    samples, step = samples.contiguous(), step.contiguous()
    out = _empty(seed, samples, step, stream, numel, normal)
    n, strides = len(samples), int(len(step) > 1)
    call = backend.fields(seed, samples, step, strides, stream, out, normal, n, numel)
    backend.launch_native(SOURCE, call, out.numel())
    return out


def _empty(seed: Tensor, samples: Tensor, step: Tensor, stream: int, numel: int, normal: bool) -> Tensor:
    return samples.new_empty((samples.shape[0], numel), dtype=torch.float32 if normal else torch.int64)


# What `word_tensor` and `normal` call where the kernel runs: float32 normals, or words, [n, numel].
operator = backend.register("philox", _draw, _draw, _empty, backward=None)


def normal(
    seed: int | Tensor,
    samples: Tensor,
    step: int | Tensor,
    stream: int,
    shape: Sequence[int],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normals for the samples of these global indices.

    Args:
        seed: 0 <= seed < 2^63, or a one-element int64 tensor.
        samples: int64 [n], global sample indices, 0 <= index < 2^56.
        step: 0 <= step < 2^32 (the timestep t in stream 1, else 0), or an int64 tensor of one element or of n.
        stream: what the noise is for, see `Stream`.
        shape: shape of one sample, logical C, H, W order.

    float64 is computed in float64; other types are rounded float32, on a CPU with a C++ compiler by the kernel.

    Returns: tensor [n, *shape] on `device`. Raises ValueError or TypeError for arguments out of range.
    """
    if not isinstance(shape, Sequence) or not all(is_integer(size) and size >= 0 for size in shape):
        raise TypeError(f"shape: got {shape!r}, needs the sizes of one sample")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: got {dtype!r}, needs a type of torch")
    numel = math.prod(shape)
    try:
        samples = torch.as_tensor(samples, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"samples: got {samples!r:.80}, needs an int64 tensor [n] ({error})") from error
    if _runs_native(samples) and dtype != torch.float64:
        values = operator(*_counters(seed, samples, step, stream), numel, True)
    else:
        values = box_muller(word_tensor(seed, samples, step, stream, numel + numel % 2))[:, :numel]
    return values.reshape(samples.shape[0], *shape).to(dtype)


def normal_like(x: Tensor, seed: int | Tensor, samples: Tensor, stream: int, dtype: torch.dtype) -> Tensor:
    """Those of step 0 in the shape [n, ...] and on the device of x."""
    return normal(seed, samples, 0, stream, tuple(x.shape[1:]), device=x.device, dtype=dtype)


def first_word(seed: int | Tensor, samples: Tensor, stream: int) -> Tensor:
    """Word 0 of every sample at step 0: int64 [n]. The integer draws below are made of it."""
    return word_tensor(seed, samples, 0, stream, 1)[:, 0]


def training_timesteps(seed: int | Tensor, samples: Tensor, timesteps: int) -> Tensor:
    """t uniform over 1..T for training samples [n]: int64 [n], t = 1 + (r0 * T >> 32), stream 3."""
    return 1 + (first_word(seed, samples, Stream.TIMESTEP) * timesteps >> 32)


def condition_dropped(seed: int | Tensor, samples: Tensor, probability: float) -> Tensor:
    """Which training samples [n] lose their condition: bool [n], r0 < floor(p * 2^32), stream 4."""
    return first_word(seed, samples, Stream.CONDITION_DROPOUT) < math.floor(probability * 2**32)


def flipped(seed: int | Tensor, samples: Tensor) -> Tensor:
    """Which training samples [n] are mirrored: bool [n], the top bit of r0, stream 6."""
    return first_word(seed, samples, Stream.AUGMENTATION) >> 31 == 1


def epoch_order(seed: int | Tensor, epoch: int, items: int, device: str | torch.device = "cpu") -> Tensor:
    """The order of epoch k over N items: int64 [N], the stable argsort of r0 at sample = k*N + j, stream 5."""
    samples = torch.arange(epoch * items, (epoch + 1) * items, device=device)
    return torch.argsort(first_word(seed, samples, Stream.ORDER), stable=True)


# --- The same in Triton ----------------------------------------------------------------------------------------------

TWO_PI = tl.constexpr(2 * math.pi)
# The hardware's sine and cosine are off by at most 2^-20.5 over [0, 2 pi] (PTX ISA, sin.approx), times a radius of at
# most 6.7: 4.6e-6, inside the contract. The interpreter has only the accurate ones. The logarithm stays accurate:
# lg2.approx is off by 2^-22 next to 1, which moves small radii by 3e-4.
HARDWARE_TRIGONOMETRY = tl.constexpr(not backend.INTERPRETED)
M0, M1 = tl.constexpr(MULTIPLIERS[0]), tl.constexpr(MULTIPLIERS[1])
W0, W1 = tl.constexpr(WEYL[0]), tl.constexpr(WEYL[1])
TL_ROUNDS = tl.constexpr(ROUNDS)


@jit
def tl_words(seed, step, sample, stream, block):
    """The four words of each counter: uint32 tensors of `block`'s shape.

    seed, sample: int64, step: integer, each a scalar or of block's shape; block: int32 (e // 4).
    One 64-bit product gives both halves (IMAD.WIDE): 4 instructions a normal less than tl.philox_impl (sm_90).
    """
    zero = (block * 0).to(tl.uint32)
    c0 = block.to(tl.uint32)
    c1 = zero + step.to(tl.uint32)
    c2 = zero + sample.to(tl.uint32)
    c3 = zero + ((sample >> 32).to(tl.uint32) << 8 | stream)
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    # Rolled: LLVM unrolls it just as well (3% fewer instructions than static_range) and Triton compiles faster.
    for _ in range(TL_ROUNDS):
        product0 = c0.to(tl.uint64) * M0
        product1 = c2.to(tl.uint64) * M1
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = product1.to(tl.uint32)
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = product0.to(tl.uint32)
        k0 = k0 + W0
        k1 = k1 + W1
    return c0, c1, c2, c3


@jit
def tl_box_muller(r0, r1):
    """Two float32 normals from two words."""
    u1 = r0.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    angle = r1.to(tl.float32) * 2.3283064365386963e-10 * TWO_PI
    radius = tl.sqrt(-2.0 * tl.log(u1))
    if HARDWARE_TRIGONOMETRY:
        return radius * libdevice.fast_cosf(angle), radius * libdevice.fast_sinf(angle)
    return radius * tl.cos(angle), radius * tl.sin(angle)


@jit
def tl_draw(seed, step, sample, stream, run, RUN):
    """float32 normals of elements RUN * run .. RUN * run + RUN - 1 of their samples: RUN (4 or 8) tensors [B].

    run: int32 [B]; seed, step: scalars; sample: int64 [B].
    """
    r0, r1, r2, r3 = tl_words(seed, step, sample, stream, run * (RUN // 4))
    z0, z1 = tl_box_muller(r0, r1)
    z2, z3 = tl_box_muller(r2, r3)
    if RUN == 8:
        r4, r5, r6, r7 = tl_words(seed, step, sample, stream, run * 2 + 1)
        z4, z5 = tl_box_muller(r4, r5)
        z6, z7 = tl_box_muller(r6, r7)
        z = (z0, z1, z2, z3, z4, z5, z6, z7)
    else:
        z = (z0, z1, z2, z3)
    return z


@jit
def tl_vector(z, RUN):
    """RUN (4 or 8) tensors [B] as the columns of one [B, RUN].

    Joined values stay in the thread that made them; two calls as an axis of one tensor would be exchanged through
    shared memory (11 barriers in q_sample, bf16).
    """
    z0, z1, z2, z3 = z[0], z[1], z[2], z[3]
    if RUN == 8:
        z0, z1, z2, z3 = tl.join(z0, z[4]), tl.join(z1, z[5]), tl.join(z2, z[6]), tl.join(z3, z[7])
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), [z[0].shape[0], RUN])


@jit
def tl_item_normals(seed, step, sample, stream, spot, j, HW, LANES, REPEAT, RUN, LAYOUT):
    """Normals [B, RUN] of the j-th vectors of the items at `spot` (see items.Items), in the order of their memory."""
    if LAYOUT == "interleaved":
        # Each vector takes of all channels: every j draws them again, and the compiler keeps one of the equal draws.
        drawn = ()
        for channel in tl.static_range(REPEAT):
            drawn = drawn + tl_draw(seed, step, sample, stream, spot[2] + channel * (HW // RUN), RUN)
        woven = ()
        for k in tl.static_range(RUN):
            woven = woven + (drawn[(j * RUN + k) % REPEAT * RUN + (j * RUN + k) // REPEAT],)
        z = tl_vector(woven, RUN)
    else:
        z = tl_vector(tl_draw(seed, step, sample, stream, spot[2] + j * LANES, RUN), RUN)
    return z
