# %% [markdown]
# # Distil from your own CLIP
#
# Boxes are expensive, and captions are not. A CLIP knows from images and captions which part of a picture resembles
# which words, and a grounding model can learn that from it before and beside the boxes that you have. This tutorial
# trains one tiny model with a CLIP as its teacher and one without, for equally many steps, and prints what both are
# worth. It takes about three minutes on one core and downloads nothing. It needs `pip install ".[train,teacher]"`.
#
# **What to expect.** So few steps show how it is done, and not how much it brings; either model may come out ahead.
# The study in `model_cards/distillation-study` ran long enough, with several seeds, to say what a teacher is worth.

# %%
import json
from pathlib import Path

from datasets import Dataset
from transformers import pipeline, set_seed

from epmvg_hf import (
    ClipTeacher,
    EpmVGConfig,
    EpmVGForVisualGrounding,
    EpmVGImageProcessor,
    EpmVGProcessor,
    EpmVGTrainer,
    EpmVGTrainingArguments,
    GroundingAccuracy,
    add_teacher_boxes,
    load_grounding_dataset,
)
from epmvg_hf.runs.trained_tokenizer import train_tokenizer

# %% [markdown]
# ## Settings

# %%
# A script runs where you call it, a notebook in its own folder. Both find the root of the checkout, with the teacher.
CHECKOUT = next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "model_cards").is_dir())
TEACHER = f"local-dir:{CHECKOUT / 'model_cards' / 'clip-tiny-shapes'}"
OUTPUT = CHECKOUT / "outputs" / "tutorial_distilled"

LABELLED_IMAGES = 60
CAPTIONED_IMAGES = 180
VALIDATION_IMAGES = 100
STEPS = 800

# %% [markdown]
# ## Your CLIP
#
# The teacher that comes along knows drawn shapes, on which this tutorial runs. **For photos, take a CLIP that knows
# photos.** Each of these lines gives one:
#
# ```python
# teacher = ClipTeacher.from_pretrained("ViT-B-32", "openai")  # any model of open_clip, by name and weights
# teacher = ClipTeacher.from_pretrained("local-dir:my_clip")  # a folder that open_clip wrote
# teacher = ClipTeacher.from_pretrained("transformers:my_clip")  # a CLIP of transformers, in a folder or on the Hub
# ```

# %%
teacher = ClipTeacher.from_pretrained(TEACHER)
print(f"the teacher sees {teacher.image_size} pixels, in {teacher.embed_dim} dimensions")

# %% [markdown]
# ## The data
#
# A few images have expressions with boxes. More images have words alone: expressions without a box, or captions. Your
# own data is loaded in the same way, as the tutorial `fine_tune_your_data` shows:
# `load_grounding_dataset("custom", data_dir="my_data", split="train", box_format="xyxy")`. A row whose `box` is `null`
# in the file is one without a box.

# %%
scenes = load_grounding_dataset("shapes", split="train", num_images=LABELLED_IMAGES + CAPTIONED_IMAGES)
labelled_ids = set(list(dict.fromkeys(scenes["image_id"]))[:LABELLED_IMAGES])
has_label = [image_id in labelled_ids for image_id in scenes["image_id"]]
labelled = scenes.select([row for row, label in enumerate(has_label) if label])
captions = scenes.select([row for row, label in enumerate(has_label) if not label]).remove_columns("box")
validation = load_grounding_dataset("shapes", split="validation", num_images=VALIDATION_IMAGES)
print(f"{len(labelled)} expressions with a box, {len(captions)} without, {len(validation)} to evaluate on")

# %% [markdown]
# ## Does the CLIP know your pictures?
#
# Ask it before you train. `add_teacher_boxes` draws the box that the teacher would draw, around all that resembles the
# words almost as much as the best place does. Compare these boxes with your true ones. A CLIP is no detector, so the
# share of right boxes may be small, and the teacher of shapes gets few of them; but a CLIP that is not better than a
# box in the middle of the picture has nothing to teach about your data.

# %%
metric = GroundingAccuracy(keep_in_memory=True)
drawn = add_teacher_boxes(labelled.remove_columns("box"), teacher)
middle = [
    [0.25 * image.width, 0.25 * image.height, 0.75 * image.width, 0.75 * image.height] for image in labelled["image"]
]
for name, boxes in {"the teacher's boxes": drawn["box"][:], "a box in the middle": middle}.items():
    quality = metric.compute(predictions=boxes, references=labelled["box"][:])
    print(f"{name}: Acc@0.5 {quality['acc@0.5']:.3f}, mean IoU {quality['mean_iou']:.3f}")

