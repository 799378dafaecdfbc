"""What runs the exported files, and how far each is from PyTorch: docs/export.md has the table.

    PYTHONPATH=. python tests/clients.py --out bench/results/clients.jsonl --keep FOLDER

A small network is trained on digits and exported in every way; each client runs each file on the same numbers, in a
process of its own. Expected is what the eager engine draws in float64. pip and npm install the clients, into FOLDER if
one is given; the browser is a Chromium that is there. The record has a line for each client and file, `--only NAME`
renews those of clients with NAME in theirs. `make report` makes the table, test_clients.py says if it is too old.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any

import numpy as np
import torch

from bench.machine import describe
from ddpm import commands, runs
from ddpm.metrics import distance, psnr
from ddpm.networks.protocol import network_times, one_hot_conditions
from ddpm.sampling import sample
from export import cli
from export.run import normals, step_noise
from export.verification import DENOISER_TOLERANCE, FLOORS, PSNR_MOST, SAMPLER_TOLERANCE
from tests.environments import ENDS, overlay
from tests.records import code_digest, put

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "tests" / "clients"
# What a file's graph looks like is decided here.
GRAPH = tuple(
    ROOT / "export" / f"{name}.py" for name in ("graph", "conditions", "models", "philox_graph", "precision", "traced")
)
LIMIT = 900  # seconds for one file: seconds are usual, so this is a client that hangs
TRAIN = "--data digits --n-feat 16 --epochs 4 --timesteps 100 --schedule cosine --prediction v --seed 0"
EXPORT = "--solver ddpm --steps 20 --clip 1 --no-verify"
PRECISIONS, NOISES = ("fp32", "fp16", "int8"), ("philox", "input")
# Above 2^32, where it shows who cuts integers.
SEED, SAMPLES, GUIDANCE = 1_234_567_890_123, 2**32 + np.arange(-2, 2), 2.0
GIVEN = "sampler.onnx, `--noise input`"
FILES = ("denoiser.onnx", "step.onnx", "sampler.onnx", GIVEN)

# file; feeds {name: {dtype, shape, values}}; loops, after each of which carry {input: output} applies; output.
Case = dict[str, Any]
Result = dict[str, Any]  # see clients/client.py


@dataclass(frozen=True)
class Exported:
    """A file, what to do with it, and what must come out."""

    file: str
    precision: str
    case: Case
    expected: np.ndarray

    def line(self, client: str, result: Result) -> dict[str, Any]:
        """Of the record: error and psnr_db are None where there are no numbers, or others than finite ones."""
        values = np.array(result["values"], float)
        error = decibels = None
        if values.size == self.expected.size and np.isfinite(values).all():
            found = values.reshape(self.expected.shape)
            error, decibels = distance(found, self.expected), min(psnr(found, self.expected), PSNR_MOST)
        return {
            "client": client,
            "file": self.file,
            "precision": self.precision,
            "version": result["version"],
            "loaded": result["loaded"],
            "reason": result["reason"] and few_words(result["reason"]),
            "error": error,
            "psnr_db": decibels,
            "right": error is not None and self._is_right(error, decibels),
        }

    def _is_right(self, error: float, decibels: float) -> bool:
        """By what `ddpm-export onnx` demands of the file itself."""
        if self.precision == "fp32":
            return error <= (DENOISER_TOLERANCE if self.file == "denoiser.onnx" else SAMPLER_TOLERANCE)
        return decibels >= FLOORS[self.precision].psnr_db


# What is no reason: places in a client's source, its preambles, folders, the numbers of our nodes.
NO_REASON = re.compile(
    r"Stack backtrace:.*|Summary:.*|Caused by:|Can't create a session\. ERROR_CODE: \d+, ERROR_MESSAGE:"
    r"|Exception from \S+:\d+:|Check '.*?' failed at \S+:\d+:|FrontEnd API failed with \w+:"
    r"|Model wasn't fully converted\. Failed operations detailed log:|-- \S+ with a message:"
    r"|While validating ONNX node '.*?':|\S+\.cc:\d+ (?:.*? was false\.|\w+ )|(?<![\w.])/\S*/|(?<=[a-z])_\d+\b",
    re.S,
)


def few_words(reason: str) -> str:
    """A client's reason in one line."""
    return " ".join(NO_REASON.sub("", reason).split())[:200]


