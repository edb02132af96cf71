"""For every fault in a source of pairs, there is an error message that names the place and the remedy."""

import logging

import datasets
import pytest

from tests.support.photo_sources import COLOURS, ROWS, THREE, as_dict, hub_table, png, write_csv, write_parquet
from universal_gcl.sources.arguments import SourceArguments
from universal_gcl.sources.pairs import DataError, load_pairs, read_source

pytestmark = pytest.mark.usefixtures("own_cache")


def test_hub_errors(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'me/none' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        DataError,
        match=r"me/none: there is no such file or folder in .* from the Hub failed \(split train\): .* doesn't exist",
    ):
        read_source(SourceArguments("me/none"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: hub_table(image=["a.png"]))
    with pytest.raises(DataError, match="me/paths: the column image has paths, not images; set image_root"):
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
            "x.csv, line 2: no column has a known name for the image .*: picture, cap.*Set im",
        ),
        (
            [["image", "word"], ["a.png", "A"]],
            {},
            "x.csv, line 2: no column has a known name for the caption .*Set caption_column",
        ),
        (ROWS, {"caption_column": "fr"}, "no column 'fr', but caption_column names it. Columns: file_name, caption"),
        (ROWS, {"id_column": "key"}, "no column 'key', but id_column names it"),
        ([ROWS[0], ["a.png", "  "]], {}, "x.csv, line 2: the caption is empty"),
        ([ROWS[0], ["a.png"]], {}, "x.csv, line 2: the caption is empty"),
        ([ROWS[0], ["a.png", "A", "B"]], {}, "x.csv, line 2: the row has more fields than the header"),
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
            "x.csv, line 3: the id '1' is already used in .*x.csv, line 2,",
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
        ("[1]\n", "x.jsonl, line 1: expected an object with an image and captions, got a list"),
        (
            '{"image": "a.png", "text": "A"}\n\n{"image": "b.png"}',
            "x.jsonl, line 3: there is no 'text', which the rows before have",
        ),
        ('{"image": "a.png", "text": 3}', "x.jsonl, line 1: the caption is 3, not a text"),
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
        ('\n{"image": "a.png", "text": ' + "[" * 200_000, "x.jsonl, line 2: the JSON is nested too deeply"),
        ('{"image": "a.png", "text": "A", "id": ' + "1" * 5000 + "}", "x.jsonl, line 1: the JSON can't be read"),
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
        ('{"image": "a.png"}', "x.json: expected a list of entries, as in LLaVA-Pretrain, got a dict"),
        ("[" * 200_000, "x.json, line 1: the JSON is nested too deeply"),
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
        (
            {"image": [b"x"], "words": ["A"]},
            {},
            "x.parquet: no column has a known name for the caption .*: image, words",
        ),
        ({"image": [3], "text": ["A"]}, {}, r"x.parquet: the column image is Value\('int64'\), not images"),
        ({"image": [b"x"], "text": [3]}, {}, "x.parquet, row 0: the caption is 3, not a text"),
        ({"image": [b"x", b"y"], "text": ["A", ""]}, {}, "x.parquet, row 1: the caption is empty"),
        (
            {"image": [b"x", b"y"], "text": ["A", "B"], "id": [1, 1]},
            {},
            "x.parquet, row 1: the id '1' is already used in .*row 0",
        ),
        ({"image": [b"x"], "text": ["A"]}, {"id_column": "key"}, "no column 'key', but id_column names it"),
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
    with pytest.raises(DataError, match="photos has 3 images and no captions: add a metadata.csv"):
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
