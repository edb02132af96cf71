"""Sources of pairs: every form that is read, and the message for everything that is wrong."""

import csv
import hashlib
import io
import json
import logging

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from retrieval.source_arguments import SourceArguments
from retrieval.sources import DataError, load_pairs, read_source

COLOURS = {"a.png": "red", "b.png": "green", "sub/c.png": "blue"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for name, colour in COLOURS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), colour).save(folder / name)
    return folder


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
    assert report.skipped == {"images without a .txt beside them": 1}
    assert "1 of 3 images without a .txt beside them (the first: sub/c.png)" in caplog.text
    with pytest.raises(DataError, match="over data.max_broken_share"):
        read_source(source)


def test_images_without_texts_say_what_to_write(photos):
    (photos / "a.txt").write_text("A red.")
    with pytest.raises(
        DataError, match="2 of 3 images without a .txt .*. Write a .txt with the captions beside each"
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
    (photos / "sub\\d.png").write_bytes((photos / "a.png").read_bytes())  # a name that is allowed elsewhere
    pairs = load_pairs(SourceArguments(write_csv(photos / "x.csv", [ROWS[0], ["sub\\d.png", "A red."]])))
    assert pairs[0]["image"]["path"] == str(photos / "sub\\d.png")
    source = SourceArguments(write_csv(photos / "x.csv", [*ROWS, ["C:\\photos\\e.png", "A red."]]))
    with pytest.raises(DataError, match="1 of 4 images missing, named with a backslash .* Write paths with / instead"):
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
    # pyarrow directly: to_parquet would put the files' bytes in
    columns, _ = image_table(*images)
    struct = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table({"image": pyarrow.array(columns["image"], struct), "text": columns["text"]})
    pyarrow.parquet.write_table(table, path)
    return str(path)


def test_parquet_rows_with_a_path_alone_are_files_below_the_root(tmp_path, photos):
    images = [
        {"bytes": None, "path": "sub/c.png"},
        {"bytes": png("red"), "path": "../elsewhere.png"},  # a name: the bytes are there
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
    assert report.skipped == {"images missing": 1, "images missing, named with a backslash": 1}
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


def hub_table(**columns):
    return datasets.Dataset.from_dict({"image": [png("red")], "caption": ["A red."], **columns})


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


def test_hub_errors(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'me/none' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="me/none: no such file or folder here, and not to be had .* doesn't exist"):
        read_source(SourceArguments("me/none"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: hub_table(image=["a.png"]))
    with pytest.raises(DataError, match="me/paths: image holds paths, not images; set image_root"):
        read_source(SourceArguments("me/paths"))


def test_missing_images_are_counted_and_named(photos, caplog):
    rows = [*ROWS, ["gone.png", "Gone."]]
    source = SourceArguments(write_csv(photos / "captions.csv", rows))
    with caplog.at_level(logging.WARNING):
        pairs, report = read_source(source, max_broken_share=0.25)
    assert as_dict(pairs) == THREE
    assert report.skipped == {"images missing": 1}
    assert f"1 of 4 images missing (the first: {photos}/gone.png). They are left out." in caplog.text
    with pytest.raises(DataError, match=r"1 of 4 images missing .*gone.png.*over data.max_broken_share \(24.00%\)"):
        read_source(source, max_broken_share=0.24)


def test_all_images_missing_is_an_error_at_any_share(photos):
    source = SourceArguments(write_csv(photos / "captions.csv", [ROWS[0], ["gone.png", "Gone."]]))
    with pytest.raises(DataError, match="1 of 1 images missing"):
        read_source(source, max_broken_share=1.0)


@pytest.mark.parametrize(
    "rows, arguments, message",
    [
        (
            [["picture", "caption"], ["a.png", "A"]],
            {},
            "x.csv, line 2: which column is the image.*found: picture, cap.*Set im",
        ),
        ([["image", "word"], ["a.png", "A"]], {}, "x.csv, line 2: which column is the caption.*Set caption_column"),
        (ROWS, {"caption_column": "fr"}, "no column 'fr', which caption_column asks for; columns: file_name, caption"),
        (ROWS, {"id_column": "key"}, "no column 'key', which id_column asks for"),
        ([ROWS[0], ["a.png", "  "]], {}, "x.csv, line 2: the caption is empty"),
        ([ROWS[0], ["a.png"]], {}, "x.csv, line 2: the caption is empty"),
        ([ROWS[0], ["a.png", "A", "B"]], {}, "x.csv, line 2: more fields than the header has"),
        ([ROWS[0], ["", "A"]], {}, "x.csv, line 2: the image is '', not a path"),
        ([ROWS[0], ["../secret.png", "A"]], {}, "x.csv, line 2: ../secret.png lies outside .*set image_root"),
        ([ROWS[0], ["/etc/a.png", "A"]], {}, "x.csv, line 2: /etc/a.png lies outside"),
        ([ROWS[0], ["http://x/a.png", "A"]], {}, "x.csv, line 2: http://x/a.png is an address; download"),
        ([ROWS[0]], {}, "x.csv has no rows"),
        (
            [["image", "caption", "caption"], ["a.png", "A", "B"]],
            {},
            "x.csv, line 1: the header has .* 'caption' twice",
        ),
        (
            [["image", "caption", "id"], ["a.png", "A", "1"], ["b.png", "B", "1"]],
            {},
            "x.csv, line 3: id '1' was used in .*x.csv, line 2 already",
        ),
        ([["image", "caption", "id"], ["a.png", "A", ""]], {}, "x.csv, line 2: the id is empty"),
        (ROWS, {"image_root": "nowhere"}, "image_root nowhere is not a folder"),
    ],
)
def test_errors_in_csv(photos, rows, arguments, message):
    with pytest.raises(DataError, match=message):
        read_source(SourceArguments(write_csv(photos / "x.csv", rows), **arguments))


def test_csv_cut_off_inside_quotes(photos):
    (photos / "x.csv").write_text('image,caption\na.png,"A red')
    with pytest.raises(DataError, match="x.csv, line 2: not valid CSV .*cut off"):
        read_source(SourceArguments(str(photos / "x.csv")))


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"image": "a.png", "text": "A"}\n{"image": "b.p', r"x.jsonl, line 2: not valid JSON .*cut off\?"),
        ("[1]\n", "x.jsonl, line 1: expected an object with an image and captions, got list"),
        (
            '{"image": "a.png", "text": "A"}\n\n{"image": "b.png"}',
            "x.jsonl, line 3: no 'text', which the rows before have",
        ),
        ('{"image": "a.png", "text": 3}', "x.jsonl, line 1: the caption is 3, not text"),
        ('{"image": "a.png", "text": ["A", 3]}', "x.jsonl, line 1: the caption 3 is not text"),
        ('{"image": "a.png", "text": []}', "x.jsonl, line 1: the list of captions is empty"),
        ('{"image": "a.png", "text": null}', "x.jsonl, line 1: the caption is empty"),
        ('{"image": 3, "text": "A"}', "x.jsonl, line 1: the image is 3, not a path"),
        (
            '{"image": "a.png", "text": "A"}\n' * 2 + '{"image": "a.png", "text": "A \\ud83d"}',
            r"line 3: the caption 'A \\ud83d'",
        ),
        ('{"image": "\\udc80.png", "text": "A"}', "x.jsonl, line 1: the path .*which is not a character"),
        ('{"image": "a.png", "text": "A", "id": "\\udc80"}', "x.jsonl, line 1: the id .*which is not a character"),
        ('{"image": "a.png", "text": "A", "id": NaN}', "x.jsonl, line 1: the id is empty"),
        ('\n{"image": "a.png", "text": ' + "[" * 200_000, "x.jsonl, line 2: nested too deeply"),
        ('{"image": "a.png", "text": "A", "id": ' + "1" * 5000 + "}", "x.jsonl, line 1: not usable JSON"),
        ("", "x.jsonl has no rows"),
    ],
)
def test_errors_in_jsonl(photos, text, message):
    (photos / "x.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        read_source(SourceArguments(str(photos / "x.jsonl")))


@pytest.mark.parametrize(
    "text, message",
    [
        ('[{"image": "a.png"', "x.json, line 1: not valid JSON"),
        ('{"image": "a.png"}', "x.json: expected a list of entries as in LLaVA-Pretrain, got dict"),
        ("[" * 200_000, "x.json, line 1: nested too deeply"),
        ('[{"image": "a.png", "conversations": []}]', "x.json, entry 0: conversations has no turn from gpt"),
    ],
)
def test_errors_in_json(photos, text, message):
    (photos / "x.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_source(SourceArguments(str(photos / "x.json")))


CAFE = {
    "x.csv": "image,caption\na.png,A red.\nb.png,Un café.\n",
    "x.jsonl": '{"image": "a.png", "text": "A red."}\n\n{"image": "b.png", "text": "Un café."}\n',
    "x.json": '[{"image": "a.png", "text": "A red."},\n\n{"image": "b.png", "text": "Un café."}]\n',
}


@pytest.mark.parametrize("name", CAFE)
def test_text_files_with_and_without_byte_order_mark(photos, name):
    for encoding in ("utf-8", "utf-8-sig"):
        (photos / name).write_text(CAFE[name], encoding=encoding)
        assert load_pairs(SourceArguments(str(photos / name)))["captions"][:] == [["A red."], ["Un café."]]


@pytest.mark.parametrize("name", CAFE)
@pytest.mark.parametrize("encoding, line", [("latin-1", 3), ("utf-16", 1), ("utf-16-le", 1)])
def test_text_files_that_are_not_utf8(photos, name, encoding, line):
    (photos / name).write_text(CAFE[name], encoding=encoding)
    with pytest.raises(DataError, match=f"{name}, line {line}: not UTF-8; save it as UTF-8"):
        read_source(SourceArguments(str(photos / name)))
    (photos / name).write_text(CAFE[name].replace("é", "e"), encoding=encoding)
    if encoding != "latin-1":
        with pytest.raises(DataError, match=f"{name}, line 1: not UTF-8; save it as UTF-8"):
            read_source(SourceArguments(str(photos / name)))


def test_sidecar_texts_that_are_not_utf8(photos):
    for name in COLOURS:
        (photos / name).with_suffix(".txt").write_text("Un café.", encoding="utf-8-sig")
    assert load_pairs(SourceArguments(str(photos)))["captions"][0] == ["Un café."]
    (photos / "b.txt").write_text("A red.\nUn café.", encoding="latin-1")
    with pytest.raises(DataError, match="b.txt, line 2: not UTF-8; save it as UTF-8"):
        read_source(SourceArguments(str(photos)))


@pytest.mark.parametrize(
    "columns, arguments, message",
    [
        ({"image": [b"x"], "words": ["A"]}, {}, "x.parquet: which column is the caption.*found: image, words"),
        ({"image": [3], "text": ["A"]}, {}, r"x.parquet: image is Value\('int64'\), not images"),
        ({"image": [b"x"], "text": [3]}, {}, "x.parquet, row 0: the caption is 3, not text"),
        ({"image": [b"x", b"y"], "text": ["A", ""]}, {}, "x.parquet, row 1: the caption is empty"),
        ({"image": [b"x", b"y"], "text": ["A", "B"], "id": [1, 1]}, {}, "x.parquet, row 1: id '1' was used in .*row 0"),
        ({"image": [b"x"], "text": ["A"]}, {"id_column": "key"}, "no column 'key', which id_column asks for"),
        ({"image": [], "text": []}, {}, "x.parquet has no rows"),
    ],
)
def test_errors_in_parquet(tmp_path, columns, arguments, message):
    with pytest.raises(DataError, match=message):
        read_source(SourceArguments(write_parquet(tmp_path / "x.parquet", columns), **arguments))


def test_parquet_cut_off(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", {"image": [png("red")], "text": ["A"]})
    (tmp_path / "x.parquet").write_bytes((tmp_path / "x.parquet").read_bytes()[:-20])
    with pytest.raises(DataError, match="x.parquet: not a readable parquet file"):
        read_source(SourceArguments(path))


def test_folders_that_are_no_source(tmp_path, photos):
    with pytest.raises(DataError, match="photos has 3 images and no captions: expected metadata.csv"):
        read_source(SourceArguments(str(photos)))
    (photos / "metadata.csv").touch()
    (photos / "metadata.jsonl").touch()
    with pytest.raises(DataError, match="has both metadata.csv and metadata.jsonl"):
        read_source(SourceArguments(str(photos)))


@pytest.mark.parametrize("path", ["none.csv", "none.parquet", "./none", "/a/b/c", "a/b/c"])
def test_paths_that_do_not_exist(path):
    with pytest.raises(DataError, match="no such file or folder"):
        read_source(SourceArguments(path))


def test_unknown_type_of_file(tmp_path):
    (tmp_path / "x.tsv").touch()
    with pytest.raises(DataError, match="x.tsv: unknown type of file; use .parquet"):
        read_source(SourceArguments(str(tmp_path / "x.tsv")))
