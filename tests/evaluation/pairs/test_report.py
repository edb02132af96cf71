import pytest

from modeling_gcl.modalities import ALL_DIRECTIONS
from universal_gcl.evaluation.pairs.measure import evaluate_embeddings, evaluate_pairs
from universal_gcl.evaluation.pairs.report import nine_way_markdown, nine_way_table


@pytest.fixture
def results(make_embeddings):
    return [evaluate_embeddings(make_embeddings(gap=gap, noise=1.5)) for gap in (1.5, 0.1)]


def test_the_table_holds_before_after_and_the_change(results):
    before, after = results
    lines = nine_way_table(before, after).splitlines()
    old, new = (100 * result["nine_way"]["t→i"]["global"]["hit@10"] for result in results)
    assert lines[1].startswith("t→i ")
    assert lines[1].split()[-4:] == [f"{old:.1f}", "→", f"{new:.1f}", f"{new - old:+.1f}"]
    headline = next(line for line in lines if line.startswith("headline "))
    assert f"{100 * before['headline']['local']:.1f} →" in headline
    for direction in ALL_DIRECTIONS:
        assert sum(line.split()[0].strip("()") == direction for line in lines) == 1
    assert any(line.startswith("(it→i)") for line in lines) and "(t→i)" not in "".join(lines)


def test_a_single_result_has_no_change(results):
    lines = nine_way_table(results[0]).splitlines()
    nine_way = results[0]["nine_way"]["i→t"]
    assert lines[2].split() == ["i→t", *(f"{100 * nine_way[pool]['hit@10']:.1f}" for pool in ("local", "global"))]
    assert "→ " not in lines[2]


def test_markdown_has_a_column_for_each_result(results):
    lines = nine_way_markdown({"CL": results[0], "GCL": results[1]}).splitlines()
    assert lines[0] == "| hit@10 in %, local / global | CL | GCL |"
    table = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in table} == {4}
    cells = next(line for line in table if line.startswith("| t→it")).split("|")[2:4]
    for cell, result in zip(cells, results, strict=True):
        nine_way = result["nine_way"]["t→it"]
        assert cell.strip() == " / ".join(f"{100 * nine_way[pool]['hit@10']:.1f}" for pool in ("local", "global"))
    assert any(line.startswith("| (i→i) | – / – | – / – |") for line in table)


def test_empty_directions_and_uneven_captions_are_told(hash_model, make_pairs):
    result = evaluate_pairs(hash_model, None, make_pairs([1] * 3 + [4] * 9))
    text = nine_way_table(result)
    assert "(t→t)                       –        –" in text
    assert "mixed nDCG@10 in %          –" in text
    assert "3 of 12 have 1, others up to 4" in text
    assert "| mixed search, nDCG@10 in % | – |" in nine_way_markdown({"model": result})


def test_results_of_other_protocols_are_not_put_side_by_side(results, make_embeddings):
    other = evaluate_embeddings(make_embeddings(texts=2))
    with pytest.raises(ValueError, match="not comparable: captions_per_pair differs, 5 and 4"):
        nine_way_table(results[0], other)
    with pytest.raises(ValueError, match="not comparable"):
        nine_way_markdown({"a": results[0], "b": evaluate_embeddings(make_embeddings(num_pairs=41))})
    with pytest.raises(ValueError, match="no results"):
        nine_way_markdown({})
