"""What `compare` concludes, for people (terminal, Markdown) and as a JSON object that keeps every sample."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from bench import store
from bench.show import Table, device_of, microseconds
from bench.verdicts import NOISY, NOT_GATED, SAME, Pair, Verdict

KIND = "fused-ddpm comparison"
CONCLUSION = {0: "no row is slower", 1: "REGRESSION", 3: "SOMETHING DID NOT RUN", 4: "TOO NOISY TO TELL"}
RED = ("slower", "waits", "more", "failed", "parity lost", "missing")
STYLES = dict.fromkeys(RED, "red bold") | {
    "faster": "green", "fewer": "green", NOISY: "yellow", "new": "cyan", NOT_GATED: "dim",
}  # fmt: skip
ALIGN = "lrrrrrll"
EXPLANATION = (
    "wall: medians over all processes of the row. {time}: relative to eager or the yardstick (a fixed convolution) of "
    "the same process, head over base: Hodges-Lehmann with its 95% interval. p: Mann-Whitney over processes. "
    "slower: p < 0.005 and a change beyond the limit, in two rounds of processes together. waits: so of wall time, and "
    "of the other not or not half as much. same: the interval lies within the limit; too noisy: it does not, and no "
    "change is certain. [counts]: of one call, more or fewer in every process."
)


def result_of(rounds: Sequence[Pair], found: Sequence[Verdict], code: int) -> dict[str, Any]:
    """The JSON object. rounds: (base, head) of each round of processes; records are those of all of them."""
    sides = {
        side: {key: content[key] for key in ("machine", "processes", "date")}
        for side, content in zip(("base", "head"), rounds[0], strict=True)
    }
    records = [
        {"round": number, "side": side} | dict(record)
        for number, pair in enumerate(rounds, start=1)
        for side, content in zip(("base", "head"), pair, strict=True)
        for record in content["records"]
    ]
    return {
        "format_version": store.FORMAT_VERSION,
        "kind": KIND,
        **sides,
        "exit": code,
        "rows": [asdict(verdict) for verdict in found],
        "records": records,
    }


def _percent(row: Mapping[str, Any]) -> str:
    """ "+12.1% (+9.8 to +14.6)"; counts that do not vary have no interval."""
    if row["ratio"] is None:
        return ""
    middle, low, high = (f"{100 * (row[key] - 1):+.1f}" for key in ("ratio", "low", "high"))
    return f"{middle}%" if low == middle == high else f"{middle}% ({low} to {high})"


def _amount(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    if unit == "us":
        return microseconds(value)
    return f"{value:g}" if not unit else f"{value / 2**20:.2f} MiB" if value >= 2**20 else f"{value / 2**10:.1f} KiB"


def _cells(row: Mapping[str, Any], first: tuple[int, int]) -> list[str]:
    """first: processes of base and head in the first round."""
    details = [row["detail"]] if row["detail"] else []
    if row["unit"] == "us" and row["processes"] not in (None, first, list(first)):
        details.append("{} and {} processes".format(*row["processes"]))
    verdict = f"{row['status']} ({'; '.join(details)})" if details else row["status"]
    compared = row["base"] is not None
    return [
        row["row"],
        _amount(row["base"], row["unit"]),
        _amount(row["head"], row["unit"]),
        _percent(row),
        "" if row["p"] is None else f"{row['p']:.2g}",
        f"{row['threshold']:+.0%}" if compared and row["status"] != NOT_GATED else "",
        row["against"],
        verdict,
    ]


def _gating_time(result: Mapping[str, Any]) -> str:
    return "processor time" if result["head"]["machine"].get("device", "cpu") == "cpu" else "kernel time"


def _table(result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], title: str = "") -> Table:
    headings = ("row", "wall base", "wall head", f"{_gating_time(result)} or count", "p", "limit", "against", "verdict")
    styles = {number: STYLES.get(row["status"], "") for number, row in enumerate(rows)}
    first = result["base"]["processes"], result["head"]["processes"]
    return Table(headings, ALIGN, [_cells(row, first) for row in rows], title, styles)


def _name(side: Mapping[str, Any]) -> str:
    """The commit, or when it was measured if that is not known."""
    commit = side["machine"].get("commit")
    return commit[:10] if commit else f"of {side['date']} (no commit)"


def _header(result: Mapping[str, Any]) -> str:
    """ "base 1a2b3c4d, head 5e6f7a8b; 8 and 8 processes on PROCESSOR"."""
    base, head = result["base"], result["head"]
    counts = f"{base['processes']} and {head['processes']} processes"
    on = dict.fromkeys(device_of(side["machine"]) for side in (base, head) if "device" in side["machine"])
    where = f" on {' and '.join(on)}" if on else ""  # where nothing was measured nothing is known
    return f"base {_name(base)}, head {_name(head)}; {counts}{where}"


def _conclusion(result: Mapping[str, Any]) -> str:
    noisy = sum(row["status"] == NOISY for row in result["rows"])
    unsure = f"; of {noisy} it cannot be told (too noisy)" if noisy and result["exit"] == 0 else ""
    return CONCLUSION[result["exit"]] + unsure


def _is_plain(row: Mapping[str, Any]) -> bool:
    """A count that did not change."""
    return row["unit"] != "us" and row["status"] == SAME


def compare_table(result: Mapping[str, Any]) -> None:
    """Print a comparison; the conclusion is the last line."""
    rows = [row for row in result["rows"] if not _is_plain(row)]
    notes = [EXPLANATION.format(time=_gating_time(result))]
    if len(rows) < len(result["rows"]):
        notes.insert(0, f"{len(result['rows']) - len(rows)} counts the same")
    _table(result, rows, _header(result)).show(notes, "dim")
    Console().print(_conclusion(result), style="bold", highlight=False)


def compare_markdown(result: Mapping[str, Any]) -> str:
    """A comparison for a pull request or a step summary: same rows and references are folded, below the rest."""
    plain = (SAME, NOT_GATED)
    changed = [row for row in result["rows"] if row["status"] not in plain]
    folded = [row for row in result["rows"] if row["status"] in plain]
    parts = [f"### Benchmarks: {_conclusion(result)}\n", f"{_header(result)}.\n"]
    if changed:
        parts.append(_table(result, changed).markdown() + "\n")
    if folded:
        same = sum(row["status"] == SAME for row in folded)
        gated = f", {len(folded) - same} not gated" if len(folded) > same else ""
        shown = _table(result, folded).markdown()
        parts.append(f"<details><summary>{same} rows the same{gated}</summary>\n\n{shown}\n\n</details>\n")
    return "\n".join((*parts, EXPLANATION.format(time=_gating_time(result)), ""))
