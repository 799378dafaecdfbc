"""What tests/bench/planted.py plants in the repository of `foreign.py`, and what `compare` must say to it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.bench.foreign import git

PLAIN, TENSORS, NATIVE = (f"python/mine/{name}" for name in ("plain.py", "tensors.py", "native.c"))
SUITE, PROJECT = "bench/speed.py", "python/pyproject.toml"
DIGEST, SOFTMAX, SINE = "digest/100000 mine", "softmax/1000 mine", "sine/500000 mine"

Change = Callable[[Path], None]


def edited(file: str, old: str, new: str) -> Change:
    """One place in a file is changed."""

    def change(root: Path) -> None:
        text = (root / file).read_text()
        if text.count(old) != 1:
            raise ValueError(f"{file}: has {old!r} {text.count(old)} times, needs it once")
        (root / file).write_text(text.replace(old, new))

    return change


def added(file: str, text: str) -> Change:
    """A new file, or what is appended to one."""

    def change(root: Path) -> None:
        with (root / file).open("a") as opened:
            opened.write(text)

    return change


def all_of(*changes: Change) -> Change:
    def change(root: Path) -> None:
        for one in changes:
            one(root)

    return change


def wrapped(file: str, name: str, text: str) -> Change:
    """A function of the package is called `_name`, and `text` defines `name` with it."""
    return all_of(edited(file, f"def {name}(", f"def _{name}("), added(file, f"\n\n{text}"))


def in_python(percent: int) -> Change:
    """Slower by so much on any machine: that part of the work is done twice. So are the next two."""
    text = "def digest(values):\n    _digest(values[: len(values) * {} // 100])\n    return _digest(values)\n"
    return wrapped(PLAIN, "digest", text.format(percent))


def in_an_operator_call(percent: int) -> Change:
    text = "def softmax(x):\n    _softmax(x[: len(x) * {} // 100])\n    return _softmax(x)\n"
    return wrapped(TENSORS, "softmax", text.format(percent))


def in_the_extension(percent: int) -> Change:
    call = "    sines(from.buf, to.buf, n);\n"
    return edited(NATIVE, call, f"{call}    sines(from.buf, to.buf, n * {percent} / 100);\n")


SLEEP = """\
def digest(values):
    time.sleep(0.004)
    return _digest(values)
