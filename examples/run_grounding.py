#!/usr/bin/env python
"""Trains and evaluates a visual grounding model, draws its predictions and writes its model card.

accelerate launch examples/run_grounding.py                                 # configs/shapes.yaml, which needs no data
accelerate launch examples/run_grounding.py --learning_rate 3e-4            # the same with another value
accelerate launch examples/run_grounding.py --num_labelled_images 100       # boxes for few images only
accelerate launch examples/run_grounding.py my.yaml --output_dir outputs/my # arguments from a YAML or JSON file
accelerate launch examples/run_grounding.py examples/configs/refcoco.yaml --data_dir DIR    # a recipe
accelerate launch examples/run_grounding.py --model_name_or_path MODEL --lora_rank 16       # an adapter of a model
"""

import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from command_line import (
    check_output_dir,
    checkpoint_to_resume,
    config_file,
    parse_arguments,
    show_own_messages,
    use_hardware,
)
from datasets import Dataset, concatenate_datasets
from trained_tokenizer import train_tokenizer
from transformers import AutoTokenizer, EarlyStoppingCallback, PreTrainedConfig, set_seed
from transformers.trainer_utils import PredictionOutput

from epmvg_hf import (
    ClipTeacher,
    EpmVGConfig,
    EpmVGForVisualGrounding,
    EpmVGImageProcessor,
    EpmVGProcessor,
    EpmVGTrainer,
    EpmVGTrainingArguments,
    add_teacher_boxes,
    confirm_boxes,
    load_grounding_dataset,
    register_for_hub,
)
from epmvg_hf.evaluation.accuracy import find_boxes, paired_iou
from epmvg_hf.evaluation.accuracy_by_group import GroupAccuracy, accuracy_by_group
from epmvg_hf.evaluation.blind_baselines import blind_accuracy
from epmvg_hf.evaluation.visualization import draw_grid
from epmvg_hf.utils import needs_extra

if TYPE_CHECKING:
    from peft import PeftModel

HERE = Path(__file__).parent
logger = logging.getLogger("run_grounding")


@dataclass
class ModelArguments:
    """The model to train: a saved one, a new one with pretrained towers, or a new one from a configuration alone."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of a model with its processor to start from; without it, a new model is made."
        },
    )
    config_name: str = field(
        default="tiny.json",
        metadata={"help": "JSON file with the EpmVGConfig of a new model, or the name of a file in examples/configs."},
    )
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
            "help": "Folder of a model of the labelled images. Its boxes for the others are learned too, where "
            "the teacher draws nearly the same (confirm_boxes)."
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


ARGUMENTS = (ModelArguments, DataArguments, EpmVGTrainingArguments, CardArguments)


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
    settings = json.loads(config_file(arguments.config_name, HERE / "configs").read_text())
    asked = {
        "image_size": arguments.image_size,
        "box_refinement": arguments.box_refinement,
        "max_text_length": arguments.max_text_length,
        "teacher_projection_dim": teacher_projection_dim,
    }
    settings |= {name: value for name, value in asked.items() if value is not None}
    vision, text = arguments.vision_name_or_path, arguments.text_name_or_path
    if vision or text:
        if not (vision and text):
            raise ValueError("vision_name_or_path and text_name_or_path must be given together")
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


def split_labelled(
    dataset: Dataset, num_images: int | None, teacher_boxes: bool = False
) -> tuple[Dataset, Dataset | None]:
    """The rows of the first `num_images` images, and the rows of all others without the column `box`."""
    if num_images is None:
        return dataset, None
    images = dict.fromkeys(dataset["image_id"])
    least = 0 if teacher_boxes else 1
    if not least <= num_images < len(images):
        raise ValueError(
            f"num_labelled_images is {num_images}, expected {least} to {len(images) - 1} of the {len(images)} images"
        )
    labelled = set(list(images)[:num_images])
    chosen = [image_id in labelled for image_id in dataset["image_id"]]
    absent = dataset["absent"][:] if "absent" in dataset.column_names else [False] * len(dataset)
    captions = [row for row, has_box in enumerate(chosen) if not has_box and not absent[row]]
    captioned = dataset.select(captions).remove_columns("box")
    return dataset.select([row for row, has_box in enumerate(chosen) if has_box]), captioned


def confirmed_rows(folder: str, dataset: Dataset, teacher: ClipTeacher, arguments: EpmVGTrainingArguments) -> Dataset:
    """Rows without boxes for which a saved model and the teacher find nearly the same one, with the model's boxes."""
    model = EpmVGForVisualGrounding.from_pretrained(folder)
    processor = EpmVGProcessor.from_pretrained(folder)
    predictor = EpmVGTrainer(model=model, args=arguments, processing_class=processor)
    confirmed = confirm_boxes(dataset, predictor.predict(dataset).predictions, teacher)
    if len(confirmed) == 0:
        raise ValueError(f"the teacher confirms no box of {folder} for the {len(dataset)} expressions without one")
    logger.info("of %d expressions without a box, the teacher confirms %d boxes", len(dataset), len(confirmed))
    return confirmed


