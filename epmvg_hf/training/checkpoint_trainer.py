"""Saves and loads what a checkpoint holds beyond the weights of a plain model: their average, or an adapter."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .adapters import has_own_adapter, load_adapter_weights
from .callbacks import WeightAverage
from .card_trainer import CardTrainer


class CheckpointTrainer(CardTrainer):
    """
    The part of [`EpmVGTrainer`] that saves and loads: where the weights are averaged, checkpoints hold the average
    and, beside it, the weights in training; a model with an adapter of its own saves and loads that alone.
    """

    _average: WeightAverage | None = None

    def _average_weights(self, decay: float | None) -> WeightAverage | None:
        """The callback that averages the weights. The average is then evaluated and saved in place of the weights."""
        if decay is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("ema_decay needs whole weights on every process, which FSDP and DeepSpeed do not keep")
        self._average = None if decay is None else WeightAverage(decay)
        return self._average

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """A context in which `self.model` is the average of the weights, if training keeps one."""
        trained = self.model
        if self._average is not None and self._average.model is not None:
            self.model = self._average.model.module
        try:
            yield
        finally:
            self.model = trained

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        with self._averaged_weights():
            super()._save(output_dir, state_dict)
        if self._average is not None and self._average.model is not None:
            self._average.save_trained(self.model, self.args.output_dir if output_dir is None else output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if has_own_adapter(self.model):
            load_adapter_weights(self.model, resume_from_checkpoint)  # the Trainer loads only those of a PeftModel
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._average is not None:
            self._average.checkpoint = resume_from_checkpoint

    def _load_best_model(self) -> None:
        if has_own_adapter(self.model):
            load_adapter_weights(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()
