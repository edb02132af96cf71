import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from universal_gcl.evaluation.pairs import plots
from universal_gcl.evaluation.pairs.measure import evaluate_embeddings
from universal_gcl.evaluation.pairs.plots import modality_pca, nine_way_heatmap, training_curves


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures = []
    savefig = Figure.savefig

    def keep(figure, *args, **options):
        figures.append(figure)
        return savefig(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def picture(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def panels_of(figure):
    return [ax for ax in figure.axes if ax.get_title()]


def test_heatmap_says_every_figure_and_marks_what_does_not_count(make_embeddings, drawn, tmp_path):
    before, after = (evaluate_embeddings(make_embeddings(gap=gap, noise=1.5)) for gap in (1.5, 0.1))
    path = nine_way_heatmap(before, after, tmp_path / "new" / "heat.png", labels=("CL", "GCL"))
    assert picture(path).std() > 20
    panels = panels_of(drawn[0])
    assert [ax.get_title().split("\n")[0] for ax in panels] == [
        "CL · local pool", "GCL · local pool", "CL · global pool", "GCL · global pool",
    ]  # fmt: skip
    old, new = (100 * result["nine_way"]["t→i"]["global"]["hit@10"] for result in (before, after))
    texts = {text.get_position(): text.get_text() for text in panels[3].texts}
    assert texts[0, 1] == f"{new:.1f}\n{new - old:+.1f}"  # row text, column image
    assert texts[0, 0] == "–"
    assert {text.get_position(): text.get_text() for text in panels[2].texts}[0, 1] == f"{old:.1f}"
    hatched = {(p.get_x() + 0.5, p.get_y() + 0.5) for p in panels[0].patches if p.get_hatch()}
    assert hatched == {(2, 0), (0, 2), (2, 2)}  # i→it, it→i, it→it
    assert f"headline {100 * before['headline']['global']:.1f} %" in panels[2].get_title()


def test_heatmap_of_one_result_and_of_results_that_differ_in_protocol(make_embeddings, drawn, tmp_path):
    result = evaluate_embeddings(make_embeddings())
    nine_way_heatmap(result, None, tmp_path / "one.png")
    assert [ax.get_title().split("\n")[0] for ax in panels_of(drawn[0])] == ["local pool", "global pool"]
    with pytest.raises(ValueError, match="not comparable"):
        nine_way_heatmap(result, evaluate_embeddings(make_embeddings(num_pairs=9)), tmp_path / "two.png")


def test_principal_components_find_a_known_plane():
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(10, 2)))[0].T
    flat = {name: rng.normal(size=(50, 2)) * (5, 2) + (shift, 0) for name, shift in (("i", -4), ("t", 4), ("it", 0))}
    projected, shares = plots._principal_components({name: xy @ axes + 3.0 for name, xy in flat.items()})
    assert shares.sum() == pytest.approx(1.0) and shares[0] > shares[1]
    together, expected = (np.concatenate(list(parts.values())) for parts in (projected, flat))
    distances = [np.linalg.norm(points[:, None] - points[None], axis=-1) for points in (together, expected)]
    assert distances[0] == pytest.approx(distances[1])
    assert (projected["i"].mean(axis=0) <= 1e-9).all()  # turned so that images lie to the lower left


def test_pca_shows_each_pair_once_a_modality_on_one_scale(make_embeddings, drawn, tmp_path):
    before, after = make_embeddings(gap=2.0), make_embeddings(gap=0.0)
    path = modality_pca(before, after, tmp_path / "pca.png", max_pairs=25)
    assert picture(path).std() > 10
    left, right = panels_of(drawn[0])
    assert left.get_xlim() == right.get_xlim() and left.get_ylim() == right.get_ylim()
    assert [len(dots.get_offsets()) for dots in left.collections] == [25, 25, 25, 1, 1, 1]
    for ax in (left, right):
        for dots in ax.collections:
            assert (np.abs(dots.get_offsets()) <= (ax.get_xlim()[1], ax.get_ylim()[1])).all()
    cosine = evaluate_embeddings(before)["gap"]["cosine"]["i,t"]
    assert f"i,t {cosine:.2f}" in left.get_title()
    modality_pca(before, None, tmp_path / "one.png")
    assert len(panels_of(drawn[1])) == 1


def test_curves_draw_what_was_logged(drawn, tmp_path):
    log = [
        {"step": step, "loss": 3.0 / step, "loss_t→i": 2.0 / step, "loss_it→t": 1.0 / step, "logit_scale": 50.0 + step}
        for step in range(1, 50)
    ]
    log += [{"step": 20, "eval_loss": 0.5, "eval_headline_global": 0.25}, {"step": 49, "train_runtime": 3.0}]
    path = training_curves(log, tmp_path / "curves.png")
    assert picture(path).std() > 10
    panels = {ax.get_title(): ax for ax in panels_of(drawn[0])}
    assert list(panels) == ["Loss", "Loss by direction", "Temperature", "Headline"]
    lines = {line.get_label(): line for line in panels["Loss by direction"].lines}
    assert list(lines) == ["t→i", "it→t"]
    assert lines["it→t"].get_xydata().tolist() == [[step, 1.0 / step] for step in range(1, 50)]
    assert [line.get_label() for line in panels["Loss"].lines] == ["training", "evaluation"]
    assert panels["Headline"].lines[0].get_xydata().tolist() == [[20.0, 25.0]]


def test_curves_take_a_temperature_and_refuse_an_empty_log(drawn, tmp_path):
    training_curves([{"step": 1, "temperature": 0.02}, {"step": 2, "temperature": 0.01}], tmp_path / "curves.png")
    (panel,) = panels_of(drawn[0])
    assert panel.lines[0].get_ydata().tolist() == pytest.approx([50.0, 100.0])
    with pytest.raises(ValueError, match="nothing to draw"):
        training_curves([{"step": 3, "train_runtime": 1.0}], tmp_path / "none.png")
