"""HTML pages that need no other file: templates, one script and style, and embedded pictures."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable
from importlib import resources
from typing import Any

import jinja2

from orchestration.differences import counted, is_of_one_base, unit_of
from orchestration.protocols import is_adaptive
from orchestration.results import decimals_of, format_interval
from orchestration.titles import companions, short_title, title

# Of arms, in turn.
COLOURS = (
    "#444444", "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2",
    "#17becf", "#bcbd22", "#393b79", "#843c39", "#637939", "#7b4173", "#8c6d31", "#7f7f7f",
)  # fmt: skip
GENERATOR = '<meta name="generator" content="mixflow">'  # how a page of this project is told from other files


def render(template: str, **values: Any) -> str:
    """A template of this package, filled; what others said is escaped, and only the page's own script may run."""
    folder = resources.files("orchestration")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text()),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(interval=format_interval, title=title, short_title=short_title, number=number)
    environment.filters.update(counted=counted, unit_of=unit_of)
    environment.tests.update(of_one_base=is_of_one_base, adaptive=is_adaptive)
    script = folder.joinpath("page.js").read_text()
    hashed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals.update(companions=companions, generator=GENERATOR, script=script, script_hash=hashed)
    return environment.get_template(template).render(**values)


def picture(draw: Callable[[Any], None], size: tuple[float, float]) -> bytes:
    """A PNG of what `draw` puts on a figure of this size in inches."""
    # The object interface of matplotlib: no pyplot, no global state, no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", dpi=120)
    draw(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def data_uri(content: bytes) -> str:
    """A PNG as it is embedded in a page."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def number(value: float | None, *, signed: bool = False) -> str:
    """A number with the decimals that its size asks for; a dash for one that is not there."""
    if value is None:
        return "\u2013"
    return f"{value:{'+' if signed else ''}.{decimals_of(abs(value))}f}"
