"""The three modalities and the directions between them: every name that data, tables and model outputs use for them."""

MODALITIES = ("i", "t", "it")
FEATURES = {"i": "image", "t": "text", "it": "fused"}  # of the model: image_embeds, text_embeds, fused_embeds
IN_DATA = {"i": "image", "t": "text", "it": "image,text"}  # in the columns of data sets
IN_WORDS = {"i": "image", "t": "text", "it": "image + text"}  # on pages and in pictures


def direction(query: str, target: str) -> str:
    """The name of a search direction: `direction("t", "it")` is `"t→it"`."""
    return f"{query}→{target}"


ALL_DIRECTIONS = tuple(direction(query, target) for query in MODALITIES for target in MODALITIES)
CROSS_DIRECTIONS = ("i→t", "t→i", "i→it", "it→i", "t→it", "it→t")  # between two modalities, in the order of tables
