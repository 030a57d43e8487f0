"""Renders templates and charts. A page needs no network, and is legible in light and dark.

A chart is a Vega-Lite specification: static as SVG, interactive where the page may run its script.
"""

import json
from base64 import b64encode
from functools import cache
from gzip import compress
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

Chart = dict[str, Any]
FOLDER = files("flows.pages")


def render(template: str, **values: Any) -> str:
    """Render a template of this folder; an .html template escapes its values."""
    templates = jinja2.Environment(autoescape=jinja2.select_autoescape(["html"]), trim_blocks=True, lstrip_blocks=True)
    templates.loader, templates.undefined = jinja2.PackageLoader("flows", "pages"), jinja2.StrictUndefined
    templates.filters["svg"], templates.globals["scripts"] = svg, scripts
    templates.policies["json.dumps_kwargs"] = {"sort_keys": False}
    return templates.get_template(template).render(values)


def svg(chart: Chart) -> str:
    """Draw a chart as inline SVG, the same bytes for the same chart."""
    import vl_convert  # loads 80 MB, so only when a page is drawn

    return vl_convert.vegalite_to_svg(chart)


@cache
def scripts() -> dict[str, str]:
    """What the page may run: its own script, Vega as base64 of gzip (407 kB instead of 898), and the hashes of both."""
    import vl_convert

    vega = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed").encode()
    own = FOLDER.joinpath("charts.js").read_bytes()
    hashes = " ".join(f"'sha256-{b64encode(sha256(script).digest()).decode()}'" for script in (own, vega))
    return {"own": own.decode(), "vega": b64encode(compress(vega, mtime=0)).decode(), "hashes": hashes}


def bars(counts: dict[str, int], unit: str) -> Chart:
    """A chart of horizontal bars for counts."""
    chart = specification("bars", [{"name": name, unit: count} for name, count in counts.items()])
    chart["encoding"]["x"]["field"] = unit
    return chart


def specification(kind: str, values: list[dict[str, Any]]) -> Chart:
    """A chart of this kind in charts.json, with these values."""
    specifications = json.loads(FOLDER.joinpath("charts.json").read_bytes())
    return {**specifications["look"], **specifications[kind], "data": {"values": values}}


def write_file(path: Path, page: bytes, option: str) -> None:
    """Write the page to the file that a user gave with this option. Raises ValueError if it cannot be written."""
    try:
        part = path.with_name(f"{path.name}.part")
        part.write_bytes(page)
        part.replace(path)
    except OSError as error:
        raise ValueError(f"{option} {path}: {error.strerror}. Give a file in a writable folder with space.") from error
