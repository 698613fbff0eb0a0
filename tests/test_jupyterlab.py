"""A reader's JupyterLab: open a notebook in a browser, choose the smoke profile, run all cells, read the verdict."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import pytest
from browser import TIMEOUT_MS, chromium

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOK = "04_hymba_block_pruning.ipynb"
"""One of the cheapest: a single model, two removals."""
TOKEN = "a-token-for-this-test"
OFFLINE = ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.news_url=None"]
LAB = ["--port=0", "--ip=127.0.0.1", "--no-browser", "--allow-root", f"--IdentityProvider.token={TOKEN}", *OFFLINE]
OWN = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[str]:
    """The address of a JupyterLab on copies of the notebooks, with settings and state of its own."""
    shutil.copytree(FOLDER, tmp_path / "notebooks", ignore=shutil.ignore_patterns(".*"))
    _clear(tmp_path / "notebooks" / NOTEBOOK)
    own = {name: str(tmp_path / name.lower()) for name in OWN}
    command = [sys.executable, "-m", "jupyterlab", f"--notebook-dir={tmp_path / 'notebooks'}", *LAB]
    with (tmp_path / "lab.log").open("w") as log:
        server = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, **own}, stdout=log, stderr=log)
    try:
        yield _address(Path(own["JUPYTER_RUNTIME_DIR"]), server, tmp_path / "lab.log")
    finally:
        server.terminate()
        server.wait(timeout=TIMEOUT_MS / 1000)


def _address(runtime: Path, server: subprocess.Popen[bytes], log: Path) -> str:
    """Where a server says that it listens, once it does."""
    for _ in range(TIMEOUT_MS // 500):
        assert server.poll() is None, log.read_text()[-2000:]
        if any(runtime.glob("jpserver-*.json")) and "is running at" in log.read_text():
            return str(json.loads(next(runtime.glob("jpserver-*.json")).read_text())["url"])
        time.sleep(0.5)
    raise AssertionError(f"JupyterLab does not start: {log.read_text()[-2000:]}")


def test_a_notebook_runs_in_jupyterlab(lab: str, tmp_path: Path) -> None:
    before = (FOLDER / NOTEBOOK).read_bytes()
    parameters = f'profile = "smoke"\nmodels = ""\noutput = "{tmp_path / "runs"}"'
    asked: set[str | None] = set()
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(TIMEOUT_MS)
        page.on("request", lambda request: asked.add(urlsplit(request.url).hostname))
        page.goto(f"{lab}lab/tree/{NOTEBOOK}?token={TOKEN}")
        page.get_by_text("| Idle").wait_for()

        page.locator(".jp-CodeCell .cm-content", has_text="profile =").click()
        page.keyboard.press("ControlOrMeta+a")
        page.keyboard.insert_text(parameters)
        page.locator(".lm-MenuBar-itemLabel", has_text="Run").click()
        page.locator(".lm-Menu-itemLabel").get_by_text("Run All Cells", exact=True).click()

        verdict = page.locator(".jp-CodeCell", has_text="report.verdicts").locator(".jp-OutputArea-output tbody td")
        assert verdict.nth(0).inner_text() == "C6"
        assert verdict.nth(2).inner_text() in {"reproduced", "close", "not shown at this scale"}
        page.locator(".jp-CodeCell", has_text="report.provenance").locator(".jp-OutputArea-output table").wait_for()
        page.get_by_text("| Idle").wait_for()
        assert page.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0
        page.keyboard.press("ControlOrMeta+s")
        code = _once_saved(tmp_path / "notebooks" / NOTEBOOK)
    assert code[0].source == parameters
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert list((tmp_path / "runs" / "smoke").rglob("*.json"))
    assert asked <= {"127.0.0.1", "localhost", None, ""}
    assert (FOLDER / NOTEBOOK).read_bytes() == before


def _clear(file: Path) -> None:
    """Take the recorded outputs out of a notebook, so that all that is seen later is of this run."""
    notebook = nbformat.read(file, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, file)


def _once_saved(notebook: Path) -> list[nbformat.NotebookNode]:
    """The code cells of a notebook, once it is on disk with the last of them run."""
    for _ in range(TIMEOUT_MS // 500):
        code = [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
        if code[-1].execution_count:
            return code
        time.sleep(0.5)
    raise AssertionError("JupyterLab did not save the notebook")
