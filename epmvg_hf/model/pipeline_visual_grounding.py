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
"""`pipeline("visual-grounding")`: images and expressions in, boxes out."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from types import GeneratorType
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers.feature_extraction_utils import BatchFeature
from transformers.modeling_utils import PreTrainedModel
from transformers.pipelines.base import Pipeline
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator
from transformers.processing_utils import ProcessorMixin
from transformers.utils import ModelOutput

from .nested_inputs import has_words
from .rgb_images import as_rgb, open_image


class VisualGroundingPipeline(Pipeline):
    r"""
    Finds the boxes of what expressions refer to in images. Each image is encoded once per call, however many
    expressions it has.

    Args:
        model ([`EpmVGForVisualGrounding`]): the model, which is put into evaluation mode and onto `device`.
        processor ([`EpmVGProcessor`]): the processor of the model.
        kwargs: `device`; `batch_size`, the images per forward pass (default 1); `num_workers`, the processes that read
            and prepare images (default 0, which is this process); `timeout`, the seconds to wait for an image from
            the web; `threshold`, the lowest score of a box, below which it is `None` (by default every expression
            gets its box); and `return_maps`, whether results have a `map` (default `False`). All but `device` can also
            be given to a call. `dtype` is an argument of `pipeline(...)`, which loads the model in it.

    Example:

    ```python
    >>> import epmvg_hf
    >>> from transformers import pipeline

    >>> grounder = pipeline("visual-grounding", model="outputs/demo")
    >>> grounder("scene.png", "the red star")
    {'score': None, 'box': {'xmin': ..., 'ymin': ..., 'xmax': ..., 'ymax': ...}, 'text': 'the red star'}
    >>> len(grounder("scene.png", ["the red star", "the left circle"]))  # a list of results, one for each expression
    2
    >>> results = grounder(["a.jpg", "b.jpg"], ["a star", ["a circle", "a dog"]], batch_size=2)
    >>> results[0]["text"], [result["text"] for result in results[1]]  # one item for each image
    ('a star', ['a circle', 'a dog'])
    ```
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False
    _load_video_processor = False

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin | None = None, **kwargs: Any):
        # A compiled model, and one with adapters, is a module that contains the grounding model.
        parts = model.modules() if isinstance(model, nn.Module) else ()
        if not (
            any(is_named(part, "EpmVGForVisualGrounding") for part in parts) and is_named(processor, "EpmVGProcessor")
        ):
            raise ValueError(
                "Visual grounding needs an EpmVGForVisualGrounding and its EpmVGProcessor, but the model is a "
                f"{type(model).__name__} and the processor a {type(processor).__name__}."
            )
        super().__init__(model=model, processor=processor, **kwargs)
        self.model.eval()  # otherwise a model that was just trained would apply dropout

    def __call__(
        self,
        image: Any,
        text: str | Sequence[str | list[str]] | None = None,
        *,
        timeout: float | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        threshold: float | None = None,
        return_maps: bool | None = None,
    ) -> Any:
        r"""
        Args:
            image (`str`, `os.PathLike`, `PIL.Image.Image`, a list of them, or rows):
                An image as path, http(s) URL, base64 data or PIL image, or a list of images. Without `text` it is a
                row `{"image": ..., "text": ...}` with one image, or a list, generator or dataset of such rows, whose
                other columns are ignored.
            text (`str` or `list`, *optional*):
                An expression or a list of expressions. For a list of images it is one expression for all of them, or a
                list with one item (an expression or a list of expressions) for each image.
            timeout, batch_size, num_workers, threshold, return_maps:
                See [`VisualGroundingPipeline`].

        Returns:
            For each expression a dictionary `{"score": float, "box": {"xmin", "ymin", "xmax", "ymax"}, "text":
            expression}`. The score lies in [0, 1]; it is `None` for a model without a score head. The box is `None` if
            the score is below `threshold`, so that what the expression names was not found. Else it is in pixels
            (`float`, 0-based, half-open) of the image **as displayed**, that is, after its EXIF orientation is
            applied, and lies inside it. With `return_maps` there is also `"map"`, a float32 `np.ndarray` of shape
            `(rows, columns)` that sums to 1: how probable it is that the expression names what is in each of these
            parts, into which the image as displayed is divided evenly. The map is there whatever the score is.

            Results are nested like the input: an expression gives a dictionary, a list of expressions a list, and a
            list of images or rows a list of these. A generator or dataset gives an iterable that computes them while
            it is read.

        Raises:
            ValueError: images and texts do not match, an expression has no words, an image cannot be read, or
                `return_maps` is true for a model without `config.box_head="map"`.

        Example:

        ```python
        >>> rows = ({"image": row["image"], "text": row["expression"]} for row in dataset.select([0, 8]))
        >>> for result in grounder(rows, batch_size=8):
        ...     print(result["text"], list(result["box"]))
        third diamond from the left ['xmin', 'ymin', 'xmax', 'ymax']
        rightmost object ['xmin', 'ymin', 'xmax', 'ymax']
        ```
        """
        inputs = _make_rows(image, text)
        if isinstance(inputs, list) and not inputs:
            return []
        return super().__call__(
            inputs,
            timeout=timeout,
            batch_size=batch_size,
            num_workers=num_workers,
            threshold=threshold,
            return_maps=return_maps,
        )

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """
        Saves model and processor, so that `pipeline("visual-grounding", model=save_directory)` finds both. The method
        of transformers' `Pipeline` would not save the processor, and would add code for which loading needs
        `trust_remote_code`.

        Args:
            save_directory (`str` or `os.PathLike`): the folder.
            kwargs: arguments for `save_pretrained` of the model and of the processor, such as `push_to_hub`.

        Example:

        ```python
        >>> from transformers import pipeline

        >>> grounder.save_pretrained("outputs/copy")
        >>> pipeline("visual-grounding", model="outputs/copy")("scene.png", "the star")["text"]
        'the star'
        ```
        """
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)

    def _sanitize_parameters(
        self,
        timeout: float | None = None,
        threshold: float | None = None,
        return_maps: bool | None = None,
        **kwargs: Any,
    ) -> tuple[dict, dict, dict]:
        # Other models compute such numbers, too, but nothing has taught them to show what the expression names.
        if return_maps and self.model.config.box_head != "map":
            raise ValueError(
                '`return_maps` needs a model with config.box_head="map", but that of this one is '
                f'"{self.model.config.box_head}".'
            )
        maps = {} if return_maps is None else {"return_maps": return_maps}
        return (
            {} if timeout is None else {"timeout": timeout},
            maps,
            maps | ({} if threshold is None else {"threshold": threshold}),
        )

    def get_iterator(
        self,
        inputs: Iterable,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict,
        forward_params: dict,
        postprocess_params: dict,
    ) -> "GroundingResults":
        """
        Batches the rows by [`~VisualGroundingPipeline.collate`]. The method of transformers' `Pipeline` would pad
        tensors of one row per input, but here B images have N expressions.
        """
        if isinstance(inputs, Sized):
            rows = PipelineDataset(inputs, self.preprocess, preprocess_params)
        else:
            rows = PipelineIterator(inputs, self.preprocess, preprocess_params)
            num_workers = min(num_workers, 1)  # each of several workers would read the whole generator
        batches = DataLoader(rows, batch_size=batch_size, num_workers=num_workers, collate_fn=self.collate)
        return GroundingResults(
            batches, lambda batch: self.postprocess(self.forward(batch, **forward_params), **postprocess_params)
        )

    def run_single(self, inputs: Any, preprocess_params: dict, forward_params: dict, postprocess_params: dict) -> Any:
        """Grounds one row."""
        batch = self.collate([self.preprocess(inputs, **preprocess_params)])
        return self.postprocess(self.forward(batch, **forward_params), **postprocess_params)[0]

    def preprocess(self, input_: Any, timeout: float | None = None) -> dict[str, Any]:
        """
        Checks a row and reads its image.

        Returns:
            `dict`: `{"image": PIL image, "text": an expression or a list of expressions}`.
        """
        if not isinstance(input_, Mapping) or not {"image", "text"} <= set(input_):
            given = f"the keys {sorted(map(str, input_))}" if isinstance(input_, Mapping) else _type_name(input_)
            raise ValueError(
                'Expected `text` beside `image`, or rows {"image": an image, "text": an expression or a list of '
                f"expressions}}, but there is {given}."
            )
        text = input_["text"]
        expressions = [text] if isinstance(text, str) else text
        if not isinstance(expressions, list | tuple) or not expressions or not all(map(has_words, expressions)):
            raise ValueError(
                f"The `text` of an image is {text!r}, expected an expression with words or a list of at least one."
            )
        return {"image": _read_image(input_["image"], timeout), "text": text}

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """
        Makes a batch of B rows from [`~VisualGroundingPipeline.preprocess`].

        Returns:
            `dict`: `{"inputs": what the processor returns, "text": the B texts}`.
        """
        texts = [row["text"] for row in rows]
        groups = [[text] if isinstance(text, str) else list(text) for text in texts]
        inputs = self.processor(images=[row["image"] for row in rows], text=groups, return_tensors="pt")
        return {"inputs": inputs, "text": texts}

    def _forward(self, input_tensors: dict[str, Any], return_maps: bool = False) -> dict[str, Any]:
        inputs: BatchFeature = input_tensors["inputs"]
        outputs = self.model(**inputs)
        # Pipeline copies all that is returned here from the device, so this is only what the results need.
        maps = {"consistency_map": outputs.consistency_map, "visual_mask": outputs.visual_mask} if return_maps else {}
        return {
            "outputs": ModelOutput(pred_boxes=outputs.pred_boxes, scores=outputs.scores, **maps),
            "inputs": {name: inputs[name] for name in ("original_sizes", "letterbox", "image_index")},
            "text": input_tensors["text"],
        }

    def postprocess(
        self, model_outputs: dict[str, Any], threshold: float | None = None, return_maps: bool = False
    ) -> list[dict | list[dict]]:
        """Makes the results of a batch: one item for each image, nested like its text."""
        grounded = iter(
            self.processor.post_process_grounding(
                model_outputs["outputs"], model_outputs["inputs"], threshold=threshold, return_maps=return_maps
            )
        )
        return [
            _as_result(text, next(grounded))
            if isinstance(text, str)
            else [_as_result(item, next(grounded)) for item in text]
            for text in model_outputs["text"]
        ]


