"""Files that say they are larger than they are, and small files that unpack into large ones.

Each is refused in one line that names it, or read: in seconds, and with little more memory than an honest file takes.
Beside them are large files that say the truth; those may take what they need.
"""

import gzip
import io
import json
import pickle
import resource
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from ddpm.networks import ContextUnet
from tests.faults.damage import without_labels
from tests.faults.processes import Lost, call
from tests.faults.tries import Try, Wanted
from tests.faults.works import DATA, DRAW, IMPORT, RESUME, RUN, SAMPLE, TRAIN, Shop

CASE = "a lying header"
CASES = (CASE,)
SECONDS, MEGABYTES = 30, 512  # on a busy machine; what such a file may take more than an honest one
ADDRESSES = 8 << 30  # of memory that a try may map beyond what it has: it protects the machine
SAMPLED = (*SAMPLE, "--npy", "x.npy")
Spoil = Callable[[Path], object]


def config(**changes: object) -> Spoil:
    """config.json with other values; `a.b` is b in a (written a__b)."""

    def spoil(folder: Path) -> None:
        path = folder / "run" / "config.json"
        content = json.loads(path.read_text())
        for name, value in changes.items():
            *outer, last = name.split("__")
            place = content
            for part in outer:
                place = place[part]
            place[last] = value
        path.write_text(json.dumps(content))

    return spoil


def tensors(name: str, change: Callable[[dict, bytes], tuple[dict, bytes]]) -> Spoil:
    """A safetensors file with another header or data."""

    def spoil(folder: Path) -> None:
        path = folder / "run" / name
        content = path.read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        header, data = change(json.loads(content[8 : 8 + size]), content[8 + size :])
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)

    return spoil


def entry(**changes: object) -> Callable[[dict, bytes], tuple[dict, bytes]]:
    """The first tensor says something else of itself."""

    def change(header: dict, data: bytes) -> tuple[dict, bytes]:
        name = next(name for name in header if name != "__metadata__")
        header[name] |= changes
        return header, data

    return change


def more_names(header: dict, data: bytes) -> tuple[dict, bytes]:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [len(data)] * 2}
    return header | {f"more{k}": empty for k in range(100_000)}, data


def only_picture(make: Callable[[], bytes]) -> Spoil:
    """A folder of one picture."""

    def spoil(folder: Path) -> None:
        for path in (folder / "data").iterdir():
            path.unlink()
        (folder / "data" / "0.png").write_bytes(make())

    return spoil


def written(name: str, make: Callable[[], bytes]) -> Spoil:
    """A file with other bytes."""
    return lambda folder: (folder / name).write_bytes(make())


def length(name: str, size: int) -> Spoil:
    """A safetensors file whose first eight bytes say another length of its header."""
    return lambda folder: (folder / name).write_bytes(struct.pack("<Q", size) + (folder / name).read_bytes()[8:])


def npy(shape: tuple[int, ...], kind: str = "|u1", order: bool = False, data: int = 1000) -> bytes:
    header = repr({"descr": kind, "fortran_order": order, "shape": shape}).ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(data)


def idx(*shape: int, magic: int = 2051, data: int = 1000) -> bytes:
    return struct.pack(f">{1 + len(shape)}i", magic, *shape) + bytes(data)


def bomb(size: int, head: bytes = b"") -> bytes:
    """So many zero bytes behind a head, as gzip: a thousandth of it."""
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as file:
        file.write(head)
        for _ in range(size >> 20):
            file.write(bytes(1 << 20))
    return packed.getvalue()


