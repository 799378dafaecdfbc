"""The static report: what every kernel compiles to, for cards that are not here.

A deterministic performance test that needs no GPU: registers, spills, instructions and access widths of real launches,
and the time that each rate allows,

    t_unit = instructions of the unit / (SMs * results per clock * clock)      t_bytes = bytes / bandwidth

per million elements, of which the largest binds. The units are those of `kernels.cards`. All are lower bounds: latency,
caches, tensor cores and the launch itself are not in them.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import backend, bare, sass
from kernels.backend import Cost, Launch

# The packages' functions of these names hide the modules.
from kernels.bottleneck import cost as bottleneck_cost
from kernels.bottleneck import launch as bottleneck
from kernels.cards import CARDS
from kernels.convolution import cost as convolution_cost
from kernels.convolution import launch as convolution
from kernels.group_norm_relu import cost as group_norm_relu_cost
from kernels.group_norm_relu import launch as group_norm_relu
from kernels.noise_mse import cost as noise_mse_cost
from kernels.noise_mse import launch as noise_mse
from kernels.q_sample import cost as q_sample_cost
from kernels.q_sample import launch as q_sample
from kernels.q_sample_rows import cost as q_sample_rows_cost
from kernels.q_sample_rows import launch as q_sample_rows
from kernels.solver_step import cost as solver_step_cost
from kernels.solver_step import launch as solver_step

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100")
MORE_INSTRUCTIONS = 1.05


@dataclass(frozen=True)
class Case:
    """A launch worth watching: `run` calls an operator's `launch`, `cost` is that operator's, `stored` its type.

    elements: of the output, for kernels that draw no noise and are not launched over items.
    """

    run: Callable[[], Any]
    cost: Cost
    stored: torch.dtype
    elements: int | None = None

    @property
    def yardstick(self) -> str | None:
        """The bare kernel that stores this type; none for a kernel that draws no noise."""
        if self.elements is not None:
            return None
        return "bare fp32" if self.stored == torch.float32 else "bare bf16"

    def launch(self) -> Launch:
        """The launch, recorded and not executed."""
        with backend.recording() as launches:
            self.run()
        (launch,) = launches
        return launch


F32, F16, BF16, U8 = torch.float32, torch.float16, torch.bfloat16, torch.uint8
IMAGE, RAGGED = (64, 3, 16, 16), (64, 1, 5, 7)  # 35 elements: no whole number of vectors
LAST = torch.channels_last


def _image(dtype: torch.dtype, shape: tuple[int, ...] = IMAGE, layout: torch.memory_format | None = None) -> Tensor:
    return torch.zeros(shape, dtype=dtype).to(memory_format=layout or torch.contiguous_format)


def _one(dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.zeros((), dtype=dtype)


def _rows(n: int = IMAGE[0]) -> Tensor:
    return torch.zeros(n, dtype=torch.int64)


def _bare(out: torch.dtype) -> Case:
    return Case(lambda: bare.launch(torch.zeros(1 << 14, dtype=out), _one(), _one()), bare.cost(out), out)


# In all of these: shape and memory layout of the images, default IMAGE and contiguous.
def _q_sample(x0: torch.dtype, out: torch.dtype, *where: Any) -> Case:
    def run() -> None:
        image = _image(x0, *where)
        q_sample(image, _rows(len(image)), torch.ones(501), _one(), _rows(len(image)), out)

    return Case(run, q_sample_cost(x0, out), out)


def _q_sample_rows(
    data: torch.dtype, out: torch.dtype, *where: Any, flip: bool = False, keep_noise: bool = False
) -> Case:
    def run() -> None:
        q_sample_rows(_image(data, *where), _rows(), torch.ones(501), _one(), _rows(), flip, keep_noise, out)

    return Case(run, q_sample_rows_cost(data, out, keep_noise), out)


def _noise_mse(pred: torch.dtype, *where: Any, weighted: bool = False, backward: bool = False) -> Case:
    def run() -> None:
        image = _image(pred, *where)
        weight, grad = torch.ones(len(image)) if weighted else None, _one(F32) if backward else None
        noise_mse(image, _one(), _rows(len(image)), weight, grad)

    return Case(run, noise_mse_cost(pred, backward), pred)


def _solver_step(x: torch.dtype, m: torch.dtype, *where: Any, full: bool = False) -> Case:
    """full: guidance, memory of x0 and clip."""

    def run() -> None:
        image, output = _image(x, *where), _image(m, *where)
        uncond, previous = (output, image) if full else (None, None)
        table, clip = torch.zeros(50, 8), 1.0 if full else None
        samples = _rows(len(image))
        solver_step(image, output, table, _one(), _one(), samples, uncond, _one(F32), previous, clip)

    return Case(run, solver_step_cost(x, m, guided=full, memory=full), x)


def _features(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype).to(memory_format=torch.channels_last)


def _group_norm_relu(x: torch.dtype, side: int = 16) -> Case:
    """The out head of a network with n_feat 64."""

    def run() -> None:
        vector = torch.ones(64, dtype=x)
        group_norm_relu(_features((IMAGE[0], 64, side, side), x), vector, vector, 8, 1e-5)

    return Case(run, group_norm_relu_cost(x), x, IMAGE[0] * 64 * side * side)


def _bottleneck(x: torch.dtype, side: int = 4) -> Case:
    """Of a network with n_feat 64 on images of four times this side; each image has its context, all share the time."""

    def run() -> None:
        vector, scale, shift = torch.ones(128, dtype=x), torch.ones(IMAGE[0], 128), torch.ones(1, 128)
        weight = _features((128, 128, side, side), x)
        features = _features((IMAGE[0], 128, side, side), x)
        bottleneck(features, weight, vector, vector, vector, scale.to(x), shift.to(x), 8, 1e-5)

    return Case(run, bottleneck_cost(x, 128, IMAGE[0]), x, IMAGE[0] * 128 * side * side)


def _convolution(n: int, channels: int, columns: int, side: int, *, skip: int = 0, then: str = "keep") -> Case:
    """bf16, as in a network with n_feat 64: 3x3 with GELU; over two sources without it; 1x1 where it spreads."""
    taps, linear = 1 if then == "spread" else 3, skip > 0 or columns < 16

    def run() -> None:
        def weight(inputs: int) -> Tensor:
            return _features((columns, inputs, taps, taps), BF16)

        sources = (_features((n, skip, side, side), BF16), weight(skip)) if skip else (None, None)
        image, bias = _features((n, channels, side, side), BF16), torch.ones(columns, dtype=BF16)
        convolution(image, weight(channels), bias, *sources, None, None, None, not linear, then)

    cost = convolution_cost(BF16, channels + skip, columns, taps * taps, then)
    return Case(run, cost, BF16, n * columns * side * side)


# Named "operator variant"; images are 64 of 3x16x16.
CASES: dict[str, Case] = {
    "bare fp32": _bare(F32),
    "bare bf16": _bare(BF16),
    "q_sample fp32": _q_sample(F32, F32),
    "q_sample bf16": _q_sample(BF16, BF16),
    "q_sample uint8 to fp32": _q_sample(U8, F32),
    "q_sample uint8 to bf16": _q_sample(U8, BF16),
    "q_sample fp16": _q_sample(F16, F16),
    "q_sample fp32 28x28": _q_sample(F32, F32, (64, 1, 28, 28)),
    "q_sample fp32 ragged": _q_sample(F32, F32, RAGGED),
    "q_sample fp32 channels_last": _q_sample(F32, F32, IMAGE, LAST),
    "q_sample bf16 channels_last": _q_sample(BF16, BF16, IMAGE, LAST),
    "q_sample fp32 8 channels_last": _q_sample(F32, F32, (64, 8, 16, 16), LAST),
    "q_sample_rows uint8 to fp32": _q_sample_rows(U8, F32),
    "q_sample_rows uint8 to bf16": _q_sample_rows(U8, BF16),
    "q_sample_rows uint8, flip, noise": _q_sample_rows(U8, F32, flip=True, keep_noise=True),
    "q_sample_rows uint8 ragged": _q_sample_rows(U8, F32, RAGGED),
    "noise_mse fp32": _noise_mse(F32),
    "noise_mse fp32 backward": _noise_mse(F32, backward=True),
    "noise_mse fp32 weighted": _noise_mse(F32, weighted=True),
    "noise_mse fp32 weighted backward": _noise_mse(F32, weighted=True, backward=True),
    "noise_mse bf16": _noise_mse(BF16),
    "noise_mse bf16 backward": _noise_mse(BF16, backward=True),
    "noise_mse fp16": _noise_mse(F16),
    "noise_mse fp16 backward": _noise_mse(F16, backward=True),
    "noise_mse fp32 ragged": _noise_mse(F32, RAGGED),
    "noise_mse fp32 channels_last": _noise_mse(F32, IMAGE, LAST),
    "noise_mse channels_last backward": _noise_mse(F32, IMAGE, LAST, backward=True),
    "solver_step fp32": _solver_step(F32, F32),
    "solver_step fp32 full": _solver_step(F32, F32, full=True),
    "solver_step fp32, m bf16": _solver_step(F32, BF16),
    "solver_step bf16": _solver_step(BF16, BF16),
    "solver_step fp16": _solver_step(F16, F16),
    "solver_step fp32 ragged": _solver_step(F32, F32, RAGGED),
    "solver_step fp32 channels_last": _solver_step(F32, F32, IMAGE, LAST),
    "group_norm_relu fp32": _group_norm_relu(F32),
    "group_norm_relu bf16": _group_norm_relu(BF16),
    "group_norm_relu bf16 64x64": _group_norm_relu(BF16, 64),
    "bottleneck fp32": _bottleneck(F32),
    "bottleneck bf16": _bottleneck(BF16),
    "bottleneck bf16 28x28": _bottleneck(BF16, 7),
    "convolution bf16": _convolution(64, 64, 64, 16),
    "convolution bf16 one image": _convolution(1, 64, 64, 16),
    "convolution bf16 first": _convolution(64, 3, 64, 16),
    "convolution bf16 last": _convolution(64, 64, 3, 16),
    "convolution bf16 pool": _convolution(64, 128, 128, 8, then="pool"),
    "convolution bf16 two sources": _convolution(64, 64, 64, 16, skip=64),
    "convolution bf16 spread": _convolution(64, 128, 256, 4, skip=128, then="spread"),
}


def compile_case(name: str, arch: str) -> Any:
    """Triton's CompiledKernel of a case, for instance for its `.asm["ttir"]`."""
    return sass.compile_launch(CASES[name].launch(), int(arch.removeprefix("sm_")))


