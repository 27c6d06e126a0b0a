"""The live dashboard, the saved dask report and the run's report, as a real browser shows them.

What is compared is what the browser got: the data of the task stream that came over the dashboard's websocket or with
the saved page. Numbers of chunks and blocks that it is held against are those that zarr says.

With TSCLUST_SCREENSHOTS=DIR pictures of the pages are left there, to be looked at.
"""

import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import zarr
from datasets import three_splits, write_source
from sources import OPTIONS

from tsclust_ooc.pipeline.clustering import ClusterOptions, cluster
from tsclust_ooc.pipeline.consolidating import consolidate
from tsclust_ooc.pipeline.distancing import DistancesOptions, distances

SIZES = {"train": 420, "val": 42, "test": 21}
SIDE = 60
"""Rows of a block of distances."""

# distributed leaves a connection that was being made to a worker when that was killed to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <ssl.SSLSocket:ResourceWarning")

TASKS = """(() => {
    const figure = window.Bokeh?.documents[0]?.get_model_by_name("task_stream");
    const {name, key} = figure ? figure.renderers[0].data_source.data : {name: [], key: []};
    return Array.from(name, (label, i) => [label, String(key[i])]);
})()"""
"""Name and key of every rectangle of the task stream."""

DEEP = """(wanted) => {
    const below = (root) => [...root.querySelectorAll("*")].flatMap(
        (e) => [...(e.matches(wanted) ? [e] : []), ...(e.shadowRoot ? below(e.shadowRoot) : [])]);
    return below(document).filter((e) => e.checkVisibility({visibilityProperty: true}));
}"""
"""All visible elements of a CSS selector, those in the shadow roots of Bokeh's widgets included."""

PLOTS = f"""({DEEP})("canvas").filter((canvas) => {{
    const {{width, height}} = canvas.getBoundingClientRect();
    return width * height > 0;
}})"""
"""The visible canvases."""

COLOURFUL = f"""{PLOTS}.some((canvas) => {{
    const {{data}} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    for (let i = 0; i < data.length; i += 4) {{
        const [r, g, b, opacity] = data.subarray(i, i + 4);
        if (opacity && Math.max(r, g, b) - Math.min(r, g, b) > 40) return true;
    }}
    return false;
}})"""
"""Whether something is drawn on one of them: frames, axes and words are grey."""


