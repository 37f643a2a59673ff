"""A headless browser for the tests of the report, spoken to by the Chrome DevTools Protocol.

Chromium, Chrome or Edge if one is installed, else Qt WebEngine of the package index (PySide6):
`launch/test.sh` brings one of them.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import IO, Any

import matplotlib

BROWSERS = ('chromium', 'chromium-browser', 'google-chrome', 'microsoft-edge')
FLAGS = (
    '--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run '
    '--disable-background-networking --disable-component-update --disable-sync '
    '--remote-allow-origins=*'
)
FONTS = """<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>{}/fonts/ttf</dir><cachedir prefix="xdg">fontconfig</cachedir></fontconfig>
"""
QT = """
from PySide6.QtCore import QUrl
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication
app = QApplication([])
view = QWebEngineView()
view.resize(1280, 900)
view.setUrl(QUrl('about:blank'))
view.show()
app.exec()
"""

# Elements that reach beyond the page, SVG text that reaches beyond its figure or is too small.
ILLEGIBLE = """
const wide = [...document.querySelectorAll('main *')].filter(e =>
    !e.closest('.scroll') && e.getBoundingClientRect().right > innerWidth + 1);
const cut = [...document.querySelectorAll('svg text')].filter(e => {
    const [t, s] = [e.getBoundingClientRect(), e.closest('svg').getBoundingClientRect()];
    const m = e.getScreenCTM();
    const size = parseFloat(getComputedStyle(e).fontSize) * Math.hypot(m.a, m.b);
    return size < 9 || t.left < s.left - 1 || t.right > s.right + 1 || t.bottom > s.bottom + 1;
});
return [...wide, ...cut].map(e => e.tagName + ': ' + e.textContent.slice(0, 40));
"""


class Missing(Exception):
    """There is no browser here that starts; the message says why."""


class Element:
    """An element of the page as it was when it was looked for."""

    def __init__(self, text: str, width: float, height: float):
        self.text, self.size = text, {'width': width, 'height': height}


class Browser:
    """A page in a browser of its own.

    Args:
        folder: Its profile.

    Errors:
        Missing: None is installed, or it ends before it can be spoken to.
    """

    def __init__(self, folder: Path):
        self._log, self._count = [], 0
        self._errors = folder / 'errors'
        port = free_port()
        with self._errors.open('w') as file:
            self._process = start(folder, port, file)
        try:
            self._socket = self._connect(port)
            for domain in ('Runtime', 'Log'):
                self.execute_cdp_cmd(f'{domain}.enable')
        except BaseException:
            self.quit()
            raise

    def _connect(self, port: int):
        import websocket

        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError):
                with urllib.request.urlopen(f'http://127.0.0.1:{port}/json/list') as reply:
                    pages = [page for page in json.load(reply) if page['type'] == 'page']
                if pages:
                    url = pages[0]['webSocketDebuggerUrl']
                    return websocket.create_connection(url, timeout=60, suppress_origin=True)
            time.sleep(0.1)
        raise Missing(f'the browser does not start: {self._errors.read_text()[-400:]}')

    def execute_cdp_cmd(self, method: str, parameters: dict[str, Any] | None = None) -> Any:
        """Call a method of the protocol and return its result."""
        self._count += 1
        call = {'id': self._count, 'method': method, 'params': parameters or {}}
        self._socket.send(json.dumps(call))
        reply = self._until(lambda message: message.get('id') == call['id'])
        assert 'error' not in reply, reply
        return reply['result']

    def _until(self, wanted):
        while True:
            message = json.loads(self._socket.recv())
            if message.get('method') in ('Log.entryAdded', 'Runtime.exceptionThrown'):
                self._log.append(message['params'])
            if wanted(message):
                return message

    def get(self, url: str) -> None:
        """Load a page and wait until it is there."""
        self.execute_cdp_cmd('Page.navigate', {'url': url})
        while self.execute_script('return document.readyState') != 'complete':
            time.sleep(0.02)

    def get_log(self, _kind: str) -> list[dict[str, Any]]:
        """The errors and warnings since the last call."""
        log, self._log = self._log, []
        return log

    def execute_script(self, body: str) -> Any:
        """What the body of a JavaScript function returns."""
        given = {'expression': f'(() => {{{body}}})()', 'returnByValue': True}
        reply = self.execute_cdp_cmd('Runtime.evaluate', given)
        assert 'exceptionDetails' not in reply, reply
        return reply['result'].get('value')

    def find_elements(self, _by: str, selector: str) -> list[Element]:
        """The elements of a CSS selector."""
        code = """return [...document.querySelectorAll(%s)].map(e => {
            const box = e.getBoundingClientRect();
            return [e.innerText ?? e.textContent, box.width, box.height];
        })"""
        return [Element(*found) for found in self.execute_script(code % json.dumps(selector))]

    def find_element(self, by: str, selector: str) -> Element:
        """The first element of a CSS selector."""
        return self.find_elements(by, selector)[0]

    def quit(self) -> None:
        """End the browser."""
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def start(folder: Path, port: int, output: IO[str]) -> subprocess.Popen:
    """Start the browser that there is; it listens at a port."""
    flags = [*FLAGS.split(), f'--user-data-dir={folder}']
    environment = os.environ | {
        'QT_QPA_PLATFORM': 'offscreen',
        'QTWEBENGINE_CHROMIUM_FLAGS': ' '.join(flags[1:]),
        'QTWEBENGINE_REMOTE_DEBUGGING': str(port),
    }
    if found := next(filter(None, map(shutil.which, BROWSERS)), None):
        command = [found, *flags, f'--remote-debugging-port={port}', 'about:blank']
    elif importlib.util.find_spec('PySide6'):
        command = [sys.executable, '-c', QT]
        fonts = folder / 'fonts.conf'  # a bare machine has none; Matplotlib brings some
        fonts.write_text(FONTS.format(matplotlib.get_data_path()))
        environment['FONTCONFIG_FILE'] = str(fonts)
    else:
        raise Missing('no browser is installed (chromium, google-chrome or the package PySide6)')
    return subprocess.Popen(command, env=environment, stdout=output, stderr=output)


def free_port() -> int:
    """A port of this machine that nothing listens at."""
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


if __name__ == '__main__':  # says whether there is one
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        try:
            Browser(Path(place)).quit()
        except Missing as error:
            sys.exit(f'no browser: {error}')
