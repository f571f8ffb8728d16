"""The viewer in a real browser: what is pressed, dragged and scrolled does what it says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import browser, opened

from lungkit.data import Volume
from lungkit.data.geometry import plan_geometry
from lungkit.report.html import Case, MapLayer, MaskLayer, write_case_page
from lungkit.report.html.summary_page import Summary

SHAPE = (20, 48, 64)
HOSTILE = '"><img src=x onerror="document.title=1">\'</script><script>document.title=2</script>' + "n" * 120


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with browser(tmp_path_factory.mktemp("profile")) as one:
        yield one


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scan of noise with two predicted lesions and a true one."""
    image = np.random.default_rng(0).integers(-900, -700, SHAPE).astype(np.int16)
    prediction, truth = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    prediction[4:9, 10:20, 12:24] = 1
    prediction[14:17, 30:36, 40:48] = 1
    truth[5:10, 12:22, 12:24] = 1
    image[prediction > 0] = 40
    geometry = plan_geometry(Volume(image.T, np.diag([0.8, 0.8, 2.5, 1.0])))
    path = tmp_path_factory.mktemp("pages") / f"{HOSTILE.replace('/', '∕')[:60]}.html"
    case = Case(
        HOSTILE,
        geometry,
        image,
        [
            MaskLayer("A", prediction, {HOSTILE: 1}),
            MaskLayer("B", np.roll(prediction, 3, 2), {HOSTILE: 1}),
            MaskLayer("truth", truth, {HOSTILE: 1}, "truth"),
        ],
        [MapLayer("probability", prediction * np.float32(0.9))],
        facts={HOSTILE: HOSTILE},
        warnings=[HOSTILE],
        measured={HOSTILE: {HOSTILE: HOSTILE}},
    )
    write_case_page(path, case)
    return path


def cross(driver: Any) -> list[int]:
    return [int(at) for at in settled(driver)["cross"].split(",")]


def settled(driver: Any) -> dict[str, str]:
    """What the viewer says of itself once it has drawn."""
    found: dict[str, str] = driver.execute_async_script(
        "const done = arguments[0];"
        "requestAnimationFrame(() => requestAnimationFrame(() => "
        "done({...document.querySelector('.viewer').dataset})));"
    )
    return found


def pixels(driver: Any) -> list[int]:
    """Every 97th byte of the axial plane."""
    settled(driver)
    found: list[int] = driver.execute_script(
        "const canvas = document.querySelector('.axial canvas');"
        "const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);"
        "return Array.from(data.filter((_, i) => i % 97 === 0))"
    )
    return found


def press(driver: Any, selector: str) -> None:
    driver.execute_script("document.querySelector(arguments[0]).click()", selector)


def keys(driver: Any, text: str) -> None:
    driver.find_element("css selector", ".axial canvas").send_keys(text)


def wheel(driver: Any, selector: str, delta: int) -> None:
    driver.execute_script(
        "document.querySelector(arguments[0]).dispatchEvent(new WheelEvent('wheel', {deltaY: arguments[1], "
        "bubbles: true, cancelable: true}))",
        selector,
        delta,
    )


def test_the_page_opens_from_a_file_without_a_word_on_the_console(driver: Any, page: Path) -> None:
    opened(driver, page)
    assert driver.execute_script("return document.querySelector('.viewer').dataset.ready") == "yes"
    assert max(pixels(driver)) == 255


def test_a_hostile_name_is_text_and_nothing_else(driver: Any, page: Path) -> None:
    opened(driver, page)
    assert driver.find_element("css selector", "h1").text == HOSTILE
    assert driver.title == HOSTILE
    assert driver.find_elements("css selector", "img") == []


