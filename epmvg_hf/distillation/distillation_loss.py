"""The teacher's terms of a training step, over the batch of all processes."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator

from ..model.losses import has_box, map_loss
from ..model.modeling_epmvg import EpmVGGroundingOutput
from .clip_teacher import TeacherOutput
from .losses import feature_loss, relation_loss, teacher_map_target


@dataclass(frozen=True)
class DistillationWeights:
    """
    How much each term of [`DistillationLoss`] counts, and the temperatures of their distributions. All of it is our
    reading of EpmVG, of which only the abstract is public.

    Args:
        relation, feature, teacher_map (`float`): weight of each term; a term of weight 0 is not computed.
        teacher_map_rows (`str`): which expressions learn the teacher's map, `"all"` or those `"without_box"`.
        student_temperature, teacher_temperature (`float`): what image-text cosines are divided by in the relation
            term.
        map_temperature (`float`): what the teacher's patch-text cosines are divided by.
    """

    relation: float = 0.0
    feature: float = 0.0
    teacher_map: float = 1.0
    teacher_map_rows: str = "all"
    student_temperature: float = 0.05
    teacher_temperature: float = 0.05
    map_temperature: float = 0.05

    @property
    def compares_embeddings(self) -> bool:
        """Whether any term needs the student's projections to the teacher's image-text space."""
        return self.relation + self.feature > 0


@dataclass
class DistillationLoss:
    """
    Our reading of EpmVG: [`~losses.relation_loss`] and [`~losses.feature_loss`] teach the two backbones the teacher's
    image-text space, [`~losses.map_loss`] its patch-text map to the student's similarities before fusion. None of the
    terms needs a box.

    The teacher compares each patch by itself with the words: it cannot tell the leftmost circle from the others.
    Taught to the whole consistency map, its map teaches the student to overlook such words; before fusion it leaves
    them to what fusion adds, which learns from boxes.

    The relation loss compares all images with all expressions of all processes. Each process computes it from
    everybody's embeddings, of which its own carry the gradient: summed over processes that is the gradient of one
    process with the whole batch. The wrappers (DDP, FSDP, DeepSpeed) average gradients instead, so the terms come
    multiplied by the number of processes.

    Args:
        weights ([`DistillationWeights`]): weights and temperatures.
        accelerator (`Accelerator`): knows the processes.
    """

    weights: DistillationWeights
    accelerator: Accelerator

    def __call__(
        self,
        outputs: EpmVGGroundingOutput,
        teacher: TeacherOutput,
        image_index: torch.Tensor,
        labels: torch.Tensor,
        num_boxes: int,
        num_expressions: int,
    ) -> tuple[torch.Tensor, dict[str, tuple[torch.Tensor, int]]]:
        """
        Args:
            outputs ([`EpmVGGroundingOutput`]): the student's, for this process's B images and N expressions.
            teacher ([`TeacherOutput`]): the teacher's, for the same.
            image_index (`torch.LongTensor` of shape `(N,)`): the image of each expression.
            labels (`torch.FloatTensor` of shape `(N, 4)`): NaN for expressions without a box.
            num_boxes, num_expressions (`int`):
                Boxes and expressions of the whole optimizer step, all accumulated batches and processes.

        Returns:
            The weighted sum, to be added to the loss that is differentiated, and the unweighted terms of this batch,
            each with the number of this process's expressions that it speaks for: `loss_relation`, `loss_feature`
            (both over all processes) and `loss_teacher_map` (of this process).
        """
        weights, terms = self.weights, {}
        total = torch.zeros((), device=image_index.device)
        if weights.compares_embeddings:
            # The model has teacher_projection_dim.
            assert outputs.image_embeds is not None and outputs.text_embeds is not None
            images = self._gather(outputs.image_embeds, teacher.image_embeds)
            expressions = self._gather(outputs.text_embeds, teacher.text_embeds)
            embeds = (images[0], expressions[0], images[1], expressions[1])
            # Accumulated batches share the step by their expressions.
            share = len(expressions[0]) / num_expressions
            if weights.relation > 0:
                term = relation_loss(*embeds, weights.student_temperature, weights.teacher_temperature)
                term = self._summed_over_processes(term)
                terms["loss_relation"] = (term, len(image_index))
                total = total + weights.relation * share * term
            if weights.feature > 0:
                term = self._summed_over_processes(feature_loss(*embeds))
                terms["loss_feature"] = (term, len(image_index))
                total = total + weights.feature * share * term
        if weights.teacher_map > 0:
            assert outputs.visual_mask is not None and outputs.similarity_map is not None
            assert teacher.patch_embeds is not None  # output_patches
            mask = outputs.visual_mask[image_index].bool()
            target = teacher_map_target(
                teacher.patch_embeds, teacher.text_embeds, image_index, mask, weights.map_temperature
            )
            rows = torch.ones_like(image_index, dtype=torch.bool)
            if weights.teacher_map_rows == "without_box":
                rows, num_expressions = ~has_box(labels), num_expressions - num_boxes
            term, count = map_loss(outputs.similarity_map, target, mask.flatten(1), rows), int(rows.sum())
            terms["loss_teacher_map"] = (term, count)
            # A mean over this process's rows, turned into its part of the mean over all.
            share = count * self.accelerator.num_processes / max(num_expressions, 1)
            total = total + weights.teacher_map * share * term
        return total, terms

    def _summed_over_processes(self, term: torch.Tensor) -> torch.Tensor:
        """The same value with a gradient that, averaged over processes, is the sum of what each contributes."""
        return term + (self.accelerator.num_processes - 1) * (term - term.detach())

    def _gather(self, student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of this process -> rows of all processes, in their order; each may have another number of them."""
        student, teacher = student.float(), teacher.float()
        if self.accelerator.num_processes == 1:
            return student, teacher
        own = torch.cat([student.detach(), teacher], dim=-1)
        counts = self.accelerator.gather(torch.tensor([len(own)], device=own.device)).tolist()
        padded = self.accelerator.pad_across_processes(own)
        gathered = self.accelerator.gather(padded).unflatten(0, (len(counts), -1))
        rows = [part[:count] for part, count in zip(gathered, counts, strict=True)]
        parts = [part.split([student.shape[1], teacher.shape[1]], dim=-1) for part in rows]
        students = [part for part, _ in parts]
        students[self.accelerator.process_index] = student
        return torch.cat(students), torch.cat([part for _, part in parts])
