"""Training items and batches: determinism, workers, broken images, ids."""

import io
import json
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from tests.support.backbones import random_image, tiny_processor
from universal_gcl.sources.arguments import SourceArguments
from universal_gcl.sources.checks import DataError
from universal_gcl.training.arguments import DataArguments
from universal_gcl.training.data import BrokenImages, PairCollator, PairDataset, build_dataset, stable_hash
from universal_gcl.training.preprocessing import TensorPreprocessing


def make_pairs(count, captions=4, name="p", broken=(), format="PNG"):
    """Pairs whose image has the row number as its colour."""
    pairs = []
    for row in range(count):
        stream = io.BytesIO()
        Image.new("RGB", (24, 20), (row, 0, 0)).save(stream, format)
        stored = b"not an image" if row in broken else stream.getvalue()
        texts = [f"{name} {row} caption {number}" for number in range(captions)]
        pairs.append({"id": f"{name}{row}", "image": {"bytes": stored, "path": None}, "captions": texts})
    return pairs


def collate(items):
    return [
        (item["text"], item["row"], item["pair_id"], item["broken"], np.asarray(item["image"]).tobytes())
        for item in items
    ]


def one_epoch(dataset, workers=0, **kwargs):
    return [
        item for batch in DataLoader(dataset, 5, collate_fn=collate, num_workers=workers, **kwargs) for item in batch
    ]


def test_plain_sources_come_one_after_the_other():
    dataset = PairDataset([make_pairs(3, name="a"), make_pairs(2, name="b")])
    items = [dataset[index] for index in range(len(dataset))]
    assert [item["pair_id"] for item in items] == ["0:a0", "0:a1", "0:a2", "1:b0", "1:b1"]
    assert [item["row"] for item in items] == [0, 1, 2, 0, 1]
    assert [item["image"].getpixel((0, 0))[0] for item in items] == [0, 1, 2, 0, 1]
    assert all(item["broken"] == [] for item in items)
    with pytest.raises(IndexError):
        dataset[5]


def test_ids_of_a_single_source_stay_as_they_are():
    assert PairDataset([make_pairs(1)])[0]["pair_id"] == "p0"


def test_every_caption_is_drawn_over_the_epochs_about_equally():
    dataset = PairDataset([make_pairs(50, captions=4)], seed=3)
    drawn = Counter()
    for epoch in range(20):
        dataset.set_epoch(epoch)
        drawn.update(dataset[index]["text"].split()[-1] for index in range(50))
    assert set(drawn) == {"0", "1", "2", "3"}
    assert all(200 <= count <= 300 for count in drawn.values())


def test_items_depend_on_seed_epoch_and_index_only():
    def items(seed, epoch):
        dataset = PairDataset([make_pairs(12)], seed=seed, crop_scale=(0.5, 0.9), horizontal_flip=True)
        dataset.set_epoch(epoch)
        return one_epoch(dataset)

    first = items(seed=1, epoch=2)
    torch.manual_seed(99)
    np.random.seed(99)
    assert items(seed=1, epoch=2) == first
    assert items(seed=1, epoch=3) != first
    assert items(seed=2, epoch=2) != first


def test_global_random_state_is_left_alone():
    dataset = PairDataset([make_pairs(4)], crop_scale=(0.5, 0.9), horizontal_flip=True, mixing_alpha=0.5)
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(0)
    np.random.seed(0)
    dataset[0], dataset[3]
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])


def test_persistent_workers_give_the_same_items_and_follow_the_epoch():
    def dataset():
        return PairDataset([make_pairs(12), make_pairs(8)], seed=7, weights=[1, 1], crop_scale=(0.5, 0.9))

    alone, shared = dataset(), dataset()
    loader = DataLoader(shared, 5, collate_fn=collate, num_workers=2, persistent_workers=True)
    seen = []
    for epoch in (0, 1, 2, 1):
        alone.set_epoch(epoch)
        shared.set_epoch(epoch)
        items = [item for batch in loader for item in batch]
        assert items == one_epoch(alone)
        seen.append(items)
    assert seen[0] != seen[1] != seen[2]
    assert seen[1] == seen[3]


