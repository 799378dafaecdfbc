"""`ddpm-bench report`: the figures in README.md and docs/*.md, from stored records, wherever their block stands.

<!-- NAME --> ... <!-- /NAME -->        each on a line of its own; NAME is a key of BLOCKS
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench import store
from bench.goals import goals_table
from bench.interval import measured_by, median_interval
from bench.machine import ROOT
from bench.profile import summary
from bench.show import Table, middle, run_table, where
from bench.static.cards import CARDS
from bench.suites.networks import NETWORK
from ddpm.errors import WorkFailed
from ddpm.files import read_json, write_text

RESULTS, DOCS = ROOT / "bench" / "results", ROOT / "docs"
# Machines have a folder of their own each. This one has suites `--quick`, `peers`, `networks` and `sampling`,
MACHINE = RESULTS / "epyc-2-cores"
RUN, PEERS, NETWORK_SPEED, SAMPLING = (MACHINE / f"{name}.jsonl" for name in ("run", "peers", "networks", "sampling"))
# what tests/bench/planted.py writes, a comparison a line, and tests/reliability.py, a case and command a line;
PLANTED, RELIABILITY = MACHINE / "planted.jsonl", MACHINE / "reliability.jsonl"
# this one suite `export`, and {precision: manifest.json of `ddpm-export onnx`, less the table's rows}.
OTHER_MACHINE = RESULTS / "xeon-2.5ghz-2-cores"
EXPORT, MANIFESTS = OTHER_MACHINE / "export.jsonl", OTHER_MACHINE / "export_manifests.json"
# Written by tests/clients.py, a client and a file a line.
CLIENTS = RESULTS / "clients.jsonl"
# Written by tests/networks.py, a network a line.
NETWORKS = RESULTS / "networks.jsonl"
KERNEL_ARCH, KERNEL_CARD = "sm_90", "H200"
# One row per operator and variant that matters; `make static` prints all.
KERNELS = (
    "q_sample fp32", "q_sample bf16", "q_sample uint8 to bf16", "q_sample fp32 ragged", "q_sample fp32 channels_last",
    "q_sample_rows uint8 to bf16", "q_sample_rows uint8, flip, noise",
    "noise_mse bf16", "noise_mse bf16 backward", "noise_mse fp32 channels_last",
    "solver_step fp32", "solver_step fp32 full", "solver_step bf16", "solver_step fp32 channels_last",
    "guidance_rescale fp32", "group_norm_relu bf16", "bottleneck bf16",
    "convolution bf16", "convolution bf16 two sources",
)  # fmt: skip
# The README's four rows: what it is, its workload in PEERS.
SUMMARY = (
    ("1 image", "peers/ddim10/batch1"),
    ("8 images", "peers/ddim10/batch8"),
    ("32 images", "peers/ddim10/batch32"),
    ("32 images with guidance", "peers/ddpm10/guided/batch32"),
)
SHOWN = "native"  # the engine there
BESIDE = ("compile", "torch.compile of eager", "diffusers", "onnxruntime", "openvino")  # how other candidates begin
Rows = Mapping[str, list[Mapping[str, Any]]]


def _stored(path: Path) -> tuple[store.Content, Rows]:
    """(a stored file, its records by row), all of it measured. Raises WorkFailed if a row failed or lost parity."""
    content = store.load(path)
    bad = [store.row_of(record) for record in content["records"] if not store.is_good(record)]
    if bad:
        raise WorkFailed(f"{path.name}: no figures for {', '.join(bad)}; needs a run without failures")
    return content, store.rows(content["records"])


def _ratios(found: Rows, workload: str) -> dict[str, str]:
    """{candidate: its ratio to eager} of a workload, as stored."""
    ratios = {}
    for key, records in found.items():
        name = key.removeprefix(f"{workload} ")
        if name not in (key, "eager"):
            ratios[name] = median_interval([record["speed_up"] for record in records]).text()
    return ratios


def summary_table() -> str:
    """The README's first figures: what a step takes, how that compares with eager, and what others bring."""
    content, found = _stored(PEERS)
    rows = []
    for what, workload in SUMMARY:
        eager, ours = (found[f"{workload} {name}"] for name in ("eager", SHOWN))
        ratios = _ratios(found, workload)
        times = (f"{middle(some, 'kernel_us') * 1e-3:.3g}" for some in (eager, ours))
        error = max(record["error"] for record in ours)
        beside = [next((ratios[k].split()[0] for k in ratios if k.startswith(name)), "-") for name in BESIDE]
        rows.append([what, *times, f"{error:.1e}", ratios[SHOWN], *beside])
    headings = ("one sampling step", "eager, ms", f"`{SHOWN}`, ms", "max. difference", f"`{SHOWN}`, x eager", *BESIDE)
    caption = (
        f"{NETWORK}, float32, on {where(content['machine'])}: {measured_by(content['processes'])}, each with eager and "
        "all others in it (suite `peers`). `native` and `compile` are engines of ours, the former the default on CPUs; "
        "the runtimes run the exported network. The difference is max |difference| / max(1, max |eager|) after the ten "
        "steps that were timed."
    )
    return f"{Table(headings, 'lrrrrl', rows).markdown()}\n\n{caption}"