def main(command_line: list[str] | None = None) -> None:
    default_file = HERE / "configs" / "shapes.yaml"
    model_arguments, data_arguments, training_arguments, card_arguments = parse_arguments(
        ARGUMENTS, __doc__, default_file, sys.argv[1:] if command_line is None else command_line
    )
    check_output_dir(training_arguments)
    if training_arguments.should_log:
        show_own_messages(logger.name)
    set_seed(training_arguments.seed)
    if card_arguments.share_code:
        register_for_hub()
    attention = use_hardware(training_arguments)
    if model_arguments.attn_implementation is None:
        model_arguments.attn_implementation = attention

    def load(split: str) -> Dataset:
        with training_arguments.main_process_first(desc=f"preparing {split}"):
            return load_grounding_dataset(
                data_arguments.dataset_name,
                data_dir=data_arguments.data_dir,
                split=split,
                split_by=data_arguments.split_by,
                image_dir=data_arguments.image_dir,
                box_format=data_arguments.box_format,
                missing_images=data_arguments.missing_images,
                errors=data_arguments.errors,
                num_images=data_arguments.num_train_images if split == data_arguments.train_split else None,
                absent_per_image=data_arguments.absent_per_image,
            )

    def load_evaluation(split: str) -> Dataset:
        dataset = load(split)
        limit = data_arguments.max_eval_rows
        return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))

    if data_arguments.calibrate_scores and training_arguments.do_train and not training_arguments.do_eval:
        raise ValueError(
            "calibrate_scores needs do_eval, which gives the rows for it: set it to true, or calibrate_scores to false"
        )
    # Before the training, so that a name that is wrong does not end it after hours.
    test_dataset = load_evaluation(data_arguments.test_split) if training_arguments.do_predict else None
    # All training expressions give a new model its vocabulary, also those whose boxes are not used.
    train_dataset = load(data_arguments.train_split)
    expressions = train_dataset["expression"]
    train_dataset, caption_dataset = split_labelled(
        train_dataset, data_arguments.num_labelled_images, data_arguments.teacher_boxes
    )
    teacher = None
    has_teacher = model_arguments.teacher_name not in (None, "none")
    draws_boxes = data_arguments.teacher_boxes and training_arguments.do_train
    confirms_boxes = data_arguments.confirmed_model is not None and training_arguments.do_train
    if confirms_boxes and (caption_dataset is None or draws_boxes):
        raise ValueError("confirmed_model needs num_labelled_images, and goes without teacher_boxes")
    if has_teacher and training_arguments.do_train and (training_arguments.distils or draws_boxes or confirms_boxes):
        pretrained = model_arguments.teacher_pretrained
        teacher = ClipTeacher.from_pretrained(
            model_arguments.teacher_name, None if pretrained == "none" else pretrained
        )
    if draws_boxes or confirms_boxes:
        if teacher is None:
            name = "teacher_boxes is true" if draws_boxes else "confirmed_model is given"
            raise ValueError(f"{name}, but there is no teacher: name one with teacher_name")
        teacher.to(training_arguments.device)
        if draws_boxes:
            parts = [part for part in (train_dataset, caption_dataset) if part is not None and len(part) > 0]
            train_dataset = concatenate_datasets([add_teacher_boxes(part, teacher) for part in parts])
            caption_dataset = None
        else:
            model_folder = data_arguments.confirmed_model
            caption_dataset = confirmed_rows(model_folder, caption_dataset, teacher, training_arguments)
    projected = teacher.embed_dim if teacher is not None and training_arguments.distils_embeddings else None
    model, processor = make_model(model_arguments, expressions, projected)
    if data_arguments.calibrate_scores and not model.config.score_head:
        raise ValueError("calibrate_scores is true, but the model has no score_head: set calibrate_scores to false")
    if model_arguments.map_loss_coefficient is not None:
        model.config.map_loss_coefficient = model_arguments.map_loss_coefficient
    student: EpmVGForVisualGrounding | PeftModel = model
    if model_arguments.lora_rank is not None:
        student = with_lora(model, model_arguments.lora_rank, model_arguments.lora_target_modules)
    patience = data_arguments.early_stopping_patience
    trainer = EpmVGTrainer(
        model=student,
        args=training_arguments,
        callbacks=None if patience is None else [EarlyStoppingCallback(patience)],
        train_dataset=train_dataset,
        eval_dataset=load_evaluation(data_arguments.eval_split) if training_arguments.do_eval else None,
        processing_class=processor,
        teacher=teacher if training_arguments.distils else None,
        caption_dataset=caption_dataset if teacher is not None else None,
    )
    if caption_dataset is not None and teacher is None:
        logger.warning("%d rows without boxes are not used, because there is no teacher", len(caption_dataset))
    trained = student.num_parameters(only_trainable=True)
    total = student.num_parameters() / 1e6
    logger.info("%d training expressions, %.1f M parameters, %d of them trained", len(train_dataset), total, trained)

    if training_arguments.do_train:
        result = trainer.train(resume_from_checkpoint=checkpoint_to_resume(training_arguments))
        trainer.save_model()  # the best checkpoint, with load_best_model_at_end
        if data_arguments.calibrate_scores:
            for name, value in trainer.calibrate_scores().items():
                logger.info("calibration of the scores: %s %.3f", name.replace("_", " "), value)
            trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()

    if training_arguments.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)

    if test_dataset is not None:
        output = trainer.predict(test_dataset)
        metrics = dict(output.metrics)
        if trainer.is_world_process_zero():
            blind = blind_accuracy(train_dataset, test_dataset)
            by_kind = accuracy_by_kind(test_dataset, output.predictions)
            metrics.update({f"test_acc@0.5_{group.name}": group.accuracy for group in by_kind})
            metrics.update({f"test_blind_{name}": value for name, value in blind.items()})
            write_predictions(Path(training_arguments.output_dir), test_dataset, output, data_arguments.picture_rows)
            print(f"\nAcc@0.5 on {data_arguments.dataset_name} {data_arguments.test_split}")
            print(f"{output.metrics['test_acc@0.5']:8.3f}  this model")
            for place, group in enumerate(by_kind):
                worst = ", the worst" if place == 0 else ""
                print(f"{group.accuracy:8.3f}  of {group.count} expressions of the kind {group.name}{worst}")
            for name, value in blind.items():
                print(f"{value:8.3f}  blind: {name.replace('_', ' ')}")
        trainer.log_metrics("test", metrics)
        trainer.save_metrics("test", metrics)

    english = None if data_arguments.dataset_name == "custom" else "en"
    card = {
        "license": card_arguments.license,
        "language": card_arguments.language or english,
        "dataset_args": data_arguments.split_by,
    }
    if training_arguments.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)


