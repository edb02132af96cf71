"""M-BEIR in small, in both of its layouts, with contents whose embeddings are planted: everything lies on a circle."""

import io
import json
import math
from pathlib import Path

import datasets
from PIL import Image

from universal_gcl.evaluation.mbeir.tasks import TASKS, parse_task

# where on the circle, in degrees, texts (as they must be cleaned) and images lie
TEXTS = {"A dog.": 0, "Is it a cat?": 90, "What is it?": 40, "Make it blue!": 12}
IMAGES = {"dog": 10, "cat": 80, "plane": 40, "far": 60, "red": 0, "blue": 16, "near": 30}
PROMPTS = {"visualnews_task3": ["find the caption of this photo", "What is the news"], "cirr_task7": ["pick an image"]}


def picture(name: str) -> bytes:
    names = sorted([*IMAGES, *(f"{task.dataset}{side}{task.name[-1]}" for task in TASKS for side in "qc")])
    file = io.BytesIO()
    Image.new("RGB", (6, 6), (names.index(name), 90, 200)).save(file, "PNG")
    return file.getvalue()


def made_benchmark() -> dict:
    """Task → `{"queries", "candidates": [(id, text, image)], "positives": [(qid, did)]}`. Tasks without a figure to be
    worked out have one query and one candidate, which nothing else is near."""
    data = {}
    for number, task in enumerate(TASKS):
        angle = 150 + 10 * number
        query, candidate = [], []
        for side, modality, entry in (("q", task.query, query), ("c", task.candidate, candidate)):
            text, image = f"{side} of {task.name}", f"{task.dataset}{side}{task.name[-1]}"
            TEXTS[f"{side.upper()} of {task.name}."] = IMAGES[image] = angle
            entry += [text if "text" in modality else None, image if "image" in modality else None]
        qid, did = f"{task.dataset_id}:{1000 + number}", f"{task.dataset_id}:{2000 + number}"
        data[task.name] = {
            "queries": [(qid, *query)],
            "candidates": [(did, *candidate)],
            "positives": [(qid, did)],
        }
    # texts to be cleaned; two candidates that are equal, the second of them the positive
    data["mscoco_task0"] = {
        "queries": [("9:1", ' "a dog"\r', None), ("9:2", "is it a cat?", None)],
        "candidates": [("9:10", None, "dog"), ("9:11", None, "cat"), ("9:12", None, "cat")],
        "positives": [("9:1", "9:10"), ("9:2", "9:12")],
    }
    # one positive behind six, the other in InfoSeek's pool; texts that are null or nothing once cleaned
    near = [("5:20", None, "near"), ("5:21", '""', "near"), *((f"5:{n}", "what is it?", "near") for n in range(22, 26))]
    data["oven_task8"] = {
        "queries": [("5:1", "what is it?", "plane")],
        "candidates": [*near, ("5:10", None, "far")],
        "positives": [("5:1", "5:10"), ("5:1", "6:10")],
    }
    data["infoseek_task8"]["candidates"].append(("6:10", "what is it?", "plane"))
    # the reference image is in the pool, and nearer to the query than the target
    data["cirr_task7"] = {
        "queries": [("8:1", "make it blue!", "red")],
        "candidates": [("8:10", None, "red"), ("8:11", None, "blue"), ("8:12", None, "dog")],
        "positives": [("8:1", "8:11")],
    }
    return data


def write_original(root: Path, data: dict) -> Path:
    for name, of in data.items():
        task = parse_task(name)
        for image in (entry[2] for part in ("queries", "candidates") for entry in of[part]):
            if image is not None:
                file = root / "mbeir_images" / f"{image}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(picture(image))
        queries = [
            {"qid": qid, "query_txt": text, "query_img_path": _path(image), "query_modality": task.query, "task_id": 0}
            for qid, text, image in of["queries"]
        ]
        candidates = [
            {"did": did, "txt": text, "img_path": _path(image), "modality": task.candidate, "src_content": None}
            for did, text, image in of["candidates"]
        ]
        _write_lines(root / "query" / "test" / f"mbeir_{name}_test.jsonl", map(json.dumps, queries))
        _write_lines(root / "cand_pool" / "local" / f"mbeir_{task.pool}_cand_pool.jsonl", map(json.dumps, candidates))
        qrels = (f"{qid} 0 {did} 1 {name[-1]}" for qid, did in of["positives"])
        _write_lines(root / "qrels" / "test" / f"mbeir_{name}_test_qrels.txt", qrels)
    lines = ["query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1\tprompt_2"]
    for name, prompts in PROMPTS.items():
        task = parse_task(name)
        lines.append("\t".join([task.query, task.candidate, task.dataset, str(task.dataset_id), *prompts]))
    _write_lines(root / "instructions" / "query_instructions.tsv", lines)
    return root


def write_mirrors(root: Path, data: dict) -> Path:
    features = {name: datasets.Value("string") for name in ("id", "modality", "text")} | {"image": datasets.Image()}
    for name, of in data.items():
        task = parse_task(name)
        folder = root / f"mbeir_{name}"
        folder.mkdir(parents=True)
        for part, entries, modality in (
            ("query", of["queries"], task.query),
            ("corpus", of["candidates"], ", ".join(reversed(task.candidate.split(",")))),
        ):
            rows = [
                {
                    "id": id,
                    "modality": modality,
                    "text": text,
                    "image": image and {"bytes": picture(image), "path": None},
                }
                for id, text, image in entries
            ]
            table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
            table.to_parquet(folder / f"{part}-00000-of-00001.parquet")
        judged = [{"query-id": qid, "Q0": "0", "corpus-id": did, "score": 1} for qid, did in of["positives"]]
        datasets.Dataset.from_list(judged).to_parquet(folder / "qrels-00000-of-00001.parquet")
    return root


def planted_vector(row: dict) -> list[float]:
    """The sum of what the row holds."""
    angles = []
    if "text" in row:
        angles.append(TEXTS[row["text"]])
    if "image" in row:
        image = row["image"]
        content = image["bytes"] if isinstance(image, dict) else Path(image).read_bytes()
        angles.append(next(angle for name, angle in IMAGES.items() if picture(name) == content))
    return [sum(part(math.radians(angle)) for angle in angles) for part in (math.cos, math.sin)]


def _path(image):
    return image and f"mbeir_images/{image}.png"


def _write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
