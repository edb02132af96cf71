"""A gallery has each pair as three candidates, finds the nearest ones, and is written only once."""

import json

import pytest
import torch
from PIL import Image

from modeling_gcl import ImageError, modalities
from tests.support.colours import COLOURS, colour_models, colour_pairs, picture
from universal_gcl.application.gallery import MODALITIES, NAMES, Gallery
from universal_gcl.application.gallery_folder import PICTURE_SIZE, write_gallery


def found(gallery, label, query, k, modalities=MODALITIES):
    return [(hit.entry, hit.modality) for hit in gallery.search(label, query, k, modalities)]


def test_the_nearest_of_all_modalities(tmp_path):
    models = colour_models(GCL=0.1, base=3.0)
    gallery = write_gallery(colour_pairs(), models, tmp_path, name="colours")
    for number, colour in enumerate(COLOURS):
        close, apart = (loaded.model.encode([{"text": colour}])[0] for loaded in models)
        assert found(gallery, "GCL", close, 3)[0] == (number, "text")
        assert {*found(gallery, "GCL", close, 3)} == {(number, modality) for modality in MODALITIES}
        assert {modality for _, modality in found(gallery, "base", apart, len(COLOURS))} == {"text"}
        assert found(gallery, "base", apart, 1, ["image"]) == [(number, "image")]
        assert {*found(gallery, "GCL", close, 99, ["image+text", "text"])} == {
            (entry, modality) for entry in range(len(COLOURS)) for modality in ("text", "image+text")
        }
        best = gallery.search("GCL", close, 1)[0]
        assert best.score == pytest.approx(1, abs=1e-3)  # float16


def test_the_modalities_are_those_of_the_model():
    """A Space can't import modeling_gcl.modalities, so the gallery has a table of its own."""
    assert [singular for singular, _ in NAMES.values()] == [*modalities.IN_WORDS.values()]
    assert [name.replace("+", ",") for name in MODALITIES] == [*modalities.IN_DATA.values()]


def test_a_second_call_embeds_nothing(tmp_path):
    models = colour_models(GCL=0.1)
    write_gallery(colour_pairs(), models, tmp_path, name="colours")
    rows, file = models[0].model.rows, Gallery(tmp_path).picture(0)
    assert rows == 3 * len(COLOURS)
    Image.new("RGB", (8, 8)).save(file)  # would be replaced if the pictures were written again
    write_gallery(colour_pairs(), models, tmp_path, name="colours")
    assert models[0].model.rows == rows and Image.open(file).size == (8, 8)
    other = colour_pairs(["green", *[colour for colour in COLOURS if colour != "green"]])
    with pytest.raises(ValueError, match="holds embeddings of other rows"):
        write_gallery(other, models, tmp_path, name="colours")
    gallery = write_gallery(other, models, tmp_path, name="colours", stores=tmp_path / "others")
    assert Image.open(file).size != (8, 8) and gallery.entries[0] == {"id": "green.jpg", "caption": "green"}


def test_small_pictures_do_not_tell_where_they_were_taken(tmp_path):
    exif = Image.Exif()
    exif.get_ifd(0x8825)[1] = "N"
    exif[0x0112] = 6  # the photo is rotated
    pairs = colour_pairs(["red"])
    row = {"bytes": picture("red", exif=exif.tobytes()), "path": None}
    pairs = pairs.remove_columns("image").add_column("image", [row])
    assert Image.open(write_gallery(pairs, colour_models(GCL=0.1), tmp_path, name="a").picture(0)).getexif() == {}
    width, height = Image.open(Gallery(tmp_path).picture(0)).size
    assert (width, height) == (pytest.approx(200 * PICTURE_SIZE / 300, abs=1), PICTURE_SIZE)


def test_bad_input_is_named(tmp_path):
    pairs = colour_pairs(["red", "blue"])
    images = [pairs[0]["image"], {"bytes": b"no image", "path": None}]
    with pytest.raises(ImageError, match="blue.jpg"):
        broken = pairs.remove_columns("image").add_column("image", images)
        write_gallery(broken, colour_models(GCL=0.1), tmp_path / "broken", name="a")
    with pytest.raises(FileNotFoundError, match="holds no gallery"):
        Gallery(tmp_path / "broken")
    write_gallery(pairs, colour_models(GCL=0.1), tmp_path / "cut", name="a")
    file = tmp_path / "cut" / "gallery.json"
    described = json.loads(file.read_text())
    file.write_text(json.dumps(described | {"entries": described["entries"][:1]}))
    with pytest.raises(ValueError, match="does not hold the embeddings of the 1 entries"):
        Gallery(tmp_path / "cut")


def test_a_query_of_another_model(tmp_path):
    gallery = write_gallery(colour_pairs(), colour_models(GCL=0.1), tmp_path, name="a")
    with pytest.raises(ValueError, match="embed both with one model"):
        gallery.search("GCL", torch.ones(5), 1)
