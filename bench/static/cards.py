"""What cards can do at best: the larger of

    t_issue = instructions / (SMs * 128 a clock * clock)      t_bytes = bytes / bandwidth

Lower bounds: latency, caches, single units (special functions, tensor cores) and the launch are not in them.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

ISSUE = 128  # instructions of one thread a clock and SM: four schedulers, one for 32 threads each


class Card(NamedTuple):
    """A card: architecture, streaming multiprocessors, clock in GHz, memory bandwidth in GB/s."""

    arch: str
    sms: int
    clock: float
    bandwidth: float

    def times(self, record: Mapping[str, Any]) -> dict[str, float]:
        """Microseconds for a million elements of a record of `report`, by what they are spent on: issue, bytes."""
        issue = record["instructions_per_element"] * 1e3 / (self.sms * ISSUE * self.clock)
        return {"issue": issue, "bytes": record["bytes_per_element"] * 1e3 / self.bandwidth}


# SMs and bandwidth as in NVIDIA's data sheets (A100 80GB SXM, L4, GeForce RTX 4090, H100 SXM, H200 SXM,
# HGX B200), the clock as the sheet's boost clock or fp32 peak implies. Third-party tables agree on H200, B200 and the
# H100's bandwidth; A100, L4 and RTX 4090 were not compared.
CARDS = {
    "A100": Card("sm_80", 108, 1.41, 2039),
    "L4": Card("sm_89", 58, 2.04, 300),
    "RTX 4090": Card("sm_89", 128, 2.52, 1008),
    "H100": Card("sm_90", 132, 1.98, 3350),
    "H200": Card("sm_90", 132, 1.98, 4800),
    "B200": Card("sm_100", 148, 1.98, 8000),
}
