"""Renders templates and draws plots as inline SVG. A page needs no network and is legible in light and dark."""

import io
import re
import warnings
from collections.abc import Callable
from typing import Any

import jinja2

TEXT_COLOUR = "#010203"  # placeholder for the page's text colour in the finished SVG
LINE, MARK = "#3b82c4", "#d9822b"


def render(template: str, **values: Any) -> str:
    """Render a template of this folder; an .html template escapes its values."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("flows", "pages"),
        autoescape=jinja2.select_autoescape(["html"]),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(values)


def draw(name: str, plot: Callable[[Any], None], height: float = 3.0) -> str:
    """Draw with `plot` on matplotlib axes. Returns inline SVG, the same bytes for the same plot."""
    import matplotlib as mpl  # 1 s to import, so only when a page is drawn
    from matplotlib.figure import Figure

    coloured = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
    style: dict[Any, Any] = dict.fromkeys(coloured, TEXT_COLOUR) | {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 10,
        "text.parse_math": False,  # a file name may contain $
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(7.2, height), layout="constrained")
        axes = figure.add_subplot()
        plot(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2, color=TEXT_COLOUR)
        axes.set_axisbelow(True)
        buffer = io.StringIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the reader's browser has it
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    return svg[svg.index("<svg") :].replace(TEXT_COLOUR, "currentColor")


def bars(name: str, labels: list[str], heights: list[int], unit: str) -> str:
    """A bar chart of counts: horizontal for more than 16 bars or labels longer than 8 characters."""

    def vertical(axes: Any) -> None:
        axes.bar(labels, heights, color=LINE)
        axes.set_ylabel(unit)
        axes.yaxis.set_major_formatter("{x:,.0f}")

    def horizontal(axes: Any) -> None:
        axes.barh(labels, heights, color=LINE)
        axes.invert_yaxis()
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel(unit)

    if len(labels) > 16 or max(map(len, labels), default=0) > 8:
        return draw(name, horizontal, 1.2 + 0.24 * len(labels))
    return draw(name, vertical)
