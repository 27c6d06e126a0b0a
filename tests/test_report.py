"""The report page: self-contained, harmless whatever names it shows, and true to the numbers it was given."""

import ast
import dataclasses
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from scipy.spatial.distance import cityblock, pdist
from sklearn.metrics.cluster import contingency_matrix

from tsclust_ooc.errors import UsageError
from tsclust_ooc.report import (
    Contingency,
    Member,
    PassLine,
    Points,
    Report,
    ScoreLine,
    drift,
    format_number,
    nice_ticks,
    render,
)

HOSTILE = "</style><script>alert(1)</script>\"'&amp;<img src=http://x.example/y onerror=z>\n{{ 7*7 }}"
VOID = {"meta", "br", "img", "link", "input", "hr", "use", "path", "rect", "line", "circle", "polyline"}
COORDINATES = {"x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "width", "height", "points", "viewbox"}


class Page(HTMLParser):
    """The page as (tag, attributes) in order, its text, and the rows of its tables."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.elements, self.text, self.rows, self.open = [], "", [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    def attributes(self, name):
        return [attrs[name] for _, attrs in self.elements if name in attrs]

    def headings(self):
        return [attrs["id"] for tag, attrs in self.elements if tag == "h2"]

    def marks(self):
        return [attrs for tag, attrs in self.elements if tag == "use" and "mark" in attrs.get("class", "")]

    def row(self, header):
        return next(row for row in self.rows if row and row[0] == header)


def a_report(k=6, n_points=60, n_passes=4, name="train/7.h5", **changes):
    rng = np.random.default_rng(k)
    labels = np.arange(n_points) % k
    sizes = {
        split: tuple(rng.multinomial(n, np.full(k, 1 / k)).tolist()) for split, n in (("train", 12_000), ("val", 3000))
    }
    report = Report(
        title="a run",
        facts=(("dataset", "demo"), ("seed", "0")),
        command="tsclust cluster demo runs/k -k 6",
        sizes=sizes,
        passes=tuple(PassLine(i + 1, 1.2e6 / (i + 1), 1 / (i + 1), 0.5) for i in range(n_passes)),
        scores=(
            ScoreLine("silhouette", 0.3123, "nearness", "sample of 1,000", 0.004),
            ScoreLine("ARI", 0.9, "pairs", "exact"),
        ),
        points=Points(
            *rng.normal(size=(2, n_points)), labels, ["train"] * n_points, (0.4, 0.2), 98_133, [name] * n_points
        ),
        contingency=Contingency(("normal", "cyclic"), contingency_matrix(np.arange(600) % 2, rng.integers(0, k, 600))),
        representatives=(Member(0, name, "train", 0.5), Member(k - 1, name, "val", 12.25)),
        farthest=(Member(0, name, "train", 99.5),),
        notes=("3 shards were left out",),
        provenance=(("host", "node17"),),
    )
    return dataclasses.replace(report, **changes)


def hostile(value):
    """`value` with every string in it, at any depth, made hostile; what steers the layout keeps its type and length."""
    if isinstance(value, str):
        return HOSTILE
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(
            value, **{f.name: hostile(getattr(value, f.name)) for f in dataclasses.fields(value)}
        )
    if isinstance(value, dict):
        return {HOSTILE + str(i): v for i, v in enumerate(value.values())}
    return type(value)(hostile(v) for v in value) if isinstance(value, (tuple, list)) else value


def test_the_page_asks_nothing_of_the_network_and_runs_no_script():
    html = render(a_report())
    page = Page(html)
    assert {tag for tag, _ in page.elements}.isdisjoint(
        {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    )
    assert page.attributes("src") == []
    assert all(href.startswith("#") for href in page.attributes("href"))
    assert not re.search(r"url\(|@import|https?:", html)
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
    assert any(content.startswith("default-src 'none'") for content in page.attributes("content"))


@pytest.mark.parametrize("k", [1, 2, 6, 13, 50])
def test_elements_nest_ids_are_unique_and_every_reference_has_its_target(k):
    page = Page(render(a_report(k)))
    assert page.open == []
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    assert {href[1:] for href in page.attributes("href")} | set(page.attributes("aria-labelledby")) <= set(ids)


@pytest.mark.parametrize("k", [1, 2, 6, 50])
def test_every_cluster_shows_its_rows_and_share_in_every_split(k):
    report = a_report(k)
    page = Page(render(report))
    for cluster in range(k):
        cells = page.row(str(cluster))[1:]
        for cell, sizes in zip(cells, report.sizes.values(), strict=False):
            assert re.fullmatch(rf"{sizes[cluster]:,}(\d+\.\d) %", cell)
            assert float(cell.removeprefix(f"{sizes[cluster]:,}")[:-2]) == pytest.approx(
                100 * sizes[cluster] / sum(sizes), abs=0.0501
            )


def test_a_bar_is_as_long_for_a_small_split_and_cut_in_proportion():
    sizes = {"train": (100, 300), "test": (3, 0)}
    page = Page(render(a_report(2, sizes=sizes)))
    widths = [float(attrs["width"]) for tag, attrs in page.elements if tag == "rect"]
    assert widths == [225, 675, 900]


@pytest.mark.parametrize("k", [2, 6, 50])
def test_hostile_names_are_shown_as_they_are_and_add_no_element(k):
    plain, attacked = a_report(k), hostile(a_report(k))
    harmless, page = Page(render(plain)), Page(render(attacked))
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in harmless.elements]
    assert [list(attrs) for _, attrs in page.elements] == [list(attrs) for _, attrs in harmless.elements]
    assert page.text.count(HOSTILE) >= 12
    assert "49" not in page.row(HOSTILE)[0]


def test_undecodable_and_control_characters_can_be_written_and_are_visible():
    html = render(a_report(notes=("shard \udcff\x00\x1b[31m.h5 was left out",)))
    assert "shard \\udcff\\x00\\x1b[31m.h5" in html.encode("utf-8").decode("utf-8")


def test_the_lines_that_open_the_results_are_python_whatever_the_paths_are():
    path = '/data/it\'s "here"\n); import os #'
    page = Page(render(a_report(run_path=path + "/", dataset_path=path)))
    code = page.text[page.text.index("import numpy, pandas, zarr") : page.text.index("How this was made")]
    constants = {node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)}
    assert {path + "/labels", path + "/model/centers.npy", path + "/data.zarr", "train/embeddings"} <= constants
    assert sum(isinstance(node, ast.Import) for node in ast.walk(ast.parse(code))) == 1


def test_the_same_report_gives_the_same_bytes():
    assert render(a_report(13)).encode() == render(a_report(13)).encode()


def test_parts_that_were_not_computed_have_no_section():
    whole = ["sizes", "map", "passes", "scores", "classes", "members", "notes", "open", "provenance"]
    assert Page(render(a_report())).headings() == whole
    bare = a_report(
        passes=(), scores=(), points=None, contingency=None, representatives=(), farthest=(), notes=(), facts=()
    )
    assert Page(render(bare)).headings() == ["sizes", "open", "provenance"]


NAN = math.nan
ODD = {
    "one cluster": {"k": 1},
    "fifty clusters": {"k": 50},
    "more clusters than looks": {"k": 130, "n_points": 260},
    "one pass": {"n_passes": 1},
    "three hundred passes": {"n_passes": 300},
    "no known inertia": {"passes": (PassLine(1, NAN, NAN, NAN), PassLine(2, math.inf, NAN, 1.0))},
    "inertia known now and then": {
        "passes": tuple(PassLine(i, NAN if i % 3 else 5.0, NAN if i == 1 else 0, 1) for i in range(1, 9))
    },
    "inertia of zero": {"passes": (PassLine(1, 0.0, 0.0, 0.0),)},
    "huge inertia": {"passes": (PassLine(1, 1e70, 1.0, 1.0), PassLine(2, 9e69, 0.0, 1.0))},
    "an empty split": {"sizes": {"train": (5,) * 6, "test": (0,) * 6}},
    "empty first split": {"sizes": {"train": (0,) * 6, "test": (1, 2, 3, 4, 5, 6)}},
    "no rows at all": {"sizes": {"all": (0,) * 6}},
    "one empty cluster": {"sizes": {"all": (4, 0, 1, 1, 1, 1)}},
    "all points equal": {"points": Points(np.ones(4), np.ones(4), np.zeros(4, int), ["all"] * 4, (NAN, NAN), 4)},
    "points not finite": {
        "points": Points(np.array([NAN, 1.0]), np.array([0.0, math.inf]), np.zeros(2, int), ["all"] * 2, (1, 0), 2)
    },
    "no points": {"points": Points(np.zeros(0), np.zeros(0), np.zeros(0, int), [], (0.5, 0.5), 0)},
    "a row in no cluster": {
        "points": Points(np.arange(3.0), np.arange(3.0), np.array([-1, 0, 1]), ["all"] * 3, (0.5, 0.5), 3)
    },
    "an empty class": {"contingency": Contingency(("a", "b"), np.array([[0, 0, 0], [1, 2, 3]]))},
    "scores not finite": {
        "scores": (ScoreLine("Dunn", NAN, "gap", "exact"), ScoreLine("CH", math.inf, "ratio", "exact", NAN))
    },
    "distances not finite": {"farthest": (Member(0, "a", "all", NAN), Member(0, "b", "all", math.inf))},
}


@pytest.mark.parametrize("changes", ODD.values(), ids=ODD)
def test_odd_results_are_drawn_with_finite_coordinates_and_missing_numbers_read_n_a(changes):
    html = render(a_report(**changes))
    page = Page(html)
    for _, attrs in page.elements:
        for name in COORDINATES & {key for key in attrs if not attrs[key].startswith("device")}:
            assert all(math.isfinite(float(number)) for number in re.split("[ ,]", attrs[name]))
    assert not re.search(r"\b(nan|inf|None|Undefined)\b", page.text + " ".join(map(str, page.attributes("style"))))


def test_missing_numbers_read_n_a():
    page = Page(
        render(a_report(scores=(ScoreLine("Dunn", NAN, "gap", "exact"),), passes=(PassLine(1, 2.0, NAN, NAN),)))
    )
    assert page.row("Dunn")[1] == "n/a"
    assert next(row for row in page.rows if row[0] == "1" and len(row) == 4 and row[2] == "n/a")[3] == "n/a"


def test_the_map_keeps_all_proportions_and_says_what_it_is_a_sample_of():
    report = a_report()
    page = Page(render(report))
    drawn = np.array([(float(mark["x"]), float(mark["y"])) for mark in page.marks()])
    truth = np.column_stack([report.points.x, -report.points.y])
    scale = pdist(drawn).max() / pdist(truth).max()
    assert np.allclose(pdist(drawn), scale * pdist(truth), atol=0.3)
    assert "sample of 60 of 98,133 samples" in page.text


def test_the_legend_counts_the_points_of_each_cluster():
    page = Page(render(a_report(4, n_points=10)))
    assert re.search(r"03\s+13\s+22\s+32\s", page.text)


def test_a_row_of_a_view_is_not_called_a_sample():
    assert "2 clusters of 7 rows: the largest holds 57.1 %, the smallest 42.9 %." in render(
        a_report(2, sizes={"all": (3, 4)}, noun="row")
    )


@pytest.mark.parametrize("k", [6, 50])
def test_classes_are_counted_against_clusters_with_their_totals(k):
    matrix = a_report(k).contingency.matrix
    page = Page(render(a_report(k, sizes={"all": tuple(matrix.sum(axis=0).tolist())})))
    table = [row for row in page.rows if len(row) == (4 if k == 50 else k + 2) and row[-1].isdigit()]
    shown = np.array([[int(cell) for cell in row[1:]] for row in table])
    oriented = matrix.T if k == 50 else matrix
    assert (shown[:-1, :-1] == oriented).all()
    assert (shown[-1, :-1] == oriented.sum(axis=0)).all()
    assert (shown[:-1, -1] == oriented.sum(axis=1)).all()


def test_distances_of_one_table_have_their_points_aligned():
    page = Page(render(a_report(representatives=(Member(0, "a", "all", 0.5), Member(0, "b", "all", 12.25)))))
    assert page.row("0")[0] == "0"
    assert next(row for row in page.rows if row[1:2] == ["a"])[3] == "0.50"
    assert next(row for row in page.rows if row[0] == "b")[2] == "12.25"


def test_drift_is_the_total_variation_distance_and_its_chance_level_is_what_multinomial_draws_show():
    p, n, m = np.array([0.5, 0.3, 0.2]), 400, 150
    rng = np.random.default_rng(0)
    a, b = rng.multinomial(n, p, 4000), rng.multinomial(m, p, 4000)
    expected = (np.abs(a / n - b / m).sum(axis=1) / 2).mean()
    found, chance = drift([200, 120, 80], [60, 60, 30])
    assert found == pytest.approx(cityblock([0.5, 0.3, 0.2], [0.4, 0.4, 0.2]) / 2)
    assert chance == pytest.approx(expected, rel=0.05)
    assert drift([0, 0], [1, 2]) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.31234, "0.3123"),
        (-0.5, "−0.5000"),
        (1234.567, "1,235"),
        (1187723.4, "1,187,723"),
        (1.5e12, "1.500 × 10¹²"),
        (2e-7, "2.000 × 10⁻⁷"),
        (math.nan, "n/a"),
        (-math.inf, "n/a"),
    ],
)
def test_numbers_read_with_separators_and_four_digits(value, text):
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-27.3, 15.9), (1.1877e6, 1.2077e6), (1e-9, 3e-9), (-1e70, 1e70), (5, 5.01)]
)
def test_ticks_are_round_equally_spaced_and_inside(low, high):
    ticks = nice_ticks(low, high)
    steps = np.diff(ticks)
    assert 3 <= len(ticks) <= 9
    assert low - 1e-9 * (high - low) <= ticks[0]
    assert ticks[-1] <= high + 1e-9 * (high - low)
    assert np.allclose(steps, steps[0], rtol=1e-6)
    assert round(float(f"{steps[0]:.6e}".split("e")[0]), 4) in (1, 2, 2.5, 5)


def colours(html):
    """The palettes of the light and the dark page, as (8, 3) linear RGB, and the page's own colour."""
    for root in re.findall(r":root \{(.*?)\}", html):
        found = dict(re.findall(r"--(\w+):\s*#([0-9a-f]{6})", root))
        linear = {name: linear_rgb(text) for name, text in found.items()}
        yield (
            np.array([linear[f"c{i}"] for i in range(8)]),
            np.array([linear[f"i{i}"] for i in range(8)]),
            linear["page"],
        )


def contrast(a, b):
    """WCAG 2 contrast ratio of linear RGB colours."""
    lighter, darker = np.sort([a @ [0.2126, 0.7152, 0.0722], b @ [0.2126, 0.7152, 0.0722]], axis=0)[::-1]
    return (lighter + 0.05) / (darker + 0.05)


VISION = {  # Machado, Oliveira & Fernandes 2009, severity 1
    "common": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
LMS = [[0.41222147, 0.53633254, 0.05144599], [0.21190350, 0.68069955, 0.10739696], [0.08830246, 0.28171884, 0.62997870]]
OKLAB = [
    [0.21045426, 0.79361778, -0.00407205],
    [1.97799850, -2.42859221, 0.45059371],
    [0.02590404, 0.78277177, -0.80867577],
]


OKABE_ITO = "000000 0072b2 d55e00 009e73 cc79a7 e69f00 56b4e9 f0e442"


def linear_rgb(text):
    """'rrggbb' as linear RGB (IEC 61966-2-1)."""
    value = np.array([int(text[i : i + 2], 16) for i in (0, 2, 4)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def least_difference(palette):
    """The least Oklab distance of two colours of `palette`, over all kinds of colour vision."""
    seen = [np.clip(palette @ np.transpose(matrix), 0, 1) for matrix in VISION.values()]
    return min(pdist(np.cbrt(rgb @ np.transpose(LMS)) @ np.transpose(OKLAB)).min() for rgb in seen)


def test_colours_are_told_apart_by_every_kind_of_colour_vision_better_than_the_palette_of_okabe_and_ito():
    okabe_ito = least_difference(np.array([linear_rgb(text) for text in OKABE_ITO.split()]))
    for palette, _, _ in colours(render(a_report())):
        assert least_difference(palette) > 1.2 * okabe_ito


def test_colours_stand_out_from_the_page_and_text_stands_out_from_colours():
    themes = list(colours(render(a_report())))
    assert len(themes) == 2
    for palette, inks, page in themes:
        assert (contrast(palette, np.broadcast_to(page, palette.shape)) >= 3).all()
        assert (contrast(palette, inks) >= 4.5).all()


def test_fifty_clusters_have_fifty_looks():
    marks = Page(render(a_report(50, n_points=100))).marks()
    looks = {mark["class"].split()[2]: (mark["class"].split()[1], mark["href"]) for mark in marks}
    assert len(looks) == len(set(looks.values())) == 50


def test_results_that_contradict_themselves_are_refused():
    with pytest.raises(UsageError, match="'train': 2, 'val': 1"):
        a_report(sizes={"train": (1, 2), "val": (3,)})
    with pytest.raises(UsageError, match="clusters"):
        a_report(sizes={})
    with pytest.raises(UsageError, match=r"lengths \[2, 3\]"):
        Points(np.zeros(3), np.zeros(3), np.zeros(2, int), ["all"] * 3, (0.5, 0.5), 3)
    with pytest.raises(UsageError, match=r"\(2, 3\) does not fit 1 class"):
        Contingency(("a",), np.zeros((2, 3), int))
