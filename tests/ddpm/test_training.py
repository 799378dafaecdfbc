"""Training: targets, losses, weights, averages, order and reproducibility, each against an independent form."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from ddpm.data import Dataset
from ddpm.errors import BadInput
from ddpm.training import TrainOptions, loss_table, min_snr_weights, per_sample_loss, target_of
from kernels import philox
from kernels.q_sample import pixels_to_unit

RNG = np.random.default_rng(3)


class Echo(nn.Module):
    """A network that scales its input and remembers what it was asked."""

    n_cfeat = 3

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.asked = []

    def forward(self, x, t, c=None):
        self.asked.append((x.detach().clone(), t.clone(), c))
        return self.scale * x


def first_words(seed: int, samples, stream: int) -> np.ndarray:
    return np.array([philox.words(seed, int(k), 0, stream, 1)[0] for k in samples], dtype=np.uint64)


# --- targets, weights, losses -----------------------------------------------------------------------------------


def test_targets_recover_x0_and_noise():
    x0, noise = torch.from_numpy(RNG.normal(size=(2, 5, 3)))
    alpha_bar = torch.tensor([[0.9], [0.5], [0.3], [0.1], [0.01]], dtype=torch.float64)
    signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    x_t = signal * x0 + sigma * noise
    assert target_of("eps", x0, noise, alpha_bar) is noise
    assert target_of("x0", x0, noise, alpha_bar) is x0
    v = target_of("v", x0, noise, alpha_bar)
    torch.testing.assert_close(signal * x_t - sigma * v, x0)
    torch.testing.assert_close(sigma * x_t + signal * v, noise)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_are_the_papers_closed_form(gamma):
    alpha_bars = torch.tensor([1.0, 0.99, 0.7, 0.5, 0.2, 0.001], dtype=torch.float64)
    weights = {prediction: min_snr_weights(alpha_bars, prediction, gamma) for prediction in ("eps", "v", "x0")}
    for t in range(1, 6):
        snr = alpha_bars[t].item() / (1 - alpha_bars[t].item())
        assert weights["eps"][t].item() == pytest.approx(min(snr, gamma) / snr)
        assert weights["v"][t].item() == pytest.approx(min(snr, gamma) / (snr + 1))
        assert weights["x0"][t].item() == pytest.approx(min(snr, gamma))


@pytest.mark.parametrize("kind", ["mse", "l1", "huber"])
def test_losses_match_their_formulas_per_sample(kind):
    output, target = 2 * RNG.normal(size=(2, 4, 1, 3, 3))
    d = np.abs(output - target)
    formula = {"mse": d**2, "l1": d, "huber": np.where(d < 1, d**2 / 2, d - 0.5)}[kind]
    loss = per_sample_loss(kind, torch.from_numpy(output), torch.from_numpy(target))
    np.testing.assert_allclose(loss, formula.mean(axis=(1, 2, 3)), rtol=1e-12)


@pytest.mark.parametrize("min_snr", [0.0, 2.0])
@pytest.mark.parametrize("loss", ["mse", "l1", "huber"])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_training_loss_matches_numpy(make_trainer, tiny_data, prediction, loss, min_snr):
    trainer = make_trainer(network=Echo(), prediction=prediction, loss=loss, min_snr=min_snr, seed=9, batch_size=6)
    *data, samples = trainer.inputs(3)
    value = trainer.objective(*data, samples).item()

    rows = np.argsort(first_words(9, range(24), 5), kind="stable")[18:24]
    assert samples.tolist() == list(range(18, 24))
    clean = tiny_data.values[rows].numpy().astype(np.float64) / 127.5 - 1
    noise = philox.normal(9, torch.arange(18, 24), 0, 2, (1, 16, 16)).double().numpy()
    t = 1 + (first_words(9, range(18, 24), 3) * np.uint64(20) >> np.uint64(32)).astype(int)
    ab = trainer.schedule.alpha_bars.numpy()[t][:, None, None, None]
    output = 0.5 * (np.sqrt(ab) * clean + np.sqrt(1 - ab) * noise)
    target = {"eps": noise, "x0": clean, "v": np.sqrt(ab) * noise - np.sqrt(1 - ab) * clean}[prediction]
    d = np.abs(output - target)
    each = {"mse": d**2, "l1": d, "huber": np.where(d < 1, d**2 / 2, d - 0.5)}[loss].mean(axis=(1, 2, 3))
    if min_snr:
        snr = (ab / (1 - ab)).reshape(-1)
        each = each * np.minimum(snr, min_snr) / {"eps": snr, "v": snr + 1, "x0": 1}[prediction]
    assert value == pytest.approx(each.mean(), rel=1e-4)


# --- the moving average -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.999, 0.15])
def test_ema_follows_its_recursion_over_weights_and_statistics(make_trainer, decay):
    trainer = make_trainer(ema_decay=decay, batch_size=8, epochs=2)
    schedule = trainer.schedule.alpha_bars.clone()
    average = {name: tensor.double() for name, tensor in trainer.network.state_dict().items()}
    for k in range(6):
        trainer.step()
        d = min(decay, (1 + k) / (10 + k))
        for name, tensor in trainer.network.state_dict().items():
            average[name] = d * average[name] + (1 - d) * tensor.double()
    assert any("running_var" in name for name in average)
    for name, tensor in trainer.ema.tensors.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), average[name], rtol=1e-4, atol=1e-6)
        else:
            assert int(tensor) == 6, name
    assert torch.equal(trainer.schedule.alpha_bars, schedule)
    assert set(trainer.ema.tensors) == set(trainer.network.state_dict())


# --- what each training sample is -------------------------------------------------------------------------------


def test_samples_map_to_the_epochs_order_across_batch_ends(make_trainer, tiny_data):
    trainer = make_trainer(batch_size=7, epochs=3, seed=11)
    orders = [np.argsort(first_words(11, range(24 * k, 24 * (k + 1)), 5), kind="stable") for k in range(3)]
    expected = np.concatenate(orders)
    assert [sorted(order.tolist()) for order in orders] == [list(range(24))] * 3
    for index in range(10):
        values, _, rows, samples = trainer.inputs(index)
        assert samples.tolist() == list(range(7 * index, 7 * index + 7))
        assert np.array_equal(rows, expected[samples])
        assert torch.equal(values[rows], tiny_data.values[expected[samples]])


def test_total_covers_every_epoch_exactly(make_trainer):
    assert make_trainer(batch_size=7, epochs=3).total == math.ceil(72 / 7)
    assert make_trainer(batch_size=100, epochs=3).total == 1


def test_a_sample_sees_the_same_noise_in_batches_of_any_size(make_trainer):
    seen = {}
    for size in (4, 12):
        trainer = make_trainer(network=Echo(), batch_size=size, epochs=2, lr=1e-9)
        for _ in range(24 // size):
            trainer.step()
        seen[size] = [torch.cat(column) for column in zip(*trainer.network.asked, strict=True)]
    for a, b in zip(seen[4], seen[12], strict=True):
        assert torch.equal(a, b)


def test_network_is_asked_at_t_over_T(make_trainer):  # noqa: N802
    trainer = make_trainer(network=Echo(), batch_size=24, epochs=1)
    trainer.step()
    t = 20 * trainer.network.asked[0][1]
    assert torch.equal(t.round().long(), philox.training_timesteps(5, torch.arange(24), 20))
    assert (t - t.round()).abs().max() < 1e-5


@pytest.mark.parametrize(("probability", "low", "high"), [(0.0, 0, 0), (0.25, 0.21, 0.29), (1.0, 1, 1)])
def test_context_dropout_has_its_share(make_trainer, tiny_data, probability, low, high):
    trainer = make_trainer(batch_size=2000, context_dropout=probability)
    _, labels, rows, samples = trainer.inputs(0)
    context = trainer.objective.context(labels, rows, samples)
    dropped = (context == 0).all(dim=1)
    assert low <= dropped.float().mean() <= high
    kept = tiny_data.labels[rows]
    assert torch.equal(context[~dropped], kept[~dropped])
    assert np.array_equal(dropped, first_words(5, samples, 4) < np.uint64(math.floor(probability * 2**32)))


def test_flip_mirrors_the_images_that_stream_6_says(make_trainer, tiny_data):
    trainer = make_trainer(batch_size=24, flip=True)
    values, _, rows, samples = trainer.inputs(0)
    x0 = trainer.objective.clean(values, rows, samples)
    mirrored = torch.from_numpy(first_words(5, samples, 6) >= 2**31)
    plain = pixels_to_unit(tiny_data.values[rows])
    assert 0 < mirrored.sum() < 24
    assert torch.equal(x0[~mirrored], plain[~mirrored])
    assert torch.equal(x0[mirrored], plain[mirrored].flip(-1))


def test_data_without_labels_train_without_context(make_trainer, tiny_data):
    data = Dataset("plain", tiny_data.values, None, ())
    trainer = make_trainer(data)
    assert trainer.objective.context(*trainer.inputs(0)[1:]) is None
    assert trainer.network.n_cfeat == 0
    trainer.step()
    assert trainer.losses[0].isfinite()


# --- the optimiser ----------------------------------------------------------------------------------------------


def test_learning_rate_falls_linearly_per_epoch(make_trainer):
    trainer = make_trainer(batch_size=8, epochs=4, lr=0.01)
    used = []
    for _ in range(trainer.total):
        trainer.step()
        used.append(trainer.optimizer.param_groups[0]["lr"])
    assert used == pytest.approx([0.01] * 3 + [0.0075] * 3 + [0.005] * 3 + [0.0025] * 3)
    assert [row[3] for row in loss_table(trainer)] == pytest.approx([0.01, 0.0075, 0.005, 0.0025])


def test_loss_table_averages_each_epoch(make_trainer):
    trainer = make_trainer(batch_size=8, epochs=2)
    while not trainer.done:
        trainer.step()
    table, losses = loss_table(trainer), trainer.losses.tolist()
    assert [row[:2] for row in table] == [(1, 3), (2, 6)]
    assert [row[2] for row in table] == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 3])


def test_training_reduces_the_loss_on_a_tiny_set(make_trainer):
    trainer = make_trainer(batch_size=8, epochs=20, lr=3e-3)
    while not trainer.done:
        trainer.step()
    assert trainer.losses[-10:].mean() < 0.7 * trainer.losses[:10].mean()


def test_bf16_autocast_trains_finite_float32_weights(make_trainer):
    plain, rounded = make_trainer(epochs=4), make_trainer(epochs=4, precision="bf16")
    for trainer in (plain, rounded):
        while not trainer.done:
            trainer.step()
    assert rounded.losses.isfinite().all()
    assert rounded.losses[-3:].mean() < rounded.losses[:3].mean()
    assert {p.dtype for p in rounded.network.parameters()} == {torch.float32}
    assert 0 < (plain.losses - rounded.losses).abs().max() < 0.1


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_gradients_are_clipped_to_the_norm(make_trainer, clip):
    trainer = make_trainer(clip_grad=clip)
    trainer.step()
    norm = torch.cat([p.grad.flatten() for p in trainer.network.parameters()]).norm()
    assert (norm <= 0.01 * 1.0001) == bool(clip)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(make_trainer):
    states = []
    for seed in (5, 5, 6):
        torch.manual_seed(len(states))
        trainer = make_trainer(seed=seed)
        while not trainer.done:
            trainer.step()
        states.append(trainer.state())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["losses"], states[2]["losses"])


def test_making_a_network_leaves_the_global_generator_alone(tiny_data):
    before = torch.get_rng_state()
    TrainOptions(n_feat=8).make_network(tiny_data)
    assert torch.equal(torch.get_rng_state(), before)


def test_state_round_trip_continues_bit_for_bit(make_trainer):
    whole, first = make_trainer(), make_trainer()
    for _ in range(3):
        first.step()
    second = make_trainer()
    second.load_state({name: tensor.clone() for name, tensor in first.state().items()})
    for trainer in (whole, second):
        while not trainer.done:
            trainer.step()
    assert all(torch.equal(tensor, second.state()[name]) for name, tensor in whole.state().items())


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("step"),
        lambda state: state.pop("ema.out.0.weight"),
        lambda state: state.update({"network.out.0.weight": torch.zeros(3)}),
        lambda state: state.update({"losses": torch.zeros(99)}),
    ],
    ids=["no-step", "no-average", "misshapen", "other-length"],
)
def test_state_of_another_run_is_refused(make_trainer, change):
    trainer = make_trainer()
    trainer.step()
    state = trainer.state()
    change(state)
    with pytest.raises(BadInput, match="training state"):
        make_trainer().load_state(state)


# --- options ----------------------------------------------------------------------------------------------------

BAD_OPTIONS = {
    "epochs": 0,
    "batch_size": 0,
    "lr": 0.0,
    "min_snr": -1.0,
    "ema_decay": 1.5,
    "context_dropout": -0.1,
    "clip_grad": math.nan,
    "seed": 2**63,
    "loss": "cross-entropy",
    "precision": "fp8",
    "prediction": "x1",
}


@pytest.mark.parametrize(("name", "value"), BAD_OPTIONS.items(), ids=BAD_OPTIONS)
def test_options_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(BadInput, match=f"--{name.replace('_', '-')}: got {value!r}.* needs"):
        TrainOptions(**{name: value})


@pytest.mark.parametrize("rate", [math.nan, math.inf, -1.0])
def test_learning_rates_that_cannot_be_are_refused(rate):
    with pytest.raises(BadInput, match="--lr"):
        TrainOptions(lr=rate)


def test_a_batch_of_one_image_is_refused(make_trainer):
    with pytest.raises(BadInput, match="--batch-size: got 1"):
        make_trainer(batch_size=1)


# --- torchrun ---------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_two_ranks_train_and_their_run_samples(tmp_path, spawn, ddpm, tiny_options):
    run = tmp_path / "run"
    process = spawn("train", "--data", "digits", "--out", run, *tiny_options, ranks=2)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert out.count("trained:") == 1
    rows = (run / "loss.csv").read_text().splitlines()
    assert rows[0] == "epoch,step,loss,lr"
    assert 0 < float(rows[1].split(",")[2]) < 2
    assert ddpm("sample", run, "--n", 2, "--npy", tmp_path / "x.npy").code == 0
    assert np.isfinite(np.load(tmp_path / "x.npy")).all()


@pytest.mark.long
def test_two_ranks_draw_the_pictures_of_one(tmp_path, spawn, ddpm, digits_run):
    draw = ("sample", digits_run, "--n", 5, "--context", "all", "--guidance", 2, "--seed", 3, "--npy")
    process = spawn(*draw, tmp_path / "two.npy", "--out", tmp_path / "two.png", ranks=2)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert ddpm(*draw, tmp_path / "one.npy").code == 0
    one, two = np.load(tmp_path / "one.npy"), np.load(tmp_path / "two.npy")
    assert np.abs(one - two).max() <= 1e-5 * max(1, np.abs(one).max())


@pytest.mark.long
def test_a_batch_that_the_ranks_do_not_divide_is_one_line(tmp_path, spawn, tiny_options):
    process = spawn("train", "--out", tmp_path / "run", *tiny_options, "--batch-size", 9, ranks=2)
    _, err = process.communicate(timeout=240)
    assert process.returncode != 0
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert set(errors) == {"error: --batch-size: got 9, needs a multiple of the 2 ranks"}
    assert "ddpm/commands" not in err, "a traceback of ours"
    assert not (tmp_path / "run").exists()


def test_config_records_every_training_option(digits_run):
    training = json.loads((digits_run / "config.json").read_text())["training"]
    assert TrainOptions(**training) == TrainOptions(n_feat=8, epochs=1, timesteps=20, beta_end=0.35)
