"""Programs: what is recorded is run, pass by pass, by any number of threads, and nothing else can be recorded."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from kernels import backend, native, winograd
from kernels.native import program
from kernels.native.program import Recorder, Unrecorded
from kernels.native.threads import single_threaded
from kernels.winograd import transform

pytestmark = pytest.mark.skipif(native.missing_any() is not None, reason=str(native.missing_any()))
WORKER = Path(native.__file__).with_name("worker.h")
# y = x * row[0] + the total of x modulo 64, through scratch memory and a barrier. delay: rounds of doing nothing.
TINY = f"""
#include <cmath>
#include "{WORKER}"
namespace {{
struct TinyCall {{ const float *x, *row; float* y; int64_t count, delay; }};
int64_t tiny_floats(const TinyCall&, int64_t) {{ return 1; }}
void tiny(const TinyCall& c, Worker& worker) {{
    const Worker::Range own = worker.share(c.count);
    *worker.memory = 0;
    for (int64_t i = own.first; i < own.last; ++i) *worker.memory += c.x[i];
    worker.barrier();
    float total = 0;
    for (int64_t other = 0; other < worker.threads; ++other) total += *worker.memory_of(other);
    for (volatile int64_t k = 0; k < c.delay; k = k + 1) {{}}
    worker.barrier();
    for (int64_t i = own.first; i < own.last; ++i) c.y[i] = c.x[i] * c.row[0] + std::fmod(total, 64.f);
}}
}}
NATIVE_OPERATOR(tiny, TinyCall)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "tiny.cpp"
    path.write_text(TINY)
    return path


class Chain:
    """x <- three calls on x, a row of the table for each pass: in small integers, where floats are exact."""

    def __init__(self, source, passes=5, delay=0, size=7):
        self.source, self.delay, self.passes = source, delay, passes
        generator = torch.Generator().manual_seed(size)
        self.table = torch.randint(-1, 2, (passes, 1), generator=generator).float()
        self.x, self.begin = torch.zeros(size), torch.randint(-1, 2, (size,), generator=generator).float()
        recorder = Recorder(self.table)
        with recorder:
            row = self.table[:1]
            y = self.call(self.x, row)
            y = self.call(y, row)
            self.call(y, row, self.x)
        self.program = recorder.program()

    def call(self, x, row, out=None):
        out = torch.empty_like(x) if out is None else out
        addresses = [tensor.data_ptr() for tensor in (x, row, out)]
        backend.launch_native(self.source, [*addresses, x.numel(), self.delay])
        return out

    def expected(self, passes=None):
        x = self.begin.clone()
        for row in self.table[:passes]:
            for _ in range(3):
                x = x * row + torch.fmod(x.sum(), 64)
        return x

    def drawn(self, passes=None, **how):
        self.x.copy_(self.begin)
        return [*self.program.run(passes or self.passes, **how)], self.x.clone()


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_each_pass_takes_its_row_whatever_the_number_of_threads(source, set_threads, count):
    set_threads(count)
    chain = Chain(source)
    for passes in (5, 1, 3):
        done, x = chain.drawn(passes)
        assert done[-1] == passes
        assert torch.equal(x, chain.expected(passes))
    done, x = chain.drawn(singly=True)
    assert done == [1, 2, 3, 4, 5]
    assert torch.equal(x, chain.expected())


def test_memory_is_taken_again_when_its_tensors_are_gone(source):
    recorder, x = Recorder(), torch.ones(1000)
    chain = Chain(source)
    with recorder:
        kept = chain.call(x, x)[10:]
        for _ in range(6):
            x = chain.call(x, x)
    assert sorted(block.nbytes() for block in recorder.blocks) == [4000] * 3
    assert kept.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


ZERO, IMAGE, WEIGHT = torch.zeros(1, dtype=torch.int64), torch.ones(1, 32, 4, 4), transform(torch.ones(32, 32, 3, 3))
STRAYS = {
    "aten.add.Tensor": lambda x: x + 1,
    "aten.mul_.Tensor": lambda x: x[:2].mul_(2),
    "aten._local_scalar_dense.default": lambda x: int(x[0]),
    "aten.zeros.default": lambda x: torch.zeros(2),
    "aten.clone.default": lambda x: x[::2].contiguous(),
    "aten.index_select.default": lambda x: x.index_select(0, ZERO),
    "fused_ddpm.winograd.default": lambda x: winograd(IMAGE, [WEIGHT], [None]),
}


@pytest.mark.parametrize("name", STRAYS)
def test_what_is_no_operator_in_cpp_is_an_error_that_names_it(name):
    x = torch.ones(4)
    with pytest.raises(Unrecorded, match=f"^{name} .*not an operator of ours"), Recorder():
        STRAYS[name](x)
    assert float((x + 1).sum()) == 8.0  # nothing is recorded any more


def test_a_call_has_room_for_what_moves(source):
    with pytest.raises(ValueError, match="tiny: a call of 65 fields, needs at most 64"):
        program.Program([(source, (0,) * 65)], (), ())


