"""How fast images and captions reach the model: images per second and core, items per second, tokens after padding.

    python -m benchmarks.pipeline
    python -m benchmarks.pipeline --parquet PHOTOS.parquet    # also your own images and captions

Photo-like JPEGs of 500 x 375 pixels are made here: a smooth scene, edges and some grain. Before anything is timed, a
gate must pass: the fast preprocessing gives the image processor's pixels for the same images. Then everything is
measured as `benchmarks/measurement.py` says, on one thread.
"""

import argparse
import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from benchmarks.measurement import (
    RESULTS,
    Measurement,
    argument_parser,
    environment,
    measure,
    measure_rounds,
    run_worker,
    summarise,
    write_result,
)
from modeling_gcl import GCLProcessor, load_image
from universal_gcl.training import decoding
from universal_gcl.training.data import PairCollator, PairDataset
from universal_gcl.training.preprocessing import TensorPreprocessing

SEED = 0
IMAGES, SIZE, QUALITY = 64, (500, 375), 88
BATCH = 64
ITEMS = 512  # items of an epoch where whole items are measured
WORDS = (
    "a the two young brown dog man child woman runs jumps plays over through with red ball green grass beach".split()
)
# by how many grey levels the values may differ: see training/preprocessing.py
GATE = {"max": 2, "share_over_one": 1e-5, "mean": 0.01}


def make_photos(count: int = IMAGES, size: tuple[int, int] = SIZE) -> list[bytes]:
    """JPEG files of smooth noise at several scales, shapes with edges, and grain."""
    rng = np.random.default_rng(SEED)
    files = []
    for _ in range(count):
        scene = np.zeros((size[1], size[0], 3), np.float32)
        for scale in (2, 4, 8, 16, 32):
            for channel in range(3):
                coarse = Image.fromarray(rng.normal(0, 60 / scale**0.5, (scale, scale + 1)).astype(np.float32))
                scene[..., channel] += np.asarray(coarse.resize(size, Image.Resampling.BICUBIC))
        image = Image.fromarray((128 + scene).clip(0, 255).astype(np.uint8))
        draw = ImageDraw.Draw(image)
        for _ in range(12):
            corner = rng.integers(0, size)
            draw.ellipse((*corner, *(corner + rng.integers(5, 120, 2))), fill=tuple(rng.integers(0, 256, 3).tolist()))
        grain = rng.normal(0, 5, (size[1], size[0], 1))
        stream = BytesIO()
        Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=QUALITY)
        files.append(stream.getvalue())
    return files


def make_captions(count: int) -> list[str]:
    """Captions as long as those of Flickr8k: 5 to 24 words, with a median of 11."""
    rng = np.random.default_rng(SEED)
    lengths = rng.lognormal(np.log(11), 0.35, count).round().clip(5, 24).astype(int)
    return [" ".join(rng.choice(WORDS, length)) for length in lengths]


