"""The page in a browser: nothing is fetched, nothing overflows, pictures have words."""

import shutil

import pytest
from posterior import dense
from report.some_reports import REPORTS, made

pytest.importorskip("matplotlib")
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("no chromium", allow_module_level=True)
OPTIONS = (
    "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=[*OPTIONS])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Path of each page."""
    folder = tmp_path_factory.mktemp("pages")
    for name in REPORTS:
        made(name).save(folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in REPORTS}


@pytest.fixture
def opened(browser, pages):
    """Opens a page at a width in a colour scheme, and closes what it opened."""
    contexts = []

    def opened(width, scheme="light", name="classes", **options):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, **options
        )
        contexts.append(context)
        page, said, asked = context.new_page(), [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(pages[name].as_uri())
        return page, said, asked

    yield opened
    for context in contexts:
        context.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", REPORTS)
def test_nothing_is_said_fetched_or_cut_off(opened, pages, name, width, scheme):
    page, said, asked = opened(width, scheme, name)
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [pages[name].as_uri()]
    wide, room = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert wide <= room
    cut = """[...document.querySelectorAll('h1, h2, h3, p, figure, figcaption')].filter(
        one => one.scrollWidth > one.clientWidth + 1).map(one => one.textContent)"""
    assert page.evaluate(cut) == []


@pytest.mark.parametrize("name", REPORTS)
def test_pictures_are_drawn_and_have_words(opened, name):
    page, _, _ = opened(390, name=name)
    images = page.get_by_role("img")
    assert images.count() == page.locator("figure svg").count() >= 3
    for picture in images.all():
        assert len(picture.get_attribute("aria-label")) > 40
        box = picture.locator("svg").bounding_box()
        assert box["width"] > 250 and box["height"] > 60
    assert page.locator("img, script, iframe, link[rel=stylesheet]").count() == 0


def test_ids_are_each_used_once_and_what_is_referred_to_is_there(opened):
    page, _, _ = opened(1280)
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(one => one.id)")
    assert len(ids) == len(set(ids))
    asked = page.evaluate(
        """[...document.querySelectorAll('use')].map(one =>
            (one.getAttribute('href') || one.getAttribute('xlink:href')).slice(1))"""
    )
    assert set(asked) <= set(ids)


def luminance(colour):
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").rstrip(")").split(",")]
    parts = [p / 12.92 if p <= 0.04 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_paper(opened, scheme):
    """A ratio of 4.5, as WCAG 2 has it for text, and 3 for the lines of pictures."""
    page, _, _ = opened(1280, scheme)
    colour = "one => getComputedStyle(one).{0}"
    paper = luminance(page.locator("body").evaluate(colour.format("backgroundColor")))
    card = luminance(page.locator("figure").first.evaluate(colour.format("backgroundColor")))
    for selector, least in (("td", 4.5), ("td small", 4.5), ("figcaption", 4.5)):
        ink = luminance(page.locator(selector).last.evaluate(colour.format("color")))
        for ground in (paper, card):
            assert (max(ink, ground) + 0.05) / (min(ink, ground) + 0.05) >= least
    line = luminance(
        page.locator("figure svg path[style*='var(--c0)']").first.evaluate(
            "one => { const s = getComputedStyle(one);"
            " return s.stroke.startsWith('rgb') ? s.stroke : s.fill }"
        )
    )
    assert (max(line, card) + 0.05) / (min(line, card) + 0.05) >= 3


def test_paper_is_white_in_a_dark_room(opened):
    page, _, _ = opened(1280, "dark")
    page.emulate_media(media="print", color_scheme="dark")
    ground = page.locator("body").evaluate("one => getComputedStyle(one).backgroundColor")
    assert ground == "rgb(255, 255, 255)"


def test_without_javascript(opened):
    page, said, _ = opened(390, java_script_enabled=False)
    assert page.get_by_role("heading", level=1).is_visible() and said == []


def test_names_are_text(browser, tmp_path):
    """A parameter may be called anything; in a page it is text."""
    report = made("tag")
    assert any("<b>" in layer.name for layer in report.layers)
    report.save(tmp_path / "report.html")
    context = browser.new_context()
    page = context.new_page()
    page.goto((tmp_path / "report.html").as_uri())
    assert page.locator("b, u").count() == 0
    assert page.get_by_text("<b>&$x$.weight").count() >= 1
    context.close()


def test_a_posterior_in_a_notebook(browser):
    la, _ = dense.fit("mlp-tanh")
    context = browser.new_context(viewport={"width": 900, "height": 700})
    page = context.new_page()
    page.set_content(la._repr_html_())
    assert page.locator("table").count() == 2
    page.locator("summary").click()
    assert page.get_by_role("rowheader", name="0.weight").is_visible()
    context.close()