def accuracy_by_kind(dataset: Dataset, predictions: np.ndarray) -> list[GroupAccuracy]:
    """The accuracy on each kind of expression, the worst first, if the dataset has kinds to tell apart."""
    if "kind" not in dataset.column_names:
        return []
    true_boxes, has_box = find_boxes(dataset["box"], "test data")
    is_right = paired_iou(predictions[has_box], true_boxes[has_box]) >= 0.5
    return accuracy_by_group(is_right, np.array(dataset["kind"])[has_box].tolist())


def write_predictions(folder: Path, dataset: Dataset, output: PredictionOutput, picture_rows: int) -> None:
    """
    Write `predictions.jsonl` with every row, and `predictions.png` with some at even distances, of those with a box if
    there are any.
    """
    true_boxes, has_box = find_boxes(dataset["box"], "test data")
    with (folder / "predictions.jsonl").open("w") as file:
        for number, row in enumerate(dataset.remove_columns("image")):
            line = {key: row[key] for key in ("image_id", "expression")}
            true_box = true_boxes[number].tolist() if has_box[number] else None
            file.write(json.dumps({**line, "box": output.predictions[number].tolist(), "true_box": true_box}) + "\n")
    shown = np.flatnonzero(has_box) if has_box.any() else np.arange(len(dataset))
    chosen = shown[np.linspace(0, len(shown) - 1, min(picture_rows, len(shown))).astype(int)]
    rows = [dataset[int(row)] for row in chosen]
    draw_grid(
        folder / "predictions.png",
        images=[row["image"] for row in rows],
        expressions=[row["expression"] for row in rows],
        boxes=output.predictions[chosen],
        true_boxes=true_boxes[chosen],
    )
    logger.info("wrote %s and predictions.jsonl", folder / "predictions.png")


if __name__ == "__main__":
    main()
