"""The drawing of a made-up package of a few SVGs, the caption rules by hand, and the files in the repository."""

import io
import json
import re
from pathlib import Path

import pytest
from datasets import Dataset
from PIL import Image

from universal_gcl.conversion import openmoji
from universal_gcl.conversion.openmoji_captions import make_captions, new_tags, split_of

QUICKSTART = Path(__file__).parents[2] / "hub_configs" / "quickstart"


def emoji(hexcode, annotation, tags="", more="", subgroups="animal-mammal", skintone=""):
    return {
        "hexcode": hexcode,
        "annotation": annotation,
        "tags": tags,
        "openmoji_tags": more,
        "subgroups": subgroups,
        "skintone": skintone,
    }


def rasterise(svg, size):
    """Draws `<square fill="…"/>`: the colour on the left half, transparent on the right."""
    match = re.search(r'<square fill="(\w+)"/>', svg)
    if match is None:
        raise ValueError("not a square")
    image = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    image.paste(match[1], (0, 0, size // 2, size))
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


@pytest.fixture
def package(tmp_path):
    entries = [
        emoji("1F98A", "fox", "animal, face, fox", "red, canine"),
        emoji("1F43C", "sloth", "animal, hanging, face, sloth"),
        emoji("1F43C-1F3FB", "sloth: light skin tone", skintone="1"),
        emoji("1F43C-F", "sloth again"),
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "openmoji.json").write_text(json.dumps(entries))
    (tmp_path / "color" / "svg").mkdir(parents=True)
    for hexcode, colour in (("1F98A", "red"), ("1F43C", "black"), ("1F43C-F", "black")):
        (tmp_path / "color" / "svg" / f"{hexcode}.svg").write_text(f'<svg><square fill="{colour}"/></svg>')
    return tmp_path


def read(folder, tmp_path):
    rows = []
    for split in ("train", "test"):
        split_rows = Dataset.from_parquet(str(folder / f"openmoji_{split}.parquet"), cache_dir=str(tmp_path / "cache"))
        assert split_rows.features == openmoji.FEATURES
        rows += split_rows
    return {row["id"]: row for row in rows}


def test_writes_pairs(package, tmp_path):
    counts = openmoji.write_openmoji(package, tmp_path / "out", rasterise)
    assert counts == {
        "emoji without skin tones": 3,
        "left out, same drawing as another": 1,
        "entries": 2,
        "captions": 8,
        "captions shared with another entry": 0,
        "entries whose captions repeat the annotation": 0,
        "train": 1,
        "test": 1,
    }
    rows = read(tmp_path / "out", tmp_path)
    assert set(rows) == {"1F98A", "1F43C"}
    fox = rows["1F98A"]
    assert fox["captions"] == ["fox", "fox, animal and canine", "mammal: face", "emoji for red"]
    image = fox["image"].convert("RGB")
    assert image.size == (128, 128)
    assert image.getpixel((10, 60)) == (255, 0, 0) and image.getpixel((120, 60)) == (255, 255, 255)


def test_same_command_same_bytes(package, tmp_path):
    for run in ("a", "b"):
        openmoji.write_openmoji(package, tmp_path / run, rasterise)
    for split in ("train", "test"):
        name = f"openmoji_{split}.parquet"
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_bad_input_is_named(package, tmp_path):
    svg = package / "color" / "svg" / "1F98A.svg"
    svg.write_text("<svg/>")
    with pytest.raises(ValueError, match=r"1F98A\.svg can't be drawn: not a square"):
        openmoji.write_openmoji(package, tmp_path / "out", rasterise)
    svg.unlink()
    with pytest.raises(FileNotFoundError, match=r"1F98A\.svg is missing.*fox"):
        openmoji.write_openmoji(package, tmp_path / "out", rasterise)
    with pytest.raises(FileNotFoundError, match="npm pack"):
        openmoji.write_openmoji(tmp_path / "out", tmp_path / "out", rasterise)
    metadata = package / "data" / "openmoji.json"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) * 2))
    with pytest.raises(ValueError, match="hexcode 1F98A twice"):
        openmoji.write_openmoji(package, tmp_path / "out", rasterise)


