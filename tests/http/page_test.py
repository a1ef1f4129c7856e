"""The page at /, in headless Chromium: ask, stream, stop, watch; by keyboard, on a phone, in the dark, with no request
to anybody but the server. With SCREENSHOTS=FOLDER it leaves pictures there."""

import os
import re
import unittest

from playwright.sync_api import sync_playwright

from soloist_client import Server


class PageTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = Server("--ranks=16", "--http-address=127.0.0.1:0")
        cls.url = f"http://{cls.server.http_address}/"
        cls.playwright = sync_playwright().start()
        # Root may not use Chromium's sandbox.
        cls.browser = cls.playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])

    @classmethod
    def tearDownClass(cls):
        cls.browser.close()
        cls.playwright.stop()
        cls.server.__exit__()

    def open(self, width=1280, height=900, scheme="light", bypass_csp=True):
        """`bypass_csp`: wait_for_function evaluates strings, which the page's policy forbids."""
        context = self.browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme,
                                           bypass_csp=bypass_csp)
        page = context.new_page()
        page.set_default_timeout(60_000)
        self.problems, self.asked = [], []
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", lambda m: self.problems.append(m.text) if m.type == "error" else None)
        page.on("request", lambda request: self.asked.append(request.url))
        page.goto(self.url)
        page.wait_for_selector("#state.ready")
        self.addCleanup(context.close)
        return page

    def check_quiet(self):
        self.assertEqual(self.problems, [])
        self.assertEqual([url for url in self.asked if not url.startswith(self.url) and not url.startswith("data:")], [])

    def picture(self, page, name):
        if folder := os.environ.get("SCREENSHOTS"):
            page.screenshot(path=f"{folder}/{name}.png", full_page=True)

    def test_ask_stream_and_watch(self):
        page = self.open()
        page.fill("#max_tokens", "300")
        page.fill("#temperature", "0")
        page.click("#send")
        answer = page.locator("#answer")
        page.wait_for_function("document.getElementById('answer').textContent.length > 40")
        early = len(answer.inner_text())
        page.wait_for_function("!document.getElementById('send').disabled")
        self.assertGreater(len(answer.inner_text()), early, "it came in one piece")
        self.assertRegex(page.inner_text("#timing"), r"first text after [\d.]+ ms · \d+ \+ \d+ tokens · [\d.]+ ms a token")
        # The plots move and the counters count.
        page.wait_for_function("document.querySelectorAll('#plots path').length >= 6")
        page.wait_for_function("/ [1-9]\\d* tokens generated/.test(document.getElementById('counts').textContent)")
        moved = page.evaluate("series[0].values[0].some(v => v > 0) && series[1].values[0].some(v => v > 0)")
        self.assertTrue(moved, "tokens/s and latency were seen")
        # The heat map: every rank's share of every layer; the shares of a layer are the ranks' number.
        rows = page.evaluate("[...document.querySelectorAll('#heat tr')].slice(1)"
                             ".map(r => [...r.querySelectorAll('td')].map(c => Number(c.textContent)))")
        layers = page.evaluate("before.num_layers")
        self.assertEqual((len(rows), {len(r) for r in rows}), (layers, {16}))
        for row in rows:
            self.assertAlmostEqual(sum(row), 16, delta=16 * 0.05 + 1e-6)  # cells are rounded to a tenth
        ranks = page.locator("#ranks li")
        self.assertEqual(ranks.count(), 2 + 16)
        self.assertEqual(page.locator("#ranks li.bad").count(), 0)
        self.picture(page, "page-light")
        self.check_quiet()

    def test_under_its_own_policy(self):
        page = self.open(bypass_csp=False)
        page.fill("#max_tokens", "20")
        page.click("#send")
        page.wait_for_selector("#timing:has-text('tokens')")
        page.wait_for_selector("#heat td")
        self.check_quiet()

    def test_stop(self):
        page = self.open()
        page.fill("#max_tokens", "1800")
        page.click("#send")
        page.wait_for_function("document.getElementById('answer').textContent.length > 40")
        page.click("#halt")
        page.wait_for_function("document.getElementById('timing').textContent.includes('stopped')")
        # The server has let go of it.
        page.wait_for_function("before && before.running_requests === 0 && before.open_streams === 0")
        self.check_quiet()

    def test_chat_keeps_the_conversation(self):
        page = self.open()
        page.check("[value=chat]")
        page.fill("#max_tokens", "12")
        for number in (1, 2):
            with page.expect_request("**/v1/chat/completions") as sent:
                page.click("#send")
            page.wait_for_function("!document.getElementById('send').disabled")
            roles = [m["role"] for m in sent.value.post_data_json["messages"]]
            self.assertEqual(roles, ["user", "assistant", "user"][:2 * number - 1])
        self.check_quiet()

    def test_errors_are_said(self):
        page = self.open()
        page.fill("#max_tokens", "100000")
        page.click("#send")
        page.wait_for_function("/100000/.test(document.getElementById('answer').textContent)")
        self.assertTrue(page.is_enabled("#send"))

    def test_keyboard_alone(self):
        page = self.open()
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        self.assertEqual(page.evaluate("document.activeElement.id"), "prompt")
        page.keyboard.press("Control+A")
        page.keyboard.type("The dragon")
        reached = []
        for _ in range(9):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.id"))
        self.assertEqual(reached[-2:], ["send", "clear"] if "halt" not in reached else ["send", "halt"])
        page.focus("#max_tokens")
        page.keyboard.press("Control+A")
        page.keyboard.type("1500")
        page.focus("#prompt")
        page.keyboard.press("Control+Enter")
        page.wait_for_function("document.getElementById('answer').textContent.length > 30")
        page.keyboard.press("Escape")
        page.wait_for_function("document.getElementById('timing').textContent.includes('stopped')")
        self.assertTrue(page.inner_text("#answer").startswith("The dragon"))
        self.check_quiet()

    def test_phone(self):
        page = self.open(width=360, height=740)
        self.assertLessEqual(page.evaluate("document.documentElement.scrollWidth"), 360)
        box = page.locator("#send").bounding_box()
        self.assertTrue(0 <= box["x"] and box["x"] + box["width"] <= 360)
        page.fill("#max_tokens", "60")
        page.click("#send")
        page.wait_for_function("document.querySelectorAll('#heat td').length > 0")
        self.assertLessEqual(page.evaluate("document.documentElement.scrollWidth"), 360)
        self.picture(page, "page-phone")

    def test_dark(self):
        def brightness(page):
            return sum(int(v) for v in re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3])
        self.assertGreater(brightness(self.open(scheme="light")), 600)
        page = self.open(scheme="dark")
        self.assertLess(brightness(page), 150)
        page.fill("#max_tokens", "200")
        page.click("#send")
        page.wait_for_function("!document.getElementById('send').disabled && document.querySelectorAll('#heat td').length > 0")
        self.picture(page, "page-dark")


if __name__ == "__main__":
    unittest.main(verbosity=2)
