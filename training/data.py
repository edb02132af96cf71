"""Pairs on their way to the model: mixing, one caption an epoch, decoding, augmentation and tokenising in workers.

Everything random depends on (seed, epoch, index) alone: the same items come whatever the number of workers.

    dataset, reports = build_dataset(arguments.data, seed=arguments.training.seed)
    dataset.set_epoch(3)
    loader = DataLoader(dataset, batch_size=64, collate_fn=PairCollator(processor), num_workers=2)
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from modeling_gcl.rows import load_image
from universal_gcl.sources.checks import DataError, SourceReport
from universal_gcl.sources.pairs import read_source
from universal_gcl.training.arguments import DataArguments
from universal_gcl.training.augmentation import augment
from universal_gcl.training.decoding import decode_rgb
from universal_gcl.training.mixing import draws_per_epoch, epoch_plan, mixing_shares
from universal_gcl.training.preprocessing import TensorPreprocessing
from universal_gcl.training.shipped import find_data

MAX_BROKEN_IN_A_ROW = 100


class PairDataset(torch.utils.data.Dataset):
    """Training items from one or several sources of pairs.

    An epoch has as many items as the sources have pairs together. Without weights and alpha these are all pairs, item i
    being the i-th. With them each source gives its share (`training.mixing.epoch_plan`), and a pair may come several
    times or not at all in an epoch.

    Args:
        sources: each a `datasets.Dataset` or sequence of {"id", "image", "captions"}.
        names: what to call the sources in messages.
        weights: shares of the sources, relative to each other; they win over `mixing_alpha`.
        mixing_alpha: shares proportional to size^alpha.
        crop_scale, horizontal_flip: as in `DataArguments`.
        seed: of the caption, the augmentation and the mixing.
        preprocessing: resizes images here, to uint8 tensors for a `PairCollator` with the same; None leaves PIL images
            to the collator's processor.

    Raises:
        DataError: for a source without pairs, or with a share too small to give one item an epoch.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[dict]],
        *,
        names: Sequence[str] | None = None,
        weights: Sequence[float] | None = None,
        mixing_alpha: float | None = None,
        crop_scale: Sequence[float] | None = None,
        horizontal_flip: bool = False,
        seed: int = 0,
        preprocessing: TensorPreprocessing | None = None,
    ):
        self.sources = list(sources)
        self.names = list(names) if names is not None else [f"source {number}" for number in range(len(self.sources))]
        self.crop_scale = crop_scale
        self.horizontal_flip = horizontal_flip
        self.seed = seed
        self.preprocessing = preprocessing
        self.sizes = [len(source) for source in self.sources]
        self._ends = np.cumsum(self.sizes)
        for name, size in zip(self.names, self.sizes):
            if size == 0:
                raise DataError(f"{name} has no pairs")
        self.draws = None
        if weights is not None or mixing_alpha is not None:
            self.draws = draws_per_epoch(mixing_shares(self.sizes, weights, mixing_alpha), sum(self.sizes))
            for name, draws in zip(self.names, self.draws):
                if draws == 0:
                    raise DataError(f"{name} would give no item to an epoch of {sum(self.sizes)}; raise its weight")
        # shared memory: workers that persist from epoch to epoch see the change
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._plan = None

    def __len__(self):
        return sum(self.sizes)

    @property
    def epoch(self) -> int:
        """The epoch that items are drawn for, from 0."""
        return int(self._epoch)

    def set_epoch(self, epoch: int):
        """Draw other captions, crops and (when mixing) pairs. To be called before each epoch's iterator is made."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict:
        """One item. An unreadable image is replaced by the next readable pair of its source.

        Returns:
            {"image": PIL RGB (with `preprocessing`: what its `resize` returns), "text": str, "pair_id": str, "row": int
            (in its source), "broken": list of str, one "source, pair id: what is wrong" for each image that could not
            be read on the way}.

        Raises:
            DataError: when 100 images in a row can't be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        epoch = self.epoch
        source, row = self._locate(index, epoch)
        load = load_image if self.preprocessing is None else decode_rgb
        rng = np.random.default_rng([self.seed, epoch, index])
        broken: list[str] = []
        while True:
            pair = self.sources[source][row]
            try:
                image = load(pair["image"])
                break
            except ValueError as error:
                broken.append(f"{self.names[source]}, {pair['id']}: {error}")
            if len(broken) == min(MAX_BROKEN_IN_A_ROW, self.sizes[source]):
                raise DataError(
                    f"{len(broken)} images in a row can't be read, the first: {broken[0]}. Repair them or remove their "
                    "pairs; data.max_broken_share allows for few among many"
                )
            row = (row + 1) % self.sizes[source]
        text = pair["captions"][rng.integers(len(pair["captions"]))]
        # ids are unique within a source only
        pair_id = pair["id"] if len(self.sources) == 1 else f"{source}:{pair['id']}"
        image = augment(image, rng, self.crop_scale, self.horizontal_flip)
        if self.preprocessing is not None:
            image = self.preprocessing.resize(image)
        return {"image": image, "text": text, "pair_id": pair_id, "row": row, "broken": broken}

    def _locate(self, index: int, epoch: int) -> tuple[int, int]:
        """Source and row of an item."""
        if self.draws is None:
            source = int(np.searchsorted(self._ends, index, side="right"))
            return source, int(index - (self._ends[source] - self.sizes[source]))
        if self._plan is None or self._plan[0] != epoch:
            self._plan = (epoch, *epoch_plan(self.sizes, self.draws, self.seed, epoch))
        return int(self._plan[1][index]), int(self._plan[2][index])


