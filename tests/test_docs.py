"""README.md and docs/: links lead somewhere, and what a reader is told to type works as written.

A page's blocks run in order in one folder that has what a reader has by then: trained runs, a data set, weights. A
block of Python that begins with `# FILE.py` is that file. Commands get the sizes of SMALLER, code of others those of
SMALLER_CODE; commands of NOT_RUN are only checked for their options; those of LONG are left to the long tests.
"""

import gzip
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
CONTRIBUTING = ROOT / "docs" / "contributing.md"
COMING_FROM = ROOT / "docs" / "coming_from.md"
README_LINES = 150
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.S | re.M)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FILE = re.compile(r"# (\S+\.py)(, at its end)?\n")

# Where the commands are, by which they run in this process.
MODULES = {"ddpm": "ddpm.commands", "ddpm-bench": "bench.cli", "ddpm-export": "export.__main__"}
PROGRAMS = {"ddpm": "ddpm", "ddpm-bench": "bench", "ddpm-export": "export", "torchrun": "torch.distributed.run"}

# What is added to a command so that it takes seconds: of an option given twice the last one counts.
SMALLER = {
    r"(torchrun .*)?ddpm train": "--epochs 1 --n-feat 8 --timesteps 50 --schedule cosine --prediction v",
    r"(torchrun .*)?ddpm train (?!.*--resume)": "--overwrite",
    r"ddpm sample runs/digits": "--n 10",
    r"ddpm sample runs/(sprites|numbers)": "--steps 10",
    r"ddpm sample runs/roll": "--n 20 --steps 5",
    r"ddpm (score|forward)": "--n 50",
    r"ddpm evaluate": "--n 20",
    r"ddpm-export onnx": "--steps 10",
    r"ddpm train --network simple_unet --data digits": "--image-size 16",
    r"ddpm-bench run --quick|pytest bench": "--suite kernels --filter q_sample/",
    r"ddpm-bench run": "--no-ceilings",
    r"ddpm-bench run --suite (step|networks|peers|ladder)": "--quick --rounds 1 --processes 1",
    r"ddpm-bench run --suite \w+\.py": "--quick --rounds 2",
    r"ddpm-bench profile": "--trajectories 1 --steps 5",
    r"ddpm import model-10": "--image-size 16",
}
# In code that stands in a page as other people wrote it.
SMALLER_CODE = {"dim=64": "dim=8", "128": "16", "timesteps=1000": "timesteps=50", "timesteps=250": "timesteps=5"}
SMALLER_CODE |= {"train_batch_size=32": "train_batch_size=4", "train_num_steps=700000": "train_num_steps=3"}
SMALLER_CODE |= {"n_feat=32": "n_feat=8", "image_size=28": "image_size=8", "height=28": "height=8", "T = 300": "T = 20"}
SMALLER_CODE |= {"range(100)": "range(1)", "timesteps = 500": "timesteps = 9", "n_feat = 64": "n_feat = 8"}
LONG = (
    r"ddpm train .*--engine compile",
    r"torchrun",
    r"ddpm-bench (profile|static)",
    r"ddpm-bench run --suite (peers|step|networks|ladder)",
    r"ddpm-bench run .*--processes",
    r"ddpm-export (torch|verify)",
    # Their like is run in docs/engines.md and docs/export.md.
    r"ddpm evaluate runs/(digits|sprites)",
    r"ddpm-export .*(digits|results|pipeline|numbers)-onnx",
)
NOT_RUN = {
    r"make ": "each installs, tests, trains or measures for minutes; `make -n` has the target",
    r"pytest (bench|tests/kernels -k|tests/ddpm/test_solvers.py)": "the tests themselves",
    r"ddpm-bench compare": "two commits and a quarter of an hour: tests/bench/test_compare_long.py",
    r"ddpm-bench gpu": "needs a GPU",
    r"ddpm-export onnx .*int8": "its gate needs trained weights: tests/export/test_commands.py",
    r"ddpm-export aoti": "compiles for a minute: tests/export/test_commands.py",
}


