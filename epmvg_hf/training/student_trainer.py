"""Prepares the student of a run, again for each model of `model_init`, and makes its optimiser."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import BestRun, HPSearchBackend

from ..model.modeling_epmvg import EpmVGForVisualGrounding
from .callbacks import FreezeBackbonesCallback
from .checkpoint_trainer import CheckpointTrainer
from .frozen_towers import FrozenTowers
from .optimization import (
    check_resumable,
    drop_schedule,
    find_unused_parameters,
    freeze_parameters,
    parameter_groups,
)

logger = logging.getLogger(__name__)


class StudentTrainer(CheckpointTrainer):
    """
    The part of [`EpmVGTrainer`] that acts on the student: what of it is trained, at which learning rates, what is
    averaged and cached. With `model_init`, each run has a student of its own, and each trial of a search also values
    of its own for the arguments.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self._student_callbacks: list[TrainerCallback] = []
        self._arguments_of_search: dict[str, Any] = {}
        super().__init__(*args, **kwargs)

    # Student ---------------------------------------------------------------------------------------------------

    def _prepare_run(self) -> None:
        """Builds what depends on the model and on the values of the arguments."""
        raise NotImplementedError

    def _prepare_student(self, student: EpmVGForVisualGrounding, with_embeddings: bool) -> None:
        """
        Freezes what is not trained and adds the callbacks that act on the student, which may carry an adapter, in
        place of those of the student before it. `with_embeddings` says whether the loss compares embeddings.
        """
        for callback in self._student_callbacks:
            self.remove_callback(callback)
        self._student_callbacks = []
        if not with_embeddings:
            # Some wrappers, such as DDP, expect a gradient for every parameter that requires one.
            for name, parameter in student.named_parameters():
                if "teacher_image_projection" in name or "teacher_text_projection" in name:
                    parameter.requires_grad_(False)
        freeze_parameters(student, self.args.frozen_parameters or [])
        average = self._average_weights(self.args.ema_decay)
        if average is not None:
            self._student_callbacks.append(average)
        if self.args.freeze_backbone_epochs > 0:
            self._student_callbacks.append(FreezeBackbonesCallback(student, self.args.freeze_backbone_epochs))
        self._find_unused_parameters(student, with_embeddings)
        self._frozen_towers: FrozenTowers | None = None
        if self.args.cache_frozen_towers:
            # Added after the callback above, which decides what is frozen in an epoch.
            self._frozen_towers = FrozenTowers(
                student,
                self.processing_class,
                self.accelerator,
                self.args.per_device_train_batch_size,
                cache_dir=self.args.tower_cache_dir,
                dtype=self.args.tower_cache_dtype,
                disable_tqdm=self._hides_progress,
            )
            self._student_callbacks.append(self._frozen_towers)
        for callback in self._student_callbacks:
            self.add_callback(callback)

    def _find_unused_parameters(self, student: EpmVGForVisualGrounding, with_embeddings: bool) -> None:
        """Has DDP search for parameters without a gradient, in every step, only where there are some."""
        handler = self.accelerator.ddp_handler
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or handler is None:
            return
        if self.args.world_size > 1 and self.args.ddp_find_unused_parameters is None:
            unused = find_unused_parameters(student, with_embeddings, self.args.distil_only)
            handler.find_unused_parameters = bool(unused)
            if unused:
                logger.info("DDP searches for unused parameters in every step, because of %s", ", ".join(unused[:3]))

    @property
    def _hides_progress(self) -> bool:
        return self.args.disable_tqdm or not self.is_local_process_zero()

    # Runs with a new model -------------------------------------------------------------------------------------

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model = super().call_model_init(trial)
        if model is self.model:
            raise ValueError("model_init must build a new model in each call, and returned the one before again")
        return model

    def _hp_search_setup(self, trial: Any) -> None:
        # Each training calls this method after it has called model_init, and before it loads or wraps the model. Here
        # a trial's values become arguments.
        if self.hp_search_backend is not None and trial is not None:
            self.args.__dict__.update(self._arguments_of_search)
            values = self.hp_space(trial) if self.hp_search_backend == HPSearchBackend.OPTUNA else trial
            # transformers casts each value to the type of the present one: "text_model" would become a list of
            # letters, and None cannot become a number.
            optional = {field.name for field in dataclasses.fields(self.args) if field.default is None}
            self.args.__dict__.update(dict.fromkeys(optional & values.keys()))
        super()._hp_search_setup(trial)
        if self.model_init is not None:
            self.args.check_values()
            self._prepare_run()

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        n_trials: int = 20,
        direction: str | list[str] = "minimize",
        backend: str | HPSearchBackend | None = None,
        hp_name: Callable[[Any], str] | None = None,
        **kwargs: Any,
    ) -> BestRun | list[BestRun]:
        """
        Searches values for the arguments as `Trainer` does. Each trial starts from a new model of `model_init` and
        from the trainer's arguments, which the search leaves as they were.

        Args:
            hp_space (`Callable`, *optional*):
                Makes a dictionary of arguments from a trial. `frozen_parameters` may be one pattern, as a string.
            compute_objective (`Callable`, *optional*):
                Computes what is minimised or maximised from the metrics of an evaluation, by default `eval_loss`. (The
                default of `Trainer`, the sum of all metrics, would add accuracies to losses.)
            n_trials (`int`, *optional*, defaults to 20): number of trials.
            direction (`str` or `list[str]`, *optional*, defaults to `"minimize"`): `"minimize"` or `"maximize"`.
            backend (`str`, *optional*): `"optuna"`, `"ray"` or `"wandb"`, by default one that is installed.
            hp_name (`Callable`, *optional*): names a trial.
            kwargs: arguments of the backend.

        Returns:
            `BestRun`: `run_id`, `objective` and `hyperparameters` of the best trial, or a list of them for several
            directions.

        Raises:
            ValueError: there is no `model_init`, or no objective for this direction or these evaluation sets.

        Example:

        ```python
        >>> def hp_space(trial):
        ...     return {"vision_learning_rate": trial.suggest_float("vision_learning_rate", 1e-6, 1e-4, log=True)}

        >>> best = trainer.hyperparameter_search(hp_space, n_trials=10)  # this trainer got a model
        Traceback (most recent call last):
        ValueError: hyperparameter_search needs model_init, which builds a new model for each trial
        ```
        """
        if self.model_init is None:
            raise ValueError("hyperparameter_search needs model_init, which builds a new model for each trial")
        if compute_objective is None:
            if direction != "minimize":
                raise ValueError(
                    f"direction={direction!r} needs compute_objective, such as lambda metrics: "
                    'metrics["eval_mean_iou"]: by default a search minimises eval_loss'
                )
            compute_objective = _evaluation_loss
        given = self._arguments_of_search = dict(self.args.__dict__)
        try:
            return super().hyperparameter_search(
                hp_space, compute_objective, n_trials, direction, backend, hp_name, **kwargs
            )
        finally:
            self.args.__dict__.update(given)

    # Optimiser -------------------------------------------------------------------------------------------------

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        # Weight decay would pull this parameter, the logarithm of a scale, towards a scale of 1.
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith("log_map_sharpness")]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            optimizer_class, optimizer_kwargs = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                self.args, self.model if model is None else model
            )
            self.optimizer = optimizer_class(self._parameter_groups(model), **optimizer_kwargs)
        return self.optimizer

    def _parameter_groups(self, model: nn.Module | None = None) -> list[dict[str, Any]]:
        model = self.model if model is None else model
        return parameter_groups(model, self.args, set(self.get_decay_parameter_names(model)))

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        drop_epochs = self.args.lr_drop_epochs
        if drop_epochs is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        optimizer = self.optimizer if optimizer is None else optimizer
        self.lr_scheduler = scheduler = drop_schedule(optimizer, drop_epochs, self.args, num_training_steps)
        self._created_lr_scheduler = True
        return scheduler

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.is_fsdp_enabled:  # FSDP saves optimisers in another way, and loads them by the parameters' names
            groups = self._parameter_groups() if self.optimizer is None else self.optimizer.param_groups
            check_resumable(resume_from_checkpoint, groups)
        super()._load_from_checkpoint(resume_from_checkpoint, model)


def _evaluation_loss(metrics: dict[str, float]) -> float:
    if "eval_loss" not in metrics:
        raise ValueError(
            "several evaluation sets, or rows without boxes, need compute_objective: there is no eval_loss among "
            f"{', '.join(metrics)}"
        )
    return metrics["eval_loss"]
