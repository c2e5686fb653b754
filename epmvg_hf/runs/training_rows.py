"""The rows that a run learns from: those with a box, and those without one that a teacher can use."""

import logging

from datasets import Dataset

from ..distillation.clip_teacher import ClipTeacher
from ..distillation.teacher_boxes import confirm_boxes
from ..model.modeling_epmvg import EpmVGForVisualGrounding
from ..model.processing_epmvg import EpmVGProcessor
from ..training.trainer import EpmVGTrainer
from ..training.training_args import EpmVGTrainingArguments

logger = logging.getLogger(__name__)


def split_labelled(
    dataset: Dataset, num_images: int | None, teacher_boxes: bool = False
) -> tuple[Dataset, Dataset | None]:
    """The rows of the first `num_images` images, and the rows of all others without the column `box`."""
    if num_images is None:
        return dataset, None
    images = dict.fromkeys(dataset["image_id"])
    least = 0 if teacher_boxes else 1
    if not least <= num_images < len(images):
        raise ValueError(
            f"num_labelled_images is {num_images}, expected {least} to {len(images) - 1} of the {len(images)} images"
        )
    labelled = set(list(images)[:num_images])
    chosen = [image_id in labelled for image_id in dataset["image_id"]]
    absent = dataset["absent"][:] if "absent" in dataset.column_names else [False] * len(dataset)
    captions = [row for row, has_box in enumerate(chosen) if not has_box and not absent[row]]
    captioned = dataset.select(captions).remove_columns("box")
    return dataset.select([row for row, has_box in enumerate(chosen) if has_box]), captioned


def confirmed_rows(folder: str, dataset: Dataset, teacher: ClipTeacher, arguments: EpmVGTrainingArguments) -> Dataset:
    """Rows without boxes for which a saved model and the teacher find nearly the same one, with the mean of both."""
    model = EpmVGForVisualGrounding.from_pretrained(folder)
    processor = EpmVGProcessor.from_pretrained(folder)
    predictor = EpmVGTrainer(model=model, args=arguments, processing_class=processor)
    confirmed = confirm_boxes(dataset, predictor.predict(dataset).predictions, teacher)
    if len(confirmed) == 0:
        raise ValueError(f"the teacher confirms no box of {folder} for the {len(dataset)} expressions without one")
    logger.info("of %d expressions without a box, the teacher confirms %d boxes", len(dataset), len(confirmed))
    return confirmed