def shot(page, name, **how):
    """A picture of the page, where they are wanted."""
    if folder := os.environ.get("TSCLUST_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(Path(folder) / f"{name}.png", **how)


def shown_tasks(page):
    """Task name -> number of different tasks that the page's task stream shows. A task may have several rectangles."""
    tasks = {(name, key) for name, key in page.evaluate(TASKS) if key != "start"}  # that one makes the empty figure
    return Counter(name for name, _ in tasks if not name.startswith(("transfer-", "deserialize-")))


class Watching:
    """A listener that opens the dashboard when it is told of, and closes it when the page shows the tasks of a stage.

    The command stands still while it looks, with tasks before and behind, so that nothing depends on who is faster.
    """

    def __init__(self, browser, stage, task, n_tasks=1):
        self.browser, self.stage, self.task, self.n_tasks = browser, stage, task, n_tasks
        self.message, self.page, self.is_open = "", None, False
        self.n_shown_early, self.tasks = 0, Counter()

    def say(self, message):
        if message.startswith("dashboard http://127.0.0.1:"):
            self.message = message
            self.page, self.is_open = self.browser.open(message.split()[1]), True
            self.page.wait_for("window.Bokeh?.documents.length && Bokeh.documents[0].is_idle")

    def advance(self, stage, done, total):
        if stage != self.stage or not self.is_open:
            return
        if not self.n_shown_early:
            self.page.wait_for(self._shows(1))
            self.n_shown_early = shown_tasks(self.page)[self.task]
        if done == total:
            self.page.wait_for(f"{self._shows(self.n_tasks)} && {COLOURFUL}")
            self.tasks = shown_tasks(self.page)
            shot(self.page, f"live-{self.stage}")
            self.page.close()  # before it looks in vain for a dashboard that has ended
            self.is_open = False

    def _shows(self, n):
        return f"{TASKS}.filter(([name]) => name === '{self.task}').length >= {n}"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("dashboard")


@pytest.fixture(scope="module")
def consolidated(browser, place):
    source = write_source(place / "source", three_splits(sizes=SIZES))
    watching = Watching(browser, "write", "stage-write-chunk")
    options = replace(OPTIONS, stage="always", scheduler="local", workers=1, memory="2GB", scratch=place)
    consolidate(source, place / "dataset", options, watching)
    return watching


@pytest.fixture(scope="module")
def n_chunks(consolidated, place):
    """Split -> chunks, as zarr says."""
    stored = zarr.open_group(place / "dataset/data.zarr", mode="r")
    return {name: stored[f"{name}/embeddings"].nchunks for name in SIZES}


@pytest.fixture(scope="module")
def clustered(browser, place, n_chunks):
    watching = Watching(browser, "pass", "lloyd-pass", n_chunks["train"])
    options = ClusterOptions(scheduler="local", workers=2, memory="2GB", scratch=place)
    cluster(place / "dataset", place / "run", 4, options, watching)
    return watching


@pytest.fixture(scope="module")
def distanced(browser, place, consolidated):
    watching = Watching(browser, "distances", "pairwise-block", 28)  # 7 x 7, of which one half
    options = DistancesOptions(
        scheduler="local", workers=1, memory="2GB", scratch=place, split="train", block_bytes=str(4 * SIDE * SIDE)
    )
    distances(place / "dataset", place / "distances", options, watching)
    return watching


COMMANDS = ["consolidated", "clustered", "distanced"]


@pytest.fixture(params=COMMANDS)
def watched(request):
    return request.getfixturevalue(request.param)


# while it runs


@pytest.mark.parametrize(
    ("command", "task"),
    [("consolidated", "stage-write-chunk"), ("clustered", "lloyd-pass"), ("distanced", "pairwise-block")],
)
def test_the_live_dashboard_shows_tasks_under_the_names_of_the_pipeline(request, command, task):
    watched = request.getfixturevalue(command)
    assert watched.n_shown_early > 0
    assert watched.tasks[task] >= watched.n_tasks


def test_the_live_dashboard_loads_from_its_own_address_only_and_without_errors(watched):
    address = re.match(r"dashboard http://(127\.0\.0\.1:\d+)/status", watched.message).group(1)
    elsewhere = [url for url in watched.page.requests if not url.startswith((f"http://{address}/", "data:"))]
    assert elsewhere == [f"ws://{address}/status/ws"]
    assert (watched.page.failures, watched.page.errors) == ([], [])


def test_the_ssh_line_leads_to_the_port_of_the_dashboard_that_answered(watched):
    port = re.search(r"http://127\.0\.0\.1:(\d+)/status\n", watched.message).group(1)
    assert watched.page.requests[0] == f"http://127.0.0.1:{port}/status"
    told = watched.message.split("\n")[1]
    assert re.search(rf"ssh -N -L 8787:127\.0\.0\.1:{port} .+ then open http://127\.0\.0\.1:8787/status$", told)


def test_tasks_are_blocks_and_never_rows_or_shards(consolidated, clustered, distanced, n_chunks):
    assert 1 <= consolidated.tasks["stage-write-chunk"] <= sum(n_chunks.values())
    assert clustered.tasks["sample"] == n_chunks["train"]
    assert clustered.tasks["lloyd-pass"] == n_chunks["train"]  # of one pass
    side = -(-SIZES["train"] // SIDE)
    assert distanced.tasks["pairwise-block"] == side * (side + 1) // 2
    n_shards = sum(SIZES.values())
    assert all(sum(watched.tasks.values()) < n_shards / 4 for watched in (consolidated, clustered, distanced))


# what is kept of it


@pytest.fixture(scope="module")
def saved(browser, clustered, place):
    """The saved dask report, opened from its file, without a network."""
    page = browser.open((place / "run/dask-report.html").as_uri(), offline=True)
    page.wait_for("window.Bokeh?.documents.length && Bokeh.documents[0].is_idle")
    yield page
    page.close()


def the_file_alone(page):
    """Nothing was asked for but the file itself, and nothing went wrong."""
    outside = [url for url in page.requests[1:] if not url.startswith(("data:", "blob:"))]
    assert page.requests[0].startswith("file:///")
    return (outside, page.failures, page.errors) == ([], [], [])


def test_the_saved_dask_report_opens_offline_and_holds_every_task_by_name(saved, clustered, n_chunks, place):
    tasks = shown_tasks(saved)
    assert the_file_alone(saved)
    n_passes = tasks["lloyd-pass"] // n_chunks["train"]
    assert n_passes >= 2
    named = {name: n for name, n in tasks.items() if not name.startswith("carry-")}
    assert named == {
        "sample": n_chunks["train"], "lloyd-pass": n_passes * n_chunks["train"],
        "label-val": n_chunks["val"], "label-test": n_chunks["test"],
    }  # fmt: skip


def test_every_tab_of_the_saved_dask_report_opens_and_is_drawn(saved):
    titles = saved.evaluate(f"({DEEP})('.bk-tab').map((tab) => tab.innerText)")
    assert titles[:2] == ["Summary", "Task Stream"]
    assert "Dask Performance Report" in saved.evaluate(f"({DEEP})('h1').map((h) => h.innerText)")
    for number, title in enumerate(titles):
        box = saved.evaluate(f"({DEEP})('.bk-tab')[{number}].getBoundingClientRect().toJSON()")
        saved.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        saved.wait_for(f"Bokeh.documents[0].roots()[0].active === {number}")
        if title not in ("Summary", "Scheduler Logs"):  # these two are text
            saved.wait_for(f"{PLOTS}.length > 0")
        if title in ("Task Stream", "System"):  # the others have nothing to show of a run that is short enough
            saved.wait_for(COLOURFUL)
        shot(saved, f"dask-report-{number}-{re.sub('[^a-z]+', '-', title.lower()).strip('-')}")
    assert the_file_alone(saved)


def test_the_report_of_the_run_opens_offline_with_every_picture_drawn(browser, clustered, place):
    page = browser.open((place / "run/report.html").as_uri(), offline=True)
    shot(page, "report", whole=True)
    drawn = page.evaluate("""[...document.querySelectorAll("svg[role=img], img")].map((picture) => {
        const {width, height} = picture.getBoundingClientRect();
        const shapes = [...picture.querySelectorAll("rect, circle, path, use, polyline, line, image")];
        return [width, height, picture.naturalWidth ?? shapes.filter((s) => s.getBoundingClientRect().width).length];
    })""")
    assert len(drawn) >= 3
    assert all(min(picture) > 0 for picture in drawn)
    assert the_file_alone(page)
    page.close()


def test_a_page_that_does_ask_for_the_network_is_caught(browser, tmp_path):
    (tmp_path / "page.html").write_text(
        "<script src='http://127.0.0.1:9/a.js'></script><script>console.error('bad'); missing()</script>"
    )
    page = browser.open((tmp_path / "page.html").as_uri(), offline=True)
    assert "http://127.0.0.1:9/a.js" in page.requests
    assert page.failures == ["Script: inspector"]
    assert page.errors[0] == "bad"
    assert "missing is not defined" in page.errors[1]
    assert not the_file_alone(page)
    page.close()
