"""Draw samples from a sampler.onnx of `ddpm-export`, without PyTorch: numpy, pillow and onnxruntime are all it needs.

    python run.py --n 64 --seed 7 --out grid.png          the copy of this file beside sampler.onnx
    ddpm-export run DIR --n 64 --seed 7 --context 3 --out grid.png

Exit codes: 2 usage, 3 a bad model file, 4 the provider is missing, 1 the run failed. Errors are one line on stderr.
"""

import argparse
import hashlib
import io
import json
import math
import os
import re
import secrets
import signal
import struct
import sys
import threading
import time
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any, NoReturn

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

try:
    import numpy as np
    import onnxruntime as ort
    from PIL import Image, ImageOps
except ImportError as missing:
    if __name__ != "__main__":
        raise
    absent = isinstance(missing, ModuleNotFoundError)
    found = (
        f"{missing.name} is not installed" if absent else f"numpy, pillow or onnxruntime cannot be loaded ({missing})"
    )
    print(f"error: {found}, needs: pip install {'' if absent else '-U '}numpy pillow onnxruntime", file=sys.stderr)
    sys.exit(4)

KEY, FORMAT_VERSION, FORMER_VERSION = "fused_ddpm", 2, 1  # of the metadata
RUNTIME = "1.21.1"  # the oldest onnxruntime that has every operator of a sampler.onnx on the CPU
SAMPLER, STEP, MANIFEST = "sampler.onnx", "step.onnx", "manifest.json"
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
# Heuristic search costs a tenth of the exhaustive one at the start; TF32 would leave the parity of float32. Untuned.
PROVIDER_OPTIONS = {"cuda": {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"}}
# Rows per call of the model. Untuned; results do not depend on it, memory and the progress bar do.
BATCH_SIZE = 16
CELL_PIXELS, GAP = 64, 4
DEPTHS = (8, 16)  # bits a channel
MOST_STEPS = 1_000_000
SAMPLE_LIMIT = 1 << 56  # of the noise contract
FLOAT_MAX = float(np.finfo(np.float32).max)
COLUMNS = 8  # of a table's row: seven coefficients and t
NOISE_MODES = ("philox", "input", "none")
# What simplifiers make constants of in files of format 1, and what tells the others apart.
FIXED = {"first_sample": 0, "guidance": 1}
OPEN = dict.fromkeys(("table", "clip"), "a model of `ddpm-export onnx --open-table`")
OPEN_GUIDANCE = "a model of `ddpm-export onnx --open-guidance`"
STRENGTH = 0.6  # of --init
MADE_HERE, SPACINGS = ("ddpm", "ddim", "dpmpp_2m"), ("trailing", "leading", "linspace")  # of tables, see `make_rows`
KNOWN_OPTIONS = ("solver", "steps", "prediction", "clip", "spacing", "eta", "variance", "ends")
FATAL = 4  # onnxruntime's log level: its errors come as exceptions, and its warnings would stand beside our one line


class Failure(Exception):
    """An error that is one line on stderr: the run failed, or as below."""

    exit_code = 1


class UsageError(Failure):
    exit_code = 2  # arguments that cannot be used


class ModelError(Failure):
    exit_code = 3  # a model file that cannot be used


class ProviderError(Failure):
    exit_code = 4  # what was asked to compute is not there


# What stands before the reason in onnxruntime's messages: a code, the path, the C++ function.
_PREAMBLE = re.compile(
    r"^\[ONNXRuntimeError\] : \d+ : \w+ : |Load model from .* failed:|Status Message: |/onnxruntime_src/\S+ .*\) "
)
_TOO_NEW = {
    "opset": r"Opset (\d+) is under development.* till opset (\d+)",
    "IR version": r"IR version: (\d+), max supported IR version: (\d+)",
}
# Files of version 0.1.0 take the cosine in double, which the CPU has from 1.29 on.
_CAME_WITH = {"Cos": "1.29"}


def _reason(error: Exception) -> str:
    """onnxruntime's reason in one line."""
    return " ".join(_PREAMBLE.sub("", str(error).strip().split("\n")[0]).split())[:300]


def _is_special(path: Path) -> bool:
    """Whether a folder, a pipe or the like lies there; of a pipe nobody may be at the other end."""
    return os.path.exists(path) and not os.path.isfile(path)  # noqa: PTH110, PTH113 (False for a name that is too long)


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error


def known_digest(path: Path) -> object:
    """The sha256 of a file by the manifest.json beside it, None where there is none or it is not about the file."""
    manifest = path.with_name(MANIFEST)
    if _is_special(manifest):
        raise ModelError(f"{manifest}: is no regular file, needs to be exported again")
    try:
        return json.loads(manifest.read_text(encoding="utf-8"))["files"][path.name]["sha256"]
    except (FileNotFoundError, KeyError, TypeError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{manifest}: cannot be read ({type(error).__name__}), needs to be exported again") from error


def open_session(
    path: str | Path,
    provider: str = "cpu",
    threads: int = 0,
    allow_fallback: bool = False,
    optimise: bool = True,
    cuda_graph: bool = False,
) -> ort.InferenceSession:
    """A session of a file on the provider, or an error: onnxruntime would fall back to the CPU silently.

    threads: of one operator, 0 = as many as cores. optimise False switches the graph optimisations off.
    Raises ModelError, ProviderError, UsageError.
    """
    path = Path(path)
    if provider not in PROVIDERS:
        raise UsageError(f"--provider: got {provider!r}, needs one of {', '.join(PROVIDERS)}")
    cores = os.cpu_count() or 1
    if not 0 <= threads <= cores:
        raise UsageError(f"--threads: got {threads}, needs 0 (all cores) to {cores}")
    if not os.path.isfile(path):  # noqa: PTH113 (False for a name that is too long)
        found = "is no regular file" if _is_special(path) else "no such file"
        raise ModelError(f"{path}: {found}, needs a model that `ddpm-export onnx` wrote")
    if path.stat().st_size == 0:
        raise ModelError(f"{path}: is empty, needs to be exported again")
    known = known_digest(path)
    if known is not None and known != _digest(path):
        raise ModelError(f"{path}: its sha256 is not the one in {MANIFEST}: damaged or exchanged, export it again")
    name, cpu = PROVIDERS[provider], PROVIDERS["cpu"]
    if name not in ort.get_available_providers() and not allow_fallback:
        raise ProviderError(
            f"{path}: {provider} was asked for, but this onnxruntime {ort.__version__} was built without it; "
            "install onnxruntime-gpu, or use --provider cpu or --allow-fallback"
        )
    name = name if name in ort.get_available_providers() else cpu
    options = ort.SessionOptions()
    options.log_severity_level = FATAL
    options.intra_op_num_threads = threads
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings = PROVIDER_OPTIONS.get(provider, {}) | ({"enable_cuda_graph": "1"} if cuda_graph else {})
    cause = "no device, driver or library"
    attempts = [[(cpu, {})]] if name == cpu else [[(name, settings), (cpu, {})], [(cpu, {})]]
    for asked in attempts:
        try:
            with redirect_stdout(io.StringIO()):  # it prints which libraries it misses; our one line says what to do
                if name != cpu and hasattr(ort, "preload_dlls"):
                    ort.preload_dlls()  # CUDA's libraries out of the wheels of PyTorch or NVIDIA, where they are
                session = ort.InferenceSession(str(path), options, providers=asked)
            break
        except Exception as error:  # onnxruntime's exceptions have no base class of their own
            if len(asked) == 1:
                raise _model_error(path, error) from error
            cause = _reason(error)  # whose fault is it: the provider's or the file's?
    runs_on = session.get_providers()[0]
    if runs_on != name and not allow_fallback:
        raise ProviderError(
            f"{path}: {provider} was asked for, but onnxruntime {ort.__version__} could not start it ({cause}); use "
            "--provider cpu or --allow-fallback"
        )
    if runs_on != PROVIDERS[provider]:
        print(f"note: {provider} is not available, runs on {runs_on}", file=sys.stderr)
    return session


def _model_error(path: Path, error: Exception) -> ModelError:
    """What onnxruntime found, in our words."""
    for what, pattern in _TOO_NEW.items():
        if found := re.search(pattern, str(error)):
            known = f"it has {what} {found[1]}, onnxruntime {ort.__version__} knows {found[2]}"
            return ModelError(f"{path}: needs a newer runtime: {known}; upgrade it")
    if found := re.search(r"Could not find an implementation for (\w+)\(\d+\)", str(error)):
        lacks = f"has the operator {found[1]}, which onnxruntime {ort.__version__} lacks"
        return ModelError(f"{path}: {lacks}; needs onnxruntime {_CAME_WITH.get(found[1], RUNTIME)} or newer")
    return ModelError(
        f"{path}: not a whole ONNX model ({_reason(error)}); damaged or another kind of file, export it again"
    )


KINDS = {"denoiser": "m", "sampler": "images", "step": "x_next"}  # and their first outputs
_ENTRIES = {
    **dict.fromkeys(("kind", "prediction", "precision", "weights_sha256"), str),
    **dict.fromkeys(("channels", "height", "width"), int),
    **dict.fromkeys(("model", "schedule", "versions"), dict),
    "classes": list,
}
_SOLVER_ENTRIES = {"noise": str, "rng": str, "table": dict}


def condition_shape(metadata: dict[str, Any]) -> tuple[int, ...] | None:
    """Of one condition, None without; files of format 1 have the length of a vector."""
    if metadata["format_version"] == FORMER_VERSION:
        return (metadata["n_cfeat"],) if metadata["n_cfeat"] else None
    shape = metadata["condition_shape"]
    return None if shape is None else tuple(shape)


def null_conditions(metadata: dict[str, Any], count: int) -> np.ndarray:
    """ "No condition" in so many rows: float32 [count, *shape]."""
    shape = condition_shape(metadata)
    nothing = np.asarray(metadata.get("null_condition", 0), np.float32)
    return np.ascontiguousarray(np.broadcast_to(nothing, (count, *shape)))


def _claims(metadata: dict[str, Any], session: ort.InferenceSession) -> Iterator[tuple[bool, str]]:
    """(whether it is so, what the metadata says), of itself and beside the graph. May raise what damage raises."""
    kind = metadata["kind"]
    yield kind in KINDS, f"kind is {kind!r}"
    for name, needed in (_ENTRIES | ({} if kind == "denoiser" else _SOLVER_ENTRIES)).items():
        yield type(metadata.get(name)) is needed, f"{name} is {metadata.get(name)!r}"
    if metadata["format_version"] == FORMER_VERSION:
        yield type(metadata.get("n_cfeat")) is int, f"n_cfeat is {metadata.get('n_cfeat')!r}"
    else:
        shape = metadata.get("condition_shape", "missing")
        sizes = type(shape) is list and len(shape) > 0 and all(type(n) is int and n > 0 for n in shape)
        yield shape is None or sizes, f"condition_shape is {shape!r}"
    yield _is_count(count := metadata["schedule"].get("timesteps")), f"schedule has timesteps {count!r}"
    yield all(type(name) is str for name in metadata["classes"]), f"classes are {metadata['classes']!r}"
    inputs = {value.name: value.shape for value in session.get_inputs()}
    if kind != "denoiser":
        table, noise = metadata["table"], metadata["noise"]
        fits = noise in NOISE_MODES and (kind == "step" or (noise == "input") == ("noise" in inputs))
        yield fits, f"noise is {noise!r}, the graph's inputs are {', '.join(inputs)}"
        steps, clip, options = (table.get(name) for name in ("steps", "clip", "options"))
        yield _is_count(steps), f"table has steps {steps!r}"
        bound = clip is None or (type(clip) in (int, float) and 0 < clip <= FLOAT_MAX)
        yield bound, f"table has clip {clip!r}"
        yield type(options) is dict and type(options.get("solver")) is str, f"table has options {options!r}"
        if noise == "input" or "rows" in table or "table" in inputs:
            shape = np.asarray(table["rows"], np.float32).shape
            yield shape == (steps, COLUMNS), f"table has rows {list(shape)} for {steps} steps"
        if "starts" in table:
            row, *shares = np.asarray(table["starts"], np.float64).reshape(len(table["starts"]), 3).T
            fits = [(row >= 0) & (row < steps) & (row == row.round()), *((each >= 0) & (each <= 1) for each in shares)]
            yield bool(np.all(fits)), f"table has starts {table['starts']!s:.60} for {steps} steps"
        if "alpha_bars" in table:
            bars = np.asarray(table["alpha_bars"], np.float64)
            falls = bars.shape == (count + 1,) and bars[0] == 1 and bars[-1] >= 0 and (np.diff(bars) <= 0).all()
            yield falls, f"table has alpha_bars {table['alpha_bars']!s:.60} for {count} timesteps"
    first = 2 if kind == "step" else 1  # copies and batch, or batch alone
    taken = [list(shape[first:]) for name, shape in inputs.items() if name.startswith("context")]
    condition = condition_shape(metadata)
    fits = taken == ([] if condition is None else [list(condition)])
    yield fits, f"conditions are {list(condition or ())}, the graph takes {taken or 'none'}"
    if "null_condition" in metadata:
        shape = np.asarray(metadata["null_condition"], np.float32).shape
        yield shape == condition, "null_condition has another shape than conditions"
    yield metadata.get("depth", DEPTHS[0]) in DEPTHS, f"depth is {metadata.get('depth')!r}"
    image = [metadata["channels"], metadata["height"], metadata["width"]]
    outputs = {value.name: value.shape for value in session.get_outputs()}
    yield outputs.get(KINDS[kind], [])[1:] == image, f"images are {image}, the graph's outputs {outputs}"


def _is_count(value: object) -> bool:
    return type(value) is int and 1 <= value <= MOST_STEPS


def metadata_of(session: ort.InferenceSession, path: str | Path, kind: str | None = None) -> dict[str, Any]:
    """What `ddpm-export` noted in the file, checked against its graph.

    Raises ModelError if there is nothing, if it is damaged or of another format, or if another kind is needed.
    """
    damaged = f"{path}: its {KEY!r} metadata is damaged"
    try:
        text = session.get_modelmeta().custom_metadata_map.get(KEY)
        if text is None:
            raise ModelError(f"{path}: has no {KEY!r} metadata, needs a model that `ddpm-export onnx` wrote")
        metadata = json.loads(text)
        version = metadata["format_version"]
        known = type(version) is int and version in (FORMER_VERSION, FORMAT_VERSION)
        wrong = next((what for so, what in _claims(metadata, session) if not so), None) if known else None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise ModelError(f"{damaged} ({type(error).__name__}: {_reason(error)}), export it again") from error
    if not known:
        reads = f"{FORMER_VERSION} and {FORMAT_VERSION}"
        raise ModelError(f"{path}: is of format {version!r}, this program reads {reads}; use the one it is of")
    if wrong is not None:
        raise ModelError(f"{damaged} ({wrong[:300]}), export it again")
    if kind is not None and metadata["kind"] != kind:
        raise ModelError(f"{path}: is a {metadata['kind']}, needs a {kind}.onnx")
    return metadata


# The noise contract, for models with `--noise input`: see kernels/philox.py.
_MASK, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)


def words(seed: int, samples: np.ndarray, step: int, stream: int, blocks: int) -> np.ndarray:
    """Philox4x32-10 words of samples int64 [n]: uint64 [n, blocks, 4], each below 2^32."""
    samples = np.asarray(samples, np.uint64)[:, None]
    high = samples >> _HALF << np.uint64(8) | np.uint64(stream)
    counter = (np.arange(blocks, dtype=np.uint64)[None], np.uint64(step), samples & _MASK, high)
    c0, c1, c2, c3 = np.broadcast_arrays(*counter)
    k0, k1 = np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = p1 >> _HALF ^ c1 ^ k0, p1 & _MASK, p0 >> _HALF ^ c3 ^ k1, p0 & _MASK
        k0, k1 = k0 + _WEYL[0] & _MASK, k1 + _WEYL[1] & _MASK
    return np.stack([c0, c1, c2, c3], axis=-1)


def normals(seed: int, samples: np.ndarray, step: int, stream: int, shape: Sequence[int]) -> np.ndarray:
    """float32 [n, *shape] by Box-Muller, the uniforms in float32 as the contract says."""
    numel = math.prod(shape)
    pairs = words(seed, samples, step, stream, -(-numel // 4)).reshape(len(samples), -1, 2).astype(np.float32)
    u1 = (pairs[..., 0] * np.float32(2.0**-32) + np.float32(2.0**-33)).astype(np.float64)
    radius, angle = np.sqrt(-2 * np.log(u1)), 2 * np.pi * (pairs[..., 1] * np.float32(2.0**-32)).astype(np.float64)
    z = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).reshape(len(samples), -1)
    return z[:, :numel].reshape(len(samples), *shape).astype(np.float32)


def step_noise(rows: np.ndarray, seed: int, samples: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Noise of table rows [k, 8]: float32 [k, n, *shape], zeros where a row adds none."""
    noise = np.zeros((len(rows), len(samples), *shape), np.float32)
    for i, row in enumerate(rows):
        if row[6] != 0:
            noise[i] = normals(seed, samples, int(row[7]), 1, shape)
    return noise


def contexts(
    text: str | None, metadata: dict[str, Any], samples: np.ndarray, option: str = "--context"
) -> np.ndarray | None:
    """float32 [n, *shape] of a class by name or number, `v1,v2,..` (all numbers of a condition), `all` or None.

    `all` gives sample k the class k % classes.
    """
    # Former files may have accents as macOS stores them.
    text, *names = (name and unicodedata.normalize("NFC", name) for name in (text, *metadata["classes"]))
    shape = condition_shape(metadata)
    if shape is None:
        if text is not None:
            raise UsageError(f"{option}: got {text!r}, but this model was trained without classes")
        return None
    size, classes = math.prod(shape), len(shape) == 1
    if text is None:
        return null_conditions(metadata, len(samples))
    if text == "all" and classes:
        return np.eye(size, dtype=np.float32)[samples % size]
    row = np.zeros(0)  # what no condition is
    if text in names:
        row = np.eye(size)[names.index(text)]
    elif classes and text.isdecimal():  # always a class: with one class, a vector of one number is written 0.5 or 1.0
        row = np.eye(size)[int(text)] if len(text) < 10 and int(text) < size else row
    else:
        with suppress(ValueError):
            row = np.array([float(part) for part in text.split(",")])
    if row.shape != (size,) or not (np.abs(row) <= FLOAT_MAX).all():
        named = f"name ({', '.join(names)}) or " if names else ""
        known = f"a class by {named}number (0..{size - 1}), all, or " if classes else ""
        known += f"{size} finite numbers" if size > 1 else "one finite number with a point (0.5)"
        raise UsageError(f"{option}: got {text!r}, needs {known}")
    return np.tile(row.astype(np.float32).reshape(shape), (len(samples), *(1 for _ in shape)))


def check_draw(
    metadata: dict[str, Any], samples: np.ndarray, context: np.ndarray | None, seed: int, guidance: float | np.ndarray
) -> None:
    """Raise UsageError for values that onnxruntime would take silently."""
    samples, shape = np.asarray(samples), condition_shape(metadata)
    whole = samples.ndim == 1 and samples.dtype.kind in "iu" and len(samples)
    inside = whole and samples[0] >= 0 and samples[-1] < SAMPLE_LIMIT
    if not inside or (samples != samples[0] + np.arange(len(samples))).any():
        raise UsageError(f"samples: got {samples.tolist()!r:.80}, needs consecutive whole numbers in 0..2^56 - 1")
    if type(seed) is bool or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**63:
        raise UsageError(f"seed: got {seed!r}, needs a whole number in 0..{2**63 - 1}")
    if not _is_finite(guidance) or np.shape(guidance) not in ((), samples.shape):
        raise UsageError(
            f"guidance: got {guidance!r:.80}, needs a finite float32, or {len(samples)}, one for each sample"
        )
    needs = None if shape is None else [len(samples), *shape]
    found = None if context is None else list(np.shape(context))
    if found != needs:
        raise UsageError(f"context: got {found or 'none'}, this model needs {needs or 'none'}")
    if context is not None and not _is_finite(context):
        raise UsageError("context: got NaN, infinite or huge values, needs finite float32")


def _guidance(
    metadata: dict[str, Any],
    n: int,
    guidance: float | np.ndarray,
    negative: np.ndarray | None,
    phi: float,
    by_sample: bool,
) -> dict[str, np.ndarray]:
    """What of guidance a model takes, float32: weights, [n] if it has them by sample, negative conditions, phi.

    Raises UsageError for what makes no guidance, or what the model has not.
    """
    weights, shape = np.asarray(guidance, np.float32), (n, *(condition_shape(metadata) or ()))
    if not (_is_finite(phi) and np.ndim(phi) == 0 and 0 <= phi <= 1):
        raise UsageError(f"guidance_rescale: got {phi!r:.80}, needs 0..1")
    for name, value in (("negative", negative), ("guidance_rescale", phi or None)):
        if value is not None and weights.ndim == 0 and weights == 1:
            what = f"{value:g}" if np.ndim(value) == 0 else "conditions"
            raise UsageError(f"{name}: got {what} without guidance, needs a guidance other than 1")
    for name, value in (("guidance", guidance if weights.ndim else None), ("guidance_rescale", phi or None)):
        if value is not None and not by_sample:
            raise UsageError(f"{name}: got {value!r:.80}, but this model takes one weight alone, needs {OPEN_GUIDANCE}")
    if negative is not None and (np.shape(negative) != shape or not _is_finite(negative)):
        raise UsageError(f"negative: got {list(np.shape(negative))}, needs {list(shape)} finite float32")
    nothing = null_conditions(metadata, n) if negative is None else np.ascontiguousarray(negative, np.float32)
    weights = np.broadcast_to(weights, n).copy() if by_sample else weights
    return {"guidance": weights, "negative": nothing, "guidance_rescale": np.array(phi, np.float32)}


def step_conditions(
    metadata: dict[str, Any],
    context: np.ndarray,
    guidance: float | np.ndarray,
    negative: np.ndarray | None,
    phi: float,
    taken: Any,
    copies: int,
) -> dict[str, np.ndarray]:
    """What a step.onnx takes of conditions and guidance; taken: the names of its inputs. Raises UsageError."""
    found = _guidance(metadata, len(context), guidance, negative, phi, "guidance_rescale" in taken)
    both = np.ascontiguousarray(context, np.float32), found["negative"]
    feeds = {"contexts": np.stack(both[:copies]), "guidance": found["guidance"].reshape(-1)}
    return feeds | ({"guidance_rescale": found["guidance_rescale"].reshape(1)} if "guidance_rescale" in taken else {})


def _is_finite(values: Any) -> bool:
    """Whether these are numbers that float32 holds."""
    array = np.asarray(values)
    return array.dtype.kind in "iuf" and bool((np.abs(array) <= FLOAT_MAX).all())


def check_table(table: Any, metadata: dict[str, Any], name: str = "table") -> np.ndarray:
    """float32 [steps, 8], if these rows are a table for this model. Raises UsageError."""
    rows, last = np.asarray(table), metadata["schedule"]["timesteps"]
    if rows.dtype.kind != "f" or rows.shape[1:] != (COLUMNS,) or not len(rows):
        raise UsageError(f"{name}: got {rows.dtype} {list(rows.shape)}, needs floats [steps, {COLUMNS}]")
    if not _is_finite(rows):
        raise UsageError(f"{name}: has NaN, infinite or huge values, needs finite float32")
    times = rows[:, -1]
    if not ((times == times.round()) & (times >= 1) & (times <= last)).all():
        raise UsageError(
            f"{name}: has times {times.min():g}..{times.max():g} (column 7), needs whole ones in 1..{last}"
        )
    if metadata["noise"] == "none" and (rows[:, 6] != 0).any():
        raise UsageError(f"{name}: has noise (column 6), but the model was exported with --noise none")
    return rows.astype(np.float32)


def check_clip(clip: float | None, table: np.ndarray | None) -> None:
    """Raise UsageError for a bound of x0 that is none, or that has no table which it belongs to."""
    if clip is not None and table is None:
        raise UsageError(f"clip: got {clip} without a table, whose steps it belongs to")
    if clip is not None and (np.ndim(clip) or not (_is_finite(clip) and clip > 0)):
        raise UsageError(f"clip: got {clip!r}, needs a finite bound > 0 or None")


def _coefficients(
    solver: str, steps: list[tuple[float, float]], prediction: str, options: dict[str, Any]
) -> list[list[float]]:
    """The seven numbers of every step, as ddpm/solvers.py has them: alpha_bars where it begins and where it ends."""
    rows, h_previous = [], None
    for a, s in steps:
        root, sigma = math.sqrt(a), math.sqrt(1 - a)
        to_x0 = {"eps": (1 / root, -sigma / root), "v": (root, -sigma), "x0": (0.0, 1.0)}[prediction]
        if solver == "ddpm":
            alpha, beta = a / s, 1 - a / s
            noise = beta if options.get("variance") == "beta" else beta * (1 - s) / (1 - a)
            c2, c3 = math.sqrt(alpha) * (1 - s) / (1 - a), math.sqrt(s) * beta / (1 - a)
            rest = [c2, c3, 0.0, 0.0, math.sqrt(noise)]
        elif solver == "ddim":
            noise = (options.get("eta") or 0.0) * math.sqrt((1 - s) / (1 - a) * (1 - a / s))
            way = math.sqrt(max(1 - s - noise**2, 0.0))
            p, q = {"eps": (0.0, 1.0), "v": (sigma, root), "x0": (1 / sigma, -root / sigma)}[prediction]
            rest = [way * p, math.sqrt(s), way * q, 0.0, noise]
        elif s == 1:  # dpmpp_2m from here on: its last step lands on x0
            rest = [0.0, 1.0, 0.0, 0.0, 0.0]
        else:
            h = 0.5 * (math.log(s / (1 - s)) - math.log(a / (1 - a)))
            weight = -math.sqrt(s) * math.expm1(-h)
            memory = 0.0 if h_previous is None else h / (2 * h_previous)
            rest, h_previous = [math.sqrt((1 - s) / (1 - a)), weight * (1 + memory), 0.0, -weight * memory, 0.0], h
        rows.append([*to_x0, *rest])
    rows[-1][6] = 0.0
    return rows


def make_rows(metadata: dict[str, Any], solver: str | None, steps: int | None) -> np.ndarray:
    """The rows [steps, 8] of another solver or number of steps, for a model exported with --open-table.

    The model's own options hold for its own solver; another one takes over the spacing alone. Raises UsageError.
    """
    own, last = metadata["table"]["options"], metadata["schedule"]["timesteps"]
    spacing, _, offset = str(own.get("spacing") or "trailing").partition("+")
    if solver in (None, own["solver"]):
        solver, steps, options = own["solver"], steps or metadata["table"]["steps"], own
    else:
        steps, options = steps or last, {}
    odd = [name for name, value in options.items() if value is not None and name not in KNOWN_OPTIONS]
    odd += [] if options.get("ends") in (None, 0, 1) else ["ends"]
    odd += ["spacing"] if offset and not (spacing == "leading" and offset.isdecimal()) else []
    if solver not in MADE_HERE or spacing not in SPACINGS or odd:
        given = f"{solver!r} with {', '.join(odd) or f'spacing {spacing!r}'}"
        raise UsageError(f"--solver: got {given}, needs {', '.join(MADE_HERE)} with {', '.join(SPACINGS)}, or --table")
    divides = spacing == "leading" and not offset
    if not 1 <= steps <= last or (divides and last % steps):
        raise UsageError(f"--steps: got {steps}, needs 1..{last}{', a divisor of it' * divides}")
    k = np.arange(steps)
    if spacing == "trailing" or (steps == 1 and not offset):
        times = np.round(last - k * last / steps)
    else:
        times = (last // steps * k if spacing == "leading" else np.round(np.linspace(0, last - 1, steps)))[::-1] + 1
        times = times + int(offset or 0)
    if times[0] > last:
        raise UsageError(f"--steps: got {steps}, which begin at {times[0]} with spacing leading+{offset}, after {last}")
    ends = np.append(times[1:], 0)
    if options.get("ends") is not None:
        ends = np.maximum(times - last // steps, options["ends"])
    bars = np.asarray(metadata["table"]["alpha_bars"], np.float64).clip(min=1e-300)
    pairs = [(float(bars[int(t)]), float(bars[int(end)])) for t, end in zip(times, ends, strict=True)]
    rows = _coefficients(solver, pairs, metadata["prediction"], options)
    return np.column_stack([rows, times])


def _run(session: ort.InferenceSession, outputs: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """These outputs of the model. Raises Failure."""
    try:
        return session.run(outputs, feeds)
    except Exception as error:  # onnxruntime's exceptions have no base class of their own
        raise Failure(f"the model failed ({_reason(error)})") from error


def _finite(images: np.ndarray) -> np.ndarray:
    """The samples. Raises Failure for what is none."""
    if not np.isfinite(images).all():
        raise Failure("the samples have NaN or infinite values: try less guidance or another solver")
    return images


def draw(
    session: ort.InferenceSession,
    metadata: dict[str, Any],
    samples: np.ndarray,
    context: np.ndarray | None,
    *,
    seed: int = 0,
    guidance: float | np.ndarray = 1.0,
    negative: np.ndarray | None = None,
    guidance_rescale: float = 0.0,
    table: np.ndarray | None = None,
    clip: float | None = None,
) -> np.ndarray:
    """Images float32 [n, C, H, W], not clamped, of consecutive global samples [n].

    guidance [n], negative [n, ...] (conditions to guide away from) and guidance_rescale (0..1): for a model that takes
    them. table [steps, 8] replaces the model's, together with clip (None = none), where the model keeps its table open.
    Raises UsageError for values that onnxruntime would take silently, Failure if the model fails.
    """
    samples = np.asarray(samples)
    check_draw(metadata, samples, context, seed, guidance)
    check_clip(clip, table)
    own, taken = metadata["table"], {value.name for value in session.get_inputs()}
    if table is None and "table" in taken:
        table, clip = np.asarray(own["rows"], np.float32), own["clip"]
    taken |= {value.name for value in session.get_overridable_initializers()}
    shape = (metadata["channels"], metadata["height"], metadata["width"])
    feeds: dict[str, np.ndarray] = {}
    if table is not None:
        feeds["table"] = check_table(table, metadata)
        if "clip" in taken or clip != own["clip"]:
            feeds["clip"] = np.array(np.inf if clip is None else clip, np.float32)
    if context is not None:
        guided = _guidance(metadata, len(samples), guidance, negative, guidance_rescale, "negative" in taken)
        if negative is not None and "negative" not in taken:
            raise UsageError(f"negative: got conditions, but this model has its own, needs {OPEN_GUIDANCE}")
        feeds |= {name: value for name, value in guided.items() if name == "guidance" or name in taken}
        feeds["context"] = np.asarray(context, np.float32)
    if metadata["noise"] == "input":
        feeds["x_T"] = normals(seed, samples, 0, 0, shape)
        rows = feeds.get("table", np.asarray(own["rows"], np.float32))
        feeds["noise"] = step_noise(rows, seed, samples, shape)
    else:
        feeds |= {"seed": np.array(seed, np.int64), "first_sample": np.array(samples[0], np.int64)}
        if context is None:
            feeds["n"] = np.array(len(samples), np.int64)
    # What is a constant of this model, or was made one by a program that simplified it.
    for name in [name for name in feeds if name not in taken]:
        given = feeds.pop(name)
        if name not in FIXED or np.any(given != FIXED[name]):
            got = f"got {list(given.shape)}" if given.ndim else f"got {given:g}"
            needs = OPEN.get(name, "one that no program simplified")
            raise UsageError(f"{name}: {got}, but it is a constant of this model, needs {needs}")
    return _finite(_run(session, ["images"], feeds)[0])


def edit(
    session: ort.InferenceSession,
    metadata: dict[str, Any],
    samples: np.ndarray,
    context: np.ndarray | None,
    init: np.ndarray,
    strength: float,
    keep: np.ndarray | None = None,
    *,
    seed: int = 0,
    guidance: float | np.ndarray = 1.0,
    negative: np.ndarray | None = None,
    guidance_rescale: float = 0.0,
    table: np.ndarray | None = None,
    clip: float | None = None,
) -> np.ndarray:
    """Images as `ddpm edit` makes them, by a step.onnx.

    init: [C, H, W] or [n, C, H, W], which is noised to timestep strength T and sampled from there. keep: bool [H, W],
    pixels that stay those of init: their x0 is known in every row. The rest is as in `draw`.
    """
    samples, own = np.asarray(samples), metadata["table"]
    check_draw(metadata, samples, context, seed, guidance)
    shape, taken = (metadata["channels"], metadata["height"], metadata["width"]), {v.name for v in session.get_inputs()}
    starts = own.get("starts")
    if table is not None and "table" not in taken:
        raise UsageError(f"table: got {list(table.shape)}, but it is a constant of this model, needs {OPEN['table']}")
    if table is None:
        table, clip = np.asarray(own["rows"], np.float32), own["clip"]
    else:
        last, table = metadata["schedule"]["timesteps"], check_table(table, metadata)
        starts = [[k, t / last, own["alpha_bars"][int(t)]] for k, t in enumerate(table[:, -1].tolist())]
    if not starts:
        found = "was exported by a former version" if starts is None else "has a learned table, which has no middle"
        raise UsageError(f"--init: this model {found}, needs {'another' if starts == [] else 'a new'} export")
    begins = [(int(k), alpha_bar) for k, share, alpha_bar in starts if share <= strength]
    if not begins or not strength <= 1:
        raise UsageError(f"--strength: got {strength:g}, needs {starts[-1][1]:g}..1 with this table")
    first, alpha_bar = begins[0]
    feeds = {"table": table, "clip": np.array(np.inf if clip is None else clip, np.float32)} if "table" in taken else {}
    if context is not None:
        copies = 2 if np.any(np.asarray(guidance) != 1) else 1
        feeds |= step_conditions(metadata, context, guidance, negative, guidance_rescale, taken, copies)
    x = math.sqrt(alpha_bar) * init + math.sqrt(1 - alpha_bar) * normals(seed, samples, 0, 0, shape)
    x0_previous = np.zeros_like(x)
    for i in range(first, len(table)):
        c, z = table[i].astype(np.float64), step_noise(table[i : i + 1], seed, samples, shape)
        at = np.array([i], np.int64)
        feeds |= {"x": x, "x0_previous": x0_previous, "index": at, "noise": z, "noise_start": at}
        x_next, x0 = _run(session, ["x_next", "x0"], feeds)
        if i == first:  # where there is no x0 before it, its own takes that place
            x_next = x_next + np.float32(c[5]) * x0
            c[3], c[5] = c[3] + c[5], 0.0
        if keep is not None:  # what the row makes of the m whose x0 is known
            m = (init - c[0] * x) / c[1]
            x0 = np.where(keep, init if clip is None else init.clip(-clip, clip), x0).astype(np.float32)
            known = c[2] * x + c[3] * x0 + c[4] * m + c[5] * x0_previous + c[6] * z[0]
            x_next = np.where(keep, known, x_next).astype(np.float32)
        x, x0_previous = x_next, x0
    return _finite(x) if keep is None else np.where(keep, init, _finite(x))


def read_image(path: Path, height: int, width: int, alpha: bool = False) -> np.ndarray:
    """A picture of 8 bits a channel as float32 [C, H, W] in [-1, 1]: 4 channels with alpha, else 1 (grey) or 3.

    What is transparent is laid on white otherwise. Raises UsageError for another thing, or one of another size.
    """
    if not os.path.isfile(path):  # noqa: PTH113 (False for a name that is too long)
        raise UsageError(f"{path}: no such regular file")
    try:
        with Image.open(path) as image:
            deep = image.mode[0] in "IF" or ";16" in str(image.tile)
            image.load()
            seen = ImageOps.exif_transpose(image)
        mode, size = seen.mode, seen.size
        clear = mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in seen.info
        grey = mode in ("1", "L", "LA", "La")
        if alpha or clear:
            seen = seen.convert("RGBA")
        if clear and not alpha:
            seen = Image.alpha_composite(Image.new("RGBA", size, "white"), seen).convert("RGB")
        elif not alpha:
            seen = seen.convert("L" if grey else "RGB")
    except Exception as error:  # damage raises nearly anything
        raise UsageError(f"{path}: not a readable image ({str(error).splitlines()[0]:.80})") from error
    if deep:
        raise UsageError(f"{path}: has more than 8 bits a channel, needs 8, or a .npy file of floats")
    if size != (width, height):
        needs = f"needs {height}x{width}, what the model draws (height x width)"
        raise UsageError(f"{path}: is {size[1]}x{size[0]}, {needs}")
    pixels = np.atleast_3d(np.asarray(seen)).transpose(2, 0, 1)
    if mode in ("P", "PA") and not alpha:
        grey = (pixels == pixels[:1]).all()
    pixels = pixels[:1] if grey and not alpha else pixels
    return pixels.astype(np.float32) / np.float32(127.5) - 1


def read_init(path: Path, metadata: dict[str, Any], n: int) -> np.ndarray:
    """What an editing begins with, float32 [C, H, W] or [n, C, H, W]. Raises UsageError."""
    shape = (metadata["channels"], metadata["height"], metadata["width"])
    if path.suffix.lower() == ".npy":
        values = _load(path, f"floats in -1..1 {list(shape)}")
        if values.shape not in (shape, (n, *shape)) or values.dtype.kind != "f" or not _is_finite(values):
            needs = f"finite floats in -1..1 {list(shape)} or {[n, *shape]}"
            raise UsageError(f"{path}: got {values.dtype} {list(values.shape)}, needs {needs}")
        return values.astype(np.float32)
    image = read_image(path, *shape[1:], shape[0] == 4)
    if len(image) > shape[0]:
        raise UsageError(f"{path}: has {len(image)} channels, needs {shape[0]}, what the model draws")
    return np.ascontiguousarray(np.broadcast_to(image, shape))


def read_mask(path: Path, metadata: dict[str, Any]) -> np.ndarray:
    """bool [H, W], true where pixels are kept: where the picture is dark. Raises UsageError."""
    keep = read_image(path, metadata["height"], metadata["width"]).mean(axis=0) <= 0
    if keep.all() or not keep.any():
        raise UsageError(f"{path}: {'every' if keep.all() else 'no'} pixel is kept, needs black ones and white ones")
    return keep


def _show_progress(start: int, done: int, total: int, began: float) -> None:
    """On stderr: on a terminal, else a line every tenth from 2 s on."""
    elapsed, live = time.monotonic() - began, sys.stderr.isatty()
    if live or (elapsed > 2 and 10 * done // total > 10 * start // total):
        left = f"{done / elapsed:.3g} images/s  {elapsed * (total - done) / done:.0f} s left"
        line = f"sample {100 * done // total:3d}%  {done}/{total}  {left}"
        print(f"\r{line}   " if live else line, end="" if live else "\n", file=sys.stderr, flush=True)


def to_pixels(images: np.ndarray, depth: int = 8) -> np.ndarray:
    """uint8 or, of 16 bits, uint16 [n, H, W, C] of images [n, C, H, W] in [-1, 1], clamped."""
    values = np.rint((images.clip(-1, 1) + 1) * ((2**depth - 1) / 2))
    return values.astype(f"u{depth // 8}").transpose(0, 2, 3, 1)


def png_bytes(values: np.ndarray) -> bytes:
    """A PNG file of uint8 or uint16 [h, w, C], C = 1, 3 or 4. Pillow writes no colour of 16 bits."""
    height, width, channels = values.shape
    header = struct.pack(">2I5B", width, height, 8 * values.itemsize, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = values.astype(values.dtype.newbyteorder(">")).reshape(height, -1).view(np.uint8)
    data = zlib.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes())  # a zero before each row: not filtered
    chunks = (b"IHDR" + header, b"IDAT" + data, b"IEND")
    packed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def grid(images: np.ndarray, columns: int | None = None) -> Image.Image:
    """A picture of images, square unless columns says otherwise; of four channels RGBA, its images as they are."""
    pixels = to_pixels(images)
    pixels = np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels
    n, height, width = pixels.shape[:3]
    columns = columns or math.ceil(math.sqrt(n))
    scale = max(1, CELL_PIXELS // max(height, width))
    high, wide = height * scale + GAP, width * scale + GAP
    mode = "RGBA" if pixels.shape[-1] == 4 else "RGB"
    canvas = Image.new(mode, (min(columns, n) * wide + GAP, math.ceil(n / columns) * high + GAP), "white")
    for k in range(n):
        tile = Image.fromarray(pixels[k]).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        canvas.paste(tile, (GAP + k % columns * wide, GAP + k // columns * high))
    return canvas


def _sweep(folder: Path) -> None:
    """Remove what killed processes left half-written: a writer locks its file, and a lock ends with its holder."""
    for path in folder.glob(".fused-ddpm-*.partial.*") if fcntl else ():
        with suppress(OSError), path.open("rb") as file:  # its writer lives, or it is somebody else's
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _partial(path: Path) -> Path:
    return path.with_name(f".fused-ddpm-{secrets.token_hex(8)}.partial{path.suffix}")


def _check_writable(option: str, path: Path) -> None:
    """Raise UsageError if a file of this name cannot be written: before the work, not after it."""
    probe = _partial(path)
    try:
        str(path).encode()
        with suppress(FileNotFoundError):
            path.lstat()
        probe.touch()
        probe.unlink()
    except (OSError, UnicodeEncodeError) as error:
        reason = getattr(error, "strerror", None) or "its name is not in UTF-8"
        raise UsageError(f"{option}: {path} cannot be written ({reason}), needs another place") from error


def _write(path: Path, save: Any) -> None:
    """Write beside the file, then rename over it: never half a file."""
    partial = _partial(path)
    try:
        try:
            with partial.open("xb") as file:
                with suppress(OSError):  # a file system without locks: there nobody can sweep
                    fcntl and fcntl.flock(file, fcntl.LOCK_EX)
                save(file)
                file.flush()
                os.fsync(file.fileno())
                if fcntl:
                    partial.replace(path)
            if not fcntl:  # Windows renames no open file
                partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror or error})") from error


def _save_array(file: Any, array: np.ndarray) -> None:
    """A .npy file. Not by np.save, which overlooks a disk that is full when its buffer is written at last."""
    array = np.ascontiguousarray(array)
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    file.write(array.data)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """argparse's messages in the form of ours."""
        if found := re.fullmatch(r"argument (\S+): invalid (\w+) value: (.*)", message, re.DOTALL):
            kind = "a whole number" if found[2] == "int" else "a number"
            message = f"{found[1]}: got {found[3]:.60}, needs {kind}"
        elif found := re.fullmatch(r"argument (\S+): expected one argument", message):
            message = f"{found[1]}: got nothing, needs a value ({found[1]}=-1,.. where it begins with -)"
        elif found := re.fullmatch(r"unrecognized arguments: (.*)", message, re.DOTALL):
            message = f"{found[1]:.60}: no such option, needs one of those that --help lists"
        raise UsageError(message)


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    made = _Parser(prog=prog, description="Draw samples from a sampler.onnx, without PyTorch.")
    model = "sampler.onnx (step.onnx with --init), or the folder of an export [the one beside this file]"
    made.add_argument("model", nargs="?", type=Path, default=Path(__file__).parent, help=model)
    made.add_argument("--n", type=int, default=64, help="how many [64]")
    made.add_argument("--seed", type=int, default=0, help="0 <= seed < 2^63; the same seed gives the same pictures [0]")
    made.add_argument("--context", help="class by name or number, v1,v2,.., or all (sample k: class k %% K)")
    made.add_argument("--guidance", default="1", help="w of classifier-free guidance, or w1,w2,.. by sample [1 = none]")
    made.add_argument("--negative", help="what guidance leads away from, as --context [no condition]")
    made.add_argument("--guidance-rescale", type=float, default=0.0, help="phi of Lin et al. 2024, 0..1 [0]")
    made.add_argument("--init", type=Path, help="picture or .npy to begin with, in the middle, by step.onnx")
    made.add_argument("--strength", type=float, help=f"share of T that is sampled again [{STRENGTH}; 1 with --mask]")
    made.add_argument("--mask", type=Path, help="picture, white where pixels are made anew; black ones stay")
    made.add_argument("--first-sample", type=int, default=0, help="global index of the first sample [0]")
    made.add_argument("--batch-size", type=int, default=BATCH_SIZE, help=f"changes nothing but memory [{BATCH_SIZE}]")
    opened = "for a model exported with --open-table"
    made.add_argument("--solver", help=f"{', '.join(MADE_HERE)}, {opened} [the model's]")
    made.add_argument("--steps", type=int, help=f"1..T, {opened} [the model's]")
    made.add_argument("--table", type=Path, help=f"another solver table: .npy, float [steps, 8], {opened}")
    made.add_argument("--clip", type=float, help="bound of x0 with another table, 0 = none [the model's]")
    made.add_argument("--out", type=Path, help="picture of all samples, .png")
    made.add_argument("--png-dir", type=Path, help="folder for a .png of each sample, named by its global index")
    made.add_argument("--depth", type=int, help="bits a channel in --png-dir, 8 or 16 [the run's]")
    made.add_argument("--npy", type=Path, help="samples as float32 [n, C, H, W], not clamped")
    made.add_argument("--columns", type=int, help="of the picture [square, or one per class]")
    made.add_argument("--provider", default="cpu", help=f"{', '.join(PROVIDERS)} [cpu]")
    made.add_argument("--allow-fallback", action="store_true", help="run on the CPU where the provider is missing")
    made.add_argument("--threads", type=int, default=0, help="of one operator [0 = all cores]")
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return made


def _check(given: argparse.Namespace) -> None:
    """Raise UsageError for arguments out of range, before anything is loaded."""
    if given.out is given.npy is given.png_dir is None:
        raise UsageError("--out, --npy, --png-dir: got none, needs at least one to write")
    if given.columns is not None and given.out is None:
        raise UsageError(f"--columns: got {given.columns} without --out, the picture that has them")
    if given.depth is not None and (given.png_dir is None or given.depth not in DEPTHS):
        raise UsageError(f"--depth: got {given.depth}, needs 8 or 16, and --png-dir, whose pictures it is of")
    for option, path, suffix in (("--out", given.out, ".png"), ("--npy", given.npy, ".npy")):
        try:
            usable = path is None or (path.suffix.lower() == suffix and path.parent.is_dir() and not path.is_dir())
        except OSError:  # a name that is too long
            usable = False
        if not usable:
            raise UsageError(f"{option}: got {path}, needs a file name ending in {suffix} in an existing folder")
        if path is not None:
            _check_writable(option, path)
    if given.png_dir is not None:
        there = os.path.isdir(given.png_dir)  # noqa: PTH112 (False for a name that is too long)
        if not there and (os.path.lexists(given.png_dir) or not os.path.isdir(given.png_dir.parent)):  # noqa: PTH112
            raise UsageError(f"--png-dir: got {given.png_dir}, needs a folder, or a name in an existing one")
        _check_writable("--png-dir", given.png_dir / "0.png" if there else given.png_dir)
    limits = {
        "n": (1, 2**31),
        "seed": (0, 2**63 - 1),
        "first_sample": (0, SAMPLE_LIMIT - given.n),
        "batch_size": (1, 2**31),
    }
    limits |= {"columns": (1, 2**31)} if given.columns is not None else {}
    for name, (low, high) in limits.items():
        if not low <= getattr(given, name) <= high:
            raise UsageError(f"--{name.replace('_', '-')}: got {getattr(given, name)}, needs {low}..{high}")
    try:
        weights = np.array([float(part) for part in given.guidance.split(",")])
    except ValueError:
        raise UsageError(f"--guidance: got {given.guidance!r:.60}, needs a number, or one for each sample") from None
    if not _is_finite(weights) or len(weights) not in (1, given.n):
        raise UsageError(
            f"--guidance: got {given.guidance:.60}, needs a finite number, or {given.n}, one for each sample"
        )
    guides = (weights != 1).any()
    if guides and given.context is None:
        raise UsageError(f"--guidance: got {given.guidance} without --context, needs a context to guide towards")
    for option, value in (("--negative", given.negative), ("--guidance-rescale", given.guidance_rescale or None)):
        if value is not None and not guides:
            raise UsageError(f"{option}: got {value} without guidance, needs a --guidance other than 1")
    given.guidance = float(weights[0]) if len(weights) == 1 else weights
    if given.init is None and not given.strength is given.mask is None:
        raise UsageError("--strength, --mask: got them without --init, the picture that they are about")
    if given.mask is not None and given.guidance_rescale:
        raise UsageError("--guidance-rescale: got it beside --mask, needs one of the two (`ddpm edit` takes both)")
    made = given.solver is not None or given.steps is not None
    if given.clip is not None and (not 0 <= given.clip <= FLOAT_MAX or (given.table is None and not made)):
        raise UsageError(f"--clip: got {given.clip}, needs a bound > 0 (or 0 = none) and --table, --solver or --steps")
    if made and given.table is not None:
        raise UsageError(f"--table: got {given.table} beside --solver or --steps, needs one of the two")
    if given.steps is not None and given.steps < 1:
        raise UsageError(f"--steps: got {given.steps}, needs 1..T of the model's schedule")


def _load(path: Path, needs: str) -> np.ndarray:
    """The array of a .npy file. Raises UsageError."""
    if _is_special(path):
        raise UsageError(f"{path}: is no regular file, needs a .npy file of {needs}")
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        why = f" ({error.strerror or 'cut off'})" if isinstance(error, OSError) else ""
        raise UsageError(f"{path}: not a .npy file of numbers{why}, needs {needs}") from error
    if not isinstance(array, np.ndarray):
        raise UsageError(f"{path}: got an archive, needs {needs}")
    return array


def read_table(path: Path, metadata: dict[str, Any]) -> np.ndarray:
    """The rows [steps, 8] of a .npy file, for this model. Raises UsageError."""
    return check_table(_load(path, f"floats [steps, {COLUMNS}]"), metadata, str(path))


def sample(given: argparse.Namespace) -> None:
    """The command."""
    _check(given)
    path, file = given.model, SAMPLER if given.init is None else STEP
    if path.is_dir():
        path /= file
        if not path.exists():
            raise ModelError(f"{given.model}: has no {file}, needs a folder that `ddpm-export onnx RUN --out` wrote")
    session = open_session(path, given.provider, given.threads, given.allow_fallback)
    metadata = metadata_of(session, path, file.removesuffix(".onnx"))
    if known_digest(path) is None:
        print(f"note: no {MANIFEST} knows the sha256 of {path.name}: damage would go unnoticed", file=sys.stderr)
    shape = metadata["channels"], metadata["height"], metadata["width"]
    if not given.out is given.png_dir is None and shape[0] not in (1, 3, 4):
        raise UsageError(f"--out, --png-dir: images have {shape[0]} channels, a picture needs 1, 3 or 4 (use --npy)")
    size = 4 * given.n * math.prod(shape)
    if hasattr(os, "sysconf") and size > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise UsageError(f"--n: got {given.n}, which are {size / 1e9:.3g} GB of samples, needs fewer than memory holds")
    if session.get_providers()[0] != PROVIDERS["cpu"] and metadata["noise"] == "philox":
        print("note: this model draws its noise on the CPU; `--noise input` exports run faster here", file=sys.stderr)
    samples = np.arange(given.first_sample, given.first_sample + given.n)
    context = contexts(given.context, metadata, samples)
    options = {"seed": given.seed, "guidance_rescale": given.guidance_rescale}
    away = None if given.negative is None else contexts(given.negative, metadata, samples, "--negative")
    each = {"context": context, "guidance": given.guidance, "negative": away}
    make = draw
    if given.init is not None:
        make = edit
        each["init"] = read_init(given.init, metadata, given.n)
        if given.mask is not None:
            options["keep"] = read_mask(given.mask, metadata)
        usual = STRENGTH if given.mask is None else 1.0
        options["strength"] = usual if given.strength is None else given.strength
    table = None if given.table is None else read_table(given.table, metadata)
    if given.solver is not None or given.steps is not None:
        if "alpha_bars" not in metadata["table"]:
            asked = f"--solver: got {given.solver}" if given.steps is None else f"--steps: got {given.steps}"
            raise UsageError(f"{asked}, but the table is a constant of this model, needs {OPEN['table']}")
        table = make_rows(metadata, given.solver, given.steps)
    if table is not None:
        clip = metadata["table"]["clip"] if given.clip is None else given.clip
        options |= {"table": table, "clip": clip or None}
    by_row = {"context", "negative", "guidance"} | ({"init"} if np.ndim(each.get("init")) == 4 else set())
    drawn, began = [], time.monotonic()
    try:
        for start in range(0, given.n, given.batch_size):
            part = slice(start, start + given.batch_size)
            own = {name: value[part] if np.ndim(value) and name in by_row else value for name, value in each.items()}
            drawn.append(make(session, metadata, samples[part], **own, **options))
            _show_progress(start, min(part.stop, given.n), given.n, began)
    finally:
        if sys.stderr.isatty():
            print(file=sys.stderr)
    images = np.concatenate(drawn)
    if given.png_dir is not None:
        given.png_dir.mkdir(exist_ok=True)
    for folder in {path.parent for path in (given.out, given.npy, given.png_dir and given.png_dir / "0") if path}:
        _sweep(folder)
    if given.npy is not None:
        _write(given.npy, lambda file: _save_array(file, images))
        print(f"wrote {given.npy}")
    if given.out is not None:
        columns = given.columns or (condition_shape(metadata)[0] if given.context == "all" else None)
        picture = grid(images, columns)
        _write(given.out, lambda file: picture.save(file, format="PNG"))
        print(f"wrote {given.out}")
    if given.png_dir is not None:
        depth = given.depth or metadata.get("depth", DEPTHS[0])
        for number, pixels in zip(samples, to_pixels(images, depth), strict=True):
            _write(given.png_dir / f"{number:06d}.png", lambda file, own=pixels: file.write(png_bytes(own)))
        others = sum(1 for _ in given.png_dir.iterdir()) - given.n
        more = f", which holds {others} other files" if others else ""
        print(f"wrote {given.n} pictures into {given.png_dir}{more}")


class _Terminated(BaseException):
    """SIGTERM, so that what is half written is removed."""


def _terminate(*_: object) -> NoReturn:
    raise _Terminated


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    ort.set_default_logger_severity(FATAL)
    here = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminate) if here else None
    try:
        sample(parser(prog).parse_args(arguments))
        sys.stdout.flush()  # its errors, and an interrupt that came while the session was freed, belong here
    except (KeyboardInterrupt, _Terminated) as error:
        print("stopped", file=sys.stderr)
        return 143 if isinstance(error, _Terminated) else 130
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except (OSError, MemoryError) as error:  # of standard output
        few = "the samples do not fit into memory, needs a smaller --n or --batch-size"
        print(f"error: {few if isinstance(error, MemoryError) else error.strerror or error}", file=sys.stderr)
        return Failure.exit_code
    except Failure as error:
        if "--debug" in arguments:
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        if here:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)  # None: not set from Python
    return 0


if __name__ == "__main__":
    sys.exit(main())
