"""docs/demo.png: the page of a `gcl demo` that runs, after a text was searched. Needs playwright and Debian's chromium.

python runs/demo_screenshot.py http://127.0.0.1:7860 "a small bird" docs/demo.png
"""

import shutil
import sys

from playwright.sync_api import sync_playwright

address, text, file = sys.argv[1:]
with sync_playwright() as playwright:
    options = ["--no-sandbox", "--disable-gpu"]
    browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=options)
    page = browser.new_page(viewport={"width": 1200, "height": 1000}, color_scheme="light")
    page.goto(address)
    box = page.get_by_role("textbox", name="Text", exact=True)
    box.fill(text)
    box.press("Enter")
    page.locator("#gcl-results li").first.wait_for()
    page.wait_for_timeout(1000)  # the page fades in
    page.screenshot(path=file)
    browser.close()