# %% [markdown]
# ## Two students
#
# The student is a new model from a configuration, with a tokenizer made from the expressions. A student with
# pretrained towers comes from `EpmVGForVisualGrounding.from_vision_text_pretrained`, and a saved one from
# `from_pretrained`.
#
# The model itself can learn a map of where the words are, from the boxes. With few boxes it learns them by heart, so
# its weight is 0 here for both students, and the map comes from the teacher alone: the loss term `loss_teacher_map`.
# With many boxes, leave `map_loss_coefficient` as it is.
#
# Both students have the same steps with the same labelled images. In each step the second one also sees as many images
# without boxes, which is what makes its steps cost more.

# %%
settings = json.loads((CHECKOUT / "examples" / "configs" / "tiny.json").read_text())
tokenizer = train_tokenizer(scenes["expression"], settings["text_config"]["vocab_size"])
settings["text_config"]["vocab_size"] = len(tokenizer)
settings["map_loss_coefficient"] = 0.0
canvas = {"height": settings["image_size"], "width": settings["image_size"]}
processor = EpmVGProcessor(EpmVGImageProcessor(size=canvas), tokenizer, settings["max_text_length"])


def train_student(
    name: str, teacher: ClipTeacher | None = None, caption_dataset: Dataset | None = None
) -> tuple[EpmVGTrainer, float]:
    """Trains a student, always with the same first weights and number of steps, and returns its Acc@0.5."""
    set_seed(0)
    trainer = EpmVGTrainer(
        model=EpmVGForVisualGrounding(EpmVGConfig(**settings)),
        args=EpmVGTrainingArguments(
            str(OUTPUT / name),
            max_steps=STEPS,
            per_device_train_batch_size=4,  # images; as many with captions come along where there are any
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            adam_beta2=0.98,
            max_grad_norm=1.0,
            augment=False,  # so that the teacher sees each image once, and its outputs are kept
            logging_steps=max(1, STEPS // 10),
            save_strategy="no",
            dataloader_pin_memory=False,  # true is faster on a GPU
        ),
        train_dataset=labelled,
        eval_dataset=validation,
        processing_class=processor,
        teacher=teacher,
        caption_dataset=caption_dataset,
    )
    trainer.train()
    return trainer, trainer.evaluate()["eval_acc@0.5"]


_, alone = train_student("alone")
trainer, distilled = train_student("distilled", teacher, captions)
print(f"Acc@0.5 without the teacher: {alone:.3f}, with the teacher and captions: {distilled:.3f}")

# %% [markdown]
# On our machine this printed 0.233 without the teacher and 0.268 with it. A share of 800 expressions is known to about
# three points in either direction, and other seeds give other pairs, so one such run proves nothing.
#
# Whether the student learns from the teacher at all shows in the log: its map comes closer to the teacher's when
# `loss_teacher_map` falls.

# %%
learned = [log["loss_teacher_map"] for log in trainer.state.log_history if "loss_teacher_map" in log]
print(f"loss_teacher_map: {learned[0]:.3f} at first, {learned[-1]:.3f} at the end")

# %% [markdown]
# ## Save and use
#
# The teacher is no part of what is saved, and inference costs nothing more.

# %%
trainer.save_model()
grounder = pipeline("visual-grounding", model=str(OUTPUT / "distilled"))
result = grounder(validation[0]["image"], validation[0]["expression"])
print(f"{result['text']!r} is at {result['box']}")
print("saved:", sorted(path.name for path in (OUTPUT / "distilled").iterdir()))

# %% [markdown]
# ## From here
#
# * **More steps.** `epmvg train examples/configs/shapes.yaml` trains such a student with such a teacher for 2,400
#   steps. A small difference between two runs means nothing: repeat both with other seeds.
# * **Many captions, few boxes.** Let the student learn from the teacher alone first, in large batches
#   (`distil_only=True`), and learn the boxes in a second training. In the study this helped most.
# * **Boxes that the teacher draws.** If the comparison above was good, train on `add_teacher_boxes(captions, teacher)`
#   first and on your true boxes afterwards.
# * **Other terms.** `relation_loss_coefficient` and `feature_loss_coefficient` compare whole images with whole texts.
#   In the study they gave nothing. They need a student with `teacher_projection_dim=teacher.embed_dim`.
#
# The guide (`examples/README.md`, "Distil") has all of it, and says how to train a CLIP on images and captions of your
# own.
