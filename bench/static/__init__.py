"""The static report: what every kernel compiles to, for cards that are not here.

A deterministic performance test that needs no GPU: registers, spills, instructions and access widths of real launches
(`cases`, read by `sass`), and the time that each rate of a card allows (`cards`). `report` makes and compares the
records, `command` is `ddpm-bench static`.
"""

from pathlib import Path

BASELINE = Path(__file__).parents[1] / "results" / "static.json"