def test_tags_say_more_than_name_and_kind():
    entry = emoji("1", "grinning cat", "cat, mouth, grin, GRIN,  big  smile, ✓", "mammal, grinning cat, smile")
    assert new_tags(entry, "grinning cat") == ["mouth", "grin", "big smile", "smile"]
    assert new_tags(emoji("2", "flag: Peru", "PE, flag, llama", subgroups="country-flag"), "flag of Peru") == ["llama"]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (
            emoji("1", "horse", "a, b, c, d, e, f, g, h, i, j, k, l"),
            ["horse", "horse, a, d and g", "mammal: b, e and h", "emoji for c, f and i"],
        ),
        (emoji("1", "horse", "racing, wild"), ["horse", "horse, mammal", "mammal: racing", "emoji for wild"]),
        (
            emoji("1", "flag: Peru", "PE, flag", subgroups="country-flag"),
            [
                "flag of Peru",
                "flag of Peru, country flag",
                "national banner: Peru",
                "emoji for the country or region Peru",
            ],
        ),
        (emoji("1", "horse"), ["horse", "horse, mammal", "mammal showing horse", "emoji for horse"]),
    ],
)
def test_captions_by_hand(entry, expected):
    assert make_captions([entry]) == [expected]


def test_shared_captions_get_the_words_that_differ():
    tags = "magic, robe, wand"
    captions = make_captions([emoji("1", "mage", tags), emoji("2", "woman mage", tags), emoji("3", "man mage", tags)])
    assert [row[2] for row in captions] == ["mammal: robe", "mammal: robe, woman", "mammal: robe, man"]
    twins = make_captions([emoji("1", "donkey", subgroups="meme"), emoji("2", "donkey")])
    assert [row[0] for row in twins] == ["donkey (meme)", "donkey (mammal)"]


def test_variants_share_a_split():
    roles = [f"role{number}" for number in range(300)]
    splits = [split_of(emoji("1", role)) for role in roles]
    assert 0.12 < splits.count("test") / 300 < 0.26
    for prefix in ("man ", "woman "):
        assert [split_of(emoji("1", prefix + role)) for role in roles] == splits
    assert [split_of(emoji("1", f"{role}: facing right")) for role in roles] == splits
    assert len({split_of(emoji("1", f"flag: {role}")) for role in roles}) == 2
    assert split_of(emoji("1", "person")) in ("train", "test")


def test_shipped_files(tmp_path):
    sizes = [path.stat().st_size for path in QUICKSTART.glob("*.parquet")]
    assert len(sizes) == 2 and sum(sizes) < 12e6
    readme = (QUICKSTART / "README.md").read_text(encoding="utf-8")
    captions, images, rows = [], set(), 0
    for split in ("train", "test"):
        path = QUICKSTART / f"openmoji_{split}.parquet"
        data = Dataset.from_parquet(str(path), cache_dir=str(tmp_path))
        assert data.features == openmoji.FEATURES
        assert f"`{path.name}` ({len(data):,} pairs)" in readme
        assert data[0]["image"].size == (128, 128)
        raw = data.with_format("arrow")[:]
        images |= {value["bytes"].as_py() for value in raw["image"]}
        for texts in raw["captions"].to_pylist():
            assert len(texts) == 4 and all(text and text == text.strip() for text in texts)
            captions += {text.casefold() for text in texts}
        rows += len(data)
    assert len(captions) == len(set(captions)) == 4 * rows
    assert len(images) == rows
    assert "CC BY-SA 4.0" in readme and "openmoji.org" in readme


def test_resvg_draws_on_white():
    pytest.importorskip("resvg_py", reason="only developers who rasterise OpenMoji install it")
    svg = '<svg viewBox="0 0 2 2" xmlns="http://www.w3.org/2000/svg"><rect width="1" height="2" fill="#00f"/></svg>'
    image = Image.open(io.BytesIO(openmoji.rasterise_with_resvg(svg, 32)))
    assert image.size == (32, 32)
    assert image.convert("RGBA").getpixel((8, 8)) == (0, 0, 255, 255)
    assert image.convert("RGBA").getpixel((24, 8))[3] == 0
