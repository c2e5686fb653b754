"""The terms of the loss that a teacher brings."""

import torch
from torch import nn


@torch.no_grad()
def teacher_map_target(
    patch_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    image_index: torch.Tensor | None,
    visual_mask: torch.Tensor,
    temperature: float | torch.Tensor,
) -> torch.Tensor:
    """
    The teacher's patch-text map as a distribution over the student's grid: cosine of the expression with every patch
    of its own image, resized, then a softmax over positions. The cosines are DenseCLIP's score map
    (raoyongming/DenseCLIP: segmentation/denseclip/denseclip.py), which MaskCLIP (Zhou et al. 2022, "Extract Free Dense
    Labels from CLIP") takes from CLIP without training. Both compare classes at a position; to compare positions for
    an expression is our reading of EpmVG.

    Args:
        patch_embeds (`torch.FloatTensor` of shape `(B, h, w, e)`):
            The teacher's patches, L2-normalised. Their grid covers the student's canvas, padding included.
        text_embeds (`torch.FloatTensor` of shape `(N, e)`): the teacher's expressions, L2-normalised.
        image_index (`torch.LongTensor` of shape `(N,)` or `None`): image of each expression; None: N = B, in order.
        visual_mask (`torch.BoolTensor` of shape `(N, grid_height, grid_width)`): False on padding.
        temperature (`float`): what the cosines are divided by.

    Returns:
        `torch.FloatTensor` of shape `(N, grid_height * grid_width)`; 0 on padding, rows sum to 1 (to 0 where all is
        padding).

    Example:

    ```python
    >>> import torch
    >>> from epmvg_hf.distillation.losses import teacher_map_target

    >>> patches, words = torch.eye(2).view(1, 1, 2, 2), torch.tensor([[1.0, 0.0]])  # which show the first patch
    >>> teacher_map_target(patches, words, None, torch.ones(1, 1, 2, dtype=torch.bool), temperature=0.5)
    tensor([[0.8808, 0.1192]])
    ```
    """
    # All images with all expressions, of which one image each is kept: more products than needed, but copying an
    # image's patches once for each of its expressions takes longer, and far more memory.
    scores = _float32_product(patch_embeds.flatten(0, 2), text_embeds.T).unflatten(0, patch_embeds.shape[:3])
    expressions = torch.arange(len(text_embeds), device=scores.device)
    scores = scores[expressions if image_index is None else image_index, :, :, expressions][:, None]
    if scores.shape[2:] != visual_mask.shape[1:]:
        # Antialiasing widens the filter only along an axis that shrinks.
        scores = nn.functional.interpolate(
            scores, size=visual_mask.shape[1:], mode="bilinear", align_corners=False, antialias=True
        )
    mask = visual_mask.flatten(1)
    scores = (scores.flatten(1) / temperature).masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1) * mask


def relation_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    teacher_image_embeds: torch.Tensor,
    teacher_text_embeds: torch.Tensor,
    student_temperature: float | torch.Tensor,
    teacher_temperature: float | torch.Tensor,
) -> torch.Tensor:
    """
    KL divergence from the teacher's to the student's distribution of each image over the batch's expressions, and of
    each expression over the batch's images; half the sum of the two means. Our reading of EpmVG. It is CRD of CLIP-KD
    (winycg/CLIP-KD: src/open_clip/loss.py) and, but for the teacher's entropy, which no gradient sees, the affinity
    mimicking of TinyCLIP (wkcn/TinyCLIP: src/open_clip/clip_soft_loss.py); like both without a factor of temperature².

    Each image enters once, however many expressions it has, so none has more mass for it in the second direction. And
    as the targets are soft, expressions of one image are not each other's negatives.

    Args:
        image_embeds (`torch.FloatTensor` of shape `(B, e)`): the student's images, L2-normalised.
        text_embeds (`torch.FloatTensor` of shape `(N, e)`): the student's expressions, likewise.
        teacher_image_embeds (`torch.FloatTensor` of shape `(B, e')`): the teacher's; e' may differ from e.
        teacher_text_embeds (`torch.FloatTensor` of shape `(N, e')`): likewise.
        student_temperature (`float`): what the student's cosines are divided by; a tensor may be learned.
        teacher_temperature (`float`): what the teacher's cosines are divided by.

    Returns:
        `torch.FloatTensor`, a scalar in nats.

    Example:

    ```python
    >>> import torch
    >>> from epmvg_hf.distillation.losses import relation_loss

    >>> teacher = torch.eye(2)  # of two images and of the two expressions that belong to them
    >>> relation_loss(teacher, teacher, teacher, teacher, 1.0, 1.0)
    tensor(0.)
    >>> relation_loss(teacher, teacher.flip(0), teacher, teacher, 1.0, 1.0)  # the student mixes them up
    tensor(0.4621)
    ```
    """
    student = _float32_product(image_embeds, text_embeds.T) / student_temperature
    teacher = (_float32_product(teacher_image_embeds, teacher_text_embeds.T) / teacher_temperature).detach()
    over_texts, over_images = (
        nn.functional.kl_div(student.log_softmax(dim), teacher.log_softmax(dim), reduction="none", log_target=True)
        .sum(dim)
        .mean()
        for dim in (1, 0)
    )
    return (over_texts + over_images) / 2


def feature_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    teacher_image_embeds: torch.Tensor,
    teacher_text_embeds: torch.Tensor,
) -> torch.Tensor:
    """
    1 - cosine of the student's and the teacher's embedding, mean over images plus mean over expressions. A scale-free
    version of CLIP-KD's FD (winycg/CLIP-KD: src/open_clip/loss.py), whose mean squared error of normalised embeddings
    is 2 / e times this: weaker the wider the teacher.

    Args:
        image_embeds (`torch.FloatTensor` of shape `(B, e)`): the student's images, of any length.
        text_embeds (`torch.FloatTensor` of shape `(N, e)`): the student's expressions, likewise.
        teacher_image_embeds (`torch.FloatTensor` of shape `(B, e)`): the teacher's.
        teacher_text_embeds (`torch.FloatTensor` of shape `(N, e)`): likewise.

    Returns:
        `torch.FloatTensor`, a scalar in [0, 4].

    Raises:
        ValueError: the student's and the teacher's embeddings differ in width.

    Example:

    ```python
    >>> import torch
    >>> from epmvg_hf.distillation.losses import feature_loss

    >>> teacher = torch.eye(2)
    >>> feature_loss(3 * teacher, teacher, teacher, teacher), feature_loss(-teacher, teacher, teacher, teacher)
    (tensor(0.), tensor(2.))
    ```
    """
    loss = torch.zeros((), device=image_embeds.device)
    for student, teacher in ((image_embeds, teacher_image_embeds), (text_embeds, teacher_text_embeds)):
        if student.shape[-1] != teacher.shape[-1]:
            raise ValueError(
                f"the feature loss compares embeddings of equal width, but the student's have {student.shape[-1]} "
                f"dimensions and the teacher's {teacher.shape[-1]}"
            )
        loss = loss + (1 - nn.functional.cosine_similarity(student.float(), teacher.detach().float(), dim=-1)).mean()
    return loss


def _float32_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Matrix product without autocast, whose bfloat16 moves a cosine by 0.001: by 0.1 at a temperature of 0.01."""
    with torch.autocast(left.device.type, enabled=False):
        return left.float() @ right.float()
