"""The nine-way result in percent: a table for the terminal, markdown for the model card, and metrics to log."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from modeling_gcl.modalities import ALL_DIRECTIONS
from universal_gcl.evaluation.pairs.measure import HEADLINE

_ORDER = (*HEADLINE, *(direction for direction in ALL_DIRECTIONS if direction not in HEADLINE))
_MISSING = "–"


def nine_way_table(before: dict, after: dict | None = None) -> str:
    """hit@10 of the nine directions in both pools, the headline, mixed search and the gap, as lines for a terminal.

    Args:
        before, after: results of `universal_gcl.evaluation.pairs.measure.evaluate_pairs`. With `after`, each figure is
            shown as before → after, followed by the change in points. Directions in parentheses don't count in the
            headline.

    Raises:
        ValueError: the two results can't be compared, see `check_comparable`.
    """
    results = [before] if after is None else [before, after]
    check_comparable(results)
    width = 7 if after is None else 23

    def line(label: str, *cells: str) -> str:
        return f"{label:<22}" + "".join(f"{cell:>{width}}  " for cell in cells).rstrip()

    def cell(figure: Callable[[dict], float | None], scale: float = 100, digits: int = 1) -> str:
        found = [figure(result) for result in results]
        values = [value for value in found if value is not None]
        if len(values) < len(found):
            return _MISSING
        shown = [f"{scale * value:.{digits}f}" for value in values]
        if after is None:
            return shown[0]
        return f"{shown[0]:>6} → {shown[1]:>5} {scale * (values[1] - values[0]):>+7.{digits}f}"

    lines = [line("hit@10 in %", "local", "global")]
    lines += [
        line(_label(direction, results), cell(_hit(direction, "local")), cell(_hit(direction, "global")))
        for direction in _ORDER
    ]
    lines.append(line("headline", *(cell(_headline(pool)) for pool in ("local", "global"))))
    lines.append(line("headline, both pools", cell(_headline("mean"))))
    lines.append(line("mixed nDCG@10 in %", cell(_mixed)))
    lines += [line(f"cosine of means {names}", cell(_cosine(names), 1, 3)) for names in before["gap"]["cosine"]]
    return "\n".join([*lines, _footer(before)])


def nine_way_markdown(results: Mapping[str, dict]) -> str:
    """The same figures as a markdown table, with one column for each named result and cells `local / global`.

    Raises:
        ValueError: there are no results, or they can't be compared, see `check_comparable`.
    """
    if not results:
        raise ValueError("no results to put into a table")
    check_comparable(list(results.values()))

    def row(label: str, cell: Callable[[dict], str]) -> str:
        return f"| {label} | " + " | ".join(cell(result) for result in results.values()) + " |"

    def both(figure: Callable[[str], Callable[[dict], float | None]]) -> Callable[[dict], str]:
        return lambda result: f"{_percent(figure('local')(result))} / {_percent(figure('global')(result))}"

    def number(figure: Callable[[dict], float | None]) -> Callable[[dict], str]:
        return lambda result: _number(figure(result))

    lines = [
        "| hit@10 in %, local / global | " + " | ".join(results) + " |",
        "|---" + "|---:" * len(results) + "|",
    ]
    for direction in _ORDER:
        label = _label(direction, list(results.values()))
        lines.append(row(label, both(partial(_hit, direction))))
    lines.append(row("**headline**", both(_headline)))
    lines.append(row("headline, mean of both pools", lambda result: _percent(_headline("mean")(result))))
    lines.append(row("mixed search, nDCG@10 in %", lambda result: _percent(_mixed(result))))
    first = next(iter(results.values()))
    for names in first["gap"]["cosine"]:
        lines.append(row(f"cosine of means {names}", number(_cosine(names))))
    return "\n".join([*lines, "", _footer(first)])


def check_comparable(results: list[dict[str, Any]]) -> None:
    """Raise a ValueError if results differ in protocol, pairs, candidates or seed: their figures can't be compared."""
    for key in ("protocol", "num_pairs", "captions_per_pair", "candidates", "seed"):
        values = [result[key] for result in results]
        if any(value != values[0] for value in values):
            raise ValueError(f"these results are not comparable: {key} differs, {' and '.join(map(str, values))}")


def _hit(direction: str, pool: str) -> Callable[[dict], float | None]:
    def figure(result: dict) -> float | None:
        hits = result["nine_way"][direction][pool]
        return None if hits is None else hits["hit@10"]

    return figure


def _headline(pool: str) -> Callable[[dict], float | None]:
    return lambda result: result["headline"][pool]


def _mixed(result: dict) -> float | None:
    return result["mixed"]["ndcg@10"]


def _cosine(names: str) -> Callable[[dict], float | None]:
    return lambda result: result["gap"]["cosine"][names]


def _label(direction: str, results: list[dict]) -> str:
    return direction if results[0]["nine_way"][direction]["headline"] else f"({direction})"


def _percent(value: float | None) -> str:
    return _MISSING if value is None else f"{100 * value:.1f}"


def _number(value: float | None) -> str:
    return _MISSING if value is None else f"{value:.3f}"


def _footer(result: dict) -> str:
    candidates = ", ".join(f"{count} {name}" for name, count in result["candidates"].items())
    text = (
        f"{result['num_pairs']} pairs; candidates: {candidates}. Directions in parentheses don't count in the "
        f"headline: their query and target share an input. A {_MISSING} means that query and target would be the same, "
        "or that the pairs have too few captions."
    )
    counts = {int(count): pairs for count, pairs in result["caption_counts"].items()}
    if len(counts) > 1:
        fewest = min(counts)
        text += (
            f" The pairs with the fewest captions decide how captions are used: {counts[fewest]} of "
            f"{result['num_pairs']} have {fewest}, others up to {max(counts)}."
        )
    return text


def headline_metrics(result: dict[str, Any], prefix: str = "eval") -> dict[str, float]:
    """The metrics to log for a nine-way result: headline hit@10, mixed nDCG@10, and cosines of the modality means.

    Metrics that are None, because the pairs have too few captions, are left out.
    """
    metrics = {f"{prefix}_headline_{name}": value for name, value in result["headline"].items()}
    metrics[f"{prefix}_mixed_ndcg@10"] = result["mixed"]["ndcg@10"]
    metrics |= {f"{prefix}_cosine_{pair}": value for pair, value in result["gap"]["cosine"].items()}
    return {name: value for name, value in metrics.items() if value is not None}
