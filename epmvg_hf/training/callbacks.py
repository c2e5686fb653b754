"""Callbacks of the trainer: what it does before each pass over the data."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data.image_groups import CaptionedGroups
from ..model.modeling_epmvg import EpmVGForVisualGrounding


class PassCallback(TrainerCallback):
    """Counts the passes over the data; `state.epoch` does not on a stream, where it is a share of `max_steps`."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.passes = int(state.epoch or 0)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.begin_pass(self.passes)
        self.passes += 1

    def begin_pass(self, index: int) -> None:
        """What to do before pass number `index`, counted from 0."""
        raise NotImplementedError


class CaptionTurnsCallback(PassCallback):
    """Tells the captioned images which pass over the data begins, so that all of them get their turn."""

    def __init__(self) -> None:
        self.groups: CaptionedGroups | None = None

    def begin_pass(self, index: int) -> None:
        assert self.groups is not None  # as of the data loader
        self.groups.set_epoch(index)


class FreezeBackbonesCallback(PassCallback):
    """Keeps the vision backbone and the text tower as they are for the first `epochs` passes over the data."""

    def __init__(self, model: EpmVGForVisualGrounding, epochs: int):
        self.epochs = epochs
        towers = (model.model.vision_model, model.model.text_model)
        # Only what is trained at all: frozen batch norms stay frozen.
        self.parameters = [p for tower in towers for p in tower.parameters() if p.requires_grad]

    def begin_pass(self, index: int) -> None:
        self._train_towers(index >= self.epochs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._train_towers(True)

    def _train_towers(self, trained: bool) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(trained)


# Beside the average, which is the checkpoint's model.
TRAINED_WEIGHTS = "trained_weights.safetensors"


class WeightAverage(TrainerCallback):
    """
    Averages the weights exponentially: after the first optimizer step the average is the model, after each further one
    `decay * average + (1 - decay) * model`. [`EpmVGTrainer`] evaluates and saves the average; its checkpoints hold the
    weights in training in a file of their own, with which training goes on. At the end the model becomes the average,
    or the best checkpoint's where that is asked for.

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
        # Resumed, this copies the average, which is what the checkpoint's model is.
        self.model = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(self.decay))
        if self.checkpoint is not None:
            file = Path(self.checkpoint) / TRAINED_WEIGHTS
            if not file.is_file():
                raise ValueError(f"{self.checkpoint} cannot be resumed with ema_decay: it was saved without")
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
        assert self.model is not None  # as of on_train_begin
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
        """Writes the weights in training beside the average; what is frozen is its own average."""
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        weights = {
            # A file takes no tensor that shares its memory or lies in another order.
            name: value.clone(memory_format=torch.contiguous_format)
            for name, value in model.state_dict().items()
            if name not in frozen
        }
        save_file(weights, Path(folder) / TRAINED_WEIGHTS)
