"""EpmVG's image processors in transformers' own tests; see `test_modeling_epmvg.py`."""

import subprocess
import unittest
from unittest.mock import patch

from transformers.testing_utils import require_torch, require_vision, slow
from transformers.utils import is_torchvision_available

from epmvg_hf import EpmVGImageProcessor, EpmVGImageProcessorPil

from ...test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin


class EpmVGImageProcessingTester(ImageProcessingTester):
    def __init__(self, parent: unittest.TestCase, **kwargs):
        kwargs.setdefault("size", {"height": 40, "width": 40})
        super().__init__(parent, **kwargs)

    def _get_image_processing_classes(self) -> dict[str, type]:
        """The suite's own look-up finds only classes of transformers."""
        torchvision = {"torchvision": EpmVGImageProcessor} if is_torchvision_available() else {}
        return {**torchvision, "pil": EpmVGImageProcessorPil}


@require_torch
@require_vision
class EpmVGImageProcessingTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = EpmVGImageProcessingTester

    @slow
    def test_pil_can_run_without_torchvision(self):
        """The suite starts a bare Python with this script, which has to import the package as well."""
        run, suite_import = subprocess.run, "from transformers import AutoImageProcessor"

        def run_with_package(command, **kwargs):
            self.assertIn(suite_import, command[2])
            command[2] = command[2].replace(suite_import, f"import epmvg_hf; {suite_import}")
            return run(command, **kwargs)

        with patch("subprocess.run", run_with_package):
            super().test_pil_can_run_without_torchvision()
