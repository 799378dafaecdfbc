"""The tables of exports in README.md: parity and quality of the sprites run's exports, and their speed."""

from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

from bench import store
from bench.interval import measured_by, median_interval
from bench.machine import ROOT
from ddpm.files import read_json

# The machine whose records the documents show; others have a folder of their own beside it.
MACHINE = ROOT / "bench" / "results" / "xeon-2.5ghz-2-cores"
# {precision: manifest.json of `ddpm-export onnx`, less the table's rows}
MANIFESTS = MACHINE / "export_manifests.json"
SPEED = MACHINE / "export.json"
# To be reached on two CPU cores, n_feat 64, 3x16x16: x eager.
GOALS = {
    ("denoiser/batch1", "onnx"): 2.5,
    ("denoiser/batch32", "onnx"): 1.25,
    ("denoiser/batch8", "onnx-int8"): 2.5,
    ("denoiser/batch32", "onnx-int8"): 2.5,
}
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
    steps = manifests["fp32"]["table"]["steps"]
    own = [f"{q['trajectories']['sampler.onnx']:.1f} dB" for q in each]
    lines.append(row(f"PSNR of two samples, {steps} steps", "", own))
    lines.append(row("relative L2 of the network's output", "", [f"{q['relative_l2']:.2g}" for q in each]))
    accuracy = [f"{q['accuracy']:.1%}" for q in each]
    lines.append(row("read as the class asked for", f"{first['accuracy_fp32']:.1%}", accuracy))
    frechet = [f"{q['frechet']:.2f}" for q in each]
    lines.append(row("Frechet distance of pixel features", f"{first['frechet_fp32']:.2f}", frechet))
    sizes = [_megabytes(manifests[precision]) for precision in measured]
    lines.append(row("sampler.onnx", _megabytes(manifests["fp32"]), sizes))
    opening = {precision: f"{manifests[precision]['files']['sampler.onnx']['open_s']:.2g} s" for precision in manifests}
    lines.append(row("to open it", opening["fp32"], [opening[precision] for precision in measured]))
    return "\n".join(lines)


def _megabytes(manifest: dict[str, Any]) -> str:
    return f"{manifest['files']['sampler.onnx']['bytes'] / 1e6:.2f} MB"


def _ratio(base: list[float], samples: list[float]) -> str:
    """How many times as fast, process by process."""
    return median_interval([a / b for a, b in zip(base, samples, strict=True)]).text()


def speed_table(path: Path = SPEED) -> str:
    """`ddpm-bench run --suite export`: wall time and ratio to eager over its processes, beside what was to be reached.

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
        f"`{content['command']}` on {machine['processor']}, {machine['threads']} threads each, torch "
        f"{machine['torch']}, {measured_by(content['processes'])}:",
        "",
        "| | | wall time | x eager | to reach |",
        "|---|---|--:|--:|--:|",
    ]
    for workload, candidates in times.items():
        eager = candidates["eager"]
        for name, samples in candidates.items():
            short, unit = workload.removeprefix("export/"), UNITS[workload.split("/")[1]]
            shown = "" if name == "eager" else _ratio(eager, samples)
            goal = f"{GOALS[short, name]:g}" if (short, name) in GOALS else ""
            lines.append(f"| {short} | {name} | {median(samples) / 1e3:.1f} ms {unit} | {shown} | {goal} |")
    for candidates in times.values():
        if "python-loop" in candidates:
            against = _ratio(candidates["python-loop"], candidates["sampler.onnx"])
            lines += ["", f"sampler.onnx is {against} times as fast as the loop around denoiser.onnx that it replaces."]
    return "\n".join(lines)