def export_all(folder: Path) -> Iterator[Exported]:
    """The files of a network that is trained now, in every precision."""
    run, made = folder / "run", folder / "exported"
    _succeed(commands.main, f"train {TRAIN} --out {run}")
    for noise in NOISES:
        for precision in PRECISIONS:
            out = made / noise / precision
            _succeed(cli.main, f"onnx {run} {EXPORT} --precision {precision} --noise {noise} --out {out}")
    opened = runs.load_run(run)
    rows = np.array(json.loads((out / "manifest.json").read_text())["table"]["rows"], np.float32)
    cases = _cases(opened, rows)
    expected = _expected(opened, cases["denoiser.onnx"]["feeds"])
    for precision in PRECISIONS:
        for file, case in cases.items():
            path = made / NOISES[file == GIVEN] / precision / file.partition(",")[0]
            feeds = {
                name: {"dtype": str(array.dtype), "shape": array.shape, "values": array.ravel().tolist()}
                for name, array in case["feeds"].items()
            }
            yield Exported(file, precision, case | {"file": str(path), "feeds": feeds}, expected[file != FILES[0]])


def _succeed(main: Callable[[list[str]], int], line: str) -> None:
    if main(line.split()):
        raise SystemExit(f"error: {line}: failed")


def _cases(run: runs.Run, rows: np.ndarray) -> dict[str, Case]:
    """Of each file, feeds still as arrays."""
    n, shape = len(SAMPLES), run.model.sample_shape
    x, noise = normals(SEED, SAMPLES, 0, 0, shape), step_noise(rows, SEED, SAMPLES, shape)
    times = network_times(
        run.model, torch.linspace(1, run.schedule.timesteps, n).round().long(), run.schedule.timesteps
    )
    context = one_hot_conditions(run.model, torch.from_numpy(SAMPLES)).numpy()
    guided = {"context": context, "guidance": np.array(GUIDANCE, np.float32)}
    once = {"loops": 1, "carry": {}, "output": "images"}
    step = {
        "x": x, "x0_previous": np.zeros_like(x), "index": np.zeros(1, np.int64), "noise": noise,
        "noise_start": np.zeros(1, np.int64), "contexts": np.stack([context, np.zeros_like(context)]),
        "guidance": np.array([GUIDANCE], np.float32),
    }  # fmt: skip
    carry = {"x": "x_next", "x0_previous": "x0", "index": "index_next"}
    drawn = {"seed": np.array(SEED), "first_sample": np.array(SAMPLES[0])} | guided
    return {
        "denoiser.onnx": once | {"feeds": {"x": x, "t": times.float().numpy(), "context": context}, "output": "m"},
        "step.onnx": {"feeds": step, "loops": len(rows), "carry": carry, "output": "x_next"},
        "sampler.onnx": once | {"feeds": drawn},
        GIVEN: once | {"feeds": {"x_T": x, "noise": noise} | guided},
    }


def _expected(run: runs.Run, call: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """In float64, of the network's call and of the samples."""
    options = run.options(solver="ddpm", steps=20, clip=1.0)
    given = {"context": torch.from_numpy(call["context"]), "guidance": GUIDANCE, "seed": SEED}
    images = sample(
        run.model, run.schedule, len(SAMPLES), engine="eager", dtype=torch.float64, first_sample=int(SAMPLES[0]),
        **given, **options,
    )  # fmt: skip
    with torch.no_grad():
        m = run.model.double()(*(torch.from_numpy(call[name]).double() for name in ("x", "t", "context")))
    return m.numpy(), images.numpy()


# --- the clients ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where clients are kept, and where one works."""

    kept: Path
    work: Path

    def python(self, *packages: str) -> Path:
        """A Python with these packages, NAME==VERSION, over those that are here."""
        folder = self.kept / "-".join(packages).replace("==", "-")
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            overlay(folder, dict(package.split("==") for package in packages))
            (folder / "done").touch()
        return folder / "bin" / "python"

    def npm(self, package: str) -> Path:
        """A folder whose node_modules has this package, NAME@VERSION; no script of it is run, which would load more."""
        folder = self.kept / package
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            (folder / "package.json").write_text("{}")
            subprocess.run(
                ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", package], cwd=folder, check=True
            )
            (folder / "done").touch()
        return folder


def _printed(*command: str | Path) -> Result:
    """What a process prints last; if it dies or hangs, that is the reason."""
    failed = {"version": None, "loaded": False, "values": []}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return failed | {"reason": f"no answer in {LIMIT} s"}
    if done.returncode:
        return failed | {"reason": f"exit code {done.returncode}: {done.stderr[-300:]}"}
    return json.loads(done.stdout.splitlines()[-1])


def python(client: str, *packages: str) -> Callable[[Place], Result]:
    return lambda place: _printed(
        place.python(*packages) if packages else sys.executable, HERE / "client.py", client, place.work / "case.json"
    )


def node(package: str) -> Callable[[Place], Result]:
    return lambda place: _printed("node", HERE / "node.mjs", place.npm(package), place.work / "case.json")


def browser(package: str, build: str, provider: str) -> Callable[[Place], Result]:
    def run(place: Place) -> Result:
        links = {"ort": place.npm(package) / "node_modules" / package.partition("@")[0] / "dist"}
        links |= {name: HERE / name for name in ("page.html", "run.mjs")}
        for name, target in links.items():
            (place.work / name).unlink(missing_ok=True)
            (place.work / name).symlink_to(target)
        with (
            serving(place.work) as (address, results),
            chromium(f"{address}/page.html?build={build}&provider={provider}"),
        ):
            try:
                return results.get(timeout=LIMIT)
            except Empty:
                return {"version": None, "loaded": False, "values": [], "reason": f"no answer in {LIMIT} s"}

    return run


class _Handler(SimpleHTTPRequestHandler):
    """Files, and the results that a page posts."""

    def __init__(self, *arguments: Any, results: Queue[Result], **more: Any) -> None:
        self.results = results
        super().__init__(*arguments, **more)

    def do_POST(self) -> None:
        self.results.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *words: object) -> None:
        """Nothing."""


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, Queue[Result]]]:
    """The address of a folder on this machine, and what is posted to it."""
    results: Queue[Result] = Queue()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(folder), results=results)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", results
        finally:
            server.shutdown()


