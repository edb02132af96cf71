import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from universal_gcl.evaluation.pairs.measure import embed_pairs
from universal_gcl.evaluation.pairs.result_sheet import result_sheet


@pytest.fixture
def pairs():
    colours = np.random.default_rng(0).integers(0, 255, (40, 3))
    return [
        {
            "id": f"p{j}",
            "image": Image.new("RGB", (40, 20), tuple(int(c) for c in colours[j])),
            "captions": [f"{j} costs $5 or ${c}" for c in range(5)],
        }
        for j in range(40)
    ]


@pytest.fixture
def sheet(monkeypatch, tmp_path, pairs):
    def draw(*args, **options):
        figures = []
        savefig = Figure.savefig
        with monkeypatch.context() as patch:
            patch.setattr(Figure, "savefig", lambda self, *a, **o: (figures.append(self), savefig(self, *a, **o)))
            path = result_sheet(options.pop("pairs", pairs), *args, tmp_path / "sheet.png", **options)
        with Image.open(path) as image:
            assert image.format == "PNG" and np.asarray(image.convert("RGB")).std() > 5
        return figures[0].axes

    return draw


def test_a_good_model_finds_the_own_pair_first_and_says_so(sheet, make_embeddings):
    axes = sheet(make_embeddings(noise=0.05), None, query="t", num_queries=3, k=5)
    assert len(axes) == 3 * 6
    for row in range(3):
        query, *found = axes[6 * row : 6 * row + 6]
        own = query.texts[0].get_text().split()[0]
        assert query.get_title() == "query: text" and query.texts[0].get_text() == f"{own} costs $5 or $0"
        # five candidates belong to the pair: image, three texts, fused
        assert all(ax.get_title().endswith("✓") for ax in found)
        assert sorted(ax.get_title().split(" · ")[1] for ax in found) == ["image", "image + text", *["text"] * 3]
        texts = {text.get_text() for ax in found for text in ax.texts}
        assert texts == {f"{own} costs $5 or ${c}" for c in (2, 3, 4)}
        fused = next(ax for ax in found if "image + text" in ax.get_title())
        assert fused.get_xlabel() == f"{own} costs $5 or $3"


def test_before_and_after_stand_below_each_other(sheet, make_embeddings):
    bad, good = make_embeddings(noise=50.0, seed=1), make_embeddings(noise=0.05)
    axes = sheet(bad, good, query="t", pool="i", num_queries=2, k=4, labels=("CL", "GCL"))
    assert len(axes) == 4 * 5
    assert [axes[5 * line + 1].get_ylabel() for line in range(4)] == ["CL", "GCL", "CL", "GCL"]
    assert axes[6].get_title().endswith("✓") and axes[16].get_title().endswith("✓")
    assert not any(ax.get_title().endswith("✓") for ax in axes[7:10])
    assert {ax.get_title().split(" · ")[1] for ax in axes[1:5]} == {"image"}


def test_fused_queries_show_image_and_caption(sheet, make_embeddings):
    axes = sheet(make_embeddings(), None, query="it", num_queries=1, k=2)
    assert axes[0].images and axes[0].get_xlabel().endswith("costs $5 or $1")


@pytest.mark.parametrize(("query", "found"), [("t", ["image", "image + text"]), ("it", ["image", "text"])])
def test_the_query_itself_is_left_out_of_its_results(sheet, hash_model, pairs, query, found):
    """With one caption a pair, query and candidate are the same text, of cosine 1."""
    rows = [{"id": p["id"], "image": str(j).encode(), "captions": [f"{j} one"]} for j, p in enumerate(pairs)]
    hash_model.lean = 9.0  # everything of a pair beside each other, far from the others
    embeddings = embed_pairs(hash_model, None, rows)
    shown = [pair | {"captions": row["captions"]} for pair, row in zip(pairs, rows)]
    for axes, what in (
        (sheet(embeddings, None, pairs=shown, query=query, num_queries=3, k=2), found),
        (sheet(embeddings, None, pairs=shown, query=query, pool=query, num_queries=3, k=2), None),
    ):
        assert "the query itself, which is a candidate too, is left out" in axes[0].figure.get_suptitle()
        for cells in (axes[1:3], axes[4:6], axes[7:9]):
            if what is None:  # of its own modality only other pairs are left
                assert not any(ax.get_title().endswith("✓") for ax in cells)
            else:
                assert sorted(ax.get_title().split(" · ")[1] for ax in cells) == what
                assert all(ax.get_title().endswith("✓") for ax in cells)


def test_nothing_is_left_out_where_queries_are_no_candidates(sheet, make_embeddings):
    axes = sheet(make_embeddings(), None, query="it", num_queries=1, k=2)
    assert "left out" not in axes[0].figure.get_suptitle()
    images = sheet(make_embeddings(), None, query="i", pool="i", num_queries=1, k=50)
    assert len(images) == 1 + 39 and "left out" in images[0].figure.get_suptitle()
    with pytest.raises(ValueError, match="nothing but the query itself"):
        sheet(make_embeddings(num_pairs=1), None, query="i", pool="i", pairs=[{"id": "p0"}])


def test_pairs_that_were_not_embedded_are_refused(sheet, make_embeddings, pairs):
    with pytest.raises(ValueError, match="40 pairs, but embeddings of 12"):
        sheet(make_embeddings(num_pairs=12), None)
    pairs.reverse()
    with pytest.raises(ValueError, match="keep the order"):
        sheet(make_embeddings(), None)
    with pytest.raises(ValueError, match="query must be one of.*got 'ti'"):
        sheet(make_embeddings(), None, query="ti")
