"""Every form of a source of pairs can be read."""

import hashlib
import json
import logging

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tests.support.photo_sources import (
    COLOURS,
    ROWS,
    THREE,
    as_dict,
    hub_table,
    png,
    write_csv,
    write_jsonl,
    write_parquet,
)
from universal_gcl.sources.arguments import SourceArguments
from universal_gcl.sources.pairs import DataError, load_pairs, read_source

pytestmark = pytest.mark.usefixtures("own_cache")


def test_folder_with_metadata_csv(photos):
    write_csv(photos / "metadata.csv", ROWS)
    pairs, report = read_source(SourceArguments(str(photos)))
    assert as_dict(pairs) == THREE
    assert pairs.features["image"] == datasets.Image(decode=False)
    assert (report.pairs, report.captions, report.skipped) == (3, 3, {})
    assert report.revision == "sha256:" + hashlib.sha256((photos / "metadata.csv").read_bytes()).hexdigest()


def test_folder_with_metadata_jsonl_and_several_captions(photos):
    write_jsonl(photos / "metadata.jsonl", [{"file_name": "a.png", "captions": [" A red. ", "Red."], "id": 7}])
    assert as_dict(load_pairs(SourceArguments(str(photos)))) == {"7": ("a.png", ["A red.", "Red."])}


def test_folder_with_sidecar_texts(photos):
    for name, colour in COLOURS.items():
        (photos / name).with_suffix(".txt").write_text(f"A {colour}.\n\n{colour}\n", encoding="utf-8")
    pairs = as_dict(load_pairs(SourceArguments(str(photos))))
    assert pairs == {name: (name, [f"A {colour}.", colour]) for name, colour in COLOURS.items()}


def test_sidecar_missing_is_counted(photos, caplog):
    (photos / "a.txt").write_text("A red.")
    (photos / "b.txt").write_text("A green.")
    source = SourceArguments(str(photos))
    with caplog.at_level(logging.WARNING):
        pairs, report = read_source(source, max_broken_share=0.5)
    assert len(pairs) == report.pairs == 2
    assert report.skipped == {"images without a .txt file": 1}
    assert "1 of 3 images without a .txt file (the first: sub/c.png)" in caplog.text
    with pytest.raises(DataError, match="over data.max_broken_share"):
        read_source(source)


def test_images_without_texts_say_what_to_write(photos):
    (photos / "a.txt").write_text("A red.")
    with pytest.raises(
        DataError, match="2 of 3 images without a .txt .*. Next to each image, write its captions into a .txt"
    ) as e:
        read_source(SourceArguments(str(photos)))
    assert "image_root" not in str(e.value)


def test_hidden_files_are_not_images_of_a_folder(photos):
    for name in (".DS_Store.png", "._a.png", "__MACOSX/sub/a.png", ".thumbnails/a.png"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).write_bytes(b"no image")
    for name in COLOURS:
        (photos / name).with_suffix(".txt").write_text("A colour.")
    (photos / "._a.txt").write_bytes(b"\xff")
    pairs, report = read_source(SourceArguments(str(photos)))
    assert set(pairs["id"]) == set(COLOURS) and report.skipped == {}


def test_folder_below_a_hidden_one_is_read(photos):
    hidden = photos.rename(photos.with_name(".photos"))
    (hidden / "a.txt").write_text("A red.")
    assert len(load_pairs(SourceArguments(str(hidden)), max_broken_share=0.9)) == 1


def test_paths_of_windows(photos):
    rows = [ROWS[0], ["a.png", "A red."], ["sub\\c.png", "A blue."], ["sub/c.png", "Blue."]]
    pairs = load_pairs(SourceArguments(write_csv(photos / "x.csv", rows)))
    assert as_dict(pairs)["sub\\c.png"] == ("sub/c.png", ["A blue.", "Blue."])
    (photos / "sub\\d.png").write_bytes(
        (photos / "a.png").read_bytes()
    )  # outside Windows, this is a valid name of a file
    pairs = load_pairs(SourceArguments(write_csv(photos / "x.csv", [ROWS[0], ["sub\\d.png", "A red."]])))
    assert pairs[0]["image"]["path"] == str(photos / "sub\\d.png")
    source = SourceArguments(write_csv(photos / "x.csv", [*ROWS, ["C:\\photos\\e.png", "A red."]]))
    with pytest.raises(DataError, match=r"x.csv, line 5: C:\\photos\\e.png lies outside .*photos; set image_root"):
        read_source(source)
    (photos.parent / "secret.png").write_bytes(b"")
    source = SourceArguments(write_csv(photos / "x.csv", [ROWS[0], ["..\\secret.png", "A"]]))
    with pytest.raises(DataError, match="secret.png lies outside"):
        read_source(source)


