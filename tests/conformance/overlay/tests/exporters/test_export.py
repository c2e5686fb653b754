"""Stands in for the module that the source distribution lacks: a round trip through `torch.export`."""

import copy

import torch
from parameterized import parameterized
from transformers.exporters import DynamoConfig, DynamoExporter
from transformers.testing_utils import slow, torch_device


class ExportTesterMixin:
    @parameterized.expand([("static", False), ("dynamic", True)])
    @slow
    def test_torch_export(self, name, dynamic):
        for model_class in self.all_model_classes:
            with self.subTest(model_class.__name__):
                config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
                model = model_class(copy.deepcopy(config)).to(torch_device).eval()
                inputs = self._prepare_for_class(inputs, model_class)
                exported = DynamoExporter().export(model, inputs, config=DynamoConfig(dynamic=dynamic))
                self._check_export(exported, model, inputs)
                if dynamic:
                    self._check_export(exported, model, {key: value[:-1] for key, value in inputs.items()})

    @torch.no_grad()
    def _check_export(self, exported, model, inputs):
        expected, actual = model(**inputs), exported(**inputs)
        self.assertEqual(list(expected), list(actual))
        for key, value in expected.items():
            torch.testing.assert_close(actual[key], value, atol=1e-5, rtol=1e-4, msg=key)
