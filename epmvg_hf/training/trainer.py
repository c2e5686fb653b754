"""`transformers.Trainer` for B images and N expressions: its data, its loss, its optimiser and its evaluation."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils import broadcast, gather_object
from datasets import Dataset, IterableDataset
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import (
    EvalLoopOutput,
    EvalPrediction,
    TrainOutput,
    denumpify_detensorize,
    unwrap_peft_model,
)

from ..data.captioned_groups import CaptionedGroups
from ..data.image_groups import ImageGroups, is_transformed
from ..data.pictures import number_pictures
from ..data.streamed_rows import number_rows
from ..distillation.clip_teacher import ClipTeacher
from ..distillation.teaching import Teaching, check_captions, check_teacher
from ..evaluation.accuracy import GroundingAccuracy, find_boxes, paired_iou
from ..evaluation.evaluated_rows import EvaluatedRows
from ..evaluation.score_quality import evaluate_scores, measure_calibration
from ..model.losses import has_box, is_absent
from ..model.modeling_epmvg import MODEL_INPUTS, EpmVGForVisualGrounding
from ..model.outputs_epmvg import EpmVGGroundingOutput
from ..model.processing_epmvg import EpmVGProcessor
from .augmentation import GroundingAugmentation
from .callbacks import DataEpochCallback, LastStepLog
from .data_collator import EpmVGDataCollator
from .even_shares import EvenShares
from .finite_steps import FiniteSteps
from .frozen_towers import TowerImageGroups
from .loss_terms import LossTerms
from .model_card import strip_private_paths
from .prediction_pictures import PredictionPictures
from .row_draws import RowDraws
from .score_calibration import calibrate_across, calibrate_scores
from .student_trainer import StudentTrainer
from .trainer_checks import check_dataset, check_student, check_trainer
from .training_args import EpmVGTrainingArguments

logger = logging.getLogger(__name__)

# How many pixels the longer side of an augmented JPEG keeps when it is decoded, as a share of the canvas. A crop may
# take 0.4 of them away, see GroundingAugmentation.
_DECODED_SHARE = 1.5


class EpmVGTrainer(StudentTrainer):
    """
    Trains and evaluates [`EpmVGForVisualGrounding`] on datasets with one row per expression, as
    [`load_grounding_dataset`] gives them. Map-style datasets are batched by image. Streamed ones are batched by row,
    and rows of one image that meet in a batch share its visual pass.

    Metrics are `acc@0.5`, `acc@0.7` and `mean_iou` of boxes in pixels of the original images. Every expression with a
    box counts once, on any number of processes. `predict` gives `predictions` and `label_ids`, xyxy pixel boxes
    `(N, 4)` in the order of the dataset's rows; several processes or workers that read a stream interleave theirs.
    Where several processes fill up the last batches with repeated images, `eval_loss` weights a batch by its new rows.

    If the model has a score head, `scores` `(N,)` of the trainer are those of the boxes of its last evaluation or
    prediction. Metrics are then also `calibration_error` and, if some rows are known to be absent, `presence_auroc`.

    With a teacher, training adds the terms of [`~distillation_loss.DistillationLoss`]. The teacher is not part of the
    model: it is not wrapped, not optimised and not saved. Its outputs are computed once where the data is not
    augmented (`args.cache_teacher`). Rows whose `box` is `None` take part in these terms alone.

    A run that is resumed is bit-equal to one that was not interrupted, also within an epoch: what is drawn for an
    image, its augmentation and the choice of its expressions, depends on seed, epoch and row alone.

    Args:
        model ([`EpmVGForVisualGrounding`] or `peft.PeftModel`, *optional*):
            The student, or the student with an adapter. Not needed with `model_init`, which builds one for each run.
        args ([`EpmVGTrainingArguments`]): the arguments.
        train_dataset, eval_dataset (`datasets.Dataset` or `datasets.IterableDataset`, *optional*):
            Rows with `image`, `image_id`, `expression` and `box` (xyxy pixels of that image).
        processing_class ([`EpmVGProcessor`]): makes tensors and undoes the letterbox; saved with checkpoints.
        augmentation ([`GroundingAugmentation`], *optional*):
            Changes training images when `args.augment` is set; one with the settings `args.augmentation_kwargs` if not
            given. JPEGs of at
            least three times the canvas are then decoded at a lower resolution, see [`ImageGroups`].
        teacher ([`ClipTeacher`], *optional*):
            Teaches its image-text consistency, with the weights and temperatures in `args`. The relation and feature
            terms need a model with `config.teacher_projection_dim`, the feature term one of the teacher's `embed_dim`.
        caption_dataset (`datasets.Dataset`, *optional*):
            Rows with `image`, `image_id` and `expression` (a caption), mixed into training at `args.caption_ratio`. A
            column `box` is learned too, such as boxes that [`add_teacher_boxes`] or [`confirm_boxes`] gave.
        kwargs: further arguments of `transformers.Trainer`; examples/TRAINER.md says which of them work.

    Raises:
        ValueError: model, arguments, processor or datasets are not of the right kind, a caption dataset or a term of
            the distillation lacks what it needs, `frozen_parameters` match no parameter, or another argument does not
            fit.

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
        model: EpmVGForVisualGrounding | None = None,
        args: EpmVGTrainingArguments | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset] | None = None,
        processing_class: EpmVGProcessor | None = None,
        augmentation: GroundingAugmentation | None = None,
        teacher: ClipTeacher | None = None,
        caption_dataset: Dataset | None = None,
        **kwargs: Any,
    ):
        data = {"train_dataset": train_dataset, "eval_dataset": eval_dataset, "caption_dataset": caption_dataset}
        check_trainer(model, args, processing_class, data, kwargs)
        assert args is not None  # it has just been checked
        self.caption_dataset = caption_dataset
        self._given_teacher, self._given_augmentation = teacher, augmentation
        self._metric = GroundingAccuracy(keep_in_memory=True)
        self._evaluated: list[dict[str, Any]] = []
        self.scores: np.ndarray | None = None
        kwargs.setdefault("compute_metrics", self._compute_accuracy)
        self._draws = RowDraws(args.seed)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        has_scaler = self.accelerator.scaler is not None
        self._finite_steps = FiniteSteps(skips=args.nonfinite_steps == "skip", has_scaler=has_scaler)
        self.add_callback(self._finite_steps)
        self._data_epoch = DataEpochCallback(self._draws)
        self.add_callback(self._data_epoch)
        self.add_callback(LastStepLog)
        self._pictures = PredictionPictures(self.callback_handler)
        self.add_callback(self._pictures)
        self._prepare_run()

    def _prepare_run(self) -> None:
        args, processor, weights = self.args, self.processing_class, self.args.distillation_weights
        # A search of hyperparameters changes the arguments from trial to trial.
        self._draws.seed, self._finite_steps.skips = args.seed, args.nonfinite_steps == "skip"
        self._augmentation = self._given_augmentation or GroundingAugmentation(**(args.augmentation_kwargs or {}))
        check_student(self.model)
        student = unwrap_peft_model(self.model)
        if self.caption_dataset is not None:
            check_captions(self.caption_dataset, self.train_dataset, self._given_teacher, weights)
        if self._given_teacher is not None:
            check_teacher(self._given_teacher, student.config, weights)
        elif args.distil_only:
            raise ValueError("distil_only needs a teacher")
        self.teacher = self._given_teacher if args.distils else None
        self.teaching: Teaching | None = None
        if self.teacher is not None:
            self.teaching = Teaching(self.teacher, weights, processor.image_processor, self.accelerator)
        self._score_weight = student.config.score_loss_coefficient
        self._count_anew()
        self._prepare_student(student, with_embeddings=self.teaching is not None and weights.compares_embeddings)
        has_workers = args.dataloader_num_workers > 0
        self.data_collator = EpmVGDataCollator(processor, as_bytes=has_workers)
        self.train_collator = EpmVGDataCollator(
            processor,
            self._augmentation if args.augment else None,
            args.max_expressions_per_image,
            tower_outputs=None if self._frozen_towers is None else self._frozen_towers.outputs,
            as_bytes=has_workers,
            draws=self._draws,
        )

    # Data ------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        datasets = [dataset for dataset in (self.train_dataset, self.caption_dataset) if dataset is not None]
        is_fixed = not self.args.augment and not any(
            isinstance(dataset, IterableDataset) or is_transformed(dataset) for dataset in datasets
        )
        if self.teaching is not None:
            if is_fixed and self.args.cache_teacher:
                self.teaching.fill_cache(datasets, self.args.teacher_cache_dir, disable_tqdm=self._hides_progress)
            elif self.args.cache_teacher:
                logger.info(
                    "the teacher runs in every step: only data that is neither augmented, transformed nor streamed is "
                    "cached"
                )
            self.train_collator.teacher_columns = self.teaching.columns
        if self._frozen_towers is not None:
            self._frozen_towers.datasets = datasets
            self._frozen_towers.obstacles = self._obstacles_to_tower_outputs(is_fixed)
        evaluation_collator, self.data_collator = self.data_collator, self.train_collator
        try:
            loader = super().get_train_dataloader()
        finally:
            self.data_collator = evaluation_collator
        if isinstance(self.train_dataset, Dataset) and len(loader) == 0:
            images = len(ImageGroups(self.train_dataset))
            raise ValueError(
                f"dataloader_drop_last leaves no batch: train_dataset has {images} images, and a batch takes "
                f"{self._train_batch_size}"
            )
        return loader

    def _obstacles_to_tower_outputs(self, is_fixed: bool) -> dict[str, str]:
        """Why the outputs of each tower cannot be computed once, if it is not for parameters that are trained."""
        vision, text = "vision backbone", "text tower"
        if not is_fixed:
            return dict.fromkeys((vision, text), "its input is augmented (augment), transformed or streamed")
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
        by_image: Any
        if isinstance(dataset, IterableDataset):
            has_boxes = dataset.column_names is None or "box" in dataset.column_names
            # Accelerate gives each process shards of its own if there are enough, else some rows of all shards.
            has_shards = dataset.num_shards >= self.accelerator.num_processes and not self.accelerator.split_batches
            reader = (self.accelerator.process_index, self.accelerator.num_processes) if has_shards else (0, 1)
            by_image = number_rows(dataset, *reader)
        else:
            by_image = self._group_images(dataset, is_training)
            has_boxes = by_image.has_boxes
        if is_training and not has_boxes:
            raise ValueError("train_dataset has no column box; an expression without a box has the value None there")
        if is_training and self.caption_dataset is not None:
            captioned = self._group_images(self.caption_dataset, is_training)
            by_image = CaptionedGroups(by_image, captioned, self.args.caption_ratio, self.args.seed)
            self._data_epoch.captioned = by_image
        loader = super()._get_dataloader(by_image, *args, is_training=is_training, **kwargs)
        shard = loader.batch_sampler
        processes = self.accelerator.num_processes
        shares_batches = isinstance(shard, BatchSamplerShard) and not shard.split_batches and not shard.drop_last
        # An evaluation of fewer images than there are processes repeats some, whose results are then left out.
        if shares_batches and (is_training or len(by_image) >= processes):
            shard.batch_sampler = EvenShares(shard.batch_sampler, processes)
            shard.batch_size = None  # the sizes differ
        return loader

    def _group_images(self, dataset: Dataset, is_training: bool) -> ImageGroups:
        if is_training and self._frozen_towers is not None:
            return TowerImageGroups(dataset, self._frozen_towers.outputs)
        if is_training and self.args.augment:
            canvas = self.processing_class.image_processor.size["height"]
            return ImageGroups(dataset, decoded_side=round(_DECODED_SHARE * canvas))
        return ImageGroups(dataset)

    def _check_rows(self) -> None:
        """Checks the data before the first step, as far as that is quick: a bad row could end the third epoch."""
        evaluated = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval_dataset": self.eval_dataset}
        named = {"train_dataset": self.train_dataset, "caption_dataset": self.caption_dataset}
        for name, dataset in (named if self.args.eval_strategy == "no" else {**named, **evaluated}).items():
            if isinstance(dataset, Dataset):
                ImageGroups(dataset).check_rows(name, needs_boxes=name == "train_dataset" and self.teaching is None)
                self._check_tokens(name, dataset)
        if self.args.augment and isinstance(self.train_dataset, Dataset) and not is_transformed(self.train_dataset):
            some = self.train_dataset.select(range(0, len(self.train_dataset), len(self.train_dataset) // 1000 + 1))
            if (problem := self._augmentation.words.describe_unknown(some["expression"][:])) is not None:
                logger.warning(problem)

    def _check_tokens(self, name: str, dataset: Dataset) -> None:
        """Raises a `ValueError` for an expression of which the tokenizer leaves nothing."""
        if is_transformed(dataset):
            return
        for row, expression in enumerate(dataset.with_format(None)["expression"][:]):
            if re.search(r"\w", expression) is None:  # no tokenizer removes all of a word
                try:
                    self.processing_class(text=expression)
                except ValueError as error:
                    raise ValueError(f"{name}, row {row}: {error}") from error

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return self.processing_class.image_processor.from_bytes(super()._prepare_inputs(inputs))

    # Loss ------------------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """
        Trains, as in `Trainer`: `train(resume_from_checkpoint=True)` goes on from the last checkpoint.

        Returns:
            `TrainOutput`: `global_step`, `training_loss` and `metrics`.

        Raises:
            ValueError: a row cannot be used, or no expression has a box and no teacher teaches anything else.

        Example:

        ```python
        >>> result = trainer.train()
        >>> result.global_step, "train_loss" in result.metrics
        (1, True)
        ```
        """
        self._check_rows()
        self._count_anew()
        output = super().train(*args, **kwargs)
        # Only a stream comes so far, and a training that had ended before it was resumed sees no boxes either.
        if self.teaching is None and self._boxes_seen is not None and self._boxes_seen == 0:
            raise ValueError("nothing was trained: no row of the stream had a box, and there is no teacher")
        return output

    def _count_anew(self) -> None:
        self._loss_terms = LossTerms(self.accelerator)
        self._boxes_seen: torch.Tensor | None = None  # until the first step

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor]:
        """
        The batches of one optimiser step, and the numbers of boxes, of absent expressions and of all expressions in
        them over all processes.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:  # the end of a stream, which the other processes may not have reached
            return [], torch.zeros(3, dtype=torch.long, device=device)
        # The counts stay on the device, here and in the loss, because reading them would make a GPU wait.
        labels = torch.cat([batch["labels"] for batch in batches])
        boxes = has_box(labels).sum()
        expressions = torch.full_like(boxes, len(labels))
        counts = self.accelerator.reduce(torch.stack([boxes, is_absent(labels).sum(), expressions]), reduction="sum")
        self._boxes_seen = counts[0] if self._boxes_seen is None else self._boxes_seen + counts[0]
        return batches, counts

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        known = {name: inputs[name] for name in MODEL_INPUTS if name in inputs}
        if self.args.distil_only and num_items_in_batch is not None:
            outputs = model(**known, skip_fusion=True)
            loss = self._distillation_loss(outputs, inputs, num_items_in_batch)
            return (loss, outputs) if return_outputs else loss
        outputs = model(**known)
        if "labels" not in inputs:
            return (None, outputs) if return_outputs else None
        loss = outputs["loss"]
        if num_items_in_batch is not None:
            total_boxes, total_absent, _ = num_items_in_batch.unbind()
            boxes = has_box(inputs["labels"]).sum()
            terms = {name: (term, boxes) for name, term in outputs["loss_dict"].items()}
            score = outputs["loss_dict"].get("loss_score")
            processes = self.accelerator.num_processes
            weighted_score = 0 if score is None else self._score_weight * score
            # Summed over accumulated batches and averaged over processes (DDP), this is the mean over all boxes.
            loss = (loss - weighted_score) * (boxes * processes / total_boxes.clamp(min=1))
            if score is not None:
                scored = boxes + is_absent(inputs["labels"]).sum()
                loss = loss + weighted_score * (scored * processes / (total_boxes + total_absent).clamp(min=1))
                terms["loss_score"] = (score, scored)
            self._add_terms(terms, inputs)
            if self.teaching is not None:
                loss = loss + self._distillation_loss(outputs, inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _distillation_loss(
        self, outputs: EpmVGGroundingOutput, inputs: dict[str, torch.Tensor], num_items_in_batch: torch.Tensor
    ) -> torch.Tensor:
        assert self.teaching is not None
        taught = self.teaching.outputs(inputs)
        loss, terms = self.teaching.loss(outputs, taught, inputs, *num_items_in_batch.unbind())
        # What the student sees is looked at once, with the loss of its boxes where there is one.
        places = ("row_index", "image_index")
        seen = {n: value for n, value in inputs.items() if self.args.distil_only or n in places}
        self._add_terms(terms, {**seen, **{f"teacher_{name}": value for name, value in vars(taught).items()}})
        return loss

    def _add_terms(self, terms: dict[str, tuple[torch.Tensor, torch.Tensor]], inputs: dict[str, Any]) -> None:
        """Adds terms of the loss, each with its number of expressions, to the log and to what must be finite."""
        self._loss_terms.add(terms)
        self._finite_steps.watch_terms({name: term for name, (term, _) in terms.items()}, inputs)

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | float | None = None) -> torch.Tensor | float:
        norm = super()._get_grad_norm(model, grad_norm)
        self._finite_steps.watch_gradient(norm)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Logs of training carry "loss". Those of an evaluation carry "eval_loss", with terms of their own.
        if "loss" in logs:
            logs.update(self._loss_terms.take())
        super().log(logs, start_time)

    # Evaluation ------------------------------------------------------------------------------------------------

    def get_eval_dataloader(self, eval_dataset: str | Dataset | IterableDataset | None = None) -> DataLoader:
        if eval_dataset is None or isinstance(eval_dataset, str):
            with self._without_dropping():
                return super().get_eval_dataloader(eval_dataset)
        check_dataset("eval_dataset", eval_dataset)
        # transformers keeps the loader whose workers persist, and would take it for another dataset too.
        return self.get_test_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset | IterableDataset) -> DataLoader:
        check_dataset("test_dataset", test_dataset)
        with self._without_dropping():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _without_dropping(self) -> Iterator[None]:
        """A context in which data loaders keep their last batch: `dataloader_drop_last` is for training."""
        drops, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drops

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
        if "scores" in outputs:
            rows["scores"] = outputs["scores"].float().cpu().numpy()
        if loss is not None:
            absent = is_absent(inputs["labels"])
            references = inputs["boxes"].float().masked_fill(absent[:, None], torch.nan)
            rows["references"] = references.cpu().numpy()
            rows["has_box"] = has_box(inputs["labels"]).cpu().numpy()
            rows["is_absent"] = absent.cpu().numpy()
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
        self._pictures.hold(dataloader.dataset, rows, metric_key_prefix)

        metrics: dict[str, Any] = dict(rows.losses)
        loss_only = self.args.prediction_loss_only
        if rows.references is not None and rows.has_box.any() and self.compute_metrics is not None and not loss_only:
            predictions, references = rows.predictions[rows.has_box], rows.references[rows.has_box]
            computed = self.compute_metrics(EvalPrediction(predictions=predictions, label_ids=references))
            if not isinstance(computed, dict):
                raise ValueError(f"compute_metrics must return a dict of numbers, got a {type(computed).__name__}")
            metrics.update(denumpify_detensorize(computed))
            if rows.scores is not None:
                metrics.update(_rate_scores(rows.scores, rows))
        self.scores = None if loss_only else rows.scores
        prefix = f"{metric_key_prefix}_"
        prefixed = {prefix + name.removeprefix(prefix): value for name, value in metrics.items()}
        return EvalLoopOutput(
            predictions=None if loss_only else rows.predictions,
            label_ids=None if loss_only else rows.references,
            metrics={**output.metrics, **prefixed},
            num_samples=len(rows.predictions),
        )

    def _compute_accuracy(self, evaluated: EvalPrediction) -> dict[str, float]:
        return self._metric.compute(predictions=evaluated.predictions, references=evaluated.label_ids)

    def calibrate_scores(self, dataset: Dataset | None = None) -> dict[str, float]:
        """
        Makes the scores of the model, which has a `config.score_head`, the probability that a box is right, see
        [`~score_calibration.calibrate_scores`]. It is done once, after training.

        Args:
            dataset (`datasets.Dataset`, *optional*, defaults to `eval_dataset`): rows with boxes that were not trained
                on. Rows that are absent are left out.

        Returns:
            `dict[str, float]`: `scale` and `shift`, which the logits of the scores got; `calibration_error` before
            them; and `calibration_error_of_other_half`, that of each half of the images after a calibration on the
            other half, which is what to expect on new images.

        Raises:
            ValueError: there is no dataset or no score head, or the scores cannot be calibrated on these rows.

        Example:

        ```python
        >>> try:
        ...     trainer.calibrate_scores(dataset)
        ... except ValueError as error:
        ...     print(error)
        the model has no score head (config.score_head), so there are no scores to calibrate
        ```
        """
        dataset = self.eval_dataset if dataset is None else dataset
        if not isinstance(dataset, Dataset):
            raise ValueError(f"scores are calibrated on a dataset, got {type(dataset).__name__}")
        model = unwrap_peft_model(self.accelerator.unwrap_model(self.model))
        if not model.config.score_head:
            raise ValueError("the model has no score head (config.score_head), so there are no scores to calibrate")
        output = self.predict(dataset)
        assert self.scores is not None
        boxes, with_box = find_boxes(dataset["box"][:], "the dataset")
        is_right = paired_iou(output.predictions[with_box], boxes[with_box]) >= 0.5
        scores = self.scores[with_box]
        is_first = number_pictures(dataset)[with_box] % 2 == 0
        other_half = measure_calibration(calibrate_across(scores, is_right, is_first), is_right).error
        scale, shift = calibrate_scores(model, scores, is_right)
        return {
            "scale": scale,
            "shift": shift,
            "calibration_error": measure_calibration(scores, is_right).error,
            "calibration_error_of_other_half": other_half,
        }

    # Model card ------------------------------------------------------------------------------------------------

    def _describe_data(self, name: str) -> str:
        rows = "a stream" if isinstance(self.train_dataset, IterableDataset) else f"{len(self.train_dataset):,} rows"
        data = f"{rows} of {name or 'data of its own'}"
        if self.caption_dataset is None:
            return data
        further = "with boxes that a model drew" if "box" in self.caption_dataset.column_names else "without boxes"
        return f"{data}, and on {len(self.caption_dataset):,} expressions or captions {further}"

    def _describe_teacher(self, name: str | None) -> str | None:
        if self.teaching is None:
            return None
        name = name or self.teaching.teacher.name
        return self.teaching.describe(strip_private_paths(name) if name else "a CLIP")


def _rate_scores(scores: np.ndarray, rows: EvaluatedRows) -> dict[str, float]:
    """How much the scores of evaluated rows are worth, as metrics."""
    assert rows.references is not None
    is_absent = rows.is_absent if rows.is_absent.any() else None
    rated = evaluate_scores(scores, rows.predictions, rows.references, is_absent)
    return {name: rated[name] for name in ("calibration_error", "presence_auroc") if name in rated}
