"""What cards can do at best:

    t_unit = instructions of the unit / (SMs * results per clock * clock)      t_bytes = bytes / bandwidth

of which the largest binds. All are lower bounds: latency, caches, tensor cores and the launch itself are not in them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

# Results per clock of one SM: of all instructions together (four schedulers, an instruction for 32 threads each), and
# of the units of `sass.CLASSES`. fma takes fp32 arithmetic and IMAD; IMAD only in its heavy half.
# CUDA C++ Programming Guide, "Arithmetic Instructions", throughput of native arithmetic instructions. The guide itself
# could not be opened from here; checked are 8.0 (64 fp32, 64 int32, 16 special: lubits.ch/flash, appendix A, which
# quotes the table; IMAD on the FMA pipe also in arXiv 2208.11174) and 8.6 (128 fp32, 64 int32: GA102 white paper as
# quoted in github.com/openmm/openmm/issues/2868). Assumed: 8.9 and 9.0 as 8.6, and for 10.0 still 64 int32, as some in
# NVIDIA's forum (thread 320578) quote the guide and doubt it: GeForce Blackwell has 128.
ISSUE, ALU, IMAD, SPECIAL = 128, 64, 64, 16
FMA = {"sm_80": 64, "sm_86": 128, "sm_89": 128, "sm_90": 128, "sm_100": 128}
ARCHS = tuple(FMA)


@dataclass(frozen=True)
class Card:
    """A card: architecture, streaming multiprocessors, clock in GHz, memory bandwidth in GB/s."""

    arch: str
    sms: int
    clock: float
    bandwidth: float

    def times(self, per_element: Mapping[str, float], moved: float) -> dict[str, float]:
        """Microseconds for a million elements of each unit, of instructions (by class) and bytes moved per element."""
        alu, imad, fp32, special = (per_element.get(kind, 0.0) for kind in ("alu", "imad", "fp32", "special"))
        clocks = {
            "issue": sum(per_element.values()) / ISSUE,
            "alu": alu / ALU,
            "fma": max((fp32 + imad) / FMA[self.arch], imad / IMAD),
            "special": special / SPECIAL,
        }
        times = {unit: each * 1e6 / (self.sms * self.clock * 1e3) for unit, each in clocks.items()}
        return times | {"bytes": moved * 1e6 / (self.bandwidth * 1e3)}


# SMs and bandwidth as in NVIDIA's data sheets and architecture white papers (A100 80GB SXM, L4, GeForce RTX 4090, H100
# SXM, H200 SXM, HGX B200). Clock: the boost clock that the sheet names or that its fp32 peak implies (fp32 / (SMs *
# lanes * 2): A100 19.5 TFLOP/s with 64 lanes, L4 30.3, RTX 4090 82.6, H100 and H200 67, B200 75 with 128).
# Compared with third-party tables: H200 (132 SMs, 1.98 GHz, 4.8 TB/s), B200 (148, 1.98 GHz, 8.0 TB/s; one says 7.7) and
# the H100's 3.35 TB/s. Not compared: A100, L4, RTX 4090.
CARDS = {
    "A100": Card("sm_80", 108, 1.41, 2039),
    "L4": Card("sm_89", 58, 2.04, 300),
    "RTX 4090": Card("sm_89", 128, 2.52, 1008),
    "H100": Card("sm_90", 132, 1.98, 3350),
    "H200": Card("sm_90", 132, 1.98, 4800),
    "B200": Card("sm_100", 148, 1.98, 8000),
}
