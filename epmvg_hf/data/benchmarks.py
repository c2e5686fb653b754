"""The benchmarks: what they are called, how they are split, what is in each split, and where their images lie."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from .files.image_files import ImageFolders

COCO_FOLDERS = (
    "images/mscoco/images/train2014",  # refer API, whose folder data holds annotations and images
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
    """What a split officially has; `None` where no count is published."""

    expressions: int
    references: int | None
    images: int | None


@dataclass(frozen=True)
class Benchmark:
    """
    One benchmark.

    Args:
        name (`str`): as [`load_grounding_dataset`] and the cache know it.
        title (`str`): as papers write it.
        splits (`dict[str, tuple[str, ...]]`): the splits of each way to split it; the first way is the default.
        image_folders (`tuple[str, ...]`): patterns of folders with images, in the order in which they count.
        index_names (`dict[str, str]`): how the index files of TransVG name each way to split it.
        counts (`dict[tuple[str, str], Counts]`): by way to split it and split.
    """

    name: str
    title: str
    splits: dict[str, tuple[str, ...]]
    image_folders: tuple[str, ...]
    index_names: dict[str, str]
    counts: dict[tuple[str, str], Counts] = field(default_factory=dict)


@dataclass(frozen=True)
class Wanted:
    """
    One split of a benchmark, to be found in a folder.

    Args:
        benchmark ([`Benchmark`]): the benchmark.
        data_dir (`Path`): folder with its files.
        split (`str`): full name of the split.
        split_by (`str`): the way to split.
        images ([`ImageFolders`]): where its images are.
        boxes (`str`, *optional*, defaults to `"union"`): `"union"` or `"any"`, see [`load_grounding_dataset`].
        cache_dir (`str`, *optional*): where images that are no files yet are written, by default the cache of
            `datasets`.
    """

    benchmark: Benchmark
    data_dir: Path
    split: str
    split_by: str
    images: ImageFolders
    boxes: str = "union"
    cache_dir: str | None = None

    @classmethod
    def check(
        cls,
        benchmark: Benchmark,
        data_dir: Path,
        split: str,
        split_by: str | None = None,
        image_dir: Path | None = None,
        boxes: str = "union",
        cache_dir: str | None = None,
    ) -> "Wanted":
        """
        From what a caller said: `split` may be "val", `split_by` defaults to the benchmark's first way, and images are
        looked for in `image_dir`, or else in the usual folders below `data_dir`.

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
        if boxes == "any" and benchmark.name != "flickr30k_entities":
            raise ValueError(f'boxes must be "union" for {benchmark.title}, whose expressions have one box each.')
        folders = [image_dir] if image_dir else sorted_matches(data_dir, benchmark.image_folders)
        return cls(benchmark, data_dir, full, split_by, ImageFolders(folders), boxes, cache_dir)


def full_split_name(split: str) -> str:
    """What we call a split: "validation" for "val"; the others are called alike everywhere."""
    return "validation" if split == "val" else split


def short_split_name(split: str) -> str:
    """What most files call a split: "val" for "validation"; the others are called alike everywhere."""
    return "val" if split == "validation" else split


def sorted_matches(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """What the patterns find below a folder, pattern by pattern; plain names whether they are there or not."""
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
        Benchmark(
            "referitgame",
            "ReferItGame",
            # The first is that of the phrase grounding papers; the others are those of the refer API ("refclef").
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

# What else papers, the refer API and other repositories call them, and the way to split that the name implies.
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
    The benchmark that a name means, and the way to split it if the name says that too: `"refcoco"`, `"RefCOCO+"`,
    `"refcocoplus"`, `"refcocog_google"`, `"unc"`, `"gref_umd"`, ...

    Raises:
        `ValueError`: No benchmark is called that.

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
