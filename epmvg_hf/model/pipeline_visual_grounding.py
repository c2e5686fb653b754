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

from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import load_image
from transformers.modeling_utils import PreTrainedModel
from transformers.pipelines.base import Pipeline
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator
from transformers.processing_utils import ProcessorMixin
from transformers.utils import ModelOutput


class VisualGroundingPipeline(Pipeline):
    r"""
    Finds what expressions name in images. Each image is encoded once per call, however many expressions it has.

    Args:
        model ([`EpmVGForVisualGrounding`]): the model; it is put into evaluation mode and onto `device`.
        processor ([`EpmVGProcessor`]): its processor.
        kwargs: `device`, `batch_size` (images per forward pass, 1 unless given), `num_workers` (processes that read
            and prepare images, none unless given), `timeout` (seconds to wait for an image of the web); all but
            `device` can also be given to a call. `dtype` is for `pipeline(...)`, which loads the model in it.

    Example:

    ```python
    >>> import epmvg_hf
    >>> from transformers import pipeline

    >>> grounder = pipeline("visual-grounding", model="outputs/demo")
    >>> grounder("scene.png", "the red star")
    {'box': {'xmin': ..., 'ymin': ..., 'xmax': ..., 'ymax': ...}, 'text': 'the red star'}
    >>> len(grounder("scene.png", ["the red star", "the left circle"]))  # a list: a result for each expression
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
        # A compiled model or one with adapters has ours inside.
        parts = model.modules() if isinstance(model, nn.Module) else ()
        if not (
            any(is_named(part, "EpmVGForVisualGrounding") for part in parts) and is_named(processor, "EpmVGProcessor")
        ):
            raise ValueError(
                "Visual grounding needs an EpmVGForVisualGrounding and its EpmVGProcessor, but the model is a "
                f"{type(model).__name__} and the processor a {type(processor).__name__}."
            )
        super().__init__(model=model, processor=processor, **kwargs)
        self.model.eval()  # a model that was just trained would still drop out

    def __call__(
        self,
        image: Any,
        text: str | Sequence[str | list[str]] | None = None,
        *,
        timeout: float | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
    ) -> Any:
        r"""
        Args:
            image (`str`, `os.PathLike`, `PIL.Image.Image`, a list of them, or rows):
                An image as path, http(s) URL, base64 data or PIL image, or a list of images. Without `text`: one row
                `{"image": ..., "text": ...}` with one image, or a list, generator or dataset of such rows, whose
                further columns are ignored.
            text (`str` or `list`, *optional*):
                An expression, or a list of expressions. For a list of images: one expression that all share, or a
                list with one item (an expression or a list of expressions) for each image.
            timeout, batch_size, num_workers:
                See [`VisualGroundingPipeline`].

        Returns:
            For each expression a dictionary `{"box": {"xmin", "ymin", "xmax", "ymax"}, "text": expression}`. The box
            is in pixels (`float`, 0-based, half-open) of the image **as displayed**, upright after its EXIF
            orientation, and lies inside it. Results are nested like the input: one expression gives a dictionary, a
            list of expressions a list; a list of images or rows gives a list of these. A generator or dataset gives
            an iterable that computes them while it is read.

        Raises:
            ValueError: images and texts do not match; a text is empty; an image cannot be read.

        Example:

        ```python
        >>> rows = ({"image": row["image"], "text": row["expression"]} for row in dataset.select([0, 8]))
        >>> for result in grounder(rows, batch_size=8):
        ...     print(result["text"], list(result["box"]))
        third diamond from the left ['xmin', 'ymin', 'xmax', 'ymax']
        rightmost object ['xmin', 'ymin', 'xmax', 'ymax']
        ```
        """
        inputs = make_rows(image, text)
        if isinstance(inputs, list) and not inputs:
            return []
        return super().__call__(inputs, timeout=timeout, batch_size=batch_size, num_workers=num_workers)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """
        Saves model and processor, so that `pipeline("visual-grounding", model=save_directory)` finds both. Pipeline's
        own method leaves out the processor, and copies code that would then want `trust_remote_code`.

        Args:
            save_directory (`str` or `os.PathLike`): the folder.
            kwargs: of `save_pretrained` of both, such as `push_to_hub`.

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

    def _sanitize_parameters(self, timeout: float | None = None, **kwargs: Any) -> tuple[dict, dict, dict]:
        return ({} if timeout is None else {"timeout": timeout}), {}, {}

    def get_iterator(
        self,
        inputs: Iterable,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict,
        forward_params: dict,
        postprocess_params: dict,
    ) -> "GroundingResults":
        """Pipeline's own pads every tensor to one row per input; here B images have N expressions."""
        if isinstance(inputs, Sized):
            rows = PipelineDataset(inputs, self.preprocess, preprocess_params)
        else:
            rows = PipelineIterator(inputs, self.preprocess, preprocess_params)
            num_workers = min(num_workers, 1)  # each of several workers would read all of it
        batches = DataLoader(rows, batch_size=batch_size, num_workers=num_workers, collate_fn=self.collate)
        return GroundingResults(
            batches, lambda batch: self.postprocess(self.forward(batch, **forward_params), **postprocess_params)
        )

    def run_single(self, inputs: Any, preprocess_params: dict, forward_params: dict, postprocess_params: dict) -> Any:
        """The result of one row of [`~VisualGroundingPipeline.__call__`]."""
        batch = self.collate([self.preprocess(inputs, **preprocess_params)])
        return self.postprocess(self.forward(batch, **forward_params), **postprocess_params)[0]

    def preprocess(self, input_: Any, timeout: float | None = None) -> dict[str, Any]:
        """One row, checked and with its image read: `{"image": PIL image, "text": an expression or a list}`."""
        if not isinstance(input_, Mapping) or not {"image", "text"} <= set(input_):
            found = f"the keys {sorted(map(str, input_))}" if isinstance(input_, Mapping) else type_name(input_)
            raise ValueError(
                'Expected `text` beside `image`, or rows {"image": an image, "text": an expression or a list of '
                f"expressions}}, but there is {found}."
            )
        check_text(input_["text"])
        return {"image": read_image(input_["image"], timeout), "text": input_["text"]}

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """B rows of [`~VisualGroundingPipeline.preprocess`] -> `{"inputs": model inputs, "text": their B texts}`."""
        texts = [row["text"] for row in rows]
        groups = [[text] if isinstance(text, str) else list(text) for text in texts]
        inputs = self.processor(images=[row["image"] for row in rows], text=groups, return_tensors="pt")
        return {"inputs": inputs, "text": texts}

    def _forward(self, input_tensors: dict[str, Any]) -> dict[str, Any]:
        inputs: BatchFeature = input_tensors["inputs"]
        outputs = self.model(**inputs)
        # Only what the boxes need: all that is returned here is copied from the device.
        sizes = {name: inputs[name] for name in ("original_sizes", "image_index")}
        return {
            "outputs": ModelOutput(pred_boxes=outputs.pred_boxes),
            "inputs": sizes,
            "text": input_tensors["text"],
        }

    def postprocess(self, model_outputs: dict[str, Any]) -> list[dict | list[dict]]:
        """The results of all images of a batch, each nested like its text."""
        grounded = self.processor.post_process_grounding(model_outputs["outputs"], model_outputs["inputs"])
        boxes = (result["box"].tolist() for result in grounded)
        return [
            as_result(text, next(boxes)) if isinstance(text, str) else [as_result(item, next(boxes)) for item in text]
            for text in model_outputs["text"]
        ]


