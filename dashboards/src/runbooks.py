"""The runbooks of docs/runbooks where people look: a dashboard of texts, and pages that Prometheus itself serves."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import dashboard as db
from grafana_foundation_sdk.builders import text
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.text import TextMode
from markdown_it import MarkdownIt

BOOKS = Path(__file__).resolve().parents[2] / "docs" / "runbooks"
UID = "storaged-runbooks"
TITLE = "storaged / Runbooks"
WIDTH, HEIGHT = 12, 17
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{name}</title><style>
body {{ font: 16px/1.5 sans-serif; max-width: 50em; margin: 2em auto; padding: 0 1em; color-scheme: light dark }}
pre {{ overflow: auto; padding: 1em; border: 1px solid }}
</style></head><body>
{body}</body></html>
"""
"""Prometheus reads it as a template: what is in braces twice is its own."""


def names() -> list[str]:
    """All alerts with a runbook; a panel's id is its place, from 1."""
    return sorted(path.stem for path in BOOKS.glob("*.md"))


def book(name: str) -> str:
    """What docs/runbooks has."""
    return (BOOKS / f"{name}.md").read_text(encoding="utf-8")


def link(name: str, published: str) -> str:
    """Where a panel leads: to the runbooks beside it, or to where somebody else has published them."""
    return f"{published}/{name}.md" if published else f"/d/{UID}?viewPanel={names().index(name) + 1}"


def html_page(name: str) -> str:
    """A page for Prometheus' `/consoles/`."""
    page = PAGE.format(name=html.escape(name), body=MarkdownIt().render(book(name)))
    if "{{" in page:
        raise ValueError(f"{name}: Prometheus would take what is in double braces for its own")
    return page


def panels() -> list[dict[str, Any]]:
    """One text for each."""
    made = []
    for index, name in enumerate(names()):
        body = book(name).partition("\n")[2].strip()
        built = text.Panel().title(name).description(f"What to do about {name}.").mode(TextMode.MARKDOWN).content(body)
        spot = {"x": index % 2 * WIDTH, "y": index // 2 * HEIGHT, "w": WIDTH, "h": HEIGHT}
        if index == len(names()) - 1 and index % 2 == 0:
            spot["w"] = 2 * WIDTH
        made.append(json.loads(json.dumps(built.build(), cls=JSONEncoder)) | {"id": index + 1, "gridPos": spot})
    return made


def bare() -> db.Dashboard:
    """The dashboard without its panels."""
    about = "What each alert means, whom it hurts, how to look and what to do."
    return db.Dashboard(TITLE).uid(UID).description(about)
