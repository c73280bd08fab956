"""The gallery in a real browser, where there is one."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import TOY, call, change_unets, check_refused, write_checkpoints

from dalle2.gallery import write_gallery
from dalle2.images import save_jpeg


def make_gallery(folder):
    captions = ["a red bus", 'a "blue" <b>bus</b> & sheep', "two red sheep", "a cat " + "x" * 200]
    entries = [{"file": f"no {number} #.jpg", "caption": caption, "image_id": None, "seed": number,
                "clip_score": (number * 3 % 4) / 4} for number, caption in enumerate(captions)]
    for entry in entries:
        save_jpeg(torch.full((3, 256, 256), entry["seed"] / 4), folder / entry["file"])
    save_jpeg(torch.ones(3, 64, 64), folder / "photo.png")
    nearest = [(torch.zeros(3, 256, 256, dtype=torch.uint8), 0.1 * n) for n in (3, 1, 4, 2)]
    entries[0]["photo"] = "photo.png"
    write_gallery(folder / "index.html", entries, {"cond_scale": 2.0, "seed": 0}, nearest)
    return folder / "index.html"


def test_a_folder_shows_the_pictures_of_all_calls_newest_first(run_script, clip_path, tmp_path):
    flags = write_checkpoints(tmp_path, clip_path, replace(TOY.prior, sample_timesteps=1), noise=.1,
                              unets=change_unets(*[{"sample_timesteps": 1, "image_size": 64}] * 2))
    out = tmp_path / "out"

    def render(*more):
        printed = call("test_dalle2.py", *flags, "--output_dir", out, *more)
        manifest = json.loads((out / "manifest.json").read_text())
        assert (out / "index.html").read_text().count("<figure ") == len(manifest["images"])
        return printed, manifest["settings"]["cond_scale"], [
            (entry["caption"], entry.get("settings", {}).get("cond_scale"))
            for entry in manifest["images"]]

    _, scale, shown = render("--prompt", "a/disc", "--prompt", "a box")
    assert (scale, shown) == (1.5, [("a/disc", None), ("a box", None)])
    first = (out / "a disc.jpg").read_bytes()
    printed, scale, shown = render("--prompt", "a disc", "--cond_scale", 3)  # another's file name
    assert (scale, shown) == (3, [("a disc", None), ("a/disc", 1.5), ("a box", 1.5)])
    assert "1 pictures and 2 earlier ones" in printed
    assert (out / "a disc.jpg").read_bytes() == first
    assert "cond_scale 1.5" in (out / "index.html").read_text()
    (out / "a box.jpg").unlink()
    printed, scale, shown = render("--prompt", "a/disc")  # as before
    assert (scale, shown) == (1.5, [("a/disc", None), ("a disc", 3)])
    assert "1 of 1 rendered already" in printed
    (out / "manifest.json").write_text('{"settings": {}, "images": [{"file": "a"}]}')
    check_refused(run_script("test_dalle2.py", *flags, "--output_dir", out, "--prompt", "a box"),
                  "--output_dir: .*manifest.json is damaged")


@pytest.fixture
def page(browser, tmp_path):
    page = browser.new_page()
    page.asked, page.errors = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.errors.append(error))
    page.goto(make_gallery(tmp_path).as_uri())
    yield page
    assert not page.errors
    assert all(url.startswith(("file:", "data:")) for url in page.asked), page.asked
    page.close()


def list_shown(page):
    """Captions of the figures that are shown, in the order of the page."""
    return page.eval_on_selector_all(
        "figure:not([hidden])", "figures => figures.map(f => f.querySelector('img').alt)")


@pytest.mark.slow
def test_the_page_shows_filters_orders_and_enlarges(page):
    page.wait_for_function("[...document.images].slice(0, 9).every(i => i.complete)")
    widths = page.eval_on_selector_all(".rendered img", "list => list.map(i => i.naturalWidth)")
    assert widths == [256] * 4
    assert page.locator("figure").nth(1).locator("figcaption").inner_text().startswith(
        'a "blue" <b>bus</b> & sheep')
    page.fill("input", "sheep RED")  # words in any order
    assert list_shown(page) == ["two red sheep"]
    assert page.locator("output").inner_text() == "1 of 4"
    page.fill("input", "")
    page.select_option("select", "score -1")
    scores = page.eval_on_selector_all("figure", "list => list.map(f => +f.dataset.score)")
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 4
    page.select_option("select", "nearest -1")
    assert list_shown(page)[0] == "two red sheep"
    page.locator(".rendered img").first.click()
    assert page.locator("dialog p").inner_text() == "two red sheep"
    page.locator("dialog").click()
    assert not page.locator("dialog").is_visible()


def test_a_photo_that_is_gone_is_left_out_of_the_page(tmp_path):
    entry = {"file": "a.jpg", "caption": "x", "seed": 1, "clip_score": 0.1, "photo": "photo.png"}
    for photo_is_there in (True, False):
        if photo_is_there:
            save_jpeg(torch.zeros(3, 300, 300), tmp_path / "photo.png")
        else:
            (tmp_path / "photo.png").unlink()
        write_gallery(tmp_path / "index.html", [entry], {})
        assert ("data:image" in (tmp_path / "index.html").read_text()) == photo_is_there
