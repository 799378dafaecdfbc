"""The native engine: recorded once, run by threads of its own, and the same pictures whatever happens beside it.

That it draws eager's pictures with every solver is in test_engines.py, test_guidance.py and test_simple_unet.py.
"""

import copy
import gc
import logging
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

from ddpm import NoiseSchedule, Trajectory, engines, inference, make_table, sample
from ddpm.engines import NativeEngine, choose
from ddpm.inference import ContextUnetForm, PlainForm, kept_form
from ddpm.inference.form import NATIVE
from ddpm.inference.unet import UnetForm
from ddpm.metrics import distance
from kernels import native

CPU = torch.device("cpu")
SCHEDULE = NoiseSchedule.make("cosine", 30)
LACK = engines.unavailable_reason("native", CPU)
needs_native = pytest.mark.skipif(LACK is not None, reason=f"needs {LACK}")
CONTEXT = torch.eye(5)


def draw(model, n=3, engine="native", **options):
    given = {"solver": "ddpm", "steps": 6, "prediction": "v", "seed": 3, "context": CONTEXT[:n]} | options
    return sample(model, SCHEDULE, n, engine=engine, **given)


def prepared(model, table=None, **options):
    table = make_table(SCHEDULE, "ddpm", 6, prediction="v") if table is None else table
    return Trajectory(model, SCHEDULE, table, **{"engine": "native", "guided": True} | options)


@pytest.fixture
def recordings(monkeypatch):
    """The batch sizes that were recorded."""
    made, record = [], NativeEngine.state.__init__

    def noting(self, by, x, *given):
        made.append(len(x))
        record(self, by, x, *given)

    monkeypatch.setattr(NativeEngine.state, "__init__", noting)
    return made


@needs_native
def test_what_is_done_before_the_steps_wakes_no_threads_of_pytorch(unet, set_threads, monkeypatch):
    set_threads(2)
    draws = prepared(unet())
    draws(3, seed=3, context=CONTEXT[:3])
    counts, replay = [], NativeEngine.state.replay

    def counting(self, *given):  # the program ends them when it begins
        counts.append(len(list(Path("/proc/self/task").iterdir())))
        return replay(self, *given)

    monkeypatch.setattr(NativeEngine.state, "replay", counting)
    for _ in range(2):
        draws(3, seed=3, context=CONTEXT[:3])
    assert counts == [len(list(Path("/proc/self/task").iterdir()))] * 2


@needs_native
@pytest.mark.parametrize(("threads", "processors", "used"), [(1, 4, 1), (3, 4, 3), (8, 2, 2)])
def test_there_are_no_more_threads_than_processors(unet, set_threads, monkeypatch, threads, processors, used):
    set_threads(threads)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(processors)))
    model = unet()
    draw(model)
    (state,) = kept_form(model, torch.float32, NATIVE).states.values()
    assert state.program.threads == used


@needs_native
@pytest.mark.parametrize("solver", ["ddpm", "dpmpp_2m"])
def test_the_number_of_threads_changes_no_bit(unet, set_threads, monkeypatch, solver):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {*range(3)})
    model, images = unet(n_feat=32), []
    for count in (1, 2, 3):
        set_threads(count)
        trajectory = prepared(copy.deepcopy(model), make_table(SCHEDULE, solver, 6, prediction="v"))
        x = torch.randn(3, *trajectory.shape, generator=torch.Generator().manual_seed(0))
        for n, options in ((3, {}), (1, {}), (3, {"guidance": 2.0}), (3, {"guidance": 2.0, "guidance_rescale": 0.5})):
            images.append(trajectory(n, CONTEXT[:n], x_T=x[:n], **options))
    for one, two, three in zip(images[:4], images[4:8], images[8:], strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@needs_native
def test_weights_of_samples_negatives_intervals_and_rescale(unet):
    model = unet()
    for way in (
        {"guidance": [2.5, -1.0, 1.0], "negative": CONTEXT[:3].flip(0), "guidance_rescale": 0.7},
        {"guidance": [2.0, 1.0, 0.0], "guidance_interval": (0.2, 0.8)},
        {"guidance": 2.0, "guidance_rescale": 1.0, "clip": 1.0, "solver": "dpmpp_2m"},
        {"context": None},
        {"solver": "pc", "steps": 3},
        {"first_sample": 1 << 40, "solver": "ddim", "eta": 0.5},
    ):
        assert distance(draw(model, **way), draw(model, engine="eager", **way)) < 1e-5, way


@needs_native
def test_a_second_call_prepares_nothing_and_another_size_is_recorded_anew(unet, recordings):
    model = unet()
    first = draw(model)
    for options in ({}, {"seed": 4}, {"steps": 9}, {"solver": "ddim"}):
        draw(model, **options)
    assert recordings == [3]
    draw(model, 2)
    assert torch.equal(draw(model), first)
    assert recordings == [3, 2]
    draw(model, 5, batch_size=3, context=CONTEXT)
    assert recordings == [3, 2]
    with torch.no_grad():
        model.out[3].weight.mul_(0.5)
    assert distance(draw(model), draw(model, engine="eager")) < 1e-5
    assert recordings == [3, 2]  # the weights were taken over where they lie
    inference.release(model)
    draw(model)
    assert recordings == [3, 2, 3]


@needs_native
def test_a_trajectory_keeps_its_weights_until_refresh(unet, recordings):
    model = unet()
    trajectory = prepared(model)
    before = trajectory(2, CONTEXT[0], seed=3)
    with torch.no_grad():
        model.out[3].weight.mul_(0.5)
    assert torch.equal(trajectory(2, CONTEXT[0], seed=3), before)
    trajectory.refresh()
    expected = prepared(model, engine="eager")(2, CONTEXT[0], seed=3)
    assert distance(trajectory(2, CONTEXT[0], seed=3), expected) < 1e-5
    assert recordings == [2]


@needs_native
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda given: pickle.loads(pickle.dumps(given))])  # noqa: S301
def test_a_copy_of_a_trajectory_that_has_run_draws_the_same_by_itself(unet, recordings, copied):
    trajectory = prepared(unet())
    expected = trajectory(2, CONTEXT[0], seed=3)
    other = copied(trajectory)
    assert torch.equal(other(2, CONTEXT[0], seed=3), expected)
    assert torch.equal(trajectory(2, CONTEXT[0], seed=3), expected)
    assert recordings == [2, 2]


