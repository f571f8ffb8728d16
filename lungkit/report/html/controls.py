"""The parts of a scan's page round the viewer: tools, layers, lesions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lungkit.report.html.lesions import Lesion
from lungkit.report.html.markup import Markup, element, join

_KEYS = (
    (("Arrows",), "move the crosshair in the plane, with Shift by ten voxels"),
    (("Page Up", "Page Down"), "next slice, as the wheel"),
    (("+", "−", "0"), "zoom (Ctrl + wheel too), whole picture again"),
    (("1", "2", "3"), "windows"),
    (("C", "W", "P", "R"), "crosshair, window, pan, ruler"),
    (("N", "Shift N"), "next lesion, the one before"),
    (("M", "T", "O"), "masks, truth, colours on and off"),
    (("B",), "masks in turn"),
    (("X",), "crosshair on and off"),
    (("Delete",), "takes the last ruler away"),
    (("Right button",), "dragging sets the window with every tool"),
)


def toolbar(windows: Sequence[tuple[str, tuple[float, float]]], *, models: int) -> Markup:
    """Buttons above the panes; ``models`` masks can be compared."""
    tools = [("cross", "Crosshair"), ("window", "Window"), ("pan", "Pan"), ("ruler", "Ruler")]
    layouts = [
        ("planes", "Three planes"),
        ("axial", "Axial"),
        ("coronal", "Coronal"),
        ("sagittal", "Sagittal"),
    ]
    if models > 1:
        layouts.append(("models", "Side by side"))
    number = {"type": "number", "step": "any"}
    return element(
        "div",
        _group("Drag", *(_button("tool", name, text, pressed=name == "cross") for name, text in tools)),
        _group(
            "Window",
            *(_button("window", f"{low:g},{high:g}", name, pressed=False) for name, (low, high) in windows),
            element(
                "label", "W ", element("input", data_window="width", aria_label="Window width", **number)
            ),
            element(
                "label", "L ", element("input", data_window="level", aria_label="Window level", **number)
            ),
        ),
        _group("Show", *(_button("layout", name, text, pressed=name == "planes") for name, text in layouts)),
        _group(
            "Zoom",
            _button("zoom", "out", "−", aria_label="Zoom out"),
            _button("zoom", "in", "+", aria_label="Zoom in"),
            _button("reset", None, "Whole"),
        ),
        _group(
            None,
            _button("blink", None, "Blink", pressed=False) if models else None,
            _button("crosshair", None, "Cross", pressed=True),
            _button("unrule", None, "Remove ruler"),
        ),
        class_="bar-of-tools",
        role="toolbar",
        aria_label="Viewer tools",
    )


def layers_panel(
    masks: Sequence[Mapping[str, Any]],
    maps: Sequence[Mapping[str, Any]],
    facts: Mapping[str, str],
    *,
    unit: bool,
) -> Markup:
    """What stands beside the panes: the place of the crosshair, masks, maps with their colours, facts."""
    at = element(
        "section",
        element("h2", "At the crosshair"),
        element(
            "dl",
            element("dt", "HU" if unit else "Value"),
            element("dd", element("output", "-", class_="value")),
            element("dt", "L, P, H mm"),
            element("dd", element("output", "-", class_="place")),
            *(
                join(element("dt", one["name"]), element("dd", element("output", "-", data_map=one["id"])))
                for one in maps
            ),
        ),
        element("p", "Patient coordinates of DICOM: to the left, to the back, to the head.", class_="note"),
    )
    drawn = element(
        "section",
        element("h2", "Masks"),
        *(join(*_mask_rows(mask)) for mask in masks),
        element("label", "Filled ", _amount("fill", 0)),
    )
    colours = element(
        "section",
        element("h2", "Colours"),
        *(
            element(
                "label",
                element(
                    "input", type="checkbox", data_layer=one["id"], data_kind="map", checked=one["shown"]
                ),
                element("span", one["name"]),
            )
            for one in maps
        ),
        element("label", "Opacity ", _amount("opacity", 50)),
        element(
            "canvas",
            class_="bar",
            width=256,
            height=10,
            role="img",
            aria_label="colours from 0, dark, to 1, bright",
        ),
        element(
            "div", *(element("span", text) for text in ("0", "0.5", "1")), class_="ticks", aria_hidden="true"
        ),
    )
    about = element(
        "section",
        element("h2", "Scan"),
        element("dl", *(join(element("dt", name), element("dd", text)) for name, text in facts.items())),
    )
    keys = element(
        "details",
        element("summary", "Keyboard"),
        element(
            "ul",
            *(element("li", *(join(element("kbd", key), " ") for key in keys), text) for keys, text in _KEYS),
            class_="keys",
        ),
    )
    return element("div", at, drawn if masks else None, colours if maps else None, about, keys, class_="side")


def findings_panel(lesions: Mapping[str, tuple[Sequence[Lesion], int]], *, unit: str | None) -> Markup:
    """The table of lesions by mask, with how many there are in all; the button of a row brings the crosshair there."""
    every = [lesion for found, _ in lesions.values() for lesion in found]
    if not every:
        return join(element("h2", "Lesions"), element("p", "None.")) if lesions else join()
    several = len(lesions) > 1
    classes = len({lesion.label for lesion in every}) > 1
    dense = any(lesion.mean_value is not None for lesion in every)
    sure = any(lesion.confidence is not None for lesion in every)
    titles = [
        "Volume (ml)", "Long (mm)", "Short (mm)", "Centre L, P, H (mm)",
        *([f"Mean {unit or 'value'}"] if dense else []),
        *(["Confidence"] if sure else []),
    ]  # fmt: skip
    head = element(
        "tr",
        element("th", "Lesion"),
        element("th", "Mask") if several else None,
        element("th", "Class") if classes else None,
        *(element("th", title, class_="number") for title in titles),
    )
    rows, left_out, number = [], 0, 0
    for layer, (found, total) in lesions.items():
        left_out += total - len(found)
        for place, lesion in enumerate(found, start=1):
            cells = [
                f"{lesion.volume_ml:.2f}",
                f"{lesion.long_mm:.1f}",
                f"{lesion.short_mm:.1f}",
                ", ".join(f"{mm:.1f}" for mm in lesion.centre_lps_mm),
                *([_text(lesion.mean_value, 0 if unit == "HU" else 2)] if dense else []),
                *([_text(lesion.confidence, 2)] if sure else []),
            ]
            button = element(
                "button",
                f"Show {place}",
                type="button",
                data_lesion=number,
                data_voxel=",".join(map(str, lesion.voxel)),
                aria_label=f"Show lesion {place} of {layer}",
            )
            rows.append(
                element(
                    "tr",
                    element("td", button),
                    element("td", layer) if several else None,
                    element("td", lesion.label) if classes else None,
                    *(element("td", cell, class_="number") for cell in cells),
                )
            )
            number += 1
    note = (
        "A lesion is a connected component (26 neighbours) of a class. Diameters are axial, of its convex "
        "outline: the longest, and the longest across it in the same slice."
        + (" Confidence is the mean probability within the lesion." if sure else "")
        + (f" {left_out} smaller ones are not listed." if left_out else "")
    )
    table = element("table", element("thead", head), element("tbody", *rows))
    return join(
        element("h2", "Lesions"),
        element("div", table, class_="scroll long", tabindex=0, role="region", aria_label="Lesions"),
        element("p", note, class_="note"),
    )


def _text(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _mask_rows(mask: Mapping[str, Any]) -> list[Markup]:
    """The switch of a mask, with the colour of its only class; else a line a class below."""
    classes = mask["classes"]
    lines = [element("span", swatch(one["colour"], dashed=mask["dashed"])) for one in classes]
    switch = element(
        "label",
        element(
            "input",
            type="checkbox",
            data_layer=mask["id"],
            data_kind="model" if mask["model"] else "truth",
            checked=True,
        ),
        lines[0] if len(classes) == 1 else None,
        element("span", mask["name"]),
    )
    if len(classes) == 1:
        return [switch]
    return [
        switch,
        *(
            element("label", line, element("span", one["name"]))
            for line, one in zip(lines, classes, strict=True)
        ),
    ]


def swatch(colour: str, *, dashed: bool) -> Markup:
    """A short line as the viewer draws it, on the viewer's black."""
    return element(
        "svg",
        element("rect", width=28, height=12, rx=2, fill="#000"),
        element(
            "line",
            x1=3,
            y1=6,
            x2=25,
            y2=6,
            stroke=colour,
            stroke_width=3,
            stroke_dasharray="6 3" if dashed else None,
        ),
        class_="swatch",
        viewBox="0 0 28 12",
        aria_hidden="true",
    )


def _group(title: str | None, *children: Markup | None) -> Markup:
    return element(
        "div",
        element("span", title) if title else None,
        *children,
        class_="group",
        role="group",
        aria_label=title,
    )


def _button(
    what: str, value: str | None, text: str, *, pressed: bool | None = None, aria_label: str | None = None
) -> Markup:
    return element(
        "button",
        text,
        type="button",
        data_do=what,
        data_value=value,
        aria_pressed=None if pressed is None else str(pressed).lower(),
        aria_label=aria_label,
    )


def _amount(name: str, value: int) -> Markup:
    return element("input", type="range", min=0, max=100, value=value, data_amount=name)
