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
"""Image processor class for EpmVG (PIL backend)."""

from typing import Any

import numpy as np
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_base import BatchFeature
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.utils import TensorType

from .image_processing_epmvg import EpmVGImageProcessorKwargs, EpmVGImageProcessorMixin


class EpmVGImageProcessorPil(EpmVGImageProcessorMixin, PilBackend):
    r"""
    [`EpmVGImageProcessor`] on PIL and NumPy, without torchvision: the same settings, outputs and errors. It resizes
    with PIL as TransVG does, so with the default settings its pixels equal TransVG's.

    EXIF orientation is **not** applied: boxes refer to the pixels as they are stored.

    Example:

    ```python
    >>> from epmvg_hf import EpmVGImageProcessorPil

    >>> image_processor = EpmVGImageProcessorPil(size={"height": 224, "width": 224})
    >>> inputs = image_processor(image, return_tensors="pt")
    >>> inputs["pixel_values"].shape, inputs["original_sizes"]
    (torch.Size([1, 3, 224, 224]), tensor([[128, 113]]))
    ```
    """

    valid_kwargs = EpmVGImageProcessorKwargs

    def resize(
        self, image: np.ndarray, size: SizeDict, resample: PILImageResampling | int | None = None, **kwargs: Any
    ) -> np.ndarray:
        if image.dtype == np.uint8:
            return super().resize(image, size, resample, **kwargs)
        # Values that the user has scaled: the method of transformers would round them to bytes, or refuse them.
        channels = [Image.fromarray(channel).resize((size.width, size.height), resample) for channel in image]
        return np.stack([np.asarray(channel) for channel in channels])

    def _preprocess(self, *args: Any, **kwargs: Any) -> BatchFeature:
        # As with every image processor of this backend, NumPy arrays are what it returns if nothing else is asked for.
        kwargs["return_tensors"] = kwargs["return_tensors"] or TensorType.NUMPY
        return super()._preprocess(*args, **kwargs)


__all__ = ["EpmVGImageProcessorPil"]
