"""Colours, markers and resolution of all pictures.

The colours are those of Okabe and Ito, which people with colour-vision deficiency can tell apart. No picture relies on
colour alone: numbers, hatching or markers say the same.
"""

from pathlib import Path

from matplotlib.figure import Figure

BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, BLACK, GREY = "#E69F00", "#56B4E9", "#000000", "#bbbbbb"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
MODALITY_COLOURS = {"i": BLUE, "t": VERMILION, "it": GREEN}
MODALITY_MARKERS = {"i": "o", "t": "^", "it": "s"}
POOL_COLOURS = {"local": BLUE, "global": VERMILION}
DPI = 150


def save_figure(figure: Figure, path: str | Path, dpi: int = DPI) -> Path:
    """Write a figure as PNG, make its folder if needed, and return the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    return path
