"""The documentation page in a real browser: everything is shown, and its forms send what they show."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from tests.ingress.edge import FakeService, edge_app, served_in_thread

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE_S = 60


def installed(command: str) -> str:
    path = shutil.which(command)
    assert path, f"{command} is not installed, and this test needs it: run .ci/install-system-packages as root"
    return path


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    with served_in_thread(edge_app(FakeService())) as url:
        yield url


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = installed("chromium")
    profile: Path = tmp_path_factory.mktemp("profile")
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options, ChromeService(installed("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def page(browser: Chrome, base_url: str) -> Chrome:
    browser.get(f"{base_url}/docs")
    WebDriverWait(browser, PATIENCE_S).until(lambda b: b.find_elements(By.CSS_SELECTOR, "details.operation"))
    return browser


class Operation:
    """One operation of the page, opened as a reader would."""

    def __init__(self, page: Chrome, title: str) -> None:
        self._page = page
        self._element = next(e for e in operations(page) if title_of(e) == title)
        self._element.find_element(By.TAG_NAME, "summary").click()

    @property
    def curl(self) -> str:
        return self._element.find_elements(By.CSS_SELECTOR, "div > pre")[0].text

    def write(self, body: str) -> None:
        area = self._element.find_element(By.TAG_NAME, "textarea")
        area.clear()
        area.send_keys(body)

    def send(self) -> tuple[int, dict[str, str], Any]:
        """Click, wait, and read what is shown: status, headers and JSON."""
        output = self._element.find_elements(By.CSS_SELECTOR, "div > pre")[-1]
        before = output.text
        self._element.find_element(By.TAG_NAME, "button").click()
        WebDriverWait(self._page, PATIENCE_S).until(lambda _: output.text != before)
        head, _, body = output.text.partition("\n\n")
        status, *headers = head.splitlines()
        return int(status.split()[0]), dict(line.split(": ", 1) for line in headers), json.loads(body)


def operations(page: Chrome) -> list[WebElement]:
    return page.find_elements(By.CSS_SELECTOR, "details.operation")


def title_of(operation: WebElement) -> str:
    method = operation.find_element(By.CSS_SELECTOR, "summary .method").text
    return f"{method} {operation.find_element(By.CSS_SELECTOR, 'summary code').text}"


def test_every_operation_of_the_document_is_shown(page: Chrome, base_url: str) -> None:
    api = httpx.get(f"{base_url}/openapi.json").json()
    documented = [f"{method.upper()} {path}" for path, methods in api["paths"].items() for method in methods]
    assert sorted(title_of(operation) for operation in operations(page)) == sorted(documented)
    assert page.find_element(By.ID, "description").text == api["info"]["description"]


def test_the_page_loads_without_complaint_and_from_this_server_only(page: Chrome, base_url: str) -> None:
    loaded = page.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert loaded
    assert [url for url in loaded if not url.startswith((base_url, "data:"))] == []
    assert [entry["message"] for entry in page.get_log("browser")] == []


def test_send_shows_what_the_server_answers_to_the_example(page: Chrome, base_url: str) -> None:
    status, headers, vectors = Operation(page, "POST /embed").send()
    example = {"inputs": ["What is Deep Learning?", "What is a replica?"]}
    assert status == 200
    assert vectors == httpx.post(f"{base_url}/embed", json=example).json()
    assert headers["content-type"] == "application/json"
    assert "x-compute-tokens" in headers


@pytest.mark.parametrize("title", ["GET /info", "GET /models/{name}/health", "GET /v1/models"])
def test_a_question_without_a_body_is_answered(page: Chrome, base_url: str, title: str) -> None:
    status, _, answer = Operation(page, title).send()
    path = title.split()[1].replace("{name}", "tiny")
    assert (status, answer) == (200, httpx.get(base_url + path).json())


def test_a_body_that_the_reader_writes_is_sent_and_its_error_shown(page: Chrome) -> None:
    operation = Operation(page, "POST /v1/embeddings")
    operation.write('{"input": []}')
    status, headers, answer = operation.send()
    assert (status, answer["error"]["code"]) == (400, "empty_input")
    assert headers["x-request-id"]
    operation.write("no JSON")
    assert operation.curl == "the body is not JSON"
    assert operation.send()[2]["error"]["code"] == "malformed_request"


def test_the_curl_that_is_shown_gets_the_same_answer(page: Chrome, base_url: str) -> None:
    operation = Operation(page, "POST /models/{name}/similarity")
    operation.write(json.dumps({"inputs": {"source_sentence": 'it\'s "so" $1 \\ `x`', "sentences": ["ünïcode", "b"]}}))
    shown = subprocess.run(["bash", "-c", operation.curl], capture_output=True, text=True, check=True).stdout
    assert json.loads(shown) == operation.send()[2]
    assert len(json.loads(shown)) == 2