def make_processor() -> GCLProcessor:
    """CLIP's image processor at 224 pixels, with a tokenizer of whole words that cuts at 77 tokens."""
    vocab = {token: number for number, token in enumerate(["[PAD]", "[UNK]", "[BOS]", "[EOS]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 2), ("[EOS]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=77
    )
    return GCLProcessor(CLIPImageProcessorPil(), tokenizer)


def read_photos(parquet: str | None) -> tuple[list[bytes], list[str]]:
    """Image files and captions: made here, or read from a parquet file with the columns image and captions."""
    if parquet is None:
        return make_photos(), make_captions(1024)
    table = datasets.Dataset.from_parquet(parquet).cast_column("image", datasets.Image(decode=False))
    files = [image["bytes"] for image in table[: 4 * IMAGES]["image"]]
    return files, [caption for captions in table["captions"] for caption in captions]


# Variants of the way from image files to float32 pixel values


def processor_on_pil(files: list[bytes], processor: GCLProcessor, _: TensorPreprocessing) -> torch.Tensor:
    """By the image processor of transformers, on PIL."""
    return processor.image_processor([load_image(file) for file in files], return_tensors="pt")["pixel_values"]


def fast(files: list[bytes], _: GCLProcessor, preprocessing: TensorPreprocessing) -> torch.Tensor:
    """By our preprocessing."""
    return preprocessing.normalize(fast_uint8(files, _, preprocessing))


def fast_uint8(files: list[bytes], _: GCLProcessor, preprocessing: TensorPreprocessing) -> torch.Tensor:
    """By our preprocessing, without rescaling and normalising, which are left to the device."""
    return preprocessing.stack([preprocessing.resize(decoding.decode_rgb(file)) for file in files])


def fast_on_pil(files: list[bytes], _: GCLProcessor, preprocessing: TensorPreprocessing) -> torch.Tensor:
    """By our preprocessing after PIL's decoding, which is used if simplejpeg is not installed."""
    with patch.object(decoding, "simplejpeg", None):
        return fast(files, _, preprocessing)


IMAGE_VARIANTS = {f.__name__: f for f in (processor_on_pil, fast_on_pil, fast, fast_uint8)}
WAYS = ("processor", "fast", "fast_uint8")
WORKERS = (0, 1, 2)
PADDINGS = ("all_77", "longest", "sorted_characters", "sorted_tokens")


def gate(parquet: str | None) -> dict[str, dict[str, float]]:
    """By how many grey levels the fast preprocessing differs from the image processor.

    Raises:
        SystemExit: they differ too much.
    """
    processor, (files, _) = make_processor(), read_photos(parquet)
    preprocessing = TensorPreprocessing.from_processor(processor.image_processor)
    expected = processor_on_pil(files, processor, preprocessing)
    answers = {}
    for name in ("fast", "fast_on_pil"):
        found = IMAGE_VARIANTS[name](files, processor, preprocessing)
        difference = ((found - expected) / preprocessing.factor).abs().round()
        answers[name] = {
            "max": difference.max().item(),
            "share_over_one": (difference > 1).double().mean().item(),
            "mean": difference.double().mean().item(),
        }
        for figure, limit in GATE.items():
            if not answers[name][figure] <= limit:
                raise SystemExit(f"{name} differs in grey levels: {figure} is {answers[name][figure]:.2g} > {limit}")
    return answers


def measure_images(variant: str, parquet: str | None) -> Measurement:
    """Seconds for BATCH images."""
    processor, (files, _) = make_processor(), read_photos(parquet)
    preprocessing = TensorPreprocessing.from_processor(processor.image_processor)
    work, batch = IMAGE_VARIANTS[variant], files[:BATCH]

    def step(count: int = BATCH) -> None:
        work(batch[:count], processor, preprocessing)

    result = measure(step, at_least=1.5, warm_up=lambda: step(8))
    return result | {"images_per_second": len(batch) / result["seconds"]}


def measure_items(variant: str, workers: int, parquet: str | None) -> Measurement:
    """Seconds for an epoch of ITEMS items through PairDataset, PairCollator and DataLoader."""
    processor, (files, captions) = make_processor(), read_photos(parquet)
    pairs = [
        {"id": str(row), "image": {"bytes": files[row % len(files)], "path": None}, "captions": captions[row::ITEMS]}
        for row in range(ITEMS)
    ]
    preprocessing = None if variant == "processor" else TensorPreprocessing.from_processor(processor.image_processor)
    dataset = PairDataset([datasets.Dataset.from_list(pairs)], crop_scale=(0.9, 1.0), preprocessing=preprocessing)
    collator = PairCollator(processor, preprocessing, normalize=variant != "fast_uint8")
    loader = torch.utils.data.DataLoader(
        dataset, BATCH, collate_fn=collator, num_workers=workers, persistent_workers=workers > 0
    )

    def epoch() -> None:
        for _ in loader:
            pass

    result = measure(epoch, warm_up=epoch)
    return result | {"items_per_second": ITEMS / result["seconds"]}


def token_lengths(captions: list[str], processor: GCLProcessor) -> list[int]:
    """Tokens of each caption."""
    return [len(ids) for ids in processor.tokenizer(captions, truncation=True)["input_ids"]]


def text_batches(captions: list[str], processor: GCLProcessor) -> dict[str, list[tuple[int, int]]]:
    """Name → for each batch, the number of captions and the length to which they are padded."""
    lengths = token_lengths(captions, processor)
    shuffled = np.random.default_rng(SEED).permutation(len(captions)).tolist()
    ways = {"all_77": shuffled, "longest": shuffled}
    ways["sorted_characters"] = sorted(range(len(captions)), key=lambda index: len(captions[index]))
    ways["sorted_tokens"] = sorted(range(len(captions)), key=lengths.__getitem__)
    batches = {}
    for name, order in ways.items():
        parts = [list(order)[start : start + BATCH] for start in range(0, len(captions), BATCH)]
        batches[name] = [(len(p), 77 if name == "all_77" else max(lengths[index] for index in p)) for p in parts]
    return batches


def measure_texts(variant: str, parquet: str | None) -> Measurement:
    """Seconds of a text tower with the shape of MiniLM-L6 for 512 captions, batched as `variant` says."""
    batches = text_batches(read_photos(parquet)[1][:512], make_processor())[variant]
    torch.manual_seed(SEED)
    tower = BertModel(
        BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, vocab_size=1000
        )
    ).eval()

    def embed() -> None:
        with torch.inference_mode():
            for rows, length in batches:
                tower(torch.ones(rows, length, dtype=torch.long))

    result = measure(embed)
    return result | {"captions_per_second": 512 / result["seconds"]}


# task: the arguments of each variant, and the variant that ratios refer to
MEASURED: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "images": ({way: {"variant": way} for way in IMAGE_VARIANTS}, "processor_on_pil"),
    "items": (
        {f"{way}, {workers} workers": {"variant": way, "workers": workers} for way in WAYS for workers in WORKERS},
        "processor, 0 workers",
    ),
    "texts": ({way: {"variant": way} for way in PADDINGS}, "all_77"),
}
TASKS: dict[str, Callable[..., Any]] = {
    "gate": gate,
    "images": measure_images,
    "items": measure_items,
    "texts": measure_texts,
}