def test_mixing_gives_each_source_its_share_every_epoch():
    dataset = PairDataset([make_pairs(30, name="a"), make_pairs(10, name="b")], weights=[1, 3])
    pairs = []
    for epoch in range(4):
        dataset.set_epoch(epoch)
        items = [dataset[index] for index in range(len(dataset))]
        assert Counter(item["pair_id"][0] for item in items) == {"0": 10, "1": 30}
        assert Counter(Counter(item["pair_id"] for item in items if item["pair_id"][0] == "1").values()) == {3: 10}
        pairs += [item["pair_id"] for item in items]
    counts = Counter(pair for pair in pairs if pair[0] == "0")
    assert sum(counts.values()) == 40 and set(counts.values()) <= {1, 2} and len(counts) == 30


def test_sources_without_pairs_or_with_too_small_a_share():
    with pytest.raises(DataError, match="mine has no pairs"):
        PairDataset([[]], names=["mine"])
    with pytest.raises(DataError, match="b would give no item to an epoch of 4"):
        PairDataset([make_pairs(3), make_pairs(1)], names=["a", "b"], weights=[1000, 1])


def test_broken_images_are_replaced_by_the_next_and_named():
    pairs = make_pairs(4, broken=(1, 2, 3))
    pairs[2]["image"] = {"bytes": None, "path": "/nowhere/x.png"}
    items = [PairDataset([pairs], names=["mine"])[index] for index in range(4)]
    assert [item["pair_id"] for item in items] == ["p0"] * 4
    assert all(item["text"].startswith("p 0 ") for item in items)
    assert [len(item["broken"]) for item in items] == [0, 3, 2, 1]
    assert items[1]["broken"][0].startswith("mine, p1: ")
    assert items[1]["broken"][1] == "mine, p2: /nowhere/x.png: no such file"


def test_replacement_stays_in_its_source():
    dataset = PairDataset([make_pairs(2, name="a", broken=(1,)), make_pairs(2, name="b")])
    assert dataset[1]["pair_id"] == "0:a0"


def test_nothing_readable_is_an_error():
    with pytest.raises(DataError, match="3 images in a row can't be read. The first: source 0, p1"):
        PairDataset([make_pairs(3, broken=(0, 1, 2))])[1]


def test_broken_images_are_counted_once_and_fatal_over_the_share():
    broken = BrokenImages(total=200, max_share=0.01)
    for _ in range(3):
        broken.add(["a: bad", "b: bad"])
    assert broken.names == ["a: bad", "b: bad"]
    assert broken.summary() == "2 of 200 images could not be read: a: bad; b: bad"
    with pytest.raises(DataError, match=r"3 of 200 .*over data.max_broken_share \(1.00%\)"):
        broken.add(["c: bad"])
    with pytest.raises(DataError, match="3 of 200"):
        broken.check()
    assert BrokenImages(5, 0.0).summary() == "0 of 5 images could not be read"


def test_broken_images_of_all_ranks_are_merged():
    ranks = [BrokenImages(total=200, max_share=0.01) for _ in range(2)]
    ranks[0].add(["b: bad", "c: bad"])
    ranks[1].add(["a: bad", "b: bad"])
    gathered = ranks[0].names + ranks[1].names
    for rank in ranks:  # 3 in all: over the share on every rank, though none met more than 2
        with pytest.raises(DataError, match="3 of 200 .*over data.max_broken_share"):
            rank.merge(gathered)
        assert rank.names == ["a: bad", "b: bad", "c: bad"]
    alone = BrokenImages(total=200, max_share=0.01)
    alone.merge(["b: bad", "a: bad", "b: bad"])
    assert alone.names == ["a: bad", "b: bad"]


def test_collator_makes_tensors_and_ids():
    items = [
        {"image": Image.new("RGB", (9, 7)), "text": text, "pair_id": pair_id, "row": 0, "broken": broken}
        for text, pair_id, broken in [
            ("a red dog", "1", ["x: bad"]),
            (" A  red\tDOG", "2", []),
            ("the cat sits on a green house", "1", ["y: bad"]),
        ]
    ]
    batch = PairCollator(tiny_processor("clip"))(items)
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask", "ids", "caption_ids", "broken"}
    assert batch["pixel_values"].shape == (3, 3, 32, 32)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, 9)
    assert batch["ids"].dtype == batch["caption_ids"].dtype == torch.int64
    first, second, third = batch["ids"].tolist()
    assert first == third != second
    first, second, third = batch["caption_ids"].tolist()
    assert first == second != third
    assert batch["broken"] == ["x: bad", "y: bad"]


def test_collator_keeps_the_processors_length_and_padding():
    items = [{"image": Image.new("RGB", (9, 7)), "text": "a b c d e f g h", "pair_id": "1", "row": 0, "broken": []}]
    processor = tiny_processor("clip")
    processor.max_text_length = 5
    assert PairCollator(processor)(items)["input_ids"].shape == (1, 5)
    assert PairCollator(tiny_processor("siglip"))(items)["input_ids"].shape == (1, 16)


