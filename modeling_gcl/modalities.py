"""Names of the three modalities and of the directions between them, as data, tables and model outputs use them."""

MODALITIES = ("i", "t", "it")
FEATURES = {"i": "image", "t": "text", "it": "fused"}  # of the model: image_embeds, text_embeds, fused_embeds
IN_DATA = {"i": "image", "t": "text", "it": "image,text"}  # in the columns of data sets
IN_WORDS = {"i": "image", "t": "text", "it": "image + text"}  # on pages and in pictures


def direction(query: str, target: str) -> str:
    """The name of a search direction: `direction("t", "it")` is `"t→it"`."""
    return f"{query}→{target}"


def parse_direction(name: str) -> str:
    """A direction as a user may type it, `"i->t"`, in our spelling, `"i→t"`; other names are returned unchanged."""
    return name.replace("->", "→")


ALL_DIRECTIONS = tuple(direction(query, target) for query in MODALITIES for target in MODALITIES)
CROSS_DIRECTIONS = ("i→t", "t→i", "i→it", "it→i", "t→it", "it→t")  # between two modalities, in the order of tables
