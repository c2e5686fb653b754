"""Outputs of towers that are not trained, computed once and read back in every training step."""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedConfig

from ..data.image_groups import ImageGroup, ImageGroups
from ..data.pictures import fingerprint_files
from ..distillation.fingerprints import content_of, fingerprint_of, settings_of
from ..distillation.output_cache import (
    CachedExpressions,
    CachedImages,
    Columns,
    autocast_dtype,
    complete,
    make_folder,
    process_images,
    split,
    to_tensor,
)
from ..model.modeling_epmvg import EpmVGForVisualGrounding
from ..model.processing_epmvg import EpmVGProcessor
from .callbacks import EpochCallback

logger = logging.getLogger(__name__)

# Part of every key. Raise it when a change of the code changes the files, or what the towers are given.
_FORMAT_VERSION = 3

# A shard is the unit in which processes share the work, and all that is lost when one of them is killed. The features
# of an image take up to some megabytes.
_IMAGES_PER_SHARD = 64
_EXPRESSIONS_PER_SHARD = 4096
_EXPRESSIONS_PER_BATCH = 64

# Settings of a tower that have no influence on its outputs.
_IRRELEVANT_SETTINGS = ("_name_or_path", "architectures", "transformers_version")


class TowerOutputs:
    """
    What the frozen towers gave for the images and expressions of the training data: nothing at first, until
    [`FrozenTowers`] adds it. It can be sent to the workers of a data loader, which see when it is no longer `in_use`.

    Attributes:
        images ([`~output_cache.CachedImages`] or `None`): what the vision backbone gave.
        expressions ([`~output_cache.CachedExpressions`] or `None`): what the text tower gave.
        in_use (`torch.BoolTensor` of shape `(2,)`): whether the batches take the images' and the expressions' outputs.
    """

    def __init__(self) -> None:
        self.images: CachedImages | None = None
        self.expressions: CachedExpressions | None = None
        # Workers may live longer than an epoch, so they must see that the training of the towers begins.
        self.in_use = torch.zeros(2, dtype=torch.bool).share_memory_()

    def __call__(self, groups: Sequence[int], expressions: Sequence[str]) -> dict[str, torch.Tensor]:
        """
        Reads the inputs of a batch that stand in for pixels and tokens.

        Args:
            groups (`Sequence[int]`): numbers of B images.
            expressions (`Sequence[str]`): N expressions.

        Returns:
            `dict`: of the images `backbone_features` (B, C, grid_height, grid_width), float32, `visual_mask`
            (B, grid_height, grid_width), `letterbox` (B, 4) and `original_sizes` (B, 2); of the expressions
            `text_hidden_states` (N, L, hidden_size), float32 and 0 on padding, and `attention_mask` (N, L). What is
            not in use is left out.
        """
        outputs: dict[str, torch.Tensor] = {}
        use_images, use_expressions = self.in_use.tolist()
        if use_images and self.images is not None:
            table = self.images.lookup(groups)
            outputs |= {name: to_tensor(table[name]) for name in table.column_names}
            outputs["backbone_features"] = outputs["backbone_features"].float()
            outputs["visual_mask"] = outputs["visual_mask"].long()
        if use_expressions and self.expressions is not None:
            column = self.expressions.lookup(expressions)["text_hidden_states"]
            lengths = torch.tensor(column.combine_chunks().value_lengths().to_numpy())
            mask = torch.arange(int(lengths.max())) < lengths[:, None]
            states = to_tensor(column)
            padded = torch.zeros(*mask.shape, states.shape[1])
            padded[mask] = states.float()
            outputs |= {"text_hidden_states": padded, "attention_mask": mask.long()}
        return outputs


class TowerImageGroups(ImageGroups):
    """[`ImageGroups`] that do not decode the images while their features are known."""

    def __init__(self, dataset: datasets.Dataset, outputs: TowerOutputs):
        super().__init__(dataset)
        self.outputs = outputs

    def __getitem__(self, index: int) -> ImageGroup:
        return self.group(index, with_image=not self.outputs.in_use[0])