def test_other_threads_are_not_recorded(source):
    chain, results = Chain(source), []
    with Recorder() as recorder:
        worker = threading.Thread(target=lambda: results.append(chain.call(torch.ones(3), torch.ones(1)) + 1))
        worker.start()
        worker.join()
    assert not recorder.calls
    assert results[0].tolist() == [5.0, 5.0, 5.0]


def test_it_comes_back_to_python_within_a_pass(source, monkeypatch):
    monkeypatch.setattr(program, "SLICE_NS", 0)
    chain = Chain(source, passes=20)
    done, x = chain.drawn()
    assert done == sorted(set(done))
    assert done[-1] == 20
    assert len(done) > 5
    assert torch.equal(x, chain.expected())


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_within_a_pass(source, set_threads, kind):
    """Afterwards the program runs from its beginning."""
    set_threads(2)
    chain, quick = Chain(source, passes=1000, delay=10**7), Chain(source)

    def stop(*_):
        raise KeyboardInterrupt

    before = signal.signal(kind, stop)
    alarm = threading.Timer(0.1, os.kill, (os.getpid(), kind))
    alarm.start()
    try:
        began = time.perf_counter()
        with pytest.raises(KeyboardInterrupt):
            chain.drawn()
    finally:
        signal.signal(kind, before)
        alarm.join()
    assert time.perf_counter() - began < 30
    assert torch.equal(quick.drawn()[1], quick.expected())


def test_a_forked_child_has_threads_of_its_own(source, set_threads):
    set_threads(2)
    chain = Chain(source)
    chain.drawn()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        torch.set_num_threads(2)
        os._exit(0 if torch.equal(chain.drawn()[1], chain.expected()) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(chain.drawn()[1], chain.expected())


def test_several_threads_run_programs_of_their_own(source, set_threads):
    set_threads(2)
    chains, right = [Chain(source, passes=200, size=size) for size in (3, 5, 8, 13)], []
    start = threading.Barrier(len(chains))

    def work(chain):
        torch.set_num_threads(2)
        start.wait()
        right.extend(torch.equal(chain.drawn()[1], chain.expected()) for _ in range(3))

    workers = [threading.Thread(target=work, args=(chain,)) for chain in chains]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert right == [True] * 12


def test_threads_of_pytorch_that_are_still_awake_are_ended(source, set_threads):
    def count() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    set_threads(2)
    chain = Chain(source)
    chain.drawn()
    torch.ones(1 << 20).exp()
    before = count()
    chain.drawn()
    assert count() == before - 1


def test_programs_that_are_gone_leave_neither_threads_nor_memory(source, set_threads):
    set_threads(3)
    Chain(source).drawn()
    before = len(list(Path("/proc/self/task").iterdir()))
    for _ in range(100):
        Chain(source).drawn()
    assert len(list(Path("/proc/self/task").iterdir())) <= before  # others may end meanwhile


WHERE = f"""
#include <sched.h>
#include "{WORKER}"
namespace {{
struct WhereCall {{ int64_t* processors; }};
int64_t where_floats(const WhereCall&, int64_t) {{ return 0; }}
void where(const WhereCall& c, Worker& worker) {{ c.processors[worker.thread] = sched_getcpu(); }}
}}
NATIVE_OPERATOR(where, WhereCall)
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor")
def test_threads_that_slept_wake_up_on_processors_of_their_own(tmp_path, set_threads):
    path, threads = tmp_path / "where.cpp", 2
    path.write_text(WHERE)
    set_threads(threads)
    where, allowed = torch.zeros(threads, dtype=torch.int64), os.sched_getaffinity(0)
    recorder = Recorder()
    with recorder:
        backend.launch_native(path, [where.data_ptr()])
    recorded = recorder.program()
    for _ in range(30):
        time.sleep(0.02)
        list(recorded.run(1))
        assert len(set(where.tolist())) == threads
        assert os.sched_getaffinity(0) == allowed
    os.sched_setaffinity(0, [min(allowed)])  # of the caller: the others have to share it
    try:
        list(recorded.run(1))
        assert where.tolist() == [min(allowed)] * threads
    finally:
        os.sched_setaffinity(0, allowed)


HOW_MANY = WHERE.replace(
    "c.processors[worker.thread] = sched_getcpu();",
    "cpu_set_t may; sched_getaffinity(0, sizeof may, &may); c.processors[worker.thread] = CPU_COUNT(&may);",
)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_thread_alone_may_be_moved_away_from_another_process(tmp_path, set_threads, threads):
    path = tmp_path / "where.cpp"
    path.write_text(HOW_MANY)
    set_threads(threads)
    counts, recorder = torch.zeros(threads, dtype=torch.int64), Recorder()
    with recorder:
        backend.launch_native(path, [counts.data_ptr()])
    list(recorder.program().run(1))
    assert counts.tolist() == ([len(os.sched_getaffinity(0))] if threads == 1 else [1, 1])


def test_single_threaded_is_for_this_thread_and_a_while(set_threads):
    set_threads(3)
    counts = []
    other = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
    with single_threaded():
        other.start()
        other.join()
        counts.append(torch.get_num_threads())
    assert [*counts, torch.get_num_threads()] == [3, 1, 3]
