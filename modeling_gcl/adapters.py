"""Loading of LoRA adapters that fails if the adapter does not fit the model."""

import re
from typing import Any

import torch
from transformers.integrations import PeftAdapterMixin
from transformers.modeling_utils import load_state_dict
from transformers.utils import cached_file


class AdapterMixin(PeftAdapterMixin):
    """
    Replaces `PreTrainedModel.load_adapter`, which does not report weights that the adapter lacks. Before transformers
    5.18, that method also ignores the modules that were trained in full (temperature and gates).
    """

    def load_adapter(self, peft_model_id: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        Load an adapter. The arguments and the result are those of `PreTrainedModel.load_adapter`.

        Raises:
            ValueError: the adapter lacks weights.
        """
        report = super().load_adapter(peft_model_id, *args, **kwargs)
        missing = set(report.missing_keys)
        if missing and peft_model_id is not None:
            missing -= _load_fully_trained_modules(self, missing, peft_model_id, kwargs.get("adapter_kwargs") or {})
        if missing:
            raise ValueError(
                f"the adapter lacks {len(missing)} of the model's weights, such as {min(missing)}: "
                "it is damaged, or it was made for another model"
            )
        return report


@torch.no_grad()
def _load_fully_trained_modules(model, missing, name, adapter_kwargs):
    """Copy the missing parameters that the adapter's file holds under peft's names, and return their names."""
    saved = load_state_dict(cached_file(name, "adapter_model.safetensors", **adapter_kwargs))
    loaded = set()
    for key in missing:
        stored = "base_model.model." + re.sub(r"\.modules_to_save\.[^.]+", "", key)
        if stored in saved:
            model.get_parameter(key).copy_(saved[stored])
            loaded.add(key)
    return loaded
