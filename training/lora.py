"""LoRA: low-rank adapters on the layers of both towers, by peft. Temperature and learned gates are trained too.

If a name does not match, or a layer is never called, peft trains nothing and doesn't say so. The layers are therefore
chosen here, by tower, and compared with what peft has adapted.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from modeling_gcl import GCLModel
from universal_gcl.training.arguments import LoraArguments
from universal_gcl.training.freezing import PROJECTIONS

TRAINED_WHOLE = ("logit_scale", "fusion")


def add_lora(model: Any, arguments: LoraArguments, base: str) -> Any:
    """
    Freeze a model and add adapters to it.

    Args:
        model (`GCLModel`): changed in place, except in 4 bits: then it is loaded again, from `base`. Layers that are
            already frozen get no adapter.
        arguments (`LoraArguments`): the `peft:` section of the recipe.
        base (`str`): folder or Hub id of a GCL checkpoint with the weights of this model; the adapter will name it.

    Returns:
        `peft.PeftModel`.

    Raises:
        ValueError: a regular expression matches no layer, or one that can't have an adapter.
        ImportError: peft is not installed, or bitsandbytes for 4 bits.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError('LoRA needs peft: pip install "universal-gcl[lora]"') from error

    regexes = {"image": arguments.image_targets, "text": arguments.text_targets}
    targets = {name for modality, regex in regexes.items() for name in _targets(model, modality, regex)}
    if not targets:
        raise ValueError("peft: every tower is frozen, so no layer can have an adapter: freeze less")
    saved = [name for name in TRAINED_WHOLE if _is_trained(getattr(model, name))]
    config = LoraConfig(
        r=arguments.r,
        lora_alpha=arguments.lora_alpha,  # type: ignore[arg-type]  # peft only divides it
        lora_dropout=arguments.lora_dropout,
        use_rslora=arguments.use_rslora,
        use_dora=arguments.use_dora,
        target_modules=sorted(targets),
        modules_to_save=saved,
        base_model_name_or_path=base,
    )
    if arguments.load_in_4bit:
        model = _load_in_4bit(base)
    model.name_or_path = base  # peft saves this one
    adapted = get_peft_model(model, config)
    _check_adapted(adapted, targets, saved)
    return adapted


def _load_in_4bit(base: str) -> GCLModel:
    # the gates are not quantised, because they are trained directly
    settings: dict[str, Any] = {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "llm_int8_skip_modules": ["fusion"],
    }
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **settings)
    return GCLModel.from_pretrained(base, dtype=torch.float32, quantization_config=config)


def _targets(model: Any, modality: str, regex: str | None) -> list[str]:
    """Full names of the layers of a tower and its projection that get an adapter."""
    roots = [model.towers[modality], getattr(model.encoder, PROJECTIONS[modality], None)]
    members = {id(module) for root in roots if root is not None for module in root.modules()}
    unused = {
        id(module) for each in model.modules() if isinstance(each, nn.MultiheadAttention) for module in each.modules()
    }
    found, frozen = [], 0
    for name, module in model.named_modules():
        if id(module) not in members or not isinstance(module, (nn.Linear, nn.Conv2d)):
            continue
        matches = _is_linear(module) and id(module) not in unused if regex is None else re.search(regex, name)
        if not matches:
            continue
        if not module.weight.requires_grad:
            frozen += 1
            continue
        if id(module) in unused:
            raise ValueError(
                f"peft.{modality}_targets: {regex!r} matches {name}, which is inside PyTorch's MultiheadAttention. "
                "That reads the layer's weight and would never call an adapter: leave the layer out"
            )
        if getattr(module, "groups", 1) > 1:
            raise ValueError(f"peft.{modality}_targets: {regex!r} matches {name}, a grouped convolution: leave it out")
        found.append(name)
    if regex is not None and not found:
        what = "only frozen layers" if frozen else "no linear layer or convolution"
        raise ValueError(
            f"peft.{modality}_targets: {regex!r} matches {what} of the {modality} tower, whose layers are named "
            f"like {_examples(model, members)}. To leave it unchanged: model.freeze: [{modality}], and no targets"
        )
    return found


def _is_linear(module: Any) -> bool:
    """Whether it is a linear map of channels: nn.Linear, or a 1 x 1 convolution."""
    return isinstance(module, nn.Linear) or (module.kernel_size == (1, 1) and module.groups == 1)


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _examples(model: nn.Module, members: Iterable[int]) -> str:
    layers = (nn.Linear, nn.Conv2d)
    names = [name for name, module in model.named_modules() if id(module) in members and isinstance(module, layers)]
    return ", ".join(names[:3])


def _check_adapted(adapted: Any, targets: set[str], saved: list[str]) -> None:
    """Raise RuntimeError unless exactly the chosen layers have adapters, and only those and `saved` are trained."""
    from peft.tuners.lora import LoraLayer

    model = adapted.get_base_model()
    made = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    if made != targets or trained != set(saved):
        wrong = sorted(made ^ targets) + sorted(trained ^ set(saved))
        raise RuntimeError(f"peft adapted other modules than those chosen: {', '.join(wrong[:5])}")
