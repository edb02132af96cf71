"""README, docs/ and an API reference generated from docstrings, as one site of plain HTML in build/site.

    python -m docs.site.build

- pages are rendered by markdown-it, formulas become MathML, and linked source files become pages with numbered lines;
- the reference is made by pdoc, which imports the modules: all extras must be installed;
- a link that leads nowhere, or a dotted name of this package that does not exist, ends the build with an error.
"""

import importlib
import re
import shutil
import sys
import warnings
from html import escape, unescape
from html.parser import HTMLParser
from os.path import relpath
from pathlib import Path
from typing import Any

import jinja2
import pdoc
from latex2mathml.converter import convert as to_mathml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_by_name, get_lexer_for_filename
from pygments.util import ClassNotFound

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NAVIGATION = {  # group → page → its short title; pages of docs/ that are not named here join the last group
    "Use": {
        "README.md": "Start",
        "docs/fine-tune.md": "Fine-tune",
        "docs/use-a-model.md": "Use a model",
        "docs/demo.md": "Demo",
        "docs/faq.md": "FAQ",
    },
    "Understand": {
        "docs/method.md": "Method",
        "docs/models.md": "Models",
        "docs/recipes.md": "Recipes",
        "docs/benchmarks.md": "Benchmarks",
        "docs/performance.md": "Performance",
    },
    "Develop": {
        "docs/extend.md": "Extend it",
        "CONTRIBUTING.md": "Contributing",
        "CHANGELOG.md": "Changelog",
        "SECURITY.md": "Security",
    },
}
REFERENCE = (
    "modeling_gcl",
    *(
        f"universal_gcl.{room}"
        for room in ("sources", "retrieval", "evaluation", "training", "publishing", "conversion", "application")
    ),
    "!universal_gcl.*[.]commands?([.].*)?",  # the command line documents itself
)
IMAGES = {".png", ".jpg", ".svg"}
DOTTED_NAME = re.compile(r"(?:modeling_gcl|universal_gcl)(?:\.\w+)+")


class SiteError(Exception):
    """Links or names that lead nowhere, one a line."""


