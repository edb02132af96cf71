"""Training data: mixing of sources, one caption per epoch, decoding, augmentation and tokenising in workers.

Everything random depends only on (seed, epoch, index), so any number of workers produces the same items.

    dataset, reports = build_dataset(arguments.data, seed=arguments.training.seed)
    dataset.set_epoch(3)
    loader = DataLoader(dataset, batch_size=64, collate_fn=PairCollator(processor), num_workers=2)
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from modeling_gcl import GCLProcessor
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

    An epoch has as many items as all sources have pairs. Without weights and alpha, item i is the i-th pair. With them,
    each source contributes its share (`training.mixing.epoch_plan`), and in one epoch a pair may appear several times
    or not at all.

    Args:
        sources: each is a `datasets.Dataset` or a sequence of {"id", "image", "captions"}.
        names: names of the sources in messages.
        weights: shares of the sources, relative to each other. If given, `mixing_alpha` is not used.
        mixing_alpha: makes the shares proportional to size^alpha.
        crop_scale, horizontal_flip: see `DataArguments`.
        seed: for the choice of captions, augmentation and mixing.
        preprocessing: resizes the images to uint8 tensors here; give the `PairCollator` the same one. Without it, the
            collator's processor gets PIL images.

    Raises:
        DataError: a source has no pairs, or too small a share to contribute one item to an epoch.
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
                    raise DataError(
                        f"{name} would give no item to an epoch of {sum(self.sizes)} items. Raise its weight"
                    )
        # in shared memory, so that workers which persist from epoch to epoch see the change
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._plan: tuple[int, np.ndarray, np.ndarray] | None = None  # epoch, sources, rows

    def __len__(self):
        return sum(self.sizes)

    @property
    def epoch(self) -> int:
        """The epoch that items are drawn for, from 0."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that captions, crops and (when mixing) pairs are drawn for.

        Call it before the iterator of an epoch is made.
        """
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict:
        """One item. If an image is unreadable, the next readable pair of its source takes its place.

        Returns:
            A dict: `image`, a PIL image in RGB, or with `preprocessing` what its `resize` returns; `text`; `pair_id`;
            `row`, the row in its source; `broken`, a list with one "source, pair id: what is wrong" for each image that
            could not be read.

        Raises:
            DataError: 100 images in a row can't be read.
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
                    f"{len(broken)} images in a row can't be read. The first: {broken[0]}. Repair them or remove their "
                    "pairs; data.max_broken_share is meant for a few among many"
                )
            row = (row + 1) % self.sizes[source]
        text = pair["captions"][rng.integers(len(pair["captions"]))]
        # ids are unique only within a source
        pair_id = pair["id"] if len(self.sources) == 1 else f"{source}:{pair['id']}"
        image = augment(image, rng, self.crop_scale, self.horizontal_flip)
        if self.preprocessing is not None and isinstance(image, torch.Tensor):
            image = self.preprocessing.resize(image)
        return {"image": image, "text": text, "pair_id": pair_id, "row": row, "broken": broken}

    def _locate(self, index: int, epoch: int) -> tuple[int, int]:
        """Source and row of an item."""
        if self.draws is None:
            source = int(np.searchsorted(self._ends, index, side="right"))
            return source, int(index - (self._ends[source] - self.sizes[source]))
        plan = self._plan
        if plan is None or plan[0] != epoch:
            self._plan = plan = (epoch, *epoch_plan(self.sizes, self.draws, self.seed, epoch))
        return int(plan[1][index]), int(plan[2][index])


def build_dataset(
    data: DataArguments, *, seed: int, preprocessing: TensorPreprocessing | None = None
) -> tuple[PairDataset, list[SourceReport]]:
    """The training data that a recipe describes, and what was read from each source.

    Args:
        data: the recipe's `data:` section.
        seed: see `PairDataset`.
        preprocessing: see `PairDataset`.

    Raises:
        DataError: a source can't be used; see `sources.pairs.read_source`.
    """
    read = []
    for source in data.train:
        found = replace(source, path=find_data(source.path))
        pairs, report = read_source(found, max_broken_share=data.max_broken_share)
        read.append((pairs, replace(report, path=source.path)))
    weights = [source.weight for source in data.train if source.weight is not None]
    dataset = PairDataset(
        [pairs for pairs, _ in read],
        names=[source.path for source in data.train],
        weights=weights or None,  # every source has one, or none has
        mixing_alpha=data.mixing_alpha,
        crop_scale=data.crop_scale,
        horizontal_flip=data.horizontal_flip,
        seed=seed,
        preprocessing=preprocessing,
    )
    return dataset, [report for _, report in read]


class PairCollator:
    """Makes a batch from items of `PairDataset`; runs in the workers.

    Args:
        processor: a `GCLProcessor`, which knows its checkpoint's padding and where captions are cut.
        preprocessing: the one that the data set was given.
        normalize: True makes `pixel_values` float32, ready for the model. False leaves them in uint8, which takes a
            quarter of the bytes. The model then needs `TensorPreprocessing.normalize_input` as a forward pre-hook.
            False needs `preprocessing`.

    Returns (when called on N items):
        The output of the processor (`pixel_values` (N, C, H, W), `input_ids` and `attention_mask` (N, L), ...); `ids`
        and `caption_ids`, (N,) int64, equal for equal pairs and for captions that differ only in case and spacing (see
        `stable_hash`); and `broken`, a list of str. Take `broken` out before you call the model.
    """

    def __init__(
        self, processor: GCLProcessor, preprocessing: TensorPreprocessing | None = None, *, normalize: bool = True
    ):
        if preprocessing is None and not normalize:
            raise ValueError("normalize=False needs a preprocessing, because an image processor normalises by itself")
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
    """Counts the images of all sources that could not be read in training, each once.

    Args:
        total: number of training pairs of all sources.
        max_share: the share of `total` that may be unreadable (`DataArguments.max_broken_share`).
    """

    def __init__(self, total: int, max_share: float):
        self.total = total
        self.max_share = max_share
        self._names: dict[str, None] = {}

    def add(self, names: Sequence[str]) -> None:
        """Count the images in the `broken` of a batch.

        Raises:
            DataError: there are too many now, see `check`.
        """
        self._names.update(dict.fromkeys(names))
        self.check()

    def merge(self, names: Sequence[str]) -> None:
        """Count the images that all ranks met, given the `names` gathered from them.

        Count and order (sorted) are then the same on every rank.

        Raises:
            DataError: there are too many now, see `check`. Every rank raises it.
        """
        self._names = dict.fromkeys(sorted({*self._names, *names}))
        self.check()

    def check(self) -> None:
        """Compare the count with the share that is allowed.

        Raises:
            DataError: more than `max_share` of all pairs could not be read.
        """
        if len(self._names) > self.max_share * self.total:
            raise DataError(
                f"{self.summary()}: over data.max_broken_share ({self.max_share:.2%}). "
                "Repair or remove them, or raise max_broken_share"
            )

    @property
    def names(self) -> list[str]:
        """The images and what is wrong with them, in the order in which they were met; sorted after `merge`."""
        return list(self._names)

    def summary(self) -> str:
        """One line for the log: how many there are, and the first 20."""
        shown = "; ".join(self.names[:20])
        return f"{len(self._names)} of {self.total} images could not be read{': ' + shown if shown else ''}"


def stable_hash(text: str) -> int:
    """A number of 63 bits that, unlike `hash`, is the same in every process and run."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