class GroundingResults:
    """
    What a call on a generator or dataset returns: results in the order of its rows, computed while they are read. It
    has a length if it is made from a `torch.utils.data.Dataset` that has one.

    Args:
        batches (`DataLoader`): what [`~VisualGroundingPipeline.collate`] made of the rows.
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


def make_rows(image: Any, text: Any) -> Mapping | list | Iterator | Dataset:
    """
    What a call was given, as one row `{"image": ..., "text": ...}` or as several.

    Raises:
        ValueError: there is no text, or there are not as many texts as images.
    """
    is_list = isinstance(image, list | tuple)
    if text is None:
        if is_list:
            return list(image)
        if isinstance(image, Mapping | GeneratorType | Dataset):
            return image
        if isinstance(image, Iterable) and not isinstance(image, str):
            return (row for row in image)  # such as a dataset of 🤗 datasets, which Pipeline takes for one input
        raise ValueError(f"`text` is missing: expected what to look for in `image`, which is {type_name(image)}.")
    if not is_list:
        return {"image": image, "text": text}
    texts = [text] * len(image) if isinstance(text, str) else text
    if not isinstance(texts, list | tuple) or len(texts) != len(image):
        count = len(texts) if isinstance(texts, list | tuple) else type_name(texts)
        raise ValueError(
            f"For {len(image)} images `text` must be one expression, or a list with one item (an expression or a list "
            f"of expressions) for each image, but there are {count}; to look for the same expressions in every image, "
            "pass [expressions] * len(images)."
        )
    return [{"image": one, "text": item} for one, item in zip(image, texts, strict=True)]


def check_text(text: Any) -> None:
    """Raises a `ValueError` if `text` is not an expression with words or a list of at least one."""
    expressions = [text] if isinstance(text, str) else text
    if (
        not isinstance(expressions, list | tuple)
        or not expressions
        or not all(isinstance(expression, str) and expression.strip() for expression in expressions)
    ):
        raise ValueError(
            f"The `text` of an image is {text!r}, expected an expression with words or a list of at least one."
        )


def read_image(image: Any, timeout: float | None) -> Image.Image:
    """
    The image in RGB, upright after its EXIF orientation.

    Raises:
        ValueError: it cannot be read, from wherever it was to come.
    """
    source = os.fspath(image) if isinstance(image, os.PathLike) else image
    try:
        return load_image(source, timeout=timeout)
    except Exception as error:  # of Pillow, the file system, the HTTP client: none of them names the image
        found = f"{source!r:.100}" if isinstance(source, str) else type_name(source)
        raise ValueError(
            f"`image` is {found}, which cannot be read ({type(error).__name__}): expected a PIL image, the path of an "
            "image file, an http(s) URL or base64 data."
        ) from error


def as_result(expression: str, box: list[float]) -> dict[str, Any]:
    """What a call returns for an expression and its box, xyxy pixels."""
    return {"box": dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)), "text": expression}


def is_named(value: Any, name: str) -> bool:
    """Whether its class, or one that it inherits from, has this name: shared code has classes of its own."""
    return name in (cls.__name__ for cls in type(value).__mro__)


def type_name(value: Any) -> str:
    """A value for error messages, which must not quote all of it."""
    return f"a value of type {type(value).__name__}"


__all__ = ["VisualGroundingPipeline"]
