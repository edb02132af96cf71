"""Draws OpenMoji's emoji into the quickstart's two parquet files. Only developers run this, once.

    npm pack openmoji@17.0.0 && tar xzf openmoji-17.0.0.tgz      # makes the folder `package`
    pip install resvg-py==0.5.0                                  # only this module needs it
    python -m universal_gcl.conversion.openmoji package hub_configs/quickstart

- All emoji without skin tones are drawn on white, SIZE × SIZE pixels, as PNG with a palette of at most COLOURS colours.
  If several emoji have the same drawing ("pilot", "man pilot"), only one is kept.
- The columns are `id` (hexcode), `image` (datasets' Image) and `captions` (four each, see `openmoji_captions`).
- With the same inputs and the same library versions, the files have the same bytes.

OpenMoji is licensed under CC BY-SA 4.0 (https://openmoji.org), and so are the files written here.
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
    """Write `openmoji_train.parquet` and `openmoji_test.parquet`.

    Args:
        package_dir: the unpacked npm package; `data/openmoji.json` and `color/svg/` are read.
        out_dir: folder for the two files; it is made if absent.
        rasterise: function of (SVG text, side in pixels) that returns the bytes of an image file; by default resvg.

    Returns:
        Counts: the emoji listed and left out, those of `caption_report`, and the rows of each file (`train`, `test`).

    Raises:
        FileNotFoundError: the metadata or an SVG is missing.
        ValueError: the metadata lists an emoji twice, or an SVG can't be drawn; the message names it.
    """
    package_dir, out_dir = Path(package_dir), Path(out_dir)
    listed = read_entries(package_dir / "data" / "openmoji.json")
    rasterise = rasterise or rasterise_with_resvg
    images = {}
    for entry in listed:
        svg = package_dir / "color" / "svg" / f"{entry['hexcode']}.svg"
        if not svg.is_file():
            raise FileNotFoundError(f"{svg} is missing, but the metadata lists it ({entry['annotation']}).")
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
        "left out, same drawing as another": len(listed) - len(entries),
    }
    return report | caption_report(entries, captions) | {split: len(split_rows) for split, split_rows in rows.items()}


def without_repeats(entries: list[dict], images: dict[str, bytes]) -> list[dict]:
    """Keep only one of several entries with the same picture: the one with the shortest annotation ("pilot", not "man
    pilot").

    The others would be false negatives in training, and queries without a unique answer in evaluation.
    """
    kept: dict[bytes, dict] = {}
    for entry in entries:
        rival = kept.get(images[entry["hexcode"]])
        if rival is None or len(entry["annotation"]) < len(rival["annotation"]):
            kept[images[entry["hexcode"]]] = entry
    chosen = {entry["hexcode"] for entry in kept.values()}
    return [entry for entry in entries if entry["hexcode"] in chosen]


def read_entries(path: Path) -> list[dict]:
    """Read the metadata of the emoji without skin tones, in the file's order."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: pass the folder of the unpacked `npm pack openmoji@17.0.0`.")
    entries = [entry for entry in json.loads(path.read_text(encoding="utf-8")) if not entry["skintone"]]
    seen: set[str] = set()
    for entry in entries:
        if entry["hexcode"] in seen:
            raise ValueError(f"{path} lists the hexcode {entry['hexcode']} twice.")
        seen.add(entry["hexcode"])
    return entries


def draw(svg: Path, rasterise: Rasteriser) -> bytes:
    """Draw an SVG file on white, `SIZE` pixels square. Return a PNG with a palette."""
    try:
        drawn = PILImage.open(io.BytesIO(rasterise(svg.read_text(encoding="utf-8"), SIZE))).convert("RGBA")
    except (ValueError, OSError) as error:
        raise ValueError(f"{svg} can't be drawn: {error}") from error
    image = PILImage.new("RGBA", drawn.size, "white")
    image.alpha_composite(drawn)
    # no dithering: the drawings have flat colours, and dots would cost bytes and add texture
    palette = image.convert("RGB").quantize(COLOURS, dither=PILImage.Dither.NONE)
    file = io.BytesIO()
    palette.save(file, format="PNG", optimize=True)
    return file.getvalue()


def rasterise_with_resvg(svg: str, size: int) -> bytes:
    """Draw SVG text as a PNG of `size` x `size` pixels."""
    import resvg_py  # not a dependency of the project, as only this module uses it

    return bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m universal_gcl.conversion.openmoji PACKAGE_DIR OUT_DIR")
    for what, count in write_openmoji(sys.argv[1], sys.argv[2]).items():
        print(f"{count:6d} {what}")
