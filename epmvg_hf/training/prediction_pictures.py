"""Pictures of a few predictions of each evaluation, for the reporters that show pictures."""

import logging
import textwrap
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback, rewrite_logs
from transformers.trainer_callback import CallbackHandler

from ..data.image_groups import ImageGroups
from ..evaluation.drawing import draw_boxes
from ..evaluation.evaluated_rows import EvaluatedRows
from ..model.rgb_images import as_rgb
from .training_args import EpmVGTrainingArguments

logger = logging.getLogger(__name__)

# The longer side of an image in a picture, in pixels. Words are then legible on small images too, and large photos
# take little space in a log.
IMAGE_SIDE = 512
TRUE_COLOUR, PREDICTED_COLOUR = "#009e73", "#e69f00"
CAPTION_SIZE = 18  # of letters, in pixels
CAPTION_LINES = 4

_SHOW_PICTURES = (TensorBoardCallback, WandbCallback, TrackioCallback)


@dataclass
class PredictionPicture:
    """
    A row of a dataset with its predicted box.

    Args:
        row (`int`): the number of the row.
        expression (`str`): its expression.
        image (`PIL.Image.Image`):
            Its image, scaled to `IMAGE_SIDE` pixels, with the true box, if there is one, in `TRUE_COLOUR`, the
            predicted one in `PREDICTED_COLOUR` with its score, if it has one, and below the image the expression.
    """

    row: int
    expression: str
    image: Image.Image


class PredictionPictures(TrainerCallback):
    """
    Gives TensorBoard, Weights & Biases and Trackio pictures of `args.report_pictures` rows at each evaluation, from
    the boxes that the evaluation has predicted. The rows lie at even distances, so that they are the same each time.
    Only the first process draws. What `predict` predicts is not drawn.

    There are no pictures of a stream and of rows that a transform makes, because their images cannot be read a second
    time as they were, and none with `prediction_loss_only`.

    Args:
        handler (`CallbackHandler`): has the reporters among its callbacks.
    """

    def __init__(self, handler: CallbackHandler):
        self.handler = handler
        # The last one is the present one: other callbacks may evaluate or predict more data while an evaluation ends.
        self._evaluated: list[tuple[Any, EvaluatedRows, str]] = []

    def hold(self, dataset: Any, rows: EvaluatedRows, prefix: str) -> None:
        """
        Keeps the results of an evaluation or prediction until it ends, which are those of all rows of a dataset. Its
        metrics have this prefix.
        """
        self._evaluated.append((dataset, rows, prefix))

    def on_evaluate(
        self, args: EpmVGTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        dataset, rows, prefix = self._evaluated.pop()
        reporters = [callback for callback in self.handler.callbacks if isinstance(callback, _SHOW_PICTURES)]
        if not reporters or not args.report_pictures or args.prediction_loss_only or not state.is_world_process_zero:
            return
        if not isinstance(dataset, ImageGroups) or dataset.transformed is not None:
            logger.info("there are no pictures of predictions on data that is streamed or transformed")
            return
        pictures = draw_predictions(dataset, rows, args.report_pictures)
        (tag,) = rewrite_logs({f"{prefix}_predictions": None})  # beside the metrics
        for reporter in reporters:
            _report(reporter, tag, pictures, state.global_step)

    def on_predict(
        self, args: EpmVGTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._evaluated.pop()


def draw_predictions(groups: ImageGroups, rows: EvaluatedRows, count: int) -> list[PredictionPicture]:
    """
    Draws rows at even distances, from the first to the last, of those with a box or known to be absent, or of all rows
    if there are none.

    Args:
        groups ([`ImageGroups`]): the N rows of a dataset, without a transform.
        rows ([`EvaluatedRows`]): the results for all of them.
        count (`int`): the number of rows, if there are so many.
    """
    known = np.flatnonzero(rows.has_box | rows.is_absent)
    among = known if len(known) else np.arange(len(rows.predictions))
    chosen = among[np.linspace(0, len(among) - 1, min(count, len(among))).astype(int)].tolist()
    place_of = {row: (image, place) for image, of in enumerate(groups.groups) for place, row in enumerate(of)}
    pictures = []
    for row in chosen:
        image, place = place_of[row]
        group = groups.group(image).select([place])
        assert group.image is not None  # a box was predicted on it
        (expression,) = group.expressions
        label = "predicted" if rows.scores is None else f"{rows.scores[row]:.2f}"
        true_box = rows.references[row] if rows.references is not None and rows.has_box[row] else None
        drawn = _draw(group.image, rows.predictions[row], label, true_box)
        caption = f"{expression} (absent)" if rows.is_absent[row] else expression
        pictures.append(PredictionPicture(row, expression, _add_caption(drawn, caption)))
    return pictures


def _draw(image: Image.Image, predicted: np.ndarray, label: str, true_box: np.ndarray | None) -> Image.Image:
    """Draws boxes `(4,)`, xyxy pixels of the image, into a scaled copy."""
    scale = IMAGE_SIDE / max(image.size)
    picture = as_rgb(image).resize([max(1, round(side * scale)) for side in image.size])
    scales = np.tile(np.divide(picture.size, image.size), 2)
    # The last box is drawn over the others.
    boxes, labels, colours = [predicted * scales], [label], [PREDICTED_COLOUR]
    if true_box is not None:
        boxes, labels, colours = [true_box * scales, *boxes], ["true", *labels], [TRUE_COLOUR, *colours]
    return draw_boxes(picture, boxes, labels, colours)


def _add_caption(picture: Image.Image, caption: str) -> Image.Image:
    """Puts words below a picture, where they hide nothing of it. Those that are too many are left out."""
    font = ImageFont.load_default(CAPTION_SIZE)
    letters = max(1, int(picture.width / font.getlength("n")))
    text = "\n".join(textwrap.wrap(caption, letters, max_lines=CAPTION_LINES, placeholder="…"))
    margin = CAPTION_SIZE // 3
    _, _, _, height = ImageDraw.Draw(picture).multiline_textbbox((0, 0), text, font=font)
    captioned = Image.new("RGB", (picture.width, picture.height + int(height) + 2 * margin), "white")
    captioned.paste(picture)
    ImageDraw.Draw(captioned).multiline_text((margin, picture.height + margin), text, fill="black", font=font)
    return captioned


def _report(reporter: TrainerCallback, tag: str, pictures: list[PredictionPicture], step: int) -> None:
    """Gives pictures to a reporter, which has logged the metrics of the evaluation, and so begun its log, before."""
    # A name for each row: only then a reporter lines its pictures up over the steps, and they may differ in size.
    named = {f"{tag}/row_{picture.row}": picture for picture in pictures}
    if isinstance(reporter, TensorBoardCallback):
        for name, picture in named.items():
            reporter.tb_writer.add_image(name, np.asarray(picture.image), step, dataformats="HWC")
        reporter.tb_writer.flush()
    elif isinstance(reporter, WandbCallback):
        import wandb

        images = {name: wandb.Image(picture.image, caption=picture.expression) for name, picture in named.items()}
        wandb.log({**images, "train/global_step": step})
    else:
        import trackio

        images = {name: trackio.Image(picture.image, caption=picture.expression) for name, picture in named.items()}
        trackio.log({**images, "train/global_step": step})
