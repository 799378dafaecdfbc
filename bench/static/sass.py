"""What a launch becomes on a card that is not here: compiled by Triton, disassembled by the cuobjdump it ships.

The specialisation (types, alignment, which integers become constants) is made by Triton's own launcher code, so the
binary is the one that a launch with these arguments would run. Tried with triton 3.6.0 and 3.7.1.
"""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from kernels import backend
from kernels.backend import Launch, triton

INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")
ACCESS_BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}


def usable() -> None:
    """Raise RuntimeError unless kernels can be compiled in this process."""
    if triton is None:
        raise RuntimeError("the static report compiles with Triton, which is not installed (pip install triton)")
    if backend.INTERPRETED:
        raise RuntimeError("kernels are interpreted under TRITON_INTERPRET=1 and cannot be compiled: unset it")


def specialized(launch: Launch, capability: int) -> tuple[Any, ...]:
    """(options, signature, constants, attributes) of this launch: a kernel is compiled once for equal ones."""
    usable()
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, cuda = launch.kernel, make_backend(GPUTarget("cuda", capability, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, cuda)
    options = {**launch.constants, **launch.options, "debug": False}
    arguments, specialization, _ = bind(*launch.args, **options)
    return kernel._pack_args(cuda, options, arguments, specialization, {})


def compile_launch(launch: Launch, capability: int) -> Any:
    """The kernel of this launch compiled for a capability (90 = sm_90): Triton's CompiledKernel, never loaded."""
    options, signature, constants, attributes = specialized(launch, capability)
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options.__dict__)


def listing_of(cubin: bytes) -> str:
    """What cuobjdump says of a cubin with one kernel: its resource usage and its instructions."""
    binary = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile() as file:
        file.write(cubin)
        file.flush()
        command = [str(binary), "--dump-resource-usage", "--dump-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603


def access_bits(instruction: str) -> int:
    """Bits that a memory instruction moves per thread: "LDG.E.128" -> 128."""
    return next((ACCESS_BITS[part] for part in instruction.split(".")[1:] if part in ACCESS_BITS), 32)


def measure(shared: int, listing: str) -> dict[str, Any]:
    """The facts of a binary that uses `shared` bytes, from its `listing_of`.

    Per thread: registers, stack and spills in bytes, instructions; per program: shared bytes. instructions: every
    instruction of the listing but padding (NOP) and the endless branch after the last EXIT; both sides of a branch
    count. spill_*: bytes moved by local-memory instructions. global_*: accesses to global memory; *_bits: the widest of
    them (scalars such as the seed included), 0 if there is none; *_widths: how many of each width in bits.
    """
    instructions = [name for name in INSTRUCTION.findall(listing) if name.split(".")[0] != "NOP"]
    if instructions and instructions[-1].startswith("BRA"):
        instructions.pop()
    if "EXIT" not in instructions:
        raise RuntimeError("cuobjdump gave a listing without an EXIT")
    usage = RESOURCES.search(listing)
    if usage is None:
        raise RuntimeError("cuobjdump found no resource usage in a cubin")
    names = ("LDG", "STG", "STL", "LDL")
    bits = {name: [access_bits(each) for each in instructions if each.split(".")[0] == name] for name in names}
    widths = {name: {str(width): number for width, number in sorted(Counter(bits[name]).items())} for name in names}
    return {
        "registers": int(usage[1]),
        "spill_store_bytes": sum(bits["STL"]) // 8,
        "spill_load_bytes": sum(bits["LDL"]) // 8,
        "stack": int(usage[2]),
        "shared": shared,
        "instructions": len(instructions),
        "global_loads": len(bits["LDG"]),
        "global_stores": len(bits["STG"]),
        "load_bits": max(bits["LDG"], default=0),
        "store_bits": max(bits["STG"], default=0),
        "load_widths": widths["LDG"],
        "store_widths": widths["STG"],
    }
