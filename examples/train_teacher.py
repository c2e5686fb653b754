#!/usr/bin/env python
"""Train a small CLIP on images and captions, without boxes, and save it as a folder that `ClipTeacher` loads.

python examples/train_teacher.py                                      # on drawn shapes, which needs no files
python examples/train_teacher.py --resume_from_checkpoint true        # continue an interrupted run
python examples/train_teacher.py examples/configs/teachers/flickr30k.yaml --data_dir flickr30k_entities
python examples/train_teacher.py examples/configs/teachers/flickr30k_towers.yaml --data_dir flickr30k_entities
"""

import json
import random
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from datasets import Dataset
from open_clip.model import CLIP, CustomTextCLIP
from safetensors.torch import save_file
from torch import nn
from torch.optim import AdamW
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from epmvg_hf import ClipTeacher, EpmVGImageProcessor, ImageGroups, load_grounding_dataset
from epmvg_hf.data.shapes import GENERIC_NOUNS
from epmvg_hf.distillation.patch_embeddings import pooled_and_patches
from epmvg_hf.distillation.teacher_boxes import boxes_of_maps
from epmvg_hf.evaluation.accuracy import paired_iou
from epmvg_hf.runs.command_line import (
    check_output_dir,
    checkpoint_to_resume,
    parse_arguments,
    short_errors,
    show_own_messages,
    use_hardware,
)
from epmvg_hf.runs.trained_tokenizer import train_tokenizer
from epmvg_hf.training.optimization import freeze_parameters

DEFAULT_FILE = Path(__file__).parent / "configs" / "teachers" / "shapes.yaml"
MAX_OBJECTS_IN_LIST = 4
LISTS_PER_SCENE, PHRASES_PER_OBJECT = 8, 4
TEXT_PARTS = 4


@dataclass
class TeacherArguments:
    """The teacher to train, and its data."""

    config_name: str | None = field(default=None, metadata={"help": "JSON file with open_clip's model config."})
    dataset_name: str = field(default="shapes", metadata={"help": "shapes or flickr30k_entities."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder with the benchmark's files."})
    missing_images: str = field(default="error", metadata={"help": "error or skip."})
    scenes_seed: int = field(default=0, metadata={"help": "Seed of the training scenes of `shapes`."})
    num_train_images: int | None = field(default=None, metadata={"help": "How many training scenes `shapes` draws."})
    canvas_size: int = field(default=128, metadata={"help": "Side of the square canvas of the students, in pixels."})
    vision_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder of the pretrained timm model that config_name names, to start from."}
    )
    text_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the pretrained text tower of transformers that config_name names, to start from."
        },
    )
    tower_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of pretrained towers; with 0 they stay as they are."}
    )
    frozen_parameters: list[str] | None = field(
        default=None,
        metadata={"help": "Do not train parameters in whose name one of these regular expressions is found."},
    )
    used_image_size: int | None = field(
        default=None,
        metadata={
            "help": "Side in pixels at which a finished teacher of pretrained towers sees images, by default that of "
            "its training. A larger one gives smaller patches (FixRes, Touvron et al. 2019)."
        },
    )
    phrases_per_image: int = field(
        default=1, metadata={"help": "How many phrases of an image are compared with its patches in a step."}
    )


