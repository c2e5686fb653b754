"""Visual grounding for transformers: one image and one expression in, one box out."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .utils import needs_extra, without_enum_warnings

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
from .model.modeling_epmvg import EpmVGForVisualGrounding, EpmVGModel, EpmVGPreTrainedModel
from .model.pipeline_visual_grounding import VisualGroundingPipeline
from .model.processing_epmvg import EpmVGProcessor

if is_torchvision_available():
    from .model.image_processing_epmvg import EpmVGImageProcessor
else:
    # Without torchvision, the name stands for the image processor that uses PIL.
    EpmVGImageProcessor = EpmVGImageProcessorPil  # type: ignore[misc, assignment]

if TYPE_CHECKING:
    from .data.hf_dataset import as_grounding_dataset
    from .data.image_groups import ImageGroups
    from .data.loading import load_grounding_dataset
    from .distillation.clip_teacher import ClipTeacher, TeacherOutput
    from .distillation.teacher_boxes import add_teacher_boxes
    from .evaluation.accuracy import GroundingAccuracy
    from .training.augmentation import GroundingAugmentation
    from .training.data_collator import EpmVGDataCollator
    from .training.trainer import EpmVGTrainer
    from .training.training_args import EpmVGTrainingArguments

__version__ = "0.1.0"

# The modules of these names need libraries of the extra `train` and are imported at the first use of a name, so that
# inference works without the extra.
_LAZY = {
    "ClipTeacher": "distillation.clip_teacher",
    "EpmVGDataCollator": "training.data_collator",
    "EpmVGTrainer": "training.trainer",
    "EpmVGTrainingArguments": "training.training_args",
    "GroundingAccuracy": "evaluation.accuracy",
    "GroundingAugmentation": "training.augmentation",
    "ImageGroups": "data.image_groups",
    "TeacherOutput": "distillation.clip_teacher",
    "add_teacher_boxes": "distillation.teacher_boxes",
    "as_grounding_dataset": "data.hf_dataset",
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
    "load_grounding_dataset",
    "register_for_hub",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needs_extra(name, "train"):
        module = import_module(f".{_LAZY[name]}", __name__)
    return getattr(module, name)


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
    EpmVGConfig.register_for_auto_class()
    EpmVGModel.register_for_auto_class("AutoModel")
    EpmVGForVisualGrounding.register_for_auto_class("AutoModelForZeroShotObjectDetection")
    EpmVGProcessor.register_for_auto_class()
    EpmVGImageProcessorPil.register_for_auto_class()
    EpmVGImageProcessor.register_for_auto_class()


AutoConfig.register("epmvg", EpmVGConfig)
AutoModel.register(EpmVGConfig, EpmVGModel)
AutoModelForZeroShotObjectDetection.register(EpmVGConfig, EpmVGForVisualGrounding)
AutoImageProcessor.register(
    EpmVGConfig,
    image_processor_classes={"pil": EpmVGImageProcessorPil}
    if EpmVGImageProcessor is EpmVGImageProcessorPil
    else {"torchvision": EpmVGImageProcessor, "pil": EpmVGImageProcessorPil},
)
AutoProcessor.register(EpmVGConfig, EpmVGProcessor)
PIPELINE_REGISTRY.register_pipeline(
    "visual-grounding",
    pipeline_class=VisualGroundingPipeline,
    pt_model=EpmVGForVisualGrounding,  # not AutoModel, which would load the bare EpmVGModel
    type="multimodal",
)
