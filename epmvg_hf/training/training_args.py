"""The arguments of [`EpmVGTrainer`]."""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import TrainingArguments

from ..distillation.distillation_loss import DistillationWeights

# Arguments of transformers that would do nothing here, or not what they are for, and why.
_REFUSED = {
    "average_tokens_across_devices": "the loss is the mean over the expressions of all processes",
    "batch_eval_metrics": "metrics are computed after the last batch, so that rows that were repeated to fill up a "
    "batch count only once",
    "debug": "its detector of overflows cannot read the boolean masks that parts of the model return",
    "eval_do_concat_batches": "the results of all batches are put into the order of the dataset's rows",
    "include_for_metrics": "compute_metrics gets boxes in pixels of the original images and nothing else",
    "label_names": "labels are made from the column box and have one name",
    "label_smoothing_factor": "it is for classes, and the labels are boxes",
    "length_column_name": "images are not sorted by length",
    "liger_kernel_config": "Liger has no kernels for this model",
    "optim_target_modules": "optimisers that choose parameters by themselves do not know the learning rates per part",
    "parallelism_config": "B images and N expressions are spread over processes by DDP, FSDP or DeepSpeed alone",
    "remove_unused_columns": "the collator reads columns that are not arguments of the model",
    "use_cache": "the model generates no text",
    "use_liger_kernel": "Liger has no kernels for this model",
}
# The beginnings of the names of optimisers that choose the parameters and their groups by themselves.
_OPTIMISERS_WITH_OWN_GROUPS = ("galore", "apollo", "lomo", "adalomo")


