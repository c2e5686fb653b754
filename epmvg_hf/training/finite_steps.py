"""Watches that an optimiser step is made of finite numbers, and keeps one that is not away from the weights."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .late_flag import LateFlag

logger = logging.getLogger(__name__)

_MAX_ROWS = 8  # named in a message


class NonFiniteError(ArithmeticError):
    """A training step in which a loss term, a gradient or an input is NaN or infinite."""


class FiniteSteps(TrainerCallback):
    """
    Stops at, or skips, an optimiser step in which a loss term or the gradient is NaN or infinite, and says which terms
    and inputs these are, and of which rows. A GPU is not waited for: what it computed is looked at in the next step,
    by when it is there. A step that is skipped changes no weight; on a GPU its gradient is zero instead, so that the
    optimiser's averages of earlier gradients still act.

    With a scaler for float16, gradients that are too large are part of its work, so that only the loss is watched.

    Args:
        skips (`bool`): whether to skip such steps instead of stopping the training.
        has_scaler (`bool`): whether a scaler for float16 is in use.
    """

    def __init__(self, skips: bool, has_scaler: bool):
        self.skips, self.has_scaler = skips, has_scaler
        self._step: _Step = _Step()
        self._previous: tuple[_Step, LateFlag] | None = None

    def watch_terms(self, terms: Mapping[str, torch.Tensor], inputs: Mapping[str, Any]) -> None:
        """
        Adds the loss terms of a batch of the present step, scalars, and the inputs that they were computed from, among
        them `row_index` `(N,)` and `image_index` `(N,)`.
        """
        self._step.batches.append(_Batch(terms, inputs))

    def watch_gradient(self, norm: torch.Tensor | float) -> None:
        """Adds the norm of the gradient of the present step, over all processes."""
        self._step.gradient_norm = norm

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._step, self._previous = _Step(), None

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        step, self._step = self._step, _Step()
        step.number = state.global_step + 1
        is_finite = step.is_finite(with_gradient=not self.has_scaler)
        if is_finite.device.type == "cpu":
            if not is_finite:
                for parameter in model.parameters():
                    parameter.grad = None
                self._report(step)
            return
        self._report_previous()
        self._previous = step, LateFlag(is_finite)
        if self.skips:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.masked_fill_(~is_finite, 0)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._report_previous()

    def _report_previous(self) -> None:
        previous, self._previous = self._previous, None
        if previous is not None and not previous[1].read():
            self._report(previous[0])

    def _report(self, step: "_Step") -> None:
        if not self.skips:
            raise NonFiniteError(f"{step.describe()}. No checkpoint was written after it.")
        logger.warning("%s. The step was skipped.", step.describe())


class _Step:
    """What is known of one optimiser step."""

    def __init__(self) -> None:
        self.number = 0
        self.batches: list[_Batch] = []
        self.gradient_norm: torch.Tensor | float = 0.0

    def is_finite(self, with_gradient: bool) -> torch.Tensor:
        """A boolean scalar on the device of the loss."""
        values = [term.float() for batch in self.batches for term in batch.terms.values()]
        norm = self.gradient_norm
        if with_gradient:
            device = values[0].device if values else torch.device("cpu")
            values.append(torch.as_tensor(norm, dtype=torch.float32, device=device))
        return torch.stack(values).isfinite().all() if values else torch.tensor(True)

    def describe(self) -> str:
        """A sentence on what is not finite. Only here a device is waited for."""
        terms = {
            f"{name} is {value.item()}": None
            for batch in self.batches
            for name, value in batch.terms.items()
            if not value.isfinite()
        }
        norm = float(self.gradient_norm)
        wrong = [*terms, *([] if torch.tensor(norm).isfinite() else [f"the norm of the gradient is {norm}"])]
        sentence = f"step {self.number}: {', '.join(wrong)}"
        causes = [cause for batch in self.batches for cause in batch.find_causes()]
        if causes:
            return f"{sentence}, because {'; '.join(causes)}"
        if not terms:
            return f"{sentence}, while all loss terms of this process are numbers"
        rows = [row for batch in self.batches if batch.rows is not None for row in batch.rows.tolist()]
        shown = f" (rows {_listed(rows)})" if rows else ""
        return f"{sentence}, and all inputs of the batch{shown} are numbers: a lower learning rate may help"


class _Batch:
    """What is kept of a batch: its loss terms, and which of its inputs are not finite. The inputs can be freed."""

    def __init__(self, terms: Mapping[str, torch.Tensor], inputs: Mapping[str, Any]):
        self.terms = {name: term.detach() for name, term in terms.items()}
        self.rows: torch.Tensor | None = inputs.get("row_index")
        self.image_index: torch.Tensor | None = inputs.get("image_index")
        self.faulty = {
            name: ~values.isfinite().flatten(1).all(1) if values.ndim > 1 else ~values.isfinite()
            for name, values in inputs.items()
            # Boxes and labels are NaN for expressions without a box.
            if isinstance(values, torch.Tensor) and values.is_floating_point() and name not in ("labels", "boxes")
        }

    def find_causes(self) -> list[str]:
        """Which inputs are not finite, and to which rows of the dataset they belong."""
        causes = []
        for name, faulty in self.faulty.items():
            if not faulty.any():
                continue
            rows: list[int] = []
            if self.rows is not None:
                of_expressions = faulty if len(faulty) == len(self.rows) else faulty[self.image_index]
                rows = self.rows[of_expressions].tolist()
            causes.append(f"{name} has NaN or infinity" + (f" in rows {_listed(rows)}" if rows else ""))
        return causes


def _listed(rows: list[int]) -> str:
    others = f" and {len(rows) - _MAX_ROWS} more" if len(rows) > _MAX_ROWS else ""
    return ", ".join(map(str, rows[:_MAX_ROWS])) + others
