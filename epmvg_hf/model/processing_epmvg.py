# Copyright 2026 The EpmVG HF authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Processor class for EpmVG: images, expressions and boxes -> model inputs; predicted boxes -> pixels."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import ProcessorMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import ModelOutput, is_torchvision_available, logging

from .card_mixin import ModelCardMixin
from .configuration_epmvg import EpmVGConfig
from .image_processing_epmvg import EpmVGImageProcessor
from .image_processing_pil_epmvg import EpmVGImageProcessorPil

logger = logging.get_logger(__name__)


class EpmVGProcessor(ModelCardMixin, ProcessorMixin):
    r"""
    Wraps an [`EpmVGImageProcessor`] and a tokenizer, and owns the geometry both ways: boxes of the images become
    labels, predicted boxes become boxes of the images ([`~EpmVGProcessor.post_process_grounding`]).

    Args:
        image_processor ([`EpmVGImageProcessor`] or [`EpmVGImageProcessorPil`]): the image processor.
        tokenizer ([`PreTrainedTokenizerBase`]): the tokenizer of the text tower.
        max_text_length (`int`, *optional*, defaults to 20): expressions are cut to so many tokens, special ones
            included; saved with the processor. A `max_length` of a call goes before it, one saved with the tokenizer
            does not.
        do_lower_case (`bool`, *optional*, defaults to `False`): expressions are lower-cased before the tokenizer sees
            them, as TransVG does; saved with the processor. Also with a tokenizer that lower-cases itself, this makes
            words of what would be a special token, such as "[SEP]".

    Example:

    ```python
    >>> from epmvg_hf import EpmVGProcessor

    >>> processor = EpmVGProcessor.from_pretrained("outputs/demo")
    >>> list(processor(images=image, text=["the star", "the green triangle"]))
    ['pixel_values', 'pixel_mask', 'original_sizes', 'input_ids', 'attention_mask', 'image_index']
    ```
    """

    # The model takes no segment ids, whatever the tokenizer offers.
    unused_input_names = ["token_type_ids"]  # noqa: RUF012
    text_kwargs = {  # noqa: RUF012
        "padding": True,
        "truncation": True,
        "return_attention_mask": True,
        "return_token_type_ids": False,
        "return_tensors": "pt",
    }
    images_kwargs = {"return_tensors": "pt"}  # noqa: RUF012

    def __init__(
        self,
        image_processor: EpmVGImageProcessor | EpmVGImageProcessorPil | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_text_length: int = 20,
        do_lower_case: bool = False,
        **kwargs: Any,
    ):
        super().__init__(image_processor, tokenizer, **kwargs)
        self.max_text_length = max_text_length
        self.do_lower_case = do_lower_case

    @classmethod
    def from_vision_text_pretrained(
        cls, vision: str, text: str, config: EpmVGConfig, do_lower_case: bool = False
    ) -> "EpmVGProcessor":
        r"""
        The processor of a model that [`~EpmVGModel.from_vision_text_pretrained`] made: the mean and deviation of the
        vision tower, the tokenizer of the text tower, canvas and text length of the model.

        Args:
            vision (`str`): folder or Hub id of the vision tower, with its image processor.
            text (`str`): folder or Hub id of the text tower, with its tokenizer.
            config ([`EpmVGConfig`]): the model's configuration.
            do_lower_case (`bool`, *optional*, defaults to `False`): see [`EpmVGProcessor`].

        Raises:
            ValueError: there is no image processor with the vision tower, or the tokenizer has more tokens than the
                text tower.

        Example:

        ```python
        >>> from epmvg_hf import EpmVGProcessor

        >>> vision, text = "facebook/detr-resnet-50", "google-bert/bert-base-uncased"
        >>> processor = EpmVGProcessor.from_vision_text_pretrained(vision, text, model.config)
        >>> processor.max_text_length == model.config.max_text_length
        True
        ```
        """
        # Here, as it loads the code of many towers.
        from .pretrained_towers import tower_statistics, tower_tokenizer

        size = {"height": config.image_size, "width": config.image_size}
        image_processor_class = EpmVGImageProcessor if is_torchvision_available() else EpmVGImageProcessorPil
        image_processor = image_processor_class(size=size, **tower_statistics(vision))
        tokenizer = tower_tokenizer(text, config.get_text_config().vocab_size)
        return cls(image_processor, tokenizer, config.max_text_length, do_lower_case)

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "image_index"]

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | list[list[str]] | None = None,
        boxes: Sequence | np.ndarray | torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        r"""
        Prepares B images and N expressions for the model.

        Args:
            images (`ImageInput`, *optional*): one image, or a list of B images.
            text (`str`, `list[str]` or `list[list[str]]`, *optional*): one expression; a list of expressions, one for
                each image of a list or all for one image that is not in a list; or for each image a list of its
                expressions, which may be empty.
            boxes (list, `np.ndarray` or `torch.Tensor`, *optional*): the box of each expression, nested like `text`:
                (x0, y0, x1, y1) in pixels of the image as given, 0-based, half-open. A box may reach beyond its image
                by up to 1 pixel. In a list, `None` says that an expression has no box: its row of `labels` is NaN.
            kwargs: keyword arguments for the tokenizer or the image processor. By default, tensors are returned
                (`return_tensors="pt"`), and text is padded to the longest expression of the batch.

        Returns:
            `BatchFeature`: for images `pixel_values` (B, 3, S, S), `pixel_mask` (B, S, S) and `original_sizes` (B, 2);
            for text `input_ids` (N, L) and `attention_mask` (N, L); for both `image_index` (N,), the number of the
            image that each expression belongs to; for boxes `labels` (N, 4), float32, (centre x, centre y, width,
            height) in [0, 1] of the padded canvas.

        Raises:
            ValueError: an expression is empty; images, expressions and boxes do not match in number; a box is no box,
                or not inside its image.

        Example:

        ```python
        >>> inputs = processor(images=image, text=["all of it", "a dog"], boxes=[[0, 0, 113, 128], None])
        >>> inputs["pixel_values"].shape, inputs["image_index"]
        (torch.Size([1, 3, 64, 64]), tensor([0, 0]))
        >>> inputs["labels"]
        tensor([[0.5039, 0.5000, 0.8828, 1.0000],
                [   nan,    nan,    nan,    nan]])
        ```
        """
        if images is None and text is None:
            raise ValueError("Expected `images`, `text` or both, got neither.")
        if boxes is not None and (images is None or text is None):
            raise ValueError("`boxes` need the `images` they lie in and the `text` they belong to.")
        groups = [] if text is None else group_expressions(text, single_image=is_single_image(images))

        # A fast tokenizer remembers, even on disk, the max_length of its last call; that must not become our cut.
        remembered = {name: value for name, value in self.tokenizer.init_kwargs.items() if name != "max_length"}
        merged_kwargs = self._merge_kwargs(tokenizer_init_kwargs=remembered, **kwargs)
        images_kwargs, text_kwargs = merged_kwargs["images_kwargs"], merged_kwargs["text_kwargs"]
        text_kwargs["max_length"] = text_kwargs.get("max_length") or self.max_text_length

        data: dict[str, Any] = {}
        if images is not None:
            data |= self.image_processor(images, **images_kwargs)
        if text is not None:
            data |= self._tokenize([expression for group in groups for expression in group], **text_kwargs)
        if images is not None and text is not None:
            image_sizes = torch.as_tensor(data["original_sizes"])
            if len(groups) != len(image_sizes):
                raise ValueError(
                    f"`text` must match `images`, but it is for {len(groups)} image(s) and there are "
                    f"{len(image_sizes)}. For several expressions of one image pass a list of lists, or that image "
                    "without a list."
                )
            image_index = torch.tensor([image for image, group in enumerate(groups) for _ in group])
            targets = {"image_index": image_index}
            if boxes is not None:
                boxes = flatten_boxes(boxes, text)
                check_boxes(boxes, image_sizes[image_index], text)
                letterbox = self.image_processor.letterbox(image_sizes, **images_kwargs)
                targets["labels"] = letterbox.select(image_index).to_labels(boxes).float()
            data |= BatchFeature(targets, tensor_type=text_kwargs["return_tensors"])
        return BatchFeature(data)

    def post_process_grounding(
        self,
        outputs: ModelOutput,
        inputs: BatchFeature | None = None,
        target_sizes: torch.Tensor | list[tuple[int, int]] | None = None,
    ) -> list[dict[str, torch.Tensor]]:
        r"""
        Predicted boxes -> boxes of the images.

        It undoes the letterbox of this processor's image processor, as its settings stand now: `size`, `pad_offset`
        or `placements` that were given to a single call are not known here.

        Args:
            outputs ([`ModelOutput`]): has `pred_boxes` (N, 4), (centre x, centre y, width, height) in [0, 1] of the
                padded canvas.
            inputs ([`BatchFeature`], *optional*): what this processor returned; `original_sizes` and `image_index`
                are used. Without `image_index`, each image has one expression.
            target_sizes (`torch.Tensor` of shape `(N, 2)` or list, *optional*): instead of `inputs`, for each
                expression the (height, width) of its image in pixels.

        Returns:
            `list[dict]`: for each expression `{"box": torch.FloatTensor of shape (4,)}`, (x0, y0, x1, y1) in pixels of
            the image as given, clipped to it.

        Raises:
            ValueError: not exactly one of `inputs` and `target_sizes` is given, or it does not match `pred_boxes`.

        Example:

        ```python
        >>> import torch

        >>> inputs = processor(images=image, text=["the star", "the green triangle"])
        >>> outputs = model(**inputs)
        >>> outputs.pred_boxes = torch.tensor([[0.5, 0.5, 0.1, 0.2], [0.5, 0.5, 1.0, 1.0]])  # were they these
        >>> [result["box"] for result in processor.post_process_grounding(outputs, inputs)]
        [tensor([49.6000, 51.2000, 62.4000, 76.8000]), tensor([  0.,   0., 113., 128.])]
        ```
        """
        if (inputs is None) == (target_sizes is None):
            raise ValueError("Expected exactly one of `inputs` and `target_sizes`.")
        pred_boxes = outputs.pred_boxes.float()

        if inputs is not None:
            image_sizes = torch.as_tensor(inputs["original_sizes"]).cpu()
            if "image_index" in inputs:
                image_sizes = image_sizes[torch.as_tensor(inputs["image_index"]).cpu()]
        else:
            image_sizes = torch.as_tensor(target_sizes)
        if image_sizes.shape != (len(pred_boxes), 2):
            raise ValueError(
                f"Expected one (height, width) for each of the {len(pred_boxes)} predicted boxes, but the sizes have "
                f"shape {tuple(image_sizes.shape)}."
            )
        return [{"box": box} for box in self.image_processor.letterbox(image_sizes).to_pixels(pred_boxes)]

    def _loaded_from(self) -> str:
        return self.tokenizer.name_or_path

    def _tokenize(self, expressions: list[str], **text_kwargs: Any) -> dict:
        """Tokenizes, and warns where expressions are cut."""
        if self.do_lower_case:
            expressions = [expression.lower() for expression in expressions]
        encoded = self.tokenizer(expressions, **text_kwargs)
        # What was cut fills its row to the limit, so only full rows need a second look.
        limit = text_kwargs["max_length"]
        lengths = [np.asarray(mask).sum() for mask in encoded["attention_mask"]]
        full = [expression for expression, length in zip(expressions, lengths, strict=True) if length == limit]
        if full:
            whole = {**text_kwargs, "truncation": False, "padding": False, "return_tensors": None, "verbose": False}
            longest = max(len(input_ids) for input_ids in self.tokenizer(full, **whole)["input_ids"])
            if longest > limit:
                logger.warning_once(
                    f"Expressions are cut to {limit} tokens, but the longest one has {longest}. To keep all of it, "
                    "raise `max_text_length` of the processor and of the model."
                )
        return {name: values for name, values in encoded.items() if name not in self.unused_input_names}