def _compile(name: str, arch: str) -> tuple[bytes, int, str]:
    """(cubin, shared bytes, TTIR): what a process can hand back."""
    compiled = compile_case(name, arch)
    return compiled.asm["cubin"], compiled.metadata.shared, compiled.asm["ttir"]


def _records(binaries: dict[tuple[str, str], tuple[bytes, int, str]], dump: Path | None) -> list[dict[str, Any]]:
    """The records of one architecture's binaries."""
    ((_, arch), *_) = binaries
    codes = [sass.machine_code(cubin) for cubin, *_ in binaries.values()]
    listings = sass.disassemble(codes, int(arch.removeprefix("sm_")))
    records = []
    for ((name, _), (cubin, shared, ttir)), listing in zip(binaries.items(), listings, strict=True):
        facts, launch = sass.measure(cubin, shared, listing), CASES[name].launch()
        per_thread = sass.elements_per_thread(launch, CASES[name].elements)
        records.append(
            {
                "kernel": name,
                "arch": arch,
                **asdict(facts),
                "instructions_per_element": round(facts.instructions / per_thread, 3),
                "per_element": {kind: round(number / per_thread, 3) for kind, number in facts.classes.items()},
                "bytes_per_element": CASES[name].cost.bytes,
                "vectors": launch.constants.get("LAYOUT", "even") in ("even", "interleaved"),
            }
        )
        if dump is not None:
            stem = "-".join(name.replace(",", "").split()) + "." + arch
            (dump / f"{stem}.ttir").write_text(ttir)
            (dump / f"{stem}.sass").write_text(listing + "\n")
    return records


