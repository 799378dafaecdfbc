"""Files that are no longer what was written: flipped bits, cuts, garbage, exchanged parts, files of others."""

import gzip
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ddpm import ContextUnet
from tests.faults.processes import Lost, call, content, differences
from tests.faults.tries import Try, Wanted, draws
from tests.faults.works import DATA, DRAW, IMPORT, RESUME, RUN, SAMPLE, STOCK, STOPPED, TRAIN, Shop, Work

DAMAGED, EXCHANGED = "a damaged file", "exchanged parts and files"
CASES = DAMAGED, EXCHANGED
LIBRARY = "winograd.so, sample"
SEEDS = range(5)


def flip(content: bytearray, draw: np.random.Generator) -> bytearray:
    content[int(draw.integers(len(content)))] ^= 1 << int(draw.integers(8))
    return content


def cut(content: bytearray, draw: np.random.Generator) -> bytearray:
    return content[: int(draw.integers(len(content)))]


def garbage(content: bytearray, draw: np.random.Generator) -> bytearray:
    at = int(draw.integers(len(content)))
    content[at : at + 64] = draw.bytes(min(64, len(content) - at))
    return content


def zeros(content: bytearray, draw: np.random.Generator) -> bytearray:
    at = int(draw.integers(len(content)))
    content[at : at + 512] = bytes(min(512, len(content) - at))
    return content


KINDS: dict[str, Callable[[bytearray, np.random.Generator], bytearray]] = {
    "flip": flip, "cut": cut, "garbage": garbage, "zeros": zeros,
}  # fmt: skip

MIDWAY = DATA | {"run": "midway"}
SAMPLING = Work("sample", (*SAMPLE, "--npy", "x.npy"), RUN)
RESUMING = Work("resume", RESUME, MIDWAY)
DRAWING = Work("export run", DRAW, {"onnx": "onnx"})
IMPORTING = Work("import", IMPORT, {"weights.pth": "weights.pth"})


@dataclass(frozen=True)
class Subject:
    """A file that is damaged, and the command that reads it. edited: people may edit it, what is valid is meant."""

    file: str
    work: Work
    edited: bool = False


def without_labels(name: str) -> tuple[str, ...]:
    """`ddpm train` on other data."""
    words = (word for word in TRAIN if word not in ("--labels", "data/labels.npy"))
    return tuple(name if word == "data/images.npy" else word for word in words)


def trained_on(file: str) -> Subject:
    """Pictures in another format, under a run that is resumed."""
    kind = Path(file).suffix[1:]
    source = "data/folder" if kind == "png" else file

    def make(shop: Shop, target: Path) -> None:
        images = np.load(shop.make("data") / "images.npy")
        idx = struct.pack(">4i", 2051, *images.shape[:3]) + images.tobytes()
        (target / "folder").mkdir(parents=True)
        if kind != "png":
            (target / Path(file).name).write_bytes(gzip.compress(idx, mtime=0) if kind == "gz" else idx)
        for k, image in enumerate(images if kind == "png" else ()):
            path = target / "folder" / str(k % 3) / f"{k}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(image[..., 0]).save(path)

    data = {"data": f"data of {kind}"}
    STOCK[f"data of {kind}"] = make
    STOCK[f"midway on {kind}"] = without_labels(source), data, "run", STOPPED
    return Subject(file, Work(f"resume on {kind}", RESUME, data | {"run": f"midway on {kind}"}))


SUBJECTS = (
    Subject("run/model.safetensors", SAMPLING),
    Subject("run/training.safetensors", RESUMING),
    Subject("run/config.json", SAMPLING, edited=True),
    Subject("run/config.json", RESUMING, edited=True),
    Subject("onnx/sampler.onnx", DRAWING),
    Subject("onnx/manifest.json", DRAWING, edited=True),
    Subject("weights.pth", IMPORTING),
    Subject("data/images.npy", RESUMING),
    Subject("data/labels.npy", RESUMING),
    *map(trained_on, ("data/images.idx", "data/images.gz", "data/folder/1/1.png")),
)


def _same_meaning(damaged: Path, whole: Path) -> bool | None:
    """Of JSON: whether it says the same; None if it is no JSON object any more."""
    try:
        found = json.loads(damaged.read_text("utf-8"))
    except (ValueError, RecursionError):
        return None
    return found == json.loads(whole.read_text("utf-8")) if isinstance(found, dict) else None


def _check(shop: Shop, work: Work, folder: Path, file: str, beside: bool = False, may_say: bool = False) -> None:
    """Refused in one line that names the file, everything else whole; or harmless: the undisturbed result.

    beside: the line may name a file of the same folder, to which this one does not belong. may_say: the file is valid
    and says something else, so that another result is what was asked for, or a line about what it names now.
    """
    normal, before = shop.undisturbed(work), content(folder)
    ended = call(folder, work.words)
    found = content(folder)
    if ended.code == 0:
        untouched = {file} if found[file] == before[file] else set()
        kept = [{name: of for name, of in side.items() if name not in untouched} for side in (found, normal.after)]
        odd = differences(*kept)
        if odd and not may_say:
            raise Lost(f"{' '.join(work.words)} took it in silence: {odd}")
        return
    named = (Path(name).name for name in before if name == file or (beside and sibling(name, file)))
    ended.refusal(*(() if may_say else named))
    odd = differences(found, before)
    if odd:
        raise Lost(f"refused, but {odd}")


def sibling(name: str, file: str) -> bool:
    return Path(name).parent == Path(file).parent


