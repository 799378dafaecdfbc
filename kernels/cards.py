"""What cards can do at best: the rates that the static report divides by. Tensor cores are not among them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """Results per clock of one SM: of all instructions together, and of the units of `sass.CLASSES`.

    fma takes fp32 arithmetic and IMAD; IMAD only in its heavy half.
    """

    fma: int
    issue: int = 128  # four schedulers, an instruction for 32 threads each
    alu: int = 64
    imad: int = 64
    special: int = 16

    def clocks(self, per_element: dict[str, float]) -> dict[str, float]:
        """Clocks of an SM per element for each unit, of instructions per element by class."""
        count = {kind: per_element.get(kind, 0.0) for kind in ("alu", "imad", "fp32", "special")}
        return {
            "issue": sum(per_element.values()) / self.issue,
            "alu": count["alu"] / self.alu,
            "fma": max((count["fp32"] + count["imad"]) / self.fma, count["imad"] / self.imad),
            "special": count["special"] / self.special,
        }


# CUDA C++ Programming Guide, "Arithmetic Instructions", throughput of native arithmetic instructions. The guide itself
# could not be opened from here; checked are 8.0 (64 fp32, 64 int32, 16 special: lubits.ch/flash, appendix A, which
# quotes the table; IMAD on the FMA pipe also in arXiv 2208.11174) and 8.6 (128 fp32, 64 int32: GA102 white paper as
# quoted in github.com/openmm/openmm/issues/2868). Assumed: 8.9 and 9.0 as 8.6, and for 10.0 still 64 int32, as some in
# NVIDIA's forum (thread 320578) quote the guide and doubt it: GeForce Blackwell has 128.
RATES = {"sm_80": Rates(fma=64)} | {arch: Rates(fma=128) for arch in ("sm_86", "sm_89", "sm_90", "sm_100")}


@dataclass(frozen=True)
class Card:
    """A card: architecture, streaming multiprocessors, clock in GHz, memory bandwidth in GB/s."""

    arch: str
    sms: int
    clock: float
    bandwidth: float

    def units(self, per_element: dict[str, float]) -> dict[str, float]:
        """Microseconds of each unit for a million elements, of instructions per element by class."""
        clocks = RATES[self.arch].clocks(per_element)
        return {unit: each * 1e6 / (self.sms * self.clock * 1e3) for unit, each in clocks.items()}

    def bytes(self, per_element: float) -> float:
        """Microseconds to move so many bytes for each of a million elements."""
        return per_element * 1e6 / (self.bandwidth * 1e3)


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
