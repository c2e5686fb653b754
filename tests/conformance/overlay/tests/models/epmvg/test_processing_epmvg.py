"""EpmVG's processor in transformers' own tests; see `test_modeling_epmvg.py`."""

import unittest

from transformers import BertTokenizer
from transformers.processing_utils import ProcessorMixin
from transformers.testing_utils import require_torch, require_vision

from epmvg_hf import EpmVGImageProcessor, EpmVGProcessor

from ...test_processing_common import ProcessorTesterMixin

_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "lower", "newer", "upper", "older", "longer", "string"]


@require_torch
@require_vision
class EpmVGProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = EpmVGProcessor

    @classmethod
    def _setup_tokenizer(cls):
        return BertTokenizer(vocab={word: index for index, word in enumerate(_WORDS)})

    @classmethod
    def _setup_image_processor(cls):
        return EpmVGImageProcessor(size={"height": 40, "width": 40})

    @staticmethod
    def prepare_processor_dict():
        # The suite gives the length to the tokenizer. EpmVG takes that of the processor, whatever the tokenizer has.
        return {"max_text_length": EpmVGProcessorTest.images_text_kwargs_max_length}

    @staticmethod
    def does_processor_return_mm_offsets(processor_class, method_name):
        # The suite asks the first base class, which is not `ProcessorMixin` where there is another mixin before it.
        return getattr(processor_class, method_name) is not getattr(ProcessorMixin, method_name)

    def test_processor_text_has_no_visual(self):
        """The suite wants to mix in text without an image; an expression without an image has no box, and is named."""
        images, text = self.prepare_images_inputs(batch_size=3), self.prepare_text_inputs(batch_size=3)
        with self.assertRaisesRegex(ValueError, r"it is for 3 image\(s\) and there are 2"):
            self.get_processor()(images=[[], *([image] for image in images[1:])], text=text)
