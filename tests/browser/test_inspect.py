"""The page "Look inside a file", in a browser: chromium, or Chrome."""

import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pytree2safetensors import save_pytree

pytest.importorskip("selenium", reason="the environment `browser` has selenium")

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

ROOT = Path(__file__).parents[2]
DESKTOP, PHONE = (1280, 900), (390, 844)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files and ranges of them, and counts the bytes of each."""

    served: ClassVar[dict[str, int]] = {}

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        path = Path(self.translate_path(self.path))
        if wanted is None or not path.is_file():
            super().do_GET()
            return
        start, stop = map(int, wanted.removeprefix("bytes=").split("-"))
        with path.open("rb") as file:
            file.seek(start)
            part = file.read(stop + 1 - start)
        Handler.served[path.name] = Handler.served.get(path.name, 0) + len(part)
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {start}-{stop}/{path.stat().st_size}")
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address and the folder of the documentation; SITE names one that is built already."""
    folder = Path(os.environ.get("SITE") or tmp_path_factory.mktemp("site"))
    if "SITE" not in os.environ:
        command = [
            sys.executable,
            "-m",
            "sphinx",
            "-q",
            "-b",
            "html",
            str(ROOT / "docs"),
            str(folder),
        ]
        subprocess.run(command, check=True, timeout=500)
    handler = functools.partial(Handler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    # In a container there are no namespaces for the sandbox, and little shared memory.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.binary_location = shutil.which("chromium") or ""
    driver = shutil.which("chromedriver")
    found = webdriver.Chrome(options, webdriver.ChromeService(driver) if driver else None)
    yield found
    found.quit()


class Page:
    """The open page."""

    def __init__(self, browser: Any, address: str) -> None:
        self.browser = browser
        browser.get(f"{address}/inspect.html")

    def all(self, selector: str) -> list[Any]:
        found: list[Any] = self.browser.find_elements(By.CSS_SELECTOR, f"#inspect {selector}")
        return found

    def one(self, selector: str) -> Any:
        return self.wait(lambda: self.all(selector), selector)[0]

    def wait(self, condition: Callable[[], Any], what: str) -> Any:
        until = time.monotonic() + 30
        while not (found := condition()):
            assert time.monotonic() < until, f"{what}: {self.one('').text}"
            time.sleep(0.02)
        return found

    def open(self, path: Path) -> None:
        """Choose a file or a folder, and wait for what the page says of it."""
        before = self.all("h2, .error")
        chosen = "[webkitdirectory]" if path.is_dir() else ":not([webkitdirectory])"
        self.one(f"input[type=file]{chosen}").send_keys(str(path))
        self.wait(lambda: [e for e in self.all("h2, .error") if e not in before], "it opens")

    def rows(self) -> list[str]:
        """The texts of the rows that are drawn; "+" marks a closed node, "-" an open one."""
        script = """
            const marks = { "▸": "+ ", "▾": "- ", "": "" };
            return Array.from(document.querySelectorAll("#inspect .row"), (row) => {
              const cells = row.querySelectorAll(".arrow, bdi, .count, .size");
              const [arrow, ...texts] = Array.from(cells, (cell) => cell.textContent);
              return marks[arrow] + texts.filter(Boolean).join(" ");
            });
        """
        found: list[str] = self.browser.execute_script(script)
        return found

    def click(self, name: str) -> None:
        """Click the row whose text contains this one."""
        place = next(i for i, text in enumerate(self.rows()) if name in text)
        # At once, as a row that is drawn again is another element.
        script = "document.querySelectorAll('#inspect .row')[arguments[0]].click()"
        self.browser.execute_script(script, place)

    def press(self, *keys: str) -> None:
        self.one(".tree").send_keys(*keys)

    def show(self, name: str) -> str:
        """Click a leaf, and return what its panel says once it is complete."""
        self.click(name)
        panel = self.one("section.leaf")
        self.wait(lambda: "statistics" in panel.text or "digest" in panel.text, "statistics")
        time.sleep(0.2)
        return str(panel.text)


@pytest.fixture
def page(browser: Any, site: tuple[str, Path]) -> Iterator[Page]:
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.set_window_size(*DESKTOP)
    browser.get_log("browser")
    yield Page(browser, site[0])
    logged = [entry for entry in browser.get_log("browser") if "favicon" not in entry["message"]]
    assert [entry for entry in logged if entry["level"] == "SEVERE"] == []


def write(path: Path, header: dict[str, Any], data: bytes = b"", size: int | None = None) -> Path:
    """Write a safetensors file by hand, of a larger size than its data if that is given."""
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + data)
        if size is not None:
            file.truncate(8 + len(text) + size)
    return path


