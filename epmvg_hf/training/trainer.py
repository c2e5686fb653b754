"""`transformers.Trainer` for B images and N expressions."""

import logging
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from datasets import Dataset, IterableDataset
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, get_worker_info
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, TrainOutput, unwrap_peft_model

from ..data.image_groups import CaptionedGroups, ImageGroups
from ..distillation.clip_teacher import ClipTeacher, TeacherOutput
from ..distillation.distillation_loss import DistillationLoss
from ..distillation.teacher_cache import TeacherCache
from ..evaluation.accuracy import GroundingAccuracy
from ..evaluation.evaluated_rows import EvaluatedRows
from ..model.losses import has_box
from ..model.modeling_epmvg import EpmVGForVisualGrounding
from ..model.processing_epmvg import EpmVGProcessor
from .adapters import has_own_adapter, load_adapter_weights
from .augmentation import GroundingAugmentation
from .callbacks import CaptionTurnsCallback, FreezeBackbonesCallback, WeightAverage
from .card_trainer import CardTrainer, public
from .data_collator import OTHER_COLUMNS, EpmVGDataCollator
from .training_args import EpmVGTrainingArguments

logger = logging.getLogger(__name__)

_TEACHER_COLUMNS = ("teacher_image_embeds", "teacher_text_embeds", "teacher_patch_embeds")
# As in TransVG, whose projection behind the encoder learns with the fusion transformer.
_VISION_MODULES = ("vision_model", "input_projection", "encoder")


