"""The noise contract in ONNX operators, bit for bit: see kernels/philox.py for the equations.

Words are uint64 below 2^32. The pair P = (counter 0, counter 2) is one tensor [2, n, blocks], and so is L = (counter 1,
counter 3): a round is six operators, P <- swap(high) ^ L ^ key and L <- swap(low) of the product P * multipliers. After
the last round P holds the words that give radii and L those that give angles.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from export.graph import DOUBLE, FLOAT, INT64, UINT64, Builder
from kernels.philox import MASK, MULTIPLIERS, ROUNDS, WEYL


class Counters(NamedTuple):
    """What all steps share, computed once: the ten round keys [2, 1, 1] and the samples' words, uint64 [n, 1]."""

    keys: list[str]
    low: str
    high: str
    samples: str


def counters(b: Builder, seed: str, first_sample: str, batch: str) -> Counters:
    """From seed and first_sample, int64 scalars, and the batch size, an int64 scalar."""
    mask, half = b.constant(MASK, np.uint64), b.constant(32, np.uint64)
    seed = b.op("Cast", seed, to=UINT64)
    parts = (b.op("BitwiseAnd", seed, mask), b.op("BitShift", seed, half, direction="RIGHT"))
    key = b.op("Concat", *(b.op("Reshape", part, b.integers(1, 1, 1)) for part in parts), axis=0)
    weyl = [[((r * w) & MASK) for w in WEYL] for r in range(ROUNDS)]
    bumps = b.constant(np.array(weyl, np.uint64).reshape(ROUNDS, 2, 1, 1), np.uint64)
    keys = b.op("BitwiseAnd", b.op("Add", key, bumps), mask)
    keys = [b.op("Gather", keys, b.constant(r, np.int64), axis=0) for r in range(ROUNDS)]
    zero, one = b.constant(0, np.int64), b.constant(1, np.int64)
    samples = b.op("Add", b.op("Range", zero, batch, one), first_sample)
    samples = b.op("Unsqueeze", b.op("Cast", samples, to=UINT64), b.integers(1))
    above = b.op("BitShift", samples, half, direction="RIGHT")
    high = b.op("BitShift", above, b.constant(8, np.uint64), direction="LEFT")
    return Counters(keys, b.op("BitwiseAnd", samples, mask), high, samples)


def words(b: Builder, shared: Counters, step: str, stream: int, blocks: int) -> tuple[str, str]:
    """(P, L), uint64 [2, n, blocks] each: words 0 and 2, words 1 and 3 of every block. step: uint64 scalar or [1]."""
    mask, half = b.constant(MASK, np.uint64), b.constant(32, np.uint64)
    lead = b.integers(0)
    ones = b.op("Mul", shared.samples, b.constant(0, np.uint64))  # zeros [n, 1]: broadcasts without a shape
    block = b.op("Add", ones, b.constant(np.arange(blocks, dtype=np.uint64)[None], np.uint64))
    low = b.op("Add", shared.low, b.constant(np.zeros((1, blocks)), np.uint64))
    stream_word = b.op("Add", shared.high, b.constant(stream, np.uint64))
    step_word = b.op("Add", ones, step)
    state, rest = (
        b.op("Concat", *(b.op("Unsqueeze", each, lead) for each in pair), axis=0)
        for pair in ((block, low), (step_word, stream_word))
    )
    multipliers = b.constant(np.array(MULTIPLIERS, np.uint64).reshape(2, 1, 1), np.uint64)
    swap = b.integers(1, 0)
    for key in shared.keys:
        product = b.op("Gather", b.op("Mul", state, multipliers), swap, axis=0)
        high = b.op("BitShift", product, half, direction="RIGHT")
        state = b.op("BitwiseXor", b.op("BitwiseXor", high, rest), key)
        rest = b.op("BitwiseAnd", product, mask)
    return state, rest


def normals(b: Builder, shared: Counters, step: str, stream: int, shape: Sequence[int]) -> str:
    """float32 normals [n, *shape]."""
    numel = math.prod(shape)
    blocks = -(-numel // 4)
    radii, angles = words(b, shared, step, stream, blocks)
    scale = b.constant(2.0**-32, np.float32)
    u1 = b.op("Add", b.op("Mul", b.op("Cast", radii, to=FLOAT), scale), b.constant(2.0**-33, np.float32))
    u2 = b.op("Mul", b.op("Cast", angles, to=FLOAT), scale)
    u1, u2 = b.op("Cast", u1, to=DOUBLE), b.op("Cast", u2, to=DOUBLE)
    radius = b.op("Sqrt", b.op("Mul", b.op("Log", u1), b.constant(-2.0, np.float64)))
    # cos(a) as sin(a + pi/2): ONNX Runtime's CPU has no Cos in double before 1.29.
    angle = b.op("Unsqueeze", b.op("Mul", u2, b.constant(2 * math.pi, np.float64)), b.integers(3))
    waves = b.op("Sin", b.op("Add", angle, b.constant(np.array([math.pi / 2, 0.0]), np.float64)))
    pairs = b.op("Cast", b.op("Mul", b.op("Unsqueeze", radius, b.integers(3)), waves), to=FLOAT)
    # [2 of a block, n, blocks, cos and sin] -> [n, blocks, 2, cos and sin]: the order of the words.
    z = b.op("Transpose", pairs, perm=[1, 2, 0, 3])
    if numel % 4:
        flat = b.op("Reshape", z, b.integers(-1, 4 * blocks))
        z = b.op("Slice", flat, b.integers(0), b.integers(numel), b.integers(1))
    return b.op("Reshape", z, b.integers(-1, *shape))


def step_word(b: Builder, t: str) -> str:
    """The counter's step from a float timestep (visit 0): uint64, through int64, exact below 2^24."""
    return b.op("Cast", b.op("Cast", t, to=INT64), to=UINT64)