# The row of an expression without a box; compared by identity, since a NaN from outside is an error.
NO_BOX = np.full(4, np.nan)


def is_single_image(images: ImageInput | None) -> bool:
    """Whether `images` is one image, not a list or a 4-dimensional batch."""
    is_batch = isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4
    return not isinstance(images, list | tuple) and not is_batch


def group_expressions(text: str | list[str] | list[list[str]], single_image: bool) -> list[list[str]]:
    """
    The expressions of each image; with `single_image`, those of a flat list belong to one image.

    Raises:
        ValueError: `text` is not nested as [`EpmVGProcessor`] expects, an expression is empty, or there is none.
    """
    if isinstance(text, str):
        groups = [[text]]
    elif isinstance(text, list | tuple) and all(isinstance(item, str) for item in text):
        flat = cast(list[str], list(text))
        groups = [flat] if single_image else [[item] for item in flat]
    elif isinstance(text, list | tuple) and all(isinstance(item, list | tuple) for item in text):
        groups = [list(item) for item in text]
    else:
        raise ValueError("`text` must be a string, a list of strings, or a list of lists of strings.")

    expressions = [expression for group in groups for expression in group]
    if not expressions:
        raise ValueError("`text` holds no expression, expected at least one.")
    for index, expression in enumerate(expressions):
        if not isinstance(expression, str) or not expression.strip():
            raise ValueError(f"`text{position(text, index)}` is {expression!r}, expected an expression with words.")
    return groups