def test_repeated_images_join(photos):
    rows = [ROWS[0], ROWS[1], ROWS[2], ["./a.png", "Red."], ROWS[3]]
    source = SourceArguments(write_csv(photos / "captions.csv", rows), limit=2)
    assert as_dict(load_pairs(source)) == {"a.png": ("a.png", ["A red.", "Red."]), "b.png": ("b.png", ["A green."])}


def test_jsonl_with_other_root_and_columns(tmp_path, photos):
    rows = [{"pic": "sub/c.png", "title": "A blue.", "fr": "Un bleu.", "key": "k1"}]
    path = write_jsonl(tmp_path / "list.jsonl", rows)
    source = SourceArguments(path, image_root=str(photos), image_column="pic", caption_column="fr", id_column="key")
    assert as_dict(load_pairs(source)) == {"k1": ("sub/c.png", ["Un bleu."])}


def test_llava_chat_and_meta(photos):
    chat = [
        {
            "id": "0045",
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": "Describe it.\n<image>"},
                {"from": "gpt", "value": "A red."},
            ],
        }
    ]
    meta = [{"id": "0045", "image": "a.png", "blip_caption": "A red.", "url": "http://x/a.png"}]
    for name, entries in (("chat.json", chat), ("meta.json", meta)):
        (photos / name).write_text(json.dumps(entries))
        assert as_dict(load_pairs(SourceArguments(str(photos / name)))) == {"0045": ("a.png", ["A red."])}


def test_parquet_with_images_inside(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "captions": datasets.List(datasets.Value("string"))})
    columns = {"image": [{"bytes": png("red"), "path": "a.png"}] * 3, "captions": [["A red.", "Red."], ["B"], ["C"]]}
    path = write_parquet(tmp_path / "x.parquet", columns, features)
    pairs, report = read_source(SourceArguments(path, limit=2))
    assert pairs.column_names == ["id", "image", "captions"]
    assert pairs[0] == {"id": "0", "image": {"bytes": png("red"), "path": "a.png"}, "captions": ["A red.", "Red."]}
    assert pairs["id"][:] == ["0", "1"]
    assert (report.pairs, report.captions) == (2, 3)


