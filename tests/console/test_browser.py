"""The console in a real Chromium: by mouse, by keyboard, on a phone, in the dark, and when the host goes away."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Locator, Page, expect

from lab.browser import browser, chromium
from lab.simulated import SimulatedHost
from storaged.errors import Kind, StoragedError
from storaged.host.console.limits import Limits
from storaged.rpc.proto import storaged_host_v1_pb2 as pb
from storaged.units import GIB
from tests.console.told import Served, ToldHost, guest, pool, running

if chromium() is None:
    pytest.skip("needs chromium (the package of that name)", allow_module_level=True)

expect.set_options(timeout=20_000)


@pytest.fixture(scope="module")
def running_browser() -> Iterator[Browser]:
    with browser() as running:
        yield running


@pytest.fixture
def served() -> Iterator[Served]:
    with Served(ToldHost()) as served:
        yield served


@pytest.fixture
def page(running_browser: Browser) -> Iterator[Page]:
    context = running_browser.new_context(viewport={"width": 1200, "height": 900}, reduced_motion="reduce")
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    yield page
    context.close()
    # What fails on purpose is told to the console by the browser itself.
    assert [text for text in complaints if "Failed to load resource" not in text and "CORS policy" not in text] == []


def opened(page: Page, served: Served, name: str = "web") -> Locator:
    """The page, and a guest's card on it."""
    page.goto(served.console.link())
    card = page.get_by_role("article", name=name, exact=True)
    expect(card).to_be_visible()
    return card


def number(card: Locator, label: str) -> str:
    """What stands under a label."""
    return card.locator("dl div", has=card.page.get_by_text(label, exact=True)).locator("dd").inner_text()


def test_every_number_of_a_guest_and_its_pool_is_there(page: Page, served: Served) -> None:
    card = opened(page, served)
    found = {
        label: number(card, label)
        for label in ("Size", "Costs the host", "Balloon", "Available", "Smallest size", "Without moving data")
    }
    assert list(found.values()) == ["40.0 GiB", "14.0 GiB", "20.0 GiB", "10.0 GiB", "12.0 GiB", "24.0 GiB"]
    expect(card.get_by_role("img")).to_have_accessible_name(
        "40.0 GiB: 10.0 GiB in use, 20.0 GiB balloon, 10.0 GiB available"
    )
    widths = [card.locator(f".bar .{part}").bounding_box() for part in ("used", "balloon", "free")]
    used, held, free = (box["width"] if box else 0 for box in widths)
    assert held == pytest.approx(2 * used, rel=0.05)
    assert free == pytest.approx(used, rel=0.05)
    vms = page.get_by_role("article", name=re.compile("vms"))
    assert number(vms, "Free") == "30.0 GiB"
    expect(vms.get_by_text("pressure normal")).to_be_visible()


def test_what_changes_on_the_host_changes_on_the_page(page: Page, served: Served) -> None:
    card = opened(page, served)
    served.host.guests = [guest(balloon_bytes=25 * GIB, available_bytes=5 * GIB), guest("new")]
    served.host.pools = [pool(free_bytes=GIB, level=pb.LEVEL_CRITICAL, promise_holds=False)]
    expect(card.get_by_text("25.0 GiB")).to_be_visible()
    expect(page.get_by_role("article", name="new", exact=True)).to_be_visible()
    expect(page.get_by_text("pressure CRITICAL", exact=True)).to_be_visible()
    expect(page.get_by_text("does not fit into what is free")).to_be_visible()
    expect(page.get_by_role("status")).to_have_text("Pool vms: pressure CRITICAL")
    served.host.guests = [guest("new")]
    expect(card).to_have_count(0)


def test_the_history_shows_when_it_was_low(page: Page, served: Served) -> None:
    opened(page, served)
    vms = page.get_by_role("article", name=re.compile("vms"))
    expect(vms.get_by_role("img")).to_have_accessible_name(re.compile("between 2.00 GiB and 30.0 GiB, now 30.0 GiB"))
    expect(vms.locator("svg rect.low")).to_have_count(1)
    vms.get_by_text("Changes of the level").click()
    expect(vms.get_by_role("listitem").nth(1)).to_have_text(re.compile("LOW, 2.00 GiB free"))


