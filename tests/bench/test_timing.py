"""What a sample is of: processor time of children, live or ended, and wall time without the queue for a processor."""

import multiprocessing
import os
import subprocess
import sys
import time

import pytest
import torch

from bench.processor import children_seconds, queued_seconds
from bench.timing import timer

CPU = torch.device("cpu")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="live children are read from /proc")
BURN = "import time\nwhile time.process_time() < .2: pass\n"


def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def processor_of(call):
    return timer(call, [()], CPU)().processor * 1e-6


def test_a_child_that_ended_is_counted():
    run = [sys.executable, "-S", "-c", BURN]
    assert processor_of(lambda: subprocess.run(run, check=True)) == pytest.approx(0.2, rel=0.3)
    assert processor_of(lambda: burn(0.05)) == pytest.approx(0.05, rel=0.3)
    assert processor_of(lambda: time.sleep(0.05)) < 0.02


@linux
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_pool_that_lives_on_is_counted_and_when_it_ends_nothing_is_counted_twice(method):
    with multiprocessing.get_context(method).Pool(1) as pool:
        pool.map(burn, [0.01])
        assert processor_of(lambda: pool.map(burn, [0.1] * 2, chunksize=1)) == pytest.approx(0.2, rel=0.3)
        before = children_seconds()
        pool.close()
        pool.join()
    assert children_seconds() - before == pytest.approx(0, abs=0.1)


@linux
def test_a_child_of_a_child_and_one_that_nobody_waited_for_are_counted():
    nested = (
        f"import subprocess, sys\nsubprocess.run([sys.executable, '-S', '-c', {BURN!r}])\nprint(1, flush=True)\ninput()"
    )
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", nested], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    before = children_seconds()
    child.stdout.readline()  # its own child has ended, it lives
    assert children_seconds() - before == pytest.approx(0.2, abs=0.1)
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie now
    assert children_seconds() - before == pytest.approx(0.2, abs=0.1)
    child.wait()
    child.stdout.close()
    assert children_seconds() - before == pytest.approx(0.2, abs=0.1)


@pytest.mark.skipif(queued_seconds() is None, reason="this system does not say how long a thread queues")
def test_wall_time_without_the_queue_is_what_was_computed_and_waited_for():
    core = sorted(os.sched_getaffinity(0))
    load = subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"])
    try:
        os.sched_setaffinity(load.pid, core[:1])
        os.sched_setaffinity(0, core[:1])  # both want the one core
        found = timer(lambda: (burn(0.2), time.sleep(0.1)), [()], CPU)()
    finally:
        os.sched_setaffinity(0, core)
        load.kill()
        load.wait()
    assert found.wall > 0.36e6  # the other one had the core for as long
    assert found.wall - found.queued == pytest.approx(0.3e6, rel=0.2)
