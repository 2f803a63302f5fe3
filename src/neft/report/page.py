"""The report: one HTML file with all that a run or comparison found out, for people to read."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from markupsafe import Markup

from neft.report.blocks import Page
from neft.report.comparison_view import comparison_page
from neft.report.run_data import RunData
from neft.report.run_view import run_page

if TYPE_CHECKING:
    from jinja2 import Template

_POLICY = (
    "default-src 'none'; img-src data:; style-src '{style}'; script-src '{script}'; base-uri 'none'; "
    "form-action 'none'"
)


def render_report(run: RunData) -> str:
    """A complete HTML page: styles, script, figures and data are in it, and it loads nothing.

    Args:
        run: see ``read_run``; parts that are missing become gaps that say how to fill them.
    """
    return render(
        run_page(run) if run.comparison is None else comparison_page(run.comparison, run.folder)
    )


def render(page: Page) -> str:
    """Lay out a page. Every text is escaped; only figures are taken as they are."""
    style, script = _resource("report.css"), _resource("report.js")
    policy = _POLICY.format(style=_digest(style), script=_digest(script))
    html = _template().render(page=page, policy=policy, style=Markup(style), script=Markup(script))
    return f"{html.strip()}\n"


def _resource(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """The source expression by which a content policy allows this one inline element."""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
    return f"sha256-{digest}"


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_resource("template.html.jinja"))
