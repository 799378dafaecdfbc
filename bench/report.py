"""`ddpm-bench report`: the figures in README.md and docs/, generated from stored records between HTML comments.

<!-- NAME --> ... <!-- /NAME -->        NAME is a key of BLOCKS, which says in which file it stands
"""

import json
import re
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

from bench import exports, goals, store
from bench.exports import MACHINE
from bench.interval import measured_by
from bench.ladder import show as ladder
from bench.machine import ROOT
from bench.profile import by_operator
from bench.show import RUN_HEADINGS, microseconds, run_cells
from ddpm.files import read_json, replacing, write_text

README = ROOT / "README.md"
CI = ROOT / "docs" / "ci.md"
STATIC = ROOT / "bench" / "results" / "static.json"
RUN = MACHINE / "run.json"
PEERS = MACHINE / "peers.json"
STEP = MACHINE / "step.json"
LADDER = MACHINE / "ladder.json"
LADDER_PLOT = ROOT / "docs" / "ladder.png"
PROOF = MACHINE / "compare_proof.json"
SPRITES = ROOT / "docs" / "sprites.json"
# Two operators at the commit that the record names, by the same count; what changed is told at backend.ITEM_ELEMENTS.
BEFORE_TUNING = ROOT / "bench" / "results" / "before_tuning.json"
PROFILE = ROOT / "docs" / "profile" / "profile.json"
PROFILE_ROWS = 6
KERNEL_ARCH, KERNEL_CARD = "sm_90", "H200"
# One row per operator and variant that matters; `make static` prints all.
KERNELS = (
    "bare fp32",
    "bare bf16",
    "q_sample fp32",
    "q_sample bf16",
    "q_sample uint8 to bf16",
    "q_sample fp32 ragged",
    "q_sample fp32 channels_last",
    "q_sample_rows uint8 to bf16",
    "q_sample_rows uint8, flip, noise",
    "noise_mse bf16",
    "noise_mse bf16 backward",
    "noise_mse fp32 channels_last",
    "solver_step fp32",
    "solver_step fp32 full",
    "solver_step bf16",
    "solver_step fp32 channels_last",
    "group_norm_relu bf16",
    "bottleneck bf16",
    "convolution bf16",
    "convolution bf16 two sources",
)


def _on_arch(path: Path) -> dict[str, dict[str, Any]]:
    """The records of a file on one architecture, by kernel."""
    records = json.loads(path.read_text(encoding="utf-8"))["records"]
    return {record["kernel"]: record for record in records if record["arch"] == KERNEL_ARCH}


