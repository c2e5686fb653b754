"""The gap between the modalities before fusion, as both studies measure it."""

import torch
from datasets import Dataset

from epmvg_hf import EpmVGDataCollator, EpmVGForVisualGrounding, EpmVGProcessor, ImageGroups
from epmvg_hf.evaluation.modality_gap import modality_gap, modality_probe
from epmvg_hf.model.modeling_epmvg import MODEL_INPUTS


@torch.no_grad()
def measure_gap(
    model: EpmVGForVisualGrounding, processor: EpmVGProcessor, test: Dataset, images: int = 100
) -> dict[str, dict[str, float]]:
    """
    The modality gap before fusion, on the first test images: in the space of visual and text tokens, which every
    student has, and in the teacher's space if the student is projected to it.

    Returns:
        `dict`: for each space `gap`, `alignment` and `mismatch` of [`modality_gap`], and `probe`, the accuracy of
        [`modality_probe`].
    """
    collator = EpmVGDataCollator(processor)
    groups = ImageGroups(test)
    batch = collator([groups[index] for index in range(min(images, len(groups)))])
    inputs = {name: batch[name] for name in MODEL_INPUTS if name != "labels" and name in batch}
    training = model.training
    outputs = model.eval().model(**inputs, skip_fusion=True)
    model.train(training)
    image_means, text_means = (
        (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        for states, mask in (
            (outputs.visual_tokens, outputs.visual_mask.flatten(1)),
            (outputs.text_tokens, batch["attention_mask"]),
        )
    )
    spaces = {"tokens": (image_means, text_means)}
    if outputs.image_embeds is not None:
        spaces["teacher_space"] = (outputs.image_embeds, outputs.text_embeds)
    return {
        space: {name: value.item() for name, value in modality_gap(*embeds, batch["image_index"]).items()}
        | {"probe": modality_probe(*embeds, batch["image_index"])}
        for space, embeds in spaces.items()
    }
