"""Visual grounding for transformers: one image and one expression in, one box out."""

from importlib import import_module
from typing import TYPE_CHECKING

from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils import is_torchvision_available

from .configuration_epmvg import EpmVGConfig
from .image_processing_pil_epmvg import EpmVGImageProcessorPil
from .modeling_epmvg import EpmVGForVisualGrounding, EpmVGModel, EpmVGPreTrainedModel
from .patch_backbone import PatchBackbone, PatchBackboneConfig
from .pipeline_visual_grounding import VisualGroundingPipeline
from .processing_epmvg import EpmVGProcessor

if is_torchvision_available():
    from .image_processing_epmvg import EpmVGImageProcessor
else:
    EpmVGImageProcessor = EpmVGImageProcessorPil

if TYPE_CHECKING:
    from .augmentation import GroundingAugmentation
    from .collator import EpmVGDataCollator, ImageGroups
    from .dataset_columns import as_grounding_dataset
    from .grounding_accuracy import GroundingAccuracy
    from .loading import load_grounding_dataset
    from .teacher import ClipTeacher, TeacherOutput
    from .trainer import EpmVGTrainer
    from .training_args import EpmVGTrainingArguments

__version__ = "0.1.0"

# Training and data need extras (`pip install "epmvg_hf[train]"`) and are imported when first used.
_LAZY = {
    "ClipTeacher": "teacher",
    "EpmVGDataCollator": "collator",
    "EpmVGTrainer": "trainer",
    "EpmVGTrainingArguments": "training_args",
    "GroundingAccuracy": "grounding_accuracy",
    "GroundingAugmentation": "augmentation",
    "ImageGroups": "collator",
    "TeacherOutput": "teacher",
    "as_grounding_dataset": "dataset_columns",
    "load_grounding_dataset": "loading",
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
    "as_grounding_dataset",
    "load_grounding_dataset",
]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f".{_LAZY[name]}", __name__)
    except ModuleNotFoundError as error:
        raise ImportError(f'{name} needs {error.name}: pip install "epmvg_hf[train]"') from error
    return getattr(module, name)


AutoConfig.register("epmvg", EpmVGConfig)
AutoModel.register(EpmVGConfig, EpmVGModel)
AutoImageProcessor.register(
    EpmVGConfig,
    image_processor_classes={"pil": EpmVGImageProcessorPil}
    if EpmVGImageProcessor is EpmVGImageProcessorPil
    else {"torchvision": EpmVGImageProcessor, "pil": EpmVGImageProcessorPil},
)
AutoProcessor.register(EpmVGConfig, EpmVGProcessor)
AutoConfig.register(PatchBackboneConfig.model_type, PatchBackboneConfig)
AutoBackbone.register(PatchBackboneConfig, PatchBackbone)
PIPELINE_REGISTRY.register_pipeline(
    "visual-grounding",
    pipeline_class=VisualGroundingPipeline,
    pt_model=EpmVGForVisualGrounding,  # a class, not AutoModel, which gives the bare EpmVGModel
    type="multimodal",
)
