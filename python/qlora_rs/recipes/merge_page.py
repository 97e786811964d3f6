"""The report of a merge as one HTML page that needs no other file."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from qlora_rs.merging.report import MergeReport, report_table

_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:62em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}td,th{padding:2px 10px;text-align:right}"
    "td:first-child,th:first-child{text-align:left}tr:nth-child(even){background:#f4f4f4}"
    "pre{background:#f4f4f4;padding:1em;overflow-x:auto}svg{max-width:100%;height:auto}"
)


def merge_page(report: MergeReport, record: dict[str, Any], plot: Path) -> str:
    """The page: summary, picture and one line per layer. plot: an SVG file, or none there."""
    picture = ""
    if plot.is_file():
        svg = plot.read_text(encoding="utf-8")
        picture = svg[svg.find("<svg") :]
    rows = "".join(
        f"<tr><td>{html.escape(layer.name)}</td><td>{layer.shape[0]} x {layer.shape[1]}</td>"
        f"<td>{layer.error_to_output:.4f}</td><td>{layer.error_to_update:.3f}</td>"
        f"<td>{layer.nearest_to_update:.3f}</td><td>{layer.ratio_to_nearest:.3f}</td></tr>"
        for layer in report.layers
    )
    layers = (
        "<h2>Layers</h2><table><tr><th>layer</th><th>shape</th><th>error / output</th>"
        "<th>error / update</th><th>plain rounding / update</th><th>ours / plain rounding</th>"
        f"</tr>{rows}</table>"
        if rows
        else ""
    )
    source = f"{record['base']} + {record['adapter']}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Merge</title>'
        f"<style>{_STYLE}</style><h1>Merge</h1><p>{html.escape(source)}</p>"
        f"<pre>{html.escape(report_table(report))}</pre>"
        "<p>An error of 1 relative to the update means that the update might as well have been "
        f"dropped.</p>{picture}{layers}</html>\n"
    )
