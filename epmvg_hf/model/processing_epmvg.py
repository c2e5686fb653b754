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
"""Processor class for EpmVG: turns images, expressions and boxes into inputs, and predictions into pixel boxes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import ProcessorMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import ModelOutput, is_torchvision_available, logging

from .card_mixin import ModelCardMixin
from .configuration_epmvg import EpmVGConfig
from .feature_grid import only_on_picture
from .image_processing_epmvg import EpmVGImageProcessor
from .image_processing_pil_epmvg import EpmVGImageProcessorPil
from .letterbox import Letterbox
from .nested_inputs import check_boxes, flatten, flatten_boxes, group_expressions
from .pretrained_towers import tower_statistics, tower_tokenizer
from .tokenized_expressions import tokenize

logger = logging.get_logger(__name__)


class EpmVGProcessor(ModelCardMixin, ProcessorMixin):
    r"""
    Wraps an [`EpmVGImageProcessor`] and a tokenizer. A call turns images, expressions and their boxes into inputs and
    labels of the model; [`~EpmVGProcessor.post_process_grounding`] turns predicted boxes into boxes of the images.

    Args:
        image_processor ([`EpmVGImageProcessor`] or [`EpmVGImageProcessorPil`]): the image processor.
        tokenizer ([`PreTrainedTokenizerBase`]): the tokenizer of the text tower.
        max_text_length (`int`, *optional*, defaults to 20): expressions are cut to this many tokens, special tokens
            included; saved with the processor. The `max_length` of a call overrides it, the one that is saved with the
            tokenizer does not.
        do_lower_case (`bool`, *optional*, defaults to `False`): whether expressions are lower-cased before they are
            tokenized, as TransVG does; saved with the processor. It makes a difference even if the tokenizer
            lower-cases, because what looks like a special token ("[SEP]") then becomes ordinary text.

    Example:

    ```python
    >>> from epmvg_hf import EpmVGProcessor

    >>> processor = EpmVGProcessor.from_pretrained("outputs/demo")
    >>> list(processor(images=image, text=["the star", "the green triangle"]))
    ['pixel_values', 'pixel_mask', 'original_sizes', 'letterbox', 'input_ids', 'attention_mask', 'image_index']
    ```
    """

    # BERT's tokenizer makes segment ids, but the model has no argument for them.
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
        # transformers makes such a tokenizer of a folder without the files of one, and says nothing.
        if tokenizer is not None and len(tokenizer) <= len(set(tokenizer.all_special_ids)):
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} has no words, only the {len(tokenizer)} special tokens "
                f"{' '.join(tokenizer.all_special_tokens)}: expected a folder or Hub id with its vocabulary"
            )
        self.max_text_length = max_text_length
        self.do_lower_case = do_lower_case

    @classmethod
    def from_vision_text_pretrained(
        cls, vision: str, text: str, config: EpmVGConfig, do_lower_case: bool = False
    ) -> "EpmVGProcessor":
        r"""
        The processor for a model that [`~EpmVGModel.from_vision_text_pretrained`] made. It has the mean and standard
        deviation of the vision tower, the tokenizer of the text tower, and the canvas and text length of the model.

        Args:
            vision (`str`): folder or Hub id of the vision tower, with its image processor.
            text (`str`): folder or Hub id of the text tower, with its tokenizer.
            config ([`EpmVGConfig`]): the model's configuration.
            do_lower_case (`bool`, *optional*, defaults to `False`): see [`EpmVGProcessor`].

        Raises:
            ValueError: the vision tower has no image processor, or the tokenizer has more tokens than the text tower
                embeds.

        Example:

        ```python
        >>> from epmvg_hf import EpmVGProcessor

        >>> vision, text = "facebook/detr-resnet-50", "google-bert/bert-base-uncased"
        >>> processor = EpmVGProcessor.from_vision_text_pretrained(vision, text, model.config)
        >>> processor.max_text_length == model.config.max_text_length
        True
        ```
        """
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
            images (`ImageInput`, `str` or `os.PathLike`, *optional*): one image, or a list of B images, of any type
                that [`EpmVGImageProcessor`] takes. Like a PIL image, a file is not turned by its EXIF orientation.
            text (`str`, `list[str]` or `list[list[str]]`, *optional*): one expression; a list of expressions, one for
                each image of a list or all for one image that is not in a list; or for each image a list of its
                expressions, which may be empty.
            boxes (list, `np.ndarray` or `torch.Tensor`, *optional*): the box of each expression, nested like `text`:
                (x0, y0, x1, y1) in pixels of the image as given, 0-based, half-open. A box may stick out of its image
                by up to 1 pixel. `None` or a row of NaN stands for an expression without a box; its labels are NaN.
            kwargs: keyword arguments for the tokenizer or the image processor. By default, tensors are returned
                (`return_tensors="pt"`), and text is padded to the longest expression of the batch.

        Returns:
            `BatchFeature`: for images `pixel_values` (B, 3, S, S), `pixel_mask` (B, S, S), `original_sizes` (B, 2) and
            `letterbox` (B, 4), see [`EpmVGImageProcessor`]; for text `input_ids` (N, L) and `attention_mask` (N, L);
            for both `image_index` (N,), the number of the image that each expression belongs to; for boxes `labels`
            (N, 4), float32, (centre x, centre y, width, height) in [0, 1] of the padded canvas.

        Raises:
            ValueError: an expression has no words; images, expressions and boxes do not match in number; a box is
                empty, inverted, not finite or outside its image.

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
        groups = [] if text is None else group_expressions(text, _is_single_image(images))

        # A fast tokenizer remembers the max_length of its last call, even when it is saved. That must not cut the
        # expressions of this call.
        remembered = {name: value for name, value in self.tokenizer.init_kwargs.items() if name != "max_length"}
        merged_kwargs = self._merge_kwargs(tokenizer_init_kwargs=remembered, **kwargs)
        images_kwargs, text_kwargs = merged_kwargs["images_kwargs"], merged_kwargs["text_kwargs"]
        text_kwargs["max_length"] = text_kwargs.get("max_length") or self.max_text_length

        data: dict[str, Any] = {}
        if images is not None:
            data |= self.image_processor(images, **images_kwargs)
        if text is not None:
            data |= self._tokenize(flatten(groups), **text_kwargs)
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
                targets["labels"] = self.make_labels({**data, **targets}, boxes, text)
            data |= BatchFeature(targets, tensor_type=text_kwargs["return_tensors"])
        return BatchFeature(data)

    @staticmethod
    def make_labels(
        inputs: BatchFeature | dict[str, Any],
        boxes: Sequence | np.ndarray | torch.Tensor,
        text: str | list[str] | list[list[str]],
    ) -> torch.Tensor:
        r"""
        Turns boxes of the images into labels, as a call with `boxes` does: the inverse of
        [`~EpmVGProcessor.post_process_grounding`].

        Args:
            inputs ([`BatchFeature`] or `dict`): `letterbox` (B, 4) and `original_sizes` (B, 2) as the processor
                returned them for the images, and `image_index` (N,).
            boxes (list, `np.ndarray` or `torch.Tensor`): the boxes, see [`~EpmVGProcessor.__call__`].
            text (`str`, `list[str]` or `list[list[str]]`): the expressions, nested like the boxes.

        Returns:
            `torch.FloatTensor` of shape `(N, 4)`: (centre x, centre y, width, height) in [0, 1] of the padded canvas.

        Raises:
            ValueError: boxes and expressions do not match in number; a box is empty, inverted, not finite or outside
                its image.

        Example:

        ```python
        >>> inputs = processor(images=image, text="all of it")
        >>> processor.make_labels(inputs, boxes=[0, 0, 113, 128], text="all of it")
        tensor([[0.5039, 0.5000, 0.8828, 1.0000]])
        ```
        """
        image_sizes, image_index = torch.as_tensor(inputs["original_sizes"]), inputs["image_index"]
        flat = flatten_boxes(boxes, text)
        check_boxes(flat, image_sizes[image_index], text)
        letterbox = Letterbox.from_tensor(inputs["letterbox"], image_sizes)
        return letterbox.select(image_index).to_labels(flat).float()

    def post_process_grounding(
        self,
        outputs: ModelOutput,
        inputs: BatchFeature | None = None,
        target_sizes: torch.Tensor | list[tuple[int, int]] | None = None,
        threshold: float | None = None,
        return_maps: bool = False,
    ) -> list[dict[str, Any]]:
        r"""
        Turns predicted boxes, and if asked consistency maps, into those of the images.

        Args:
            outputs ([`ModelOutput`]): has `pred_boxes` (N, 4), (centre x, centre y, width, height) in [0, 1] of the
                padded canvas, and `scores` (N,) if the model has a score head; for `return_maps` also
                `consistency_map` (N, V) and `visual_mask` (B, grid_height, grid_width).
            inputs ([`BatchFeature`], *optional*): what this processor returned, which says where it placed the
                pictures; `letterbox`, `original_sizes` and `image_index` are used. Without `image_index`, each image
                has one expression.
            target_sizes (`torch.Tensor` of shape `(N, 2)` or list, *optional*): instead of `inputs`, for each
                expression the (height, width) of its image in pixels. This assumes that the images were placed by the
                present settings of the image processor, not by `size`, `pad_offset`, `placements` or `do_resize` of
                a single call.
            threshold (`float`, *optional*): the lowest score of a box. The box of an expression with a lower score is
                `None`: what it names was not found.
            return_maps (`bool`, *optional*, defaults to `False`): also give the consistency maps, which needs
                `inputs`. Only training with `config.box_head="map"` makes a map that shows what its expression names.

        Returns:
            `list[dict]`: for each expression `box`, a `torch.FloatTensor` of shape `(4,)`, (x0, y0, x1, y1) in pixels
            of the image as given, clipped to it; `score`, a scalar in [0, 1], or `None` for a model without a
            score head; and with `return_maps` `map`, a `torch.FloatTensor` of shape `(rows, columns)`: the softmax of
            the consistency map over the cells on the picture, without the padding. Its cells divide the whole image
            evenly, and it sums to 1.

        Raises:
            ValueError: not exactly one of `inputs` and `target_sizes` is given, or it does not match `pred_boxes`, or
                `inputs` is not what the processor returned, or there is a `threshold` but no score, or a predicted
                box is not made of finite numbers, or `return_maps` has no `inputs` or no maps.

        Example:

        ```python
        >>> import torch

        >>> inputs = processor(images=image, text=["the star", "the green triangle"])
        >>> outputs = model(**inputs)
        >>> outputs.pred_boxes = torch.tensor([[0.5, 0.5, 0.1, 0.2], [0.5, 0.5, 1.0, 1.0]])  # for example
        >>> [result["box"] for result in processor.post_process_grounding(outputs, inputs)]
        [tensor([49.6000, 51.2000, 62.4000, 76.8000]), tensor([  0.,   0., 113., 128.])]
        ```
        """
        if (inputs is None) == (target_sizes is None):
            raise ValueError("Expected exactly one of `inputs` and `target_sizes`.")
        if return_maps and (inputs is None or outputs.get("consistency_map") is None):
            raise ValueError("`return_maps` needs `inputs`, and `outputs` with `consistency_map` and `visual_mask`.")
        pred_boxes = outputs.pred_boxes.float()
        image_index = None

        if inputs is None:
            image_sizes = torch.as_tensor(target_sizes)
            if image_sizes.shape != (len(pred_boxes), 2):
                raise ValueError(
                    f"`target_sizes` must be one (height, width) for each of the {len(pred_boxes)} predicted boxes, "
                    f"but its shape is {tuple(image_sizes.shape)}."
                )
            letterbox = self.image_processor.letterbox(image_sizes)
        else:
            for name in ("letterbox", "original_sizes"):
                if name not in inputs:
                    raise ValueError(
                        f"`inputs` has no `{name}`: pass what the processor returned for images, or `target_sizes`."
                    )
            letterbox = Letterbox.from_tensor(inputs["letterbox"], inputs["original_sizes"])
            if "image_index" in inputs:
                image_index = torch.as_tensor(inputs["image_index"]).cpu()
                letterbox = letterbox.select(image_index)
            if len(letterbox) != len(pred_boxes):
                raise ValueError(
                    f"{len(pred_boxes)} boxes were predicted, but `inputs` has {len(letterbox)} expressions."
                )
        if not pred_boxes.isfinite().all():
            row = int((~pred_boxes.isfinite().all(-1)).nonzero()[0])
            raise ValueError(
                f"The box of expression {row} is {pred_boxes[row].tolist()}: the weights of the model, or its inputs, "
                "have NaN or infinity."
            )
        boxes: list[torch.Tensor | None] = list(letterbox.to_pixels(pred_boxes))
        scores = outputs.get("scores")
        if scores is None:
            if threshold is not None:
                raise ValueError("`threshold` needs scores, and this model has no score head (config.score_head).")
            scores = [None] * len(boxes)
        else:
            scores = scores.float().cpu()
        if threshold is not None:
            boxes = [box if score >= threshold else None for box, score in zip(boxes, scores, strict=True)]
        results = [{"box": box, "score": score} for box, score in zip(boxes, scores, strict=True)]
        if return_maps:
            maps = _picture_maps(outputs, letterbox, image_index)
            results = [result | {"map": picture_map} for result, picture_map in zip(results, maps, strict=True)]
        return results

    def _loaded_from(self) -> str:
        return self.tokenizer.name_or_path

    def _tokenize(self, expressions: list[str], **text_kwargs: Any) -> dict:
        """Tokenizes the expressions, and warns if some of them are cut."""
        if self.do_lower_case:
            expressions = [expression.lower() for expression in expressions]
        encoded, longest = tokenize(self.tokenizer, expressions, **text_kwargs)
        if longest:
            limit = text_kwargs["max_length"]
            logger.warning_once(
                f"Expressions are cut to {limit} tokens, but the longest one has {longest}. To keep all of it, raise "
                "`max_text_length` of the processor and of the model."
            )
        return {name: values for name, values in encoded.items() if name not in self.unused_input_names}


def _picture_maps(outputs: ModelOutput, letterbox: Letterbox, image_index: torch.Tensor | None) -> list[torch.Tensor]:
    """The distribution of each of N expressions over its picture. The letterbox has an entry for each of them."""
    mask = outputs.visual_mask.bool().cpu()
    mask = mask if image_index is None else mask[image_index]
    logits = only_on_picture(outputs.consistency_map.float().cpu(), mask.flatten(1))
    maps = letterbox.to_picture_maps(logits.softmax(dim=-1).view(mask.shape), mask)
    return [picture_map / picture_map.sum() for picture_map in maps]  # interpolation moves the sum a little


def _is_single_image(images: ImageInput | None) -> bool:
    """Whether `images` is one image, not a list or a 4-dimensional batch."""
    is_batch = isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4
    return not isinstance(images, list | tuple) and not is_batch


__all__ = ["EpmVGProcessor"]
