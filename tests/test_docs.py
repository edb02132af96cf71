"""Every block of README and docs/ is executed, or parsed as far as it can be here; every link leads somewhere.

Blocks of a page run in its order, in a folder where tiny stand-ins bear the names that the page uses (a folder
`openai/clip-vit-base-patch32` is what transformers takes for that id). What can't run here, or is run by another test,
is named in `ONLY_PARSED` and `ELSEWHERE`: anything else runs, and a block or command of an unknown kind fails.

`python -m tests.test_docs` turns links to lines of code to where the code is now.
"""

import configparser
import contextlib
import re
import shutil
import sys
from pathlib import Path

import datasets
import pytest
from accelerate.commands.launch import launch_command_parser
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from typer.main import get_command

from tests.support import doc_pages
from tests.support.backbones import (
    IMAGE_SIZE,
    random_image,
    tiny_encoder,
    tiny_model,
    tiny_processor,
    word_tokenizer,
)
from tests.support.doc_pages import PAGES, ROOT, blocks, broken_links, lost_code
from tests.support.training_runs import write_parquet
from universal_gcl import cli, train
from universal_gcl.publishing.model_folder import save_model_folder
from universal_gcl.sources.pairs import read_source
from universal_gcl.training.recipe import parse_recipe

# pages whose blocks another test runs
ELSEWHERE = {"docs/use-a-model.md": "tests/publishing/test_doors.py, in a process without this package"}
# beginnings of commands of which options are parsed, and no more
ONLY_PARSED = {
    "gcl convert vista": "its weights are not public here; tests/conversion/test_vista.py converts such a file",
    "gcl convert open-clip": "likewise; tests/conversion/test_open_clip.py",
    "gcl convert mbeir": "tests/conversion/test_mbeir_folder.py",
    "gcl evaluate mbeir": "its data; tests/evaluation/mbeir/test_mbeir.py",
    "gcl evaluate mmeb": "its data; tests/evaluation/mmeb/test_mmeb_command.py",
    "gcl evaluate covr": "its data; tests/evaluation/covr/test_covr.py",
    "gcl evaluate mixbench": "its data; tests/evaluation/mixbench/test_mixbench.py",
    "gcl evaluate mteb": "its data; tests/evaluation/mteb/test_mteb_model.py",
    "gcl evaluate compare": "results of the above; tests/evaluation/test_compare.py",
    "gcl search queries/ pool/": "README's queries are the reader's; those of docs/fine-tune.md are searched",
    "gcl demo": "serves until it is ended; tests/application/test_demo.py",
    "gcl convert space": "a model and data of the Hub; tests/application/test_space.py",
    "gcl card outputs/my_model": "results of a benchmark; tests/publishing/test_card_benchmarks.py",
    "gcl push": "needs a Hub; tests/publishing/test_push.py",
    "accelerate launch": "a training takes seconds: those of TRAINED run, the recipes and options of others are parsed",
    "gcl train": "likewise",
}
# commands that train, by page
TRAINED = {
    "docs/fine-tune.md": (
        "gcl train finetune --train my_photos --eval my_other_photos",
        "gcl train finetune --train my_photos --peft.r 16 --learning_rate 1e-3 --output_dir outputs/lora",
    )
}
# programs that are not ours, and why they don't run here
OUTSIDE = {"hf": "the Hub", "curl": "the network", "unzip": "what was downloaded", "tar": "likewise", "cat": "likewise"}
SILENT = {"cd"}
SCRIPTS_WRITTEN = {"space/app.py": "gcl convert space; tests/application/test_space.py runs it"}
HUB_DATA = {"org/photos": ("photo", "description")}
PHOTOS = ("dog.jpg", "cat.jpg", "holiday/beach.jpg", "holiday/hut.jpg", "scans/boat.jpg", "images/00453/004539375.jpg")
DATA_FILES = {".csv", ".jsonl", ".json", ".txt"}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory, clip_folder):
    """A folder with all that pages name, in small."""
    folder = tmp_path_factory.mktemp("stand-ins")
    shutil.copytree(clip_folder, folder / "openai/clip-vit-base-patch32")
    towers = tiny_encoder("vision-text-dual-encoder")
    towers.vision_model.save_pretrained(folder / "google/vit-base-patch16-224")
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    ViTImageProcessorPil(size=side).save_pretrained(folder / "google/vit-base-patch16-224")
    towers.text_model.save_pretrained(folder / "google-bert/bert-base-uncased")
    word_tokenizer().save_pretrained(folder / "google-bert/bert-base-uncased")
    for name in ("MODEL", "outputs/quickstart/model"):
        save_model_folder(folder / name, tiny_model("clip"), tiny_processor("clip"))
    for name, number in {"my_photos": 130, "my_other_photos": 12, "photos": 3}.items():
        lines = ["file_name,caption"]
        for n in range(number):
            (folder / name).mkdir(exist_ok=True)
            random_image(n).save(folder / name / f"{n}.jpg")
            lines += [f"{n}.jpg,a {colour} dog number {n}" for colour in ("red", "blue")]
        (folder / name / "metadata.csv").write_text("\n".join(lines))
    for n, name in enumerate(PHOTOS):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        random_image(n).save(folder / name)
    (folder / "hub_configs").symlink_to(ROOT / "hub_configs")
    (folder / "results").symlink_to(ROOT / "results")
    return folder