def peers_table(content: store.Content) -> str:
    """Every workload of suite `peers`: eager's time of a step, and the ratios of all candidates to it."""
    found = store.rows(content["records"])
    workloads = list(dict.fromkeys(record["workload"] for record in content["records"]))
    ratios = {workload: _ratios(found, workload) for workload in workloads}
    names = list(dict.fromkeys(name for each in ratios.values() for name in each))
    rows = [
        [workload, f"{middle(found[f'{workload} eager'], 'kernel_us') * 1e-3:.3g}"]
        + [ratios[workload].get(name, "-").split()[0] for name in names]
        for workload in workloads
    ]
    return Table(("workload", "eager, ms", *names), "l", rows).markdown()


def kernel_table() -> str:
    """Instructions per element, registers and spills of the main kernels on one architecture."""
    records = {r["kernel"]: r for r in read_json(RESULTS / "static.json")["records"] if r["arch"] == KERNEL_ARCH}
    rows = [
        [
            record["kernel"],
            f"{record['instructions_per_element']:.1f}",
            str(record["registers"]),
            str(record["spill_store_bytes"] + record["spill_load_bytes"]),
            f"{record['bytes_per_element']:g}",
            max(times := CARDS[KERNEL_CARD].times(record), key=times.__getitem__),
        ]
        for record in map(records.__getitem__, KERNELS)
    ]
    headings = (f"kernel ({KERNEL_ARCH})", "SASS instructions per element", "registers", "spills")
    return Table((*headings, "bytes per element", f"binds on an {KERNEL_CARD}"), "l", rows).markdown()


def sprites_table() -> str:
    """`ddpm evaluate` of the sprites run."""
    record = read_json(DOCS / "sprites.json")
    recipe = f"{record['n']} samples, {record['solver']}, {record['steps']} steps, guidance {record['guidance']:g}"
    rows = [
        ["Frechet distance of pixel features", f"{record['frechet']:.2f}", f"{record['frechet_real']:.2f}"],
        ["class accuracy (SVM)", f"{record['accuracy']:.1%}", f"{record['accuracy_real']:.1%}"],
    ]
    return Table((f"sprites ({recipe})", "samples", "real data"), "l", rows).markdown()


def profile_block() -> str:
    """What `ddpm-bench profile` printed."""
    record = read_json(DOCS / "profile" / "profile.json")
    return f"`{record['command']}`:\n\n```text\n{summary(record)}\n```"


def _missing(path: Path) -> str:
    return f"Not measured yet: the record {path.relative_to(ROOT)} is missing."


def run_block(path: Path, table: Callable[[store.Content], str] = lambda of: run_table(of)[0].markdown()) -> str:
    """A stored `ddpm-bench run`: the command, where it ran and how often, and its table."""
    content, _ = _stored(path)
    how = "" if content["processes"] == 1 else f", {measured_by(content['processes'])}"
    recipe = f"`{content['command']}` on {where(content['machine'])}{how}"
    return f"{recipe}:\n\n{table(content)}"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a record that is made by a script of the tests."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def planted_outcome(line: Mapping[str, Any]) -> str:
    """Of one comparison with something planted: caught or missed, of a harmless change passed or false."""
    good, bad = ("passed", "false") if line["kind"] == "harmless" else ("caught", "missed")
    return good if line["as_expected"] else bad


def planted_summary(lines: Sequence[Mapping[str, Any]]) -> str:
    """How many of all comparisons were caught, missed and false."""
    outcomes = Counter(map(planted_outcome, lines))
    planted, harmless = (sum(outcomes[kind] for kind in pair) for pair in (("caught", "missed"), ("passed", "false")))
    small = [planted_outcome(line) for line in lines if line["kind"] == "10%"]
    return (
        f"caught {outcomes['caught']}, missed {outcomes['missed']} of {planted} planted (of those of 10% caught "
        f"{small.count('caught')} of {len(small)}); false {outcomes['false']} of {harmless} harmless"
    )


def planted_table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """Comparisons with something planted, by what it was; empty cells for what cannot happen to it."""
    rows = []
    for name in dict.fromkeys(line["plant"] for line in lines):
        same = [line for line in lines if line["plant"] == name]
        outcomes = Counter(map(planted_outcome, same))
        kinds = ("false",) if same[0]["kind"] == "harmless" else ("caught", "missed")
        counts = [str(outcomes[kind]) if kind in kinds else "" for kind in ("caught", "missed", "false")]
        seconds = f"{median(line['seconds'] for line in same):.0f}"
        rows.append([name, str(same[0]["expected"]), str(len(same)), *counts, seconds])
    return Table(("planted", "exit code", "comparisons", "caught", "missed", "false", "seconds"), "lrrrrrr", rows)