def damaged(shop: Shop, subject: Subject, kind: str, seed: int, folder: Path) -> None:
    shop.stocked(folder, subject.work.start)
    path, draw = folder / subject.file, draws(subject.file, subject.work.name, kind, seed)
    whole = path.read_bytes()
    while (spoilt := bytes(KINDS[kind](bytearray(whole), draw))) == whole:
        pass
    path.write_bytes(spoilt)
    original = folder.parent / "original"
    original.write_bytes(whole)
    other = subject.edited and _same_meaning(path, original) is False
    _check(shop, subject.work, folder, subject.file, may_say=other)


def exchanged_entries(shop: Shop, subject: Subject, seed: int, folder: Path) -> None:
    """Two tensors of one shape and type in a safetensors file have each other's bytes."""
    shop.stocked(folder, subject.work.start)
    path = folder / subject.file
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    values: dict[str, bytes] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, end = entry["data_offsets"]
            values[name] = data[first:end]
    alike: dict[str, list[str]] = {}
    for name in values:
        alike.setdefault(f"{header[name]['dtype']} {header[name]['shape']}", []).append(name)
    pairs = [(a, b) for names in alike.values() for a in names for b in names if a < b and values[a] != values[b]]
    a, b = pairs[int(draws(subject.file, seed).integers(len(pairs)))]
    header[a], header[b] = header[b], header[a]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    _check(shop, subject.work, folder, subject.file)


# (what is replaced, by what of the shop, by which work it is read): each file is whole, they do not belong together.
FOREIGN = (
    ("run/model.safetensors", "another/model.safetensors", SAMPLING),
    ("run/config.json", "another/config.json", SAMPLING),
    ("run/config.json", "imported/config.json", SAMPLING),
    ("run/model.safetensors", "imported/model.safetensors", SAMPLING),
    ("run/training.safetensors", "another/training.safetensors", RESUMING),
    ("run/config.json", "another/config.json", RESUMING),
    ("onnx/sampler.onnx", "onnx_before/sampler.onnx", DRAWING),
    ("onnx/manifest.json", "onnx_before/manifest.json", DRAWING),
    ("onnx/sampler.onnx", "onnx/denoiser.onnx", DRAWING),
    ("data/labels.npy", "data/images.npy", RESUMING),
)


def exchanged_files(shop: Shop, file: str, source: str, work: Work, folder: Path) -> None:
    shop.stocked(folder, work.start)
    shutil.copy(shop.folder / source, folder / file)
    _check(shop, work, folder, file, beside=True)


def make_wide(shop: Shop, target: Path) -> None:
    """A run whose convolutions the compiled kernel takes, that kernel, and pictures made without it."""
    target.mkdir()
    torch.manual_seed(0)
    torch.save(ContextUnet(1, 32, 3, 16).state_dict(), target / "wide.pth")
    call(target, ("ddpm", "import", "wide.pth", "--out", "run", "--timesteps", "50", "--beta-end", "0.2")).need()
    call(target, (*SAMPLING.words, "--engine", "eager"), cached).need()
    (target / "x.npy").rename(target / "right.npy")
    call(target, SAMPLING.words, cached).need()


STOCK["wide"] = make_wide


def cached() -> None:
    """For `call(prepare=)`: kernels are kept in a folder `cache`."""
    os.environ["FUSED_DDPM_CACHE"] = "cache"


def native_library(shop: Shop, kind: str, seed: int, folder: Path) -> None:
    """A damaged kernel in the cache: built anew or left alone, and the pictures are right."""
    shop.stocked(folder, {"wide": "wide"})
    path, draw = next((folder / "wide" / "cache").glob("winograd*.so")), draws("so", kind, seed)
    path.write_bytes(KINDS[kind](bytearray(path.read_bytes()), draw))
    call(folder / "wide", SAMPLING.words, cached).need()
    off = np.abs(np.load(folder / "wide" / "x.npy") - np.load(folder / "wide" / "right.npy")).max()
    if not off < 1e-3:
        raise Lost(f"other pictures: off by {off}")


def tries(shop: Shop, wanted: Wanted) -> Iterator[Try]:
    for subject in SUBJECTS:
        what = f"{Path(subject.file).name}, {subject.work.name}"
        if not wanted(DAMAGED, what):
            continue
        shop.undisturbed(subject.work)
        for kind in KINDS:
            for seed in SEEDS:
                yield Try(DAMAGED, what, f"{kind} {seed}", damaged, (subject, kind, seed))
    if wanted(DAMAGED, LIBRARY) and list(shop.make("wide").glob("cache/winograd*.so")):  # not without a compiler
        for kind in ("cut", "garbage", "zeros"):
            for seed in range(2):
                yield Try(DAMAGED, LIBRARY, f"{kind} {seed}", native_library, (kind, seed))
    for subject in SUBJECTS[:2]:
        what = f"{Path(subject.file).name}, {subject.work.name}"
        for seed in SEEDS if wanted(EXCHANGED, what) else ():
            shop.undisturbed(subject.work)
            yield Try(EXCHANGED, what, f"entries, seed {seed}", exchanged_entries, (subject, seed))
    for file, source, work in FOREIGN:
        what = f"{Path(file).name}, {work.name}"
        if wanted(EXCHANGED, what):
            shop.undisturbed(work)
            shop.make(source.partition("/")[0])
            yield Try(EXCHANGED, what, f"for {source}", exchanged_files, (file, source, work))