class Site:
    """
    The pages of a repository: those of the navigation and docs/, and every file that they link to.

    Args:
        root: the repository.
        out: folder of the site; replaced.
        navigation: group → page (path from the root) → short title.
    """

    def __init__(self, root: Path, out: Path, navigation: dict[str, dict[str, str]]) -> None:
        self.root, self.out = root.resolve(), out
        self.navigation = {group: dict(pages) for group, pages in navigation.items()}
        known = {page for pages in self.navigation.values() for page in pages}
        for path in sorted(self.root.glob("docs/*.md")):
            page = path.relative_to(self.root).as_posix()
            if page not in known:
                list(self.navigation.values())[-1][page] = path.stem.replace("-", " ").capitalize()
        self.queue = [page for pages in self.navigation.values() for page in pages if (self.root / page).is_file()]
        self.errors: list[str] = []
        self.template = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), autoescape=True).get_template(
            "page.html.jinja2"
        )

    def build(self) -> None:
        """Write every page, and every file that a page links to.

        Raises:
            SiteError: links of pages that lead nowhere.
        """
        shutil.rmtree(self.out, ignore_errors=True)
        for page in self.queue:  # grows while pages are rendered
            path, target = self.root / page, self.out / address(page)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix in IMAGES:
                shutil.copyfile(path, target)
            elif path.suffix == ".md":
                self.write(page, Markdown(self, page).render(path.read_text(encoding="utf-8")))
            elif path.is_dir():
                names = sorted(
                    f"{child.name}{'/' * child.is_dir()}" for child in path.iterdir() if child.name[0] != "."
                )
                items = "".join(f"<li><code>{escape(name)}</code></li>" for name in names)
                self.write(page, f"<h1>{escape(page)}/</h1><ul>{items}</ul>")
            else:
                code = highlighted(path.read_text(encoding="utf-8"), path.name, numbered=True)
                self.write(page, f"<h1>{escape(page)}</h1>{code}")
        shutil.copyfile(HERE / "site.css", self.out / "site.css")
        light, dark = (HtmlFormatter(style=style).get_style_defs(".code") for style in ("default", "github-dark"))
        (self.out / "code.css").write_text(f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n")
        if self.errors:
            raise SiteError("\n".join(self.errors))

    def write(self, page: str, body: str) -> None:
        """Put the body of a page into the template."""
        here = address(page)
        title = re.search(r"<h1[^>]*>(.*?)</h1>", body, re.DOTALL)
        html = self.template.render(
            title=unescape(re.sub(r"<[^>]+>", "", title[1])) if title else page,
            body=body,
            page=page,
            navigation=[
                (group, [(relative(here, address(other)), label, other == page) for other, label in pages.items()])
                for group, pages in self.navigation.items()
            ],
            base=relative(here, "."),
        )
        (self.out / here).write_text(html, encoding="utf-8")

    def link(self, page: str, href: str) -> str:
        """The address in the site of what a page links to; the file that it leads to becomes a page too."""
        name, _, anchor = href.partition("#")
        if re.match(r"[a-z]+:", href) or not name:
            return href
        path = ((self.root / page).parent / name).resolve()
        if not path.exists() or not path.is_relative_to(self.root):
            self.errors.append(f"{page}: the link {href} leads nowhere")
            return href
        if path.is_dir() and (path / "README.md").is_file():
            path /= "README.md"
        target = path.relative_to(self.root).as_posix()
        if target not in self.queue:
            self.queue.append(target)
        return relative(address(page), address(target)) + (f"#{anchor}" if anchor else "")


class Markdown:
    """A page as HTML: links that hold in the site, headings with GitHub's anchors, highlighted code, MathML."""

    def __init__(self, site: Site, page: str) -> None:
        self.site, self.page = site, page
        self.anchors: set[str] = set()
        self.markdown = MarkdownIt("commonmark", {"highlight": lambda code, name, _: highlighted(code, name)})
        self.markdown.enable("table")
        self.markdown.add_render_rule("fence", self.fence)

    def render(self, text: str) -> str:
        """The HTML of a page's markdown."""
        tokens = self.markdown.parse(text)
        for number, token in enumerate(tokens):
            if token.type == "heading_open":
                token.attrSet("id", self.anchor(tokens[number + 1]))
            if token.children:
                token.children = list(self.inline(token.children))
        html = self.markdown.renderer.render(tokens, self.markdown.options, {})
        return html.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")

    def anchor(self, heading: Token) -> str:
        """What GitHub makes of a heading; repeated ones get a number."""
        text = "".join(child.content for child in heading.children or [])
        slug = found = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        while found in self.anchors:
            found = f"{slug}-{int(found.removeprefix(slug)[1:] or 0) + 1}"
        self.anchors.add(found)
        return found

    def inline(self, children: list[Token]):
        """Tokens with links turned to the site, and `$`x`$` turned to MathML."""
        for number, token in enumerate(children):
            for attribute in ("href", "src"):
                if attribute in token.attrs:
                    token.attrSet(attribute, self.site.link(self.page, str(token.attrGet(attribute))))
            before = children[number - 1] if number else None
            after = children[number + 1] if number + 1 < len(children) else None
            if token.type == "code_inline" and before and after and before.content[-1:] == after.content[:1] == "$":
                before.content, after.content = before.content[:-1], after.content[1:]
                token = Token("html_inline", "", 0, content=mathml(token.content))
            yield token

    def fence(self, tokens: list[Token], index: int, options, env) -> str:
        """A fenced block."""
        token = tokens[index]
        if token.info == "math":
            return f'<div class="formula">{mathml(token.content.strip(), display="block")}</div>'
        return highlighted(token.content, token.info)


def mathml(latex: str, display: str = "inline") -> str:
    """A formula as MathML, with the thin space after names of functions that the converter leaves out."""
    return re.sub(r"(<mi>(?:log|exp)</mi>)(?=<m[^o])", r'\1<mspace width="0.17em"/>', to_mathml(latex, display=display))


def address(page: str) -> str:
    """Where a file of the repository lies in the site: markdown and README as pages, other text as `NAME.html`."""
    path = Path(page)
    if page == "README.md":
        return "index.html"
    if path.suffix in IMAGES:
        return page
    return str(path.with_suffix(".html")) if path.suffix == ".md" else f"{page}.html"


def relative(here: str, there: str) -> str:
    """The link from one address of the site to another."""
    return Path(relpath(there, Path(here).parent)).as_posix()


def highlighted(code: str, name: str, numbered: bool = False) -> str:
    """Code as HTML.

    Args:
        code: its text.
        name: the language, or the name of the file.
        numbered: whether lines have numbers and the anchors L1, L2, …
    """
    try:
        lexer = get_lexer_for_filename(name) if numbered else get_lexer_by_name(name or "text")
    except ClassNotFound:
        lexer = TextLexer()
    numbers = {"linenos": "inline", "lineanchors": "L", "anchorlinenos": True} if numbered else {}
    html = highlight(code, lexer, HtmlFormatter(cssclass="code", **numbers))
    return re.sub(r'((?:id|name|href)="#?L)-(\d+)"', r'\1\2"', html)


class _Links(HTMLParser):
    """What a page of HTML offers as anchors, where it links to, and the names in its code that link nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.code: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        self.links += [found[name] for name in ("href", "src") if found.get(name)]
        if tag in ("a", "code", "pre"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open and tag == self.open[-1]:
            self.open.pop()

    def handle_data(self, data):
        if self.open == ["code"]:
            self.code.append(data)


def check(out: Path) -> None:
    """Follow every link of the site, and look up the dotted names of this package in its text.

    Raises:
        SiteError: what leads nowhere.
    """
    pages = {}
    for path in out.rglob("*.html"):
        pages[path.resolve()] = parser = _Links()
        parser.feed(path.read_text(encoding="utf-8"))
    errors = []
    for path, parser in pages.items():
        for link in parser.links:
            name, _, anchor = link.partition("#")
            target = (path.parent / unescape(name)).resolve() if name else path
            if re.match(r"[a-z]+:", link):
                continue
            if not target.exists() or (anchor and target in pages and anchor not in pages[target].anchors):
                errors.append(f"{path.relative_to(out.resolve())}: the link {link} leads nowhere")
        for name in {name for text in parser.code for name in DOTTED_NAME.findall(text)}:
            if not exists(name):
                errors.append(f"{path.relative_to(out.resolve())}: there is no {name}")
    if errors:
        raise SiteError("\n".join(sorted(errors)))


def exists(name: str) -> bool:
    """Whether a dotted name is a module, a file of a package, or what a module or class holds (or annotates)."""
    parts = name.split(".")
    for number in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:number]))
        except ModuleNotFoundError:
            continue
        for place, part in enumerate(parts[number:], start=number):
            if not hasattr(found, part) and part not in getattr(found, "__annotations__", {}):
                return place == number and any(Path(folder, part).exists() for folder in getattr(found, "__path__", []))
            found = getattr(found, part, None)
        return True
    return False


def build_reference(out: Path) -> None:
    """The API reference, by pdoc.

    Raises:
        SiteError: modules that pdoc could not import or read.
    """
    pdoc.render.configure(docformat="google", template_directory=HERE, footer_text="universal-gcl")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pdoc.pdoc(*REFERENCE, output_directory=out)
    ours = [str(warning.message) for warning in caught if "/pdoc/" in warning.filename]
    if ours:
        raise SiteError("\n".join(ours))
    for path in out.rglob("*.html"):
        path.write_text(without_inherited(path.read_text(encoding="utf-8")), encoding="utf-8")


def without_inherited(html: str) -> str:
    """A page of pdoc without links to members that a class inherits from other packages, which pdoc doesn't show."""
    anchors = set(re.findall(r' id="([^"]+)"', html))

    def unlinked(match):
        owner = match[1].rpartition(".")[0]
        return match[2] if match[1] not in anchors and owner in anchors else match[0]

    return re.sub(r'<a href="#([\w.]+)">([^<]*)</a>', unlinked, html)


def main() -> None:
    """Build and check the site of this repository."""
    out = ROOT / "build" / "site"
    try:
        Site(ROOT, out, NAVIGATION).build()
        build_reference(out / "api")
        check(out)
    except SiteError as error:
        sys.exit(f"{error}\nThe site was not built.")
    print(f"{out.relative_to(ROOT)}/index.html")


if __name__ == "__main__":
    main()