class FrozenTowers(EpochCallback):
    """
    Computes the outputs of the student's towers before the first epoch, where nothing of a tower is trained in it, and
    withdraws them before the first epoch in which something is. Warns of a tower whose outputs cannot be kept.

    What identifies a cache is the tower with its weights, the dtypes that it computes and is stored in, the settings
    of the image processor or the tokenizer, the fingerprint of the dataset, and sizes and times of change of the image
    files that it names. Neither the device nor the attention
    implementation is part of that, although both decide the last bits.

    Args:
        student ([`EpmVGForVisualGrounding`]): the student.
        processor ([`EpmVGProcessor`]): makes the inputs of the towers.
        accelerator (`Accelerator`): gives the precision and the other processes.
        batch_size (`int`): how many images the vision backbone sees at a time. Processors choose among ways to compute
            a convolution by this number, and the last bits differ: with the batch size of the training there is no
            difference to a training without the cache.
        cache_dir (`str`, *optional*): folder for the outputs, by default in the cache of `datasets`.
        dtype (`str`, *optional*, defaults to `"float32"`): type of the numbers on disk, or `"float16"`.
        disable_tqdm (`bool`, *optional*, defaults to `False`): whether to hide the progress bars.

    Attributes:
        outputs ([`TowerOutputs`]): for the collator.
        datasets (`list[datasets.Dataset]`): the training data; images are numbered through all of them.
        obstacles (`dict[str, str]`): why the outputs of `"vision backbone"` or `"text tower"` cannot be kept.
    """

    def __init__(
        self,
        student: EpmVGForVisualGrounding,
        processor: EpmVGProcessor,
        accelerator: Accelerator,
        batch_size: int,
        cache_dir: str | os.PathLike | None = None,
        dtype: str = "float32",
        disable_tqdm: bool = False,
    ):
        self.student, self.processor, self.accelerator = student.model, processor, accelerator
        self.batch_size = batch_size
        self.cache_dir, self.dtype, self.disable_tqdm = cache_dir, getattr(torch, dtype), disable_tqdm
        self.outputs = TowerOutputs()
        self.datasets: list[datasets.Dataset] = []
        self.obstacles: dict[str, str] = {}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        super().on_train_begin(*args, **kwargs)
        self.outputs.images = self.outputs.expressions = None
        self._begun = False

    def begin_epoch(self, epoch: int) -> None:
        towers = {"vision backbone": self.student.vision_model, "text tower": self.student.text_model}
        for position, (name, tower) in enumerate(towers.items()):
            trained = sum(parameter.requires_grad for parameter in tower.parameters())
            obstacle = f"{trained} of its parameters are trained" if trained else self.obstacles.get(name)
            if not self._begun and obstacle is None:
                tower.eval()
                with torch.no_grad(), self.accelerator.autocast():
                    if tower is self.student.vision_model:
                        self.outputs.images = self._cache_images()
                    else:
                        self.outputs.expressions = self._cache_expressions()
            elif not self._begun and self.accelerator.is_local_main_process:
                logger.warning("cache_frozen_towers: the %s runs in every step, because %s", name, obstacle)
            # What is not trained in the first epoch may be trained in a later one, but not the other way round.
            self.outputs.in_use[position] = obstacle is None and (not self._begun or self.outputs.in_use[position])
        self._begun = True

    def _cache_images(self) -> CachedImages:
        shards = [shard for dataset in self.datasets for shard in self._image_shards(ImageGroups(dataset), dataset)]
        return CachedImages(shards, "cache of the vision backbone")

    def _image_shards(self, groups: ImageGroups, dataset: datasets.Dataset) -> list[Path]:
        image_processor = self.processor.image_processor
        # A batch that is larger than a shard would be filled up with images that are thrown away.
        images_per_shard = max(_IMAGES_PER_SHARD, self.batch_size)
        folder = make_folder(
            self.cache_dir,
            "epmvg_towers",
            {
                **self._key(self.student.vision_model, self.student.config.backbone_config, dataset),
                "image_processor": settings_of(image_processor),
                "images": len(groups),
                "files": fingerprint_files(groups.images),
                "images_per_shard": images_per_shard,
            },
        )

        def encode(start: int, stop: int) -> Columns:
            inputs = process_images(groups, start, stop, image_processor, "the vision backbone")
            count = stop - start
            # A smaller batch is filled up with its last image.
            rows = [min(row, count - 1) for row in range(self.batch_size)]
            pixels = (inputs[name][rows].to(self.student.device) for name in ("pixel_values", "pixel_mask"))
            features, mask = self.student.encode_pixels(*pixels)
            return {
                "backbone_features": self._to_disk(features[:count]),
                "visual_mask": mask[:count].to("cpu", torch.uint8).numpy(),
                **{name: inputs[name].numpy() for name in ("letterbox", "original_sizes")},
            }

        columns = ("backbone_features", "visual_mask", "letterbox", "original_sizes")
        shards = split(folder, "images", len(groups), images_per_shard, columns)
        return complete(shards, encode, self.batch_size, "Vision backbone: images", self.disable_tqdm)

    def _cache_expressions(self) -> CachedExpressions:
        shards = [shard for dataset in self.datasets for shard in self._expression_shards(dataset)]
        return CachedExpressions(shards, "cache of the text tower")

    def _expression_shards(self, dataset: datasets.Dataset) -> list[Path]:
        # Expressions of about the same length need little padding.
        distinct = set(dataset.select_columns(["expression"])[:]["expression"])
        expressions = sorted(distinct, key=lambda expression: (len(expression), expression))
        folder = make_folder(
            self.cache_dir,
            "epmvg_towers",
            {
                **self._key(self.student.text_model, self.student.config.text_config, dataset),
                "tokenizer": content_of(self.processor.tokenizer),
                "max_text_length": self.processor.max_text_length,
                "do_lower_case": self.processor.do_lower_case,
                "expressions": len(expressions),
                "expressions_per_shard": _EXPRESSIONS_PER_SHARD,
            },
        )

        def encode(start: int, stop: int) -> Columns:
            inputs = self.processor(text=expressions[start:stop]).to(self.student.device)
            states = self._to_disk(self.student.get_text_features(**inputs).last_hidden_state)
            lengths = inputs["attention_mask"].sum(1).tolist()
            return {
                "expression": np.array(expressions[start:stop], object),
                "text_hidden_states": [row[:length] for row, length in zip(states, lengths, strict=True)],
            }

        columns = ("expression", "text_hidden_states")
        shards = split(folder, "expressions", len(expressions), _EXPRESSIONS_PER_SHARD, columns)
        return complete(shards, encode, _EXPRESSIONS_PER_BATCH, "Text tower: expressions", self.disable_tqdm)

    def _key(self, tower: nn.Module, config: PreTrainedConfig, dataset: datasets.Dataset) -> dict[str, Any]:
        settings = {
            name: value
            for name, value in json.loads(config.to_json_string(use_diff=False)).items()
            if name not in _IRRELEVANT_SETTINGS
        }
        return {
            "format_version": _FORMAT_VERSION,
            "tower": fingerprint_of(tower, settings),
            "autocast": autocast_dtype(self.student.device),
            "dtype": str(self.dtype),
            "dataset": dataset._fingerprint,
        }

    def _to_disk(self, states: torch.Tensor) -> np.ndarray:
        """States as an array of the type of the files."""
        stored = states.to("cpu", self.dtype)
        if not stored.isfinite().all():
            raise ValueError(
                f"a frozen tower gave numbers that {self.dtype} cannot hold: set tower_cache_dtype to float32, or "
                "cache_frozen_towers to false"
            )
        return stored.numpy()
