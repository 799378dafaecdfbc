"""Parts `kernels`, `step`, `training` and `profile`: what PyTorch measures.

    python -m bench.gpu.measured PART OUT UNTIL (a Unix time)

Workloads are those of the suites, measured as by `ddpm-bench run`, TF32 off; what there was no time for is under
"skipped". The operators of `kernels` stand beside what the static report predicts for this card.
"""

import gc
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from math import log10
from pathlib import Path
from time import perf_counter, time
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench import kernels as operators
from bench.gpu.command import Record
from bench.measure import matrix_ceiling, measure
from bench.registry import Workload
from bench.static import BASELINE
from bench.static.cards import CARDS
from bench.store import is_good
from bench.suites import cuda, training
from bench.suites.kernels import bench_of
from bench.timing import synchronize
from ddpm.files import read_json

ROUNDS, SECONDS = 20, 4.0  # of one workload, whichever ends first; three rounds are done in any case
# Seconds of a workload whose name ends so, compiling included, before one was measured; untuned. max-autotune's are a
# part's share of the default budget, so that one is begun there.
TAKES = {"engines": 30.0, "autotune-bf16": 80.0, "autotune-fp32": 80.0}
OUT_OF_TIME = "not measured: out of time"
# The sizes that say most about bandwidth first: the smallest are all launch.
SIZES = (10**7, 10**8, 10**6, 10**5, 10**4)
# Operators whose launch the static report calls otherwise than "operator type variant".
STATIC_NAMES = {"q_sample_rows": "q_sample_rows uint8 to {}", "noise_mse_backward": "noise_mse {} backward"}
PROFILED = [(engine, batch) for engine in ("graph", cuda.KERNELS) for batch in (1, 64)]
WARM_UP, STEPS = 2, 10


def measure_all(
    record: Record,
    workloads: Iterable[Workload],
    device: torch.device,
    until: float,
    seed: int,
    more: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> None:
    """Measure those for which there is time; one is on the disk when the next begins. more: what to add to a line."""
    record.keep(seed=seed, tf32=False, product_flops_per_s=matrix_ceiling(device))
    takes, left_out = dict(TAKES), 0
    for workload in workloads:
        if workload.suite != "kernels" and not re.search(record.content["filter"], workload.name):
            continue
        began, kind = time(), workload.name.rsplit("/", 1)[1]
        if began + takes.get(kind, 0.0) > until:
            record.skip(workload.name, OUT_OF_TIME)
            left_out += 1
            continue
        if workload.suite != "kernels":
            # Compiled code and captures of the workload before hold memory, and torch.compile counts its graphs.
            torch._dynamo.reset()
            gc.collect()
            torch.cuda.empty_cache()
        with operators.full_precision():
            found = measure(workload, device, ROUNDS, SECONDS, record.content["product_flops_per_s"])
        record.keep(*({"process": 0} | line | more(line) for line in found))
        takes[kind] = time() - began
    if left_out:
        record.fail(f"out of time: {left_out} workloads not measured")
    else:
        record.keep(complete=True)


def kernels(record: Record, device: torch.device, until: float, sizes: Sequence[int] = SIZES) -> None:
    """Every operator of the suite `kernels` at every size and type, with its eager sequence."""
    elements: dict[str, int] = {}

    def workloads() -> Iterator[Workload]:
        for size in sizes:
            for label, dtype in cuda.TYPES.items():
                for one in operators.workloads(size, dtype, device):
                    name = f"kernels/{one.name}/{label}/1e{round(log10(size))}"
                    elements[name] = one.elements
                    yield Workload(name, "kernels", partial(bench_of, one))

    predict = predictor(torch.cuda.get_device_name(device) if device.type == "cuda" else "", elements)
    measure_all(record, workloads(), device, until, operators.SEED, predict)


def predictor(device: str, elements: Mapping[str, int]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What to add to an operator's line on this device ("NVIDIA H200"): predicted_us, predicted / measured.

    elements: of a workload by name. Nothing where `bench.static` knows no such card or launch.
    """
    card = next((card for name, card in CARDS.items() if re.search(rf"\b{name}\b", device)), None)
    records = read_json(BASELINE)["records"] if card else []
    known = {record["kernel"]: max(card.times(record).values()) for record in records if record["arch"] == card.arch}

    def more(line: dict[str, Any]) -> dict[str, Any]:
        _, kernel, label, _ = line["workload"].split("/")
        operator, _, variant = kernel.partition(" ")
        name = STATIC_NAMES.get(kernel, f"{operator} {{}} {variant}".strip()).format(label)
        if name not in known or line["candidate"] != "operator" or not is_good(line):
            return {}
        predicted = known[name] * elements[line["workload"]] / 1e6
        return {"static": name, "predicted_us": predicted, "predicted_share": predicted / line["kernel_us"]}

    return more


def step(record: Record, device: torch.device, until: float, rows: Sequence[cuda.Row] = cuda.ROWS) -> None:
    """Suite `cuda`, those whose name matches: our engines on all rows, then beside max-autotune."""
    measure_all(record, cuda.workloads(False, device, rows), device, until, cuda.SEED)


def train(record: Record, device: torch.device, until: float, batch: int = training.BATCHES[-1]) -> None:
    """Training steps of the suite `training` as on CUDA, those whose name matches."""
    measure_all(record, training.cuda_workloads(batch), device, until, training.SEED)


def trace(
    record: Record,
    device: torch.device,
    until: float,
    which: Sequence[tuple[str, int]] = tuple(PROFILED),
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Of each (engine, batch size) the time of a step under the profiler, then its kernels, the longest first."""
    record.keep(seed=cuda.SEED, dtype=str(dtype).removeprefix("torch."))
    for engine, batch in which:
        name = f"{engine} batch{batch}"
        call = cuda.trajectory(cuda.Row(name, batch, steps=STEPS), engine, dtype, device)
        for _ in range(WARM_UP):
            call()
        synchronize(device)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            began = perf_counter()
            call()
            synchronize(device)
            wall = perf_counter() - began
        ran = [event for event in profiler.key_averages() if event.device_type == DeviceType.CUDA]
        ran.sort(key=lambda event: -event.self_device_time_total)
        rows = [{"kernel": e.key, "calls": e.count / STEPS, "us": e.self_device_time_total / STEPS} for e in ran]
        busy = {key: sum(row[key] for row in rows) for key in ("calls", "us")}
        record.keep({"workload": name, "kernel": "all", "wall_us": wall * 1e6 / STEPS} | busy)
        record.keep(*({"workload": name} | row for row in rows))
        if not rows:
            record.fail(f"{name}: no kernel in the profile")
    record.keep(complete=True)


MEASURED = {"kernels": kernels, "step": step, "training": train, "profile": trace}

if __name__ == "__main__":
    part, out, until = sys.argv[1:]
    MEASURED[part](Record(Path(out), part).read(), torch.device("cuda"), float(until))
