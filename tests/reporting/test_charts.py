import math

import pytest

from lowmem_db.reporting.charts import MAX_POINTS, Curve, bar_chart, line_chart, smoothed, thinned


def test_smoothing_keeps_a_constant_and_skips_what_is_not_a_number():
    points = [(float(step), math.nan if step == 50 else 2.0) for step in range(100)]
    result = smoothed(points)
    assert len(result) == 99
    assert all(value == pytest.approx(2.0) for _, value in result)


def test_thinning_keeps_the_peaks_and_the_order():
    points = [(float(step), 0.0) for step in range(20_000)]
    points[777] = (777.0, 9.0)
    result = thinned(points)
    assert len(result) <= MAX_POINTS
    assert (777.0, 9.0) in result
    assert result == sorted(result)


def test_few_points_are_kept_as_they_are():
    points = [(1.0, 5.0), (2.0, 4.0)]
    assert thinned(points) == points


@pytest.mark.parametrize("points", [[], [(1.0, math.nan)], [(1.0, math.inf), (2.0, -math.inf)]])
def test_a_chart_without_numbers_is_empty(points):
    assert line_chart("Loss", [Curve("a", points)]) == ""


@pytest.mark.parametrize("points", [[(1.0, 0.0)], [(1.0, 3.0), (2.0, 3.0)], [(1.0, -1e-9), (2.0, 1e9)], [(5.0, 1e-30)]])
def test_a_chart_has_only_finite_coordinates(points):
    chart = line_chart("Loss", [Curve("a", points)])
    assert "<polyline" in chart
    assert "nan" not in chart
    assert "inf" not in chart


def test_labels_are_escaped():
    chart = line_chart("<b>", [Curve("<i>", [(1.0, 1.0), (2.0, 2.0)])], unit="<u>")
    bars = bar_chart("<b>", [("<i>", [("<u>", 1.0)])], unit="GiB")
    assert not any(tag in chart + bars for tag in ("<b>", "<i>", "<u>"))


def test_bars_without_bytes_are_empty():
    assert bar_chart("Memory", [("train", [("weights", 0.0)])], unit="GiB") == ""