class GroundingResults:
    """
    The results of a call on a generator or dataset, in the order of its rows, which are computed while they are read.
    They have a length if they are made of a `torch.utils.data.Dataset` that has one.

    Args:
        batches (`DataLoader`): batches as [`~VisualGroundingPipeline.collate`] makes them.
        ground (`Callable`): makes the results of a batch.

    Example:

    ```python
    >>> results = grounder(dataset.rename_column("expression", "text"), batch_size=8)
    >>> [result["text"] for result in results][:2]
    ['third diamond from the left', 'gray diamond above the green diamond']
    ```
    """

    def __init__(self, batches: DataLoader, ground: Callable[[dict[str, Any]], list]):
        self.batches = batches
        self.ground = ground

    def __len__(self) -> int:
        return len(cast(Sized, self.batches.dataset))

    def __iter__(self) -> Iterator[dict | list[dict]]:
        for batch in self.batches:
            yield from self.ground(batch)


def _make_rows(image: Any, text: Any) -> Mapping | list | Iterator | Dataset:
    """
    Makes a row `{"image": ..., "text": ...}`, or several rows, of the arguments of a call.

    Raises:
        ValueError: there is no text, or there are not as many texts as images.
    """
    is_list = isinstance(image, list | tuple)
    if text is None:
        if is_list:
            return list(image)
        if isinstance(image, Mapping | GeneratorType | Dataset):
            return image
        if isinstance(image, Iterable) and not isinstance(image, str | bytes | np.ndarray | torch.Tensor):
            # `Pipeline` would take a dataset of 🤗 datasets for a single input, but not a generator.
            return (row for row in image)
        raise ValueError(f"`text` is missing: expected what to look for in `image`, which is {_type_name(image)}.")
    if not is_list:
        return {"image": image, "text": text}
    texts = [text] * len(image) if isinstance(text, str) else text
    if not isinstance(texts, list | tuple) or len(texts) != len(image):
        count = len(texts) if isinstance(texts, list | tuple) else _type_name(texts)
        raise ValueError(
            f"For {len(image)} images `text` must be one expression, or a list with one item (an expression or a list "
            f"of expressions) for each image, but there are {count}; to look for the same expressions in every image, "
            "pass [expressions] * len(images)."
        )
    return [{"image": one, "text": item} for one, item in zip(image, texts, strict=True)]


