"""One call that gives any of the benchmarks as rows of image, expression and box."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets


def load_grounding_dataset(
    name: str,
    data_dir: str | os.PathLike | None = None,
    split: str = "train",
    split_by: str | None = None,
    missing_images: str = "error",
    streaming: bool = False,
    seed: int = 0,
    num_images: int | None = None,
    num_proc: int | None = None,
    cache_dir: str | None = None,
) -> "datasets.Dataset | datasets.IterableDataset":
    """
    Loads one split of a visual grounding benchmark, one row per expression. Nothing is downloaded. The rows of one
    image are consecutive.

    Args:
        name (`str`):
            `"shapes"` (drawn scenes, made on the spot) or `"flickr30k_entities"` (read from `data_dir`).
        data_dir (`str` or `os.PathLike`, *optional*):
            Folder with the benchmark in its official layout, see
            [`~flickr30k_entities.load_flickr30k_entities`]. Not for `"shapes"`.
        split (`str`, *optional*, defaults to `"train"`):
            `"train"`, `"validation"` (or `"val"`) or `"test"`; for `"shapes"` also `"test_composition"`.
        split_by (`str`, *optional*):
            Which of several published ways to split a benchmark. Neither benchmark has more than one.
        missing_images (`str`, *optional*, defaults to `"error"`):
            What to do about images that are not in `data_dir`: `"error"`, `"skip"` (leave out their rows) or `"keep"`
            (rows whose image is `None`). Not for `"shapes"`.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to make rows while iterating, with nothing written to the cache.
        seed (`int`, *optional*, defaults to 0):
            Seed of the scenes. Only for `"shapes"`.
        num_images (`int`, *optional*):
            Number of scenes. Only for `"shapes"`.
        num_proc (`int`, *optional*):
            Number of processes that prepare the rows. Without effect when streaming.
        cache_dir (`str`, *optional*):
            Where prepared rows are kept. Defaults to the cache of `datasets`.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset` with the columns
        - **image** -- the image, decoded to `PIL.Image.Image` when the row is read.
        - **image_id** (`str`) -- the same for all expressions of one image.
        - **expression** (`str`) -- what the box is to be found by.
        - **box** (`list[float]`) -- `[xmin, ymin, xmax, ymax]` in pixels of the original image (the one in this row),
          0-based and half-open: the whole image is `[0, 0, width, height]`.

        and those of the benchmark. For `"shapes"`
        - **kind** (`str`) -- what singles the object out, such as `"attribute"` or `"relation"`.
        - **objects** (`list[dict]`) -- every object of the scene.

        For `"flickr30k_entities"`
        - **sentence** (`str`), **sentence_id** (`int`) -- the sentence the expression is a phrase of, one of 0 to 4.
        - **chain_id** (`str`) -- the thing meant; phrases of several sentences may mean the same.
        - **phrase_types** (`list[str]`) -- such as `["people"]`.
        - **num_boxes** (`int`) -- the number of annotated boxes; `box` is the smallest box around them.

    Raises:
        `ValueError`: A name, split or other argument is not valid for the benchmark, or a file has invalid content.
        `FileNotFoundError`: Files of the benchmark are missing.
        `ImportError`: `datasets` is not installed.

    Example:

    ```python
    >>> from epmvg_hf import load_grounding_dataset

    >>> dataset = load_grounding_dataset("shapes", split="validation", num_images=10)
    >>> row = dataset[0]
    >>> row["image"].crop(row["box"])
    ```
    """
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise ImportError('Loading a dataset needs `datasets`: pip install "epmvg_hf[train]"') from error

    split = "validation" if split == "val" else split
    if name == "shapes":
        images = None if missing_images == "error" else missing_images
        refuse(name, data_dir=data_dir, split_by=split_by, missing_images=images)
        from .shapes import load_shapes

        return load_shapes(split, seed, num_images, streaming, num_proc, cache_dir)
    elif name == "flickr30k_entities":
        refuse(name, split_by=split_by, num_images=num_images, seed=seed or None)
        if data_dir is None:
            raise ValueError(
                'data_dir is needed for "flickr30k_entities": the folder with its annotations, id lists and images.'
            )
        from .flickr30k_entities import load_flickr30k_entities

        return load_flickr30k_entities(data_dir, split, missing_images, streaming, num_proc, cache_dir)
    raise ValueError(f'name must be "shapes" or "flickr30k_entities", not {name!r}.')


def refuse(name: str, **arguments: object) -> None:
    """Raises for the first argument that was given but means nothing for this benchmark."""
    valid = {"shapes": "seed and num_images", "flickr30k_entities": "data_dir and missing_images"}[name]
    for argument, value in arguments.items():
        if value is not None:
            raise ValueError(f'{argument} does not apply to "{name}"; of its own it takes {valid}.')
