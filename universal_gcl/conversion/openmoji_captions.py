"""Makes four captions for each emoji, and chooses its split, from OpenMoji's metadata (`data/openmoji.json`).

The captions of an emoji say the same in different words, because the nine-way protocol uses each for another purpose:

0. the annotation: "grinning cat".
1. the annotation with some tags or its kind: "grinning cat, animal and mouth".
2. and 3. two disjoint subsets of the other tags, without the annotation: "cat face: smile", "emoji for grin and open".

If the metadata has no tags beyond the words of the annotation, captions 2 and 3 repeat the annotation ("rectangle
symbol showing black rectangle"). `caption_report` counts these.
"""

import hashlib
import re
from collections import Counter

TAGS_PER_CAPTION = 3
TEST_SHARE = 0.19
GENDER_WORDS = {"man", "men", "woman", "women", "person", "people", "male", "female"}

# phrases for subgroups whose identifier is not natural English, even with spaces instead of dashes
SUBGROUP_PHRASES = {
    "face-smiling": "smiling face",
    "face-affection": "affectionate face",
    "face-tongue": "face with tongue",
    "face-hand": "face with hand",
    "face-neutral-skeptical": "neutral or sceptical face",
    "face-sleepy": "sleepy face",
    "face-unwell": "unwell face",
    "face-hat": "face with hat",
    "face-glasses": "face with glasses",
    "face-concerned": "concerned face",
    "face-negative": "negative face",
    "face-costume": "face in costume",
    "hand-fingers-open": "hand with open fingers",
    "hand-fingers-partial": "hand with some fingers raised",
    "hand-single-finger": "hand with one finger",
    "hand-fingers-closed": "closed hand",
    "hand-prop": "hand holding something",
    "body-parts": "part of the body",
    "person-gesture": "person making a gesture",
    "person-role": "person at work",
    "person-fantasy": "fantasy figure",
    "person-activity": "person doing something",
    "person-sport": "person doing sports",
    "person-resting": "person resting",
    "person-symbol": "symbol of people",
    "animal-mammal": "mammal",
    "animal-bird": "bird",
    "animal-amphibian": "amphibian",
    "animal-reptile": "reptile",
    "animal-marine": "sea animal",
    "animal-bug": "small crawling animal",
    "plant-flower": "flower",
    "plant-other": "plant",
    "animals-nature": "nature",
    "food-fruit": "fruit",
    "food-vegetable": "vegetable",
    "food-prepared": "dish",
    "food-asian": "Asian dish",
    "food-sweet": "sweet food",
    "food-drink": "food or drink",
    "place-map": "map",
    "place-geographic": "landscape",
    "place-building": "building",
    "place-religious": "religious building",
    "place-other": "place",
    "travel-places": "travel",
    "transport-ground": "land vehicle",
    "transport-water": "water vehicle",
    "transport-air": "aircraft or air travel",
    "transport-sign": "transport sign",
    "sky-weather": "sky or weather",
    "award-medal": "award",
    "arts-crafts": "arts and crafts",
    "light-video": "light, film or video",
    "book-paper": "book or paper",
    "writing": "writing tool",
    "office": "office supplies",
    "medical": "medicine",
    "household": "household item",
    "other-object": "object",
    "other-symbol": "symbol",
    "symbol-other": "symbol",
    "warning": "warning sign",
    "religion": "religious symbol",
    "zodiac": "zodiac sign",
    "av-symbol": "media button",
    "gender": "gender symbol",
    "math": "mathematical sign",
    "punctuation": "punctuation mark",
    "currency": "currency sign",
    "alphanum": "letters or numbers",
    "geometric": "geometric shape",
    "subdivision-flag": "regional flag",
    "ui-element": "user interface element",
    "technology": "technical device",
    "healthcare": "health care",
    "climate-environment": "climate and environment",
    "queer-symbols": "queer symbol",
    "smileys-emotion": "emotion",
}


def make_captions(entries: list[dict]) -> list[list[str]]:
    """Make four distinct captions for each entry. Two entries share a caption only if their names are equal.

    Args:
        entries: objects of openmoji.json; the keys `annotation`, `tags`, `openmoji_tags` and `subgroups` are used.

    Returns:
        One list of four strings per entry, in order.
    """
    names = distinct_names(entries)
    captions = [describe(entry, name) for entry, name in zip(entries, names, strict=True)]
    for role in range(1, 4):
        separate([row[role] for row in captions], names, captions, role)
    return captions


def distinct_names(entries: list[dict]) -> list[str]:
    """The annotations in natural English. If entries share a name, their subgroup is added to it."""
    names = [spoken_name(entry["annotation"]) for entry in entries]
    counts = Counter(name.casefold() for name in names)
    return [
        f"{name} ({subgroup_phrase(entry)})" if counts[name.casefold()] > 1 else name
        for entry, name in zip(entries, names, strict=True)
    ]


