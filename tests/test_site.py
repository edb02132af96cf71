"""The site of the docs, on a small repository: what is rendered, and what ends the build. `make site` builds ours."""

import re

import pytest

from docs.site.build import Site, SiteError, check, without_inherited

README = """# A project

[method](docs/method.md#the-loss), [a line](code/loss.py#L2), [a folder](code/), ![picture](docs/plot.png),
[elsewhere](https://example.com/x)

## Twice

## Twice

`universal_gcl.retrieval.run.Run.load` and [again](#twice-1)
"""
METHOD = """# Method

## The loss

With $`s = 1/\\tau`$, a `$` and

```math
L = \\frac{1}{N} \\sum_j \\log 2
```

| symbol | code |
|---|---|
| $`e_i^j`$ | [`loss`](../code/loss.py#L1) |

```python
x = 1
```
"""


@pytest.fixture
def root(tmp_path):
    for name, text in {
        "README.md": README, "docs/method.md": METHOD, "docs/plot.png": "", "code/loss.py": "def loss():\n    pass\n",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def build(root):
    Site(root, root / "site", {"Use": {"README.md": "Start"}}).build()
    (root / "site" / "api").mkdir()
    (root / "site" / "api" / "index.html").write_text("<h1>API</h1>")  # pdoc's
    check(root / "site")
    return {path.relative_to(root / "site").as_posix(): path.read_text() for path in root.glob("site/**/*.html")}


def test_pages_and_what_they_link_to(root):
    pages = build(root)
    assert set(pages) == {"index.html", "docs/method.html", "code.html", "code/loss.py.html", "api/index.html"}
    assert (root / "site" / "docs" / "plot.png").is_file()
    start, method = pages["index.html"], pages["docs/method.html"]
    assert 'href="docs/method.html#the-loss"' in start and 'href="https://example.com/x"' in start
    assert 'id="twice"' in start and 'id="twice-1"' in start and "<title>A project</title>" in start
    assert 'href="../code/loss.py.html#L1"' in method and 'id="L2"' in pages["code/loss.py.html"]
    assert '<a href="method.html" aria-current="page">Method</a>' in method  # a page that is not named
    assert len(re.findall("<math", method)) == 3 and "<code>$</code>" in method and "$`" not in method
    assert "<table>" in method and '<div class="code">' in method


@pytest.mark.parametrize(
    "text, message",
    [
        ("[x](docs/none.md)", "README.md: the link docs/none.md leads nowhere"),
        ("[x](../outside.md)", "README.md: the link ../outside.md leads nowhere"),
        ("[x](docs/method.md#the-los)", "index.html: the link docs/method.html#the-los leads nowhere"),
        ("[x](code/loss.py#L7)", "index.html: the link code/loss.py.html#L7 leads nowhere"),
        ("`universal_gcl.retrieval.run.Runn`", "index.html: there is no universal_gcl.retrieval.run.Runn"),
        ("`universal_gcl.retrieval.runn`", "index.html: there is no universal_gcl.retrieval.runn"),
    ],
)
def test_what_leads_nowhere_ends_the_build(root, text, message):
    (root.parent / "outside.md").write_text("# Outside\n")
    (root / "README.md").write_text(f"# A project\n\n{text}\n")
    with pytest.raises(SiteError, match=re.escape(message)):
        build(root)


def test_members_inherited_from_other_packages_are_not_linked():
    html = '<div id="Model"><div id="Model.own"></div><a href="#Model.config">config</a><a href="#Model.own">own</a>'
    assert without_inherited(html).endswith('</div>config<a href="#Model.own">own</a>')
    assert without_inherited('<a href="#lost">lost</a>') == '<a href="#lost">lost</a>'
