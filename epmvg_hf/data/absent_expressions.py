"""Expressions that are known to name nothing in an image: those of other images, chosen by their words."""

import re
from collections import defaultdict
from random import Random

import datasets
import numpy as np

from .pictures import number_pictures
from .progress import bars_only_on_a_terminal


def _word_set(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Words after which a phrase says more about the thing that its head noun names.
_AFTER_HEAD = _word_set(
    """
    about above across after against along among and around as at before behind below beneath beside between by
    carrying doing down during for from getting going has having holding in inside into is looking near next of off
    on onto or out outside over playing riding sitting standing that through to toward towards under underneath up
    using walking wearing which while who whose with
    """
)
# Whoever writes "a man" and who writes "a worker" may mean the same person, so none of them is known to be absent
# where another is there.
_PEOPLE = _word_set(
    """
    adult artist athlete audience baby band bicyclist biker boarder boy child couple crowd cyclist dancer dude
    family fellow female gentleman girl guy he her him human individual kid lady male man member men musician
    officer one other passenger people performer person player policeman rider runner she singer skateboarder skier
    somebody someone student surfer team teen teenager them they toddler wife woman women worker youth
    """
)
# Whoever names a colour or something so vague says too little to tell that it is not there.
_NOT_THINGS = _word_set(
    """
    area back background beige black blue brown color front gold gray green grey item lot middle object one open
    orange other piece pink purple red side silver something tan thing top view white yellow
    """
)
_IRREGULAR = {
    "children": "child",
    "men": "man",
    "people": "person",
    "women": "woman",
    "feet": "foot",
    "teeth": "tooth",
}


def head_noun(expression: str) -> str:
    """
    The word of an English expression that says what kind of thing it names, in the singular and in lower case: the
    last word before the first that begins an addition, such as "in" or "wearing". This is a rule of thumb, not a
    parser.

    Args:
        expression (`str`): an expression with words.

    Example:

    ```python
    >>> from epmvg_hf.data.absent_expressions import head_noun

    >>> [head_noun(text) for text in ("Two young men in hats", "the left corner of a red car", "sunglasses")]
    ['man', 'corner', 'sunglass']
    ```
    """
    words = _words(expression)
    end = next((place for place, word in enumerate(words) if place > 0 and word in _AFTER_HEAD), len(words))
    return _singular(words[end - 1]) if words else ""


def add_absent_expressions(dataset: datasets.Dataset, per_image: int, seed: int = 0) -> datasets.Dataset:
    """
    Adds rows whose expressions name nothing in their image. They are expressions of other images of the dataset whose
    [`head_noun`] is in none of the image's own expressions and, where the dataset has a column `sentence`, in none of
    its sentences. Words for people count as one, and colours and words like "something" are not drawn. Nobody has
    looked at the images, so a few of the things may be there without having been mentioned.

    Args:
        dataset (`datasets.Dataset`): one row per expression with `image`, `expression` and `box`.
        per_image (`int`): how many such rows each image gets, or fewer if the dataset has no more.
        seed (`int`, *optional*, defaults to 0): which expressions are drawn.

    Returns:
        `datasets.Dataset`: the rows of `dataset` with `absent` false, and after them the new ones, with `absent` true
        and `box` `None`. Other columns of a new row, apart from the image's, are `None`.

    Raises:
        ValueError: `per_image` is not positive, or the dataset has no column `box`.

    Example:

    ```python
    >>> from epmvg_hf.data.absent_expressions import add_absent_expressions

    >>> with_absent = add_absent_expressions(dataset, per_image=2)
    >>> len(dataset), len(with_absent), with_absent[-1]["box"], with_absent[-1]["absent"]
    (32, 39, None, True)
    ```
    """
    if per_image < 1:
        raise ValueError(f"per_image must be at least 1, got {per_image}")
    if "box" not in dataset.column_names:
        raise ValueError("absent expressions need a dataset with boxes, and this one has no column box")
    expressions: list[str] = dataset["expression"][:]
    pictures = number_pictures(dataset)
    mentioned: defaultdict[int, set[str]] = defaultdict(set)
    for name in ("expression", "sentence"):
        if name in dataset.column_names:
            texts = expressions if name == "expression" else dataset[name][:]
            for picture, text in zip(pictures.tolist(), texts, strict=True):
                mentioned[picture].update(map(_kind, _words(text or "")))

    nouns = [head_noun(expression) for expression in expressions]
    heads = ["" if noun in _NOT_THINGS else _kind(noun) for noun in nouns]
    random, rows, chosen = Random(seed), [], []
    first_rows = dict(zip(*(part.tolist() for part in np.unique(pictures, return_index=True)), strict=True))
    for picture, row in first_rows.items():
        found: set[str] = set()
        # Most draws succeed, so that ten for each wanted one are more than enough, unless nothing is absent.
        for _ in range(10 * per_image):
            other = random.randrange(len(expressions))
            if heads[other] and heads[other] not in mentioned[picture] and expressions[other] not in found:
                found.add(expressions[other])
                rows.append(row)
                chosen.append(expressions[other])
            if len(found) == per_image:
                break
    with bars_only_on_a_terminal():
        return _append(dataset, rows, chosen)


def _append(dataset: datasets.Dataset, rows: list[int], expressions: list[str]) -> datasets.Dataset:
    """The dataset and, after it, the images of `rows` with expressions that name nothing in them."""
    present = dataset if "absent" in dataset.column_names else _with_absent(dataset)
    if not rows:  # `datasets` cannot add columns to no rows
        return present
    of_images = [name for name in ("image", "image_id") if name in dataset.column_names]
    features = datasets.Features({**dataset.features, "absent": datasets.Value("bool")})
    added = dataset.select_columns(of_images).select(rows)
    count = len(expressions)
    for name in features:
        if name not in of_images:
            values = {"expression": expressions, "absent": [True] * count}.get(name, [None] * count)
            added = added.add_column(name, values, feature=features[name])
    return datasets.concatenate_datasets(
        [present.select_columns(list(features)), added.select_columns(list(features))]
    )


def _with_absent(dataset: datasets.Dataset) -> datasets.Dataset:
    return dataset.add_column("absent", [False] * len(dataset), feature=datasets.Value("bool"))


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def _kind(word: str) -> str:
    """What a word is compared by: its singular, and one word for all people."""
    singular = _singular(word)
    return "person" if singular in _PEOPLE else singular


def _singular(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "sses", "xes")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") and len(word) > 3 else word
