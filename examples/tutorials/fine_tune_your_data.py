# %% [markdown]
# # Fine-tune on your own data
#
# You have images, expressions such as "the man in the blue hat", and the box that each of them means. This tutorial
# checks such data, fine-tunes the small model of this repository on it, measures the model before and after, looks at
# what it finds, and loads it for use. It takes a minute or two on one core and downloads nothing. It needs
# `pip install ".[train]"`.
#
# The model that comes along was trained on photos for non-commercial research, and so is what you make of it. Its card
# in `model_cards/epmvg-small-flickr30k` says more.

# %%
import json
from pathlib import Path

from PIL import Image
from transformers import pipeline

from epmvg_hf import (
    EpmVGForVisualGrounding,
    EpmVGProcessor,
    EpmVGTrainer,
    EpmVGTrainingArguments,
    load_grounding_dataset,
)
from epmvg_hf.data.check_data import check_own_data, overlaps
from epmvg_hf.evaluation.visualization import draw_grid

# %% [markdown]
# ## Settings
#
# These are the folders and numbers that you may want to change. The section "More data" at the end says which numbers
# to change when you have more than a few images.

# %%
# A script runs where you call it, a notebook in its own folder. Both find the root of the checkout, with the model.
CHECKOUT = next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "model_cards").is_dir())
MODEL = CHECKOUT / "model_cards" / "epmvg-small-flickr30k"
DATA = CHECKOUT / "outputs" / "tutorial_data"
OUTPUT = CHECKOUT / "outputs" / "tutorial_fine_tuned"

TRAIN_IMAGES = 40
VALIDATION_IMAGES = 20
CANVAS = 160  # pixels; the drawn pictures are small. For photos take 320, which the model was trained with.
STEPS = 200  # with batches of 4 of the 40 images, each image is seen 20 times
LEARNING_RATE = 1e-3

# %% [markdown]
# ## The data
#
# Your data is a folder with images and two files, `train.jsonl` and `validation.jsonl`. Each line has one expression
# with its box, in pixels counted from 0:
#
# ```json
# {"image": "images/0001.jpg", "expression": "the man in the blue hat", "box": [12, 30, 208, 415]}
# ```
#
# So that there is something to train on, this cell makes such a folder of drawn scenes, with up to eight expressions
# for each. **Leave the cell out when you have a folder of your own, and set `DATA` to it.** CSV files and COCO's JSON
# do as well; the guide (`examples/README.md`, "Your own data") says how they look.


# %%
def write_split(split: str, num_images: int) -> None:
    """Writes images as PNG files, and a line for each expression."""
    with (DATA / f"{split}.jsonl").open("w") as lines:
        for row in load_grounding_dataset("shapes", split=split, num_images=num_images):
            image = f"images/{row['image_id']}.png"
            row["image"].save(DATA / image)
            lines.write(json.dumps({"image": image, "expression": row["expression"], "box": row["box"]}) + "\n")


(DATA / "images").mkdir(parents=True, exist_ok=True)
write_split("train", TRAIN_IMAGES)
write_split("validation", VALIDATION_IMAGES)

# %% [markdown]
# ## Check it
#
# Look for mistakes before a training does. In the shell, `epmvg check-data custom FOLDER --box-format xyxy` prints the
# same as a table. You say what the four numbers of a box are, since nothing can tell it from the numbers: `xyxy` are
# two corners, and `xywh` are a corner, the width and the height. No image should be in both files, or the measurement
# below is too good to be true.

# %%
reports, _ = check_own_data(DATA, box_format="xyxy")
for report in reports:
    print(
        f"{report.split}: {report.expressions} expressions for {len(report.image_ids)} images, "
        f"{report.missing_images} images missing, {len(report.problems)} rows that cannot be used"
    )
    for problem in report.problems[:10]:
        print(problem)
for one, other, images in overlaps(reports):
    print(f"{one} and {other} share {images} images")

# %%
train = load_grounding_dataset("custom", data_dir=DATA, split="train", box_format="xyxy")
validation = load_grounding_dataset("custom", data_dir=DATA, split="validation", box_format="xyxy")
print(train)

# %% [markdown]
# ## The model and its training
#
# The model has two towers, one for images and one for texts, which were trained on far more than 40 images. Here they
# are frozen, and only what stands on top of them is trained: the encoder, the fusion of image and text, and the heads.
# A frozen tower gives the same for an image each time, and `cache_frozen_towers` computes it once. That makes the
# steps cheap. It does not go together with augmentation, which changes the images.

