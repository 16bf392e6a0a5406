"""The Space as a visitor uses it: in a real, headless Chromium. Screenshots go to outputs/space for looking at."""

import shutil

import pytest
from conftest import ROOT

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
expect = sync_api.expect
PATIENCE = 60_000  # milliseconds: a machine that tests many things at once is slow
expect.set_options(timeout=PATIENCE)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
LOOKS = {"light": (1280, 900, "light"), "dark": (1280, 900, "dark"), "phone": (390, 844, "light")}


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, space):
    """Opens the page in a look; afterwards nothing may have gone wrong in the browser."""
    problems, contexts = [], []

    def open_page(look, model="sample"):
        width, height, theme = LOOKS[look]
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.goto(f"{space.urls[model]}/?__theme={theme}")
        page.get_by_role("heading", name="Sparse-Linear Attention").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


def shot(page, name):
    folder = ROOT / "outputs" / "space"
    folder.mkdir(parents=True, exist_ok=True)
    page.wait_for_timeout(500)
    page.screenshot(path=folder / f"{name}.png", full_page=True)


def fits(page):
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.parametrize("look", LOOKS)
def test_every_tab_works(visit, look):
    page = visit(look)
    page.get_by_role("button", name="Compare", exact=True).click()
    page.locator("progress").wait_for()
    page.locator(".cards").wait_for()
    page.get_by_text("dense | SLA, trained").wait_for()
    shown = page.locator("#side-by-side img")
    expect(shown.first).to_have_js_property("naturalWidth", 64)
    before = shown.first.get_attribute("src")
    page.get_by_role("radio", name="SLA, trained | SLA, untrained").check()
    page.get_by_text("Left: SLA, trained. Right: SLA, untrained.").wait_for()
    expect(shown.first).not_to_have_attribute("src", before)
    shot(page, f"{look}-compare")
    assert fits(page)

    page.get_by_role("tab", name="Inside").click()
    page.get_by_role("button", name="Generate and look").click()
    words = page.get_by_text("attends exactly to")
    words.wait_for()
    expect(words).to_contain_text("query block 8")
    page.get_by_label("number input for Query block").fill("3")
    page.get_by_label("number input for Query block").press("Enter")
    page.get_by_text("query block 3 attends exactly to").wait_for()
    picture = page.locator("#looks img").last
    expect(picture).to_have_js_property("naturalWidth", 512)
    size = picture.bounding_box()
    picture.click(position={"x": size["width"] / 2, "y": size["height"] - 3})
    page.get_by_text("query block 15 attends exactly to").wait_for()
    expect(page.locator("table.bars tr")).to_have_count(2)
    shot(page, f"{look}-inside")
    assert fits(page)

    open_tab(page, "Load")
    page.get_by_label("Repository").fill("../../etc/passwd")
    page.get_by_role("button", name="Load").click()
    page.get_by_text("That is no repository: its name reads user/repository.").wait_for()
    shot(page, f"{look}-load")
    assert fits(page)

    open_tab(page, "Speed")
    page.get_by_text("against the sequence length").wait_for()
    page.get_by_label("number input for Tokens").fill("1024")
    page.get_by_role("button", name="Measure").click()
    page.get_by_text("sla", exact=True).first.wait_for()
    shot(page, f"{look}-speed")
    assert fits(page)


@pytest.mark.parametrize("look", ["light", "phone"])
def test_videos_run_side_by_side_and_in_step(visit, look):
    page = visit(look, "wan")
    page.get_by_label("Prompt").first.fill("a red cat on the grass")
    page.get_by_role("button", name="Compare", exact=True).click()
    page.locator(".cards").wait_for()
    videos = page.locator("#side-by-side video")
    expect(videos).to_have_count(2)
    for i in range(2):
        expect(videos.nth(i)).to_have_js_property("videoWidth", 192)
        expect(videos.nth(i)).to_have_js_property("playsInline", True)  # so both have been started together
    expect(page.locator("#side-by-side")).to_contain_text("s/video")
    if look == "light":
        page.wait_for_function(A_LOOP_IN_STEP)
    # what a visitor does to one happens to the other
    videos.last.evaluate("video => video.pause()")
    expect(videos.first).to_have_js_property("paused", True)
    videos.last.evaluate("video => { video.currentTime = 0.5; }")
    expect(videos.first).to_have_js_property("currentTime", 0.5)
    shot(page, f"{look}-video-compare")
    videos.first.evaluate("video => { video.play(); }")
    expect(videos.last).to_have_js_property("paused", False)
    before = videos.last.get_attribute("src")
    page.get_by_role("radio", name="dense | SLA, untrained").check()
    expect(videos.last).not_to_have_attribute("src", before)
    expect(videos.first).to_have_js_property("paused", False)
    assert fits(page)

    page.get_by_role("tab", name="Inside").click()
    page.get_by_role("button", name="Generate and look").click()
    page.get_by_text("attends exactly to").wait_for()
    frame, block = (page.get_by_label(f"number input for {name}") for name in ("Frame", "Query block"))
    expect(block).to_have_value("3")
    expect(frame).to_have_value("2")  # 192 tokens lie before the block, 84 in a frame
    block.fill("6")
    block.press("Enter")
    page.get_by_text("query block 6 attends exactly to").wait_for()
    expect(frame).to_have_value("4")
    picture = page.locator("#looks img").last
    before = picture.get_attribute("src")
    frame.fill("0")
    frame.press("Enter")
    expect(picture).not_to_have_attribute("src", before)
    shot(page, f"{look}-video-inside")
    assert fits(page)


