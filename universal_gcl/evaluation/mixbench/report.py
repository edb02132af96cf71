"""MixBench's result as a table. Rates in percent."""

from collections.abc import Mapping

from modeling_gcl.modalities import IN_DATA
from universal_gcl.evaluation.mixbench.subsets import COLUMNS
from universal_gcl.evaluation.paper import markdown_table


def mixbench_table(results: Mapping[str, dict], *, markdown: bool = False) -> str:
    """nDCG@10: one line per subset, over all queries and by the modality of the relevant document.

    Args:
        results: `subsets` of the result of `evaluation.mixbench.measure.evaluate_mixbench`.
        markdown: for a file, else for a terminal.
    """
    modalities = [IN_DATA[modality] for modality in COLUMNS]
    header = ["nDCG@10", "all", *modalities]
    lines = []
    for name, result in results.items():
        rates = [result["ndcg@10"], *(result["by_target"][modality]["ndcg@10"] for modality in modalities)]
        lines.append([name, *("–" if rate is None else f"{100 * rate:.1f}" for rate in rates)])
    if markdown:
        return markdown_table(header, lines)
    width = max(len(line[0]) for line in [header, *lines])
    return "\n".join(line[0].ljust(width) + "".join(f"{cell:>12}" for cell in line[1:]) for line in [header, *lines])
