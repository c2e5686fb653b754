"""`transformers.Trainer` for B images and N expressions: its data, its loss, its optimiser and its evaluation."""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import broadcast, gather_object
from datasets import Dataset, IterableDataset
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, TrainOutput, unwrap_peft_model

from ..data.image_groups import CaptionedGroups, ImageGroups, number_rows
from ..distillation.clip_teacher import ClipTeacher
from ..distillation.teaching import Teaching, check_captions, check_teacher
from ..evaluation.accuracy import GroundingAccuracy
from ..evaluation.evaluated_rows import EvaluatedRows
from ..model.losses import has_box
from ..model.modeling_epmvg import MODEL_INPUTS, EpmVGForVisualGrounding
from ..model.processing_epmvg import EpmVGProcessor
from .augmentation import GroundingAugmentation
from .callbacks import CaptionTurnsCallback, FreezeBackbonesCallback
from .checkpoint_trainer import CheckpointTrainer
from .data_collator import EpmVGDataCollator
from .frozen_towers import FrozenTowers, TowerImageGroups
from .loss_terms import LossTerms
from .model_card import strip_private_paths
from .optimization import drop_schedule, find_unused_parameters, freeze_parameters, parameter_groups
from .training_args import EpmVGTrainingArguments

logger = logging.getLogger(__name__)

# How many pixels the longer side of an augmented JPEG keeps when it is decoded, as a share of the canvas. A crop may
# take 0.4 of them away, see GroundingAugmentation.
_DECODED_SHARE = 1.5


