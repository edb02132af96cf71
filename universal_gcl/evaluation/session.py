"""A model under measurement: loaded in one variant, embedding into a folder of its own and writing its result there.

Variants are baselines of the same checkpoint that need no training:
- `plain`: as the checkpoint says;
- `centring`: GR-CLIP (arXiv 2507.19054), with the means of calibration pairs or those stored in the checkpoint;
- `sum`, `normalized_sum`, `native`: another fusion rule than the checkpoint's;
- a fusion rule and centring together, such as `normalized_sum+centring`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modeling_gcl import GCLModel, GCLProcessor
from universal_gcl.evaluation.centring import estimate_modality_means
from universal_gcl.evaluation.environment import collect_environment, command_line
from universal_gcl.retrieval.embed import embed_rows
from universal_gcl.retrieval.fingerprint import model_fingerprint
from universal_gcl.retrieval.processes import Processes, own_device
from universal_gcl.retrieval.store import Store, write_json
from universal_gcl.sources.arguments import SourceArguments
from universal_gcl.sources.pairs import load_pairs

FUSION_VARIANTS = ("sum", "normalized_sum", "native")  # those without weights of their own
VARIANTS = ("plain", "centring", *FUSION_VARIANTS)


class Session:
    """
    Args:
        model: folder or Hub id of a GCL checkpoint or any dual encoder.
        out: folder for everything that is written; None to write nothing (`embed` and `write` need one).
        variant: see the docstring of this module.
        centre_on: calibration pairs of `centring` (folder, file or Hub id), never the pairs that are searched; without
            them, the means stored in the checkpoint are used.
        revision: branch, tag or commit of a model on the Hub.
        batch_size, truncate_dim: as for `GCLModel.encode`.
        skip_unreadable: leave out rows whose image or video can't be read, instead of raising an error; the result
            counts and names them.

    Attributes:
        model, processor: in evaluation mode, on this process's `device`.
        is_main: whether this process scores and writes. All processes embed.

    Raises:
        ValueError: the variant is unknown, or there are no means for centring.
    """

    def __init__(
        self,
        model: str,
        out: str | Path | None,
        *,
        variant: str = "plain",
        centre_on: str | None = None,
        revision: str | None = None,
        batch_size: int = 64,
        truncate_dim: int | None = None,
        skip_unreadable: bool = False,
    ):
        fusion, centring = parse_variant(variant)
        if centre_on is not None and not centring:
            raise ValueError(f"centre_on is for the variant 'centring', not for {variant!r}")
        self.out = None if out is None else Path(out)
        self.batch_size, self.truncate_dim, self.skip_unreadable = batch_size, truncate_dim, skip_unreadable
        self.processes = Processes()
        self.is_main = self.processes.rank == 0
        overrides: dict[str, Any] = {} if fusion is None else {"fusion": fusion}
        self.model = GCLModel.from_encoder(model, revision=revision, **overrides).eval()
        self.processor = GCLProcessor.from_encoder(model, revision=revision)
        self.device = own_device()
        self.model.to(self.device)
        if centring:
            self._centre(model, centre_on)
        self.settings = {
            "model": model,
            "revision": revision,
            "variant": variant,
            "centre_on": centre_on,
            "fusion": self.model.config.fusion,
            "centring": self.model.config.centring,
            "truncate_dim": truncate_dim,
            "skip_unreadable": skip_unreadable,
        }

    def _centre(self, name: str, centre_on: str | None) -> None:
        if centre_on is not None:
            self.model.config.centring = False
            if self.is_main:
                pairs = load_pairs(SourceArguments(centre_on))
                estimate_modality_means(
                    self.model,
                    self.processor,
                    pairs,
                    batch_size=self.batch_size,
                    show_progress=sys.stderr.isatty(),
                )
            # all processes take the means of one, since two GPUs may differ in the last bit
            self.model.modality_means.copy_(self.processes.gather(self.model.modality_means.cpu())[0])
        if not self.model.modality_means.any():
            raise ValueError(
                f"{name} has no modality means for centring: name calibration pairs with centre_on (--centre-on), or "
                "store their means by `gcl convert centring`"
            )
        self.model.config.centring = True

    @property
    def folder(self) -> Path:
        """The folder for everything that is written.

        Raises:
            ValueError: the session has none.
        """
        if self.out is None:
            raise ValueError("this session has no folder to write to: give it one as `out`")
        return self.out

    def embed(self, name: str, rows: Sequence) -> Store:
        """Embed rows `(id, row)` into `OUT/embeddings/NAME`, or continue an earlier call. All processes call this.

        Raises:
            ValueError: the session has no folder; see also `retrieval.embed.embed_rows`.
        """
        return embed_rows(
            self.model,
            self.processor,
            rows,
            self.folder / "embeddings" / name,
            batch_size=self.batch_size,
            truncate_dim=self.truncate_dim,
            on_error="skip" if self.skip_unreadable else "raise",
            show_progress=True,
        )

    def write(self, protocol: str, settings: dict, result: dict | list) -> Path:
        """Write `OUT/results.json`: what was run, the environment and the result.

        Raises:
            ValueError: the session has no folder.
        """
        path = self.folder / "results.json"
        written = {"protocol": protocol, "command": command_line(), **self.settings, **settings}
        written["fingerprint"] = model_fingerprint(self.model, self.processor)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, written | {"environment": collect_environment(), "result": result})
        return path


def parse_variant(variant: str) -> tuple[str | None, bool]:
    """The fusion rule that a variant asks for (None: the checkpoint's own), and whether it centres.

    Raises:
        ValueError: the variant is unknown, or its parts exclude each other.
    """
    parts = variant.split("+")
    unknown = [part for part in parts if part not in VARIANTS]
    if unknown:
        raise ValueError(f"variant {variant!r}: {unknown[0]!r} is not one of {', '.join(VARIANTS)}")
    fusions = [part for part in parts if part in FUSION_VARIANTS]
    if len(parts) != len(set(parts)) or len(fusions) > 1 or ("plain" in parts and len(parts) > 1):
        raise ValueError(f"variant {variant!r}: join one fusion rule and 'centring', as in 'normalized_sum+centring'")
    return (fusions[0] if fusions else None), "centring" in parts