def tensors(shapes: dict[str, list[int]]) -> dict[str, Any]:
    """The header of tensors of float32."""
    found, position = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        found[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    return found


def layer(seed: int) -> dict[str, Any]:
    return {"kernel": np.full((3, 4), seed, np.float32), "bias": np.zeros(4, np.float16)}


TREE = {
    "layers": [layer(i) for i in range(12)],
    "state": (None, {"step": 7, "mean": np.array([1, 2, 6], np.float32)}),
    "key": jax.random.key(0),
    "weak": jnp.asarray(1.5),
    "name": "a\u202eb",
    "<img src=x onerror=alert(1)>": np.array([-1, 0], np.int8),
}


def test_a_file_shows_its_tree(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    save_pytree(TREE, path, metadata={"run": "17", "<b>": "<i>"}, checksum=True)
    page.open(path)
    rows = page.rows()
    assert rows[0] == "- (root) dict, 6 199 706 B"
    assert "- state tuple, 2 4 20 B" in rows
    assert "step int 1 8 B" in rows
    assert "0 None" in rows
    assert "weak weak float32[] 1 4 B" in rows
    assert "key key<threefry2x32>[] 8 B" in rows
    assert 'name str "a\\u202eb"' in rows
    assert any(row.startswith("+ 1 … 11: 11 more like 0") for row in rows)
    text = page.one("").text
    assert "29 tensors" in text
    page.one("summary").send_keys(Keys.ENTER)
    assert "<b>\n<i>" in page.one("details").text
    assert page.all("img") == []
    assert page.all("b") == []


def test_a_click_shows_values_and_statistics(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    save_pytree(TREE, path, checksum=True)
    page.open(path)
    text = page.show("mean")
    assert "@state#1@mean" in text
    assert "1\n2\n6" in text.replace(" ", "\n")
    for line in ("min\n1", "max\n6", "mean\n3", "zeros\n0", "digest\nmatches", "F32[3], 12 bytes"):
        assert line in text, text


def test_a_damaged_tensor_is_reported(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "damaged.safetensors"
    save_pytree({"w": np.ones(3, np.float32)}, path, checksum=True)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    page.open(path)
    page.click("w float32")
    assert "does not match its digest" in page.one(".leaf .error").text


def test_all_of_a_large_tensor_is_checked_when_it_is_read(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "damaged.safetensors"
    save_pytree({"w": np.zeros(17 << 20, np.uint8)}, path, checksum=True)
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    page.open(path)
    assert "Read all" in page.show("w uint8")
    page.one(".leaf button").send_keys(Keys.ENTER)
    assert "does not match its digest" in page.one(".leaf .error").text


def test_many_entries_of_metadata_are_counted(page: Page, tmp_path: Path) -> None:
    metadata = {f"k{i}": "v" for i in range(100_000)}
    page.open(write(tmp_path / "entries.safetensors", {"__metadata__": metadata}))
    page.one("summary").send_keys(Keys.ENTER)
    assert page.one("summary").text == "Metadata: 100,000 entries"
    assert page.one("details").text.endswith("99,700 more")


def test_a_foreign_file_shows_the_parts_of_its_names(page: Page, tmp_path: Path) -> None:
    names = [f"model.layers.{i}.{part}.weight" for i in range(12) for part in ("norm", "mlp")]
    header = tensors({name: [2, 2] for name in [*names, "head"]})
    size = header["head"]["data_offsets"][1]
    page.open(
        write(tmp_path / "foreign.safetensors", header, np.arange(size // 4, dtype="<f4").tobytes())
    )
    rows = page.rows()
    assert any(row.startswith("- layers") for row in rows)
    assert any(row.startswith("+ 1 … 11: 11 more like 0") for row in rows)
    page.one("[type=search]").send_keys("10.NORM")
    page.wait(lambda: page.rows() == ["model.layers.10.norm.weight float32[2,2] 4 16 B"], "a match")
    assert page.one("[role=status]").text == "1 of 25 leaves"
    assert "80\n81\n82\n83" in page.show("10.norm").replace(" ", "\n")


def test_names_that_do_not_form_a_tree_are_split_at_their_dots(page: Page, tmp_path: Path) -> None:
    page.open(
        write(tmp_path / "odd.safetensors", tensors({"a.b": [1], "a": [1], "x\\y": [1]}), bytes(12))
    )
    assert "do not form a tree" in page.one("").text
    assert {"x\\y float32[1] 1 4 B", "b float32[1] 1 4 B"} <= set(page.rows())


def test_a_broken_file_shows_its_error_and_the_next_one_opens(page: Page, tmp_path: Path) -> None:
    sound = write(tmp_path / "sound.safetensors", tensors({"w": [2]}), bytes(8))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(sound.read_bytes()[:-3])
    page.open(broken)
    error = page.one("[role=alert]")
    assert error.text == "broken.safetensors is cut short: its header describes 8 bytes of data"
    page.open(sound)
    assert page.all("[role=alert]") == []
    assert "w float32[2] 2 8 B" in page.rows()


def test_a_folder_shows_the_tensors_of_its_shards(page: Page, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    save_pytree(TREE, folder, max_shard_size=300, checksum=True)
    page.open(folder)
    text = page.one("").text
    assert "checkpoint" in text
    assert "29 tensors" in text
    assert f"shards\n{len(list(folder.glob('*.safetensors')))}" in text
    assert "min\n1" in page.show("mean")


def test_a_folder_without_its_index_shows_an_error(page: Page, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    save_pytree(TREE, folder, max_shard_size=300)
    (folder / "model.safetensors.index.json").unlink()
    page.open(folder)
    assert "and no index" in page.one("[role=alert]").text
    for path in sorted(folder.iterdir())[1:]:
        path.unlink()
    page.open(folder)
    assert "and no index" in page.one("[role=alert]").text


def test_a_folder_of_folders_shows_an_error(page: Page, tmp_path: Path) -> None:
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    write(tmp_path / "outer" / "inner" / "a.safetensors", tensors({"w": [2]}), bytes(8))
    page.open(tmp_path / "outer")
    assert "has no safetensors file and no index" in page.one("[role=alert]").text


def test_a_hundred_thousand_tensors_are_drawn_as_they_come_into_view(
    page: Page, tmp_path: Path
) -> None:
    header = tensors({f"w{i}": [2, i % 7 + 1] for i in range(100_000)})
    size = header["w99999"]["data_offsets"][1]
    page.open(write(tmp_path / "many.safetensors", header, bytes(size)))
    assert "100,000 tensors" in page.one("").text
    assert len(page.all(".row")) < 100
    page.press(Keys.END)
    assert page.rows()[-1].startswith("w99999 float32[2,5]")
    assert len(page.all(".row")) < 100
    page.one("[type=search]").send_keys("w9999")
    page.wait(lambda: page.one("[role=status]").text == "11 of 100,000 leaves", "eleven matches")


def test_ten_gigabytes_open_by_their_header(page: Page, tmp_path: Path) -> None:
    header = tensors({"a": [50_000, 50_000], "b": [3]})
    path = write(tmp_path / "large.safetensors", header, size=10_000_000_012)
    page.open(path)
    assert "10.0 GB" in page.one("").text
    text = page.show("a float32")
    assert "the first 4,194,304 of 2,500,000,000 values" in text
    assert "Read all 10.0 GB" in text


def test_an_address_is_read_by_ranges(page: Page, site: tuple[str, Path]) -> None:
    address, folder = site
    header = tensors({"a": [2000, 2000], "b": [3]})
    name = "served by ranges.safetensors"
    write(folder / name, header, size=16_000_012)
    try:
        page.one("[type=url]").send_keys(f"{address}/{name.replace(' ', '%20')}", Keys.ENTER)
        page.wait(lambda: "b float32[3] 3 12 B" in page.rows(), "it opens")
        assert Handler.served[name] <= 200_000
        page.show("b float32")
        assert Handler.served[name] <= 200_000
        assert "the first 262,144 of 4,000,000 values" in page.show("a float32")
    finally:
        (folder / name).unlink()


def test_an_address_that_is_not_there_shows_its_status(page: Page, site: tuple[str, Path]) -> None:
    page.one("[type=url]").send_keys(f"{site[0]}/none.safetensors", Keys.ENTER)
    assert page.one("[role=alert]").text.endswith("answers with status 404")
    page.browser.get_log("browser")  # the browser logs the 404, too


def test_an_address_that_cannot_be_read_says_what_may_be_wrong(page: Page) -> None:
    page.one("[type=url]").send_keys("http://127.0.0.1:9/model.safetensors", Keys.ENTER)
    assert "does not allow other pages to read it" in page.one("[role=alert]").text
    page.browser.get_log("browser")  # the browser logs the failure, too


def test_unusual_keys_and_texts_are_shown(page: Page, tmp_path: Path) -> None:
    tree = OrderedDict(
        [(2.0, 2**20000), ((1, "a.b"), "x" * 200_000), ("y" * 5000, np.zeros((0, 2)))]
    )
    path = tmp_path / "unusual.safetensors"
    save_pytree(tree, path, metadata={"long": "z" * 200_000})
    page.open(path)
    text = '"' + "x" * 60 + '"'
    expected = ["2.0 int", f"(1, 'a.b') str {text}", "y" * 300 + "… float64[0,2]"]
    assert page.rows()[1:] == expected
    page.click("2.0 int")
    assert "in hexadecimal: 1000000" in page.one("section.leaf").text
    page.click("a.b")
    page.wait(lambda: "xxx…" in page.one("section.leaf").text, "the text")


def test_a_dropped_file_opens(page: Page) -> None:
    page.browser.execute_script(
        """
        const header = '{"w":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}';
        const length = new Uint8Array(8);
        length[0] = header.length;
        const transfer = new DataTransfer();
        transfer.items.add(new File([length, header, new Uint8Array(2)], "dropped.safetensors"));
        document.querySelector("#inspect .drop").dispatchEvent(
          new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));
        """
    )
    page.wait(lambda: "w uint8[2] 2 2 B" in page.rows(), "it opens")


def test_the_keyboard_moves_through_the_tree(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    save_pytree({"a": [1, 2], "b": np.array([1, 2], np.float32)}, path)
    page.open(path)

    def active() -> Any:
        return page.one(f"#{page.one('.tree').get_attribute('aria-activedescendant')}")

    page.press(Keys.ARROW_DOWN)
    assert active().get_attribute("aria-level") == "2"
    assert active().get_attribute("aria-expanded") == "true"
    assert active().get_attribute("aria-setsize") == "2"
    page.press(Keys.ARROW_LEFT)
    assert active().get_attribute("aria-expanded") == "false"
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert active().text.startswith("0")
    page.press(Keys.ARROW_LEFT)
    assert active().text.startswith("▾a")
    page.press(Keys.END, Keys.ENTER)
    assert active().get_attribute("aria-selected") == "true"
    page.wait(lambda: "max\n2" in page.one("section.leaf").text, "statistics")
    page.one("[type=search]").send_keys("a")
    page.wait(lambda: page.one("[role=status]").text == "2 of 3 leaves", "two matches")
    page.press(Keys.END, Keys.ARROW_LEFT)
    assert active().text.startswith("@a#1")


def test_what_is_for_screen_readers_has_its_role_and_its_name(page: Page, tmp_path: Path) -> None:
    page.open(write(tmp_path / "one.safetensors", tensors({"w": [2]}), bytes(8)))
    assert page.one(".tree").get_attribute("role") == "tree"
    assert {row.get_attribute("role") for row in page.all(".row")} == {"treeitem"}
    for element in page.all("input:not([hidden]), .tree, section.leaf"):
        assert element.get_attribute("aria-label"), element.get_attribute("outerHTML")
    assert page.browser.switch_to.active_element.tag_name == "h2"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_without_scrolling_sideways(
    page: Page, tmp_path: Path, scheme: str
) -> None:
    width, height = PHONE
    size = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": True}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    path = tmp_path / "own.safetensors"
    save_pytree({**TREE, "x" * 200: np.ones((1000, 7), np.float32)}, path)
    page.open(path)
    page.show("mean")
    overflow = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.browser.execute_script(overflow) == 0
    colors = "const s = getComputedStyle(arguments[0]); return s.color"
    light = page.browser.execute_script(colors, page.one("h2")) == "rgb(0, 0, 0)"
    assert light is (scheme == "light")
