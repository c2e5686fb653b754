"""Arguments of [`EpmVGTrainer`]."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..distillation.distillation_loss import DistillationWeights


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
        lr_drop_epochs (`list[float]`, *optional*):
            After each of so many of the `num_train_epochs`, all learning rates are divided by 10, and nothing else
            but `warmup_steps` changes them; `lr_scheduler_type` is then not looked at (TransVG: 60 of 90).
        frozen_parameters (`list[str]`, *optional*):
            Regular expressions, searched in the names of parameters: those found are never trained (TransVG: the
            backbone's first stage; CLIP-VG: both towers).
        ema_decay (`float`, *optional*):
            Average the weights exponentially over the steps, with this decay (SimVG: 0.999). Evaluated, saved and kept
            at the end is the average, see [`~callbacks.WeightAverage`]. Not with FSDP or DeepSpeed.
        freeze_backbone_epochs (`int`, *optional*, defaults to 0):
            Epochs at the start in which the vision backbone and the text tower are not trained (VLTVG: 10).
        max_expressions_per_image (`int`, *optional*):
            Train on a random choice of this many expressions of an image each time it is seen.
        augment (`bool`, *optional*, defaults to `True`):
            Whether to augment training images, see [`GroundingAugmentation`].
        caption_ratio (`float`, *optional*, defaults to 1.0):
            Images of the trainer's `caption_dataset` for each image of its `train_dataset` in an epoch.
        relation_loss_coefficient (`float`, *optional*, defaults to 0.0):
            Weight of [`~losses.relation_loss`]. This and the further settings matter only with a teacher. Off by
            default, like the next: in the study (model_cards/distillation-study) neither found more boxes.
        feature_loss_coefficient (`float`, *optional*, defaults to 0.0):
            Weight of [`~losses.feature_loss`].
        teacher_map_loss_coefficient (`float`, *optional*, defaults to 1.0):
            Weight of [`~losses.map_loss`] towards the teacher's map. The map loss towards the box is the model's own,
            `config.map_loss_coefficient`.
        teacher_map_rows (`str`, *optional*, defaults to `"all"`):
            Which expressions learn the teacher's map: `"all"`, or only those `"without_box"`, where the map cannot
            follow the box instead (see `config.map_loss_coefficient`).
        student_temperature (`float`, *optional*, defaults to 0.05):
            Divides the student's image-text similarities in the relation loss.
        teacher_temperature (`float`, *optional*, defaults to 0.05):
            Divides the teacher's image-text similarities in the relation loss.
        map_temperature (`float`, *optional*, defaults to 0.05):
            Divides the teacher's patch-text similarities in the map loss.
        cache_teacher (`bool`, *optional*, defaults to `True`):
            Compute the teacher's outputs once and read them back in every step, see [`~teacher_cache.TeacherCache`].
            Only for map-style datasets that are not augmented; otherwise the teacher runs in every step.
        teacher_cache_dir (`str`, *optional*):
            Where those outputs are kept. Defaults to a folder in the cache of `datasets`.
        remove_unused_columns (`bool`, *optional*, defaults to `False`):
            Must stay `False`: the collator reads the dataset's own columns.

    Raises:
        ValueError: a setting is out of its range, or not for this trainer.

    Example:

    ```python
    >>> from epmvg_hf import EpmVGTrainingArguments

    >>> args = EpmVGTrainingArguments("outputs/mine", learning_rate=1e-4, vision_learning_rate=1e-5, ema_decay=0.999)
    >>> args.ema_decay, args.distils  # once there is a teacher
    (0.999, True)
    ```
    """

    vision_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the vision backbone and its encoder."}
    )
    text_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of the text tower."})
    lr_drop_epochs: list[float] | None = field(
        default=None, metadata={"help": "Epochs after which learning rates are divided by 10, instead of a schedule."}
    )
    frozen_parameters: list[str] | None = field(
        default=None, metadata={"help": "Regular expressions found in the names of parameters that are not trained."}
    )
    ema_decay: float | None = field(
        default=None, metadata={"help": "Decay of an average of the weights, which is what is evaluated and saved."}
    )
    freeze_backbone_epochs: int = field(
        default=0, metadata={"help": "First epochs in which the vision backbone and the text tower are not trained."}
    )
    max_expressions_per_image: int | None = field(
        default=None, metadata={"help": "Train on a random choice of this many expressions of an image."}
    )
    augment: bool = field(default=True, metadata={"help": "Whether to augment the training images."})
    caption_ratio: float = field(
        default=1.0, metadata={"help": "Caption images for each labelled image in an epoch, given a caption dataset."}
    )
    relation_loss_coefficient: float = field(
        default=0.0, metadata={"help": "Weight of the relation loss; like what follows, only with a teacher."}
    )
    feature_loss_coefficient: float = field(default=0.0, metadata={"help": "Weight of the feature loss."})
    teacher_map_loss_coefficient: float = field(
        default=1.0, metadata={"help": "Weight of the map loss towards the teacher's map."}
    )
    teacher_map_rows: str = field(
        default="all", metadata={"help": "Expressions that learn the teacher's map: all or without_box."}
    )
    student_temperature: float = field(
        default=0.05, metadata={"help": "Temperature of the student's similarities in the relation loss."}
    )
    teacher_temperature: float = field(
        default=0.05, metadata={"help": "Temperature of the teacher's similarities in the relation loss."}
    )
    map_temperature: float = field(
        default=0.05, metadata={"help": "Temperature of the teacher's patch-text similarities in the map loss."}
    )
    cache_teacher: bool = field(
        default=True, metadata={"help": "Compute the teacher's outputs once if the data is not augmented."}
    )
    teacher_cache_dir: str | None = field(default=None, metadata={"help": "Folder of the teacher's outputs."})
    # Our collator reads the raw columns, which are no arguments of the model.
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: the collator reads the dataset's own columns."}
    )

    def __post_init__(self) -> None:
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be False: the collator reads the dataset's own columns")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie between 0 and 1, got {self.ema_decay}")
        if any(not 0 < epoch < self.num_train_epochs for epoch in self.lr_drop_epochs or ()):
            raise ValueError(
                f"lr_drop_epochs must lie within the {self.num_train_epochs} epochs, got {self.lr_drop_epochs}"
            )
        if self.caption_ratio <= 0:
            raise ValueError(f"caption_ratio must be positive, got {self.caption_ratio}")
        for name in ("relation_loss_coefficient", "feature_loss_coefficient", "teacher_map_loss_coefficient"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if self.teacher_map_rows not in ("all", "without_box"):
            raise ValueError(f'teacher_map_rows must be "all" or "without_box", got {self.teacher_map_rows!r}')
        for name in ("student_temperature", "teacher_temperature", "map_temperature"):
            if (value := getattr(self, name)) <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
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
        super().__post_init__()
        # Accelerate would collate streamed rows on one process and cut the batch by its first dimension, which is B
        # for some tensors and N for others.
        if self.accelerator_config.dispatch_batches:
            raise ValueError("dispatch_batches must not be True: a batch of B images and N expressions cannot be cut")
        self.accelerator_config.dispatch_batches = False

    @property
    def distillation_weights(self) -> DistillationWeights:
        """
        Weights and temperatures of the terms that a teacher brings.

        Example:

        ```python
        >>> from epmvg_hf import EpmVGTrainingArguments

        >>> EpmVGTrainingArguments("outputs/mine", relation_loss_coefficient=0.5).distillation_weights.relation
        0.5
        ```
        """
        return DistillationWeights(
            relation=self.relation_loss_coefficient,
            feature=self.feature_loss_coefficient,
            teacher_map=self.teacher_map_loss_coefficient,
            teacher_map_rows=self.teacher_map_rows,
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
            map_temperature=self.map_temperature,
        )

    @property
    def distils(self) -> bool:
        """
        Whether any term of the loss needs a teacher.

        Example:

        ```python
        >>> from epmvg_hf import EpmVGTrainingArguments

        >>> EpmVGTrainingArguments("outputs/mine", teacher_map_loss_coefficient=0).distils
        False
        ```
        """
        return self.distils_embeddings or self.teacher_map_loss_coefficient > 0

    @property
    def distils_embeddings(self) -> bool:
        """
        Whether any term needs the student's projections to the teacher's image-text space.

        Example:

        ```python
        >>> from epmvg_hf import EpmVGTrainingArguments

        >>> EpmVGTrainingArguments("outputs/mine", relation_loss_coefficient=1).distils_embeddings
        True
        ```
        """
        return self.relation_loss_coefficient + self.feature_loss_coefficient > 0

    @property
    def n_gpu(self) -> int:
        """At most 1: `DataParallel`, which plain `python` on several GPUs would give, cuts B and N apart."""
        return min(super().n_gpu, 1)