class Block(NamedTuple):
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    return [Block(language, textwrap.dedent(text)) for _, language, text in FENCE.findall(page.read_text("utf-8"))]


def commands(block: Block) -> list[str]:
    """The commands of a block in bash, without comments."""
    lines = block.text.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [shlex.join(line).removeprefix(".venv/bin/") for line in words if line]


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def links(page: Path) -> list[str]:
    """The relative links of a page."""
    found = LINK.findall(FENCE.sub("", page.read_text("utf-8")))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text("utf-8"))
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.M)}


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_resolve(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target}: no such file"
        assert not anchor or anchor in anchors(file), f"{target}: no such heading"


def test_every_page_is_reached_from_the_readme():
    linked = {(README.parent / target.partition("#")[0]).resolve() for target in links(README)}
    assert [named(page) for page in PAGES[1:] if page not in linked] == []


def test_the_readme_fits():
    assert len(README.read_text("utf-8").splitlines()) <= README_LINES


ALL = [command for page in PAGES for block in blocks(page) if block.language == "bash" for command in commands(block)]


def test_what_the_tables_here_say_is_in_the_pages():
    stale = [pattern for pattern in (*SMALLER, *LONG, *NOT_RUN) if not any(re.match(pattern, line) for line in ALL)]
    assert stale == []
    assert [size for size in SMALLER_CODE if size not in COMING_FROM.read_text("utf-8")] == []


@pytest.mark.parametrize("command", [line for line in ALL if any(re.match(pattern, line) for pattern in NOT_RUN)])
def test_what_is_not_run_could_be(command):
    """Its target, its files, its options are there."""
    program, *arguments = shlex.split(command)
    if program == "make":
        subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, check=True)
    elif program == "pytest":
        assert all((ROOT / word).exists() for word in arguments if "/" in word)
    else:
        import typer

        name, *options = arguments
        module = importlib.import_module(MODULES[program].replace("__main__", "cli"))
        group = typer.main.get_command(module.app if program == "ddpm-export" else module.app_of())
        group.commands[name].make_context(name, options).close()


# --- what is run ----------------------------------------------------------------------------------------------------


def call(command: str, folder: Path, root: Path | None = None) -> None:
    """Run a command in a folder, made smaller: in this process, or with `root` in one that imports from there."""
    extra = [more for pattern, more in SMALLER.items() if re.match(pattern, command)]
    program, *arguments = shlex.split(" ".join((command, *extra)))
    # Suites of other projects change sys.path; `static` refuses the interpreter, which tests/conftest.py turns on.
    apart = root is not None or arguments[0] == "static" or any(word.endswith(".py") for word in arguments)
    if program in MODULES and not apart:
        assert importlib.import_module(MODULES[program]).main(arguments) == 0, command
        return
    if program == "pytest":
        arguments += ["-p", "no:cacheprovider", "--rootdir", str(folder)]
    module = ["-m", PROGRAMS.get(program, program)] if program != "python" else []
    line = [program, *arguments] if program == "sed" else [sys.executable, *module, *arguments]
    paths = os.pathsep.join(map(str, (root or ROOT, folder)))
    interpreted = {} if program == "pytest" else {"TRITON_INTERPRET": "0"}
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | interpreted
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def write(block: Block, folder: Path) -> bool:
    """Whether the block is a file, or the end of one: it is written then."""
    found = FILE.match(block.text)
    if found is None:
        return False
    path, rest = folder / found[1], block.text[found.end() :]
    path.write_text(f"{path.read_text('utf-8')}\n\n{rest}" if found[2] else rest, "utf-8")
    return True


