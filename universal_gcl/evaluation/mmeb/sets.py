"""The names of MMEB's image sets (arXiv 2410.05160) in versions 1 and 2, and of the other sets of version 2."""

from collections.abc import Sequence

HUB_IDS = {1: "TIGER-Lab/MMEB-eval", 2: "ziyjiang/MMEB_Test_Instruct"}  # version → data set of the Hub
CATEGORIES = {
    "classification": (
        "ImageNet-1K", "N24News", "HatefulMemes", "VOC2007", "SUN397", "Place365", "ImageNet-A", "ImageNet-R",
        "ObjectNet", "Country211",
    ),
    "VQA": (
        "OK-VQA", "A-OKVQA", "DocVQA", "InfographicsVQA", "ChartQA", "Visual7W", "ScienceQA", "VizWiz", "GQA",
        "TextVQA",
    ),
    "retrieval": (
        "VisDial", "CIRR", "VisualNews_t2i", "VisualNews_i2t", "MSCOCO_t2i", "MSCOCO_i2t", "NIGHTS", "WebQA",
        "FashionIQ", "Wiki-SS-NQ", "OVEN", "EDIS",
    ),
    "grounding": ("MSCOCO", "RefCOCO", "RefCOCO-Matching", "Visual7W-Pointing"),
}  # fmt: skip
CATEGORY_OF = {name: category for category, names in CATEGORIES.items() for name in names}

# the 12 sets of the GCL paper's table 2, in its order, with its directions
PAPER_DIRECTIONS = {
    "VisDial": "t→i", "VisualNews_t2i": "t→i", "MSCOCO_t2i": "t→i", "Wiki-SS-NQ": "t→i", "WebQA": "t→it",
    "EDIS": "t→it", "VisualNews_i2t": "i→t", "MSCOCO_i2t": "i→t", "NIGHTS": "i→i", "CIRR": "it→i",
    "FashionIQ": "it→i", "OVEN": "it→it",
}  # fmt: skip

# texts search images, some with a text; version 2 reads these sets by a rule of their own, see `evaluation.mmeb.data`
TEXT_TO_IMAGE = ("VisDial", "VisualNews_t2i", "MSCOCO_t2i", "Wiki-SS-NQ", "WebQA", "EDIS")
# candidates of these sets are texts; candidates of the others are images, some with a text
TEXT_CANDIDATES = (*CATEGORIES["classification"], *CATEGORIES["VQA"], "VisualNews_i2t", "MSCOCO_i2t")

VIDEO_SETS = (
    "SmthSmthV2", "HMDB51", "UCF101", "K700", "Kinetics-700", "Breakfast", "MSR-VTT", "MSVD", "DiDeMo", "YouCook2",
    "VATEX", "QVHighlight", "Charades-STA", "MomentSeeker", "Video-MME", "NExTQA", "EgoSchema", "MVBench",
    "ActivityNetQA",
)  # fmt: skip
_DOCUMENT_PREFIXES = ("ViDoRe", "VisRAG", "ViDoSeek", "MMLongBench")


def chosen_sets(names: Sequence[str]) -> list[str]:
    """
    The names of the sets that a user chooses, each once. `"paper"` stands for the paper's 12, `"all"` for all 36.

    Raises:
        ValueError: no name, an unknown name, or a set of videos or visual documents.
    """
    groups = {"paper": tuple(PAPER_DIRECTIONS), "all": tuple(CATEGORY_OF)}
    chosen = list(dict.fromkeys(name for asked in names for name in groups.get(asked, (asked,))))
    if not chosen:
        raise ValueError("no set of MMEB is named: give 'paper', 'all' or names of sets")
    for name in chosen:
        if name in VIDEO_SETS or name.startswith(_DOCUMENT_PREFIXES):
            kind = "videos" if name in VIDEO_SETS else "visual documents"
            raise ValueError(f"{name} is a set of {kind}: only the 36 image sets of MMEB-V2 are evaluated here")
        if name not in CATEGORY_OF:
            raise ValueError(
                f"MMEB has no image set {name!r}: choose 'paper', 'all' or any of {', '.join(CATEGORY_OF)}"
            )
    return chosen
