"""The teacher's terms of a training step, over the batch of all processes."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator

from .losses import feature_loss, map_loss, relation_loss, teacher_map_target
from .modeling_epmvg import EpmVGGroundingOutput
from .teacher import TeacherOutput
from .training_args import EpmVGTrainingArguments


@dataclass
class DistillationLoss:
    """
    Our reading of EpmVG: [`~losses.relation_loss`] and [`~losses.feature_loss`] teach the two backbones the teacher's
    image-text space, [`~losses.map_loss`] its patch-text map to the consistency map. No term needs a box.

    The relation loss compares all images with all expressions of all processes. Each process computes it from
    everybody's embeddings, of which its own carry the gradient: summed over processes that is the gradient of one
    process with the whole batch. The wrappers (DDP, FSDP, DeepSpeed) average gradients instead, so the terms come
    multiplied by the number of processes.

    Args:
        args ([`EpmVGTrainingArguments`]): weights and temperatures; a term with weight 0 is not computed.
        accelerator (`Accelerator`): knows the processes.
    """

    args: EpmVGTrainingArguments
    accelerator: Accelerator

    def __call__(
        self, outputs: EpmVGGroundingOutput, teacher: TeacherOutput, image_index: torch.Tensor, num_expressions: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        Args:
            outputs ([`EpmVGGroundingOutput`]): the student's, for this process's B images and N expressions.
            teacher ([`TeacherOutput`]): the teacher's, for the same.
            image_index (`torch.LongTensor` of shape `(N,)`): the image of each expression.
            num_expressions (`int`): expressions of the whole optimizer step, all accumulated batches and processes.

        Returns:
            The weighted sum, to be added to the loss that is differentiated, and the unweighted terms of this batch:
            `loss_relation`, `loss_feature` (over all processes) and `loss_teacher_map` (of this process).
        """
        args, terms = self.args, {}
        count, processes = len(image_index), self.accelerator.num_processes
        total = torch.zeros((), device=image_index.device)
        if args.relation_loss_coefficient + args.feature_loss_coefficient > 0:
            images = self._gather(outputs.image_embeds, teacher.image_embeds)
            expressions = self._gather(outputs.text_embeds, teacher.text_embeds)
            embeds = (images[0], expressions[0], images[1], expressions[1])
            # Accumulated batches share the step by their expressions.
            share = len(expressions[0]) / num_expressions
            if args.relation_loss_coefficient > 0:
                term = relation_loss(*embeds, args.student_temperature, args.teacher_temperature)
                terms["loss_relation"] = self._summed_over_processes(term)
                total = total + args.relation_loss_coefficient * share * terms["loss_relation"]
            if args.feature_loss_coefficient > 0:
                terms["loss_feature"] = self._summed_over_processes(feature_loss(*embeds))
                total = total + args.feature_loss_coefficient * share * terms["loss_feature"]
        if args.teacher_map_loss_coefficient > 0:
            mask = outputs.visual_mask[image_index]
            target = teacher_map_target(
                teacher.patch_embeds, teacher.text_embeds, image_index, mask, args.map_temperature
            )
            terms["loss_teacher_map"] = map_loss(outputs.consistency_map, target, mask.flatten(1))
            share = count * processes / num_expressions
            total = total + args.teacher_map_loss_coefficient * share * terms["loss_teacher_map"]
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
        students, teachers = zip(
            *(part.split([student.shape[1], teacher.shape[1]], dim=-1) for part in rows), strict=True
        )
        students = list(students)
        students[self.accelerator.process_index] = student
        return torch.cat(students), torch.cat(teachers)