def test_a_resize_by_keyboard_alone(page: Page, served: Served) -> None:
    card = opened(page, served)
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent") == "Resize web":
            break
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    slider = card.get_by_role("slider", name="New size")
    expect(slider).to_be_focused()
    page.keyboard.press("Home")
    expect(card.locator("output")).to_have_text("12.0 GiB")
    expect(slider).to_have_attribute("aria-valuetext", re.compile("12.0 GiB, Returns 28.0 GiB to the host"))
    page.keyboard.press("ArrowRight")
    expect(card.locator("output")).not_to_have_text("12.0 GiB")
    page.keyboard.press("Home")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    expect(card.get_by_role("button", name="Shrink web to 12.0 GiB")).to_be_focused()
    page.keyboard.press("Enter")
    cancel = card.get_by_role("button", name="Cancel the resize of web")
    expect(cancel).to_be_focused()  # where it was is gone: whoever is there must not be sent to the top
    expect(card.get_by_role("progressbar", name="Resize of web")).to_have_attribute("value", "0.25")
    expect(card.get_by_text("25 %, resizing the filesystem, 200 MiB/s, 1 min 15 s left")).to_be_visible()
    page.keyboard.press("Enter")
    expect(card.get_by_text("The resize of web to 12.0 GiB was cancelled; it has 40.0 GiB")).to_be_visible()
    expect(card.get_by_role("heading", name="web")).to_be_focused()
    expect(page.get_by_role("status")).to_have_text(re.compile("was cancelled; it has 40.0 GiB"))
    assert served.host.calls == [("resize", "web", 12 * GIB), ("cancel", "web", "r-web")]


def test_the_slider_ends_at_what_can_be(page: Page, served: Served) -> None:
    card = opened(page, served)
    card.get_by_text("Resize web").click()
    slider = card.get_by_role("slider")
    slider.press("End")  # the pool has 30 GiB free, of which 2 are the reserve
    expect(card.locator("output")).to_have_text("68.0 GiB")
    expect(card.get_by_text("Takes up to 28.0 GiB from the host, as the guest writes.")).to_be_visible()
    slider.press("Home")
    expect(card.get_by_text("Returns 28.0 GiB to the host: up to 4.00 GiB of it is stored")).to_be_visible()
    tick, rail = card.locator(".tick").bounding_box(), card.locator(".rail").bounding_box()
    assert tick is not None
    assert rail is not None
    assert (tick["x"] - rail["x"]) / rail["width"] == pytest.approx((24 - 12) / (68 - 12), abs=0.03)


def test_a_size_may_be_typed(page: Page, served: Served) -> None:
    card = opened(page, served)
    card.get_by_text("Resize web").click()
    exact = card.get_by_role("textbox")
    exact.fill("many")
    expect(card.get_by_role("alert").get_by_text("That is not a size")).to_be_visible()
    exact.fill("1G")
    expect(card.get_by_text("It cannot be smaller than 12.0 GiB.")).to_be_visible()
    expect(card.get_by_role("button")).to_be_disabled()
    exact.fill("32G")
    card.get_by_role("button", name="Shrink web to 32.0 GiB").click()
    expect(card.get_by_role("progressbar")).to_be_visible()
    assert served.host.calls == [("resize", "web", 32 * GIB)]


def test_more_than_the_pools_limit_has_to_be_agreed_to(page: Page, served: Served) -> None:
    served.host.pools = [pool(sizes_bytes=40 * GIB, sizes_limit_bytes=60 * GIB)]
    card = opened(page, served)
    card.get_by_text("Resize web").click()
    exact, allow = card.get_by_role("textbox"), card.get_by_role("checkbox")
    exact.fill("60G")
    expect(allow).to_be_hidden()
    expect(card.get_by_role("button", name="Grow web")).to_be_enabled()
    exact.fill("10T")
    expect(card.get_by_text("would be promised 10.0 TiB; its limit is 60.0 GiB")).to_be_visible()
    expect(card.get_by_role("button", name="Grow web")).to_be_disabled()
    allow.check()
    assert Axe().run(page).violations_count == 0
    card.get_by_role("button", name="Grow web").click()
    expect(card.get_by_role("progressbar")).to_be_visible()
    assert served.host.calls == [("overcommit", "web", 10 << 40)]


