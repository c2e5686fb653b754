"""Callbacks that the trainer runs at the start of an epoch and after each optimiser step."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy

from ..data.captioned_groups import CaptionedGroups
from ..model.modeling_epmvg import EpmVGForVisualGrounding
from .row_draws import RowDraws

# The file of a checkpoint that holds the weights in training, where the checkpoint's model is their average.
TRAINED_WEIGHTS = "trained_weights.safetensors"


class EpochCallback(TrainerCallback):
    """
    Counts the epochs, that is the passes over the data. `state.epoch` does not count them on a stream, where it is the
    share of `max_steps` that is done.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.next_epoch = int(state.epoch or 0)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.begin_epoch(self.next_epoch)
        self.next_epoch += 1

    def begin_epoch(self, epoch: int) -> None:
        """Prepares an epoch, counted from 0."""
        raise NotImplementedError


class DataEpochCallback(EpochCallback):
    """
    Tells the data which epoch it is: from it follow the random draws about each image and, where images with captions
    alone are mixed in, which of them have their turn.

    Args:
        draws ([`RowDraws`]): the draws.

    Attributes:
        captioned ([`CaptionedGroups`] or `None`): the images with captions; the trainer sets it with each data loader.
    """

    def __init__(self, draws: RowDraws):
        self.draws = draws
        self.captioned: CaptionedGroups | None = None

    def begin_epoch(self, epoch: int) -> None:
        self.draws.set_epoch(epoch)
        if self.captioned is not None:
            self.captioned.set_epoch(epoch)


class FreezeBackbonesCallback(EpochCallback):
    """
    Does not train the vision backbone and the text tower in the first epochs.

    Args:
        model ([`EpmVGForVisualGrounding`]): the student.
        epochs (`int`): the number of these epochs.
    """

    def __init__(self, model: EpmVGForVisualGrounding, epochs: int):
        self.epochs = epochs
        towers = (model.model.vision_model, model.model.text_model)
        # What is never trained, such as frozen batch norms, must not begin to be trained after these epochs.
        self.parameters = [p for tower in towers for p in tower.parameters() if p.requires_grad]

    def begin_epoch(self, epoch: int) -> None:
        self._set_trained(epoch >= self.epochs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._set_trained(True)

    def _set_trained(self, trained: bool) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(trained)


class LastStepLog(TrainerCallback):
    """
    Logs the loss and its terms also after the last step, however many steps `logging_steps` asks for. transformers
    leaves out what comes after the last multiple of them, which may be the whole training.
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Here rather than at the end of the epoch, so that the last checkpoint has this line of the log too.
        self._log_if_last(args, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # An evaluation that stops the training, or the end of a stream, comes after the step. A step is logged once.
        self._log_if_last(args, control)

    def _log_if_last(self, args: TrainingArguments, control: TrainerControl) -> None:
        if control.should_training_stop and args.logging_strategy == IntervalStrategy.STEPS:
            control.should_log = True


class BestCheckpointCallback(TrainerCallback):
    """
    Finds the best checkpoint of a run that is resumed by its step. transformers looks where it once was, and forgets
    it where the folder of the run was moved: it would then be neither loaded at the end nor spared from deletion.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.best_global_step and not state.is_hyper_param_search:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
            if folder.is_dir():
                state.best_model_checkpoint = str(folder)


class WeightAverage(TrainerCallback):
    """
    Averages the weights exponentially: after the first optimiser step the average is the model, after each further one
    it is `decay * average + (1 - decay) * model`. [`EpmVGTrainer`] evaluates and saves the average. Its checkpoints
    hold the weights in training in a file of their own, with which training goes on. At the end of training the model
    becomes the average, or the best checkpoint's average where `load_best_model_at_end` asks for that.

    Args:
        decay (`float`): between 0 and 1.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.model: AveragedModel | None = None
        self.checkpoint: str | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        **kwargs: Any,
    ) -> None:
        # The model of a checkpoint is the average, so in a run that is resumed this copies the average.
        self.model = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(self.decay))
        if self.checkpoint is not None:
            file = Path(self.checkpoint) / TRAINED_WEIGHTS
            if not file.is_file():
                raise ValueError(f"{self.checkpoint} cannot be resumed with ema_decay: it has no average")
            model.load_state_dict(load_file(file), strict=False)
            self.model.n_averaged.fill_(state.global_step)
            self.checkpoint = None

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        **kwargs: Any,
    ) -> None:
        assert self.model is not None  # on_train_begin sets it
        self.model.update_parameters(model)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        **kwargs: Any,
    ) -> None:
        assert self.model is not None
        if not (args.load_best_model_at_end and state.best_model_checkpoint is not None):
            model.load_state_dict(self.model.module.state_dict())
        self.model = None

    def save_trained(self, model: nn.Module, folder: str) -> None:
        """Writes the weights in training beside the average. Frozen parameters, which equal theirs, are left out."""
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        weights = {
            # safetensors refuses tensors that share memory or are not contiguous.
            name: value.clone(memory_format=torch.contiguous_format)
            for name, value in model.state_dict().items()
            if name not in frozen
        }
        save_file(weights, Path(folder) / TRAINED_WEIGHTS)
