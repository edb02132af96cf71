"""Pages of documentation as tests see them: their fenced blocks, the commands in these, headings and links."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")),
]
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_CODE_LINK = re.compile(r"\[`([^`]+)`\]\(([^)\s#]+)#L(\d+)\)")
_LINK = re.compile(r"\]\(([^)\s]+)\)")


@dataclass
class Block:
    """A fenced block: where it stands, its language and text, and the file that the line before it names, if any."""

    page: str
    line: int
    language: str
    text: str
    file: str | None

    def __str__(self):
        return f"{self.page}, line {self.line}"

    def commands(self):
        """Each command of a bash block as its words, without comments and the assignments before it (`NAME=value`)."""
        for line in self.text.replace("\\\n", " ").splitlines():
            words, lexer = [], shlex.shlex(line, posix=True, punctuation_chars="|&;")
            lexer.whitespace_split = True
            for word in [*lexer, "&&"]:
                if set(word) <= set("|&;"):
                    while words and re.match(r"[A-Z_]+=", words[0]):
                        words.pop(0)
                    if words:
                        yield words
                    words = []
                else:
                    words.append(word)


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page):
    """The blocks of a page in order. A file is named in code at the end of the line before: "... `queries.jsonl`:"."""
    text, found = read(page), []
    for match in _FENCE.finditer(text):
        before = text[: match.start()].rstrip().rpartition("\n")[2]
        named = re.search(r"`([\w./-]+\.\w+)`(?:, beside `[^`]+`)?:$", before)
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(page, line, match[2], match[3], named and named[1]))
    return found


def prose(page):
    """A page without its fenced blocks."""
    return _FENCE.sub("", read(page))


def anchors(path):
    """What GitHub calls the headings of a markdown file."""
    text = _FENCE.sub("", path.read_text(encoding="utf-8"))
    slugs = [
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", text, re.M)
    ]
    return {slug if not slugs[:n].count(slug) else f"{slug}-{slugs[:n].count(slug)}" for n, slug in enumerate(slugs)}


def broken_links(page):
    """Relative links of a page that lead nowhere; those to a line (`#L7`) are `lost_code`'s."""
    lost = []
    for link in _LINK.findall(prose(page)):
        name, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        path = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        is_line = re.fullmatch(r"L\d+", anchor)
        if not path.exists() or (anchor and not is_line and anchor not in anchors(path)):
            lost.append(link)
        if is_line and link not in {f"{file}#L{line}" for _, file, line in _CODE_LINK.findall(read(page))}:
            lost.append(f"{link}: a link to a line has the code that stands there as its text")
    return lost


def lost_code(page):
    """Links [`code`](file#L7) of a page whose line 7 does not hold the code: of a name, does not define it."""
    lost = []
    for code, file, line in _CODE_LINK.findall(read(page)):
        lines = ((ROOT / page).parent / file).read_text(encoding="utf-8").splitlines()
        if not (0 < int(line) <= len(lines) and _holds(lines[int(line) - 1], code)):
            lost.append(f"{file}#L{line} does not hold {code}")
    return lost


def with_code_found(page):
    """The text of a page whose links to code are turned to the nearest line that holds it.

    Raises:
        ValueError: no line does.
    """

    def turned(match):
        code, file, line = match.groups()
        lines = ((ROOT / page).parent / file).read_text(encoding="utf-8").splitlines()
        places = [number for number, text in enumerate(lines, start=1) if _holds(text, code)]
        if not places:
            raise ValueError(f"{page}: nothing in {file} holds {code}")
        return f"[`{code}`]({file}#L{min(places, key=lambda number: abs(number - int(line)))})"

    return _CODE_LINK.sub(turned, read(page))


def _holds(line, code):
    if re.fullmatch(r"\w+", code):
        return re.match(rf" *(?:(?:def|class) {code}\b|{code} = )", line) is not None
    return code in line
