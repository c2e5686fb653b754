"""The benchmarks: their names, their splits, the published counts of each split, and where their images are."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from .files.image_files import ImageFolders

COCO_FOLDERS = (
    "images/mscoco/images/train2014",  # the refer API, whose folder "data" holds annotations and images
    "../images/mscoco/images/train2014",
    "data/images/mscoco/images/train2014",
    "other/images/mscoco/images/train2014",  # TransVG
    "mscoco/images/train2014",
    "images/train2014",
    "coco/train2014",
    "train2014",
    "images",
)
SAIAPR_FOLDERS = (
    "images/saiapr_tc-12/*/images",  # refer API
    "../images/saiapr_tc-12/*/images",
    "data/images/saiapr_tc-12/*/images",
    "saiapr_tc-12/*/images",
    "referit/images",  # TransVG
    "images",
)
FLICKR_FOLDERS = ("flickr30k_images", "flickr30k-images", "Flickr30k/flickr30k_images", "Flickr30k/flickr30k-images")


@dataclass(frozen=True)
class Counts:
    """The published size of a split; `None` where no count is published."""

    expressions: int
    references: int | None
    images: int | None


@dataclass(frozen=True)
class Benchmark:
    """
    One benchmark. Some have been split in several ways, each by the authors of another paper: `split_by` is the name
    that the refer API gives to such a way ("unc", "google", "umd", "berkeley"), or "standard".

    Args:
        name (`str`): The name that [`load_grounding_dataset`] takes and the cache uses.
        title (`str`): The name as papers write it.
        splits (`dict[str, tuple[str, ...]]`): The splits by `split_by`, of which the first is the default.
        image_folders (`tuple[str, ...]`):
            Patterns of folders that may hold the images. Where two have a file of the same name, the first one's is
            used.
        index_names (`dict[str, str]`): The names that TransVG's index files have, by `split_by`.
        counts (`dict[tuple[str, str], Counts]`): The published counts by `split_by` and split.
    """

    name: str
    title: str
    splits: dict[str, tuple[str, ...]]
    image_folders: tuple[str, ...]
    index_names: dict[str, str]
    counts: dict[tuple[str, str], Counts] = field(default_factory=dict)


@dataclass(frozen=True)
class SplitRequest:
    """
    A request for one split of a benchmark, which readers answer if the data folder has files of their format.

    Args:
        benchmark ([`Benchmark`]): The benchmark.
        data_dir (`Path`): The folder with its files.
        split (`str`): The split, by its full name ("validation", not "val").
        split_by (`str`): The way to split the benchmark.
        images ([`ImageFolders`]): The image files.
        boxes (`str`, *optional*, defaults to `"union"`): `"union"` or `"any"`, see [`load_grounding_dataset`].
        cache_dir (`str`, *optional*):
            Where images that are stored inside other files are written. Defaults to the cache of `datasets`.
    """

    benchmark: Benchmark
    data_dir: Path
    split: str
    split_by: str
    images: ImageFolders
    boxes: str = "union"
    cache_dir: str | None = None

    @classmethod
    def resolve(
        cls,
        benchmark: Benchmark,
        data_dir: Path,
        split: str,
        split_by: str | None = None,
        image_dir: Path | None = None,
        boxes: str = "union",
        cache_dir: str | None = None,
    ) -> "SplitRequest":
        """
        Checks the arguments of a caller and fills in their defaults.

        Args:
            benchmark ([`Benchmark`]): The benchmark.
            data_dir (`Path`): The folder with its files.
            split (`str`): The split, also "val" for "validation".
            split_by (`str`, *optional*): The way to split the benchmark. Defaults to the benchmark's first.
            image_dir (`Path`, *optional*):
                The folder with the images. By default they are looked for in the usual folders below `data_dir`.
            boxes (`str`, *optional*, defaults to `"union"`): See [`load_grounding_dataset`].
            cache_dir (`str`, *optional*): See [`SplitRequest`].

        Raises:
            `ValueError`: The benchmark has no such way to split, split or boxes.
        """
        split_by = split_by or next(iter(benchmark.splits))
        if split_by not in benchmark.splits:
            raise ValueError(f"{benchmark.title} can be split by {', '.join(benchmark.splits)}, not by {split_by!r}.")
        splits = benchmark.splits[split_by]
        full = full_split_name(split)
        if full not in splits:
            way = f" split by {split_by}" if len(benchmark.splits) > 1 else ""
            raise ValueError(f"{benchmark.title}{way} has the splits {', '.join(splits)}, not {split!r}.")
        if boxes not in ("union", "any"):
            raise ValueError(f'boxes must be "union" or "any", not {boxes!r}.')
        if boxes == "any" and benchmark.name not in ("grefcoco", "flickr30k_entities"):
            raise ValueError(f'boxes must be "union" for {benchmark.title}, whose expressions have one box each.')
        folders = [image_dir] if image_dir else _image_folders(data_dir, benchmark.image_folders)
        return cls(benchmark, data_dir, full, split_by, ImageFolders(folders), boxes, cache_dir)


def full_split_name(split: str) -> str:
    """Replaces "val", as most files call that split, by the name that `datasets` uses: "validation"."""
    return "validation" if split == "val" else split


def short_split_name(split: str) -> str:
    """Replaces "validation" by "val", as most files call that split."""
    return "val" if split == "validation" else split


def _image_folders(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """The folders that match the patterns, in their order; one without `*` counts even if there is no folder."""
    found = []
    for pattern in patterns:
        found += sorted(folder.glob(pattern)) if "*" in pattern else [folder / pattern]
    return found


UNC = ("train", "validation", "testA", "testB")
UMD = ("train", "validation", "test")

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "refcoco",
            "RefCOCO",
            {"unc": UNC, "google": UMD},
            COCO_FOLDERS,
            {"unc": "unc"},
            {
                ("unc", "train"): Counts(120_624, 42_404, 16_994),
                ("unc", "validation"): Counts(10_834, 3_811, 1_500),
                ("unc", "testA"): Counts(5_657, 1_975, 750),
                ("unc", "testB"): Counts(5_095, 1_810, 750),
            },
        ),
        Benchmark(
            "refcoco+",
            "RefCOCO+",
            {"unc": UNC},
            COCO_FOLDERS,
            {"unc": "unc+"},
            {
                ("unc", "train"): Counts(120_191, 42_278, 16_992),
                ("unc", "validation"): Counts(10_758, 3_805, 1_500),
                ("unc", "testA"): Counts(5_726, 1_975, 750),
                ("unc", "testB"): Counts(4_889, 1_798, 750),
            },
        ),
        Benchmark(
            "refcocog",
            "RefCOCOg",
            {"umd": UMD, "google": ("train", "validation")},
            COCO_FOLDERS,
            {"umd": "gref_umd", "google": "gref"},
            {
                ("umd", "train"): Counts(80_512, 42_226, 21_899),
                ("umd", "validation"): Counts(4_896, 2_573, 1_300),
                ("umd", "test"): Counts(9_602, 5_023, 2_600),
                ("google", "train"): Counts(85_474, 44_822, 24_698),
                ("google", "validation"): Counts(9_536, 5_000, 4_650),
            },
        ),
        # He et al., 2023, arXiv 2308.16182.
        Benchmark("grefcoco", "gRefCOCO", {"unc": UNC}, COCO_FOLDERS, {}),
        Benchmark(
            "referitgame",
            "ReferItGame",
            # Papers on phrase grounding use the first; the others are those of the refer API ("refclef").
            {
                "standard": ("train", "validation", "trainval", "test"),
                "unc": ("train", "validation", "testA", "testB", "testC"),
                "berkeley": UMD,
            },
            SAIAPR_FOLDERS,
            {"standard": "referit"},
            {
                ("standard", "train"): Counts(54_134, 44_649, 8_995),
                ("standard", "validation"): Counts(5_842, 4_866, 1_000),
                ("standard", "trainval"): Counts(59_976, 49_515, 9_995),
                ("standard", "test"): Counts(60_105, 49_730, 9_994),
            },
        ),
        Benchmark(
            "flickr30k_entities",
            "Flickr30K Entities",
            {"standard": UMD},
            FLICKR_FOLDERS,
            {"standard": "flickr"},
            {
                ("standard", "train"): Counts(427_226, None, None),
                ("standard", "validation"): Counts(14_433, None, None),
                ("standard", "test"): Counts(14_481, None, 999),
            },
        ),
    )
}

# Other names of the benchmarks in papers and repositories, and the way to split that a name implies.
ALIASES = {
    "unc": ("refcoco", "unc"),
    "unc+": ("refcoco+", "unc"),
    "uncplus": ("refcoco+", "unc"),
    "refcocoplus": ("refcoco+", None),
    "refcocop": ("refcoco+", None),
    "gref": ("refcocog", "google"),  # TransVG's name for that split
    "grefumd": ("refcocog", "umd"),
    "referit": ("referitgame", None),
    "refclef": ("referitgame", None),
    "flickr": ("flickr30k_entities", None),
    "flickr30k": ("flickr30k_entities", None),
}


def resolve_name(name: str) -> tuple[Benchmark, str | None]:
    """
    Finds the benchmark that a name means.

    Args:
        name (`str`):
            A name that is in use, with or without the way to split: `"refcoco"`, `"RefCOCO+"`, `"refcocoplus"`,
            `"refcocog_google"`, `"unc"`, `"gref_umd"`, ...

    Returns:
        `tuple[Benchmark, str or None]`: The benchmark, and the way to split if the name says it.

    Raises:
        `ValueError`: No benchmark has that name.

    Example:

    ```python
    >>> from epmvg_hf.data.benchmarks import resolve_name

    >>> benchmark, split_by = resolve_name("gref_umd")
    >>> benchmark.title, split_by, benchmark.counts["umd", "test"].expressions
    ('RefCOCOg', 'umd', 9602)
    ```
    """
    known = {_simplify(benchmark): (benchmark, None) for benchmark in BENCHMARKS} | ALIASES
    simple = _simplify(name)
    if simple in known:
        benchmark, split_by = known[simple]
        return BENCHMARKS[benchmark], split_by
    for start, (benchmark, implied) in known.items():
        way = simple.removeprefix(start)
        if simple.startswith(start) and way in BENCHMARKS[benchmark].splits and implied in (None, way):
            return BENCHMARKS[benchmark], way
    raise ValueError(f"name must be one of {', '.join(BENCHMARKS)}, shapes and custom, not {name!r}.")


def _simplify(name: str) -> str:
    return re.sub(r"[-_\s]+", "", name.lower())