def planted_block() -> str:
    """The stored proof of `compare`, or that there is none."""
    if not PLANTED.exists():
        return _missing(PLANTED)
    lines = read_lines(PLANTED)
    first, loads = lines[0], [line["load"] for line in lines]
    under = sum(line["loaded"] for line in lines)
    return (
        f"{first['processor']}, {first['cores']} cores, torch {first['torch']}; load {min(loads):.1f} to "
        f"{max(loads):.1f}, {under} of {len(lines)} comparisons beside processes that keep every core busy half of the "
        f"time:\n\n{planted_table(lines).markdown()}\n\n{planted_summary(lines).capitalize()}."
    )


def reliability_table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """What was tried, survived and lost, by case."""
    rows = []
    for case in dict.fromkeys(line["case"] for line in lines):
        same = [line for line in lines if line["case"] == case]
        tried, lost = (sum(line[name] for line in same) for name in ("tried", "lost"))
        rows.append([case, *map(str, (tried, tried - lost, lost)), "; ".join(line["what"] for line in same)])
    return Table(("case", "tried", "survived", "lost", "of"), "lrrrl", rows)


def reliability_summary(lines: Sequence[Mapping[str, Any]]) -> str:
    """All cases in one line."""
    tried, lost = (sum(line[name] for line in lines) for name in ("tried", "lost"))
    return f"tried {tried}, survived {tried - lost}, lost {lost}"


def reliability_block() -> str:
    """The stored proof of reliability, or that there is none."""
    if not RELIABILITY.exists():
        return _missing(RELIABILITY)
    lines = read_lines(RELIABILITY)
    first = lines[0]
    return (
        f"{first['processor']}, {first['cores']} cores, torch {first['torch']}, Python {first['python']}:\n\n"
        f"{reliability_table(lines).markdown()}\n\n{reliability_summary(lines).capitalize()}."
    )


def export_parity_table() -> str:
    """fp32's distances from the eager run, and what the lower precisions cost."""
    manifests = read_json(MANIFESTS)
    rows = [[part["name"], f"{part['error']:.1e}", f"{part['tolerance']:.0e}"] for part in manifests["fp32"]["parity"]]
    exact = Table(("fp32 against eager PyTorch", "max difference / max(1, max value)", "allowed"), "l", rows).markdown()
    lower = {precision: manifest for precision, manifest in manifests.items() if manifest["quality"]}
    each = [manifest["quality"] for manifest in lower.values()]
    first, steps = each[0], manifests["fp32"]["table"]["steps"]
    files = [manifest["files"]["sampler.onnx"] for manifest in (manifests["fp32"], *lower.values())]
    rows = [
        ["PSNR against eager", "", *(f"{q['psnr_db']:.1f} dB" for q in each)],
        [f"PSNR of two samples, {steps} steps", "", *(f"{q['trajectories']['sampler.onnx']:.1f} dB" for q in each)],
        ["relative L2 of the network's output", "", *(f"{q['relative_l2']:.2g}" for q in each)],
        ["class accuracy (SVM)", f"{first['accuracy_fp32']:.1%}", *(f"{q['accuracy']:.1%}" for q in each)],
        ["Frechet distance of pixel features", f"{first['frechet_fp32']:.2f}", *(f"{q['frechet']:.2f}" for q in each)],
        ["sampler.onnx", *(f"{file['bytes'] / 1e6:.2f} MB" for file in files)],
        ["to open it", *(f"{file['open_s']:.2g} s" for file in files)],
    ]
    recipe = f"{first['samples']} samples, {first['solver']}, {first['steps']} steps, guidance {first['guidance']:g}"
    return f"{exact}\n\n{Table((recipe, 'fp32', *lower), 'l', rows).markdown()}"


def client_outcome(line: Mapping[str, Any]) -> str:
    """Of a client and a file: how far what it computes is from what is expected, or why there is nothing."""
    if line["reason"] is not None:
        return "fails" if line["loaded"] else "no"
    if line["error"] is None:
        return "**not finite**"
    far = f"{line['error']:.1e}" if line["precision"] == "fp32" else f"{line['psnr_db']:.0f} dB"
    return far if line["right"] else f"**wrong: {far}**"


