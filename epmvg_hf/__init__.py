"""Visual grounding for transformers: one image and one expression in, one box out."""

import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .utils import needs_extra, without_enum_warnings

if TYPE_CHECKING:
    from .data.hf_dataset import as_grounding_dataset
    from .data.image_groups import ImageGroups
    from .data.loading import load_grounding_dataset
    from .distillation.clip_teacher import ClipTeacher, TeacherOutput
    from .distillation.teacher_boxes import add_teacher_boxes, confirm_boxes
    from .evaluation.accuracy import GroundingAccuracy
    from .model.configuration_epmvg import EpmVGConfig
    from .model.image_processing_epmvg import EpmVGImageProcessor
    from .model.image_processing_pil_epmvg import EpmVGImageProcessorPil
    from .model.modeling_epmvg import EpmVGForVisualGrounding, EpmVGModel, EpmVGPreTrainedModel
    from .model.pipeline_visual_grounding import VisualGroundingPipeline
    from .model.processing_epmvg import EpmVGProcessor
    from .training.augmentation import GroundingAugmentation
    from .training.data_collator import EpmVGDataCollator
    from .training.trainer import EpmVGTrainer
    from .training.training_args import EpmVGTrainingArguments

__version__ = "0.1.0"

# The modules of the public names, which are imported at the first use of a name. Those outside of `model` need
# libraries of the extra `train`. Inference works without it.
_LAZY = {
    "ClipTeacher": "distillation.clip_teacher",
    "EpmVGConfig": "model.configuration_epmvg",
    "EpmVGDataCollator": "training.data_collator",
    "EpmVGForVisualGrounding": "model.modeling_epmvg",
    "EpmVGImageProcessor": "model.image_processing_epmvg",
    "EpmVGImageProcessorPil": "model.image_processing_pil_epmvg",
    "EpmVGModel": "model.modeling_epmvg",
    "EpmVGPreTrainedModel": "model.modeling_epmvg",
    "EpmVGProcessor": "model.processing_epmvg",
    "EpmVGTrainer": "training.trainer",
    "EpmVGTrainingArguments": "training.training_args",
    "GroundingAccuracy": "evaluation.accuracy",
    "GroundingAugmentation": "training.augmentation",
    "ImageGroups": "data.image_groups",
    "TeacherOutput": "distillation.clip_teacher",
    "VisualGroundingPipeline": "model.pipeline_visual_grounding",
    "add_teacher_boxes": "distillation.teacher_boxes",
    "as_grounding_dataset": "data.hf_dataset",
    "confirm_boxes": "distillation.teacher_boxes",
    "load_grounding_dataset": "data.loading",
}

__all__ = [
    "ClipTeacher",
    "EpmVGConfig",
    "EpmVGDataCollator",
    "EpmVGForVisualGrounding",
    "EpmVGImageProcessor",
    "EpmVGImageProcessorPil",
    "EpmVGModel",
    "EpmVGPreTrainedModel",
    "EpmVGProcessor",
    "EpmVGTrainer",
    "EpmVGTrainingArguments",
    "GroundingAccuracy",
    "GroundingAugmentation",
    "ImageGroups",
    "TeacherOutput",
    "VisualGroundingPipeline",
    "add_teacher_boxes",
    "as_grounding_dataset",
    "confirm_boxes",
    "load_grounding_dataset",
    "register_for_hub",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _LAZY[name].startswith("model."):
        module = import_module(f".{_LAZY[name]}", __name__)
    else:
        with needs_extra(name, "train"):
            module = import_module(f".{_LAZY[name]}", __name__)
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


@cache
def register() -> None:
    """
    Tells the Auto classes and `pipeline` of transformers about the classes of this package. Importing the package does
    it, except in the command `epmvg`, which answers many a question before it needs what takes seconds to import.
    """
    with without_enum_warnings():
        from transformers import (
            AutoConfig,
            AutoImageProcessor,
            AutoModel,
            AutoModelForZeroShotObjectDetection,
            AutoProcessor,
        )
        from transformers.pipelines import PIPELINE_REGISTRY
        from transformers.utils import is_torchvision_available

    from .model.configuration_epmvg import EpmVGConfig
    from .model.image_processing_pil_epmvg import EpmVGImageProcessorPil
    from .model.modeling_epmvg import EpmVGForVisualGrounding, EpmVGModel
    from .model.pipeline_visual_grounding import VisualGroundingPipeline
    from .model.processing_epmvg import EpmVGProcessor

    image_processors: dict[str, type] = {"pil": EpmVGImageProcessorPil}
    if is_torchvision_available():
        from .model.image_processing_epmvg import EpmVGImageProcessor

        image_processors = {"torchvision": EpmVGImageProcessor, **image_processors}
    else:
        # Without torchvision, the name stands for the image processor that uses PIL.
        globals()["EpmVGImageProcessor"] = EpmVGImageProcessorPil

    AutoConfig.register("epmvg", EpmVGConfig)
    AutoModel.register(EpmVGConfig, EpmVGModel)
    AutoModelForZeroShotObjectDetection.register(EpmVGConfig, EpmVGForVisualGrounding)
    AutoImageProcessor.register(EpmVGConfig, image_processor_classes=image_processors)
    AutoProcessor.register(EpmVGConfig, EpmVGProcessor)
    PIPELINE_REGISTRY.register_pipeline(
        "visual-grounding",
        pipeline_class=VisualGroundingPipeline,
        pt_model=EpmVGForVisualGrounding,  # not AutoModel, which would load the bare EpmVGModel
        type="multimodal",
    )


def register_for_hub() -> None:
    """
    From now on, models, processors and image processors that this process saves or pushes include their code. They can
    then be loaded with `trust_remote_code=True` where `epmvg_hf` is not installed. This is not the default, because
    the code runs only with transformers versions that it was written for.

    Without the package, `AutoModel` and `AutoModelForZeroShotObjectDetection` load an [`EpmVGModel`] and an
    [`EpmVGForVisualGrounding`], as they do with the package, but the pipeline task "visual-grounding" is missing:
    [`~EpmVGProcessor.post_process_grounding`] gives the boxes.

    Example:

    ```python
    >>> import epmvg_hf

    >>> epmvg_hf.register_for_hub()
    >>> model.push_to_hub("me/my-epmvg")
    CommitInfo(commit_url='.../me/my-epmvg/commit/...
    >>> processor.push_to_hub("me/my-epmvg")
    CommitInfo(commit_url='.../me/my-epmvg/commit/...
    ```
    """
    from . import (
        EpmVGConfig,
        EpmVGForVisualGrounding,
        EpmVGImageProcessor,
        EpmVGImageProcessorPil,
        EpmVGModel,
        EpmVGProcessor,
    )

    EpmVGConfig.register_for_auto_class()
    EpmVGModel.register_for_auto_class("AutoModel")
    EpmVGForVisualGrounding.register_for_auto_class("AutoModelForZeroShotObjectDetection")
    EpmVGProcessor.register_for_auto_class()
    EpmVGImageProcessorPil.register_for_auto_class()
    EpmVGImageProcessor.register_for_auto_class()


_PROGRAM = Path(sys.argv[0]).name if sys.argv else ""
if _PROGRAM not in ("epmvg", "epmvg.exe") and sys.orig_argv[1:3] != ["-m", "epmvg_hf"]:
    register()
