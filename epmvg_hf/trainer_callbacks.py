"""Callbacks of the trainer: what it does before each pass over the data."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .collator import CaptionedGroups
from .modeling_epmvg import EpmVGForVisualGrounding


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