def kernel_table() -> str:
    """Instructions per element, spills and what binds, of the main kernels on one architecture."""
    records, tuning = _on_arch(STATIC), _on_arch(BEFORE_TUNING)
    lines = [
        f"| kernel ({KERNEL_ARCH}) | SASS instructions per element | before tuning | x bare | registers | spills "
        f"| bytes per element | binds on an {KERNEL_CARD} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in map(records.__getitem__, KERNELS):
        before = tuning.get(record["kernel"])
        ratio = "" if record.get("ratio") is None else f"{record['ratio']:.2f}"
        cells = (
            record["kernel"],
            f"{record['instructions_per_element']:.1f}",
            "" if before is None else f"{before['instructions_per_element']:.1f}",
            ratio,
            str(record["registers"]),
            str(record["spill_store_bytes"] + record["spill_load_bytes"]),
            f"{record['bytes_per_element']:g}",
            record["cards"][KERNEL_CARD]["binds"],
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def sprites_table() -> str:
    """`ddpm evaluate` of the sprites run."""
    record = json.loads(SPRITES.read_text())
    recipe = f"{record['n']} samples, {record['solver']}, {record['steps']} steps, guidance {record['guidance']:g}"
    return "\n".join(
        (
            f"| sprites ({recipe}) | samples | real data |",
            "|---|---|---|",
            f"| Frechet distance of pixel features | {record['frechet']:.2f} | {record['frechet_real']:.2f} |",
            f"| read as the class asked for | {record['accuracy']:.1%} | {record['accuracy_real']:.1%} |",
        )
    )


def profile_table() -> str:
    """`ddpm-bench profile`: the parts of a step, then its operators, in milliseconds and shares."""
    record = json.loads(PROFILE.read_text())
    recipe, step, bound, best = record["recipe"], record["latency"]["step_ms"], record["floor"], record["ceilings"]
    rate = max(best["matmul_gflop_per_s"], best["conv_gflop_per_s"])
    parts = {part["name"]: part for part in record["parts"]}
    gaps = parts.pop("gaps")
    named = ", ".join(f"{name} {part['share']:.1%}" for name, part in parts.items())
    rows = []
    for row in by_operator(record["operators"])[:PROFILE_ROWS]:
        rates = ("" if not row[key] else f"{row[key] / row['ms'] / 1e6:.1f}" for key in ("flops", "bytes"))
        cells = (row["name"], f"{row['calls']:.0f}", f"{row['ms']:.1f}", f"{row['share']:.1%}", *rates)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(
        (
            f"`{record['command']}`, engine {recipe['engine']}, {record['machine']['threads']} threads of "
            f"{record['machine']['processor']}: a step takes {step['p50']:.0f} ms (p50; p90 {step['p90']:.0f}, "
            f"p99 {step['p99']:.0f}). Its {bound['flops'] / 1e9:.2f} GFLOP would take {bound['arithmetic_ms']:.0f} ms "
            f"at the best rate measured ({rate:.0f} GFLOP/s), its {bound['bytes'] / 1e6:.0f} MB of traffic "
            f"{bound['traffic_ms']:.0f} ms ({best['copy_gb_per_s']:.1f} GB/s).",
            "",
            f"By part: {named}; no operator running: {gaps['share']:.1%}. The profiler made a step "
            f"{record['profiler']['overhead']:.2f} times as long.",
            "",
            "| operator | calls a step | ms | share | GFLOP/s | GB/s |",
            "|---|---|---|---|---|---|",
            *rows,
            f"| (no operator) | | {gaps['ms']:.1f} | {gaps['share']:.1%} | | |",
        )
    )


def _markdown(headings: tuple[str, ...], rows: list[list[str]], left: int) -> str:
    marks = "|".join(["---"] * left + ["--:"] * (len(headings) - left))
    return "\n".join([f"| {' | '.join(headings)} |", f"|{marks}|", *(f"| {' | '.join(row)} |" for row in rows)])


def _recipe(content: store.Content) -> str:
    """The command of a stored run, and where it ran."""
    machine = content["machine"]
    return f"`{content['command']}` on {machine['processor']}, {machine['threads']} threads, torch {machine['torch']}"


def bench_table() -> str:
    """The stored `ddpm-bench run`. Raises ValueError if a row of it did not run or lost parity."""
    content = store.load(RUN)
    rows = [run_cells(records) for records in store.rows(content["records"]).values()]
    for row in rows:
        if len(row) != len(RUN_HEADINGS):
            raise ValueError(f"{RUN.name}: {' '.join(row)}; needs a run without failures")
    return f"{_recipe(content)}:\n\n{_markdown(RUN_HEADINGS, rows, 2)}"


def peers_table() -> str:
    """The stored `ddpm-bench peers`: time per step, and times eager. Raises ValueError if a row has no parity."""
    content = store.load(PEERS)
    bad = [store.row_of(record) for record in content["records"] if not store.is_good(record)]
    if bad:
        raise ValueError(f"{PEERS.name}: no figures for {', '.join(bad)}; needs a run without failures")
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for record in content["records"]:
        _, solver, *_, batch = record["workload"].split("/")
        ratio = "" if record["speed_up"] is None else f" ({record['speed_up']:.2f}x)"
        cells.setdefault((solver, record["candidate"]), {})[batch] = f"{microseconds(record['kernel_us'])}{ratio}"
    batches = list(dict.fromkeys(batch for row in cells.values() for batch in row))
    rows = [[*key, *(row.get(batch, "") for batch in batches)] for key, row in cells.items()]
    headings = ("solver and steps", "a step (times eager)", *(batch.replace("batch", "batch ") for batch in batches))
    notes = "".join(f" {reason}." for reason in content["skipped"].values())
    return f"{_recipe(content)}.{notes}\n\n{_markdown(headings, rows, 2)}"


def goals_table() -> str:
    """The stored runs of suite `step` beside what the step must reach."""
    content = store.load(STEP)
    line = f"{_recipe(content)}: {measured_by(content['processes'])}"
    return "\n".join([_markdown(goals.HEADINGS, goals.goal_cells(content["records"]), 2), "", line])


def ladder_table() -> str:
    """The stored `ddpm-bench ladder`: the table, what each rung adds, and its notes."""
    content = store.load(LADDER)
    rows = [[*row.cells(), content["rungs"][row.name]] for row in ladder.rows_of(content)]
    table = _markdown((*ladder.HEADINGS, "what it adds"), rows, 1)
    return "\n".join([f"{ladder.recipe(content)}:", "", table, "", *(f"- {line}" for line in ladder.notes(content))])


def proof_table() -> str:
    """The stored proof of `compare`: per kind of comparison how many raised an alarm, and on which rows."""
    record = read_json(PROOF)
    rows = []
    for (kind, operator), lines in groupby(
        sorted(record["comparisons"], key=lambda line: (line["kind"], line["operator"] or "")),
        key=lambda line: (line["kind"], line["operator"]),
    ):
        rows.append(_proof_row(kind, operator, list(lines)))
    headings = ("", "comparisons", "alarms", "on its own row", "on other rows", "unconfirmed rows", "measured change")
    machine, processes = record["machine"], record["comparisons"][0]["processes"]
    recipe = f"{machine['processor']}, torch {machine['torch']}, {processes} processes a side"
    return f"{recipe}:\n\n{_markdown(headings, rows, 1)}"


def _proof_row(kind: str, operator: str | None, lines: list[dict]) -> list[str]:
    """changes: the smallest and largest of the planted operator's row, of all operators' rows where nothing is."""

    def is_own(row: dict) -> bool:
        return (
            operator is not None and row["row"].startswith(f"kernels/{operator}/") and row["row"].endswith("operator")
        )

    slower = [(row, is_own(row)) for line in lines for row in line["rows"] if row["status"] == "slower"]
    unconfirmed = sum(row["status"] == "unconfirmed" for line in lines for row in line["rows"])
    watched = [row for line in lines for row in line["rows"] if (is_own(row) if operator else True)]
    changes = [row["ratio"] - 1 for row in watched]
    return [
        "nothing planted" if kind == "same" else f"10% planted in `{operator}`",
        str(len(lines)),
        str(sum(line["exit"] == 1 for line in lines)),
        "" if operator is None else str(sum(own for _, own in slower)),
        str(sum(not own for _, own in slower)),
        str(unconfirmed),
        f"{min(changes):+.1%} to {max(changes):+.1%}",
    ]


BLOCKS: dict[str, tuple[Path, Callable[[], str]]] = {
    "kernels": (README, kernel_table),
    "sprites": (README, sprites_table),
    "bench": (README, bench_table),
    "profile": (README, profile_table),
    "peers": (README, peers_table),
    "goals": (README, goals_table),
    "ladder": (README, ladder_table),
    "compare": (CI, proof_table),
    "export-parity": (README, exports.parity_table),
    "export-speed": (README, exports.speed_table),
}


def filled(text: str, path: Path = README) -> str:
    """The text of a file with each of its blocks replaced by what its record says.

    Raises ValueError if a block is not there.
    """
    for name, (file, make) in BLOCKS.items():
        if file != path:
            continue
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        if not pattern.search(text):
            raise ValueError(f"{path.name}: has no block <!-- {name} --> ... <!-- /{name} -->")
        text = pattern.sub(lambda match, make=make: f"{match[1]}\n{make()}\n\n{match[2]}", text)
    return text


def write() -> None:
    """Fill the blocks of every file in place, and draw the ladder."""
    for path in dict.fromkeys(file for file, _ in BLOCKS.values()):
        write_text(path, filled(path.read_text(encoding="utf-8"), path))
    with replacing(LADDER_PLOT) as partial:
        ladder.plot(store.load(LADDER), partial)