def test_a_page_too_many_says_so(page: Page, running_browser: Browser) -> None:
    with Served(ToldHost(), limits=Limits(streams_per_peer=1)) as served:
        opened(page, served)
        context = running_browser.new_context()
        other = context.new_page()
        other.goto(served.console.link())
        expect(other.get_by_role("alert").filter(has_text="127.0.0.1 has 1 live pages")).to_be_visible()
        page.goto("about:blank")
        expect(other.get_by_role("article", name="web", exact=True)).to_be_visible()
        context.close()


def test_what_the_host_refuses_is_said_beside_the_button(page: Page, served: Served) -> None:
    card = opened(page, served)
    served.host.refuses = StoragedError("web does not answer: start its agent, then try again", Kind.UNAVAILABLE)
    card.get_by_text("Resize web").click()
    card.get_by_role("textbox").fill("32G")
    card.get_by_role("button", name="Shrink web").click()
    expect(card.get_by_role("alert").get_by_text("start its agent, then try again")).to_be_visible()
    expect(card.get_by_role("button", name="Shrink web")).to_be_enabled()


def test_a_guest_that_is_silent_or_cannot_be_resized_says_so(page: Page, served: Served) -> None:
    served.host.guests = [
        guest(
            state=pb.GUEST_HANGING,
            stale_reason="its agent does not answer",
            report_age_s=90.0,
            resizable=False,
            not_resizable_reason="its agent does not answer",
        ),
        pb.Guest(name="other", pool="vms", state=pb.GUEST_UP, logical_bytes=8 * GIB, allocated_bytes=GIB),
    ]
    card = opened(page, served)
    expect(
        card.get_by_text(re.compile(r"The guest's numbers are from [\d:]+: its agent does not answer"))
    ).to_be_visible()
    expect(card.get_by_text("It cannot be resized now: its agent does not answer.")).to_be_visible()
    expect(card.get_by_text("Resize web")).to_be_hidden()
    other = page.get_by_role("article", name="other", exact=True)
    assert number(other, "Balloon") == "not known"


def test_a_host_that_goes_away_makes_the_numbers_old(page: Page, served: Served) -> None:
    card = opened(page, served)
    card.get_by_text("Resize web").click()
    card.get_by_role("slider").press("Home")
    expect(card.get_by_role("button", name="Shrink web")).to_be_enabled()
    served.host.down = "storaged-host cannot be reached; is it running?"
    banner = page.get_by_role("alert").filter(has_text="These numbers are old")
    expect(banner).to_contain_text("storaged-host cannot be reached; is it running?")
    expect(page.get_by_text("Not live")).to_be_visible()
    expect(card.get_by_role("button", name="Shrink web")).to_be_disabled()
    served.host.down = ""
    expect(banner).to_be_hidden()
    expect(card.get_by_role("button", name="Shrink web")).to_be_enabled()


