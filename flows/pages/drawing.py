"""Pages for people: HTML of a template, plots as inline SVG. No request leaves a page; legible light and dark."""

import io
import re
import warnings
from collections.abc import Callable
from typing import Any

import jinja2

INK = "#010203"  # drawn with this colour, then replaced by the page's own
LINE, MARK = "#3b82c4", "#d9822b"


def render(template: str, facts: dict[str, Any]) -> bytes:
    """The page of a template beside this module."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("flows", "pages"),
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    return templates.get_template(template).render(facts).encode()


def draw(name: str, plot: Callable[[Any], None], height: float = 3.0) -> str:
    """What `plot` puts on matplotlib axes, as an inline SVG; the same bytes for the same plot."""
    import matplotlib as mpl  # 1 s to import, so only when a page is drawn
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "text.color": INK, "axes.labelcolor": INK,
                         "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": INK, "font.size": 10,
                         "text.parse_math": False}):  # fmt: skip  # a file may be called $x$.parquet
        figure = Figure(figsize=(7.2, height), layout="constrained")
        axes = figure.add_subplot()
        plot(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2, color=INK)
        axes.set_axisbelow(True)
        drawn = io.StringIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the reader's browser has it
            figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", drawn.getvalue(), flags=re.DOTALL)
    return svg[svg.index("<svg") :].replace(INK, "currentColor")


def bars(name: str, labels: list[str], heights: list[int], unit: str) -> str:
    """Counts side by side; lying, when there are many or their names are long."""
    if len(labels) > 16 or max(map(len, labels), default=0) > 8:
        return draw(name, lambda axes: _lying(axes, labels, heights, unit), 1.2 + 0.24 * len(labels))

    def standing(axes: Any) -> None:
        axes.bar(labels, heights, color=LINE)
        axes.set_ylabel(unit)
        axes.yaxis.set_major_formatter("{x:,.0f}")

    return draw(name, standing)


def _lying(axes: Any, labels: list[str], heights: list[int], unit: str) -> None:
    axes.barh(labels, heights, color=LINE)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel(unit)
