"""Freezes parts of a model by name, and shows which parameters are trained."""

from collections.abc import Sequence
from typing import Any

PROJECTIONS = {"image": "visual_projection", "text": "text_projection"}


def freeze_parts(model: Any, parts: Sequence[str]) -> None:
    """
    Switch off the gradient of parts of a `GCLModel`.

    Args:
        model (`GCLModel`): changed in place.
        parts (`Sequence[str]`): any of `"image"`, `"text"` (a tower with its projection), `"image_tower"`,
            `"text_tower"` (the tower only), `"fusion"` (its gates) and `"logit_scale"`.

    Raises:
        ValueError: nothing would be left to train.
    """
    for part in parts:
        if part in ("fusion", "logit_scale"):
            getattr(model, part).requires_grad_(False)
            continue
        modality = part.removesuffix("_tower")
        model.towers[modality].requires_grad_(False)
        projection = getattr(model.encoder, PROJECTIONS[modality], None)
        if part == modality and projection is not None:
            projection.requires_grad_(False)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if trained in ([], ["logit_scale.log_scale"]):
        raise ValueError(f"model.freeze={list(parts)} leaves only the temperature to train: freeze less")


def parameter_counts(model: Any) -> dict[str, dict[str, int]]:
    """
    Count the parameters of each part.

    Returns:
        `dict[str, dict[str, int]]`: `{"parameters": ..., "trained": ...}` for each part and for `"total"`. The parts
        are image tower, text tower, projections, fusion (if it is learned) and logit_scale (with the backbone's own
        temperature, which is frozen).
    """
    part_of = {id(p): f"{name} tower" for name, tower in model.towers.items() for p in tower.parameters()}
    part_of.update({id(p): "fusion" for p in model.fusion.parameters()})
    part_of.update({id(p): "logit_scale" for name, p in model.named_parameters() if _is_temperature(name)})
    counts: dict[str, dict[str, int]] = {}
    for parameter in model.parameters():
        for part in (part_of.get(id(parameter), "projections"), "total"):
            count = counts.setdefault(part, {"parameters": 0, "trained": 0})
            count["parameters"] += parameter.numel()
            count["trained"] += parameter.numel() if parameter.requires_grad else 0
    return {part: counts[part] for part in sorted(counts, key="total".__eq__)}


def parameter_table(model: Any) -> str:
    """`parameter_counts` as a table for the log."""
    lines = [f"{'part':<14}{'parameters':>14}{'trained':>14}"]
    for part, count in parameter_counts(model).items():
        trained = f"{count['trained']:,}" if count["trained"] else "frozen"
        lines.append(f"{part:<14}{count['parameters']:>14,}{trained:>14}")
    return "\n".join(lines)


def _is_temperature(name: str) -> bool:
    return "logit_" in name or name == "encoder.temperature"
