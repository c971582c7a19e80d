"""The report's page: its figures by hand, its pictures, and the whole of it in a real Chromium."""

import base64
import io
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import as_if, confusion, load_script, rewrite
from PIL import Image

from cityseg_hf.cli import parse_train_args, train_command
from cityseg_hf.data.cityscapes import find_rows, read_pair
from cityseg_hf.errors import UserError
from cityseg_hf.inference import load_model_folder, segment
from cityseg_hf.labels import IGNORE, PALETTE
from cityseg_hf.report.comparison import compare, run_labels
from cityseg_hf.report.pictures import pictures_of, views
from cityseg_hf.report.reading import read_runs

pytest.importorskip("plotly", reason="the report needs plotly: pip install -e '.[report]'")
from cityseg_hf.report import figures
from cityseg_hf.report.page import command_parts, most_confused

Change = Callable[[Path], object]


def test_confusions_by_hand() -> None:
    counts = np.zeros((19, 19), dtype=np.int64)
    counts[0, :3] = 6, 3, 1
    counts[1, 1] = 5
    shares = figures.row_shares(counts)
    np.testing.assert_allclose(shares[0, :4], [0.6, 0.3, 0.1, 0])
    assert np.isnan(shares[2:]).all(), "what has no label has no share"
    assert most_confused(counts) == [("road", "sidewalk", 0.3, 3), ("road", "building", 0.1, 1)]


