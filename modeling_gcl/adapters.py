"""Loading a LoRA adapter onto a model whole, or not at all."""

import re

import torch
from transformers.modeling_utils import load_state_dict
from transformers.utils import cached_file


class WholeAdapters:
    """For a `PreTrainedModel`: its `load_adapter` leaves as it is in the base what it does not find in an adapter, and
    with transformers before 5.18 the modules that were trained whole, temperature and gates."""

    def load_adapter(self, peft_model_id=None, *args, adapter_kwargs=None, **kwargs):
        """
        As `PreTrainedModel.load_adapter`.

        Raises:
            ValueError: the adapter lacks weights.
        """
        report = super().load_adapter(peft_model_id, *args, adapter_kwargs=adapter_kwargs, **kwargs)
        missing = set(report.missing_keys)
        if missing and peft_model_id is not None:
            missing -= _load_whole_modules(self, missing, peft_model_id, adapter_kwargs or {})
        if missing:
            raise ValueError(
                f"the adapter lacks {len(missing)} weights of the model's, such as {min(missing)}: it is damaged, or "
                "for another model"
            )
        return report


@torch.no_grad()
def _load_whole_modules(model, missing, name, adapter_kwargs):
    """Copy those of the missing parameters that the file has under peft's names; returns them."""
    saved = load_state_dict(cached_file(name, "adapter_model.safetensors", **adapter_kwargs))
    loaded = set()
    for key in missing:
        stored = "base_model.model." + re.sub(r"\.modules_to_save\.[^.]+", "", key)
        if stored in saved:
            model.get_parameter(key).copy_(saved[stored])
            loaded.add(key)
    return loaded
