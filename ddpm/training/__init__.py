"""Training: noise prediction (or v, or x0) with a moving average, reproducible bit for bit.

options     what a run is asked for
objective   the loss of a batch, the one text that every engine executes
engines     how steps are executed: eager, compile, graph; the moving average
loop        steps until done, signals, checkpoints and resuming
"""

from ddpm.training.engines import TRAINERS, CompileTrainer, Ema, GraphTrainer, Trainer, make_trainer
from ddpm.training.loop import Interrupted, OtherData, loss_table, resume_from, resumed_options, train, training_data
from ddpm.training.objective import Objective, min_snr_weights, per_sample_loss, target_of
from ddpm.training.options import ENGINES, TrainOptions
