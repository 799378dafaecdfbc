"""The tables of exports in README.md: parity and quality of the sprites run's exports, and their speed."""

from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

from bench import store
from bench.machine import ROOT
from ddpm.files import read_json

# The machine whose records the documents show; others have a folder of their own beside it.
MACHINE = ROOT / "bench" / "results" / "xeon-2.5ghz-2-cores"
# {precision: manifest.json of `ddpm-export onnx`, less the table's rows}
MANIFESTS = MACHINE / "export_manifests.json"
SPEED = MACHINE / "export.json"
UNITS = {"denoiser": "a call", "sampler": "a step"}


def parity_table(path: Path = MANIFESTS) -> str:
    """fp32's distances from the eager run, and what the lower precisions cost."""
    manifests = read_json(path)
    lines = ["| fp32 against eager PyTorch | max difference / max(1, max value) | allowed |", "|---|--:|--:|"]
    lines += [
        f"| {result['name']} | {result['error']:.1e} | {result['tolerance']:.0e} |"
        for result in manifests["fp32"]["parity"]
    ]
    measured = {precision: manifest["quality"] for precision, manifest in manifests.items() if manifest["quality"]}
    first = next(iter(measured.values()))
    recipe = f"{first['samples']} samples, {first['solver']}, {first['steps']} steps, guidance {first['guidance']:g}"
    lines += ["", f"| {recipe} | fp32 | {' | '.join(measured)} |", f"|---|--:{'|--:' * len(measured)}|"]

    def row(name: str, exact: str, cells: list[str]) -> str:
        return f"| {name} | {exact} | {' | '.join(cells)} |"

    each = list(measured.values())
    lines.append(row("PSNR against eager", "", [f"{q['psnr_db']:.1f} dB" for q in each]))
    lines.append(row("relative L2 of the network's output", "", [f"{q['relative_l2']:.2g}" for q in each]))
    accuracy = [f"{q['accuracy']:.1%}" for q in each]
    lines.append(row("read as the class asked for", f"{first['accuracy_fp32']:.1%}", accuracy))
    frechet = [f"{q['frechet']:.2f}" for q in each]
    lines.append(row("Frechet distance of pixel features", f"{first['frechet_fp32']:.2f}", frechet))
    sizes = [_megabytes(manifests[precision]) for precision in measured]
    lines.append(row("sampler.onnx", _megabytes(manifests["fp32"]), sizes))
    return "\n".join(lines)


def _megabytes(manifest: dict[str, Any]) -> str:
    return f"{manifest['files']['sampler.onnx']['bytes'] / 1e6:.2f} MB"


def speed_table(path: Path = SPEED) -> str:
    """`ddpm-bench run --suite export`: wall time and ratio to eager, medians over its processes.

    Raises ValueError if a row of it did not run or lost parity.
    """
    content = read_json(path)
    times: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in content["records"]:
        if not store.is_good(record):
            raise ValueError(f"{path.name}: {record['workload']} {record['candidate']} failed, needs a whole run")
        times[record["workload"]][record["candidate"]].append(record["wall_us"])
    machine = content["machine"]
    lines = [
        f"{machine['processor']}, {machine['threads']} threads each, torch {machine['torch']}:",
        "",
        "| | | wall time | x eager |",
        "|---|---|--:|--:|",
    ]
    for workload, candidates in times.items():
        eager = candidates["eager"]
        for name, samples in candidates.items():
            ratio = median(a / b for a, b in zip(eager, samples, strict=True))
            unit = UNITS[workload.split("/")[1]]
            shown = "" if name == "eager" else f"{ratio:.2f}"
            lines.append(
                f"| {workload.removeprefix('export/')} | {name} | {median(samples) / 1e3:.1f} ms {unit} | {shown} |"
            )
    return "\n".join(lines)