def flatten_boxes(
    boxes: Sequence | np.ndarray | torch.Tensor, text: str | list[str] | list[list[str]]
) -> torch.Tensor:
    """
    The boxes of all expressions, `torch.DoubleTensor` of shape `(N, 4)`; NaN for the box `None`.

    Raises:
        ValueError: `boxes` are not nested like `text`, or an item is not four finite numbers.
    """
    if isinstance(text, str):
        items = [boxes]
    else:
        check_count(boxes, text, "")
        items = list(boxes)
        if not isinstance(text[0], str):
            for index, (group_boxes, group) in enumerate(zip(boxes, text, strict=True)):
                check_count(group_boxes, group, f"[{index}]")
            items = [box for group_boxes in boxes for box in group_boxes]

    rows = [NO_BOX if box is None else np.asarray(box, dtype=np.float64) for box in items]
    for index, row in enumerate(rows):
        if row.shape != (4,):
            raise ValueError(
                f"`boxes{position(text, index)}` must be four numbers (x0, y0, x1, y1), but it has shape {row.shape}."
            )
        if row is not NO_BOX and not np.isfinite(row).all():
            raise ValueError(
                f"`boxes{position(text, index)}` = {row.tolist()} is not finite, expected four finite numbers."
            )
    return torch.from_numpy(np.stack(rows))