class CaptionedImages(torch.utils.data.Dataset):
    """
    Images in memory, as square canvases `(images, 3, S, S)` of uint8, and three lists of texts for each: captions of
    the whole image, phrases for single things in it, and its expressions. Boxes are never read.

    Args:
        dataset (`datasets.Dataset`):
            Rows with `image`, `image_id`, `expression`, and `objects` (shapes) or `sentence` (Flickr30K Entities).
        canvas_size (`int`): side of the canvas in pixels.
        phrases_per_image (`int`, *optional*, defaults to 1): how many phrases an item has.
    """

    def __init__(self, dataset: Dataset, canvas_size: int, phrases_per_image: int = 1):
        self.phrases_per_image = phrases_per_image
        groups = ImageGroups(dataset).groups
        about_scene = "objects" if "objects" in dataset.column_names else "sentence"
        images, texts = dataset.select_columns(["image"]), dataset.select_columns(["expression", about_scene])
        image_processor = EpmVGImageProcessor(size={"height": canvas_size, "width": canvas_size})
        self.canvases = torch.empty(len(groups), 3, canvas_size, canvas_size, dtype=torch.uint8)
        self.sentences, self.phrases, self.expressions = [], [], []
        rng = random.Random(0)
        for position, indices in enumerate(tqdm(groups, desc="reading images", disable=None)):
            # Normalising and undoing it gives the padding the colour that it has on the student's canvas.
            pixel_values = image_processor(images[indices[0]]["image"])["pixel_values"]
            self.canvases[position] = (image_processor.unnormalize(pixel_values)[0] * 255).round()
            columns = texts[indices]
            self.expressions.append(columns["expression"])
            if about_scene == "objects":
                objects = columns["objects"][0]
                self.sentences.append([list_objects(objects, rng) for _ in range(LISTS_PER_SCENE)])
                self.phrases.append([name_object(item, rng) for item in objects for _ in range(PHRASES_PER_OBJECT)])
            else:
                self.sentences.append(sorted(set(columns["sentence"])))
                self.phrases.append(columns["expression"])

    def __len__(self) -> int:
        return len(self.canvases)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, list[str]]:
        """A canvas with a caption, an expression and phrases, of which those of a short list may repeat."""
        phrases = self.phrases[index]
        few = random.sample(phrases, min(self.phrases_per_image, len(phrases)))
        few += random.choices(phrases, k=self.phrases_per_image - len(few))
        return self.canvases[index], [
            random.choice(self.sentences[index]),
            random.choice(self.expressions[index]),
            *few,
        ]

    def all_captions(self) -> list[str]:
        return [
            text for lists in (self.sentences, self.phrases, self.expressions) for texts in lists for text in texts
        ]


def list_objects(objects: list[dict], rng: random.Random) -> str:
    """A caption of some objects of a scene, such as "a small red star and a large blue circle"."""
    listed = rng.sample(objects, rng.randint(1, min(len(objects), MAX_OBJECTS_IN_LIST)))
    return " and ".join(f"a {item['size']} {item['color']} {item['shape']}" for item in listed)


def name_object(item: dict, rng: random.Random) -> str:
    """A phrase such as "the red circle", "small star" or "the blue one"."""
    noun = item["shape"] if rng.random() < 0.8 else rng.choice(GENERIC_NOUNS)
    words = [item["size"]] * (rng.random() < 0.4) + [item["color"]] * (rng.random() < 0.8) + [noun]
    return " ".join(["the"] * (rng.random() < 0.75) + words)


