"""The arguments of a training, besides those of the trainer: its model, its data and its model card."""

from dataclasses import dataclass, field

from ..training.training_args import EpmVGTrainingArguments


@dataclass
class ModelArguments:
    """The model to train: a saved one, a new one with pretrained towers, or a new one from a configuration alone."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of a model with its processor to start from; without it, a new model is made."
        },
    )
    config_name: str | None = field(default=None, metadata={"help": "JSON file with the EpmVGConfig of a new model."})
    vision_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Pretrained vision tower of a new model: a DETR, CLIP, ViT, timm model or any AutoBackbone."
        },
    )
    text_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Pretrained text tower of a new model with its tokenizer: a BERT, RoBERTa, CLIP and others."
        },
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "Side of the canvas in pixels, instead of the one in config_name or of the saved model."},
    )
    box_refinement: bool | None = field(
        default=None,
        metadata={"help": "Whether a second look corrects the boxes; a saved model can get it as a new part."},
    )
    max_text_length: int | None = field(
        default=None,
        metadata={"help": "Tokens of an expression for a new model, instead of the number in config_name."},
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention implementation, such as eager or sdpa; without it, the hardware decides."},
    )
    map_loss_coefficient: float | None = field(
        default=None,
        metadata={"help": "Weight of the map loss towards the box. With few boxes and a teacher, 0 is better."},
    )
    lora_rank: int | None = field(
        default=None,
        metadata={"help": "Train and save only a LoRA adapter of model_name_or_path, with this rank."},
    )
    lora_target_modules: str = field(
        default="all-linear",
        metadata={
            "help": "Layers that get an adapter: all linear layers of towers, fusion and box head, or those whose "
            r"whole name matches a regular expression, such as '.*text_model.*\.(query|value)'."
        },
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={
            "help": "Tokenizer of a new model without towers; without it, one is trained on the training expressions."
        },
    )
    teacher_name: str | None = field(
        default=None,
        metadata={
            "help": "CLIP to distil from: an open_clip architecture, a JSON config, or a place that starts with "
            "local-dir:, hf-hub: or transformers:. With none, nothing is distilled."
        },
    )
    teacher_pretrained: str | None = field(
        default=None,
        metadata={"help": "Weights of a teacher that is named by its architecture or config; otherwise none."},
    )


@dataclass
class DataArguments:
    """The data to train and evaluate on, see `load_grounding_dataset`."""

    dataset_name: str = field(
        default="shapes",
        metadata={"help": "shapes, refcoco, refcoco+, refcocog, grefcoco, referitgame, flickr30k_entities or custom."},
    )
    data_dir: str | None = field(default=None, metadata={"help": "Folder with the files of the benchmark."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str = field(default="validation", metadata={"help": "Split that chooses the best checkpoint."})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after this many evaluations in a row without a better checkpoint."}
    )
    test_split: str = field(default="test", metadata={"help": "Split that --do_predict evaluates and draws."})
    split_by: str | None = field(
        default=None, metadata={"help": "Whose division into splits to use, such as unc, umd or google."}
    )
    image_dir: str | None = field(
        default=None, metadata={"help": "Folder with the images, if they are not below data_dir."}
    )
    box_format: str | None = field(
        default=None, metadata={"help": "What the four numbers of a box are in custom data: xyxy or xywh."}
    )
    missing_images: str = field(
        default="error", metadata={"help": "What to do with rows whose image is missing: error or skip."}
    )
    errors: str = field(default="raise", metadata={"help": "What to do with rows that cannot be used: raise or skip."})
    num_labelled_images: int | None = field(
        default=None,
        metadata={
            "help": "Keep the boxes of this many training images; the teacher learns from the others without boxes."
        },
    )
    teacher_boxes: bool = field(
        default=False,
        metadata={
            "help": "Train on a box that the teacher draws wherever the data has none. With num_labelled_images 0 it "
            "draws all: a first stage, which needs no box of yours."
        },
    )
    confirmed_model: str | None = field(
        default=None,
        metadata={
            "help": "Folder of a model of the labelled images. Where it and the teacher draw nearly the same box for "
            "one of the others, the mean of the two is learned too (confirm_boxes)."
        },
    )
    num_train_images: int | None = field(
        default=None, metadata={"help": "How many training scenes of `shapes` to draw."}
    )
    absent_per_image: int | None = field(
        default=None,
        metadata={
            "help": "Add this many expressions to each image whose things are not in it, for models with a score_head."
        },
    )
    max_eval_rows: int | None = field(
        default=None, metadata={"help": "Evaluate on this many rows at the start of a split."}
    )
    calibrate_scores: bool = field(
        default=False,
        metadata={"help": "After training, make the scores fit how often boxes are right on the evaluation split."},
    )
    picture_rows: int = field(default=24, metadata={"help": "How many expressions --do_predict draws."})


@dataclass
class CardArguments:
    """Facts for the model card that the run cannot know. --push_to_hub uploads the card with the model."""

    license: str | None = field(default=None, metadata={"help": "Licence of the weights, such as apache-2.0."})
    language: str | None = field(
        default=None, metadata={"help": "Language of the expressions; en by default, except for custom data."}
    )
    share_code: bool = field(
        default=False, metadata={"help": "Save the code with the model, for users who do not have the package."}
    )


ARGUMENTS = (ModelArguments, DataArguments, CardArguments, EpmVGTrainingArguments)