@dataclass
class EpmVGTrainingArguments(TrainingArguments):
    """
    `transformers.TrainingArguments` with the arguments that visual grounding adds.

    Batch sizes count images. The loss is the mean over all expressions of an optimizer step, also if the step consists
    of several accumulated batches or runs on several processes.

    Args:
        vision_learning_rate (`float`, *optional*):
            Learning rate of the vision backbone, `learning_rate` by default.
        encoder_learning_rate (`float`, *optional*):
            Learning rate of the visual encoder and of the projection before it, `vision_learning_rate` by default,
            which suits an encoder that is pretrained like DETR's. A new one needs a higher rate.
        text_learning_rate (`float`, *optional*):
            Learning rate of the text tower, `learning_rate` by default.
        lr_drop_epochs (`list[float]`, *optional*):
            Epochs after which all learning rates are divided by 10 (TransVG: after 60 of 90). Apart from these drops
            and from `warmup_steps` the learning rates are then constant, and `lr_scheduler_type` is ignored. With
            `max_steps`, the `num_train_epochs` epochs are equal parts of these steps.
        frozen_parameters (`list[str]`, *optional*):
            Regular expressions, or a single one as a string. Parameters in whose name one of them is found are never
            trained (TransVG: the first stage of the backbone; CLIP-VG: both towers).
        ema_decay (`float`, *optional*):
            Decay of an exponential moving average of the weights (SimVG: 0.999). The average is what is evaluated,
            saved, and left in the model after training, see [`~callbacks.WeightAverage`]. It does not work with FSDP
            or DeepSpeed.
        freeze_backbone_epochs (`int`, *optional*, defaults to 0):
            Number of epochs at the start in which the vision backbone and the text tower are not trained (VLTVG: 10).
        max_expressions_per_image (`int`, *optional*):
            Whenever an image is seen, train on at most this many of its expressions, chosen at random.
        augment (`bool`, *optional*, defaults to `True`):
            Whether to augment training images, see [`GroundingAugmentation`].
        augmentation_kwargs (`dict` or `str`, *optional*):
            Settings of that augmentation, such as `{"flip": 0.5, "crop": 0}`; the trainer's argument `augmentation`
            comes before them.
        caption_ratio (`float`, *optional*, defaults to 1.0):
            Number of images of the trainer's `caption_dataset` for each image of its `train_dataset` in an epoch.
        relation_loss_coefficient (`float`, *optional*, defaults to 0.0):
            Weight of [`~losses.relation_loss`]. Like all arguments below, it matters only with a teacher. This loss
            and the next are off by default because neither improved the accuracy in the study in
            model_cards/distillation-study.
        feature_loss_coefficient (`float`, *optional*, defaults to 0.0):
            Weight of [`~losses.feature_loss`].
        teacher_map_loss_coefficient (`float`, *optional*, defaults to 1.0):
            Weight of [`~losses.map_loss`] towards the teacher's map. The same loss towards the box is part of the
            model and has the weight `config.map_loss_coefficient`.
        teacher_map_rows (`str`, *optional*, defaults to `"all"`):
            Which expressions learn the teacher's map: `"all"`, or only those `"without_box"`, for which the map cannot
            be learned from a box instead.
        distil_only (`bool`, *optional*, defaults to `False`):
            Whether to train the towers and what stands before fusion by the teacher alone. Nothing is fused and no box
            is predicted, so that a step is cheap and its batch can be large. A second training then learns the boxes.
        student_temperature (`float`, *optional*, defaults to 0.05):
            The student's image-text similarities are divided by this temperature in the relation loss.
        teacher_temperature (`float`, *optional*, defaults to 0.05):
            The teacher's image-text similarities are divided by this temperature in the relation loss.
        map_temperature (`float`, *optional*, defaults to 0.05):
            The teacher's patch-text similarities are divided by this temperature in the map loss.
        cache_teacher (`bool`, *optional*, defaults to `True`):
            Whether to compute the teacher's outputs once and read them from a cache in every step, see
            [`~teacher_cache.TeacherCache`]. With augmented or streamed data the teacher runs in every step instead.
        teacher_cache_dir (`str`, *optional*):
            Folder of that cache, by default within the cache of `datasets`.
        cache_frozen_towers (`bool`, *optional*, defaults to `False`):
            Whether to compute the outputs of the vision backbone and of the text tower once, in the epochs in which
            nothing of them is trained (`frozen_parameters`, `freeze_backbone_epochs`), and to read them from a cache
            in every step. Images are then neither decoded nor resized again. It needs `augment=False`. An image takes
            4 * C * grid_height * grid_width bytes on disk, a token 4 * hidden_size. See
            [`~frozen_towers.FrozenTowers`].
        tower_cache_dir (`str`, *optional*):
            Folder of that cache, by default within the cache of `datasets`.
        tower_cache_dtype (`str`, *optional*, defaults to `"float32"`):
            Type of the numbers in that cache: `"float32"`, which keeps them exactly, or `"float16"`, which takes half
            the space.
        nonfinite_steps (`str`, *optional*, defaults to `"stop"`):
            What happens at an optimiser step in which a loss term or the gradient is NaN or infinite: `"stop"` ends
            the training with an error that names terms and rows, `"skip"` warns of it and goes on with the next step.
        report_pictures (`int`, *optional*, defaults to 4):
            Number of rows of which pictures with the predicted and the true box are logged at each evaluation, if
            `report_to` names `"tensorboard"`, `"wandb"` or `"trackio"`. They are always the same rows, see
            [`~prediction_pictures.PredictionPictures`].
        logging_nan_inf_filter (`bool`, *optional*, defaults to `False`):
            Whether to leave losses that are not finite out of the log, for which a GPU is waited for in every step.
        remove_unused_columns (`bool`, *optional*, defaults to `False`):
            Must stay `False`, because the collator reads columns that are not arguments of the model.

    The page examples/TRAINER.md says for each argument of transformers whether it works here.

    Raises:
        ValueError: an argument is out of its range or not supported by [`EpmVGTrainer`].

    Example:

    ```python
    >>> from epmvg_hf import EpmVGTrainingArguments

    >>> args = EpmVGTrainingArguments("outputs/mine", learning_rate=1e-4, vision_learning_rate=1e-5, ema_decay=0.999)
    >>> args.ema_decay, args.distils  # the trainer distils if it is also given a teacher
    (0.999, True)
    ```
    """

    # transformers reads these from the command line as JSON.
    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*TrainingArguments._VALID_DICT_FIELDS, "augmentation_kwargs"]

    vision_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the vision backbone. Defaults to learning_rate."},
    )
    encoder_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the visual encoder. Defaults to vision_learning_rate."},
    )
    text_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the text tower. Defaults to learning_rate."}
    )
    lr_drop_epochs: list[float] | None = field(
        default=None,
        metadata={"help": "Divide the learning rates by 10 after these epochs. Replaces lr_scheduler_type."},
    )
    frozen_parameters: list[str] | None = field(
        default=None,
        metadata={"help": "Do not train parameters in whose name one of these regular expressions is found."},
    )
    ema_decay: float | None = field(
        default=None, metadata={"help": "Average the weights with this decay. The average is evaluated and saved."}
    )
    freeze_backbone_epochs: int = field(
        default=0,
        metadata={"help": "Do not train the vision backbone and the text tower in this many epochs at the start."},
    )
    max_expressions_per_image: int | None = field(
        default=None,
        metadata={"help": "Train on at most this many expressions of an image at a time, chosen at random."},
    )
    augment: bool = field(default=True, metadata={"help": "Augment the training images."})
    augmentation_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Settings of the augmentation as JSON, such as '{\"crop\": 0}'."}
    )
    caption_ratio: float = field(
        default=1.0, metadata={"help": "Use this many caption images for each image with boxes in an epoch."}
    )
    relation_loss_coefficient: float = field(
        default=0.0,
        metadata={"help": "Weight of the relation loss. This and the following arguments need a teacher."},
    )
    feature_loss_coefficient: float = field(default=0.0, metadata={"help": "Weight of the feature loss."})
    teacher_map_loss_coefficient: float = field(
        default=1.0, metadata={"help": "Weight of the map loss towards the teacher's map."}
    )
    teacher_map_rows: str = field(
        default="all", metadata={"help": "Expressions that learn the teacher's map: all or without_box."}
    )
    distil_only: bool = field(
        default=False, metadata={"help": "Train what stands before fusion by the teacher alone, without boxes."}
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
        default=True,
        metadata={"help": "Compute the teacher's outputs only once, unless the data is augmented or streamed."},
    )
    teacher_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder for the teacher's outputs. Defaults to a folder in the cache of datasets."},
    )
    cache_frozen_towers: bool = field(
        default=False,
        metadata={"help": "Compute the outputs of towers that are not trained only once. Needs augment=False."},
    )
    tower_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder for the towers' outputs. Defaults to a folder in the cache of datasets."},
    )
    tower_cache_dtype: str = field(
        default="float32", metadata={"help": "Type of the towers' outputs on disk: float32 or float16."}
    )
    nonfinite_steps: str = field(
        default="stop", metadata={"help": "At a step that is NaN or infinite: stop the training, or skip the step."}
    )
    report_pictures: int = field(
        default=4,
        metadata={"help": "Log so many pictures of predictions at each evaluation, to tensorboard, wandb or trackio."},
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Leave losses that are not finite out of the log. A GPU is then waited for in every step."},
    )
    remove_unused_columns: bool = field(
        default=False,
        metadata={"help": "Must stay False: the collator reads columns that are not arguments of the model."},
    )

    def __post_init__(self) -> None:
        self.debug = self.debug or ""  # copied arguments carry the list that transformers makes of it
        for argument in dataclasses.fields(self):
            if argument.name in _REFUSED:
                default = argument.default
                if argument.default_factory is not dataclasses.MISSING:
                    default = argument.default_factory()
                if getattr(self, argument.name) != default:
                    raise ValueError(f"{argument.name} must be {default!r}: {_REFUSED[argument.name]}")
        if str(self.optim).startswith(_OPTIMISERS_WITH_OWN_GROUPS):
            raise ValueError(f"optim must not be {self.optim!r}: {_REFUSED['optim_target_modules']}")
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                'train_sampling_strategy must be "random" or "sequential", because images are not sorted by length; '
                f"got {self.train_sampling_strategy!r}"
            )
        if self.include_num_input_tokens_seen not in (False, "no", "non_padding"):
            raise ValueError(
                'include_num_input_tokens_seen must be "no", or "non_padding" to count the tokens of the expressions: '
                f'"all" would count pixels; got {self.include_num_input_tokens_seen!r}'
            )
        if self.include_num_input_tokens_seen == "non_padding" and self.cache_frozen_towers:
            raise ValueError(
                'include_num_input_tokens_seen must be "no" with cache_frozen_towers: batches from the cache have no '
                "pixels, without which transformers does not count"
            )
        if self.greater_is_better is None and re.search(r"(^|_)loss(_|$)", self.metric_for_best_model or ""):
            self.greater_is_better = False  # transformers knows this only of names that end in loss, not of loss_giou
        self.check_values()
        super().__post_init__()
        if self.fp16 and self.device.type == "cpu":
            raise ValueError("fp16 does nothing on a CPU: use bf16, or neither")
        # By default, accelerate collates streamed rows on one process and splits the batch along the first dimension
        # of its tensors, but that is B for some of them and N for others.
        if self.accelerator_config.dispatch_batches:
            raise ValueError(
                "dispatch_batches must not be True: a batch of B images and N expressions cannot be split evenly"
            )
        self.accelerator_config.dispatch_batches = False

    def check_values(self) -> None:
        """
        Checks the arguments that visual grounding adds, and makes a list of a single pattern in `frozen_parameters`.
        It is called for new arguments, and by [`EpmVGTrainer`] for those that a trial of a search has set.

        Raises:
            ValueError: an argument is out of its range.

        Example:

        ```python
        >>> from epmvg_hf import EpmVGTrainingArguments

        >>> args = EpmVGTrainingArguments("outputs/mine")
        >>> args.frozen_parameters = "text_model"
        >>> args.check_values()
        >>> args.frozen_parameters
        ['text_model']
        ```
        """
        if isinstance(self.frozen_parameters, str):
            self.frozen_parameters = [self.frozen_parameters]
        for pattern in self.frozen_parameters or ():
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise ValueError(
                    f"frozen_parameters has {pattern!r}, which is no regular expression: {error}"
                ) from error
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie between 0 and 1, got {self.ema_decay}")
        if not isinstance(self.lr_drop_epochs, list | tuple | None):
            raise ValueError(f"lr_drop_epochs must be a list of epochs, got {self.lr_drop_epochs!r}")
        if any(not 0 < epoch < self.num_train_epochs for epoch in self.lr_drop_epochs or ()):
            raise ValueError(
                f"lr_drop_epochs must lie within the {self.num_train_epochs} epochs, got {self.lr_drop_epochs}"
            )
        if self.max_expressions_per_image is not None and self.max_expressions_per_image < 1:
            raise ValueError(f"max_expressions_per_image must be at least 1, got {self.max_expressions_per_image}")
        if self.nonfinite_steps not in ("stop", "skip"):
            raise ValueError(f'nonfinite_steps must be "stop" or "skip", got {self.nonfinite_steps!r}')
        not_negative = (
            "vision_learning_rate",
            "encoder_learning_rate",
            "text_learning_rate",
            "freeze_backbone_epochs",
            "report_pictures",
            "relation_loss_coefficient",
            "feature_loss_coefficient",
            "teacher_map_loss_coefficient",
        )
        for name in not_negative:
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("caption_ratio", "student_temperature", "teacher_temperature", "map_temperature"):
            if (value := getattr(self, name)) <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.distil_only and not self.distils:
            raise ValueError("distil_only trains by the terms of the distillation, and all their weights are 0")
        if self.distil_only and self.eval_strategy != "no":
            raise ValueError(
                f'distil_only trains no boxes to evaluate: eval_strategy must be "no", got {self.eval_strategy!r}'
            )
        if self.teacher_map_rows not in ("all", "without_box"):
            raise ValueError(f'teacher_map_rows must be "all" or "without_box", got {self.teacher_map_rows!r}')
        if self.tower_cache_dtype not in ("float32", "float16"):
            raise ValueError(f'tower_cache_dtype must be "float32" or "float16", got {self.tower_cache_dtype!r}')
        if self.freeze_backbone_epochs > 0:
            if self.ddp_find_unused_parameters is False:
                raise ValueError(
                    "freeze_backbone_epochs needs ddp_find_unused_parameters=True: frozen parameters get no gradient"
                )
            self.ddp_find_unused_parameters = True

    @property
    def distillation_weights(self) -> DistillationWeights:
        """
        The weights and temperatures of the loss terms that need a teacher.

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
        Whether any loss term with a positive weight needs a teacher.

        Example:

        ```python
        >>> from epmvg_hf import EpmVGTrainingArguments

        >>> EpmVGTrainingArguments("outputs/mine", teacher_map_loss_coefficient=0).distils
        False
        ```
        """
        return self.distillation_weights.teaches

    @property
    def distils_embeddings(self) -> bool:
        """
        Whether any loss term with a positive weight needs the student's projections to the teacher's image-text space.

        Example:

        ```python
        >>> from epmvg_hf import EpmVGTrainingArguments

        >>> EpmVGTrainingArguments("outputs/mine", relation_loss_coefficient=1).distils_embeddings
        True
        ```
        """
        return self.distillation_weights.compares_embeddings

    @property
    def n_gpu(self) -> int:
        """
        At most 1. On a machine with several GPUs, a script that is started without a launcher would otherwise use
        `DataParallel`, which splits B images and N expressions without regard to which belong together.
        """
        return min(super().n_gpu, 1)
