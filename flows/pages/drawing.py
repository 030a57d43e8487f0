"""Renders templates and draws plots as inline SVG. A page needs no network and is legible in light and dark."""

import io
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

TEXT_COLOUR = "#010203"  # placeholder for the page's text colour in the finished SVG
LINE, MARK = "#3b82c4", "#d9822b"


def render(template: str, **values: Any) -> str:
    """Render a template of this folder; an .html template escapes its values."""
    templates = jinja2.Environment(autoescape=jinja2.select_autoescape(["html"]), trim_blocks=True, lstrip_blocks=True)
    templates.loader, templates.undefined = jinja2.PackageLoader("flows", "pages"), jinja2.StrictUndefined
    return templates.get_template(template).render(values)


def draw(name: str, plot: Callable[[Any], None], height: float = 3.0) -> str:
    """Draw with `plot` on matplotlib axes. Returns inline SVG, the same bytes for the same plot."""
    import matplotlib as mpl  # 1 s to import, so only when a page is drawn
    from matplotlib.figure import Figure

    coloured = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
    style: dict[Any, Any] = dict.fromkeys(coloured, TEXT_COLOUR) | {"svg.fonttype": "none", "svg.hashsalt": name}
    style |= {"font.size": 10, "text.parse_math": False}  # a file name may contain $
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


def bars(name: str, counts: dict[str, int], unit: str) -> str:
    """A chart of horizontal bars for counts."""

    def plot(axes: Any) -> None:
        axes.barh(list(counts), list(counts.values()), color=LINE)
        axes.invert_yaxis()
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel(unit)

    return draw(name, plot, 1.2 + 0.24 * len(counts))


def write_file(path: Path, page: bytes, option: str) -> None:
    """Write the page to the file that a user gave with this option. Raises ValueError if it cannot be written."""
    try:
        part = path.with_name(f"{path.name}.part")
        part.write_bytes(page)
        part.replace(path)
    except OSError as error:
        raise ValueError(f"{option} {path}: {error.strerror}. Give a file in a writable folder with space.") from error
