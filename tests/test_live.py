"""The page that draws while you type. python -m pytest tests/test_live.py

The browser's test needs `pip install gradio==6.31.0 selenium`, chromium and chromedriver, and is skipped without them.
LIVE_RUN=out/dog python -m pytest tests/test_live.py draws data/live.png of that run.
"""
import importlib.util
import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import sample
from conftest import ROOT, exit_of
from data import live
from test_input import run_folder
from test_sample import taught  # noqa: F401: a fixture


def test_without_gradio_one_sentence_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, said = exit_of(sample.main, ["--live", "--base", "emoji"], capsys)
    assert code == 2 and f"pip install gradio=={live.GRADIO}" in said and live.GRADIO in live.__doc__


def test_the_page_offers_every_whole_run_and_the_untouched_pair(monkeypatch, capsys):
    run_folder()()
    for name in ("old", "new", "broken"):
        shutil.copytree("run", f"out/{name}")
    os.utime("out/old/config.json", (1, 1))
    Path("out/broken/config.json").write_text("{")
    assert list(live.known_runs(sample.parse_arguments(["--live", "--run", "run"]))) == ["run", "out/new", "out/old"]
    assert list(live.known_runs(sample.parse_arguments(["--live", "--base", "emoji"]))) == ["no run: emoji as it came", "out/new", "out/old"]
    assert capsys.readouterr().err == ""


CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
missing = [name for name in ("gradio", "selenium") if not importlib.util.find_spec(name)] + [n for n, p in (("chromium", CHROMIUM), ("chromedriver", DRIVER)) if not p]


@pytest.fixture
def browser(tmp_path):
    """Headless Chromium."""
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking", "disable-component-update",
                 "disable-sync", "window-size=1100,860", f"user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield window
    window.quit()


def wait(what, seconds=60):
    end = time.time() + seconds
    while time.time() < end:
        if found := what():
            return found
        time.sleep(.1)
    pytest.fail("the page did not follow")


@pytest.mark.skipif(bool(missing), reason=f"not here: {', '.join(missing)}")
@pytest.mark.filterwarnings("ignore")  # of gradio's own libraries
def test_pictures_follow_the_typing_and_keystrokes_do_not_queue(taught, browser, monkeypatch):
    shown = os.environ.get("LIVE_RUN")
    shutil.copytree(ROOT / shown if shown else taught, "out/dog")
    said, draw = [], live.draw
    monkeypatch.setattr(live, "draw", lambda pair, prompt, *rest: said.append(prompt) or time.sleep(0 if shown else .1) or draw(pair, prompt, *rest))
    blocks = live.serve(sample.parse_arguments(["--live"]), inbrowser=False)
    try:
        def pictures(who):
            return [i.get_attribute("src") for i in browser.find_elements("css selector", f"#{who} img")]

        def words(who):
            return browser.find_element("id", who).text
        browser.get(blocks.local_url)
        first = wait(lambda: pictures("student"))
        assert len(first) == 4 and " ms" in words("student") and not pictures("teacher")
        box = browser.find_element("css selector", "#prompt textarea")
        for letter in " in a spacesuit":
            box.send_keys(letter)
        final = "a <v> dog on the beach in a spacesuit"
        wait(lambda: pictures("student") != first and said.count(final) == 4 and "does not know 'spacesuit'" in browser.find_element("tag name", "body").text)
        assert said[-1] == final and len(set(said)) < 12, "what was typed meanwhile is passed over"
        for label in browser.find_elements("css selector", "label"):
            if label.text in ("teacher", "untouched student"):
                label.click()
        wait(lambda: len(pictures("teacher")) == len(pictures("untouched-student")) == 4)
        if shown:
            time.sleep(1)
            browser.save_screenshot("live.png")
            Image.open("live.png").convert("RGB").quantize(128).save(ROOT / "data/live.png", optimize=True)
        assert not [m for m in browser.get_log("browser") if m["level"] in ("SEVERE", "WARNING")]
        events = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
        asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        assert not [u for u in asked if not u.startswith((blocks.local_url, "data:", "blob:", "chrome:"))], "the page asks no other machine"
    finally:
        blocks.close()