A_LOOP_IN_STEP = """
() => {
  const videos = [...document.querySelectorAll('#side-by-side video')];
  if (videos.length < 2 || videos.some((video) => video.readyState < 3)) return false;
  const apart = Math.abs(videos[0].currentTime - videos[1].currentTime);
  if (!videos[0].ends) {
    videos[0].ends = [0];
    videos[0].addEventListener('ended', () => videos[0].ends.push(0));
  }
  const ends = videos[0].ends;
  if (apart < 1) ends[ends.length - 1] = Math.max(ends[ends.length - 1], apart);
  return ends.length > 2 && ends[1] < 0.0625;
}
"""


def test_a_prompt_makes_an_image(visit):
    page = visit("light", "sdxl")
    page.get_by_label("Prompt").first.fill("")
    page.get_by_role("button", name="Compare", exact=True).click()
    page.get_by_text("Please say what to generate.").wait_for()
    page.get_by_label("Prompt").first.fill("猫 🐈 <img src=x onerror=alert(1)>")
    page.get_by_role("button", name="Compare", exact=True).click()
    page.locator(".cards").wait_for()
    expect(page.locator("#side-by-side img").first).to_have_js_property("naturalWidth", 64)
    shot(page, "light-prompt-compare")


def open_tab(page, name):
    tab = page.get_by_role("tab", name=name)
    if not tab.is_visible():
        page.locator("button.overflow-menu, .overflow-menu > button").first.click()
        tab = page.get_by_text(name, exact=True).last
    tab.click()


def test_an_example_is_computed_once(visit):
    seen = []
    for _ in range(2):
        page = visit("light")
        page.get_by_role("row", name="dog 1").click()
        page.locator(".cards").wait_for()
        seen.append(page.locator("table.numbers").first.inner_text())
        page.close()
    assert seen[0] == seen[1]  # the seconds too


def test_stop_stops(visit):
    page = visit("light")
    page.get_by_label("number input for Steps").first.fill("20")
    page.get_by_role("button", name="Compare", exact=True).click()
    page.locator("progress").wait_for()
    page.get_by_role("button", name="Stop").first.click()
    page.get_by_text("Stopped.").wait_for()
    page.wait_for_timeout(2000)
    expect(page.get_by_text("Stopped.")).to_be_visible()  # to stay
    assert page.locator(".cards").count() == 0
    shot(page, "stopped")


def test_inside_says_that_it_was_stopped_and_that_it_failed(visit):
    page = visit("light")
    page.get_by_role("tab", name="Inside").click()
    run = page.get_by_role("button", name="Generate and look")
    page.get_by_label("number input for Steps").last.fill("20")
    run.click()
    page.locator("progress").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Stopped.").wait_for()
    page.get_by_label("number input for Steps").last.fill("4")
    page.get_by_label("number input for Step to look at").fill("20")
    run.click()
    page.get_by_text("step must be a whole number from 1 to 4, got 20").wait_for()
    expect(page.get_by_text("Nothing came of it: see the message.")).to_be_visible()
    page.get_by_label("number input for Step to look at").fill("4")
    run.click()
    page.get_by_text("attends exactly to").wait_for()


def test_the_page_is_usable_by_keyboard(visit):
    page = visit("light")
    button = page.get_by_role("button", name="Compare", exact=True)
    for _ in range(40):
        page.keyboard.press("Tab")
        if button.evaluate("b => b === document.activeElement"):
            break
    else:
        raise AssertionError("Tab never reaches Compare")
    page.keyboard.press("Enter")
    page.locator(".cards").wait_for()


def test_a_visitor_who_leaves_in_the_middle_does_not_hold_up_the_next(visit):
    page = visit("light")
    page.get_by_label("number input for Steps").first.fill("20")
    page.get_by_role("button", name="Compare", exact=True).click()
    page.locator("progress").wait_for()
    page.close()
    page = visit("light")
    page.get_by_role("button", name="Compare", exact=True).click()
    page.locator(".cards").wait_for()