def test_long_curves_are_thinned_to_means(runs: Path) -> None:
    lines = [{"step": n, "epoch": n / 100, "split": "train", "loss": random.uniform(1, 2)} for n in range(1, 9001)]
    (runs / "lower/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    one = compare(read_runs([runs / "lower"])[0], "best_miou")
    (trace,) = figures.curves(one, run_labels(one))["loss"]["data"]
    assert len(trace["x"]) == figures.POINTS
    assert np.mean(trace["y"]) == pytest.approx(np.mean([line["loss"] for line in lines]), rel=1e-5)


def test_a_command_repeats_its_run(trained: Path) -> None:
    """The parser of scripts/train.py is the oracle."""
    (run,) = read_runs([trained])[0]
    assert parse_train_args(train_command(run.arguments), lambda data: None).to_dict() == run.arguments
    command = command_parts(run)
    assert command[0] == "python scripts/train.py"
    assert "--model_args norm=group 'hidden_sizes=[8,16]'" in command


def test_a_command_of_several_processes_names_the_launcher(runs: Path) -> None:
    rewrite("run.json", lambda content: content.update(num_processes=2))(runs / "lower")
    (run,) = read_runs([runs / "lower"])[0]
    assert command_parts(run)[0].startswith("ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes 2 ")


def report(runs: Path, *argv: object) -> Path:
    """Runs ``scripts/report.py``; returns its page, which lies beside the runs."""
    page = runs.parent / "report.html"
    load_script("report").main([str(word) for word in (runs, "--output", page, *argv)])
    return page


def test_what_is_left_out_is_named_in_the_terminal_and_in_the_page(runs: Path, capsys: pytest.CaptureFixture) -> None:
    (runs / "lower/results.json").unlink()
    page = report(runs, "--images", 0).read_text()
    line = "not finished, at step 6: run its command again to go on"
    assert f"{runs / 'lower'}: {line}" in capsys.readouterr().out.splitlines()
    assert f"<code>lower</code> {line}" in page
    assert "3 runs, 1 configuration<" in page


def test_without_plotly_the_extra_is_named(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script("report")
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape("the report needs plotly: pip install -e '.[report]'")):
        script.main([str(runs)])


def test_the_worst_and_the_best_images_are_predicted_again(trained: Path, streets: Path) -> None:
    """The model folder's own prediction is the oracle: errors are red where it differs from the label."""
    (run,) = read_runs([trained])[0]
    found = pictures_of([run], None, "best_miou", None, 4)
    names = sorted(row.name for row in find_rows(streets)["test"])
    assert [picture.name for picture in found.worst] == names[:2], "of three, no image is in both"
    assert [picture.name for picture in found.best] == names[2:]
    (row,) = [row for row in find_rows(streets)["test"] if row.name == names[0]]
    image, label = read_pair(row.image, row.label)
    prediction = segment(*load_model_folder(trained / "best_miou"), image)
    np.testing.assert_array_equal(decoded(found.worst[0].prediction), PALETTE[prediction])
    np.testing.assert_array_equal(decoded(found.worst[0].label), PALETTE[label])


def decoded(uri: str) -> np.ndarray:
    head, content = uri.split(",")
    assert head == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"))


def test_errors_are_red_and_void_is_black() -> None:
    label = np.zeros((64, 96), np.uint8)
    prediction = label.copy()
    prediction[:, 64:] = 1
    label[32:] = IGNORE
    errors = decoded(views(np.full((64, 96, 3), 200, np.uint8), label, prediction)[3]).astype(int)
    right, wrong, void = errors[16, 16], errors[16, 80], errors[48, 80]
    assert np.ptp(right) < 8 and wrong[0] - wrong[1] > 120 and void.max() < 12


def test_large_images_become_small_ones() -> None:
    label = np.zeros((1024, 2048), np.uint8)
    sizes = {decoded(uri).shape for uri in views(np.zeros((1024, 2048, 3), np.uint8), label, label)}
    assert sizes == {(480, 960, 3)}


WITHOUT_PICTURES = [
    ("No run has an evaluation.json", lambda runs: [path.unlink() for path in runs.glob("*/evaluation.json")], ()),
    ("no folder /no/where", lambda runs: None, ("-d", "/no/where")),
    ("there is no such folder", lambda runs: [shutil.rmtree(path) for path in runs.glob("*/best_miou")], ()),
    ("Left out by --images 0", lambda runs: None, ("--images", 0)),
]


@pytest.mark.parametrize(("line", "change", "argv"), WITHOUT_PICTURES, ids=[case[0] for case in WITHOUT_PICTURES])
def test_without_data_or_model_the_images_are_left_out(
    line: str, change: Change, argv: tuple, runs: Path, capsys: pytest.CaptureFixture
) -> None:
    change(runs)
    page = report(runs, *argv).read_text()
    assert line in page
    assert len([text for text in capsys.readouterr().out.splitlines() if line in text]) == 1


def test_a_run_of_before_costs_and_evaluations_is_shown(runs: Path) -> None:
    for file in ("cost.json", "evaluation.json", "metrics.jsonl"):
        for path in runs.glob(f"*/{file}"):
            path.unlink()
    shutil.rmtree(runs / "lower/last")
    assert "No run has an" in report(runs).read_text()


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium of the system."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    if CHROMIUM is None:
        pytest.skip("no chromium is installed: apt-get install chromium")
    quiet = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update"
    with playwright.sync_playwright() as started:
        yield started.chromium.launch(
            executable_path=CHROMIUM, args=[f"--{flag}" for flag in (*quiet.split(), "disable-sync")]
        )


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a file; at the end no error was said, and nothing but the file and what lies in it was asked for."""
    contexts, said, asked = [], [], []

    def opened(file: Path, width: int = 1440, scheme: str = "light") -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        page.set_default_timeout(15_000)
        page.wait_for_selector(".plot .xtick text")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not said
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


def scores(page: Any) -> list[str]:
    """The column of mIoU from top to bottom, without deviations."""
    return [text[:5] for text in page.locator("#leaderboard-table tbody td:nth-child(3)").all_inner_texts()]


def test_the_page_sorts_by_click_and_by_key(runs: Path, open_page: Callable[..., Any]) -> None:
    page = open_page(report(runs))
    head = page.locator("#leaderboard-table th", has_text="mIoU").first
    assert head.get_attribute("aria-sort") == "descending"
    assert scores(page) == ["60.00", "40.00"]
    head.locator("button").click()
    assert scores(page) == ["40.00", "60.00"]
    page.locator("#leaderboard-table th button", has_text="seeds").focus()
    page.keyboard.press("Enter")
    assert scores(page) == ["60.00", "40.00"]
    page.keyboard.press("Space")
    assert scores(page) == ["40.00", "60.00"]
    assert head.get_attribute("aria-sort") is None


def test_the_page_shows_the_runs_that_are_chosen(runs: Path, open_page: Callable[..., Any]) -> None:
    page = open_page(report(runs))
    curves = page.locator('[data-figure="miou"] .scatterlayer .trace')
    assert curves.count() == 4
    page.locator("#shown input").first.uncheck()
    assert curves.count() == 1
    page.locator('[data-show="0"]').click()
    assert curves.count() == 0
    page.locator("#filter").fill("0.0001")
    assert page.locator("#shown li:visible").count() == 1
    page.locator('[data-show="all"]').click()
    assert curves.count() == 1


def test_the_page_tells_the_counts_of_a_confusion(runs: Path, open_page: Callable[..., Any]) -> None:
    page = open_page(report(runs))
    plot = page.locator('[data-figure="confusion"]')
    plot.scroll_into_view_if_needed()
    box = plot.locator(".nsewdrag").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 1.5 / 19, box["y"] + box["height"] * 0.5 / 19)
    hover = plot.locator(".hoverlayer .hovertext")
    hover.wait_for()
    assert f"{confusion()[0][1]} pixels" in hover.text_content()


def test_the_page_shows_pictures_large_and_copies_commands(runs: Path, open_page: Callable[..., Any]) -> None:
    page = open_page(report(runs))
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator(".view").first.click()
    assert page.locator("dialog img").evaluate("image => image.complete && image.naturalWidth") == 128
    page.keyboard.press("Escape")
    assert not page.locator("dialog").is_visible()
    page.locator(".copy").first.click()
    page.get_by_text("Copied").wait_for()
    copied = page.evaluate("navigator.clipboard.readText()")
    (best, *_) = compare(read_runs([runs])[0], "best_miou")
    assert copied == " ".join(command_parts(best.runs[0]))


@pytest.mark.parametrize("width", [390, 1440])
def test_the_page_fits_phone_and_desk_in_the_light_and_in_the_dark(
    width: int, runs: Path, open_page: Callable[..., Any]
) -> None:
    file = report(runs)
    inks = []
    for scheme in ("light", "dark"):
        page = open_page(file, width, scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        ink = "element => getComputedStyle(element)"
        inks.append(
            (
                page.locator("body").evaluate(f"{ink}.backgroundColor"),
                page.locator('[data-figure="miou"] .xtick text').first.evaluate(f"{ink}.fill"),
                page.locator('[data-figure="classes"] .bars path').first.evaluate(f"{ink}.fill"),
            )
        )
    assert all(one != other for one, other in zip(*inks, strict=True)), "plots follow the page"
    page.emulate_media(color_scheme="light")
    ticks = page.locator('[data-figure="miou"] .xtick text')
    # Drawn anew, without loading the page again.
    pytest.importorskip("playwright.sync_api").expect(ticks.first).to_have_css("fill", inks[0][1])


def test_names_are_text_in_the_page(runs: Path, open_page: Callable[..., Any]) -> None:
    """Whatever a run is called, the browser runs none of it."""
    wicked = '</script><img src=x onerror="console.log(1)"><b>'
    as_if(runs / "lower", 0.9, model_type=wicked)
    page = open_page(report(runs, "--images", 0))
    assert wicked in page.locator("#leaderboard-table").inner_text()
