"""Stand-in: what a model must do under `torch.export`."""

import torch
from transformers import set_seed


class ExportTesterMixin:
    def test_export_with_dynamic_shapes(self) -> None:
        """One exported program gives the model's outputs, for another batch size and length too."""
        for model_class in self.all_model_classes:
            with self.subTest(model_class.__name__):
                set_seed(0)
                config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
                model = model_class(config).eval()
                inputs["use_cache"] = False
                shapes = {
                    name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} if torch.is_tensor(value) else None
                    for name, value in inputs.items()
                }
                program = torch.export.export(model, (), inputs, dynamic_shapes=shapes).module()
                smaller = {name: value[:5, :4] if torch.is_tensor(value) else value for name, value in inputs.items()}
                for given in (inputs, smaller):
                    torch.testing.assert_close(program(**given)[0], model(**given)[0])
