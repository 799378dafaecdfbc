"""Ctrl-C and SIGTERM: commands end with 130 or 143 and leave whole files, programs that go on get right pictures."""

import copy
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import torch

from ddpm import ContextUnet, NoiseSchedule, sample
from tests.faults.processes import POLL, Child, Lost, start
from tests.faults.tries import Try, Wanted, draws
from tests.faults.works import WORKS, Shop, Work, check_healed, check_reader, check_versions

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}
COMMANDS, INSIDE, THREADS = "Ctrl-C or SIGTERM to a command", "Ctrl-C inside sample()", "threads that sample one model"
CASES = COMMANDS, INSIDE, THREADS
MOMENTS, CALLS = 5, 40


def command(shop: Shop, work: Work, number: int, seed: int, folder: Path) -> None:
    normal = shop.undisturbed(work)
    shop.stocked(folder, work.start)
    begun = folder.parent / "begun"
    child = start(folder, work.words, begun.touch)
    while not begun.exists():
        time.sleep(POLL)
    time.sleep(draws(work.name, number, seed).uniform(0.05, normal.seconds))
    child.send(number)
    ended = child.wait()
    if ended.code not in (0, SIGNALS[number]) or "Traceback" in ended.err:
        said = " | ".join(ended.err.splitlines()[-12:])
        raise Lost(f"{ended.what}: ended with {ended.code}, needs {SIGNALS[number]} and no traceback; said: {said}")
    check_versions(folder, normal, partials=False)
    check_reader(folder, work, normal)
    check_healed(folder, work, normal)


def _model(training: bool) -> tuple[ContextUnet, NoiseSchedule]:
    torch.manual_seed(0)
    return ContextUnet(1, 8, 3, 16).train(training), NoiseSchedule.make("cosine", 20)


def _sampled(model: ContextUnet, schedule: NoiseSchedule, engine: str, seed: int = 0) -> torch.Tensor:
    return sample(model, schedule, 2, solver="ddim", steps=4, clip=1.0, engine=engine, seed=seed)


def at_python_call(number: int, happens: Callable[[], None]) -> None:
    """`happens` in the number-th function of ours, or of PyTorch's that one of ours calls, that begins after this."""
    left = number

    def profile(frame: FrameType, event: str, _: object) -> None:
        nonlocal left
        name = frame.f_code.co_filename
        if event in ("call", "c_call") and ("/ddpm/" in name or "/kernels/" in name) and "/tests/" not in name:
            left -= 1
            if left < 0:
                sys.setprofile(None)
                happens()

    sys.setprofile(profile)


def _raise() -> None:
    raise KeyboardInterrupt


def _count(engine: str) -> int:
    """How many calls the interrupted sample makes."""
    count = 0

    def profile(frame: FrameType, event: str, _: object) -> None:
        nonlocal count
        name = frame.f_code.co_filename
        count += event in ("call", "c_call") and ("/ddpm/" in name or "/kernels/" in name) and "/tests/" not in name

    model, schedule = _model(training=True)
    _sampled(model, schedule, engine)
    with torch.no_grad():
        model.out[0].weight.mul_(1.5)
    sys.setprofile(profile)
    _sampled(model, schedule, engine)
    sys.setprofile(None)
    return count


def _in_a_child(folder: Path, work: Callable[[], int], what: str) -> None:
    ended = Child(folder, work, what).wait()
    if ended.code:
        raise Lost(ended.out.strip() or ended.last())


def inside(_: Shop, engine: str, share: float, folder: Path) -> None:
    """The weights change, sampling them is interrupted, the weights come back: pictures and modes are as before."""
    folder.mkdir()

    def work() -> int:
        model, schedule = _model(training=True)
        at = int(share * _count(engine))
        right, weights = _sampled(model, schedule, engine), copy.deepcopy(model.state_dict())
        model.load_state_dict({name: w * 1.3 if w.is_floating_point() else w for name, w in weights.items()})
        try:
            at_python_call(at, _raise)
            _sampled(model, schedule, engine)
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)
        model.load_state_dict(weights)
        modes = [module.training for module in model.modules()]
        off = float((_sampled(model, schedule, engine) - right).abs().max())
        same = all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
        if off or not all(modes) or not same:
            print(f"the next pictures are off by {off:.2g}, modes kept: {all(modes)}, statistics kept: {same}")
            return 1
        return 0

    _in_a_child(folder, work, f"sample() with {engine}, interrupted")


def threads(_: Shop, engine: str, training: bool, seed: int, folder: Path) -> None:
    """Three threads sample one model, each its own seed: as one after the other; the model is left as it was."""
    folder.mkdir()

    def work() -> int:
        model, schedule = _model(training)
        before = copy.deepcopy(model.state_dict())
        right = [_sampled(model, schedule, engine, k) for k in range(3)]
        found: list[torch.Tensor | None] = [None] * 3
        draw = draws(seed)
        waits = [draw.uniform(0, 0.03) for _ in range(3)]

        def one(k: int) -> None:
            time.sleep(waits[k])
            found[k] = _sampled(model, schedule, engine, k)

        running = [threading.Thread(target=one, args=(k,)) for k in range(3)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        off = [float((a - b).abs().max()) if a is not None else None for a, b in zip(found, right, strict=True)]
        modes = all(module.training == training for module in model.modules())
        same = all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        if any(off) or None in off or not modes or not same:
            print(f"pictures are off by {off}, modes kept: {modes}, statistics kept: {same}")
            return 1
        return 0

    _in_a_child(folder, work, f"threads with {engine}")


def tries(shop: Shop, wanted: Wanted) -> Iterator[Try]:
    for work in WORKS:
        if not wanted(COMMANDS, work.name):
            continue
        shop.undisturbed(work)
        for number in SIGNALS:
            for seed in range(MOMENTS):
                how = f"{signal.Signals(number).name}, seed {seed}"
                yield Try(COMMANDS, work.name, how, command, (work, number, seed))
    for engine in ("eager", "fused"):
        for k in range(CALLS):
            yield Try(INSIDE, engine, f"at {k}/{CALLS} of its calls", inside, (engine, k / CALLS))
        for training in (False, True):
            for seed in range(5):
                how = f"{'train' if training else 'eval'} mode, seed {seed}"
                yield Try(THREADS, engine, how, threads, (engine, training, seed))