def check_count(boxes: Sequence | np.ndarray | torch.Tensor, text: list, where: str) -> None:
    """Raises a `ValueError` if a list of boxes is not as long as the list of expressions at the same place."""
    count = len(boxes) if isinstance(boxes, Sequence | np.ndarray | torch.Tensor) else "no"
    if count != len(text):
        raise ValueError(
            f"`boxes` must be nested like `text`, but `boxes{where}` has {count} items and `text{where}` has "
            f"{len(text)}."
        )


def check_boxes(boxes: torch.Tensor, image_sizes: torch.Tensor, text: str | list[str] | list[list[str]]) -> None:
    """
    Raises a `ValueError` for the first of the boxes (N, 4) that is no box in its image (N, 2: height, width). NaN, an
    expression without a box, fails no comparison.
    """
    x0, y0, x1, y1 = boxes.unbind(1)
    height, width = image_sizes.unbind(1)
    faults = {
        "is empty or inverted, expected x0 < x1 and y0 < y1": (x0 >= x1) | (y0 >= y1),
        "lies wholly outside its image": (x1 <= 0) | (y1 <= 0) | (x0 >= width) | (y0 >= height),
        # Some annotations are rounded outwards or count the last pixel in: that costs less than a pixel.
        "reaches beyond its image by more than 1 pixel": (boxes < -1).any(dim=1)
        | (x1 > width + 1)
        | (y1 > height + 1),
    }
    for fault, mask in faults.items():
        if mask.any():
            index = int(mask.nonzero()[0])
            raise ValueError(
                f"`boxes{position(text, index)}` = {boxes[index].tolist()} {fault}; it must be (x0, y0, x1, y1) in "
                f"pixels of an image of {height[index]} x {width[index]} pixels (height x width)."
            )


def position(text: str | list[str] | list[list[str]], index: int) -> str:
    """Where in `text`, and in `boxes`, nested alike, the expression number `index` is: "", "[3]" or "[1][0]"."""
    if isinstance(text, str):
        return ""
    if isinstance(text[0], str):
        return f"[{index}]"
    return [f"[{outer}][{inner}]" for outer, group in enumerate(text) for inner in range(len(group))][index]


__all__ = ["EpmVGProcessor"]
