"""Arguments of [`EpmVGTrainer`]."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class EpmVGTrainingArguments(TrainingArguments):
    """
    `transformers.TrainingArguments` with what grounding needs. Batch sizes count images; the loss is a mean over the
    expressions of the whole step, whatever it is split into.

    Args:
        vision_learning_rate (`float`, *optional*):
            Learning rate of the vision backbone and its encoder; `learning_rate` when not given.
        text_learning_rate (`float`, *optional*):
            Learning rate of the text tower; `learning_rate` when not given.
        freeze_backbone_epochs (`int`, *optional*, defaults to 0):
            Epochs at the start in which the vision backbone and the text tower are not trained (VLTVG: 10).
        max_expressions_per_image (`int`, *optional*):
            Train on a random choice of this many expressions of an image each time it is seen.
        augment (`bool`, *optional*, defaults to `True`):
            Whether to augment training images, see [`GroundingAugmentation`].
    """

    vision_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the vision backbone and its encoder."}
    )
    text_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of the text tower."})
    freeze_backbone_epochs: int = field(
        default=0, metadata={"help": "First epochs in which the vision backbone and the text tower are not trained."}
    )
    max_expressions_per_image: int | None = field(
        default=None, metadata={"help": "Train on a random choice of this many expressions of an image."}
    )
    augment: bool = field(default=True, metadata={"help": "Whether to augment the training images."})
    # Our collator reads the raw columns, which are no arguments of the model.
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: the collator reads the dataset's own columns."}
    )

    def __post_init__(self):
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be False: the collator reads the dataset's own columns")
        if self.freeze_backbone_epochs > 0:
            if self.ddp_find_unused_parameters is False:
                raise ValueError(
                    "freeze_backbone_epochs needs ddp_find_unused_parameters: frozen parameters get no gradient"
                )
            self.ddp_find_unused_parameters = True
        if self.batch_eval_metrics:
            raise ValueError(
                "batch_eval_metrics is not supported: every expression is counted once, after all batches"
            )
        if self.accelerator_config is None or isinstance(self.accelerator_config, dict):
            # Accelerate would collate streamed rows on one process and cut the batch by its first dimension, which
            # is B for some tensors and N for others.
            self.accelerator_config = {"dispatch_batches": False, **(self.accelerator_config or {})}
        super().__post_init__()

    @property
    def n_gpu(self) -> int:
        """At most 1: `DataParallel`, which plain `python` on several GPUs would give, cuts B and N apart."""
        return min(super().n_gpu, 1)
