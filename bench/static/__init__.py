"""The static report: what every kernel compiles to, for cards that are not here.

A deterministic performance test that needs no GPU: registers, spills, instructions and access widths of real launches
(`cases`, read by `sass`). `command` is `ddpm-bench static`, which makes and compares the records.
"""

from pathlib import Path

BASELINE = Path(__file__).parents[1] / "results" / "static.json"
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100")
