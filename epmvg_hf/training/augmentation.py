"""Augmentation of training images as in TransVG, but so that expressions stay true and their objects stay in sight."""

import random
import re
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import ColorJitter

from ..model.losses import has_box

_PAIRS = (
    ("left", "right"),
    ("leftmost", "rightmost"),
    ("leftest", "rightest"),
    ("lefthand", "righthand"),
    ("leftside", "rightside"),
    ("lft", "rt"),  # abbreviations in ReferItGame
)
_MIRRORED = dict(_PAIRS) | {right: left for left, right in _PAIRS}
_MIRRORED_WORD = re.compile(rf"\b({'|'.join(_MIRRORED)})\b", re.IGNORECASE)

# Expressions that mirroring would make false even with left and right swapped: "right behind the car" does not mean a
# direction and "left over" does not mean a side, and letters, numbers and clocks are shown reversed.
_UNMIRRORABLE = re.compile(
    r"(?<!\bthe )(?<!\bon )(?<!\bfar )(?<!\bto )\bright[ -]"
    r"(above|across|after|against|along|angled?|at|before|behind|below|beneath|beside|between|beyond|by|down|handed|here"
    r"|in|inside|near|next|off|on|out|outside|over|past|there|through|under|underneath|up|way|where)\b"
    r"|\bleft[ -](alone|behind|handed|out|over|to)\b|\b(are|had|has|have|is|just|that|was|were|who) left\b"
    r"|\ball right\b|\bright side up\b|\b(lefty|leftie|righty|rgt)\b"
    r"|\d|\b(clocks?|clockwise|counterclockwise|initials?|labell?ed|letters?|logos?|numbers?|read|reading|reads|say"
    r"|saying|says|spell|spelled|spelling|spells|text|words?|writing|written)\b"
    r"|\b(north|south)?(east|west)(ern)?\b",
    re.IGNORECASE,
)

# Expressions about places, order or other objects: a crop can make them false or remove an object that they mention.
_UNCROPPABLE = re.compile(
    r"\b(above|across|adjacent|after|against|ahead|along|alongside|among|around|back|background|backmost|before|behind"
    r"|below|beneath|beside|besides|between|beyond|bottom|bottommost|btm|by|cent(?:er|re)|central|close|closer|closest"
    r"|corner|ctr|distance|distant|edge|eighth|end|facing|far|farther|farthest|fifth|final|first|following|foreground"
    r"|fourth|frame|from|front|frontmost|furthest|half|highest|inner|innermost|inside|last|leading|left\w*|lft|looking"
    r"|lower|lowest|mid|middle|near|nearby|nearer|nearest|next|ninth|only|opposite|outer|outermost|outside|over"
    r"|partial|partially|rear|rearmost|rgt|right\w*|rt|second|seventh|side|sixth|tenth|third|top|topmost|toward|towards"
    r"|under|underneath|upper|visible|\d+(?:st|nd|rd|th))\b",
    re.IGNORECASE,
)

# Expressions that name a colour: strong jitter can turn gray into white, or orange into brown.
_COLOUR = re.compile(
    r"\b(beige|black(?:ish)?|blonde?|blu(?:e|ish)|bright(?:er|est)?|bronze|brown(?:ish)?|brunette|burgundy"
    r"|colou?r(?:ed|ful)?|cream|cyan|dark(?:er|est)?|gold(?:en)?|gr[ae]y(?:ish)?|green(?:ish)?|khaki|light(?:er|est)?"
    r"|magenta|maroon|navy|orange|pale|pink(?:ish)?|purple|red(?:dish)?|silver|tan(?:ned)?|teal|turquoise|violet|white"
    r"|yellow(?:ish)?)\b",
    re.IGNORECASE,
)


