import ast
import io
import pathlib

import numpy as np
import pytest
from matplotlib import image

from calsegx.evaluation import calibration_figures, figures
from calsegx.metrics import calibration


def pixels(png):
    assert png.startswith(b"\x89PNG")
    return image.imread(io.BytesIO(png), format="png")


def statistics(seed=0, bias=0.0):
    rng = np.random.default_rng(seed)
    probabilities = rng.random(500)
    labels = (rng.random(500) < np.clip(probabilities - bias, 0, 1)).astype(int)
    return calibration.calibration_statistics(probabilities, labels)


def test_reliability_has_one_panel_per_domain_and_is_reproducible():
    one = calibration_figures.reliability({"A": statistics()}, "SAM-FT", "p>0.01")
    two = calibration_figures.reliability({"A": statistics(), "B": statistics(1, 0.3)}, "SAM-FT", "p>0.01")
    assert pixels(two).shape[1] > 1.5 * pixels(one).shape[1]
    assert calibration_figures.reliability({"A": statistics()}, "SAM-FT", "p>0.01") == one


def test_reliability_of_no_voxels():
    empty = calibration.calibration_statistics(np.zeros(0), np.zeros(0, int))
    assert pixels(calibration_figures.reliability({"A": empty}, "SAM-FT", "p>0.01")).size


def test_training_curves_draw_what_was_logged():
    logs = {
        "sam_ft": [{"step": s, "task": 1 / s} for s in (1, 2, 3)],
        "sam_fip": [{"step": s, "task": 1 / s, "penalty": 0.1**s} for s in (1, 2, 3)],
        "mine": [],
    }
    labels = {"task": "Task loss", "penalty": "Fisher penalty", "cmp": "CMP"}
    both = pixels(figures.training_curves(logs, labels))
    alone = pixels(figures.training_curves({"sam_ft": logs["sam_ft"]}, labels))
    assert both.shape[1] > 1.5 * alone.shape[1]
    with pytest.raises(ValueError, match="No run has logged any of cmp"):
        figures.training_curves(logs, {"cmp": "CMP"})


def test_training_curves_are_means_over_seeds(monkeypatch):
    monkeypatch.setattr(figures, "to_png", lambda figure: figure)
    logs = {f"sam_ft seed {seed}": [{"step": s, "task": s + seed} for s in (1, 2, 3)] for seed in (0, 2)}
    drawn = figures.training_curves({**logs, "calsam": [{"step": 1, "task": 5.0}]}, {"task": "Task loss"})
    first, second = drawn.axes[0].lines
    assert [first.get_xdata().tolist(), first.get_ydata().tolist()] == [[1, 2, 3], [2, 3, 4]]
    assert [second.get_xdata().tolist(), second.get_ydata().tolist()] == [[1], [5]]
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["SAM-FT", "CalSAM"]


def test_overlay_with_and_without_methods_and_contours():
    rng = np.random.default_rng(0)
    truth = np.zeros((20, 30), bool)
    truth[5:9, 5:12] = True
    result = figures.Overlay(np.zeros_like(truth), rng.random((20, 30)))
    drawn = figures.overlay(rng.random((20, 30)), truth, {"sam_ft": result}, (1.0, 0.5), "case 1")
    assert pixels(drawn).size
    assert pixels(figures.overlay(np.zeros((20, 30)), np.zeros_like(truth), {}, (1.0, 1.0), "nothing")).size


def test_scatter_leaves_undefined_methods_out():
    points = {"A": {"sam_ft": (0.7, 0.1), "mine": (float("nan"), 0.2)}, "B": {"sam_ft": (0.6, 0.2)}}
    assert pixels(figures.dice_against_ece(points, "p>0.01")).size


def test_fifteen_methods_with_long_names_leave_room_for_the_axes():
    names = [f"sam_ft:sam + {i}*mbls_penalty(margin=5)" for i in range(15)]
    few = {"A": {name: (0.7, 0.1) for name in ("sam_ft", "calsam")}}
    many = {"A": {name: (0.7, 0.01 * i) for i, name in enumerate(names)}}
    few, many = (pixels(figures.dice_against_ece(points, "p>0.01")).shape for points in (few, many))
    assert many[1] > 1.3 * few[1] and many[0] > few[0]
    styles = figures.method_styles([*names, "sam_ft"])
    assert len({(style.colour, style.shape) for style in styles.values()}) == len(styles)


def test_matplotlib_is_imported_only_when_something_is_drawn():
    for path in pathlib.Path(figures.__file__).parent.glob("*.py"):
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not [node for node in top if "matplotlib" in ast.unparse(node)]


def test_errors_are_coloured_by_their_kind():
    prediction, truth = np.array([[1, 1, 0, 0]], bool), np.array([[1, 0, 1, 0]], bool)
    shown = figures._errors(prediction, truth)
    assert list(shown[0, :, 3] > 0) == [False, True, True, False]
    assert not np.array_equal(shown[0, 1], shown[0, 2])


def test_panels_of_many_domains_are_wrapped():
    curves = {f"domain {i}": statistics(i) for i in range(6)}
    four = pixels(calibration_figures.reliability(dict(list(curves.items())[:4]), "SAM-FT", "p>0.01")).shape
    six = pixels(calibration_figures.reliability(curves, "SAM-FT", "p>0.01")).shape
    assert six[1] == four[1] and six[0] > 1.5 * four[0]
