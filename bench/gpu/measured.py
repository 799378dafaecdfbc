"""Parts `kernels`, `step` and `training`, and the kernels of a step for `profile`: what PyTorch measures.

    python -m bench.gpu.measured PART OUT UNTIL (a Unix time)

Workloads are those of the suites, measured as by `ddpm-bench run`, TF32 off; what there was no time for is under
"skipped". The operators of `kernels` stand beside a bound and the static prediction,

    bound = max(time of a copy of the same bytes, instructions / issue rate)      share of bound = bound / time

with the instructions of the committed static report at the card's boost clock; a kernel that is not in it, or a card,
has the copy alone.
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
from bench.gpu.record import Record
from bench.measure import matrix_ceiling, measure
from bench.registry import Workload
from bench.static import BASELINE
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
# The sizes that say most about the bounds first: the smallest are all launch.
SIZES = (10**7, 10**8, 10**6, 10**5, 10**4)
# Names in the static report where they are not "operator type variant".
STATIC_NAMES = {"q_sample_rows": "q_sample_rows uint8 to {}", "noise_mse_backward": "noise_mse {} backward"}
PROFILED = [(engine, batch) for engine in ("graph", cuda.KERNELS) for batch in (1, 64)]
WARM_UP, STEPS = 2, 10


def measure_all(
    record: Record,
    workloads: Iterable[Workload],
    device: torch.device,
    until: float,
    more: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> None:
    """Measure those for which there is time; one is on the disk when the next begins. more: completes a record."""
    record.keep(tf32=False, product_flops_per_s=matrix_ceiling(device))
    takes, left_out = dict(TAKES), 0
    for workload in workloads:
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
        record.keep(*({"process": 0} | more(line) for line in found))
        takes[kind] = time() - began
    if left_out:
        record.fail(f"out of time: {left_out} workloads not measured")
    else:
        record.keep(complete=True)


def kernels(record: Record, device: torch.device, until: float, sizes: Sequence[int] = SIZES) -> None:
    """Every operator of the suite `kernels` at every size and type, with its eager sequence and its bounds."""
    record.keep(seed=operators.SEED)
    known, elements = {}, {}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        known = predictions(f"sm_{card.major}{card.minor}", card.name)
    if not known:
        record.skip("prediction", "the static report has no such card")

    def workloads() -> Iterator[Workload]:
        for size in sizes:
            for label, dtype in cuda.TYPES.items():
                for one in operators.workloads(size, dtype, device):
                    name = f"kernels/{one.name}/{label}/1e{round(log10(size))}"
                    elements[name] = one.elements
                    yield Workload(name, "kernels", partial(bench_of, one))

    measure_all(record, workloads(), device, until, lambda r: beside_static(r, elements[r["workload"]], known))


def predictions(arch: str, device: str) -> dict[str, dict[str, Any]]:
    """Kernel of the static report -> microseconds per million elements on this device; empty if it is not in there.

    arch: "sm_90"; device: "NVIDIA H200". The values are as in the report: issue_us, .., bytes_us, binds.
    """
    found = {}
    for record in read_json(BASELINE)["records"]:
        card = next((name for name in record["cards"] if re.search(rf"\b{name}\b", device)), None)
        if record["arch"] == arch and card is not None:
            found[record["kernel"]] = record["cards"][card]
    return found


def beside_static(record: dict[str, Any], elements: int, known: Mapping[str, Mapping]) -> dict[str, Any]:
    """An operator's record with predicted_us, prediction_error (predicted / measured - 1), bound_us, share_of_bound."""
    if not is_good(record) or record["candidate"] != "operator":
        return record
    _, kernel, label, _ = record["workload"].split("/")
    operator, _, variant = kernel.partition(" ")
    name = STATIC_NAMES.get(kernel, f"{operator} {{}} {variant}".strip()).format(label)
    measured, bound = record["kernel_us"], record["share_of_copy"] * record["kernel_us"]
    added: dict[str, Any] = {"static": None}
    if name in known:
        card, millions = known[name], elements / 1e6
        predicted = card[f"{card['binds']}_us"] * millions
        bound = max(bound, card["issue_us"] * millions)
        added = {"static": name, "predicted_us": predicted, "prediction_error": predicted / measured - 1}
    return record | added | {"bound_us": bound, "share_of_bound": bound / measured}


def step(record: Record, device: torch.device, until: float, rows: Sequence[cuda.Row] = cuda.ROWS) -> None:
    """Suite `cuda`, those whose name matches: our engines on all rows, then beside max-autotune."""
    record.keep(seed=cuda.SEED)
    measure_all(record, _matching(record, cuda.workloads(False, device, rows)), device, until)


def train(record: Record, device: torch.device, until: float, batch: int = training.BATCHES[-1]) -> None:
    """Training steps of the suite `training` as on CUDA, those whose name matches."""
    record.keep(seed=training.SEED)
    measure_all(record, _matching(record, training.cuda_workloads(batch)), device, until)


def _matching(record: Record, workloads: Sequence[Workload]) -> list[Workload]:
    return [workload for workload in workloads if re.search(record.content["filter"], workload.name)]


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
        call = cuda.trajectory(cuda.Row(name, batch), engine, dtype, device, STEPS)
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
        busy = {"calls": sum(row["calls"] for row in rows), "us": sum(row["us"] for row in rows)}
        record.keep({"workload": name, "kernel": "all", "wall_us": wall * 1e6 / STEPS} | busy)
        record.keep(*({"workload": name} | row for row in rows))
        if not rows:
            record.fail(f"{name}: no kernel in the profile")


MEASURED = {"kernels": kernels, "step": step, "training": train, "profile": trace}

if __name__ == "__main__":
    part, out, until = sys.argv[1:]
    MEASURED[part](Record(Path(out), part).read(), torch.device("cuda"), float(until))