def test_the_policy_of_the_page_forbids_scripts_that_are_not_ours_and_connections(
    driver: Any, page: Path
) -> None:
    opened(driver, page)
    driver.execute_script(
        "const s = document.createElement('script'); s.textContent = 'document.title = 3'; document.body.append(s)"
    )
    reached = driver.execute_async_script(
        "fetch('data:text/plain,x').then(() => arguments[0]('reached'), () => arguments[0]('refused'))"
    )
    assert (driver.title, reached) == (HOSTILE, "refused")


def test_scrolling_shows_the_next_slice(driver: Any, page: Path) -> None:
    opened(driver, page)
    before, shown = cross(driver), pixels(driver)
    wheel(driver, ".axial canvas", -100)
    assert cross(driver) == [before[0], before[1], before[2] + 1]
    assert pixels(driver) != shown
    assert driver.find_element("css selector", ".axial figcaption span").text == (
        f"axial {before[2] + 2} of {SHAPE[0]}"
    )


def test_a_click_on_a_lesion_brings_the_crosshair_to_its_voxel(driver: Any, page: Path) -> None:
    opened(driver, page)
    buttons = driver.find_elements("css selector", "button[data-lesion]")
    assert len(buttons) == 5
    for button in buttons:
        driver.execute_script("arguments[0].click()", button)
        assert settled(driver)["cross"] == button.get_attribute("data-voxel")


def test_the_middle_of_a_plane_is_the_middle_voxel(driver: Any, page: Path) -> None:
    from selenium.webdriver import ActionChains

    opened(driver, page)
    ActionChains(driver).move_to_element(
        driver.find_element("css selector", ".coronal canvas")
    ).click().perform()
    x, _, z = cross(driver)
    assert abs(x - SHAPE[2] / 2) <= 1
    assert abs(z - SHAPE[0] / 2) <= 1


def test_a_window_changes_the_grey_values_by_button_and_by_dragging(driver: Any, page: Path) -> None:
    from selenium.webdriver import ActionChains

    opened(driver, page)
    lung = pixels(driver)
    press(driver, "button[data-value='-160,240']")
    assert settled(driver)["window"] == "-160,240"
    mediastinum = pixels(driver)
    assert mediastinum != lung
    press(driver, "button[data-value=window]")
    canvas = driver.find_element("css selector", ".axial canvas")
    ActionChains(driver).move_to_element(canvas).click_and_hold().move_by_offset(40, -60).release().perform()
    low, high = map(float, settled(driver)["window"].split(","))
    assert high - low > 400  # wider to the right
    assert (high + low) / 2 < 40  # lower upward
    assert pixels(driver) != mediastinum


def test_layers_come_and_go(driver: Any, page: Path) -> None:
    opened(driver, page)
    seen = [pixels(driver)]
    for layer in ("map-0", "mask-0", "mask-2"):
        press(driver, f"input[data-layer={layer}]")
        seen.append(pixels(driver))
        assert seen[-1] != seen[-2], layer
    for layer in ("map-0", "mask-0", "mask-2"):
        press(driver, f"input[data-layer={layer}]")
    assert pixels(driver) == seen[0]


def test_the_keyboard_moves_scrolls_zooms_and_finds_lesions(driver: Any, page: Path) -> None:
    from selenium.webdriver import Keys

    opened(driver, page)
    x, y, z = cross(driver)
    keys(driver, Keys.ARROW_RIGHT)  # to the patient's left, where x of RAS falls
    assert cross(driver) == [x - 1, y, z]
    keys(driver, Keys.ARROW_UP)
    assert cross(driver) == [x - 1, y + 1, z]
    keys(driver, Keys.PAGE_DOWN)
    assert cross(driver) == [x - 1, y + 1, z - 1]
    shown = pixels(driver)
    keys(driver, "+")
    assert pixels(driver) != shown
    keys(driver, "0")
    assert pixels(driver) == shown
    keys(driver, "n")
    first = driver.find_element("css selector", "button[data-lesion]")
    assert settled(driver)["cross"] == first.get_attribute("data-voxel")