class ContrastiveModel(nn.Module):
    """
    A CLIP with its loss, as a model that `Trainer` can train. Captions and expressions are compared with whole images.
    Phrases, each of which names one thing, are compared with the patches that resemble them most, because otherwise
    nothing would teach the patches to show where a thing is. An image's score for a phrase is the mean of its patches'
    scores, weighted by their softmax, as in PACL (Mukhoti et al. 2023, "Open Vocabulary Semantic Segmentation with
    Patch Aligned Contrastive Learning").
    """

    def __init__(self, clip: CLIP | CustomTextCLIP, patch_temperature: float = 0.05):
        super().__init__()
        self.clip, self.patch_temperature = clip, patch_temperature

    def train(self, mode: bool = True) -> "ContrastiveModel":
        """Sets the mode, except that batch norms of pretrained towers keep their statistics, as in the student."""
        super().train(mode)
        if isinstance(self.clip, CustomTextCLIP):
            for module in self.clip.visual.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def forward(self, pixel_values: torch.Tensor, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        The loss of normalised `pixel_values` (B, 3, S, S) and of `input_ids` (2 + P, B, L), which are a caption, an
        expression and P phrases of each image.
        """
        pooled, patches = pooled_and_patches(self.clip.visual, pixel_values)
        image_embeds = nn.functional.normalize(pooled.float(), dim=-1)
        patch_embeds = nn.functional.normalize(patches.float(), dim=-1).flatten(1, 2)
        text_embeds = self.encode_texts(input_ids.flatten(0, 1)).float()
        sentences, expressions, *phrases = text_embeds.unflatten(0, input_ids.shape[:2])
        similarities = [image_embeds @ sentences.T, image_embeds @ expressions.T]
        for texts in phrases:
            per_patch = torch.einsum("bve,ne->bnv", patch_embeds, texts)
            similarities.append((per_patch * (per_patch / self.patch_temperature).softmax(-1)).sum(-1))
        scale = self.clip.logit_scale.exp().clamp(max=100)  # the bound that CLIP was trained with
        losses = [
            contrastive_loss(scale * similarity, same_texts(tokens))
            for similarity, tokens in zip(similarities, input_ids, strict=True)
        ]
        return {"loss": (losses[0] + losses[1] + torch.stack(losses[2:]).mean()) / 3}

    def encode_texts(self, input_ids: torch.Tensor) -> torch.Tensor:
        """
        Unit embeddings (T, e) of the texts `input_ids` (T, L). A text tower of transformers takes as long for padding
        as for words, so it gets short texts apart from long ones.
        """
        if not isinstance(self.clip, CustomTextCLIP):
            return self.clip.encode_text(input_ids, normalize=True)
        lengths = (input_ids != self.clip.text.config.pad_token_id).sum(1)
        order = lengths.argsort()
        parts = [
            self.clip.encode_text(input_ids[rows, : lengths[rows].max()], True) for rows in order.chunk(TEXT_PARTS)
        ]
        return torch.cat(parts)[order.argsort()]


def contrastive_loss(logits: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
    """
    CLIP's loss, InfoNCE in both directions, of `logits` (B, B) with matching pairs on the diagonal. Pairs elsewhere
    whose texts are the `same` (B, B) are left out: "a man" is true of many images.
    """
    target = torch.arange(len(logits), device=logits.device)
    logits = logits.masked_fill(same, -torch.inf)
    return (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2


def same_texts(input_ids: torch.Tensor) -> torch.Tensor:
    """Which of the texts `input_ids` (B, L) are the same as another one, (B, B); none is taken for itself."""
    same = (input_ids[:, None] == input_ids).all(-1)
    return same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)


class CaptionCollator:
    """Makes the inputs of [`ContrastiveModel`] from items of [`CaptionedImages`]."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context_length: int, image_size: int, settings: dict):
        self.tokenizer, self.context_length = tokenizer, context_length
        self.image_size, self.settings = image_size, settings

    def __call__(self, items: list[tuple[torch.Tensor, list[str]]]) -> dict[str, torch.Tensor]:
        canvases, texts_of_each = zip(*items, strict=True)
        captions = list(zip(*texts_of_each, strict=True))
        return {
            "pixel_values": preprocess(torch.stack(canvases), self.image_size, self.settings),
            "input_ids": self.tokenizer(
                [text for texts in captions for text in texts],
                padding="max_length",
                truncation=True,
                max_length=self.context_length,
                return_tensors="pt",
            ).input_ids.unflatten(0, (len(captions), len(items))),
        }


def preprocess(canvases: torch.Tensor, image_size: int, settings: dict) -> torch.Tensor:
    """Resizes and normalises canvases as `ClipTeacher` will do it, by open_clip's `preprocess_cfg`."""
    pixels = nn.functional.interpolate(canvases / 255, (image_size, image_size), mode="bicubic", antialias=True)
    mean, std = torch.tensor([settings["mean"], settings["std"]])[..., None, None]
    # Convolutions are faster in this memory format.
    return ((pixels.clamp(0, 1) - mean) / std).contiguous(memory_format=torch.channels_last)


def make_clip(model_config: dict, vision: str | None, text: str | None) -> CLIP | CustomTextCLIP:
    """
    A new CLIP, or one whose towers are those of the folders `vision` (timm) and `text` (transformers), so that only
    the projections into the common space are new.
    """
    if vision is None or text is None:
        if vision is not None or text is not None:
            raise ValueError("vision_name_or_path and text_name_or_path must be given together")
        return CLIP(**model_config)
    # The configuration names the tower on the Hub. Here only its folder is read.
    text_config = model_config["text_cfg"] | {"hf_model_name": text, "hf_model_pretrained": True}
    clip = CustomTextCLIP(**model_config | {"text_cfg": text_config})
    trunk = timm.create_model(f"local-dir:{vision}", pretrained=True, num_classes=0)
    clip.visual.trunk.load_state_dict(trunk.state_dict())
    return clip


def make_optimizer(model: ContrastiveModel, arguments: TrainingArguments, teacher: TeacherArguments) -> AdamW:
    """AdamW without weight decay of norms and biases, and with a rate of its own for pretrained towers."""
    freeze_parameters(model, teacher.frozen_parameters or [])
    groups = defaultdict(list)
    for name, parameter in model.named_parameters():
        in_tower = name.startswith(("clip.visual.trunk.", "clip.text.transformer."))
        rate = arguments.learning_rate
        if in_tower and teacher.tower_learning_rate is not None:
            rate = teacher.tower_learning_rate
        parameter.requires_grad_(parameter.requires_grad and rate > 0)
        if parameter.requires_grad:
            groups[rate, parameter.ndim > 1].append(parameter)
    return AdamW(
        [
            {"params": members, "lr": rate, "weight_decay": arguments.weight_decay if decay else 0.0}
            for (rate, decay), members in groups.items()
        ],
        betas=(arguments.adam_beta1, arguments.adam_beta2),
    )


def save_teacher(
    clip: CLIP | CustomTextCLIP, model_config: dict, settings: dict, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """
    Writes a folder for open_clip's `local-dir:`, with the configuration of a text tower of transformers. Weights are
    rounded to float16, which halves their size.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in clip.state_dict().items()
    }
    save_file(weights, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    config = {"model_cfg": model_config, "preprocess_cfg": settings}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    if isinstance(clip, CustomTextCLIP):
        clip.text.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def evaluate_teacher(teacher: ClipTeacher, images: CaptionedImages, dataset: Dataset) -> dict[str, float]:
    """
    Image-text retrieval among all images of a split, with one text for each, and how often the patch that resembles an
    expression most is in its box. Only this evaluation reads boxes.
    """
    batches = torch.arange(len(images)).split(100)
    encoded = [teacher.encode_images(images.canvases[batch] / 255) for batch in batches]
    image_embeds, patch_embeds = (torch.cat(parts) for parts in zip(*encoded, strict=True))
    metrics = {"images": len(images), "chance_recall@1": 1 / len(images), "chance_recall@5": 5 / len(images)}
    for name, captions in (("sentence", images.sentences), ("expression", images.expressions)):
        text_embeds = teacher.encode_texts([texts[0] for texts in captions])
        similarity = image_embeds @ text_embeds.T
        for direction, scores in (("image_to_text", similarity), ("text_to_image", similarity.T)):
            rank = (scores > scores.diagonal()[:, None]).sum(1)
            for k in (1, 5):
                metrics[f"{name}_{direction}_recall@{k}"] = (rank < k).float().mean().item()
    return {**metrics, **pointing_accuracy(teacher, patch_embeds, images, dataset)}


def pointing_accuracy(
    teacher: ClipTeacher, patch_embeds: torch.Tensor, images: CaptionedImages, dataset: Dataset
) -> dict[str, float]:
    """
    How many expressions have their best patch's centre in the box, how many would with a random patch, and how many of
    the boxes that the teacher draws are right.
    """
    image_processor = EpmVGImageProcessor(size={"height": (side := images.canvases.shape[-1]), "width": side})
    groups = ImageGroups(dataset)
    index = torch.empty(len(dataset), dtype=torch.long)
    for position, group in enumerate(groups.groups):
        index[group] = position
    sizes = torch.tensor([groups.images[group[0]]["image"].size[::-1] for group in groups.groups])
    letterbox = image_processor.letterbox(sizes).select(index)
    boxes = torch.tensor(groups.rows[:]["box"])
    cx, cy, width, height = letterbox.to_labels(boxes).unbind(-1)
    rows, columns = patch_embeds.shape[1:3]
    x = ((torch.arange(columns) + 0.5) / columns).repeat(rows)
    y = ((torch.arange(rows) + 0.5) / rows).repeat_interleave(columns)
    inside = ((x - cx[:, None]).abs() * 2 <= width[:, None]) & ((y - cy[:, None]).abs() * 2 <= height[:, None])
    text_embeds = teacher.encode_texts(groups.rows[:]["expression"])
    maps = torch.einsum("nhwe,ne->nhw", patch_embeds[index], text_embeds)
    hit = inside.gather(1, maps.flatten(1).argmax(1)[:, None])[:, 0].float()
    drawn = boxes_of_maps(maps, letterbox)
    metrics = {
        "pointing": hit.mean().item(),
        "pointing_at_random": inside.float().mean().item(),
        "drawn_acc@0.5": float((paired_iou(drawn.numpy(), boxes.numpy()) >= 0.5).mean()),
    }
    if "kind" in dataset.column_names:
        kinds = list(dataset["kind"])
        for kind in sorted(set(kinds)):
            metrics[f"pointing_{kind}"] = hit[torch.tensor([k == kind for k in kinds])].mean().item()
    return metrics


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0].startswith("-"):
        arguments = [str(DEFAULT_FILE), *arguments]
    teacher_arguments, training_arguments = parse_arguments((TeacherArguments, TrainingArguments), __doc__, arguments)
    if teacher_arguments.config_name is None:
        raise ValueError("config_name is missing, the JSON file with open_clip's model config")
    check_output_dir(training_arguments)
    if training_arguments.world_size > 1:
        raise ValueError("train_teacher.py runs in one process only: its loss compares the pairs within one batch")
    vision, text = teacher_arguments.vision_name_or_path, teacher_arguments.text_name_or_path
    if vision is None and teacher_arguments.used_image_size is not None:
        raise ValueError("used_image_size is for teachers of pretrained towers, which take images of any size")
    show_own_messages()
    use_hardware(training_arguments)
    set_seed(training_arguments.seed)
    config = json.loads(Path(teacher_arguments.config_name).read_text())
    model_config = config.get("model_cfg", config)
    settings = {"mean": OPENAI_CLIP_MEAN, "std": OPENAI_CLIP_STD, "interpolation": "bicubic"}
    settings |= config.get("preprocess_cfg", {})
    canvas_size = teacher_arguments.canvas_size
    folder = Path(training_arguments.output_dir)

    def load(split: str, **options: Any) -> Dataset:
        name, data_dir = teacher_arguments.dataset_name, teacher_arguments.data_dir
        missing_images = teacher_arguments.missing_images
        return load_grounding_dataset(name, data_dir=data_dir, split=split, missing_images=missing_images, **options)

    options = {}
    if teacher_arguments.dataset_name == "shapes":
        options = {"seed": teacher_arguments.scenes_seed, "num_images": teacher_arguments.num_train_images}
    images = CaptionedImages(load("train", **options), canvas_size, teacher_arguments.phrases_per_image)
    if text is None:
        tokenizer = train_tokenizer(images.all_captions(), model_config["text_cfg"]["vocab_size"])
        model_config["text_cfg"] |= {"vocab_size": len(tokenizer), "eos_id": tokenizer.sep_token_id}
    else:
        tokenizer = AutoTokenizer.from_pretrained(text)
    model = ContrastiveModel(make_clip(model_config, vision, text))

    trainer = Trainer(
        model=model,
        args=training_arguments,
        train_dataset=images,
        data_collator=CaptionCollator(
            tokenizer, model_config["text_cfg"]["context_length"], model_config["vision_cfg"]["image_size"], settings
        ),
        optimizers=(make_optimizer(model, training_arguments, teacher_arguments), None),
    )
    result = trainer.train(resume_from_checkpoint=checkpoint_to_resume(training_arguments))
    if teacher_arguments.used_image_size is not None:
        model_config["vision_cfg"]["image_size"] = teacher_arguments.used_image_size
    save_teacher(model.clip, model_config, settings, tokenizer, folder / "teacher")

    validation = load("validation")
    teacher = ClipTeacher.from_pretrained(f"local-dir:{folder / 'teacher'}")
    metrics = evaluate_teacher(teacher, CaptionedImages(validation, canvas_size), validation)
    metrics |= {"train_images": len(images), "train_runtime": result.metrics["train_runtime"]}
    (folder / "teacher" / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    with short_errors():
        main()
