"""Augmentation of training images as in TransVG, but so that expressions stay true and their objects stay in sight."""

import random
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import ColorJitter

from ..model.losses import has_box, is_absent
from ..model.rgb_images import as_rgb
from .known_words import ENGLISH, KnownWords


@dataclass
class GroundingAugmentation:
    """
    Random crop, mirroring and colour jitter of an image with all its expressions and boxes, and a random scale and
    position of the image on the canvas. All draws come from the global random states of Python and PyTorch, which the
    collator of [`EpmVGTrainer`] sets for each image.

    TransVG (djiajunustc/TransVG, datasets/transforms.py) may also crop an object away, replaces `left` within words
    such as `bleft`, and crops and mirrors images whose expressions then become false. This class does none of these.

    Args:
        flip (`float`, *optional*, defaults to 0.5):
            Probability of mirroring the image and swapping left and right in its expressions. Images with an
            expression that would become false ("right behind", letters, numbers), or of which a word is unknown, are
            not mirrored.
        crop (`float`, *optional*, defaults to 0.5):
            Probability of a crop that keeps every box whole. Images with an expression about a position, an order or
            other objects, or of which a word is unknown, are not cropped.
        min_crop (`float`, *optional*, defaults to 0.6):
            Smallest fraction of the width and of the height that a crop keeps.
        color_jitter (`float`, *optional*, defaults to 0.4):
            Strength of the jitter of brightness, contrast and saturation. Images with an expression that names a
            colour, or of which a word is unknown, get a quarter of it.
        color_jitter_probability (`float`, *optional*, defaults to 0.8):
            Probability of the colour jitter.
        min_scale (`float`, *optional*, defaults to 0.7):
            Smallest length of the image's long side, as a fraction of the canvas. TransVG draws 448 to 640 pixels on a
            canvas of 640.
        words ([`~known_words.KnownWords`], *optional*, defaults to 8,000 English words):
            Which words swap with which and which are harmless. Expressions in another language need those of theirs.

    Example:

    ```python
    >>> import numpy as np
    >>> from epmvg_hf import GroundingAugmentation

    >>> augmentation = GroundingAugmentation(flip=1.0)
    >>> _, expressions, boxes = augmentation(image, ["the left triangle"], np.array([[24.0, 59.0, 57.0, 88.0]]))
    >>> expressions, boxes.tolist()  # the image is 113 pixels wide, and not cropped because of the word "left"
    (['the right triangle'], [[56.0, 59.0, 89.0, 88.0]])
    ```
    """

    flip: float = 0.5
    crop: float = 0.5
    min_crop: float = 0.6
    color_jitter: float = 0.4
    color_jitter_probability: float = 0.8
    min_scale: float = 0.7
    words: KnownWords = field(default=ENGLISH, repr=False)

    def __call__(
        self, image: Image.Image, expressions: list[str], boxes: np.ndarray
    ) -> tuple[Image.Image, list[str], np.ndarray]:
        """
        Args:
            image (`PIL.Image.Image`): the image.
            expressions (`list[str]`): its expressions.
            boxes (`np.ndarray` of shape `(len(expressions), 4)`):
                Boxes as xyxy float pixels of the image, 0-based, half-open. A row of NaN belongs to an expression
                without a box, a row of zeros to one that names nothing in the image; they stay as they are.

        Returns:
            `tuple[PIL.Image.Image, list[str], np.ndarray]`: the changed image with its expressions and boxes.
        """
        image = as_rgb(image)  # first, because the scale of some modes follows from all values, not from a crop's
        # Nobody knows where the object of an expression without a box is, so any crop could cut it away.
        labels = torch.from_numpy(boxes)
        with_box, absent = has_box(labels).numpy(), is_absent(labels).numpy()
        croppable = with_box.any() and (with_box | absent).all() and all(map(self.words.croppable, expressions))
        if random.random() < self.crop and croppable:
            image, boxes = self._crop(image, boxes, with_box)
        if random.random() < self.flip and all(map(self.words.mirrorable, expressions)):
            image, expressions, boxes = mirror(image, expressions, boxes, self.words)
        if random.random() < self.color_jitter_probability:
            strength = self.color_jitter * (1 if all(map(self.words.colorless, expressions)) else 0.25)
            image = ColorJitter(brightness=strength, contrast=strength, saturation=strength)(image)
        return image, expressions, np.where(absent[:, None], 0, boxes)

    def placement(self, canvas: int) -> tuple[int, float, float]:
        """
        Draws the size and position of an image on the canvas.

        Args:
            canvas (`int`): side of the square canvas in pixels.

        Returns:
            `tuple[int, float, float]`: the image's long side in pixels, and which fractions of the free space, each in
            [0, 1], lie above the image and left of it.

        Example:

        ```python
        >>> from epmvg_hf import GroundingAugmentation

        >>> long_side, above, left = GroundingAugmentation(min_scale=0.7).placement(640)
        >>> 448 <= long_side <= 640 and 0 <= above <= 1 and 0 <= left <= 1
        True
        ```
        """
        return random.randint(round(self.min_scale * canvas), canvas), random.random(), random.random()

    def _crop(self, image: Image.Image, boxes: np.ndarray, with_box: np.ndarray) -> tuple[Image.Image, np.ndarray]:
        left, right = self._window(image.width, boxes[with_box, 0].min(), boxes[with_box, 2].max())
        top, bottom = self._window(image.height, boxes[with_box, 1].min(), boxes[with_box, 3].max())
        return image.crop((left, top, right, bottom)), boxes - np.array([left, top, left, top], boxes.dtype)

    def _window(self, side: int, low: float, high: float) -> tuple[int, int]:
        """Draws [start, stop) within [0, side) that covers [low, high] and at least `min_crop` of the side."""
        low, high = max(0, int(low)), min(side, int(np.ceil(high)))
        length = random.randint(min(side, max(round(self.min_crop * side), high - low)), side)
        start = random.randint(max(0, high - length), min(low, side - length))
        return start, start + length


def mirror(
    image: Image.Image, expressions: list[str], boxes: np.ndarray, words: KnownWords = ENGLISH
) -> tuple[Image.Image, list[str], np.ndarray]:
    """
    Mirrors an image left to right, with its boxes, and swaps the words for left and right in its expressions. It does
    so whatever the expressions say, and words that it does not know stay as they are: ask `words.mirrorable` of each
    expression whether it can be mirrored.

    Args:
        image (`PIL.Image.Image`): the image.
        expressions (`list[str]`): its expressions.
        boxes (`np.ndarray` of shape `(len(expressions), 4)`):
            Boxes as xyxy float pixels of the image, 0-based, half-open, or rows of NaN, which stay as they are.
        words ([`KnownWords`], *optional*, defaults to the English ones): which words are swapped.

    Returns:
        `tuple[PIL.Image.Image, list[str], np.ndarray]`: the mirrored image with its expressions and boxes.

    Example:

    ```python
    >>> import numpy as np
    >>> from epmvg_hf.training.augmentation import mirror

    >>> _, expressions, boxes = mirror(image, ["Leftmost star"], np.array([[0.0, 59.0, 33.0, 88.0]]))
    >>> expressions, boxes.tolist()
    (['Rightmost star'], [[80.0, 59.0, 113.0, 88.0]])
    ```
    """
    mirrored = np.stack(
        [image.width - boxes[:, 2], boxes[:, 1], image.width - boxes[:, 0], boxes[:, 3]], axis=-1
    ).astype(boxes.dtype)
    return ImageOps.mirror(image), [words.mirror(expression) for expression in expressions], mirrored
