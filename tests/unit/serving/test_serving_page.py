"""page.py: the page at / asks for nothing from elsewhere, and shows what the service answers."""

import base64
import re
import shutil
import subprocess
import threading
import time

import pytest
import uvicorn
from fastapi.testclient import TestClient
from starlette.responses import HTMLResponse

from fieldmark.serving.app import create_app
from fieldmark.serving.keys import Keys, add_key
from fieldmark.serving.page import HEADERS, PAGE

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def test_the_page_needs_no_key_and_nothing_from_elsewhere(make_predictor, tmp_path):
    add_key(tmp_path / "keys.json", "shop")
    app = create_app(make_predictor(), keys=Keys(tmp_path / "keys.json"))
    reply = TestClient(app).get("/")
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert not re.search(r"https?://|//cdn|@import|innerHTML", reply.text)


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_the_classes_of_an_image(make_predictor, encode, tmp_path):
    """The page as it is, and a line that chooses a file for it: no person is here to do that."""
    app = create_app(make_predictor())
    image = base64.b64encode(encode("red")).decode()
    choose = (
        f"<script>classify(new File([Uint8Array.from(atob('{image}'), c => c.charCodeAt(0))], "
        "'<b>.png'))</script></html>"
    )

    async def with_choice(scope, receive, send):
        if scope.get("path") == "/chosen":
            page = HTMLResponse(PAGE.replace("</html>", choose), headers=HEADERS)
            await page(scope, receive, send)
        else:
            await app(scope, receive, send)

    server = uvicorn.Server(
        uvicorn.Config(with_choice, port=0, lifespan="off", log_level="warning")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={tmp_path}", "--virtual-time-budget=5000", "--dump-dom"]
    try:
        done = subprocess.run(
            [*command, f"http://127.0.0.1:{port}/chosen"],
            capture_output=True,
            text=True,
            timeout=60,
        )
    finally:
        server.should_exit = True
        thread.join(10)
    rows = re.findall(r"<td title=\"(\w+)\">([^<]+)</td>.*?<td>([\d.]+) %</td>", done.stdout)
    assert [(name, text) for name, text, _ in rows][0] == ("red", "mostly red")
    assert sum(float(share) for *_, share in rows) == pytest.approx(100, abs=0.2)
    assert 'alt="<b>.png"' in done.stdout or 'alt="&lt;b&gt;.png"' in done.stdout