def describe(parquet: str | None) -> dict[str, Any]:
    """What is measured: the images, the result of the gate, and the number of tokens after padding."""
    (files, captions), processor = read_photos(parquet), make_processor()
    padded = text_batches(captions, processor)
    return {
        "images": {
            "number": len(files),
            "bytes": sum(map(len, files)) / len(files),
            "size": load_image(files[0]).size,
        },
        "gate": run_worker("benchmarks.pipeline", {"task": "gate", "parquet": parquet}, threads=1),
        "tokens": {
            "captions": len(captions),
            "unpadded": sum(token_lengths(captions, processor)),
            **{way: sum(rows * length for rows, length in batches) for way, batches in padded.items()},
        },
    }


def main() -> None:
    parser = argument_parser("pipeline", __doc__)
    parser.add_argument("--parquet", help="a file with the columns image (of about 224 pixels) and captions")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "pipeline.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        task = json.loads(arguments.worker)
        print(json.dumps(TASKS[task.pop("task")](**task)))
        return
    result: dict[str, Any] = {"environment": environment(1, SEED), "batch": BATCH, "data": {}}
    for parquet in [None, arguments.parquet] if arguments.parquet else [None]:
        name = "made" if parquet is None else Path(parquet).name
        part = result["data"][name] = describe(parquet)
        print(name, json.dumps(part), flush=True)
        for kind, (variants, reference) in MEASURED.items():
            series = measure_rounds(
                lambda way, kind=kind, variants=variants, parquet=parquet: run_worker(
                    "benchmarks.pipeline", variants[way] | {"task": kind, "parquet": parquet}, threads=1
                ),
                list(variants),
                arguments.rounds,
            )
            part[kind] = {way: summarise(series[way], {reference: series[reference]}) for way in variants}
            for way, row in part[kind].items():
                print(name, kind, way, json.dumps(row), flush=True)
            write_result(arguments.out, result)


if __name__ == "__main__":
    main()