def clients_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Clients by files, a cell for all precisions, and a list of the reasons of those that do not run one."""
    files, precisions = (list(dict.fromkeys(line[name] for line in lines)) for name in ("file", "precision"))
    rows, reasons = [], {}
    for client in dict.fromkeys(line["client"] for line in lines):
        same = [line for line in lines if line["client"] == client]
        versions = dict.fromkeys(line["version"] for line in same if line["version"])
        cells = [[client_outcome(line) for line in same if line["file"] == file] for file in files]
        rows.append(
            [" ".join((client, *versions)), *(cell[0] if len(set(cell)) == 1 else ", ".join(cell) for cell in cells)]
        )
        for line in same:
            if line["reason"] is not None:
                reasons.setdefault((client, line["reason"]), {}).setdefault(line["file"], []).append(line["precision"])
    notes = []
    for (client, reason), of in reasons.items():
        without = (file if some == precisions else f"{file} in {', '.join(some)}" for file, some in of.items())
        notes.append(f"- {client}, without {'; '.join(without)}: {reason}")
    table = Table((", ".join(precisions), *files), "l" * (len(files) + 1), rows).markdown()
    return "\n".join((table, "", *notes)).rstrip()


def clients_block() -> str:
    """What runs the exported files, and when that was tried."""
    lines = read_lines(CLIENTS)
    return f"{clients_table(lines)}\n\nTried {min(line['date'] for line in lines)[:10]}, torch {lines[0]['torch']}."


def networks_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Networks by what is tried with them, and a list of the reasons where something is not there."""

    def shown(cell: Mapping[str, Any]) -> str:
        if cell["reason"] is not None:
            return "no"
        return "yes" if cell["figure"] is None else f"{cell['figure']:.0e}" if cell["figure"] else "0"

    columns, reasons = list(lines[0]["cells"]), {}
    for line in lines:
        for column, cell in line["cells"].items():
            if cell["reason"] is not None:
                of, without = reasons.setdefault(cell["reason"], ([], []))
                of += [line["network"]] * (line["network"] not in of)
                without += [column.replace("_", " ")] * (column.replace("_", " ") not in without)
    rows = [[line["network"], *map(shown, line["cells"].values())] for line in lines]
    notes = [f"- {'; '.join(of)}: without {', '.join(without)}: {reason}" for reason, (of, without) in reasons.items()]
    table = Table(("network", *(column.replace("_", " ") for column in columns)), "l" * (len(columns) + 1), rows)
    return "\n".join((table.markdown(), "", *notes)).rstrip()


def networks_block() -> str:
    """What each network does, and when that was tried."""
    lines = read_lines(NETWORKS)
    return f"{networks_table(lines)}\n\nTried {min(line['date'] for line in lines)[:10]}, torch {lines[0]['torch']}."


BLOCKS: dict[str, Callable[[], str]] = {
    "summary": summary_table,
    "kernels": kernel_table,
    "sprites": sprites_table,
    "bench": lambda: run_block(RUN),
    "profile": profile_block,
    "peers": lambda: run_block(PEERS, peers_table),
    "planted": planted_block,
    "reliability": reliability_block,
    "export-parity": export_parity_table,
    "clients": clients_block,
    "networks": networks_block,
    "network-speed": lambda: run_block(NETWORK_SPEED),
    "sampling-speed": lambda: run_block(SAMPLING),
    "goals": lambda: run_block(PEERS, lambda content: goals_table(store.rows(content["records"]))),
    "export-speed": lambda: run_block(EXPORT),
}
MARK = re.compile(r"^<!-- /?([a-z-]+) -->$", re.M)
BLOCK = re.compile(r"^<!-- ([a-z-]+) -->\n.*?^<!-- /\1 -->$", re.S | re.M)


def documents() -> dict[Path, str]:
    """README.md and docs/*.md as they are."""
    return {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted(DOCS.glob("*.md")))}


def filled(texts: Mapping[Path, str]) -> dict[Path, str]:
    """Documents with each block replaced by what its record says.

    Raises WorkFailed for a mark that no block knows, one whose other half is missing, and a block that stands nowhere.
    """
    missing, result = set(BLOCKS), {}
    for path, text in texts.items():
        marks, paired = Counter(MARK.findall(text)), [match[1] for match in BLOCK.finditer(text)]
        for name in marks.keys() - BLOCKS.keys():
            raise WorkFailed(f"{path.name}: has the mark {name!r}, needs one of {', '.join(BLOCKS)}")
        for name in marks - Counter(2 * paired):
            raise WorkFailed(f"{path.name}: {name!r} needs <!-- {name} --> and <!-- /{name} --> in this order")
        made = {name: f"<!-- {name} -->\n\n{BLOCKS[name]()}\n\n<!-- /{name} -->" for name in paired}
        result[path] = BLOCK.sub(lambda match, made=made: made[match[1]], text)
        missing -= made.keys()
    if missing:
        raise WorkFailed(f"README.md and docs/*.md: have no block {', '.join(sorted(missing))}")
    return result


def report() -> None:
    """Regenerate the figures in README.md and docs/*.md from the stored records."""
    for path, text in filled(documents()).items():
        write_text(path, text)
