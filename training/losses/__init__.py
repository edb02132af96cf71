"""The losses that `training.loss` can name, one module each.

To add one, write a module with a subclass of `Loss` and put its class into `LOSSES`: its name, its settings and their
help then appear in recipes, on the command line and in `--help`.
"""

import dataclasses
import inspect
from typing import Any

from universal_gcl.training.losses.alignclip import AlignCLIP
from universal_gcl.training.losses.cl import CL
from universal_gcl.training.losses.gcl import GCL
from universal_gcl.training.losses.loss import Loss

LOSSES: dict[str, type[Loss]] = {loss.name: loss for loss in (GCL, CL, AlignCLIP)}


def _settings(losses: dict[str, type[Loss]]) -> type:
    """A dataclass of `loss`, a name, and the settings of all losses. Its docstring describes them in the form that
    `training.recipe_help` reads."""
    docs = {name: inspect.cleandoc(loss.__doc__ or "") for name, loss in losses.items()}
    names = "".join(f'\n        `"{name}"`: {doc.splitlines()[0]}' for name, doc in docs.items())
    choice = f'Args:\n    > Loss\n\n    loss (`str`, *optional*, defaults to `"{GCL.name}"`):{names}'
    fields = [(entry.name, entry.type, entry) for loss in losses.values() for entry in dataclasses.fields(loss)]
    return dataclasses.make_dataclass(
        "LossSettings",
        [("loss", str, GCL.name), *fields],
        namespace={"__doc__": "\n\n".join([choice, *docs.values()]), "__module__": __name__},
    )


LossSettings: Any = _settings(LOSSES)  # GCLTrainingArguments inherits them as its fields
