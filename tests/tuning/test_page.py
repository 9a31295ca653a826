"""The reports as one HTML file each: what is in them, and what a real browser makes of them."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import os
import random
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure as Canvas

from moe_param.tuning.page import (
    Code,
    Details,
    Figure,
    Page,
    Row,
    Section,
    TableOf,
    command,
    html,
    is_number,
    table,
    write,
)
from moe_param.tuning.reports import transfer_page, tune_page
from tests.tuning.browser import REQUIRED, Tab, browser, browser_program
from tests.tuning.test_rivals import costs

ROOT = Path(__file__).parents[2]
SCRIPT = "<script>document.title = 'owned'</script><img src=x onerror=alert(1)>"
"""What an error message could hold."""


def read(path: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((ROOT / path).read_text("utf-8"))
    return record


def search(trials: int = 40) -> dict[str, Any]:
    """A grid of the committed search, made longer, with trials that diverged, raised and said too much."""
    record, draw = read("docs/figures/sweep.json"), random.Random(0)
    record["trials"] = [
        {
            "number": i,
            "status": "complete",
            "loss": 2 + (i % 20 - 12) ** 2 / 50 + draw.random() / 20,
            "seconds": 3.0,
            "process": 0,
            "point": {"learning_rate": 2.0 ** (i % 20 / 2 - 12), "init_std": 0.01 * 2 ** (i // 20)},
            "losses": {"0": 2.5, "1": 2.6},
        }
        for i in range(trials)
    ]
    record["trials"][3] |= {"status": "diverged", "loss": math.inf}
    record["trials"][4] |= {"status": "error", "loss": None, "error": f"Traceback\n  {SCRIPT}\n" + "x" * 300}
    del record["trials"][4]["losses"]
    return record


PAGES = {
    "tune": lambda: tune_page(search()),
    "constants": lambda: tune_page(read("docs/figures/sweep_constants.json")),
    "axes": lambda: transfer_page(read("recipes/evidence/transfer/results/untuned_axes/transfer.json")),
    "width": lambda: transfer_page(read("recipes/evidence/transfer/results/untuned_width/transfer.json")),
}


@functools.cache
def page_of(name: str) -> str:
    return html(PAGES[name]())


class Reader(HTMLParser):
    """What is in a page: elements with their attributes, headings, the text outside scripts and styles."""

    VOID = ("meta", "link", "br", "img", "input", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open = "", list[str]()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.text += data

    def all(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag in tags]


@pytest.fixture(scope="module", params=list(PAGES))
def page(request: pytest.FixtureRequest) -> tuple[str, Reader]:
    text = page_of(request.param)
    return text, Reader(text)


def test_every_element_is_closed_and_headings_are_in_order(page: tuple[str, Reader]) -> None:
    _, found = page
    assert found.open == []
    levels = [int(tag[1]) for tag, _ in found.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and len(levels) > 4
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_nothing_is_fetched(page: tuple[str, Reader]) -> None:
    text, found = page
    # No address of any kind, not even the name of a namespace.
    assert "://" not in text and "@import" not in text
    assert not found.all("img", "iframe", "object", "embed", "video", "audio", "base", "form")
    assert found.all("link") == [{"rel": "icon", "href": "data:,"}]
    assert found.all("script") == [{}]
    links = [value for _, attributes in found.elements for name, value in attributes.items() if name in ("href", "src")]
    assert all(link is not None and link.startswith(("#", "data:,")) for link in links)
    policy = next(meta for meta in found.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert (policy["content"] or "").startswith("default-src 'none'")


def test_pictures_say_what_they_show_and_tables_what_their_cells_are(page: tuple[str, Reader]) -> None:
    _, found = page
    pictures = [div for div in found.all("div") if div.get("role") == "img"]
    assert len(pictures) == len(found.all("svg")) > 0
    assert all(len(picture["aria-label"] or "") > 30 for picture in pictures)
    assert found.all("th") and all(cell.get("scope") in ("col", "row") for cell in found.all("th"))
    assert len(found.all("caption")) == len(found.all("table")) > 0


def test_ids_are_those_that_are_used_and_no_two_are_the_same(page: tuple[str, Reader]) -> None:
    text, found = page
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = {name for pair in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text) for name in pair if name}
    assert used == set(ids)


def test_a_page_of_200_trials_is_small() -> None:
    text = html(tune_page(search(200)))
    assert text.count("<tr") > 200
    assert len(text.encode()) < 1_500_000


def test_the_same_record_gives_the_same_page() -> None:
    for name in ("tune", "width"):
        assert html(PAGES[name]()) == page_of(name)


def test_what_is_found_is_in_it() -> None:
    text = Reader(html(tune_page(read("docs/figures/sweep.json")))).text
    assert "Best loss 2.472 nats at learning rate 2⁻⁶ with init std 0.06" in " ".join(text.split())
    assert "init_std is at the end" in text.replace("init std", "init_std") and "2.13.0" in text
    assert "python -m recipes.sweep" in text
    # Of a pass over the constants the point that was chosen is marked, whatever noise made lower.
    marked = re.findall(r'<tr class="best">.*?</tr>', page_of("constants").split("The search</h2>")[1], re.DOTALL)
    assert [Reader(row).text.split()[0] for row in marked] == ["2.4863"]
    assert min(trial["loss"] for trial in read("docs/figures/sweep_constants.json")["trials"]) < 2.48
    text = Reader(page_of("axes")).text
    assert "+0.63 ± 0.47" in text and "1.45M" in text


def test_messages_are_text() -> None:
    page = page_of("tune")
    assert SCRIPT in Reader(page).text and SCRIPT not in page
    figure = Canvas()
    figure.suptitle(SCRIPT)
    everywhere = Page(
        SCRIPT, SCRIPT, sections=(
            Section(SCRIPT, SCRIPT, (
                Figure(figure, f'"{SCRIPT}"', SCRIPT),
                Details(SCRIPT, (Code(SCRIPT, f'"{SCRIPT}"'), table([SCRIPT], [[SCRIPT]], f'"{SCRIPT}"', SCRIPT))),
            )),
        ), facts=((SCRIPT, SCRIPT),),
    )  # fmt: skip
    found = Reader(html(everywhere))
    assert found.open == [] and len(found.all("script")) == 1 and not found.all("img")


def test_the_file_s_null_is_the_record_s_infinity() -> None:
    """The page is made from the record in memory and can be made from the file."""
    record = search()
    written = json.loads(json.dumps(record).replace("Infinity", "null"))
    assert json.dumps(written) != json.dumps(record) and html(tune_page(written)) == page_of("tune")
    record = read("recipes/evidence/transfer/results/untuned_width/transfer.json")
    row = record["summary"][1]
    row["losses"]["target"] = [None] * len(row["losses"]["target"])
    row |= {"drift_octaves": None, "drift_interval": None, "regret": None, "best_loss": None, "transferred": False}
    row["optimum"]["target"] = None
    assert "diverged" in Reader(html(transfer_page(record))).text


def test_keys_of_later_records_have_sections_and_unknown_ones_do_no_harm() -> None:
    record = search(20)
    point = record["trials"][0]["point"]
    record["best"] |= {
        "moves": [{"stage": "zoom", "point": point, "loss": 2.0}],
        "spent_in": {"zoom": 11.5, "constants": 31.0},
        "rungs": [{"rate": 2 * point["learning_rate"], "losses": [2.5, None]}],
    }
    record["best"]["of_tomorrow"], record["tomorrow"] = 1, {"a": [1]}
    text = Reader(html(tune_page(record))).text
    assert "31.0" in text and "2.5000" in text
    record = read("recipes/evidence/transfer/results/untuned_width/transfer.json")
    record["costs"] = [costs(20).to_dict(), costs(None).to_dict()]
    record["summary"][0] |= {"transferred": "undecided", "why": "more --seeds would tell", "regret_interval": [0, 0.03]}
    record["tomorrow"] = [{"a": 1}]
    text = Reader(html(transfer_page(record))).text
    assert "standard with the base's constants" in text and "6.00e+11" in text and "Computed, not run" in text
    assert "more --seeds would tell" in text and "at most 3.00%" in text


def test_pages_do_not_change_what_they_are_given() -> None:
    record = search(20)
    before = copy.deepcopy(record)
    tune_page(record)
    assert record == before


def test_numbers_are_told_from_words() -> None:
    for cell in ("1.25", "+0.42 ± 8.98", "−0.36", "2⁻⁶", "0.75%", "1,024", "×3.1", "1.45M", "diverged", "–", "1e-12"):
        assert is_number(cell), cell
    for cell in ("width=4", "2 of 3", "yes", "2.5 2.6", "moe-completep"):
        assert not is_number(cell), cell
    rows = (Row(("a", "1", "")), Row(("b", "diverged", "")))
    assert TableOf(("x", "y", "z"), rows, "t").numeric == (False, True, False)


def test_a_long_command_is_the_same_command_on_several_lines() -> None:
    import shlex

    text = "moe-param tune 'a b.yaml' --log2_lrs -9 -8 --ladders '{\"router\": {\"lr\": [1, 4]}}' --output_dir 'it is'"
    code = command(text).text
    assert "\n" in code and shlex.split(code.replace("\\\n", " ")) == shlex.split(text)
    assert command("moe-param tune x").text == "moe-param tune x"


def test_a_file_is_the_old_page_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    write(path, Page("one", "first"))
    before = path.read_text("utf-8")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write(path, Page("two", "second"))
    assert path.read_text("utf-8") == before and list(tmp_path.iterdir()) == [path]


# -- in a browser ------------------------------------------------------------------------------------------------------
in_browser = [pytest.mark.slow, pytest.mark.xdist_group("browser")]


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    if browser_program() is None:
        reason = "no Chromium: install it, or name one in the environment variable MOE_PARAM_BROWSER"
        if os.environ.get(REQUIRED):
            pytest.fail(reason)
        pytest.skip(reason)
    with browser() as running:
        yield running


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pages")
    for name in PAGES:
        (folder / f"{name}.html").write_text(page_of(name), "utf-8")
    return {name: (folder / f"{name}.html").as_uri() for name in PAGES}


CONTRAST = """(() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = rgb => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => {
    const x = rgb[i] / 255;
    return sum + weight * (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  }, 0);
  const ratio = (a, b) => {
    const [dark, light] = [luminance(rgba(a)), luminance(rgba(b))].sort((x, y) => x - y);
    return (light + 0.05) / (dark + 0.05);
  };
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (rgba(colour)[3] === 255) return colour;
    }
    return "white";
  };
  for (const details of document.querySelectorAll("details")) details.open = true;
  const poor = [];
  for (const element of document.querySelectorAll("body *:not(script)")) {
    const says = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (!says) continue;
    const style = getComputedStyle(element), inside = element.closest("svg");
    const found = ratio(inside ? style.fill : style.color, behind(element));
    if (found < 4.5) poor.push([element.tagName, element.textContent.slice(0, 40), found]);
  }
  const root = getComputedStyle(document.documentElement);
  for (const name of ["blue", "orange", "green", "red", "purple", "brown", "pink", "grey", "olive", "cyan"]) {
    const found = ratio(root.getPropertyValue(`--${name}`), root.getPropertyValue("--paper"));
    if (!(found >= 3)) poor.push([name, "a line of a picture", found]);
  }
  return poor;
})()"""


class TestInABrowser:
    pytestmark = in_browser

    @pytest.mark.parametrize("name", list(PAGES))
    @pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1200, False), (1200, True)])
    def test_it_opens_and_fits(self, tab: Tab, files: dict[str, str], name: str, width: int, dark: bool) -> None:
        tab.open(files[name], width=width, dark=dark)
        assert tab.run("document.querySelector('h1').textContent.length") > 5  # not the browser's own error page
        assert tab.said() == []
        assert tab.requested() == [files[name]]
        assert tab.run("innerWidth") == width
        sideways = "Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)"
        assert tab.run(sideways) <= width
        tab.run("document.querySelectorAll('details').forEach(details => { details.open = true; })")
        assert tab.run(sideways) <= width
        sizes = tab.run("[...document.querySelectorAll('svg')].map(s => [s.clientWidth, s.clientHeight])")
        assert sizes and all(w > 200 and h > 100 for w, h in sizes)
        # Letters of a picture, as they are on the screen.
        letters = "[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height)"
        assert min(tab.run(letters)) >= 7
        # The title, the lead and the big numbers come before one scrolls.
        assert tab.run("document.querySelector('.verdicts').getBoundingClientRect().top") < 500
        assert tab.run(CONTRAST) == []
        background = tab.run("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") is (not dark)

    def test_the_button_copies(self, tab: Tab, files: dict[str, str]) -> None:
        tab.open(files["tune"])
        permissions = ["clipboardReadWrite", "clipboardSanitizedWrite"]
        tab.call("Browser.grantPermissions", permissions=permissions)
        tab.call("Page.bringToFront")
        wanted = tab.run("[...document.querySelectorAll('.code code')].map(c => c.textContent)")
        assert len(wanted) == tab.run("document.querySelectorAll('.code button').length") > 2
        for i in range(len(wanted)):
            tab.run(f"document.querySelectorAll('.code button')[{i}].click()")
            wait = "new Promise(done => setTimeout(done, 50))"
            tab.run(wait)
            assert tab.run("navigator.clipboard.readText()") == wanted[i]
            assert tab.run(f"document.querySelectorAll('.code button')[{i}].textContent") == "Copied"
        # Where there is no such interface, the old way.
        tab.run("navigator.clipboard.writeText = () => Promise.reject(new Error('no'))")
        tab.run(f"document.querySelectorAll('.code button')[0].click(); {wait}")
        assert tab.run("navigator.clipboard.readText()") == wanted[0]

    def test_a_message_does_nothing(self, tab: Tab, files: dict[str, str]) -> None:
        tab.open(files["tune"])
        assert "Tuned" in tab.run("document.title")
        assert tab.run("document.body.textContent.includes('onerror=alert(1)')")

    def test_paper_has_all_of_it(self, tab: Tab, files: dict[str, str]) -> None:
        tab.open(files["constants"], dark=True)
        closed = tab.run("document.querySelectorAll('details:not([open])').length")
        pdf = tab.call("Page.printToPDF")["data"]
        assert closed > 0 and len(pdf) > 10_000
        assert tab.run("document.querySelectorAll('details:not([open])').length") == 0

    def test_what_is_wrong_is_seen(self, tab: Tab, tmp_path: Path) -> None:
        """The checks above, on a page with everything against them."""
        page = tmp_path / "bad.html"
        page.write_text(
            "<!doctype html><meta name=viewport content='width=device-width'><h1>Wrong</h1>"
            "<script>console.error('no')</script><img src='http://127.0.0.1:9/x.png'>"
            "<p style='color: #999; background: #aaa'>faint</p><div style='width: 2000px'>wide</div>"
        )
        tab.open(page.as_uri(), width=390)
        assert any("no" in line for line in tab.said())
        assert "http://127.0.0.1:9/x.png" in tab.requested()
        assert tab.run("document.documentElement.scrollWidth") > 390
        assert any(found[0] == "P" for found in tab.run(CONTRAST))

    def test_an_injected_script_would_not_run(self, tab: Tab, tmp_path: Path) -> None:
        """If a message were not escaped after all."""
        page = tmp_path / "injected.html"
        page.write_text(html(Page("Safe", "MARK")).replace("MARK", "<script>document.title = 'owned'</script>"))
        tab.open(page.as_uri())
        assert tab.run("document.title") == "Safe"
        assert any("Content Security Policy" in line for line in tab.said())
