"""Rasterises OpenMoji into the quickstart's two parquet files. Developers run it once; users get its output.

    npm pack openmoji@17.0.0 && tar xzf openmoji-17.0.0.tgz      # makes the folder `package`
    pip install resvg-py==0.5.0                                  # needed here only
    python -m universal_gcl.conversion.openmoji package hub_configs/quickstart

- All emoji without skin tones, on white, SIZE × SIZE, PNG with a palette of at most COLOURS colours; of emoji drawn
  exactly alike ("pilot", "man pilot") one is kept.
- Columns `id` (hexcode), `image` (datasets' Image), `captions` (four each, see `openmoji_captions`).
- The same inputs and library versions write the same bytes.

OpenMoji is licensed CC BY-SA 4.0 (https://openmoji.org), and so are the files made here.
"""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from universal_gcl.conversion.openmoji_captions import caption_report, make_captions, split_of

SIZE = 128
COLOURS = 64
FEATURES = Features({"id": Value("string"), "image": Image(), "captions": List(Value("string"))})

Rasteriser = Callable[[str, int], bytes]


def write_openmoji(package_dir: str | Path, out_dir: str | Path, rasterise: Rasteriser | None = None) -> dict[str, int]:
    """Writes `openmoji_train.parquet` and `openmoji_test.parquet`.

    Args:
        package_dir: the unpacked npm package; `data/openmoji.json` and `color/svg/` are read.
        out_dir: folder for the two files; made if absent.
        rasterise: function of (SVG text, side in pixels) giving an image file's bytes; default: resvg.

    Returns:
        Counts: emoji listed, left out, those of `caption_report`, and `train` and `test`, the rows of each file.

    Raises:
        FileNotFoundError: the metadata or an SVG is absent.
        ValueError: the metadata lists an emoji twice, or an SVG cannot be drawn; names it.
    """
    package_dir, out_dir = Path(package_dir), Path(out_dir)
    listed = read_entries(package_dir / "data" / "openmoji.json")
    rasterise = rasterise or rasterise_with_resvg
    images = {}
    for entry in listed:
        svg = package_dir / "color" / "svg" / f"{entry['hexcode']}.svg"
        if not svg.is_file():
            raise FileNotFoundError(f"{svg} is absent, though the metadata lists it ({entry['annotation']}).")
        images[entry["hexcode"]] = draw(svg, rasterise)
    entries = without_repeats(listed, images)
    captions = make_captions(entries)
    rows: dict[str, list[dict]] = {"train": [], "test": []}
    for entry, texts in zip(entries, captions, strict=True):
        image = {"bytes": images[entry["hexcode"]], "path": None}
        rows[split_of(entry)].append({"id": entry["hexcode"], "image": image, "captions": texts})
    out_dir.mkdir(parents=True, exist_ok=True)
    for split, split_rows in rows.items():
        columns = {name: [row[name] for row in split_rows] for name in FEATURES}
        Dataset.from_dict(columns, features=FEATURES).to_parquet(out_dir / f"openmoji_{split}.parquet")
    report = {
        "emoji without skin tones": len(listed),
        "left out, drawn exactly like another": len(listed) - len(entries),
    }
    return report | caption_report(entries, captions) | {split: len(split_rows) for split, split_rows in rows.items()}


def without_repeats(entries: list[dict], images: dict[str, bytes]) -> list[dict]:
    """Of the entries with the very same picture, the one with the shortest annotation ("pilot", not "man pilot").

    As pairs, the others would be false negatives in training, and unanswerable in evaluation.
    """
    kept: dict[bytes, dict] = {}
    for entry in entries:
        rival = kept.get(images[entry["hexcode"]])
        if rival is None or len(entry["annotation"]) < len(rival["annotation"]):
            kept[images[entry["hexcode"]]] = entry
    chosen = {entry["hexcode"] for entry in kept.values()}
    return [entry for entry in entries if entry["hexcode"] in chosen]


def read_entries(path: Path) -> list[dict]:
    """The metadata of the emoji without skin tones, in the file's order."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is absent: give the folder that `npm pack openmoji@17.0.0` unpacks to.")
    entries = [entry for entry in json.loads(path.read_text(encoding="utf-8")) if not entry["skintone"]]
    seen: set[str] = set()
    for entry in entries:
        if entry["hexcode"] in seen:
            raise ValueError(f"{path} lists the hexcode {entry['hexcode']} twice.")
        seen.add(entry["hexcode"])
    return entries


def draw(svg: Path, rasterise: Rasteriser) -> bytes:
    """PNG bytes of an SVG file: `SIZE` pixels square, on white, with a palette."""
    try:
        drawn = PILImage.open(io.BytesIO(rasterise(svg.read_text(encoding="utf-8"), SIZE))).convert("RGBA")
    except (ValueError, OSError) as error:
        raise ValueError(f"{svg} cannot be drawn: {error}") from error
    image = PILImage.new("RGBA", drawn.size, "white")
    image.alpha_composite(drawn)
    # No dithering: the art is flat, and dots would cost bytes and add texture that it does not have.
    palette = image.convert("RGB").quantize(COLOURS, dither=PILImage.Dither.NONE)
    file = io.BytesIO()
    palette.save(file, format="PNG", optimize=True)
    return file.getvalue()


def rasterise_with_resvg(svg: str, size: int) -> bytes:
    import resvg_py  # a tool of this module only, so no dependency of the project

    return bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m universal_gcl.conversion.openmoji PACKAGE_DIR OUT_DIR")
    for what, count in write_openmoji(*sys.argv[1:]).items():
        print(f"{count:6d} {what}")
