"""The model that a run trains: a saved one, a new one with pretrained towers, or a new one from a configuration."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoTokenizer, PreTrainedConfig

from ..model.configuration_epmvg import EpmVGConfig
from ..model.image_processing_epmvg import EpmVGImageProcessor
from ..model.modeling_epmvg import EpmVGForVisualGrounding
from ..model.processing_epmvg import EpmVGProcessor
from ..utils import needs_extra
from .arguments import ModelArguments
from .trained_tokenizer import train_tokenizer

if TYPE_CHECKING:
    from peft import PeftModel


def make_model(
    arguments: ModelArguments, expressions: list[str], teacher_projection_dim: int | None
) -> tuple[EpmVGForVisualGrounding, EpmVGProcessor]:
    """
    Load or make the model and its processor.

    Args:
        arguments ([`ModelArguments`]): what to load or make.
        expressions (`list[str]`): training expressions, from which the tokenizer of a new model is made.
        teacher_projection_dim (`int`, *optional*): width of the teacher's space, for a student that needs projections
            into it.

    Raises:
        ValueError: the arguments contradict each other.
    """
    if arguments.model_name_or_path is not None:
        return load_model(arguments.model_name_or_path, arguments, teacher_projection_dim)
    if arguments.lora_rank is not None:
        raise ValueError(
            "lora_rank needs model_name_or_path, because an adapter is saved without the model that it belongs to"
        )
    vision, text = arguments.vision_name_or_path, arguments.text_name_or_path
    if (vision is None) != (text is None):
        raise ValueError("vision_name_or_path and text_name_or_path must be given together")
    if arguments.config_name is None and vision is None:
        raise ValueError(
            "no model is named: give model_name_or_path, or for a new one config_name, vision_name_or_path and "
            "text_name_or_path, or both"
        )
    settings = {} if arguments.config_name is None else json.loads(Path(arguments.config_name).read_text())
    asked = {
        "image_size": arguments.image_size,
        "box_refinement": arguments.box_refinement,
        "max_text_length": arguments.max_text_length,
        "teacher_projection_dim": teacher_projection_dim,
    }
    settings |= {name: value for name, value in asked.items() if value is not None}
    if vision is not None and text is not None:
        settings.pop("text_config", None)
        if settings.pop("backbone_config", None) is not None:
            settings.pop("backbone_stride", None)
        model = EpmVGForVisualGrounding.from_vision_text_pretrained(
            vision, text, attn_implementation=arguments.attn_implementation, **settings
        )
        return model, EpmVGProcessor.from_vision_text_pretrained(vision, text, model.config)

    config = EpmVGConfig(**settings)
    text_config: PreTrainedConfig = config.text_config
    if arguments.tokenizer_name is not None:
        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer_name)
    else:
        tokenizer = train_tokenizer(expressions, text_config.vocab_size)
    text_config.vocab_size = len(tokenizer)
    image_processor = EpmVGImageProcessor(size={"height": config.image_size, "width": config.image_size})
    config._attn_implementation = arguments.attn_implementation
    return EpmVGForVisualGrounding(config), EpmVGProcessor(image_processor, tokenizer, config.max_text_length)


def load_model(
    folder: str, arguments: ModelArguments, teacher_projection_dim: int | None
) -> tuple[EpmVGForVisualGrounding, EpmVGProcessor]:
    """Load a saved model and its processor, and give it the new parts and the canvas that are asked for."""
    for name in ("vision_name_or_path", "text_name_or_path", "max_text_length"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"a saved model has its own {name}: leave that out, or model_name_or_path")
    config = EpmVGConfig.from_pretrained(folder)
    changes = []
    if config.teacher_projection_dim is None and teacher_projection_dim is not None:
        config.teacher_projection_dim = teacher_projection_dim
        changes.append("the projections that the relation and feature losses need")
    if arguments.box_refinement is not None and arguments.box_refinement != config.box_refinement:
        config.box_refinement = arguments.box_refinement
        changes.append(f"box_refinement {arguments.box_refinement}")
    image_size = arguments.image_size
    if image_size not in (None, config.image_size):
        changes.append(f"image_size {image_size}")
    if changes and arguments.lora_rank is not None:
        raise ValueError(f"with lora_rank only an adapter is saved, which fits {folder} without {', '.join(changes)}")
    model = EpmVGForVisualGrounding.from_pretrained(
        folder, config=config, attn_implementation=arguments.attn_implementation
    )
    processor = EpmVGProcessor.from_pretrained(folder)
    if image_size is not None:
        model.resize_canvas(image_size)
        processor.image_processor.size = {"height": image_size, "width": image_size}
    return model, processor


def with_lora(model: EpmVGForVisualGrounding, rank: int, target_modules: str) -> "PeftModel":
    """Freeze the model and add a new LoRA adapter of this rank, which is all that will be trained and saved."""
    with needs_extra("lora_rank", "peft"):
        from peft import LoraConfig, get_peft_model
    # peft scales the adapter by alpha / rank. With alpha = rank, one learning rate suits every rank.
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=target_modules))
