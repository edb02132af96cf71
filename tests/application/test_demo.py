"""The page of gcl demo works over HTTP, for programs, and in a browser, for people."""

import importlib.util
import re
import shutil
import sys
from html import unescape

import httpx
import pytest

from tests.support.colours import COLOURS, NASTY, ColourModel, colour_models, colour_pairs, picture
from tests.support.training_runs import write_parquet
from universal_gcl import cli
from universal_gcl.application.gallery import Gallery
from universal_gcl.application.gallery_folder import write_gallery

pytest.importorskip("gradio", reason='the page needs gradio: pip install "universal-gcl[demo]"')
from gradio_client import Client, handle_file

from universal_gcl.application.demo import SHOWN, build_app, encoder_of, launch

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# no sandbox, as tests may run as root; nothing asks anything of the network
BROWSER = (
    "--no-sandbox --headless --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason="needs a chromium in PATH (Debian: apt-get install chromium) and pip install playwright",
)
THREE = ["image", "text", "image+text"]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The page with the gallery of colours. The gap between modalities is small in GCL and large in its base."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        models = colour_models(GCL=0.1, base=3.0)
        gallery = write_gallery(colour_pairs(), models, tmp_path_factory.mktemp("gallery"), name="colours")
        app = build_app(gallery, {loaded.label: encoder_of(loaded.model, None) for loaded in models})
        yield launch(app, server_name="127.0.0.1")
        app.close()


@pytest.fixture(scope="module")
def search(address):
    client = Client(address, verbose=False)
    return lambda *values: client.predict(*values, api_name="/search")


def columns(page):
    """The columns of a page: label of the model → modality and text of each hit."""
    found = {}
    for label, column in re.findall(r'<section aria-label="(.*?)">(.*?)</section>', page):
        cards = re.findall(r'<li data-modality="(.*?)">(.*?)<footer>', column)
        texts = [re.search(r'(?:<p>|alt=")(.*?)(?:</p>|">)', card)[1] for _, card in cards]
        found[label] = [(modality, unescape(text)) for (modality, _), text in zip(cards, texts)]
    return found


@pytest.fixture
def files(tmp_path):
    (tmp_path / "blue.jpg").write_bytes(picture("blue"))
    (tmp_path / "broken.jpg").write_bytes(picture("blue")[:200])
    (tmp_path / "notes.png").write_bytes(b"no picture at all")
    return tmp_path


def test_a_text_finds_what_it_names(search):
    found = columns(search("red", None, "side by side", THREE))
    assert list(found) == ["GCL", "base"]
    assert {modality for modality, text in found["GCL"][:3] if text == "red"} == set(THREE)
    assert [modality for modality, _ in found["base"][: len(COLOURS)]] == ["text"] * len(COLOURS)
    assert [len(hits) for hits in found.values()] == [SHOWN, SHOWN]


def test_a_picture_and_both(search, files):
    upload = handle_file(files / "blue.jpg")
    assert columns(search("", upload, "GCL", THREE))["GCL"][0] == ("image", "blue")
    both = columns(search("blue", upload, "side by side", THREE))
    assert both["GCL"][0] == both["base"][0] == ("image+text", "blue")


def test_what_is_searched(search):
    page = search("green", None, "base", ["image", "image+text"])
    found = columns(page)
    assert list(found) == ["base"] and {modality for modality, _ in found["base"]} == {"image", "image+text"}
    assert "first 12: 6 images, 6 image + text<" in page
    assert "first 6: 6 texts<" in search("green", None, "GCL", ["text"])


def test_captions_are_no_markup(search):
    page = search("magenta", None, "GCL", ["text"])
    assert columns(page)["GCL"][0] == ("text", f"magenta {NASTY}") and "<b onclick" not in page


@pytest.mark.parametrize(
    "text, file, kinds, message",
    [
        (" ", None, THREE, "Type a text, upload a picture"),
        ("red", None, [], "Choose at least one kind"),
        ("", "notes.png", THREE, "notes.png: not a readable image"),
        ("red", "broken.jpg", THREE, "broken.jpg: not a readable image"),
    ],
)
def test_errors_are_messages(search, files, text, file, kinds, message):
    page = search(text, file and handle_file(files / file), "side by side", kinds)
    assert 'role="alert"' in page and message in page and str(files) not in page and "gradio" not in page