@needs_native
def test_what_it_leaves_in_its_memory_is_read_by_nobody(unet):
    """Blocks full of NaN before each run: every step writes before it reads."""
    model = unet()
    expected = draw(model, guidance=2.0)
    for state in kept_form(model, torch.float32, NATIVE).states.values():
        for block in state.program.blocks:
            torch.empty(0).set_(block, 0, (block.nbytes() // 4,)).fill_(torch.nan)
        state.program.scratch.fill_(torch.nan)
    assert torch.equal(draw(model, guidance=2.0), expected)


EACH = [3.0, -1.0, 1.0, 0.0, 2.0]  # a weight a sample
WAYS = [
    {},
    {"guidance": 2.0, "negative": CONTEXT[4]},
    {"guidance": EACH, "guidance_interval": (0.2, 0.8)},
    {"guidance": EACH, "guidance_rescale": 0.5},
    {"solver": "dpmpp_2m"},
]


@needs_native
@pytest.mark.parametrize("options", WAYS)
def test_many_samples_go_through_the_network_in_parts(unet, monkeypatch, options):
    """Of two pixels more than two images have: five samples are parts of 1, 2 and 2."""
    model = unet()
    expected = draw(model, 5, **options)
    inference.release(model)
    monkeypatch.setattr("ddpm.engines.native.PIXELS", 2 * 16 * 16 + 2)
    assert torch.equal(draw(model, 5, **options), expected)
    state = next(reversed(kept_form(model, torch.float32, NATIVE).states.values()))
    assert [len(part.x) for _, part in state.parts] == [1, 2, 2]


@needs_native
def test_a_callback_runs_it_row_by_row_which_is_said(unet, caplog):
    model, rows = unet(), []
    with caplog.at_level(logging.INFO, logger="ddpm"):
        expected = draw(model)
        assert "row by row" not in caplog.text
        images = draw(model, callback=lambda row, x0: rows.append((row, x0.clone())))
    assert "engine native: goes row by row, for a callback" in caplog.text
    assert torch.equal(images, expected)
    assert [row for row, _ in rows] == [*range(6)]
    assert torch.equal(rows[-1][1], expected)  # the last row of ddpm lands on x0


@needs_native
def test_who_only_counts_is_told_now_and_then(unet, caplog, monkeypatch):
    monkeypatch.setattr("kernels.native.program.SLICE_NS", 0)
    told = []

    def count(row, x0):
        told.append((row, x0))

    count.only_counts = True
    with caplog.at_level(logging.INFO, logger="ddpm"):
        draw(unet(), callback=count)
    assert "row by row" not in caplog.text
    assert [row for row, _ in told] == sorted({row for row, _ in told})
    assert told[-1] == (5, None)


REFUSED = {
    "float32, which its operators compute in": {"dtype": torch.float64},
    "float32, which its operators": {"dtype": torch.bfloat16},
    "Philox noise, which its operators draw": {"noise": lambda samples, step, stream, shape: torch.ones(3, *shape)},
}


@needs_native
@pytest.mark.parametrize("needs", REFUSED)
def test_what_it_cannot_do_is_refused(unet, needs):
    with pytest.raises(RuntimeError, match=f"engine: 'native' in .* needs {needs}"):
        draw(unet(), **REFUSED[needs])


def test_a_network_without_a_form_is_refused_and_auto_takes_another(unet, caplog):
    hooked = unet()
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="'native' in float32 needs a network whose inference form is written in op"):
        draw(hooked)
    with caplog.at_level(logging.INFO, logger="ddpm"):
        assert distance(draw(hooked, engine="auto"), draw(hooked, engine="eager")) < 1e-4
    assert (
        "engine auto: fused on cpu (native needs a network whose inference form is written in operators" in caplog.text
    )


@pytest.mark.parametrize(
    ("options", "lack", "chosen"),
    [
        ({}, None, "native"),
        ({}, "native kernels need a C++ compiler: found no g++", "fused"),
        ({"dtype": torch.bfloat16}, None, "fused"),
        ({"custom_noise": True}, None, "fused"),
        ({"form": PlainForm}, None, "fused"),
        ({"form": UnetForm}, None, "fused"),
        ({"form": ContextUnetForm}, None, "native"),
    ],
)
def test_auto_takes_it_where_it_can_and_says_why_not(monkeypatch, caplog, options, lack, chosen):
    monkeypatch.setattr(native, "missing_any", lambda: lack)
    with caplog.at_level(logging.INFO, logger="ddpm"):
        assert choose("auto", CPU, **options).name == chosen
    assert f"engine auto: {chosen} on cpu ({'the fastest' if chosen == 'native' else 'native needs '}" in caplog.text
    assert lack is None or lack in caplog.text


@needs_native
def test_it_runs_cpp_where_triton_is_interpreted_too(unet, monkeypatch):
    model = unet()
    expected = draw(model)
    inference.release(model)
    monkeypatch.setattr("kernels.backend.INTERPRETED", True)
    assert distance(draw(model), expected) < 1e-5


BROKEN = {
    "no compiler": ({"CXX": "no-such-compiler"}, "found no no-such-compiler"),
    "one that fails": ({"CXX": "false"}, "false failed"),
    "a folder that cannot be written": ({"FUSED_DDPM_CACHE": "/proc/none"}, "/proc/none"),
}


@needs_native
@pytest.mark.parametrize("how", BROKEN)
def test_auto_says_in_one_line_what_cannot_be_built(monkeypatch, caplog, how):
    environment, said = BROKEN[how]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for cached in (native.load, native.missing_any):
        cached.cache_clear()
    try:
        with caplog.at_level(logging.INFO, logger="ddpm"):
            assert choose("auto", CPU).name == "fused"
        with pytest.raises(RuntimeError, match="engine: 'native' in float32 needs its kernels: native kernels"):
            choose("native", CPU)
    finally:
        for cached in (native.load, native.missing_any):
            cached.cache_clear()
    (line,) = [message for message in caplog.messages if message.startswith("engine auto: fused on cpu (")]
    assert said in line
    assert "\n" not in line


@needs_native
def test_another_operation_in_a_form_is_an_error_that_names_it(unet, monkeypatch):
    forward = ContextUnetForm.forward
    monkeypatch.setattr(ContextUnetForm, "forward", lambda *given: forward(*given) + 1)
    with pytest.raises(RuntimeError, match=r"aten\.add\.Tensor on a buffer of the program: not an operator of ours"):
        draw(unet())


@needs_native
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_after_an_interrupt_the_pictures_are_right(unet, number):
    model, table = unet(n_feat=32), make_table(SCHEDULE, "ddim", 30, prediction="v")
    trajectory = prepared(model, table)
    expected = trajectory(3, CONTEXT[:3], seed=3)

    def stop(*_):
        raise KeyboardInterrupt

    before = signal.signal(number, stop)
    try:
        ended = 0
        for k in range(5):
            alarm = threading.Timer(0.005 * k, os.kill, (os.getpid(), number))
            try:
                alarm.start()
                while alarm.is_alive():
                    trajectory(64, CONTEXT[0], seed=3)
                trajectory(64, CONTEXT[0], seed=3)
            except KeyboardInterrupt:
                ended += 1
            alarm.join()
    finally:
        signal.signal(number, before)
    assert ended == 5
    assert torch.equal(trajectory(3, CONTEXT[:3], seed=3), expected)


@needs_native
def test_an_interrupt_waits_until_the_step_is_recorded(unet, monkeypatch):
    model, forward, ended = unet(), ContextUnetForm.forward, []

    def interrupted(*given):
        signal.raise_signal(signal.SIGINT)
        m = forward(*given)
        ended.append(m)
        return m

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        monkeypatch.setattr(ContextUnetForm, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            draw(model)
    finally:
        signal.signal(signal.SIGINT, before)
    monkeypatch.undo()
    assert len(ended) == 1
    assert distance(draw(model), draw(model, engine="eager")) < 1e-5


@needs_native
def test_a_forked_child_draws_the_same(unet):
    model = unet()
    torch.set_num_threads(2)
    expected = draw(model)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if torch.equal(draw(model), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(draw(model), expected)


@needs_native
def test_a_process_forked_while_a_thread_samples_draws_the_same(unet):
    """The thread, which holds the model's lock, is not there."""
    model, begun, forked = unet(), threading.Event(), threading.Event()
    expected = draw(model)
    waiting = {"callback": lambda *_: (begun.set(), forked.wait(20))}
    worker = threading.Thread(target=draw, args=(model,), kwargs=waiting)
    worker.start()
    begun.wait(20)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if torch.equal(draw(model), expected) else 1)
    forked.set()
    worker.join()
    assert os.waitpid(child, 0)[1] == 0


@needs_native
def test_threads_draw_side_by_side(unet):
    models = [unet(seed) for seed in range(3)]
    shared = prepared(models[0])
    expected = [draw(model) for model in models]
    start, images = threading.Barrier(5), {}

    def work(k):
        torch.set_num_threads(2)
        start.wait()
        images[k] = draw(models[k]) if k < 3 else shared(3, CONTEXT[:3], seed=3)

    torch.set_num_threads(2)
    workers = [threading.Thread(target=work, args=(k,)) for k in range(5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(images[k], expected[k if k < 3 else 0]) for k in range(5))


@needs_native
def test_a_callback_that_samples_gets_buffers_of_its_own(unet):
    model, inner = unet(), []
    expected = draw(model, steps=3)
    outer = draw(model, steps=3, callback=lambda *_: inner.append(draw(model, steps=3, callback=lambda *_: None)))
    assert all(torch.equal(image, expected) for image in (outer, *inner))


def _resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _threads():
    return len(list(Path("/proc/self/task").iterdir()))


@needs_native
@pytest.mark.long
def test_memory_stays_the_same_over_ten_thousand_steps(unet):
    model, table = unet(), make_table(NoiseSchedule.make("linear", 1000), "ddpm", prediction="v")
    trajectory = Trajectory(model, NoiseSchedule.make("linear", 1000), table, engine="native")
    torch.set_num_threads(2)
    trajectory(2)
    before, tasks = _resident(), _threads()
    for seed in range(10):
        trajectory(2, seed=seed)
    assert _resident() - before < 1 << 20
    assert _threads() <= tasks


@needs_native
@pytest.mark.long
def test_engines_that_are_gone_leave_nothing(unet):
    model = unet()

    def once():
        prepared(model)(2, CONTEXT[0], 2.0)
        gc.collect()

    torch.set_num_threads(2)
    for _ in range(10):
        once()
    before, tasks = _resident(), _threads()
    for _ in range(100):
        once()
    assert _resident() - before < 4 << 20
    assert _threads() <= tasks


@needs_native
@pytest.mark.long
def test_a_busy_machine_makes_it_slower_and_no_more(unet):
    """Others on every core: threads that wait give theirs away. A barrier that only spins was 300 times slower."""
    model = unet()
    trajectory = prepared(model, make_table(SCHEDULE, "ddim", 30, prediction="v"))

    def seconds():
        began = time.perf_counter()
        for _ in range(10):
            trajectory(1, seed=3)
        return time.perf_counter() - began

    torch.set_num_threads(os.cpu_count())
    seconds()
    alone = seconds()
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * os.cpu_count())]
    try:
        time.sleep(1)
        busy = seconds()
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
    assert busy < 40 * alone, (busy, alone)


@needs_native
def test_the_first_sample_imports_no_compiler():
    """torch._dynamo takes a second, more than hundreds of steps."""
    code = """
        import sys
        from ddpm import ContextUnet, NoiseSchedule, sample
        before = set(sys.modules)
        sample(ContextUnet(1, 8, 0, 8).eval(), NoiseSchedule.make("cosine", 9), 1, engine="native")
        assert "torch._dynamo" not in sys.modules, len(set(sys.modules) - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@needs_native
@pytest.mark.long
def test_two_processes_that_build_at_once(tmp_path):
    """An empty cache folder: each builds, one of the libraries stays, and both draw."""
    code = """
        import torch
        from ddpm import ContextUnet, NoiseSchedule, sample
        torch.manual_seed(0)
        x = sample(ContextUnet(1, 8, 0, 8).eval(), NoiseSchedule.make("cosine", 9), 2, engine="native", prediction="v")
        print(x.double().sum().item())
    """
    environment = os.environ | {"TRITON_INTERPRET": "0", "FUSED_DDPM_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said[0] == said[1]
    assert not [left for left in tmp_path.iterdir() if left.suffix != ".so"]
