"""Where Ctrl-C and SIGTERM have to wait: PyTorch's tracing does not survive an exception from outside."""

import signal
import threading
from collections.abc import Callable

import pytest

from ddpm import ContextUnet, NoiseSchedule, sample
from ddpm.engines import compile as compiling
from ddpm.interrupts import interrupts_wait
from export import traced


@pytest.fixture(autouse=True)
def as_a_shell_starts_a_program():
    """One that is started in the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted(then: Callable[[], object], times: int = 1) -> None:
    with interrupts_wait():
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        then()


def test_an_interrupt_takes_effect_at_the_end():
    did = []
    with pytest.raises(KeyboardInterrupt):
        interrupted(lambda: did.append("the rest"))
    assert did == ["the rest"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_does_not_swallow_it():
    with pytest.raises(KeyboardInterrupt) as caught:
        interrupted(lambda: int("what PyTorch makes of it"))
    assert isinstance(caught.value.__context__, ValueError)


def test_a_second_interrupt_is_heeded_at_once():
    did = []
    with pytest.raises(KeyboardInterrupt):
        interrupted(lambda: did.append("the rest"), times=2)
    assert not did


def test_a_termination_gets_to_the_programs_own_handler():
    got = []
    before = signal.signal(signal.SIGTERM, lambda number, _: got.append(number))
    try:
        with interrupts_wait():
            signal.raise_signal(signal.SIGTERM)
            assert not got
        assert got == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_have_no_signals_to_hold():
    did = []

    def work() -> None:
        with interrupts_wait():
            did.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert did == [signal.default_int_handler]


@pytest.fixture
def interrupted_call():
    """A function that is interrupted while it runs, and goes on to its end: its result, or what was raised."""
    ended = []

    def make(call):
        def inner(*arguments, **more):
            signal.raise_signal(signal.SIGINT)
            result = call(*arguments, **more)
            ended.append(call)
            return result

        return inner

    return make, ended


def test_tracing_for_onnx_ends_before_the_interrupt_does(interrupted_call, monkeypatch):
    make, ended = interrupted_call
    monkeypatch.setattr(traced.torch.onnx, "export", make(lambda *_, **__: None))
    with pytest.raises(KeyboardInterrupt):
        traced.trace(ContextUnet(1, 8, 0, 8))
    assert len(ended) == 1


@pytest.mark.parametrize("what", ["network", "update"])
def test_compiling_ends_before_the_interrupt_does(interrupted_call, monkeypatch, what):
    make, ended = interrupted_call

    def compiled(function, **_):
        return make(function) if (function is compiling._update) == (what == "update") else function

    compiling._compiled_update.cache_clear()
    monkeypatch.setattr(compiling.torch, "compile", compiled)
    monkeypatch.setattr(compiling.CompileEngine, "lacks", classmethod(lambda *_, **__: None))
    try:
        with pytest.raises(KeyboardInterrupt):
            sample(ContextUnet(1, 8, 0, 8), NoiseSchedule.make("cosine", 10), 1, steps=2, engine="compile", seed=0)
    finally:
        compiling._compiled_update.cache_clear()
    assert len(ended) == 1