def follow(page: Path, folder: Path, left_out: tuple[str, ...], root: Path | None = None) -> None:
    """Do what a page says, in a folder."""
    names = {"__name__": page.stem}
    for block in blocks(page):
        if block.language == "bash":
            for command in commands(block):
                if not any(re.match(pattern, command) for pattern in left_out):
                    call(command, folder, root)
        elif block.language == "python" and not write(block, folder):
            if "from diffusers" in block.text and find_spec("diffusers") is None:
                continue
            text = block.text
            for size, small in SMALLER_CODE.items() if page == COMING_FROM else ():
                text = text.replace(size, small)
            exec(compile(text, named(page), "exec"), names)  # noqa: S102 (the page's own)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with runs of the digits and of sprites, the sprites' data, weights to import, pictures."""
    from ddpm import ContextUnet

    folder = tmp_path_factory.mktemp("prepared")
    rng = np.random.default_rng(0)
    np.save(folder / "sprites.npy", rng.integers(0, 256, (60, 16, 16, 3), dtype=np.uint8))
    np.save(folder / "sprites_labels.npy", np.eye(5, dtype=np.float32)[np.arange(60) % 5])
    torch.save(ContextUnet(3, 8, 5, 16).state_dict(), folder / "weights.pth")
    (folder / "weights").mkdir()
    shutil.copy(folder / "weights.pth", folder / "weights" / "context_model_trained.pth")
    shutil.copy(ROOT / "tests" / "ddpm" / "library" / "model-1.pt", folder / "model-10.pt")
    for name, shape in (("images-idx3", (40, 28, 28)), ("labels-idx1", (40,))):
        values = rng.integers(0, 10, shape, dtype=np.uint8)
        values.flat[:10] = range(10)
        header = bytes((0, 0, 8, len(shape))) + np.array(shape, ">i4").tobytes()
        (folder / f"mnist10k-{name}-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes()))
    pictures = folder / "path" / "to" / "your" / "images"
    pictures.mkdir(parents=True)
    for k, values in enumerate(rng.integers(0, 256, (10, 20, 16, 3), dtype=np.uint8)):
        Image.fromarray(values).save(pictures / f"{k}.png")
    (folder / "docs").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("kernels.backend.INTERPRETED", False)
        call("ddpm train --data digits --out runs/demo", folder)
        call("ddpm train --data sprites.npy --labels sprites_labels.npy --classes a,b,c,d,e --out runs/sprites", folder)
    return folder


@pytest.fixture
def reader(prepared, tmp_path, monkeypatch):
    """A copy of it to work in, with one thread."""
    folder = Path(shutil.copytree(prepared, tmp_path / "work"))
    monkeypatch.chdir(folder)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield folder
    torch.set_num_threads(before)


FOLLOWED = [page for page in PAGES if page != CONTRIBUTING]


# Pages whose commands take 5 s and more, and which have a like of them among the others.
SLOW = ("export", "editing", "guidance", "coming_from", "training", "ci")


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.long if page.stem in SLOW else (), id=named(page)) for page in FOLLOWED],
)
def test_a_page_works_as_written(page, reader):
    if page.stem == "diffusers":
        pytest.importorskip("diffusers", reason="diffusers is optional and not installed here")
    follow(page, reader, (*NOT_RUN, *LONG))


def is_long(page: Path) -> bool:
    lines = [command for block in blocks(page) if block.language == "bash" for command in commands(block)]
    return any(re.match(pattern, line) for line in lines for pattern in LONG)


@pytest.mark.long
@pytest.mark.parametrize("page", [page for page in FOLLOWED if is_long(page)], ids=named)
def test_a_page_works_as_written_with_what_takes_long(page, reader):
    follow(page, reader, tuple(NOT_RUN))


@pytest.mark.long
def test_contributing_works_as_written(tmp_path):
    """In a copy of the packages, from which the commands import."""
    for name in ("bench", "ddpm", "export", "kernels", "tests", "pyproject.toml"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    follow(CONTRIBUTING, tmp_path, tuple(NOT_RUN), root=tmp_path)