def test_a_ruler_is_drawn_and_taken_away(driver: Any, page: Path) -> None:
    from selenium.webdriver import ActionChains, Keys

    opened(driver, page)
    before = pixels(driver)
    press(driver, "button[data-value=ruler]")
    canvas = driver.find_element("css selector", ".axial canvas")
    ActionChains(driver).move_to_element(canvas).click_and_hold().move_by_offset(100, 0).release().perform()
    assert pixels(driver) != before
    keys(driver, Keys.DELETE)
    assert pixels(driver) == before


def test_models_stand_side_by_side_and_take_turns(driver: Any, page: Path) -> None:
    opened(driver, page)
    press(driver, "button[data-value=models]")
    settled(driver)
    titles = [one.text for one in driver.find_elements("css selector", ".pane figcaption span")]
    assert [title.split(" ")[:2] for title in titles] == [["axial:", "A"], ["axial:", "B"]]
    press(driver, "button[data-value=planes]")
    shown = pixels(driver)
    keys(driver, "b")
    assert pixels(driver) != shown  # one of the two
    keys(driver, "b")
    assert pixels(driver) == shown


def test_a_damaged_page_says_so(driver: Any, page: Path, tmp_path: Path) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    text = page.read_text()
    start = text.index('id="volume-image">') + len('id="volume-image">')
    damaged = tmp_path / "damaged.html"
    damaged.write_text(text[: start + 40] + "AAAAAAAA" + text[start + 48 :])
    driver.get(damaged.as_uri())
    WebDriverWait(driver, 30).until(
        lambda one: one.execute_script("return document.querySelector('.viewer').dataset.ready")
    )
    assert "cannot be shown" in driver.find_element("css selector", ".status").text


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four hundred cases, of which the first has a page and the last no value."""
    summary = Summary(HOSTILE)
    rows = [[f"{HOSTILE} {case}", "tumour", (case * 37 % 400) / 400] for case in range(399)]
    rows.append(["last", "tumour", float("nan")])
    summary.rows("Cases", ["Case", "Class", "Dice"], rows, pages=[case == 0 for case in range(400)])
    path = tmp_path_factory.mktemp("tables") / "report.html"
    summary.write(path)
    return path


def column(driver: Any, place: int) -> list[str]:
    found: list[str] = driver.execute_script(
        "return [...document.querySelectorAll('tbody tr')].map((row) => row.children[arguments[0]].textContent)",
        place,
    )
    return found


def test_a_table_sorts_turns_and_keeps_what_is_undefined_last(driver: Any, table: Path) -> None:
    opened(driver, table)
    assert len(column(driver, 2)) == 50
    for _ in range(2):
        press(driver, "th:nth-child(3) button")
    falling = [float(cell) for cell in column(driver, 2)]
    assert falling[0] == max(falling) == 0.9975
    assert falling == sorted(falling, reverse=True)
    for _ in range(7):
        press(driver, "button[data-turn='1']")
    assert column(driver, 2)[-1] == "-"
    assert driver.find_element("css selector", ".count").text == "351 to 400 of 400"


def test_a_table_is_filtered_by_name_and_by_value(driver: Any, table: Path) -> None:
    opened(driver, table)
    search = driver.find_element("css selector", "input[type=search]")
    search.send_keys("dice<0.01 tumour")
    assert sorted(map(float, column(driver, 2))) == [0, 0.0025, 0.005, 0.0075]
    search.clear()
    search.send_keys("LAST")
    assert column(driver, 0) == ["last"]
    search.clear()
    search.send_keys("no such case")
    assert driver.find_element("css selector", ".count").text == "nothing fits"


def test_a_case_with_a_page_is_a_link_below_the_folder(driver: Any, table: Path) -> None:
    opened(driver, table)
    links = driver.find_elements("css selector", "tbody a")
    assert [link.text for link in links] == [f"{HOSTILE} 0"]
    assert links[0].get_attribute("href").startswith(table.parent.as_uri() + "/pages/%22%3E%3Cimg")