"""
FORK = """\
def digest(values):
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        _digest(values)
        os.write(writes, str(_digest(values)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writes)
    with os.fdopen(reads) as result:
        return int(result.read())
"""
POOL = """\
@cache
def pool():
    return ProcessPoolExecutor(1, get_context("fork"))


def twice(values):
    _digest(values)
    return _digest(values)


def digest(values):
    return pool().submit(twice, values).result()
"""
POOL_IMPORTS = """\
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context


"""
MEMORY = """\
def softmax(x):
    scratch = torch.empty(2, *x.shape)
    result = _softmax(x)
    del scratch
    return result
"""
FORMATTED = """\
def digest(
    values,
):

    total = 0

    for value in values:
        total = (
            31 * total + value
        ) % 1000003

    return total
"""
MIRRORED = '        row("mirrored/100000", mirrored, inputs.mirrored, integers, Cost(bytes=8e5, flops=3e5)),\n'
NEW_FUNCTION = "\n\ndef mirrored(values):\n    return [value for value in reversed(values)]\n"


def formatted(root: Path) -> None:
    (root / PLAIN).write_text(FORMATTED)
    native = (root / NATIVE).read_text()
    (root / NATIVE).write_text(native.replace("    ", "\t").replace(") {\n", ")\n{\n"))


def renamed_local(root: Path) -> None:
    (root / PLAIN).write_text((root / PLAIN).read_text().replace("total", "remainder"))


def moved(root: Path) -> None:
    (root / "packages").mkdir()
    git(root, "mv", "python", "packages/mine")


@dataclass(frozen=True)
class Plant:
    """kind: "slower", "10%", "broken" or "harmless". exit: what `compare` must return.

    says: a regular expression that one of its lines must match, of a row "NAME: STATUS DETAIL" or of stderr.
    """

    kind: str
    change: Change
    exit: int
    says: str = ""


def _slower(row: str) -> str:
    return f"^{row}.*: (slower|waits|more)"


PLANTS = {
    "30% in Python": Plant("slower", in_python(30), 1, _slower(DIGEST)),
    "30% in an operator call": Plant("slower", in_an_operator_call(30), 1, _slower(SOFTMAX)),
    "30% in the extension": Plant("slower", in_the_extension(30), 1, _slower(SINE)),
    "10% in Python": Plant("10%", in_python(10), 1, _slower(DIGEST)),
    "10% in an operator call": Plant("10%", in_an_operator_call(10), 1, _slower(SOFTMAX)),
    "10% in the extension": Plant("10%", in_the_extension(10), 1, _slower(SINE)),
    "a sleep": Plant(
        "slower",
        all_of(edited(PLAIN, "def d", "import time\n\n\ndef d"), wrapped(PLAIN, "digest", SLEEP)),
        1,
        _slower(DIGEST),
    ),
    "work moved to a child process": Plant(
        "slower",
        all_of(edited(PLAIN, "def d", "import os\n\n\ndef d"), wrapped(PLAIN, "digest", FORK)),
        1,
        _slower(DIGEST),
    ),
    "work moved to a pool of processes": Plant(
        "slower",
        all_of(edited(PLAIN, "def d", f"{POOL_IMPORTS}def d"), wrapped(PLAIN, "digest", POOL)),
        1,
        _slower(DIGEST),
    ),
    "twice the memory": Plant("slower", wrapped(TENSORS, "softmax", MEMORY), 1, _slower(SOFTMAX)),
    "a benchmark removed": Plant(
        "broken",
        edited(SUITE, '        row("sine/500000", sine', '        # row("sine/500000", sine'),
        3,
        f"{SINE[:11]}.*missing",
    ),
    "a benchmark renamed": Plant(
        "broken", edited(SUITE, '"sine/500000"', '"sines/500000"'), 3, f"{SINE[:11]}.*missing"
    ),
    "a segmentation fault": Plant(
        "broken",
        edited(NATIVE, "    Py_ssize_t n =", "    *(volatile int *)0 = 0;\n    Py_ssize_t n ="),
        3,
        f"SIGSEGV.*{SINE[:11]}",
    ),
    "a hang": Plant(
        "broken", wrapped(PLAIN, "digest", "def digest(values):\n    while values:\n        pass\n"), 3, DIGEST[:13]
    ),
    "a wrong result": Plant(
        "broken",
        wrapped(TENSORS, "softmax", "def softmax(x):\n    return _softmax(x) + 1e-3\n"),
        3,
        f"{SOFTMAX}.*parity",
    ),
    "formatting": Plant("harmless", formatted, 0),
    "a comment": Plant("harmless", all_of(added(PLAIN, "# The end.\n"), added(NATIVE, "/* The end. */\n")), 0),
    "a new benchmark of a new function": Plant(
        "harmless",
        all_of(
            added(PLAIN, NEW_FUNCTION),
            added("bench/inputs.py", NEW_FUNCTION),
            edited(SUITE, "import digest\n", "import digest, mirrored\n"),
            edited(SUITE, '        row("softmax', f'{MIRRORED}        row("softmax'),
        ),
        0,
        "^mirrored/100000 mine: new",
    ),
    "a new file": Plant("harmless", added("python/mine/unused.py", "def unused():\n    return 1\n"), 0),
    "the package moved with its configuration": Plant("harmless", moved, 0),
    "a new version": Plant(
        "harmless",
        all_of(edited(PROJECT, '"1.0"', '"1.1"'), edited("python/mine/__init__.py", '"1.0"', '"1.1"')),
        0,
    ),
    "a renamed local": Plant("harmless", renamed_local, 0),
    "a dependency that is not imported": Plant(
        "harmless", edited(PROJECT, '["torch"]', '["torch", "nobody-has-it"]'), 0
    ),
}