@pytest.fixture
def foreign() -> Iterator[str]:
    """Somebody else's page, on this machine too, so that nothing but us is in its way."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>Not ours</title>")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://localhost:{server.server_port}/"
    server.shutdown()
    server.server_close()


def test_a_foreign_page_cannot_resize(page: Page, served: Served, foreign: str) -> None:
    """The browser sends what a foreign page asks for, but says who asked; and it keeps our answers to itself."""
    page.goto(foreign)
    url = f"http://127.0.0.1:{served.port}/api/guests/web/resize"
    with page.expect_event("requestfailed", lambda request: request.url == url, timeout=10_000) as asked:
        page.evaluate(
            "url => fetch(url, {method: 'POST', mode: 'no-cors', body: '{\"size\": 1073741824}'})"
            ".then(() => 1, () => 0)",
            url,
        )
    assert "BLOCKED_BY_RESPONSE" in (asked.value.failure or "")  # it went to us; what we said was kept from the page
    assert "another page" in served.ask("POST", "/api/guests/web/resize", {}, sec_fetch_site="cross-site")[2]["error"]
    read = "url => fetch(url).then(answer => answer.text(), () => 'nothing')"
    assert page.evaluate(read, f"http://127.0.0.1:{served.port}/api/session") == "nothing"
    assert served.host.calls == []


def test_signing_in(page: Page, tmp_path: Path) -> None:
    from storaged.host.console.settings import ConsoleSettings

    (tmp_path / "token").write_text("correct-horse-battery-staple")
    (tmp_path / "token").chmod(0o600)
    with Served(ToldHost(), ConsoleSettings("tcp:127.0.0.1:0", token_file=str(tmp_path / "token"))) as served:
        page.goto(served.url)
        expect(page.get_by_label("Token")).to_be_focused()
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_text("that is not the console's token")).to_be_visible()
        page.get_by_label("Token").fill("correct-horse-battery-staple")
        page.keyboard.press("Enter")
        expect(page.get_by_role("article", name="web", exact=True)).to_be_visible()
        page.get_by_role("button", name="Sign out").click()
        expect(page.get_by_label("Token")).to_be_focused()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1200])
def test_axe_finds_nothing(running_browser: Browser, served: Served, scheme: str, width: int) -> None:
    served.host.guests = [
        guest(),
        guest("busy"),
        guest("old", stale_reason="its agent does not answer", report_age_s=90, state=pb.GUEST_HANGING),
        guest("fixed", resizable=False, not_resizable_reason="its image cannot grow", state=pb.GUEST_SUSPENDED),
        *(guest(f"g{n}") for n in range(6)),
    ]
    served.host.resizes = [running("busy"), running("g1", id="x", state=pb.RESIZE_FAILED, reason="the disk is full")]
    context = running_browser.new_context(
        color_scheme="dark" if scheme == "dark" else "light", viewport={"width": width, "height": 800}
    )
    try:
        page = context.new_page()
        card = opened(page, served)
        for _ in range(2):
            time.sleep(0.6)  # two points make a history
        card.get_by_text("Resize web").click()
        card.get_by_role("textbox").fill("1G")
        page.get_by_text("Changes of the level").click()
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
        served.host.down = "storaged-host cannot be reached; is it running?"
        expect(page.get_by_text("Not live")).to_be_visible()
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    finally:
        context.close()


def test_many_guests_can_be_searched(page: Page, served: Served) -> None:
    served.host.guests = [guest(f"g{n:03}") for n in range(300)]
    opened(page, served, "g000")
    page.get_by_label("Show only names with").fill("g29")
    expect(page.get_by_role("article", name=re.compile("^g"))).to_have_count(10)
    page.get_by_label("Show only names with").fill("nobody")
    expect(page.get_by_text("No guest has such a name.")).to_be_visible()


def test_a_process_of_its_own_with_a_simulated_pool(page: Page, tmp_path: Path) -> None:
    host = SimulatedHost(tmp_path)
    with host:
        page.goto(host.link)
        card = page.get_by_role("article", name="web", exact=True)
        card.get_by_text("Resize web").click()
        card.get_by_role("slider").press("Home")
        card.get_by_role("slider").press("ArrowRight")  # the least itself moves while the guest writes
        card.get_by_role("button", name="Shrink web").click()
        expect(card.get_by_text(re.compile("resizing the filesystem, 400 MiB/s"))).to_be_visible()
        card.get_by_role("button", name="Cancel").click()
        expect(card.get_by_text("was cancelled")).to_be_visible()
    expect(page.get_by_role("alert").filter(has_text="the console does not answer")).to_be_visible()
    with host:
        # Nobody is signed in any more: the page says how to.
        expect(page.get_by_text("storagectl console")).to_be_visible()
        assert Axe().run(page).violations_count == 0
        page.goto(host.link)
        assert page.url == host.url, "the code does not stay in the address"
        expect(page.get_by_text("Live, 6 guests")).to_be_visible()
        card.get_by_text("Resize web").click()
        card.get_by_role("slider").press("End")
        card.get_by_role("button", name="Grow web").click()
        expect(card.get_by_text("web was resized from")).to_be_visible()
