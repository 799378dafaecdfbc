"""What engine `native` is to reach on a CPU, beside what was measured: a block of docs/engines.md."""

from collections.abc import Mapping
from typing import Any

from bench.interval import median_interval
from bench.show import Table, middle

# Where it is to be, in float32 and relative to eager of the same process: what a row is, its workload, the ratio.
RATIOS = (
    ("1 image", "peers/ddim10/batch1", 7.0),
    ("2 images", "peers/ddim10/batch2", None),
    ("4 images", "peers/ddim10/batch4", None),
    ("8 images", "peers/ddim10/batch8", 3.9),
    ("16 images", "peers/ddim10/batch16", None),
    ("32 images", "peers/ddim10/batch32", 3.7),
    ("128 images", "peers/ddim10/batch128", None),
    ("32 images with guidance", "peers/ddpm10/guided/batch32", 5.0),
)
WHOLE, WHOLE_STEPS, WHOLE_S = "peers/ddpm500/whole/batch1", 500, 0.4
OURS, OTHERS = ("native", "compile", "fused"), ("onnxruntime", "openvino")
BEHIND = 1.03  # times as long as the fastest of the others that it may take, in rows without guidance

Rows = Mapping[str, list[Mapping[str, Any]]]


def verdict(reached: bool, best: float) -> str:
    """best: the fastest of the others, relative to native."""
    if not reached:
        return "missed"
    return "reached" if best <= BEHIND else f"reached, but {best:.2f} times slower than the fastest of the others"


def goals_table(rows: Rows) -> str:
    """The goals, what native brings and what others bring; rows that were not measured are left out."""
    cells = []
    for what, workload, goal in RATIOS:
        found = {name: rows.get(f"{workload} {name}") for name in (*OURS, *OTHERS)}
        if found["native"] is None:
            continue
        ratios = {name: median_interval([r["speed_up"] for r in records]) for name, records in found.items() if records}
        own = ratios["native"].median
        best = max((ratios[name].median for name in OTHERS if name in ratios), default=0.0) / own
        each = [ratios[name].text() if name in ratios else "-" for name in found]
        said = verdict(goal is None or own >= goal, best)
        cells.append([what, "" if goal is None else f"{goal:g}", *each, said])
    whole = {name: rows.get(f"{WHOLE} {name}") for name in (*OURS, *OTHERS)}
    if whole["native"] is not None:
        took = {name: middle(records, "wall_us") * WHOLE_STEPS * 1e-6 for name, records in whole.items() if records}
        each = [f"{took[name]:.2f} s" if name in took else "-" for name in whole]
        best = took["native"] / min((took[name] for name in OTHERS if name in took), default=float("inf"))
        said = verdict(took["native"] <= WHOLE_S, best)
        cells.append([f"{WHOLE_STEPS} steps of 1 image", f"{WHOLE_S:g} s", *each, said])
    return Table(("x eager", "goal", *OURS, *OTHERS, ""), "lrrrrrrl", cells).markdown()
