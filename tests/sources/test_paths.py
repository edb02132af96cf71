"""The check that a path stays inside its root."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from universal_gcl.sources.checks import DataError
from universal_gcl.sources.paths import path_inside

ROOTS = ["/data/photos", "photos", ".", "..", "../photos", "/data/a/../photos", "/"]
roots = st.sampled_from(ROOTS)
names = st.lists(st.sampled_from(["a", "b.png", "é 1", ".", "..", "...", "..a", "", "C:"]), min_size=1, max_size=6)


def leaves(parts):
    """Whether the path, compared as text, ends outside the folder that it starts from."""
    depth = []
    for part in parts:
        if part == "..":
            if not depth or depth[-1] == "..":
                depth.append("..")
            else:
                depth.pop()
        elif part not in ("", "."):
            depth.append(part)
    return ".." in depth


@settings(deadline=None)
@given(roots.filter(lambda root: root != "/"), names, st.sampled_from("/\\"))
def test_relative_paths_are_inside_unless_their_parts_climb_out(root, parts, separator):
    name = "./" + separator.join(parts)
    if leaves(parts):
        with pytest.raises(DataError) as error:
            path_inside(Path(root), name, "x.csv, line 7", remedy="set image_root")
        assert str(error.value) == f"x.csv, line 7: {name} lies outside {Path(root)}; set image_root"
    else:
        path = path_inside(Path(root), name, "x.csv, line 7")
        below = path.relative_to(root)
        assert ".." not in below.parts
        assert os.path.abspath(path) == os.path.normpath(os.path.join(os.path.abspath(root), "/".join([".", *parts])))


@settings(deadline=None)
@given(roots, st.text(min_size=1))
def test_any_text_gives_a_path_below_the_root_or_a_data_error(root, name):
    try:
        path = path_inside(Path(root), name, "row 0")
    except DataError as error:
        assert str(error).startswith("row 0: ")
    else:
        assert ".." not in path.relative_to(root).parts
        assert Path(os.path.abspath(path)).is_relative_to(os.path.abspath(root))


@pytest.mark.parametrize(
    ("name", "below"),
    [
        ("a.png", "a.png"),
        ("sub/../a.png", "a.png"),
        ("./sub//a.png", "sub/a.png"),
        ("sub\\a.png", "sub/a.png"),
        ("..a/b...png", "..a/b...png"),
        ("/data/photos/a.png", "a.png"),
        ("/data/x/../photos/a.png", "a.png"),
        ("http:a.png", "http:a.png"),
    ],
)
def test_paths_inside(name, below):
    assert path_inside(Path("/data/photos"), name, "row 0") == Path("/data/photos", below)


@pytest.mark.parametrize(
    "name",
    [
        "..", "../a.png", "a/../../a.png", "/etc/passwd", "/data/photos2/a.png", "/data", "//host/a.png",
        "..\\a.png", "a\\..\\..\\b.png", "\\etc\\passwd", "\\\\host\\a.png", "C:\\photos\\a.png", "c:/a.png",
        "../photos2/a.png",
    ],
)  # fmt: skip
def test_paths_outside(name):
    with pytest.raises(DataError, match="^row 3: .* lies outside /data/photos; correct the path"):
        path_inside(Path("/data/photos"), name, "row 3")


@pytest.mark.parametrize("name", ["http://x/a.png", "HTTPS://x/a.png", "s3://bucket/a.png", "file:///a.png"])
def test_addresses(name):
    with pytest.raises(DataError, match=f"row 3: {name} is an address; download the file into /data/photos"):
        path_inside(Path("/data/photos"), name, "row 3")


def test_names_that_no_file_system_stores_as_utf_8():
    with pytest.raises(DataError, match="row 3: the path .* which is not a character"):
        path_inside(Path("/data/photos"), "\udc80.png", "row 3")


def test_a_file_whose_name_holds_a_backslash_or_a_colon(tmp_path):
    (tmp_path / "C:").mkdir()
    for name in ("sub\\a.png", "..\\a.png", "C:\\a.png", "C:/a.png"):
        (tmp_path / name).touch()
        assert path_inside(tmp_path, name, "row 0") == tmp_path / name


def test_links_inside_the_root_may_lead_elsewhere(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.png").touch()
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "elsewhere")
    assert path_inside(tmp_path / "root", "link/a.png", "row 0").is_file()
    # `..` is resolved as text, so the path stays inside. The system would follow the link first and end up elsewhere
    assert path_inside(tmp_path / "root", "link/../a.png", "row 0") == tmp_path / "root" / "a.png"