def predict(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """For each card of the record's arch: microseconds per million elements of each unit and bytes, and what binds."""
    cards = {}
    for name, card in CARDS.items():
        if card.arch == record["arch"]:
            times = card.units(record["per_element"]) | {"bytes": card.bytes(record["bytes_per_element"])}
            cards[name] = {f"{unit}_us": round(time, 3) for unit, time in times.items()}
            cards[name]["binds"] = max(times, key=times.__getitem__)
    return cards


def report(
    archs: Iterable[str] = ARCHS,
    names: Iterable[str] | None = None,
    dump: Path | None = None,
    jobs: int = 1,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda binaries, _: binaries,
) -> list[dict[str, Any]]:
    """Compile cases for architectures and measure them: JSON-able records, the same for the same compiler.

    Args:
        archs, names: which, default all.
        dump: a folder for the TTIR and SASS of each.
        jobs: processes; more than one needs a main module that can be imported again.
        progress: wraps (binaries, how many) while they come.

    Returns: by case and arch a dictionary of kernel, arch, the fields of `Sass`, instructions_per_element
    (instructions / elements per thread, an upper bound where a branch skips some, a lower one where a loop repeats
    some), per_element (the same by class), ratio (of instructions_per_element to the bare kernel's, None for a kernel
    without noise), bytes_per_element, vectors (whether the memory layout allows vector accesses), cards (see
    `predict`).
    """
    sass.usable()
    archs, names = list(archs), list(CASES if names is None else names)
    everything = list(dict.fromkeys([*names, *filter(None, (CASES[name].yardstick for name in names))]))
    pairs = [(name, arch) for arch in archs for name in everything]
    with ExitStack() as stack:
        if jobs > 1:
            workers = ProcessPoolExecutor(min(jobs, len(pairs)), mp_context=get_context("spawn"))
            compiled = stack.enter_context(workers).map(_compile, *zip(*pairs, strict=True))
        else:
            compiled = (_compile(*pair) for pair in pairs)
        binaries = dict(zip(pairs, progress(compiled, len(pairs)), strict=True))
    by_arch = [{pair: binaries[pair] for pair in pairs if pair[1] == arch} for arch in archs]
    records = {(line["kernel"], line["arch"]): line for group in by_arch for line in _records(group, dump)}
    for (name, arch), record in records.items():
        yardstick = records.get((CASES[name].yardstick, arch))
        per_element = record["instructions_per_element"]
        record["ratio"] = yardstick and round(per_element / yardstick["instructions_per_element"], 3)
        record["cards"] = predict(record)
    return [record for (name, _), record in records.items() if name in names]


def compare(records: Iterable[dict[str, Any]], baseline: Iterable[dict[str, Any]]) -> list[str]:
    """What got worse against the baseline, a line each: spills, narrower or more accesses, over 5% more instructions.

    Fails closed: a record without a baseline, or the reverse, is a violation too.
    """
    new = {(record["kernel"], record["arch"]): record for record in records}
    old = {(record["kernel"], record["arch"]): record for record in baseline}
    lines = [f"{name}, {arch}: is in the baseline, was not compiled" for name, arch in old if (name, arch) not in new]
    for (name, arch), record in new.items():
        before = old.get((name, arch))
        if before is None:
            lines.append(f"{name}, {arch}: has no baseline (commit one with --json)")
            continue
        # One narrow access among wide ones shows in how many there are.
        for field in ("spill_store_bytes", "spill_load_bytes", "global_loads", "global_stores"):
            if record[field] > before[field]:
                lines.append(f"{name}, {arch}: {field} {record[field]}, the baseline has {before[field]}")
        for field in ("load_bits", "store_bits"):
            if record[field] < before[field]:
                lines.append(f"{name}, {arch}: {field} {record[field]}, the baseline has {before[field]}")
        field = "instructions_per_element"
        if record[field] > MORE_INSTRUCTIONS * before[field]:
            more = 100 * (record[field] / before[field] - 1)
            lines.append(
                f"{name}, {arch}: {field} {record[field]}, {more:.1f}% more than the baseline's {before[field]}"
            )
    return lines
