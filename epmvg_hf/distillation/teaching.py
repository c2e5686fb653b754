"""The teacher in a training run: what it needs from a batch, its outputs, and the loss that compares the student."""

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator

from ..data.image_groups import is_transformed
from ..data.row_checks import read_boxes
from ..model.configuration_epmvg import EpmVGConfig
from ..model.image_processing_epmvg import EpmVGImageProcessor
from ..model.modeling_epmvg import EpmVGGroundingOutput
from .clip_teacher import ClipTeacher, TeacherOutput
from .distillation_loss import DistillationLoss, DistillationWeights
from .teacher_cache import TeacherCache


class Teaching:
    """
    Holds everything about the teacher that a training run needs, so that the trainer and the collator need not know
    it. Where training images are neither augmented nor streamed, the teacher's outputs are computed once and looked
    up for each batch; otherwise the batch carries its expressions and the teacher runs in every step. The teacher is
    not part of the student, so nothing that wraps, optimises or saves the student touches it.

    Args:
        teacher ([`ClipTeacher`]): the teacher, which is moved to the accelerator's device.
        weights ([`~distillation_loss.DistillationWeights`]): the weights of the loss terms that need the teacher.
        image_processor ([`EpmVGImageProcessor`]): the student's image processor, whose canvas the teacher sees.
        accelerator (`Accelerator`): gives the device, the precision and the other processes.
    """

    def __init__(
        self,
        teacher: ClipTeacher,
        weights: DistillationWeights,
        image_processor: EpmVGImageProcessor,
        accelerator: Accelerator,
    ):
        self.teacher = teacher.to(accelerator.device)
        self.weights = weights
        self.image_processor = image_processor
        self.accelerator = accelerator
        self.distillation_loss = DistillationLoss(weights, accelerator)
        self._cache: TeacherCache | None = None

    def fill_cache(
        self, train_datasets: Sequence[datasets.Dataset], cache_dir: str | None = None, disable_tqdm: bool = False
    ) -> None:
        """
        Computes the teacher's outputs for all images and expressions of these datasets, or finds them in the cache of
        an earlier run. The images are numbered through all datasets, in their order.

        Args:
            train_datasets (`Sequence[datasets.Dataset]`): rows with `image`, `image_id` and `expression`.
            cache_dir (`str`, *optional*): folder for the outputs, by default in the cache of `datasets`.
            disable_tqdm (`bool`, *optional*, defaults to `False`): whether to hide the progress bars.
        """
        with self.accelerator.autocast():
            caches = [
                TeacherCache.build(
                    self.teacher,
                    dataset,
                    self.image_processor,
                    cache_dir=cache_dir,
                    output_patches=self.weights.teacher_map > 0,
                    disable_tqdm=disable_tqdm,
                )
                for dataset in train_datasets
            ]
        self._cache = TeacherCache.concatenate(caches)

    @property
    def columns(self) -> Callable[..., dict[str, Any]]:
        """
        The function that gives a collator the teacher's columns of a batch. From the numbers of the B images and the
        N expressions it makes the cached outputs (see [`TeacherCache.lookup`]) or, without a cache, the column
        `expressions`, which the teacher reads with its own tokenizer. The function does not hold the teacher, so it
        can be sent to the workers of a data loader.
        """
        return keep_expressions if self._cache is None else self._cache.lookup

    def outputs(self, batch: dict[str, Any]) -> TeacherOutput:
        """The teacher's outputs for a batch: those from the cache, or computed on the student's canvases."""
        if "teacher_image_embeds" in batch:
            return TeacherOutput(
                image_embeds=batch["teacher_image_embeds"],
                text_embeds=batch["teacher_text_embeds"],
                patch_embeds=batch.get("teacher_patch_embeds"),
            )
        # Accelerate wraps the student alone, so the trainer's own context does not set the teacher's precision.
        with torch.no_grad(), self.accelerator.autocast():
            canvases = self.image_processor.unnormalize(batch["pixel_values"])
            return self.teacher(canvases, batch["expressions"], output_patches=self.weights.teacher_map > 0)

    def loss(
        self,
        outputs: EpmVGGroundingOutput,
        taught: TeacherOutput,
        batch: dict[str, Any],
        num_boxes: torch.Tensor,
        num_absent: torch.Tensor,
        num_expressions: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
        """
        Computes the terms of [`~distillation_loss.DistillationLoss`] for a batch.

        Args:
            outputs ([`EpmVGGroundingOutput`]): the student's outputs.
            taught ([`TeacherOutput`]): those of the teacher for the same batch.
            batch (`dict`): the collator's batch, of which `image_index` and `labels` are read.
            num_boxes, num_absent, num_expressions (`torch.LongTensor` of shape `()`): the counts of the whole
                optimiser step, on all processes.

        Returns:
            `tuple`: the weighted sum of the terms, and each term with the number of expressions that it is a mean of.
        """
        return self.distillation_loss(
            outputs, taught, batch["image_index"], batch["labels"], num_boxes, num_absent, num_expressions
        )

    def describe(self, name: str) -> str:
        """Sentences for the model card on the teacher and what it taught. `name` is the teacher's name in the card."""
        kinds = {
            "its map of patches and expressions": self.weights.teacher_map,
            "its similarities between images and expressions": self.weights.relation,
            "its embeddings": self.weights.feature,
        }
        taught = ", ".join(f"{what} (weight {weight:g})" for what, weight in kinds.items() if weight > 0)
        return (
            f"It was distilled, in training only, from {name} of {self.teacher.embed_dim} dimensions at "
            f"{self.teacher.image_size} pixels (fingerprint {self.teacher.fingerprint[:16]}). It taught {taught}."
        )


def keep_expressions(image_indices: Sequence[int], expressions: list[str]) -> dict[str, Any]:
    """The columns of a batch for a teacher that runs in every step."""
    return {"expressions": expressions}


def check_teacher(teacher: ClipTeacher, config: EpmVGConfig, weights: DistillationWeights) -> None:
    """
    Raises a `ValueError` if the student or the teacher lacks what a term of the loss compares.

    Args:
        teacher ([`ClipTeacher`]): the teacher.
        config ([`EpmVGConfig`]): the student's configuration.
        weights ([`~distillation_loss.DistillationWeights`]): the weights of the loss terms.
    """
    width = config.teacher_projection_dim
    if weights.compares_embeddings and width is None:
        raise ValueError(
            "the relation and feature losses need a model with teacher_projection_dim in its config; "
            f"this teacher's width is {teacher.embed_dim}"
        )
    if weights.teacher_map > 0 and not teacher.has_patches:
        raise ValueError(
            "this teacher has no patch embeddings in the image-text space: set teacher_map_loss_coefficient to 0"
        )
    if weights.feature > 0 and width != teacher.embed_dim:
        raise ValueError(
            f"the feature loss needs config.teacher_projection_dim ({width}) to be the teacher's width "
            f"({teacher.embed_dim})"
        )


def check_captions(
    caption_dataset: datasets.Dataset,
    train_dataset: datasets.Dataset | datasets.IterableDataset | None,
    teacher: ClipTeacher | None,
    weights: DistillationWeights,
) -> None:
    """
    Raises a `ValueError` if further rows cannot be mixed into training, or would teach nothing there.

    Args:
        caption_dataset (`datasets.Dataset`): these rows, of which some or all have no box.
        train_dataset (`datasets.Dataset`): the rows with boxes.
        teacher ([`ClipTeacher`]): the teacher, without which rows without a box cannot train anything.
        weights ([`~distillation_loss.DistillationWeights`]): the weights of the loss terms.
    """
    if isinstance(caption_dataset, datasets.IterableDataset) or isinstance(train_dataset, datasets.IterableDataset):
        raise ValueError("caption_dataset cannot be mixed in when it, or train_dataset, is streamed")
    if _has_boxes(caption_dataset):
        return
    if teacher is None:
        raise ValueError("caption_dataset needs a teacher: without one, expressions without boxes teach nothing")
    if not weights.teaches:
        raise ValueError("caption_dataset needs a term of the distillation: all their weights are 0")


def _has_boxes(dataset: datasets.Dataset) -> bool:
    """Whether a row has a box; of a dataset with a transform, whether it has such a column."""
    if is_transformed(dataset) or "box" not in dataset.column_names:
        return "box" in dataset.column_names
    boxes = read_boxes(dataset.select_columns(["box"]).with_format("arrow")[:].column("box"))
    return not np.isnan(boxes).all()