def test_parquet_with_plain_bytes_and_one_caption(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", {"jpg": [png("red")], "text": ["A red."], "id": [17]})
    assert load_pairs(SourceArguments(path))[0] == {
        "id": "17",
        "image": {"bytes": png("red"), "path": None},
        "captions": ["A red."],
    }


def test_parquet_with_paths(photos):
    path = write_parquet(photos / "x.parquet", {"image": list(COLOURS), "text": ["A red.", "A green.", "A blue."]})
    assert as_dict(load_pairs(SourceArguments(path))) == THREE


def test_parquet_that_changes_is_read_anew(tmp_path):
    for caption in ("one", "two"):
        path = write_parquet(tmp_path / "x.parquet", {"image": [png("red")], "text": [caption]})
        assert load_pairs(SourceArguments(path))[0]["captions"] == [caption]


def test_parquet_rows_without_image_are_counted(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", {"image": [png("red"), None, png("blue")], "text": ["A", "B", "C"]})
    pairs, report = read_source(SourceArguments(path), max_broken_share=0.4)
    assert pairs["captions"][:] == [["A"], ["C"]]
    assert report.skipped == {"images missing": 1} and report.first_skipped == {"images missing": "row 1"}
    with pytest.raises(DataError, match=r"1 of 3 images missing \(the first: row 1\): over data.max_broken_share"):
        read_source(SourceArguments(path))


def image_table(*images, **columns):
    """Columns with the images as structs of bytes and path."""
    features = {"image": datasets.Image(), "text": datasets.Value("string")}
    columns = {"image": list(images), "text": [f"caption {row}" for row in range(len(images))], **columns}
    return columns, datasets.Features(features)


def write_image_parquet(path, *images):
    # with pyarrow, because to_parquet would store the bytes of the files
    columns, _ = image_table(*images)
    struct = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table({"image": pyarrow.array(columns["image"], struct), "text": columns["text"]})
    pyarrow.parquet.write_table(table, path)
    return str(path)


def test_parquet_rows_with_a_path_alone_are_files_below_the_root(tmp_path, photos):
    images = [
        {"bytes": None, "path": "sub/c.png"},
        {"bytes": png("red"), "path": "../elsewhere.png"},  # not used as a path, because the bytes are stored
        {"bytes": b"", "path": None},
        {"bytes": b"", "path": str(photos / "b.png")},
        {"bytes": None, "path": "sub\\gone.png"},
    ]
    path = write_image_parquet(photos / "x.parquet", *images)
    pairs, report = read_source(SourceArguments(path), max_broken_share=0.4)
    assert pairs["id"][:] == ["0", "1", "3"]
    assert pairs["captions"][:] == [["caption 0"], ["caption 1"], ["caption 3"]]
    assert pairs["image"][:] == [
        {"bytes": None, "path": str(photos / "sub/c.png")},
        images[1],
        {"bytes": None, "path": str(photos / "b.png")},
    ]
    assert (report.pairs, report.captions) == (3, 3)
    assert report.skipped == {"images missing": 2}
    elsewhere = write_image_parquet(tmp_path / "x.parquet", images[0])
    assert load_pairs(SourceArguments(elsewhere, image_root=str(photos)))[0]["image"]["path"] == f"{photos}/sub/c.png"


@pytest.mark.parametrize("stored", [None, b""])
@pytest.mark.parametrize("path", ["../secret.png", "/etc/hostname"])
def test_parquet_paths_must_not_leave_the_root(photos, stored, path):
    good = {"bytes": png("red"), "path": None}
    table = write_image_parquet(photos / "x.parquet", good, {"bytes": stored, "path": path})
    with pytest.raises(DataError, match=f"x.parquet, row 1: {path} lies outside .*set image_root"):
        read_source(SourceArguments(table), max_broken_share=1.0)


def test_parquet_ids_that_are_not_a_number_are_empty(tmp_path):
    columns = {"image": [png("red")] * 2, "text": ["A", "B"], "id": [1.0, float("nan")]}
    with pytest.raises(DataError, match="x.parquet, row 1: the id is empty"):
        read_source(SourceArguments(write_parquet(tmp_path / "x.parquet", columns)))


def test_hub_data_set(monkeypatch):
    commit = "0123456789" * 4
    table = hub_table()
    table.info.download_checksums = {f"hf://datasets/me/photos@{commit}/data/train-0.parquet": {}}
    asked = {}

    def load_dataset(path, name, **kwargs):
        asked.update(path=path, name=name, **kwargs)
        return table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    pairs, report = read_source(SourceArguments("me/photos", name="small", revision="main", split="test"))
    assert asked == {"path": "me/photos", "name": "small", "revision": "main", "split": "test"}
    assert pairs[0]["captions"] == ["A red."]
    assert (report.revision, report.split) == (commit, "test")


def test_hub_images_in_files_are_in_the_caches_or_below_image_root(monkeypatch, photos, tmp_path):
    cached = tmp_path / "cache" / "a.png"
    cached.parent.mkdir()
    cached.write_bytes(png("red"))
    table = [{"bytes": None, "path": str(cached)}]

    def load_dataset(*args, **kwargs):
        return datasets.Dataset.from_dict(*image_table(*table))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_pairs(SourceArguments("me/photos"))[0]["image"] == table[0]
    table.append({"bytes": None, "path": "a.png"})
    with pytest.raises(DataError, match="1 of 2 images missing"):
        read_source(SourceArguments("me/photos"))
    table[:] = [{"bytes": None, "path": "a.png"}]
    pairs = load_pairs(SourceArguments("me/photos", image_root=str(photos)))
    assert pairs[0]["image"]["path"] == str(photos / "a.png")
    table[0]["path"] = str(photos / "a.png")
    with pytest.raises(DataError, match="me/photos, row 0: .*a.png lies outside the caches of the Hub; set image_root"):
        read_source(SourceArguments("me/photos"))
