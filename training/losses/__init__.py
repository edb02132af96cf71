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

# The settings of all losses as one dataclass: GCLTrainingArguments inherits them as its fields. Its docstring holds the
# descriptions of these fields, which `train.py --help` prints.
LossSettings: Any = dataclasses.make_dataclass(
    "LossSettings",
    [(entry.name, entry.type, entry) for loss in LOSSES.values() for entry in dataclasses.fields(loss)],
    namespace={
        "__doc__": "\n\n".join(inspect.cleandoc(loss.__doc__ or "") for loss in LOSSES.values()),
        "__module__": __name__,
    },
)