def spoken_name(annotation: str) -> str:
    """An annotation in natural English: "flag: Peru" → "flag of Peru", "keycap: 3" → "keycap 3"."""
    name = " ".join(annotation.split())
    return name.replace("flag: ", "flag of ", 1).replace("keycap: ", "keycap ", 1)


def subgroup_phrase(entry: dict) -> str:
    """The entry's kind in natural English: "animal-bird" → "bird"."""
    return SUBGROUP_PHRASES.get(entry["subgroups"], entry["subgroups"].replace("-", " "))


def new_tags(entry: dict, name: str) -> list[str]:
    """The entry's tags that add a word to its name and kind, each once; tags without letters are left out."""
    known = words(f"{name} {subgroup_phrase(entry)}")
    is_flag = "flag" in entry["subgroups"]
    tags, seen = [], set()
    for tag in ",".join((entry["tags"], entry["openmoji_tags"])).split(","):
        tag = " ".join(tag.split())
        is_country_code = is_flag and re.fullmatch("[A-Z]{2}", tag)
        if not re.search("[A-Za-z]", tag) or is_country_code or words(tag) <= known or tag.casefold() in seen:
            continue
        seen.add(tag.casefold())
        tags.append(tag)
    return tags


def describe(entry: dict, name: str) -> list[str]:
    """The four captions of one entry, which other entries may have too."""
    kind, tags = subgroup_phrase(entry), new_tags(entry, name)
    if len(tags) >= 3:
        return [
            name,
            f"{name}, {enumerate_tags(tags[0::3])}",
            f"{kind}: {enumerate_tags(tags[1::3])}",
            f"emoji for {enumerate_tags(tags[2::3])}",
        ]
    if tags:
        return [name, f"{name}, {kind}", f"{kind}: {tags[0]}", f"emoji for {tags[-1]}"]
    if name.startswith("flag of "):
        place = name.removeprefix("flag of ")
        return [name, f"{name}, {kind}", f"national banner: {place}", f"emoji for the country or region {place}"]
    return [name, f"{name}, {kind}", f"{kind} showing {name}", f"emoji for {name}"]


def enumerate_tags(tags: list[str]) -> str:
    """The first `TAGS_PER_CAPTION` tags as an enumeration: "a", "a and b", "a, b and c"."""
    *head, last = tags[:TAGS_PER_CAPTION]
    return f"{', '.join(head)} and {last}" if head else last


def separate(texts: list[str], names: list[str], captions: list[list[str]], role: int) -> None:
    """Make equal captions of several entries different by appending the words in which their names differ ("…,
    woman").

    Args:
        texts: caption number `role` of each entry.
        names: name of each entry.
        captions: the captions of each entry; changed in place.
        role: number of the caption.
    """
    owners: dict[str, list[int]] = {}
    for index, text in enumerate(texts):
        owners.setdefault(text.casefold(), []).append(index)
    for indices in owners.values():
        if len(indices) == 1:
            continue
        common = set.intersection(*(words(names[index]) for index in indices))
        own = {
            index: [word for word in split_words(names[index]) if word.casefold() not in common] for index in indices
        }
        if len({tuple(own[index]) for index in indices}) < len(indices):
            own = {index: [names[index]] for index in indices}
        for index in indices:
            if own[index]:
                captions[index][role] = f"{texts[index]}, {' '.join(own[index])}"


def split_words(text: str) -> list[str]:
    """The words of a text, in order."""
    return re.findall(r"[\w'’-]+", text)


def words(text: str) -> set[str]:
    """The different words of a text, case-folded."""
    return set(split_words(text.casefold()))


def split_of(entry: dict) -> str:
    """ "train" or "test", by a hash of the entry's family. Variants by gender or of one "prefix: …" are one family.

    Flags are not variants of each other: each is a family of its own.
    """
    name = spoken_name(entry["annotation"]).casefold()
    family = name.split(":")[0]
    core = [word for word in split_words(family) if word not in GENDER_WORDS]
    digest = hashlib.sha256(" ".join(core or [family]).encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") < TEST_SHARE * 2**64 else "train"


def caption_report(entries: list[dict], captions: list[list[str]]) -> dict[str, int]:
    """Count the entries, the captions that two entries share, and the entries whose captions repeat the annotation."""
    counts = Counter(text.casefold() for row in captions for text in set(row))
    names = distinct_names(entries)
    return {
        "entries": len(entries),
        "captions": sum(len(row) for row in captions),
        "captions shared with another entry": sum(counts[text.casefold()] > 1 for row in captions for text in row),
        "entries whose captions repeat the annotation": sum(
            not new_tags(entry, name) for entry, name in zip(entries, names, strict=True)
        ),
    }