def _read_image(image: Any, timeout: float | None) -> Image.Image:
    """
    Reads an image in RGB, as displayed: upright, and what is transparent on white.

    Raises:
        ValueError: the image cannot be read, for whatever reason, or its values have no known meaning.
    """
    named = isinstance(image, str | os.PathLike)
    return as_rgb(
        open_image(image, timeout, upright=True), f"`image` {os.fspath(image)!r:.100}" if named else "`image`"
    )


def _as_result(expression: str, grounded: dict[str, Any]) -> dict[str, Any]:
    """The result for an expression, of its item from [`~EpmVGProcessor.post_process_grounding`]."""
    box, score = grounded["box"], grounded["score"]
    result = {
        "score": None if score is None else score.item(),
        "box": None if box is None else dict(zip(("xmin", "ymin", "xmax", "ymax"), box.tolist(), strict=True)),
        "text": expression,
    }
    return result | {"map": grounded["map"].numpy()} if "map" in grounded else result


def is_named(value: Any, name: str) -> bool:
    """
    Whether the class of a value, or one that it inherits from, has this name. The name is compared because shared code
    (see `register_for_hub`) brings classes of its own, which are not the package's.
    """
    return name in (cls.__name__ for cls in type(value).__mro__)


def _type_name(value: Any) -> str:
    """Describes a value in an error message by its type, since the value may be too long to quote."""
    return f"a value of type {type(value).__name__}"


__all__ = ["VisualGroundingPipeline"]
