"""The training objective: what every engine of training executes, written once.

t, eps  from the noise contract, by the sample's global index
x_t     = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps
loss    = mean over samples of weight(t) * distance(network(x_t, t, c), target(x0, eps, t))
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm import predictions
from ddpm.networks.protocol import broadcast, in_type, network_times, null_condition, predict, recalls
from ddpm.schedule import NoiseSchedule
from ddpm.training.options import TrainOptions
from kernels import backend, noise_mse, philox
from kernels.q_sample import pixels_to_unit
from kernels.q_sample_rows import q_sample_rows


def target_of(prediction: str, x0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """What the network shall output; alpha_bar broadcasts against x0."""
    return predictions.target_of(prediction, x0, noise, alpha_bar.sqrt(), (1 - alpha_bar).sqrt())


def for_half(x0: Tensor, seed: int | Tensor, samples: Tensor) -> Tensor:
    """x0_previous of self-conditioning (Chen, Zhang, Hinton 2023): the estimate for half of the samples, else 0.

    It is kept where word 0 of stream 8 is below 2^31: computed for all, nothing is read on the host.
    """
    kept = philox.first_word(seed, samples, philox.Stream.SELF_CONDITION) < 1 << 31
    return torch.where(broadcast(kept, x0), x0, 0.0)


def min_snr_weights(alpha_bars: Tensor, prediction: str, gamma: float) -> Tensor:
    """Loss weight of every t, float64 [T+1] (Hang et al. 2023, section 3.4): min(SNR, gamma) over 1, SNR or SNR + 1."""
    snr = alpha_bars / (1 - alpha_bars).clamp(min=torch.finfo(torch.float64).tiny)
    divisor = {"eps": snr, "v": snr + 1, "x0": torch.ones_like(snr)}[prediction]
    return snr.clamp(max=gamma) / divisor


def per_sample_loss(kind: str, output: Tensor, target: Tensor) -> Tensor:
    """mse, l1 or huber (delta 1), averaged over each sample: [n]."""
    function = {"mse": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}[kind]
    return function(output, target, reduction="none").flatten(1).mean(dim=1)


class Objective(nn.Module):
    """The training loss of rows of a data set, a scalar with gradient.

    plain: as the eager engine computes: x_t in the strides of its data, the noise stored. Else noise prediction under
    mse draws its target again from the noise contract where a kernel does it, which is faster than storing it (its
    reference on the CPU is not: 6 ms for forward and backward, batch 100 of 3x16x16).
    """

    def __init__(
        self, network: nn.Module, schedule: NoiseSchedule, options: TrainOptions, device: torch.device, plain: bool
    ) -> None:
        super().__init__()
        self.network, self.options, self.plain = network, options, plain
        self.alpha_bars = schedule.alpha_bars.to(device, torch.float32)
        self.weights = None
        if options.min_snr:
            weights = min_snr_weights(schedule.alpha_bars, options.prediction, options.min_snr)
            self.weights = weights.to(device, torch.float32)
        self.seed = torch.tensor(options.seed, device=device)
        is_noise_mse = options.prediction == "eps" and options.loss == "mse"
        self.redraws = not plain and is_noise_mse and backend.runs_triton(self.alpha_bars)

    def diffused(self, values: Tensor, rows: Tensor, samples: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(x_t [n, ...], t int64 [n], noise like x_t or None where the loss draws it again)."""
        more = {"flip": self.options.flip, "keep_noise": not self.redraws}
        x_t, t, noise = q_sample_rows(values, rows, self.alpha_bars, self.seed, samples, **more)
        if self.plain:
            # Of a single channel the strides may be those of either layout, by which PyTorch chooses its convolution.
            x0 = values[rows]
            x_t, noise = (backend.like(tensor, x0) for tensor in (x_t, noise))
        return x_t, t, noise

    def clean(self, values: Tensor, rows: Tensor, samples: Tensor) -> Tensor:
        """x0 float32 [n, ...], mirrored as `diffused` does."""
        x0 = values[rows]
        if self.options.flip:
            x0 = torch.where(broadcast(philox.flipped(self.seed, samples), x0), x0.flip(-1), x0)
        return pixels_to_unit(x0)

    def context(self, labels: Tensor | None, rows: Tensor, samples: Tensor) -> Tensor | None:
        """Labels [n, ...] of the rows, "no condition" where they are dropped."""
        if labels is None:
            return None
        dropped = philox.condition_dropped(self.seed, samples, self.options.context_dropout)
        labels = labels[rows]
        return torch.where(broadcast(dropped, labels), null_condition(self.network, labels), labels)

    def output(self, x_t: Tensor, times: Tensor, context: Tensor | None, *previous: Tensor | None) -> Tensor:
        """The network's, float32 [n, ...]."""
        # Each call under an autocast of its own: it keeps the weights that it has cast, with or without gradients.
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.options.precision == "bf16"):
            output = predict(self.network, x_t, times, context, *previous)
        return output.float()

    def forward(self, values: Tensor, labels: Tensor | None, rows: Tensor, samples: Tensor) -> Tensor:
        """values [N, ...], labels [N, K] or None; of them rows int64 [n] as samples int64 [n] -> the loss, a scalar."""
        options = self.options
        x_t, t, noise = self.diffused(values, rows, samples)
        context = self.context(labels, rows, samples)
        times = in_type(network_times(self.network, t, self.alpha_bars.shape[0] - 1))
        previous = None
        if recalls(self.network):
            with torch.no_grad():
                output = self.output(x_t, times, context)
            a = broadcast(self.alpha_bars[t], x_t)
            estimate = predictions.x0_of(options.prediction, x_t, output, a.sqrt(), (1 - a).sqrt())
            previous = for_half(estimate, self.seed, samples)
        output = self.output(x_t, times, context, previous)
        weight = None if self.weights is None else self.weights[t]
        if self.redraws:
            return noise_mse(output, self.seed, samples, weight)
        x0 = None if options.prediction == "eps" else self.clean(values, rows, samples)
        target = target_of(options.prediction, x0, noise, broadcast(self.alpha_bars[t], x_t))
        per_sample = per_sample_loss(options.loss, output, target)
        return per_sample.mean() if weight is None else (per_sample * weight).mean()