def build_dataset(
    data: DataArguments, *, seed: int, preprocessing: TensorPreprocessing | None = None
) -> tuple[PairDataset, list[SourceReport]]:
    """The training data that a recipe describes, and what was read from each source.

    Args:
        preprocessing: as of `PairDataset`.

    Raises:
        DataError: as `sources.pairs.read_source` lists them.
    """
    read = []
    for source in data.train:
        found = replace(source, path=find_data(source.path))
        pairs, report = read_source(found, max_broken_share=data.max_broken_share)
        read.append((pairs, replace(report, path=source.path)))
    weights = [source.weight for source in data.train]
    dataset = PairDataset(
        [pairs for pairs, _ in read],
        names=[source.path for source in data.train],
        weights=None if None in weights else weights,
        mixing_alpha=data.mixing_alpha,
        crop_scale=data.crop_scale,
        horizontal_flip=data.horizontal_flip,
        seed=seed,
        preprocessing=preprocessing,
    )
    return dataset, [report for _, report in read]


class PairCollator:
    """Makes a batch of the items of `PairDataset`; runs in the workers.

    Args:
        processor: a `GCLProcessor`, which knows its checkpoint's padding and where captions are cut.
        preprocessing: what the data set was given.
        normalize: whether `pixel_values` are the model's float32, or else uint8: a quarter of the bytes on their way,
            for a model with `TensorPreprocessing.normalize_input` as a forward pre-hook. Needs `preprocessing`.

    Returns (when called on N items):
        What the processor makes of images and texts (`pixel_values` (N, C, H, W), `input_ids` and `attention_mask`
        (N, L), ...), `ids` and `caption_ids` ((N,) int64, equal for equal pairs and for captions that are equal but
        for case and spacing: see `stable_hash`), and `broken`, a list of str to take out before the model is called.
    """

    def __init__(self, processor, preprocessing: TensorPreprocessing | None = None, *, normalize: bool = True):
        if preprocessing is None and not normalize:
            raise ValueError("normalize=False needs a preprocessing: an image processor normalises by itself")
        self.processor = processor
        self.preprocessing = preprocessing
        self.normalize = normalize

    def __call__(self, items: list[dict]) -> dict:
        texts, images = [item["text"] for item in items], [item["image"] for item in items]
        if self.preprocessing is None:
            batch = dict(self.processor(images=images, text=texts, return_tensors="pt"))
        else:
            batch = dict(self.processor(text=texts, return_tensors="pt"))
            pixels = self.preprocessing.stack(images)
            batch["pixel_values"] = self.preprocessing.normalize(pixels) if self.normalize else pixels
        batch["ids"] = torch.tensor([stable_hash(item["pair_id"]) for item in items])
        batch["caption_ids"] = torch.tensor([stable_hash(" ".join(text.lower().split())) for text in texts])
        batch["broken"] = [name for item in items for name in item["broken"]]
        return batch


class BrokenImages:
    """Counts the images that could not be read in training, each once, over all sources together.

    Args:
        total: number of training pairs, of all sources.
        max_share: the share of `total` that may be unreadable (`DataArguments.max_broken_share`).
    """

    def __init__(self, total: int, max_share: float):
        self.total = total
        self.max_share = max_share
        self._names: dict[str, None] = {}

    def add(self, names: Sequence[str]):
        """Count what a batch brought in `broken`.

        Raises:
            DataError: as `check`.
        """
        self._names.update(dict.fromkeys(names))
        self.check()

    def merge(self, names: Sequence[str]):
        """Count what all ranks met: `names` gathered from each. Count and order (sorted) are then the same on all.

        Raises:
            DataError: as `check`, on every rank alike.
        """
        self._names = dict.fromkeys(sorted({*self._names, *names}))
        self.check()

    def check(self):
        """Compare the count with the share allowed.

        Raises:
            DataError: when more than `max_share` of all pairs could not be read.
        """
        if len(self._names) > self.max_share * self.total:
            raise DataError(
                f"{self.summary()}: over data.max_broken_share ({self.max_share:.2%}). "
                "Repair or remove them, or raise max_broken_share"
            )

    @property
    def names(self) -> list[str]:
        """The images with what is wrong, in the order they were met; sorted once merged."""
        return list(self._names)

    def summary(self) -> str:
        """One line for the log: how many, and the first 20."""
        shown = "; ".join(self.names[:20])
        return f"{len(self._names)} of {self.total} images could not be read{': ' + shown if shown else ''}"


def stable_hash(text: str) -> int:
    """A number of 63 bits that is the same in every process and run, unlike `hash`."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