@contextmanager
def chromium(address: str) -> Iterator[None]:
    """A page open in a browser without a window; WebGPU is computed by the processor where there is no card."""
    with tempfile.TemporaryDirectory(prefix="profile-", ignore_cleanup_errors=True) as profile:
        own = ["--headless", "--no-sandbox", f"--user-data-dir={profile}", "--disable-background-networking"]
        line = ["chromium", *own, "--enable-unsafe-webgpu", address]
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


WEB = "onnxruntime-web@1.30.0"
CLIENTS: dict[str, Callable[[Place], Result]] = {
    "onnxruntime, oldest": python("onnxruntime", f"onnxruntime=={ENDS['oldest']['onnxruntime']}"),
    "onnxruntime, newest": python("onnxruntime", f"onnxruntime=={ENDS['newest']['onnxruntime']}"),
    "onnxruntime-node": node("onnxruntime-node@1.30.0"),
    "onnxruntime-web in Chromium, wasm": browser(WEB, "ort.wasm.min.mjs", "wasm"),
    "onnxruntime-web/webgpu in Chromium, WebGPU": browser(WEB, "ort.webgpu.min.mjs", "webgpu"),
    "onnxruntime-web in Chromium, WebGPU": browser(WEB, "ort.min.mjs", "webgpu"),
    "OpenVINO, CPU": python("openvino", "openvino==2026.4.1"),
    "tract": python("tract", "tract==0.23.9"),
    "onnx ReferenceEvaluator": python("reference"),
}


# --- the record -----------------------------------------------------------------------------------------------------


def stored(path: Path, line: dict[str, Any]) -> None:
    """Put a line into the record, in place of an older one of the same client and file."""

    def place(line: dict[str, Any]) -> tuple[int, ...] | None:
        names = (list(CLIENTS), line["client"]), (PRECISIONS, line["precision"]), (FILES, line["file"])
        return tuple(known.index(name) for known, name in names) if line["client"] in CLIENTS else None

    put(path, line, place)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="clients whose name has this in it")
    parser.add_argument("--out", type=Path, metavar="F.jsonl", help="the record, which lines are added to")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="what is installed, for the next time")
    asked = parser.parse_args(arguments)
    names = [name for name in CLIENTS if not asked.only or any(part in name for part in asked.only)]
    if not names:
        parser.error(f"--only: needs a part of one of {', '.join(CLIENTS)}")
    missing = [program for program in ("node", "npm", "chromium") if not shutil.which(program)]
    if missing and any("-node" in name or "-web" in name for name in names):
        parser.error(f"{', '.join(missing)}: not found, needs to be installed (or --only other clients)")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a browser would go on
    machine = describe(torch.device("cpu"))
    about = {key: machine.get(key) for key in ("commit", "dirty", "processor", "torch")} | {"graph": code_digest(GRAPH)}
    lines = []
    with tempfile.TemporaryDirectory(prefix="clients-") as folder:
        work = Path(folder).resolve()
        place = Place((asked.keep or work / "kept").resolve(), work)
        for exported in export_all(work):
            (work / "case.json").write_text(json.dumps(exported.case))
            (work / "model.onnx").unlink(missing_ok=True)
            (work / "model.onnx").symlink_to(exported.case["file"])
            for name in names:
                date = datetime.now(UTC).isoformat(timespec="seconds")
                line = {"date": date} | exported.line(name, CLIENTS[name](place)) | about
                lines.append(line)
                if asked.out:
                    stored(asked.out, line)
                print(*(line[key] for key in ("precision", "file", "client", "error", "reason")), sep="  ", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
