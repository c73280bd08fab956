"""The page in the browser: rendering, its errors, and a real Chromium that types and clicks."""

import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from helpers import TOY, call, change_unets, check_refused, open_pipeline, write_checkpoints
from PIL import Image

from dalle2.errors import UserError
from dalle2.images import save_jpeg
from dalle2.tools import app

SETTINGS = {"seed": 5, "cond_scale": 1.5, "prior_cond_scale": 1.0, "sample_timesteps": (3, 2, 1)}


@pytest.fixture(scope="module")
def flags(clip_path, tmp_path_factory):
    """Flags that name random checkpoints of the toy preset, 3 + 2 + 1 steps by default."""
    return write_checkpoints(
        tmp_path_factory.mktemp("app"), clip_path, replace(TOY.prior, sample_timesteps=3),
        change_unets({"sample_timesteps": 2}, {"sample_timesteps": 1, "dim_mults": (1, 1, 1)}),
        noise=0.05)


@pytest.fixture(scope="module")
def pipeline(flags):
    return open_pipeline(flags)


def test_a_seed_names_a_picture_and_the_report_its_making(pipeline, monkeypatch):
    seen, embed_text = [], pipeline.clip.embed_text
    monkeypatch.setattr(pipeline.clip, "embed_text",
                        lambda tokens: seen.append(len(tokens)) or embed_text(tokens))
    picture, report = app.render(pipeline, " a red box ", **SETTINGS)
    assert seen == [1]  # prior and score share a caption's text embedding
    assert picture.shape == (256, 256, 3) and picture.dtype == np.uint8 and picture.std() > 1
    assert np.array_equal(picture, app.render(pipeline, "a red box", **SETTINGS)[0])
    for other in ({"seed": 6}, {"cond_scale": 4.0}, {"prior_cond_scale": 4.0},
                  {"sample_timesteps": (2, 2, 1)}, {"sample_timesteps": (3, 3, 1)},
                  {"sample_timesteps": (3, 2, 2)}):
        assert not np.array_equal(
            picture, app.render(pipeline, "a red box", **{**SETTINGS, **other})[0]), other
    text = app.format_report(report)
    assert f"**CLIP score {report['clip_score']:.3f}** · seed 5 · guidance 1.5" in text
    assert "| unet 2, 256 px | 1 |" in text and "| together | 6 |" in text


def test_the_picture_is_that_of_test_dalle2(pipeline, flags, tmp_path):
    call("test_dalle2.py", *flags, "--prompt", "a red box", "--output_dir", tmp_path)
    picture, _ = app.render(pipeline, "a red box", app.SEED, 1.5, TOY.prior.cond_scale, (3, 2, 1))
    save_jpeg(torch.from_numpy(picture).permute(2, 0, 1), tmp_path / "app.jpg")
    theirs, ours = (np.asarray(Image.open(tmp_path / name), dtype=int)
                    for name in ("a red box.jpg", "app.jpg"))
    assert np.array_equal(theirs, ours)


def test_what_is_missing_or_in_use_is_one_line(pipeline, run_script, monkeypatch):
    for missing in ({"prompt": " "}, {"seed": None}):
        with pytest.raises(UserError, match=f"The {next(iter(missing))} is empty"):
            app.render(pipeline, **{"prompt": "a red box", **SETTINGS, **missing})
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        check_refused(run_script("dalle2/tools/app.py", "--port", port), "--port: .*in use")
    monkeypatch.setitem(sys.modules, "gradio", None)
    check_refused(run_script("dalle2/tools/app.py", "--port", port),
                  "gradio is not installed: pip install gradio")


@pytest.mark.slow
def test_the_page_in_a_browser(browser, flags, tmp_path):
    """Prompt, button, picture, report; an empty prompt; nothing asked of another host."""
    pytest.importorskip("gradio")
    from playwright.sync_api import expect
    printed = tmp_path / "printed"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]  # a free one
    with open(printed, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "dalle2.tools.app", *flags, "--port", str(port)], stdout=file,
            stderr=subprocess.STDOUT, env={**os.environ, "GRADIO_TEMP_DIR": str(tmp_path),
                                           "http_proxy": "http://127.0.0.1:9"})
    try:
        deadline = time.monotonic() + 120
        while "http://" not in printed.read_text():
            assert process.poll() is None and time.monotonic() < deadline, printed.read_text()
            time.sleep(0.1)
        page, asked = browser.new_page(), []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"http://127.0.0.1:{port}")
        page.get_by_label("Prompt").fill("a red box")
        page.get_by_role("button", name="Render").click()
        expect(page.locator("#report")).to_contain_text("unet 2, 256 px", timeout=30_000)
        expect(page.locator("#report")).to_contain_text(
            f"seed {app.SEED} · guidance 1.5, of the prior {TOY.prior.cond_scale:g}")
        expect(page.locator("#picture img")).to_be_visible()
        page.get_by_label("Prompt").fill("  ")
        page.get_by_label("Prompt").press("Enter")
        expect(page.locator("#report")).to_contain_text("The prompt is empty")
        page.close()
    finally:
        process.terminate()
        process.wait(30)
    assert {urlsplit(url).hostname for url in asked
            if not url.startswith(("data:", "blob:"))} == {"127.0.0.1"}
