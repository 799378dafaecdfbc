"""Ctrl-C at any line, an error anywhere, several threads: the model stays as it was and the next picture is right."""

import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch

import ddpm
from ddpm import NoiseSchedule, Trajectory, inference, make_table, sample
from ddpm.inference.convolutions import Upsampling
from ddpm.metrics import distance

SCHEDULE = NoiseSchedule.make("cosine", 10)
OPTIONS = {"steps": 2, "prediction": "v", "context": torch.eye(5)[:2], "seed": 3}
TABLE = make_table(SCHEDULE, "ddpm", 2, prediction="v")
FOLDER = str(Path(ddpm.__file__).parent)


def draw(model, engine="fused"):
    return sample(model, SCHEDULE, 2, engine=engine, **OPTIONS)


class Interrupts:
    """Counts the lines of ddpm/ that run, and raises KeyboardInterrupt at one of them."""

    def __init__(self, at=None):
        self.at, self.count = at, 0

    def __call__(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(FOLDER):
            return None
        if event == "line":
            self.count += 1
            if self.count == self.at:
                raise KeyboardInterrupt
        return self

    def over(self, work):
        sys.settrace(self)
        try:
            work()
        finally:
            sys.settrace(None)


def change(model, factor):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)


WAYS = {
    "sample, eager": (lambda model, prepared: draw(model, "eager"), lambda model, prepared: draw(model, "eager")),
    "sample, fused": (lambda model, prepared: draw(model), lambda model, prepared: draw(model)),
    "trajectory": (
        lambda model, prepared: prepared.refresh(),
        lambda model, prepared: prepared(2, OPTIONS["context"], seed=3),
    ),
}


@pytest.mark.parametrize("places", [8, pytest.param(150, marks=pytest.mark.long)])
@pytest.mark.parametrize("way", WAYS)
def test_an_interrupt_at_any_line(unet, way, places):
    """Weights have just been changed, so that forms are folded anew, and the model is in training."""
    work, again = WAYS[way]
    model = unet().train()
    modes = [module.training for module in model.modules()]
    prepared = Trajectory(model, SCHEDULE, TABLE, engine="fused")
    draw(model)
    change(model, 0.99)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = draw(model, "eager")
    whole = Interrupts()
    whole.over(lambda: work(model, prepared))
    assert whole.count > 100
    for at in range(1, whole.count + 1, max(1, whole.count // places)):
        with torch.no_grad():
            model.out[3].bias.add_(1)  # what was folded is stale again
        draw(model)
        prepared = Trajectory(model, SCHEDULE, TABLE, engine="fused")
        model.load_state_dict(before)
        with pytest.raises(KeyboardInterrupt):
            Interrupts(at).over(partial(work, model, prepared))
        assert [module.training for module in model.modules()] == modes
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        if way == "trajectory" and at == 1:  # before anything of it was done
            continue
        assert distance(again(model, prepared), expected) < 1e-5, f"interrupted at line {at} of {whole.count}"


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ValueError])
def test_what_was_half_folded_is_not_sampled_with(unet, monkeypatch, error):
    model = unet()
    prepared, expected, kept = Trajectory(model, SCHEDULE, TABLE, engine="fused"), draw(model), model.state_dict()
    kept = {name: tensor.clone() for name, tensor in kept.items()}
    for call in (lambda: draw(model), lambda: prepared.refresh()):
        change(model, 1.3)
        with monkeypatch.context() as patch:
            patch.setattr(Upsampling, "load", lambda *_: (_ for _ in ()).throw(error))
            with pytest.raises(error):
                call()
        model.load_state_dict(kept)
    assert torch.equal(draw(model), expected)
    assert torch.equal(prepared(2, OPTIONS["context"], seed=3), expected)


@pytest.mark.parametrize("engine", ["eager", "fused"])
def test_threads_that_sample_one_model_take_turns(unet, engine):
    """The one that ends first must not put the other's mode back, nor the other find a form half folded."""
    model = unet().train()
    modes = [module.training for module in model.modules()]
    statistics = model.init_conv.conv1[1].running_mean.clone()
    seeds = range(4)
    expected = [sample(model, SCHEDULE, 2, engine=engine, **OPTIONS | {"seed": seed}) for seed in seeds]
    inference.release(model)
    images, start = {}, threading.Barrier(len(seeds))

    def work(seed):
        start.wait()
        images[seed] = sample(model, SCHEDULE, 2, engine=engine, **OPTIONS | {"seed": seed})

    workers = [threading.Thread(target=work, args=(seed,)) for seed in seeds]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(images[seed], expected[seed]) for seed in seeds)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model.init_conv.conv1[1].running_mean, statistics)


def test_a_callback_may_sample_the_same_model(unet):
    model = unet()
    inner, expected = [], draw(model)
    work = partial(sample, model, SCHEDULE, 2, engine="fused", **OPTIONS)
    outer = work(callback=lambda row, x0: inner.append(work()))
    assert torch.equal(outer, expected)
    assert all(torch.equal(image, expected) for image in inner)
