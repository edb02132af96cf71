"""The text of `gcl train --help`, made from the docstrings of the argument classes."""

import inspect
import re
import textwrap

_GROUP = re.compile(r"^ {2,4}> (?!\[)(.+)$")
_FIELD = re.compile(r"^ {4}(\w+) ?\((.*)\):? *$")  # transformers forgets some of the colons


def field_docs(cls: type) -> dict[str, list[tuple[str, str, str]]]:
    """The fields that a docstring describes, as {group: [(name, type and default, description), ...]}.

    The docstring has the form of `transformers.TrainingArguments`: a group starts with `> Name`, a field with
    `name (type):`.
    """
    groups: dict[str, list[tuple[str, str, str]]] = {}
    group = "Other"
    for line in inspect.cleandoc(cls.__doc__ or "").splitlines():
        if match := _GROUP.match(line):
            group = match[1]
        elif match := _FIELD.match(line):
            groups.setdefault(group, []).append((match[1], match[2].replace("`", ""), ""))
        elif line.startswith(" " * 8) and groups.get(group):
            name, kind, text = groups[group][-1]
            groups[group][-1] = (name, kind, f"{text} {line.strip()}".strip())
        elif line and not line.startswith(" "):
            group = "Other"
    return groups


def format_help(sections: dict[str, type]) -> str:
    """All fields of all sections. A subclass's own fields come first, then the inherited ones that it keeps."""
    paragraphs = []
    for section, cls in sections.items():
        done: set[str] = set()
        for owner in cls.__mro__[:-1]:
            for group, fields in field_docs(owner).items():
                new = [entry for entry in fields if entry[0] not in done]
                done.update(name for name, _, _ in new)
                if new:
                    paragraphs.append(
                        f"{section}: {group}\n\n" + "\n".join(_format_field(section, *entry) for entry in new)
                    )
    return "\n\n".join(paragraphs)


def _format_field(section: str, name: str, kind: str, text: str) -> str:
    option = name if section == "source" else f"--{section}.{name}"
    description = textwrap.fill(text, 110, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return f"  {option}  ({kind})\n{description}"