# %%
model = EpmVGForVisualGrounding.from_pretrained(MODEL)
processor = EpmVGProcessor.from_pretrained(MODEL)
model.resize_canvas(CANVAS)
processor.image_processor.size = {"height": CANVAS, "width": CANVAS}

trainer = EpmVGTrainer(
    model=model,
    args=EpmVGTrainingArguments(
        str(OUTPUT),
        max_steps=STEPS,
        per_device_train_batch_size=4,  # images, each with all its expressions
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,  # a tenth of the steps
        adam_beta2=0.98,  # suits a short training better than 0.999
        max_grad_norm=1.0,
        frozen_parameters=[r"^model\.vision_model\.", r"^model\.text_model\."],
        cache_frozen_towers=True,
        augment=False,
        logging_steps=20,
        save_strategy="no",
        dataloader_pin_memory=False,  # true is faster on a GPU
    ),
    train_dataset=train,
    eval_dataset=validation,
    processing_class=processor,
)

# %% [markdown]
# ## Before and after
#
# Acc@0.5 is the share of expressions whose box overlaps the true one by half (an intersection over union of at least
# 0.5). The validation rows are not trained on. The model has never seen a drawn shape, so it begins at nothing. With
# the settings above it then finds more than a quarter of the validation boxes, which is a beginning for 40 images.

# %%
before = trainer.evaluate()
trainer.train()
after = trainer.evaluate()
print(f"Acc@0.5 before: {before['eval_acc@0.5']:.3f}, after: {after['eval_acc@0.5']:.3f}")
print(f"mean IoU before: {before['eval_mean_iou']:.3f}, after: {after['eval_mean_iou']:.3f}")

# %% [markdown]
# ## Look at it
#
# A number does not say what goes wrong, and pictures do. The true boxes are green and dashed, the predicted ones red.
# The rows are taken at even distances and not chosen.

# %%
boxes = trainer.predict(validation).predictions  # one xyxy box in pixels for each row
chosen = range(0, len(validation), max(1, len(validation) // 8))
shown = validation.select(chosen)
OUTPUT.mkdir(parents=True, exist_ok=True)
picture = OUTPUT / "predictions.png"
draw_grid(picture, shown["image"][:], shown["expression"][:], boxes[chosen], true_boxes=shown["box"][:])
print("the predictions are drawn in", picture)
Image.open(picture)  # a notebook shows it here

# %% [markdown]
# ## Save and use
#
# `save_model` writes the model and its processor, and `create_model_card` writes what was measured and how into a
# `README.md` beside them. The folder is all that the pipeline needs, also on another machine.

# %%
trainer.save_model()
trainer.create_model_card()
grounder = pipeline("visual-grounding", model=str(OUTPUT))
result = grounder(shown[0]["image"], shown[0]["expression"])
print(f"{result['text']!r} is at {result['box']}, with a score of {result['score']:.2f}")

# %% [markdown]
# From the shell, it is `epmvg ground IMAGE EXPRESSION --model outputs/tutorial_fine_tuned --save boxes.png`.
#
# ## More data
#
# All of this is the same with 40,000 rows; some settings change. What follows is a start and not an optimum, so try a
# few learning rates on the validation rows.
#
# * **Some ten images:** as above, with 20 passes through the images.
# * **Some hundred images:** 10 passes, batches of 8 images, and `CANVAS = 320` for photos. Add
#   `eval_strategy="epoch"`, `save_strategy="epoch"`, `load_best_model_at_end=True` and
#   `metric_for_best_model="acc@0.5"`, so that the best epoch is kept. `num_train_epochs=10` takes the place of
#   `max_steps`.
# * **Thousands of images:** train the towers as well. Leave out `frozen_parameters` and `cache_frozen_towers`, and
#   give `learning_rate=4e-4`, `vision_learning_rate=1.5e-4`, `text_learning_rate=5e-5`, 4 epochs and batches of 32
#   images. `augment=True` is for photos with English expressions.
#
# One command does all of the last kind, with these learning rates, checkpoints, curves and a model card. The folder
# `my_data` stands for yours:
#
# ```bash
# epmvg train examples/configs/custom.yaml --data_dir my_data --output_dir outputs/mine
# ```
#
# The scores of the model that comes along are probabilities on photos like those that it was trained on. With some
# hundred validation rows, `trainer.calibrate_scores()` before `save_model` makes them probabilities on yours
# (`--calibrate_scores true` for the command). `epmvg evaluate` then writes a report about the errors.
