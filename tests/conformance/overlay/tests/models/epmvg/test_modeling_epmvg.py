"""EpmVG in transformers' own model tests; the runner lays this file into transformers' `tests/models/epmvg`."""

import unittest

import torch
from torch._dynamo.testing import CompileCounter
from transformers.exporters import DynamoConfig, DynamoExporter, OnnxConfig, OnnxExporter
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers.testing_utils import require_onnxruntime, require_onnxscript, slow, torch_device

from epmvg_hf import EpmVGConfig, EpmVGForVisualGrounding, EpmVGModel

from ...test_configuration_common import ConfigTester
from ...test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor, random_attention_mask

# The suite asks by name which classes have no head, and so no loss.
MODEL_MAPPING_NAMES["epmvg"] = "EpmVGModel"


class EpmVGModelTester:
    """A ResNet with BERT, as in TransVG. No tower or transformer has more than two layers, and none has dropout."""

    batch_size = 3
    num_hidden_layers = 2
    hidden_size = 32
    num_attention_heads = 2
    image_size = 32
    text_length = 7
    stride = 8
    is_training = True
    teacher_projection_dim = None
    fusion_type = "encoder"

    backbone_config = {  # noqa: RUF012
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "layer_type": "basic",
        "out_features": ["stage2"],
    }

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent
        # The length of the states in the fusion transformer: [REG], text, and with an encoder the grid.
        self.seq_length = 1 + self.text_length
        if self.fusion_type == "encoder":
            self.seq_length += (self.image_size // self.stride) ** 2

    def get_config(self) -> EpmVGConfig:
        return EpmVGConfig(
            backbone_config=dict(self.backbone_config),
            text_config={
                "model_type": "bert",
                "vocab_size": 99,
                "hidden_size": 32,
                "num_hidden_layers": self.num_hidden_layers,
                "num_attention_heads": self.num_attention_heads,
                "intermediate_size": 37,
                "max_position_embeddings": 64,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
            },
            backbone_stride=self.stride,
            d_model=self.hidden_size,
            encoder_layers=self.num_hidden_layers,
            encoder_attention_heads=self.num_attention_heads,
            encoder_ffn_dim=37,
            fusion_type=self.fusion_type,
            fusion_layers=self.num_hidden_layers,
            fusion_attention_heads=self.num_attention_heads,
            fusion_ffn_dim=37,
            dropout=0.0,
            image_size=self.image_size,
            max_text_length=10,
            box_head="map",
            box_refinement=True,
            score_head=True,
            projection_norm=True,
            frozen_batch_norm=False,
            teacher_projection_dim=self.teacher_projection_dim,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[EpmVGConfig, dict[str, torch.Tensor]]:
        # The pictures fill different shares of their canvases.
        pixel_mask = torch.ones(self.batch_size, self.image_size, self.image_size, dtype=torch.long)
        for image in range(self.batch_size):
            pixel_mask[image, self.image_size - self.stride * image :] = 0
        return self.get_config(), {
            "pixel_values": floats_tensor([self.batch_size, 3, self.image_size, self.image_size]),
            "pixel_mask": pixel_mask.to(torch_device),
            "input_ids": ids_tensor([self.batch_size, self.text_length], vocab_size=99),
            "attention_mask": random_attention_mask([self.batch_size, self.text_length]),
        }


class EpmVGTransformerTowersTester(EpmVGModelTester):
    """
    A backbone that is a transformer as well, so that every part has attention; the decoder as fusion transformer; and
    a teacher's projections.
    """

    teacher_projection_dim = 24
    fusion_type = "decoder"

    backbone_config = {  # noqa: RUF012
        "model_type": "dinov2",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "mlp_ratio": 2,
        "image_size": 32,
        "patch_size": 8,
        "out_features": ["stage2"],
        "use_mask_token": False,
    }


class EpmVGModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (EpmVGModel, EpmVGForVisualGrounding)
    model_tester_class = EpmVGModelTester
    additional_model_inputs = ("input_ids",)
    _is_composite = True
    # `last_hidden_state` are visual tokens, as wide as the fusion transformer and not as the backbone.
    skip_test_image_features_output_shape = True

    def setUp(self):
        self.model_tester = self.model_tester_class(self)
        self.config_tester = ConfigTester(
            self,
            config_class=EpmVGConfig,
            has_text_modality=False,
            common_properties=["hidden_size", "num_attention_heads", "num_hidden_layers"],
        )

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class is EpmVGForVisualGrounding:
            labels = torch.tensor([0.5, 0.4, 0.3, 0.2], device=torch_device)
            inputs["labels"] = labels.repeat(self.model_tester.batch_size, 1)
        return inputs

    def test_config(self):
        self.config_tester.run_common_tests()

    @slow
    def test_torch_export_with_several_expressions_per_image(self):
        self._check_exports(DynamoExporter(), DynamoConfig(dynamic=True))

    @slow
    @require_onnxscript
    @require_onnxruntime
    def test_onnx_export_with_several_expressions_per_image(self):
        self._check_exports(OnnxExporter(), OnnxConfig(dynamic=True))

    @torch.no_grad()
    def _check_exports(self, exporter, config):
        """One program for any number of images, expressions and tokens; and one that takes the kept visual tokens."""
        model = EpmVGForVisualGrounding(self.model_tester.get_config()).to(torch_device).eval()
        for keep_tokens in (False, True):
            exported = exporter.export(model, self._grouped_inputs(model, 2, 5, 6, keep_tokens), config=config)
            for sizes in ((2, 5, 6), (3, 4, 9), (4, 7, 3)):
                with self.subTest(keep_tokens=keep_tokens, sizes=sizes):
                    inputs = self._grouped_inputs(model, *sizes, keep_tokens)
                    boxes = torch.as_tensor(exported(**inputs)["pred_boxes"], device=torch_device)
                    torch.testing.assert_close(boxes, model(**inputs).pred_boxes, atol=1e-5, rtol=1e-4)

    @slow
    @torch.no_grad()
    def test_torch_compile_with_several_expressions_per_image(self):
        """One graph without breaks for any number of expressions."""
        model = EpmVGForVisualGrounding(self.model_tester.get_config()).to(torch_device).eval()
        graphs = CompileCounter()
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=graphs, fullgraph=True, dynamic=True)
        for num_expressions in (5, 4, 9):
            inputs = self._grouped_inputs(model, 2, num_expressions, 6)
            torch.testing.assert_close(compiled(**inputs).pred_boxes, model(**inputs).pred_boxes)
        self.assertEqual(graphs.frame_count, 1)

    def _grouped_inputs(
        self, model, num_images, num_expressions, length, keep_tokens=False
    ) -> dict[str, torch.Tensor]:
        side = self.model_tester.image_size
        image = {
            "pixel_values": floats_tensor([num_images, 3, side, side]),
            "pixel_mask": torch.ones(num_images, side, side, dtype=torch.long, device=torch_device),
        }
        if keep_tokens:
            features = model.get_image_features(**image)
            image = {"visual_tokens": features.last_hidden_state, "visual_mask": features.visual_mask}
        return {
            **image,
            "input_ids": ids_tensor([num_expressions, length], vocab_size=99),
            "attention_mask": random_attention_mask([num_expressions, length]),
            "image_index": torch.arange(num_expressions, device=torch_device) % num_images,
        }


class EpmVGTransformerTowersTest(EpmVGModelTest):
    model_tester_class = EpmVGTransformerTowersTester
    # The teacher's projections get gradients from the terms of the distillation, not from the model's own loss.
    test_all_params_have_gradient = False
