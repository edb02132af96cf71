"""A WebVid-CoVR of seven small videos whose ranks are known, and a model that embeds frames by the number they bear.

As a script, one of two processes: evaluates it into a folder. Arguments: folder of the data, folder to write; the
environment has RANK and WORLD_SIZE.
"""

import csv
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

from modeling_gcl import ImageError, load_image
from tests.support.planted import PlantedModel
from tests.support.videos import number_of, numbered_frame, write_video
from universal_gcl.evaluation.covr.frames import Videos
from universal_gcl.evaluation.covr.measure import evaluate_covr
from universal_gcl.evaluation.covr.triplets import read_triplets
from universal_gcl.retrieval.embed import embed_rows

DIM = 8
LENGTHS = {"1_a/1": 30, "1_a/2": 30, "1_a/3": 30, "2_b/4": 30, "2_b/5": 3, "2_b/6": 17, "2_b/7": 20}  # frames
FIRST = dict(zip(LENGTHS, (0, 30, 60, 90, 120, 123, 140)))  # the number that a video's first frame bears
FLAT = [0.3] * 15
# query, target, edit, scores; ranks by hand are in test_covr.py
ROWS = [
    ("2_b/6", "1_a/1", "Go (to) A!", FLAT),
    ("2_b/6", "1_a/2", "go to B", [0.0] * 14 + [1.0]),
    ("2_b/6", "1_a/3", 'Go  to "C"', FLAT),
    ("1_a/1", "2_b/4", "go to D", FLAT),  # its own video is the target of the first row
    ("2_b/7", "2_b/5", "go to E", FLAT),  # three frames, 15 scores
]
MIDDLES = {"go to a": 123 + 8, "go to b": 123 + 8, "go to c": 123 + 8, "go to d": 15, "go to e": 140 + 10}


def axis(*weights):
    """The unit vector of weights on the first axes."""
    vector = np.pad(np.array(weights, dtype=float), (0, DIM - len(weights)))
    return vector / np.linalg.norm(vector)


QUERIES = {
    "go to a": axis(1), "go to b": axis(0, 0, 0.8, 0, 0, 0.6), "go to c": axis(1), "go to d": axis(1),
    "go to e": axis(0, 0, 0, 0, 1),
}  # fmt: skip


def frame_vector(number):
    if number < 30 or 60 <= number < 90:  # targets A and C
        return axis(1)
    if number < 60:  # B: its last frame that is taken is another
        return axis(0, 0, 1) if number == 30 + 28 else axis(0, 1)
    if number < 120:  # D
        return axis(0.6, 0, 0, 0.8)
    return axis(0, 0, 0, 0, 0, 1) if number == 122 else axis(0, 0, 0, 0, 1)  # E


class NumberReader(PlantedModel):
    """Embeds a frame by its number and a query by its text. `middles`: the number that came with each text; `sizes`: of
    the images."""

    def __init__(self):
        super().__init__({})
        self.middles, self.sizes = {}, set()

    def encode(self, rows, processor, on_error, **options):
        embeds, kept = [], []
        for place, row in enumerate(rows):
            try:
                image = load_image(row["image"])
            except ImageError:
                if on_error == "raise":
                    raise
                continue
            kept.append(place)
            self.sizes.add(image.size)
            if "text" in row:
                self.middles[row["text"]] = number_of(image)
                embeds.append(QUERIES[row["text"]])
            else:
                embeds.append(frame_vector(number_of(image)))
        embeds = torch.tensor(np.array(embeds).reshape(-1, DIM), dtype=torch.float32)
        return (embeds, kept) if on_error == "skip" else embeds


def write_csv(path, rows=ROWS):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["txt1", "txt2", "pth1", "pth2", "edit", "scores"])
        writer.writerows(["a, b", "c\nd", query, target, edit, scores] for query, target, edit, scores in rows)
    return path


def make_data(folder):
    """`covr.csv` and `videos/`, as the authors' scripts leave them."""
    write_csv(folder / "covr.csv")
    for video, length in LENGTHS.items():
        path = folder / "videos" / f"{video}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, [numbered_frame(FIRST[video] + n) for n in range(length)])
    return folder


def evaluate(data, out, *, model=None, source=None, limit=None, **options):
    on_error = "skip" if options.get("skip_unreadable") else "raise"

    def embed(name, rows):
        return embed_rows(model or NumberReader(), None, rows, out / "embeddings" / name, on_error=on_error)

    source = source or Videos(data / "videos")
    return evaluate_covr(read_triplets(data / "covr.csv", limit), source, embed, out, **options)


if __name__ == "__main__":
    data, out = map(Path, sys.argv[1:])
    meeting = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
    torch.distributed.init_process_group("gloo", init_method=f"file://{out / 'meeting'}", **meeting)
    result = evaluate(data, out)
    assert torch.distributed.get_world_size() == 2
    assert (result is None) == (os.environ["RANK"] != "0")
    if result is not None:
        (out / "result.json").write_text(json.dumps(result))