class EpmVGTrainer(CheckpointTrainer):
    """
    Trains and evaluates [`EpmVGForVisualGrounding`] on datasets with one row per expression, as
    [`load_grounding_dataset`] gives them. Map-style datasets are batched by image. Streamed ones are batched by row,
    and rows of one image that meet in a batch share its visual pass.

    Metrics are `acc@0.5`, `acc@0.7` and `mean_iou` of boxes in pixels of the original images. Every expression with a
    box counts once, on any number of processes. `predict` gives `predictions` and `label_ids`, xyxy pixel boxes
    `(N, 4)` in the order of the dataset's rows; several processes or workers that read a stream interleave theirs.
    Where several processes fill up the last batches with repeated images, `eval_loss` weights a batch by its new rows.

    With a teacher, training adds the terms of [`~distillation_loss.DistillationLoss`]. The teacher is not part of the
    model: it is not wrapped, not optimised and not saved. Its outputs are computed once where the data is not
    augmented (`args.cache_teacher`). Rows whose `box` is `None`, and all of `caption_dataset`, take part in these
    terms alone.

    A run that is resumed at the end of an epoch is bit-equal to one that was not interrupted. Within an epoch, it
    continues with other random augmentation.

    Args:
        model ([`EpmVGForVisualGrounding`] or `peft.PeftModel`): the student, or the student with an adapter.
        args ([`EpmVGTrainingArguments`]): the arguments.
        train_dataset, eval_dataset (`datasets.Dataset` or `datasets.IterableDataset`, *optional*):
            Rows with `image`, `image_id`, `expression` and `box` (xyxy pixels of that image).
        processing_class ([`EpmVGProcessor`]): makes tensors and undoes the letterbox; saved with checkpoints.
        augmentation ([`GroundingAugmentation`], *optional*):
            Changes training images when `args.augment` is set; one with default settings if not given. JPEGs of at
            least three times the canvas are then decoded at a lower resolution, see [`ImageGroups`].
        teacher ([`ClipTeacher`], *optional*):
            Teaches its image-text consistency, with the weights and temperatures in `args`. The relation and feature
            terms need a model with `config.teacher_projection_dim`, the feature term one of the teacher's `embed_dim`.
        caption_dataset (`datasets.Dataset`, *optional*):
            Rows with `image`, `image_id` and `expression` (a caption), mixed into training at `args.caption_ratio`.
        kwargs: further arguments of `transformers.Trainer`.

    Raises:
        ValueError: there is no processor, a caption dataset or a term of the distillation lacks what it needs,
            `frozen_parameters` match no parameter, or another argument does not fit.

    Example:

    ```python
    >>> from epmvg_hf import EpmVGTrainer, EpmVGTrainingArguments

    >>> args = EpmVGTrainingArguments("outputs/mine", num_train_epochs=2, per_device_train_batch_size=2)
    >>> trainer = EpmVGTrainer(model, args, train_dataset=dataset, eval_dataset=dataset, processing_class=processor)
    >>> trainer.train().global_step  # batches count images, of which the dataset has 4
    4
    >>> trainer.save_model()
    ```
    """

    # compute_loss divides by the expressions of the whole step, all accumulated batches and processes.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: EpmVGForVisualGrounding,
        args: EpmVGTrainingArguments,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset] | None = None,
        processing_class: EpmVGProcessor | None = None,
        augmentation: GroundingAugmentation | None = None,
        teacher: ClipTeacher | None = None,
        caption_dataset: Dataset | None = None,
        **kwargs: Any,
    ):
        if processing_class is None:
            raise ValueError("EpmVGTrainer needs processing_class, an EpmVGProcessor: it makes the model's inputs")
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("EpmVGTrainer takes no compute_loss_func: override compute_loss")
        if caption_dataset is not None:
            check_captions(caption_dataset, train_dataset, teacher, args.distillation_weights)
        if teacher is not None:
            check_teacher(teacher, model.config, args.distillation_weights)
        self.teacher = teacher if args.distils else None
        self.caption_dataset = caption_dataset
        augmentation = (augmentation or GroundingAugmentation()) if args.augment else None
        has_workers = args.dataloader_num_workers > 0
        self.train_collator = EpmVGDataCollator(
            processing_class, augmentation, args.max_expressions_per_image, as_bytes=has_workers
        )
        self._metric = GroundingAccuracy(keep_in_memory=True)
        self._evaluated: list[dict[str, Any]] = []
        kwargs.setdefault("compute_metrics", self._compute_accuracy)
        super().__init__(
            model=model,
            args=args,
            data_collator=EpmVGDataCollator(processing_class, as_bytes=has_workers),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.teaching: Teaching | None = None
        if self.teacher is not None:
            self.teaching = Teaching(
                self.teacher, args.distillation_weights, processing_class.image_processor, self.accelerator
            )
        self._loss_terms = LossTerms(self.accelerator)
        if caption_dataset is not None:
            self._caption_turns = CaptionTurnsCallback()
            self.add_callback(self._caption_turns)
        self._prepare_student(unwrap_peft_model(model))

    def _prepare_student(self, student: EpmVGForVisualGrounding) -> None:
        """Freezes what is not trained and adds the callbacks that act on the student, which may carry an adapter."""
        if self.teaching is None or not self.teaching.weights.compares_embeddings:
            # Some wrappers, such as DDP, expect a gradient for every parameter that requires one.
            for name, parameter in student.named_parameters():
                if "teacher_image_projection" in name or "teacher_text_projection" in name:
                    parameter.requires_grad_(False)
        freeze_parameters(student, self.args.frozen_parameters or [])
        if self.args.ema_decay is not None:
            self._average_weights(self.args.ema_decay)
        if self.args.freeze_backbone_epochs > 0:
            self.add_callback(FreezeBackbonesCallback(student, self.args.freeze_backbone_epochs))
        self._find_unused_parameters(student)
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
            self.train_collator.tower_outputs = self._frozen_towers.outputs
            self.add_callback(self._frozen_towers)

    def _find_unused_parameters(self, student: EpmVGForVisualGrounding) -> None:
        """Has DDP search for parameters without a gradient, in every step, only where there are some."""
        handler = self.accelerator.ddp_handler
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or handler is None:
            return
        if self.args.world_size > 1 and self.args.ddp_find_unused_parameters is None:
            with_embeddings = self.teaching is not None and self.teaching.weights.compares_embeddings
            unused = find_unused_parameters(student, with_embeddings)
            handler.find_unused_parameters = bool(unused)
            if unused:
                logger.info("DDP searches for unused parameters in every step, because of %s", ", ".join(unused[:3]))

    # Data ------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        datasets = [dataset for dataset in (self.train_dataset, self.caption_dataset) if dataset is not None]
        is_fixed = not self.args.augment and not any(isinstance(dataset, IterableDataset) for dataset in datasets)
        if self.teaching is not None:
            if is_fixed and self.args.cache_teacher:
                self.teaching.fill_cache(datasets, self.args.teacher_cache_dir, disable_tqdm=self._hides_progress)
            elif self.args.cache_teacher:
                logger.info(
                    "the teacher runs in every step: only data that is neither augmented nor streamed is cached"
                )
            self.train_collator.teacher_columns = self.teaching.columns
        if self._frozen_towers is not None:
            self._frozen_towers.datasets = datasets
            self._frozen_towers.obstacles = self._obstacles_to_tower_outputs(is_fixed)
        evaluation_collator, self.data_collator = self.data_collator, self.train_collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = evaluation_collator

    @property
    def _hides_progress(self) -> bool:
        return self.args.disable_tqdm or not self.is_local_process_zero()

    def _obstacles_to_tower_outputs(self, is_fixed: bool) -> dict[str, str]:
        """Why the outputs of each tower cannot be computed once, if it is not for parameters that are trained."""
        vision, text = "vision backbone", "text tower"
        if not is_fixed:
            return dict.fromkeys((vision, text), "its input is augmented (augment) or streamed")
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return dict.fromkeys((vision, text), "FSDP and DeepSpeed spread its weights over the processes")
        obstacles = {}
        if self.teaching is not None and not self.args.cache_teacher:
            obstacles[vision] = "the teacher sees the pixels in every step (cache_teacher)"
        if self.processing_class.tokenizer.padding_side != "right":
            obstacles[text] = "its tokenizer pads on the left, where the places of tokens depend on the batch"
        return obstacles

    def _get_dataloader(
        self, dataset: Dataset | IterableDataset, *args: Any, is_training: bool = False, **kwargs: Any
    ) -> DataLoader:
        if is_training and dataset.column_names is not None and "box" not in dataset.column_names:
            raise ValueError("train_dataset has no column box; an expression without a box has the value None there")
        by_image: Any
        if isinstance(dataset, IterableDataset):
            # Accelerate gives each process shards of its own if there are enough, else some rows of all shards.
            has_shards = dataset.num_shards >= self.accelerator.num_processes and not self.accelerator.split_batches
            reader = (self.accelerator.process_index, self.accelerator.num_processes) if has_shards else (0, 1)
            by_image = number_rows(dataset, *reader)
        else:
            by_image = self._group_images(dataset, is_training)
        if is_training and self.caption_dataset is not None:
            captioned = self._group_images(self.caption_dataset, is_training)
            by_image = CaptionedGroups(by_image, captioned, self.args.caption_ratio, self.args.seed)
            self._caption_turns.groups = by_image
        return super()._get_dataloader(by_image, *args, is_training=is_training, **kwargs)

    def _group_images(self, dataset: Dataset, is_training: bool) -> ImageGroups:
        if is_training and self._frozen_towers is not None:
            return TowerImageGroups(dataset, self._frozen_towers.outputs)
        if is_training and self.args.augment:
            canvas = self.processing_class.image_processor.size["height"]
            return ImageGroups(dataset, decoded_side=round(_DECODED_SHARE * canvas))
        return ImageGroups(dataset)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return self.processing_class.image_processor.from_bytes(super()._prepare_inputs(inputs))

    # Loss ------------------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """
        Trains, as in `Trainer`: `train(resume_from_checkpoint=True)` goes on from the last checkpoint.

        Returns:
            `TrainOutput`: `global_step`, `training_loss` and `metrics`.

        Raises:
            ValueError: the training data has no column box, or is not what the collator can read.

        Example:

        ```python
        >>> result = trainer.train()
        >>> result.global_step, "train_loss" in result.metrics
        (1, True)
        ```
        """
        self._loss_terms = LossTerms(self.accelerator)
        return super().train(*args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor]:
        """The batches of one optimiser step, and the numbers of boxes and expressions in them over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:  # the end of a stream, which the other processes may not have reached
            return [], torch.zeros(2, dtype=torch.long, device=device)
        # The counts stay on the device, here and in the loss, because reading them would make a GPU wait.
        boxes = has_box(torch.cat([batch["labels"] for batch in batches])).sum()
        expressions = torch.full_like(boxes, sum(len(batch["labels"]) for batch in batches))
        return batches, self.accelerator.reduce(torch.stack([boxes, expressions]), reduction="sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        outputs = model(**{name: inputs[name] for name in MODEL_INPUTS if name in inputs})
        if "labels" not in inputs:
            return (None, outputs) if return_outputs else None
        loss = outputs["loss"]
        if num_items_in_batch is not None:
            total_boxes, total_expressions = num_items_in_batch.unbind()
            boxes = has_box(inputs["labels"]).sum()
            # Summed over accumulated batches and averaged over processes (DDP), this is the mean over all boxes.
            loss = loss * (boxes * self.accelerator.num_processes / total_boxes.clamp(min=1))
            self._loss_terms.add({name: (term, boxes) for name, term in outputs["loss_dict"].items()})
            if self.teaching is not None:
                distilled, terms = self.teaching.loss(outputs, inputs, total_boxes, total_expressions)
                loss = loss + distilled
                self._loss_terms.add(terms)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Logs of training carry "loss". Those of an evaluation carry "eval_loss", with terms of their own.
        if "loss" in logs:
            logs.update(self._loss_terms.take())
        super().log(logs, start_time)

    # Optimiser -------------------------------------------------------------------------------------------------

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        # Weight decay would pull this parameter, the logarithm of a scale, towards a scale of 1.
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith("log_map_sharpness")]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        model = self.model if model is None else model
        if self.optimizer is None:
            optimizer_class, optimizer_kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = parameter_groups(model, self.args, set(self.get_decay_parameter_names(model)))
            self.optimizer = optimizer_class(groups, **optimizer_kwargs)
        return self.optimizer

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

    # Evaluation ------------------------------------------------------------------------------------------------

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, None, None]:
        """Keeps the batch's results: N differs between processes, which the Trainer's own gathering cannot take."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        boxes = self.processing_class.post_process_grounding(outputs, inputs)
        rows = {
            "row_index": inputs["row_index"].tolist(),
            "predictions": torch.stack([result["box"] for result in boxes]).float().cpu().numpy(),
        }
        if loss is not None:
            rows["references"] = inputs["boxes"].float().cpu().numpy()
            rows["has_box"] = has_box(inputs["labels"]).cpu().numpy()
            rows["losses"] = {"loss": loss.item(), **{k: v.item() for k, v in outputs["loss_dict"].items()}}
        self._evaluated.append(rows)
        return None, None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self._evaluated = []
        # Trained batch norms have other statistics in each process, and those of the first process are saved.
        broadcast(list(self.model.buffers()))
        with self._averaged_weights():
            output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        rows = EvaluatedRows.merge(gather_object(self._evaluated))
        self._evaluated = []

        metrics = dict(rows.losses)
        if rows.references is not None and rows.has_box.any() and self.compute_metrics is not None:
            predictions, references = rows.predictions[rows.has_box], rows.references[rows.has_box]
            metrics.update(self.compute_metrics(EvalPrediction(predictions=predictions, label_ids=references)))
        prefixed = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(
            predictions=rows.predictions,
            label_ids=rows.references,
            metrics={**output.metrics, **prefixed},
            num_samples=len(rows.predictions),
        )

    def _compute_accuracy(self, evaluated: EvalPrediction) -> dict[str, float]:
        return self._metric.compute(predictions=evaluated.predictions, references=evaluated.label_ids)

    # Model card ------------------------------------------------------------------------------------------------

    def _describe_data(self, name: str) -> str:
        rows = "a stream" if isinstance(self.train_dataset, IterableDataset) else f"{len(self.train_dataset):,} rows"
        data = f"{rows} of {name or 'data of its own'}"
        if self.caption_dataset is None:
            return data
        return f"{data}, and on {len(self.caption_dataset):,} expressions or captions without boxes"

    def _describe_teacher(self, name: str | None) -> str | None:
        if self.teaching is None:
            return None
        name = name or self.teaching.teacher.name
        return self.teaching.describe(strip_private_paths(name) if name else "a CLIP")