@dataclass
class GroundingAugmentation:
    """
    Random crop, mirroring and colour jitter of an image with all its expressions and boxes, and a random scale and
    position of the image on the canvas. All draws come from the global random states of Python and PyTorch, which the
    Trainer seeds.

    TransVG (djiajunustc/TransVG, datasets/transforms.py) may also crop an object away, replaces `left` within words
    such as `bleft`, and crops and mirrors images whose expressions then become false. This class does none of these.

    Args:
        flip (`float`, *optional*, defaults to 0.5):
            Probability of mirroring the image and swapping left and right in its expressions. Images with an
            expression that would become false ("right behind", letters, numbers) are not mirrored.
        crop (`float`, *optional*, defaults to 0.5):
            Probability of a crop that keeps every box whole. Images with an expression about a position, an order or
            other objects are not cropped.
        min_crop (`float`, *optional*, defaults to 0.6):
            Smallest fraction of the width and of the height that a crop keeps.
        color_jitter (`float`, *optional*, defaults to 0.4):
            Strength of the jitter of brightness, contrast and saturation. Images with an expression that names a
            colour get a quarter of it.
        color_jitter_probability (`float`, *optional*, defaults to 0.8):
            Probability of the colour jitter.
        min_scale (`float`, *optional*, defaults to 0.7):
            Smallest length of the image's long side, as a fraction of the canvas. TransVG draws 448 to 640 pixels on a
            canvas of 640.

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

    def __call__(
        self, image: Image.Image, expressions: list[str], boxes: np.ndarray
    ) -> tuple[Image.Image, list[str], np.ndarray]:
        """
        Args:
            image (`PIL.Image.Image`): the image.
            expressions (`list[str]`): its expressions.
            boxes (`np.ndarray` of shape `(len(expressions), 4)`):
                Boxes as xyxy float pixels of the image, 0-based, half-open. A row of NaN belongs to an expression
                without a box; it stays as it is.

        Returns:
            `tuple[PIL.Image.Image, list[str], np.ndarray]`: the changed image with its expressions and boxes.
        """
        # Nobody knows where the object of an expression without a box is, so any crop could cut it away.
        croppable = bool(has_box(torch.from_numpy(boxes)).all()) and not any(map(_UNCROPPABLE.search, expressions))
        if random.random() < self.crop and croppable:
            image, boxes = self._crop(image, boxes)
        if random.random() < self.flip and not any(map(_UNMIRRORABLE.search, expressions)):
            image, expressions, boxes = mirror(image, expressions, boxes)
        if random.random() < self.color_jitter_probability:
            strength = self.color_jitter * (0.25 if any(map(_COLOUR.search, expressions)) else 1)
            image = ColorJitter(brightness=strength, contrast=strength, saturation=strength)(image.convert("RGB"))
        return image, expressions, boxes

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

    def _crop(self, image: Image.Image, boxes: np.ndarray) -> tuple[Image.Image, np.ndarray]:
        left, right = self._window(image.width, boxes[:, 0].min(), boxes[:, 2].max())
        top, bottom = self._window(image.height, boxes[:, 1].min(), boxes[:, 3].max())
        return image.crop((left, top, right, bottom)), boxes - np.array([left, top, left, top], boxes.dtype)

    def _window(self, side: int, low: float, high: float) -> tuple[int, int]:
        """Draws [start, stop) within [0, side) that covers [low, high] and at least `min_crop` of the side."""
        low, high = max(0, int(low)), min(side, int(np.ceil(high)))
        length = random.randint(min(side, max(round(self.min_crop * side), high - low)), side)
        start = random.randint(max(0, high - length), min(low, side - length))
        return start, start + length


def mirror(image: Image.Image, expressions: list[str], boxes: np.ndarray) -> tuple[Image.Image, list[str], np.ndarray]:
    """
    Mirrors an image left to right, with its boxes, and swaps the words for left and right in its expressions.

    Args:
        image (`PIL.Image.Image`): the image.
        expressions (`list[str]`): its expressions.
        boxes (`np.ndarray` of shape `(len(expressions), 4)`):
            Boxes as xyxy float pixels of the image, 0-based, half-open, or rows of NaN, which stay as they are.

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
    return ImageOps.mirror(image), [_mirror_words(expression) for expression in expressions], mirrored


def _mirror_words(expression: str) -> str:
    def swap(match: re.Match) -> str:
        word = match[0]
        swapped = _MIRRORED[word.lower()]
        if word.isupper():
            return swapped.upper()
        return swapped.capitalize() if word[0].isupper() else swapped

    return _MIRRORED_WORD.sub(swap, expression)
