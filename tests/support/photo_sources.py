"""Sources of three photos, one colour each, in the forms that are read."""

import csv
import io
import json

import datasets
from PIL import Image

COLOURS = {"a.png": "red", "b.png": "green", "sub/c.png": "blue"}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return str(path)


def png(colour):
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(stream, "PNG")
    return stream.getvalue()


def write_parquet(path, columns, features=None):
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(path))
    return str(path)


def as_dict(pairs):
    """{id: (name of the file, captions)}"""
    return {pair["id"]: (pair["image"]["path"].rsplit("photos/")[-1], pair["captions"]) for pair in pairs}


THREE = {"a.png": ("a.png", ["A red."]), "b.png": ("b.png", ["A green."]), "sub/c.png": ("sub/c.png", ["A blue."])}
ROWS = [["file_name", "caption"], ["a.png", "A red."], ["b.png", "A green."], ["sub/c.png", "A blue."]]


def hub_table(**columns):
    return datasets.Dataset.from_dict({"image": [png("red")], "caption": ["A red."], **columns})
