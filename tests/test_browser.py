"""A notebook as its reader meets it: in JupyterLab, in a browser, where a slider moves the figure."""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent
NAME = "02_som_on_a_bandit"
MINUTE = 60.0
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()

pytestmark = pytest.mark.slow


@pytest.fixture
def chromium():
    """Playwright, and the path of the Chromium that it is to drive; its own is not downloaded."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install -e '.[browser]'")
    pytest.importorskip("jupyterlab", reason="pip install -e '.[notebooks]'")
    pytest.importorskip("ipywidgets", reason="pip install -e '.[notebooks]'")
    path = shutil.which("chromium")
    if not path:
        pytest.skip("no chromium: apt-get install chromium")
    return playwright, path


@contextlib.contextmanager
def jupyterlab(folder: Path, state: Path):
    """JupyterLab on `folder`, which keeps nothing outside `state`; its address and token."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Cells stay in the page when they are out of sight; no news, which would be asked for over the network.
    for name, content in {
        "notebook-extension/tracker": {"windowingMode": "none"},
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    }.items():
        path = state / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    token, address = secrets.token_hex(16), f"http://127.0.0.1:{port}"
    own = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    env = {k: v for k, v in os.environ.items() if not k.startswith("JUPYTER")}
    env |= {name: str(state / name.lower()) for name in own}
    env |= {
        "JUPYTERLAB_SETTINGS_DIR": str(state / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(state / "work"),
    }
    env |= {"JUPYTER_TOKEN": token, "JUPYTER_PREFER_ENV_PATH": "1", "JAX_PLATFORMS": "cpu"}
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    options = {"ip": "127.0.0.1", "port": port, "port_retries": 0, "root_dir": folder, "allow_root": True}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser"]
    command += [f"--ServerApp.{name}={value}" for name, value in options.items()]
    with open(state / "server.log", "w") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        until(lambda: server.poll() is not None or answer(address, token, "status"), 2 * MINUTE)
        assert server.poll() is None, (state / "server.log").read_text()[-4000:]
        yield address, token
    finally:
        server.terminate()  # which ends the kernels too
        try:
            server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            pass
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answer(address, token, name):
    """What the server's REST interface says; None while it does not answer."""
    request = urllib.request.Request(f"{address}/api/{name}", headers={"Authorization": f"token {token}"})
    try:
        # Not through a proxy that the environment may name.
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as reply:
            return json.load(reply)
    except (OSError, urllib.error.URLError):
        return None


def until(condition, seconds, every=0.5):
    """Waits for the condition to hold, and returns what it is then."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not so after {seconds:.0f} s: {condition}"
        time.sleep(every)
    return value


def smoke_notebook(folder: Path) -> Path:
    jupytext = pytest.importorskip("jupytext", reason="pip install -e '.[notebooks]'")
    from test_notebooks import FOLDER, smoke_source

    notebook = jupytext.reads(smoke_source(FOLDER / "src" / f"{NAME}.py"), fmt="py:percent")
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = folder / f"{NAME}.ipynb"
    jupytext.write(notebook, path)
    return path


def test_slider_moves_the_figure(chromium, tmp_path):
    """All cells of a notebook on smoke values run; the first slider redraws its picture, there and back."""
    playwright, executable = chromium
    folder, state = tmp_path / "notebooks", tmp_path / "state"
    folder.mkdir(), state.mkdir()
    path = smoke_notebook(folder)
    with (
        jupyterlab(folder, state) as (address, token),
        playwright.sync_playwright() as play,
        contextlib.closing(
            play.chromium.launch_persistent_context(
                str(tmp_path / "profile"),
                executable_path=executable,
                args=FLAGS,
                chromium_sandbox=False,
                viewport={"width": 1300, "height": 1000},
            )
        ) as context,
    ):
        page = context.new_page()
        page.set_default_timeout(2 * MINUTE * 1000)
        page.goto(f"{address}/lab/tree/{path.name}?token={token}")
        page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
        until(lambda: answer(address, token, "kernels"), 2 * MINUTE)  # one has been started for the notebook
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()

        def code_cells():
            page.keyboard.press("Control+s")
            cells = json.loads(path.read_text())["cells"]
            return [cell for cell in cells if cell["cell_type"] == "code" and cell["source"]]

        def finished():
            cells = code_cells()
            failed = [
                output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"
            ]
            assert not failed, "\n".join(failed[0]["traceback"])
            return all(cell["execution_count"] for cell in cells)

        until(finished, 15 * MINUTE, every=2)
        idle = lambda: [kernel["execution_state"] for kernel in answer(address, token, "kernels")] == ["idle"]
        until(idle, MINUTE)

        box = page.locator(".jp-OutputArea .widget-vbox").filter(has=page.locator("img.widget-image")).first
        handle, image, readout = box.get_by_role("slider"), box.locator("img"), box.locator(".widget-readout")
        handle.scroll_into_view_if_needed()

        def picture():
            """A digest of the picture as shown: its pixels, whatever its address."""
            shown = """async image => {
                await image.decode();
                const reply = await fetch(image.src);
                const bytes = new Uint8Array(await reply.arrayBuffer());
                return [image.clientWidth, image.naturalWidth, ...bytes];
            }"""
            width, natural, *data = image.evaluate(shown)
            assert 100 < width == natural  # neither empty nor stretched
            return hashlib.sha256(bytes(data)).hexdigest()

        first, label = picture(), readout.inner_text()
        handle.focus()
        page.keyboard.press("ArrowRight")
        until(lambda: readout.inner_text() != label, MINUTE)
        second = until(lambda: (now := picture()) != first and now, 2 * MINUTE)
        page.screenshot(path=tmp_path / "lab.png")
        page.keyboard.press("ArrowLeft")
        until(lambda: readout.inner_text() == label, MINUTE)
        until(lambda: picture() == first, 2 * MINUTE)
        assert second != first