@pytest.fixture
def page(request, stand_ins, tmp_path, monkeypatch):
    """A run of a page in a folder of its own; the Hub's data sets are tiny."""
    shutil.copytree(stand_ins, tmp_path / "user", symlinks=True)
    monkeypatch.chdir(tmp_path / "user")

    def load_dataset(path, name=None, **kwargs):
        image, caption = HUB_DATA[path]
        table = datasets.Dataset.from_parquet(str(write_parquet(tmp_path / "hub.parquet", 4)))
        return table.rename_columns({"image": image, "captions": caption})

    monkeypatch.setattr("universal_gcl.sources.tables.datasets.load_dataset", load_dataset)
    return Page(request.param, monkeypatch)


class Page:
    """What executing a page needs to know from block to block."""

    def __init__(self, name, monkeypatch):
        self.name, self.monkeypatch = name, monkeypatch
        self.variables = {"__name__": "__main__"}

    def run(self, block):
        kinds = {"python": self.python, "bash": self.bash, "yaml": self.yaml, "math": self.math}
        if block.language in kinds:
            return kinds[block.language](block)
        if block.file and Path(block.file).suffix in DATA_FILES:
            return self.data(block)
        if block.language == "text" and block.text.partition("\n")[0].endswith("/"):
            return self.tree(block)
        raise AssertionError(f"nothing is known of a block of {block.language!r} that names no file")

    def python(self, block):
        exec(compile("\n" * block.line + block.text, block.page, "exec"), self.variables)

    def math(self, block):
        assert block.text.count("{") == block.text.count("}")

    def data(self, block):
        """A file of data; that what it means is right shows where the page uses it."""
        Path(block.file).write_text(block.text)
        rest = blocks(self.name)[blocks(self.name).index(block) + 1 :]
        named = re.compile(rf"\b{re.escape(block.file)}|\b{re.escape(str(Path(block.file).parent))}\b")
        assert any(named.search(later.text) for later in rest), f"{block.file} is never used"

    def tree(self, block):
        """What a folder is said to hold."""
        root, *names = (line.split()[0] for line in block.text.splitlines())
        for name in names:
            assert (Path(root) / name).exists(), name

    def yaml(self, block):
        """A recipe. Where the page shows data, its sources are there to be read."""
        Path("recipe.yaml").write_text(block.text)
        data = parse_recipe(["recipe.yaml", "--use_cpu"]).data
        if any(other.file for other in blocks(self.name)):
            for source in [*data.train, *([data.eval] if data.eval else [])]:
                assert read_source(source)[1].num_skipped == 0, source.path

    def bash(self, block):
        for words in block.commands():
            with naming(" ".join(words)):
                self.command(words)

    def command(self, words):
        if words[0] in ("gcl", "train.py"):
            self.ours(words)
        elif words[:2] == ["accelerate", "launch"]:
            self.launch(words)
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file() or words[1] in SCRIPTS_WRITTEN, "there is no such script"
            if words[1] == "train.py":
                self.ours(words[1:])
        elif words[:2] == ["pip", "install"]:
            check_extras(words)
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
        else:
            assert words[0] in OUTSIDE or words[0] in SILENT, "nothing is known of this command"

    def launch(self, words):
        if "…" in words:
            words = words[: words.index("…")]
        launched = launch_command_parser().parse_args(words[2:])
        assert launched.config_file is None or (ROOT / launched.config_file).is_file()
        program = Path(launched.training_script).name
        if launched.module:
            program = {"universal_gcl": "gcl", "universal_gcl.train": "train.py"}[launched.training_script]
        if launched.training_script_args or program == "gcl":
            self.ours([program, *launched.training_script_args])

    def ours(self, words):
        program, *arguments = words
        if words[:2] == ["gcl", "train"]:
            program, arguments = "train.py", words[2:]
        if program == "train.py":
            if " ".join(words) in TRAINED.get(self.name, ()):
                return train.main(arguments)
            return parse_recipe([*arguments, "--use_cpu", "--bf16", "false"])
        check_options(arguments)
        if not any(" ".join(words).startswith(beginning) for beginning in ONLY_PARSED):
            self.monkeypatch.setattr(sys, "argv", words)
            with pytest.raises(SystemExit) as stop:
                cli.main()
            assert stop.value.code == 0, stop.value.code


@contextlib.contextmanager
def naming(place):
    """Errors inside say where in the page it was."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise AssertionError(f"{place}: {error}") from error


def check_options(arguments):
    """Raise typer's error for arguments that `gcl` would refuse."""
    command, context = get_command(cli.app), None
    while hasattr(command, "commands"):
        context = command.make_context("gcl", [], parent=context, resilient_parsing=True)
        name, command, arguments = command.resolve_command(context, arguments)
    command.make_context(name, arguments, parent=context)


def check_extras(words):
    """What is installed from this repository has the extras named."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for extras in re.findall(r"(?:\.|universal-gcl)\[([\w,]+)\]", " ".join(words)):
        for extra in extras.split(","):
            assert extra in setup["options.extras_require"], extra


@pytest.mark.parametrize("page", [name for name in PAGES if name not in ELSEWHERE and blocks(name)], indirect=True)
def test_every_block(page):
    for block in blocks(page.name):
        with naming(str(block)):
            page.run(block)


def test_what_is_left_out_exists():
    commands = {
        page: [words for block in blocks(page) if block.language == "bash" for words in block.commands()]
        for page in PAGES
    }
    lines = {page: [" ".join(words) for words in of_page] for page, of_page in commands.items()}
    for beginning in ONLY_PARSED:
        assert any(line.startswith(beginning) for of_page in lines.values() for line in of_page), beginning
    for page, trained in TRAINED.items():
        assert set(trained) <= set(lines[page])
    assert set(ELSEWHERE) <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    assert not broken_links(page)
    assert not lost_code(page), "run python -m tests.test_docs"


if __name__ == "__main__":
    for name in PAGES:
        (ROOT / name).write_text(doc_pages.with_code_found(name), encoding="utf-8")