class EpmVGTrainer(CardTrainer):
    """
    Trains and evaluates [`EpmVGForVisualGrounding`] on datasets with one row per expression, as
    [`load_grounding_dataset`] gives them. Map-style datasets are batched by image; streamed ones by row, and rows of
    one image that meet in a batch share its visual pass.

    Metrics are `acc@0.5`, `acc@0.7` and `mean_iou` of boxes in pixels of the original images, every expression with a
    box counted once on any number of processes. `predict` gives `predictions` and `label_ids`, xyxy pixel boxes
    `(N, 4)` in the order of the dataset's rows (of a stream read by several processes or workers: in an order of their
    own).
    `eval_loss` on several processes weighs a batch that was filled up by its new rows.

    With a teacher, training adds the terms of [`~distillation_loss.DistillationLoss`]. The teacher is not part of the
    model:
    it is not wrapped, not optimized and not saved. Its outputs are computed once where the data is not augmented
    (`args.cache_teacher`). Rows whose `box` is `None`, and all of `caption_dataset`, take part in these terms alone.

    A run resumed at the end of an epoch is bit-equal to one that was not interrupted; within an epoch it continues
    with other random augmentation.

    Args:
        model ([`EpmVGForVisualGrounding`] or `peft.PeftModel`): the student, or the student with an adapter.
        args ([`EpmVGTrainingArguments`]): the arguments.
        train_dataset, eval_dataset (`datasets.Dataset` or `datasets.IterableDataset`, *optional*):
            Rows with `image`, `image_id`, `expression` and `box` (xyxy pixels of that image).
        processing_class ([`EpmVGProcessor`]): makes tensors and undoes the letterbox; saved with every checkpoint.
        augmentation ([`GroundingAugmentation`], *optional*):
            For training images when `args.augment`; the defaults when not given.
        teacher ([`ClipTeacher`], *optional*):
            Teaches its image-text consistency; with the weights and temperatures in `args`. The relation and feature
            terms need a model with `config.teacher_projection_dim`, the feature term the teacher's `embed_dim`.
        caption_dataset (`datasets.Dataset`, *optional*):
            Rows with `image`, `image_id` and `expression` (a caption), mixed into training at `args.caption_ratio`.
        kwargs: further arguments of `transformers.Trainer`.

    Raises:
        ValueError: there is no processor, or an argument contradicts another: a caption dataset or a term of the
            distillation without what it needs, `frozen_parameters` that are not there, ...

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
            _check_captions(caption_dataset, train_dataset, teacher, args)
        if teacher is not None:
            _check_teacher(teacher, model, args)
        self.teacher = teacher if args.distils else None
        self.caption_dataset = caption_dataset
        augmentation = (augmentation or GroundingAugmentation()) if args.augment else None
        self.train_collator = EpmVGDataCollator(processing_class, augmentation, args.max_expressions_per_image)
        self._metric = GroundingAccuracy(keep_in_memory=True)
        self._loss_terms: dict[str, torch.Tensor] = {}
        self._evaluated: list[dict[str, Any]] = []
        kwargs.setdefault("compute_metrics", self._compute_accuracy)
        super().__init__(
            model=model,
            args=args,
            data_collator=EpmVGDataCollator(processing_class),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        student = unwrap_peft_model(model)  # its names are the same with and without
        if self.teacher is None or not args.distils_embeddings:
            # What gets no gradient must not ask for one: some wrappers wait for it.
            for name, parameter in student.named_parameters():
                if "teacher_image_projection" in name or "teacher_text_projection" in name:
                    parameter.requires_grad_(False)
        for pattern in args.frozen_parameters or ():
            found = [parameter for name, parameter in student.named_parameters() if re.search(pattern, name)]
            if not found:
                raise ValueError(f"frozen_parameters has {pattern!r}, which is found in no parameter's name")
            for parameter in found:
                parameter.requires_grad_(False)
        self._average = None
        if args.ema_decay is not None:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError(
                    "ema_decay needs whole weights on every process, which FSDP and DeepSpeed do not keep"
                )
            self._average = WeightAverage(args.ema_decay)
            self.add_callback(self._average)
        if caption_dataset is not None:
            self._captions = CaptionTurnsCallback()
            self.add_callback(self._captions)
        if self.teacher is not None:
            # Beside the model, not in it: nothing that wraps, optimizes or saves the student sees the teacher.
            self.teacher.to(self.accelerator.device)
            self.distillation_loss = DistillationLoss(args.distillation_weights, self.accelerator)
        if args.freeze_backbone_epochs > 0:
            self.add_callback(FreezeBackbonesCallback(student, args.freeze_backbone_epochs))

    # Data ------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        if self.teacher is not None:
            self._prepare_teacher(self.teacher)
        evaluation_collator, self.data_collator = self.data_collator, self.train_collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = evaluation_collator

    def _prepare_teacher(self, teacher: ClipTeacher) -> None:
        """Have the collator deliver the teacher's outputs, or what the teacher needs to compute them."""
        datasets = [dataset for dataset in (self.train_dataset, self.caption_dataset) if dataset is not None]
        streamed = any(isinstance(dataset, IterableDataset) for dataset in datasets)
        if self.args.augment or streamed or not self.args.cache_teacher:
            if self.args.cache_teacher:
                logger.info(
                    "the teacher runs in every step: only data that is neither augmented nor streamed is cached"
                )
            self.train_collator.keep_expressions = True
            return
        with self.accelerator.autocast():
            caches = [
                TeacherCache.build(
                    teacher,
                    dataset,
                    self.processing_class.image_processor,
                    cache_dir=self.args.teacher_cache_dir,
                    output_patches=self.args.teacher_map_loss_coefficient > 0,
                    disable_tqdm=self.args.disable_tqdm or not self.is_local_process_zero(),
                )
                for dataset in datasets
            ]
        self.train_collator.teacher_cache = TeacherCache.concatenate(caches)

    def _get_dataloader(
        self, dataset: Dataset | IterableDataset, *args: Any, is_training: bool = False, **kwargs: Any
    ) -> DataLoader:
        by_image = _by_image(dataset, self.accelerator)
        if is_training and dataset.column_names is not None and "box" not in dataset.column_names:
            raise ValueError("train_dataset has no column box; an expression without a box has the value None there")
        if is_training and self.caption_dataset is not None:
            captioned = ImageGroups(self.caption_dataset)
            by_image = CaptionedGroups(by_image, captioned, self.args.caption_ratio, self.args.seed)
            self._captions.groups = by_image
        return super()._get_dataloader(by_image, *args, is_training=is_training, **kwargs)

    # Training --------------------------------------------------------------------------------------------------

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
        self._loss_terms = {}
        return super().train(*args, **kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        # A scale is no weight: decay would pull it to 1.
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith("log_map_sharpness")]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        model = self.model if model is None else model
        if self.optimizer is None:
            decayed = set(self.get_decay_parameter_names(model))
            groups = defaultdict(list)
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    groups[self._learning_rate_of(name), name in decayed].append(parameter)
            optimizer_class, optimizer_kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(
                [
                    {"params": parameters, "lr": lr, "weight_decay": self.args.weight_decay if decay else 0.0}
                    for (lr, decay), parameters in groups.items()
                ],
                **optimizer_kwargs,
            )
        return self.optimizer

    def _learning_rate_of(self, parameter_name: str) -> float:
        modules = parameter_name.split(".")
        rate = None
        if "text_model" in modules:
            rate = self.args.text_learning_rate
        elif any(name in modules for name in _VISION_MODULES):
            rate = self.args.vision_learning_rate
        return self.args.learning_rate if rate is None else rate

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.args.lr_drop_epochs is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        steps_per_epoch = num_training_steps / self.args.num_train_epochs
        drops = [round(epoch * steps_per_epoch) for epoch in self.args.lr_drop_epochs]
        warmup = self.args.get_warmup_steps(num_training_steps)

        def factor(step: int) -> float:
            return min(1.0, step / max(warmup, 1) if warmup else 1.0) * 0.1 ** sum(step >= drop for drop in drops)

        scheduler = self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, factor)
        self._created_lr_scheduler = True
        return scheduler

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor]:
        """The batches of one optimizer step, and (boxes, expressions) in them over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:  # the end of a stream, which the other processes may not have reached
            return [], torch.zeros(2, dtype=torch.long, device=device)
        boxes = sum(int(has_box(batch["labels"]).sum()) for batch in batches)
        expressions = sum(len(batch["labels"]) for batch in batches)
        return batches, self.accelerator.reduce(torch.tensor([boxes, expressions], device=device), reduction="sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        others = (*OTHER_COLUMNS, *_TEACHER_COLUMNS)
        outputs = model(**{name: value for name, value in inputs.items() if name not in others})
        if "labels" not in inputs:
            return (None, outputs) if return_outputs else None
        loss = outputs["loss"]
        if num_items_in_batch is not None:
            total_boxes, total_expressions = num_items_in_batch.tolist()
            boxes = int(has_box(inputs["labels"]).sum())
            # Summed over accumulated batches and averaged over processes (DDP), this is the mean over all boxes.
            loss = loss * (boxes * self.accelerator.num_processes / max(total_boxes, 1))
            terms = {name: (term, boxes) for name, term in outputs["loss_dict"].items()}
            if self.teacher is not None:
                distilled, distillation_terms = self.distillation_loss(
                    outputs,
                    self._teach(self.teacher, inputs),
                    inputs["image_index"],
                    inputs["labels"],
                    total_boxes,
                    total_expressions,
                )
                loss = loss + distilled
                terms.update(distillation_terms)
            self._add_loss_terms(terms)
        return (loss, outputs) if return_outputs else loss

    def _teach(self, teacher: ClipTeacher, inputs: dict[str, torch.Tensor]) -> TeacherOutput:
        """The teacher's outputs for a batch: those that came with it, else computed on the student's own canvases."""
        if "teacher_image_embeds" in inputs:
            cached = {name: inputs[name] for name in _TEACHER_COLUMNS if name in inputs}
            return TeacherOutput(**{name.removeprefix("teacher_"): value for name, value in cached.items()})
        # The Trainer's own context does nothing about the dtype: accelerate wraps the student alone.
        with torch.no_grad(), self.accelerator.autocast():
            canvases = self.processing_class.image_processor.unnormalize(inputs["pixel_values"])
            return teacher(canvases, inputs["expressions"], output_patches=self.args.teacher_map_loss_coefficient > 0)

    def _add_loss_terms(self, terms: dict[str, tuple[torch.Tensor, int]]) -> None:
        for name, (term, count) in terms.items():
            weighted = torch.stack([term.detach().float() * count, term.new_tensor(count).float()])
            self._loss_terms[name] = self._loss_terms.get(name, 0) + weighted

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Training logs carry "loss", evaluation logs "eval_loss" with its own terms.
        if "loss" in logs:
            for name, weighted in self._loss_terms.items():
                total, count = self.accelerator.reduce(weighted, reduction="sum").tolist()
                if count:
                    logs[name] = total / count
            self._loss_terms = {}
        super().log(logs, start_time)

    # Averaged weights ------------------------------------------------------------------------------------------

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """While training with `args.ema_decay`, the model is its average in here."""
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
            load_adapter_weights(self.model, resume_from_checkpoint)  # the Trainer knows only those of a PeftModel
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._average is not None:
            self._average.checkpoint = resume_from_checkpoint

    def _load_best_model(self) -> None:
        if has_own_adapter(self.model):
            load_adapter_weights(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    # Evaluation ------------------------------------------------------------------------------------------------

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, None, None]:
        """Keeps the batch's results: processes hold different N, which the Trainer's own gathering cannot take."""
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
        # Batch norms that train have statistics of their own in each process. Those of the first are saved.
        broadcast(list(self.model.buffers()))
        with self._averaged_weights():
            output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        rows = EvaluatedRows.merge(gather_object(self._evaluated))
        self._evaluated = []

        metrics = dict(rows.losses)
        if rows.references is not None and self.compute_metrics is not None:
            known = np.isfinite(rows.references).all(-1)
            if known.any():
                evaluated = EvalPrediction(predictions=rows.predictions[known], label_ids=rows.references[known])
                metrics.update(self.compute_metrics(evaluated))
        prefixed = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(
            predictions=rows.predictions,
            label_ids=rows.references,
            metrics={**output.metrics, **prefixed},
            num_samples=len(rows.predictions),
        )

    def _compute_accuracy(self, evaluated: EvalPrediction) -> dict[str, float]:
        return self._metric.compute(predictions=evaluated.predictions, references=evaluated.label_ids)

    # Sharing ---------------------------------------------------------------------------------------------------

    def _describe_data(self, name: str) -> str:
        rows = "a stream" if isinstance(self.train_dataset, IterableDataset) else f"{len(self.train_dataset):,} rows"
        data = f"{rows} of {name or 'data of its own'}"
        if self.caption_dataset is None:
            return data
        return f"{data}, and on {len(self.caption_dataset):,} expressions or captions without boxes"

    def _describe_teacher(self, name: str | None) -> str | None:
        if self.teacher is None:
            return None
        weights = {
            "its map of patches and expressions": self.args.teacher_map_loss_coefficient,
            "its similarities between images and expressions": self.args.relation_loss_coefficient,
            "its embeddings": self.args.feature_loss_coefficient,
        }
        taught = ", ".join(f"{what} (weight {weight:g})" for what, weight in weights.items() if weight > 0)
        name = name or self.teacher.name
        return (
            f"Distilled, in training only, from {public(name) if name else 'a CLIP'} of "
            f"{self.teacher.embed_dim} dimensions at {self.teacher.image_size} pixels (fingerprint "
            f"{self.teacher.fingerprint[:16]}). It taught {taught}."
        )


def _check_captions(
    caption_dataset: Dataset,
    train_dataset: Dataset | IterableDataset | None,
    teacher: ClipTeacher | None,
    args: EpmVGTrainingArguments,
) -> None:
    if teacher is None:
        raise ValueError("caption_dataset needs a teacher: without one, expressions without boxes teach nothing")
    if not args.distils:
        raise ValueError("caption_dataset needs a term of the distillation: all their weights are 0")
    if isinstance(caption_dataset, IterableDataset) or isinstance(train_dataset, IterableDataset):
        raise ValueError("caption_dataset cannot be mixed in when it, or train_dataset, is streamed")


def _check_teacher(teacher: ClipTeacher, model: EpmVGForVisualGrounding, args: EpmVGTrainingArguments) -> None:
    width = model.config.teacher_projection_dim
    if args.distils_embeddings and width is None:
        raise ValueError(
            "the relation and feature losses need a model with teacher_projection_dim in its config; "
            f"this teacher's width is {teacher.embed_dim}"
        )
    if args.teacher_map_loss_coefficient > 0 and not teacher.has_patches:
        raise ValueError(
            "this teacher has no patch embeddings in the image-text space: set teacher_map_loss_coefficient to 0"
        )
    if args.feature_loss_coefficient > 0 and width != teacher.embed_dim:
        raise ValueError(
            f"the feature loss needs config.teacher_projection_dim ({width}) to be the teacher's width "
            f"({teacher.embed_dim})"
        )


def _by_image(dataset: Dataset | IterableDataset, accelerator: Accelerator) -> ImageGroups | IterableDataset:
    if not isinstance(dataset, IterableDataset):
        return ImageGroups(dataset)
    # Accelerate gives each process shards of its own if there are enough, else some of the rows of all shards.
    has_own = dataset.num_shards >= accelerator.num_processes and not accelerator.split_batches
    reader, readers = (accelerator.process_index, accelerator.num_processes) if has_own else (0, 1)
    return dataset.map(_number_row, with_indices=True, fn_kwargs={"reader": reader, "readers": readers})


def _number_row(row: dict[str, Any], index: int, reader: int, readers: int) -> dict[str, int]:
    """Whoever streams shards of its own, a process or its data loader's worker, counts from 0; none may collide."""
    worker = get_worker_info()
    if worker is not None:
        reader, readers = reader * worker.num_workers + worker.id, readers * worker.num_workers
    return {"row_index": index * readers + reader}
