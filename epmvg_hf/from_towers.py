"""The classmethod that starts a model from pretrained towers, free of the code of any of them."""

import inspect
from typing import Any, Literal, Self, overload

from transformers import MODEL_MAPPING, PreTrainedConfig


class FromTowersMixin:
    """Lets a model start from pretrained towers."""

    @overload
    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision: str,
        text: str,
        out_features: list[str] | None = None,
        output_loading_info: Literal[False] = False,
        **config: Any,
    ) -> Self: ...

    @overload
    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision: str,
        text: str,
        out_features: list[str] | None = None,
        *,
        output_loading_info: Literal[True],
        **config: Any,
    ) -> tuple[Self, list[dict[str, Any]]]: ...

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision: str,
        text: str,
        out_features: list[str] | None = None,
        output_loading_info: bool = False,
        **config: Any,
    ) -> Self | tuple[Self, list[dict[str, Any]]]:
        r"""
        A new model whose towers are pretrained; the fusion transformer and whatever else no checkpoint holds are
        fresh. A table of it is logged. `EpmVGProcessor.from_vision_text_pretrained` makes the processor to it.

        Args:
            vision (`str`): folder or Hub id of a DETR (its backbone and encoder), a CLIP or a ViT, a timm model, or
                anything that `AutoBackbone` takes.
            text (`str`): folder or Hub id of a BERT, RoBERTa, DistilBERT, CLIP, or another text encoder.
            out_features (`list[str]`, *optional*): the backbone's feature maps to use, such as `["stage1", "stage4",
                "stage8", "stage12"]` for CLIP-VG's of ViT-B/16; by default the last one.
            output_loading_info (`bool`, *optional*, defaults to `False`): also return the table's rows.
            config: settings of [`EpmVGConfig`] other than the towers' and `backbone_stride`. Those of its encoder come
                from a DETR; `image_size` is by default that of a CLIP or ViT, else 640.

        Returns:
            The model in evaluation mode, float32; with `output_loading_info` a tuple with a list of dictionaries:
            `part`, `source` (`None` if fresh), `parameters`, and the names of tensors `fresh` and `unused`.

        Raises:
            ValueError: a checkpoint is no such tower, or lacks tensors; `image_size` is not a multiple of the
                backbone's stride; `max_text_length` is beyond the text tower's positions; a setting contradicts
                DETR's.

        Example:

        ```python
        >>> from epmvg_hf import EpmVGForVisualGrounding

        >>> model, rows = EpmVGForVisualGrounding.from_vision_text_pretrained(
        ...     "facebook/detr-resnet-50", "google-bert/bert-base-uncased", output_loading_info=True
        ... )
        >>> [row["part"] for row in rows if row["source"] is not None]  # the others are fresh
        ['vision_model', 'input_projection', 'encoder', 'text_model']
        ```
        """
        # Here, as it loads the code of many towers.
        from .pretrained_towers import model_from_towers

        model, rows = model_from_towers(cls, vision, text, out_features, **config)
        return (model, rows) if output_loading_info else model


def without_pooling(tower_config: PreTrainedConfig) -> dict[str, bool]:
    """The argument that leaves out the pooling layer that some towers have and that would never get a gradient."""
    signature = inspect.signature(MODEL_MAPPING[type(tower_config)].__init__)
    return {"add_pooling_layer": False} if "add_pooling_layer" in signature.parameters else {}