def test_files_of_the_machine_are_out_of_reach(address, files):
    """Asks over HTTP, because the client would upload the file."""
    file = {"path": str(files / "blue.jpg"), "meta": {"_type": "gradio.FileData"}}
    asked = httpx.post(f"{address}gradio_api/call/search", json={"data": ["", file, "GCL", THREE]}).json()
    answer = httpx.get(f"{address}gradio_api/call/search/{asked['event_id']}").text
    assert "event: error" in answer and "gcl-columns" not in answer


def test_one_model_needs_no_switch(tmp_path):
    models = colour_models(GCL=0.1)
    gallery = write_gallery(colour_pairs(), models, tmp_path, name="colours")
    app = build_app(gallery, {"GCL": encoder_of(ColourModel(0.1), None)})
    (switch,) = [block for block in app.blocks.values() if block.elem_id == "gcl-view"]
    assert not switch.visible
    assert "Compare" not in str(app.config) and "org/GCL" in str(app.config)


def test_the_command(clip_folder, tmp_path, monkeypatch, capsys):
    def ended(app):
        app.close()

    monkeypatch.setattr("gradio.Blocks.block_thread", ended)
    data = write_parquet(tmp_path / "pairs.parquet", 6)
    arguments = ("demo", clip_folder, data, "--base", clip_folder, "--limit", 5, "--out", tmp_path / "out")
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["gcl", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 0
        printed = capsys.readouterr()
        assert re.search(r"^http://127\.0\.0\.1:\d+/ ", printed.out, re.M)
    assert "embed" not in printed.err  # the second time
    gallery = Gallery(tmp_path / "out" / "pairs.parquet-5")
    assert (len(gallery), gallery.name) == (5, "pairs.parquet")


@needs_browser
def test_in_a_browser(address, files):
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=BROWSER)
        page = browser.new_page(viewport={"width": 390, "height": 844})
        asked, errors = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        hits = page.locator("#gcl-results li")

        text = page.get_by_role("textbox", name="Text", exact=True)
        text.fill("red")
        text.press("Enter")
        expect(hits).to_have_count(2 * SHOWN)
        gcl, base = (page.locator(f'#gcl-results section[aria-label="{label}"]') for label in ("GCL", "base"))
        assert {gcl.locator("li").nth(place).get_attribute("data-modality") for place in range(3)} == set(THREE)
        expect(gcl.locator("li").nth(0)).to_contain_text("red")
        expect(base.get_by_text("first 12: 3 images, 6 texts, 3 image + text")).to_be_visible()
        assert (
            page.evaluate("document.documentElement.scrollWidth") <= 390
        )  # nothing is wider than the screen of a phone

        page.get_by_role("radio", name="base").check()
        expect(hits).to_have_count(SHOWN)
        page.get_by_role("radio", name="GCL").check()
        expect(gcl).to_be_visible()
        page.get_by_role("checkbox", name="text", exact=True).uncheck()
        expect(page.get_by_text("first 12: 6 images, 6 image + text")).to_be_visible()

        text.fill("")
        page.set_input_files("input[type=file]", files / "blue.jpg")
        expect(page.get_by_alt_text("the picture of the query")).to_be_visible()
        page.get_by_role("button", name="Search", exact=True).click()
        expect(hits.nth(0).get_by_role("img")).to_have_attribute("alt", "blue")
        assert hits.nth(0).get_by_role("img").evaluate("image => image.naturalWidth") > 0
        expect(hits.nth(0)).to_have_attribute("data-modality", "image")

        text.fill("magenta")
        page.get_by_role("checkbox", name="text", exact=True).check()
        page.get_by_role("button", name="Remove Image").click()
        text.press("Enter")
        expect(hits.nth(0).locator("p")).to_have_text(f"magenta {NASTY}")

        page.get_by_role("checkbox", name="image", exact=True).uncheck()
        page.set_input_files("input[type=file]", files / "notes.png")
        page.get_by_role("button", name="Search", exact=True).click()
        expect(page.get_by_role("alert")).to_contain_text("notes.png: not a readable image")
        browser.close()
    assert asked and all(url.startswith((address, "data:", "blob:")) for url in asked)
    assert not errors