def fast(name="clip"):
    processor = tiny_processor(name)
    return processor, TensorPreprocessing.from_processor(processor.image_processor)


@pytest.mark.parametrize("name", ["clip", "siglip"])
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_fast_batches_are_the_processors_but_for_grey_levels(name, format):
    processor, preprocessing = fast(name)
    pairs = make_pairs(6, broken=(2,))
    for row in (0, 1, 3, 4, 5):
        stream = io.BytesIO()
        random_image(row, (61, 90)).save(stream, format)
        pairs[row]["image"]["bytes"] = stream.getvalue()
    kwargs = {"crop_scale": (0.3, 1.0), "horizontal_flip": True, "seed": 4}
    plain, quick = PairDataset([pairs], **kwargs), PairDataset([pairs], preprocessing=preprocessing, **kwargs)
    expected = PairCollator(processor)([plain[index] for index in range(6)])
    items = [quick[index] for index in range(6)]
    found = PairCollator(processor, preprocessing)(items)
    assert set(found) == set(expected) and found["broken"] == expected["broken"] != []
    for key in set(found) - {"pixel_values", "broken"}:
        assert torch.equal(found[key], expected[key]) and found[key].dtype == expected[key].dtype
    assert found["pixel_values"].dtype == torch.float32
    difference = (found["pixel_values"] - expected["pixel_values"]) / preprocessing.factor
    assert difference.abs().max() < 2.1 and difference.abs().mean() < 0.1
    raw = PairCollator(processor, preprocessing, normalize=False)(items)["pixel_values"]
    assert raw.dtype == torch.uint8 and torch.equal(preprocessing.normalize(raw), found["pixel_values"])


def test_pixels_cannot_stay_raw_without_a_preprocessing():
    with pytest.raises(ValueError, match="normalize=False needs a preprocessing"):
        PairCollator(tiny_processor("clip"), normalize=False)


def test_workers_give_the_same_batches_with_fast_preprocessing():
    processor, preprocessing = fast()
    dataset = PairDataset(
        [make_pairs(12, format="JPEG", broken=(5,))], crop_scale=(0.5, 0.9), horizontal_flip=True,
        preprocessing=preprocessing,
    )  # fmt: skip
    assert one_epoch(dataset, workers=2) == one_epoch(dataset)
    collator = PairCollator(processor, preprocessing)
    alone, shared = (list(DataLoader(dataset, 4, collate_fn=collator, num_workers=workers)) for workers in (0, 2))
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"]) and one["broken"] == other["broken"]
        assert other["pixel_values"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_batch_of_texts_is_padded_to_its_own_longest_unless_the_tower_needs_all(name):
    collator = PairCollator(*fast(name))
    for captions, longest in ((["a dog", "a"], 4), (["a dog runs on grass in the house", "a"], 10)):
        items = [
            {"image": torch.zeros(32, 32, 3, dtype=torch.uint8), "text": text, "pair_id": "1", "row": 0, "broken": []}
            for text in captions
        ]
        assert collator(items)["input_ids"].shape == (2, longest if name == "clip" else 16)


def test_stable_hash_is_the_same_in_every_process():
    assert stable_hash("photo 1") == 7897457226335780544
    assert all(0 <= stable_hash(str(number)) < 2**63 for number in range(1000))
    assert stable_hash("\ud800") != stable_hash("?")


def test_build_dataset_from_arguments(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, count in (("one", 3), ("two", 2)):
        folder = tmp_path / name
        folder.mkdir()
        for row in range(count):
            Image.new("RGB", (8, 8)).save(folder / f"{row}.png")
        rows = [{"file_name": f"{row}.png", "text": f"{name} {row}"} for row in range(count)]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    dataset, reports = build_dataset(DataArguments([SourceArguments(one), SourceArguments(two)]), seed=0)
    assert [dataset[index]["text"] for index in range(5)] == ["one 0", "one 1", "one 2", "two 0", "two 1"]
    assert [(report.path, report.pairs) for report in reports] == [(one, 3), (two, 2)]
    weighted = DataArguments([SourceArguments(one, weight=1), SourceArguments(two, weight=4)], mixing_alpha=1.0)
    dataset, _ = build_dataset(weighted, seed=0)
    assert Counter(dataset[index]["text"][:3] for index in range(5)) == {"one": 1, "two": 4}
