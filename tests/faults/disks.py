"""A disk that is full, at every size at which something no longer fits."""

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.processes import Lost, call, content, differences
from tests.faults.tries import Try, Wanted
from tests.faults.works import WORKS, Shop, Undisturbed, Work, check_healed, check_reader, check_versions

LARGEST, ROOM = "no file may grow beyond a limit", "a file system with too little room"
CASES = LARGEST, ROOM
SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.95)  # of what the work writes
PAGE = 4096


def _check(folder: Path, work: Work, normal: Undisturbed, done: Callable[[], None]) -> None:
    """The command, where there is no room; `done` makes room again."""
    ended = call(folder, work.words)
    if ended.code == 0:
        odd = differences(content(folder), normal.after)
        if odd:
            raise Lost(f"says that it succeeded, but {odd}")
        return
    targets = {Path(name).name for name in normal.after.keys() - normal.before.keys() | normal.between.keys()}
    ended.refusal(*targets, "run", "onnx")
    check_versions(folder, normal, partials=False)
    done()
    check_reader(folder, work, normal)
    check_healed(folder, work, normal)


def no_file_beyond(shop: Shop, work: Work, size: int, folder: Path) -> None:
    """RLIMIT_FSIZE; Python ignores the signal that comes with it, so writes fail as on a full disk (EFBIG)."""
    shop.stocked(folder, work.start)

    def limit(to: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (to, resource.RLIM_INFINITY))

    limit(size)
    _check(folder, work, shop.undisturbed(work), lambda: limit(resource.RLIM_INFINITY))


@contextmanager
def small(folder: Path) -> Iterator[Callable[[int], None]]:
    """A tmpfs at the folder; what is yielded gives it so many bytes of free room."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], check=True, capture_output=True)
    try:

        def free(room: int) -> None:
            status = os.statvfs(folder)
            used = (status.f_blocks - status.f_bfree) * status.f_frsize
            size = f"remount,size={used + room // PAGE * PAGE}"
            subprocess.run(["mount", "-o", size, str(folder)], check=True, capture_output=True)

        yield free
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


def may_mount(folder: Path) -> bool:
    """Whether this process may mount at all."""
    try:
        with small(folder):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False
    finally:
        folder.rmdir()


def too_little_room(shop: Shop, work: Work, share: float, folder: Path) -> None:
    normal = shop.undisturbed(work)
    with small(folder) as free:
        shop.stocked(folder / "in", work.start)
        free(int(share * sum(normal.sizes)))
        _check(folder / "in", work, normal, lambda: free(1 << 26))


def limits(sizes: list[int]) -> list[int]:
    """Sizes at which one more file no longer fits: none, half of each, all but its last byte."""
    return sorted({0, *(size // 2 for size in sizes), *(size - 1 for size in sizes)})


def tries(shop: Shop, wanted: Wanted) -> Iterator[Try]:
    mounts = may_mount(shop.new("mounted"))
    for work in WORKS:
        if not any(wanted(case, work.name) for case in CASES):
            continue
        sizes = shop.undisturbed(work).sizes
        for size in limits(sizes):
            yield Try(LARGEST, work.name, f"{size} bytes", no_file_beyond, (work, size))
        for share in SHARES if mounts else ():
            yield Try(ROOM, work.name, f"{share:.0%} of {sum(sizes)} bytes", too_little_room, (work, share))