def png(width: int, height: int, rows: int = 0, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG that says it has this size; so many rows of zeros are there."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, line = zlib.compressobj(), bytes(1 + width * {0: 1, 2: 3, 6: 4}[colour] * depth // 8)
    packed = b"".join(packer.compress(line) for _ in range(rows)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def weights(change: Callable[[dict], dict]) -> bytes:
    file = io.BytesIO()
    torch.save(change(ContextUnet(1, 8, 3, 16).state_dict()), file)
    return file.getvalue()


FIRST = "init_conv.conv1.0.weight"


def expanded(state: dict) -> dict:
    """Every tensor is one number, seen as a large one."""
    return {name: torch.zeros(1).expand(*(1 << 9,) * max(1, tensor.ndim)) for name, tensor in state.items()}


def wide(state: dict) -> dict:
    """The first convolution says 20,000 features, by strides of zero."""
    return state | {FIRST: torch.zeros(1).expand(20_000, 1, 3, 3)}


def many_levels(state: dict) -> dict:
    return state | {f"down{k}.model.0.conv1.0.weight": torch.zeros(1) for k in range(2000)}


def huge(state: dict) -> dict:
    return {name: tensor.double() * 1e300 if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def packed_bomb() -> bytes:
    """A .pth one of whose storages is followed by 1 GB of zeros, deflated."""
    plain, file = io.BytesIO(weights(lambda state: state)), io.BytesIO()
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        storage = next(name for name in source.namelist() if "/data/" in name)
        for name in source.namelist():
            with target.open(name, "w", force_zip64=True) as out:
                out.write(source.read(name))
                for _ in range(1024 if name == storage else 0):
                    out.write(bytes(1 << 20))
    return file.getvalue()


def deep(depth: int) -> bytes:
    return b"[" * depth


def table(rows: int) -> bytes:
    file = io.BytesIO()
    np.save(file, np.tile(np.array([1.0, 0, 1, 0, 0, 0, 0, 1]), (rows, 1)))
    return file.getvalue()


class _Runs:
    def __reduce__(self) -> tuple:
        return (open, ("ran", "w"))


MODEL, STATE = "run/model.safetensors", "run/training.safetensors"
ON_RUN, ON_MIDWAY, ON_IMAGES = (RUN, SAMPLED), (DATA | {"run": "midway"}, RESUME), (DATA, TRAIN)
ON_WEIGHTS, ON_TABLE = ({"weights.pth": "weights.pth"}, IMPORT), ({"onnx": "onnx_input"}, (*DRAW, "--table", "t.npy"))
ON_IDX, ON_GZ = ((DATA, without_labels(f"data/images.{kind}")) for kind in ("idx", "gz"))
ON_FOLDER = DATA, (*without_labels("data"), "--image-size", "16")
# what is spoilt, how, (what lies there, the command), by what
LIES: tuple[tuple[str, str, tuple[dict[str, str], tuple[str, ...]], Spoil], ...] = (
    *(
        ("config.json", f"{changes}", ON_RUN, config(**changes))
        for changes in (
            {"model__n_feat": 2048}, {"model__n_feat": 10**6}, {"model__n_feat": 10**12}, {"model__n_feat": 2**70},
            {"model__height": 4096}, {"model__height": [1 << 20, 16]}, {"model__height": 2**1100},
            {"model__n_cfeat": 10**8}, {"model__in_channels": 10**8}, {"model__multipliers": [1, 10**6]},
            {"model__multipliers": [1] * 5000}, {"schedule__timesteps": 10**7}, {"schedule__timesteps": 10**9},
            {"schedule__timesteps": 2**63}, {"schedule__timesteps": -5}, {"sampling__steps": 10**9},
            {"classes": ["a"] * 10**6},
        )
    ),
    *(
        ("config.json", f"resume, {changes}", ON_MIDWAY, config(**changes))
        for changes in (
            {"training__n_feat": 4096}, {"training__timesteps": 10**9}, {"training__epochs": 10**12},
            {"training__batch_size": 10**10}, {"training__image_size": 10**5},
        )
    ),
    ("config.json", "100,000 brackets", ON_RUN, written("run/config.json", lambda: deep(100_000))),
    ("config.json", "200 MB of blanks", ON_RUN, written("run/config.json", lambda: b" " * (200 << 20))),
    *(
        (Path(name).name, f"{how}", on, spoil)
        for name, on in ((MODEL, ON_RUN), (STATE, ON_MIDWAY))
        for how, spoil in (
            ("header of 2^40 bytes", length(name, 2**40)),
            ("header of 2^63 bytes", length(name, 2**63)),
            ("header of 0 bytes", length(name, 0)),
            ("shape of 2^40", tensors(Path(name).name, entry(shape=[2**40]))),
            ("shapes that overflow", tensors(Path(name).name, entry(shape=[2**32, 2**32, 4]))),
            ("negative shape", tensors(Path(name).name, entry(shape=[-1, 3]))),
            ("offsets beyond the file", tensors(Path(name).name, entry(data_offsets=[0, 2**40]))),
            ("unknown type", tensors(Path(name).name, entry(dtype="F4096"))),
            ("100,000 more names", tensors(Path(name).name, more_names)),
        )
    ),
    *(
        ("images.npy", f"{how}", ON_IMAGES, written("data/images.npy", make))
        for how, make in (
            ("10^12 images", lambda: npy((10**12, 16, 16, 1))),
            ("2^40 x 2^40", lambda: npy((2**40, 2**40, 2, 2))),
            ("negative", lambda: npy((-5, 16, 16, 1))),
            ("one pixel of 2^31 bytes", lambda: npy((1,), "V2147483647")),
            ("objects", lambda: npy((24, 16, 16, 1), "|O") + pickle.dumps(_Runs())),
            ("a pickle", lambda: pickle.dumps(_Runs())),
            ("ten dimensions", lambda: npy((1,) * 10)),
            ("10^9 empty images", lambda: npy((10**9, 0, 0, 1), data=0)),
            ("images of 10^5 pixels a side", lambda: npy((1, 10**5, 10**5, 1))),
            ("a header of 64 KB", lambda: b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535),
        )
    ),
    *(
        ("labels.npy", f"{how}", ON_IMAGES, written("data/labels.npy", make))
        for how, make in (
            ("10^12 labels", lambda: npy((10**12,), "<i8")),
            ("24 rows of 10^9 classes", lambda: npy((24, 10**9))),
            ("class 10^9", lambda: npy((24,), "<i8", data=0) + struct.pack("<24q", *[10**9] * 24)),
        )
    ),
    *(
        ("images.idx", f"{how}", ON_IDX, written("data/images.idx", make))
        for how, make in (
            ("2^31 images", lambda: idx(2**31 - 1, 28, 28)),
            ("negative", lambda: idx(-1, 28, 28)),
            ("a product of 2^93", lambda: idx(2**31 - 1, 2**31 - 1, 2**31 - 1)),
            ("rank 255", lambda: idx(*[2] * 255, magic=0x8FF)),
            ("10^9 images of no pixel", lambda: idx(10**9, 0, 0, data=0)),
        )
    ),
    *(
        ("images.gz", f"{how}", ON_GZ, written("data/images.gz", make))
        for how, make in (
            ("1 GB of zeros", lambda: bomb(1 << 30)),
            ("1 GB behind a header of one image", lambda: bomb(1 << 30, idx(1, 16, 16, data=256))),
            ("1 GB behind a header of 100 images", lambda: bomb(1 << 30, idx(100, 16, 16, data=0))),
            ("a bomb in a bomb", lambda: gzip.compress(bomb(1 << 30), mtime=0)),
        )
    ),
    *(
        ("PNG in a folder", f"{how}", ON_FOLDER, only_picture(make))
        for how, make in (
            ("2^31 pixels a side, none there", lambda: png(2**31 - 1, 2**31 - 1)),
            ("13,000 pixels a side, none there", lambda: png(13_000, 13_000)),
            ("13,000 pixels a side, all there", lambda: png(13_000, 13_000, 13_000)),
            ("9,000 a side, RGBA", lambda: png(9_000, 9_000, 9_000, 8, 6)),
            ("9,000 a side, RGBA of 16 bits", lambda: png(9_000, 9_000, 9_000, 16, 6)),
        )
    ),
    *(
        ("weights.pth", f"{how}", ON_WEIGHTS, written("weights.pth", make))
        for how, make in (
            ("tensors expanded from one number", lambda: weights(expanded)),
            ("20,000 features by strides of zero", lambda: weights(wide)),
            ("2,000 levels", lambda: weights(many_levels)),
            ("without memory", lambda: weights(lambda s: {name: t.to("meta") for name, t in s.items()})),
            ("sparse", lambda: weights(lambda s: s | {FIRST: s[FIRST].to_sparse()})),
            ("1e300 in float64", lambda: weights(huge)),
            ("1 GB of zeros, deflated", packed_bomb),
            ("a pickle that runs", lambda: pickle.dumps(_Runs())),
        )
    ),
    *(
        ("t.npy", f"{how}", ON_TABLE, written("t.npy", make))
        for how, make in (
            ("200,000 rows", lambda: table(200_000)),
            ("10^12 rows", lambda: npy((10**12, 8), "<f8")),
        )
    ),
)  # fmt: skip


def honest_of(start: dict[str, str], words: tuple[str, ...]) -> tuple[dict[str, str], tuple[str, ...]]:
    """A command of the same kind whose files are honest."""
    if words == ON_TABLE[1]:
        return start, (*DRAW, "--seed", "0")
    return ON_IMAGES if words in (ON_IDX[1], ON_GZ[1], ON_FOLDER[1]) else (start, words)


# Large, and what they say is true: megabytes that they may take more, pictures 24 bytes a pixel.
HONEST = {"9,000 a side, RGBA": 1944, "9,000 a side, RGBA of 16 bits": 1944, "200,000 rows": MEGABYTES}


def lie(shop: Shop, number: int, folder: Path) -> None:
    what, how, (start, words), spoil = LIES[number]
    shop.stocked(folder, start)
    spoil(folder)

    def limited() -> None:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + ADDRESSES, resource.RLIM_INFINITY))

    honest = shop.peak(*honest_of(start, words))
    ended = call(folder, words, limited, SECONDS)
    if (folder / "ran").exists():
        raise Lost("code in the file was run")
    if ended.peak > honest + HONEST.get(how, MEGABYTES):
        raise Lost(f"took {ended.peak} MB, an honest file {honest}; ended with {ended.code}: {ended.last()}")
    if ended.code == 0 and how not in HONEST:
        raise Lost("took it in silence")
    if ended.code:
        ended.refusal(what if "." in what else "0.png", "data", "--")


def tries(shop: Shop, wanted: Wanted) -> Iterator[Try]:
    for number, (what, how, (start, words), _) in enumerate(LIES):
        if wanted(CASE, what):
            shop.peak(*honest_of(start, words))
            yield Try(CASE, what, how, lie, (number,))
