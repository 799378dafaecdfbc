"""The static report: what every kernel compiles to, for cards that are not here.

A deterministic performance test that needs no GPU: registers, spills, instructions and access widths of real launches
(`cases`, read by `sass`). `report` makes and compares the records, `command` is `ddpm-bench static`.
"""

from pathlib import Path

BASELINE = Path(__file__).parents[1] / "results" / "static.json"
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100")
