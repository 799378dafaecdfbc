"""Part `kernels`: every operator's time beside its eager sequence, a copy of the same bytes and the static prediction.

    bound = max(time of the copy, instructions / issue rate)      share of bound = bound / time

The instructions are those of the committed static report, at the card's boost clock; a kernel that is not in it, or a
card, has the copy alone.
"""

import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu.record import Content, Record
from bench.kernels import SEED, measure, workloads
from bench.measure import one_line
from bench.static import BASELINE
from ddpm.files import read_json
from ddpm.progress import Bar

# The sizes that say most about the bounds first: the smallest are all launch.
SIZES = (10**7, 10**8, 10**6, 10**5, 10**4)
TYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDS = 20
# Of the larger bound; times the eager sequence. Convolutions and the like are bound by what is not counted here.
SHARE_GOAL, RATIO_GOAL, WITH_GOALS = 0.85, 3.0, ("q_sample", "noise_mse", "solver_step")
LABELS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# Names in the static report where they are not "operator type variant".
STATIC_NAMES = {"q_sample_rows": "q_sample_rows uint8 to {}", "noise_mse_backward": "noise_mse {} backward"}


def predictions(arch: str, device: str) -> dict[str, dict[str, Any]]:
    """Kernel of the static report -> microseconds per million elements on this device; empty if it is not in there.

    arch: "sm_90"; device: "NVIDIA H200". The values are those of `bench.static.report.predict`.
    """
    found = {}
    for record in read_json(BASELINE)["records"]:
        card = next((name for name in record["cards"] if re.search(rf"\b{name}\b", device)), None)
        if record["arch"] == arch and card is not None:
            found[record["kernel"]] = record["cards"][card]
    return found


def _predictions_here(device: torch.device) -> dict[str, dict[str, Any]]:
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    return predictions(f"sm_{properties.major}{properties.minor}", properties.name)


def beside_static(record: Mapping[str, Any], dtype: torch.dtype, known: Mapping[str, Mapping]) -> dict[str, Any]:
    """A measured record with predicted_us, prediction_error (predicted / measured - 1), bound_us and share_of_bound."""
    operator, _, variant = record["kernel"].partition(" ")
    name = STATIC_NAMES.get(record["kernel"], f"{operator} {{}} {variant}".strip()).format(LABELS[dtype])
    if not record["parity"]:
        return dict(record)
    measured, bound = record["kernel_us"]["median"], record["copy_us"]["median"]
    added: dict[str, Any] = {"static": None}
    if name in known:
        card, millions = known[name], record["elements"] / 1e6
        predicted = card[f"{card['binds']}_us"] * millions
        bound = max(bound, card["issue_us"] * millions)
        added = {"static": name, "predicted_us": predicted, "prediction_error": predicted / measured - 1}
    return {**record, **added, "bound_us": bound, "share_of_bound": bound / measured}


def run_kernels(
    out: Path,
    device: torch.device,
    seconds: float,
    sizes: Sequence[int] = SIZES,
    types: Sequence[torch.dtype] = TYPES,
    rounds: int = ROUNDS,
) -> Content:
    """Measure every operator at every size and type into out/kernels.json, and return its content.

    When `seconds` are over it says so, and leaves "complete" false.
    """
    began = time.monotonic()
    known = _predictions_here(device)
    record = Record.start(out, "kernels", seconds, device, seed=SEED, tf32=False)
    if not known:
        record.skip("prediction", "the static report has no such card")
    cases = [(size, dtype) for size in sizes for dtype in types]
    with Bar("kernels", len(cases), "cases/s") as bar:
        for done, (size, dtype) in enumerate(cases, start=1):
            for workload in workloads(size, dtype, device):
                if time.monotonic() - began > seconds:
                    record.fail(f"out of time in case {done} of {len(cases)}")
                    return record.content
                try:
                    measured = measure(workload, device, rounds)
                    record.add({"size": size} | beside_static(measured, dtype, known))
                except Exception as error:  # the others are measured all the same
                    head = {"size": size, "kernel": workload.name, "dtype": str(dtype).removeprefix("torch.")}
                    reason = one_line(error)
                    record.add(head | {"failed": reason})
                    print(f"{workload.name} {LABELS[dtype]}: {reason}", file=sys.stderr)
            bar.update(done)
    record.finish()
    return record.content


def _cell(record: Mapping[str, Any], key: str, goal: float, form: str) -> str:
    """A figure, with a ! where it misses a goal that its kernel has."""
    if key not in record:
        return "- "
    missed = record[key] < goal and record["kernel"].startswith(WITH_GOALS)
    return f"{record[key]:{form}}{'!' if missed else ' '}"


def table(content: Content) -> str:
    """A line per operator and type: share of the larger bound and ratio to eager by size; ! misses the goal."""
    rows: dict[str, dict[int, Mapping[str, Any]]] = {}
    for record in content["records"]:
        rows.setdefault(f"{record['kernel']} {record['dtype']}", {})[record["size"]] = record
    sizes = sorted({size for by_size in rows.values() for size in by_size})
    columns = "".join(f"{size:>8.0e}" for size in sizes)
    width = max(map(len, rows), default=0)
    lines = [
        f"share of the larger bound, to reach {SHARE_GOAL:.0%} | times eager, to reach {RATIO_GOAL:g} | "
        "error of the prediction at the largest size",
        f"{'elements':{width}s}{columns}  |{columns}  |",
    ]
    for name, by_size in sorted(rows.items()):
        here = [by_size.get(size, {}) for size in sizes]
        shares = "".join(f"{_cell(record, 'share_of_bound', SHARE_GOAL, '.0%'):>8s}" for record in here)
        ratios = "".join(f"{_cell(record, 'ratio_to_eager', RATIO_GOAL, '.2f'):>8s}" for record in here)
        error = here[-1].get("prediction_error")
        lines.append(f"{name:{width}s}{shares}  |{ratios}  |{'-' if error is None else f'{error:+.0%}':>7s}")
        for size, record in by_size.items():
            if "failed" in record:
                lines.append(f"  {size:.0e} failed: {record['failed']}")
            elif not record["parity"]:
                lines.append(f"  {size:.0e} parity failed: {record['error']:.2g} > {record['tolerance']:.2g}, no ratio")
    return "\n".join(lines)
