"""Charts of the results page: Plotly figures as JSON, and the same as a picture for readers without JavaScript.

Colours are those of `analysis.style`; the page's script makes them lighter on a dark page.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import plotly.graph_objects as go
from matplotlib.figure import Figure
from plotly.subplots import make_subplots

from analysis import plots
from analysis.page.film import data_uri
from analysis.records import DecompositionRecord
from analysis.row_plots import GROUPS, Point, front, pareto_figure
from analysis.style import COMPUTED, GREY, REUSED

MARKERS = {"o": "circle", "^": "triangle-up", "s": "square", "D": "diamond", "v": "triangle-down"}
SIZES = (13.0, 8.0)  # of a marker, from the largest budget to the smallest
LAYOUT = {
    "template": "none",
    "font": {"family": "system-ui, sans-serif", "size": 13},
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "margin": {"l": 10, "r": 10, "t": 10, "b": 10},
    "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0},
    "hoverlabel": {"align": "left"},
    "dragmode": False,
}
AXIS = {"automargin": True, "zeroline": False, "gridcolor": "#8884", "fixedrange": True}


@dataclass(frozen=True)
class Chart:
    """A Plotly figure as JSON, how the picture in its place is drawn, and what both show."""

    json: str
    alt: str
    draw: Callable[[], Figure] | None = None

    @cached_property
    def picture(self) -> str:
        """A PNG as a data URI; nothing if another chart's picture shows the same."""
        if self.draw is None:
            return ""
        buffer = io.BytesIO()
        self.draw().savefig(buffer, format="png", dpi=110)
        return data_uri(buffer.getvalue(), "png")


def pareto(points: list[Point]) -> Chart:
    """PSNR against measured speed-up of what was timed: every point says its method, budget and interval."""
    timed = [point for point in points if point.speedup is not None]
    budgets = sorted({point.budget for point in timed}, reverse=True)
    sizes = dict(zip(budgets, np.linspace(*SIZES, len(budgets)), strict=True))
    best = front(timed)
    beaten_by_none = go.Scatter(
        x=[point.speedup for point in best],
        y=[point.psnr_db for point in best],
        mode="lines",
        line={"shape": "vh", "color": GREY, "width": 1.5},
        name="nothing has more of both",
        hoverinfo="skip",
    )
    figure = go.Figure(
        [beaten_by_none, *(_kind(key, timed, sizes) for key in GROUPS if any(p.group == key for p in timed))]
    )
    for point in timed:
        if point.is_reference:
            figure.add_annotation(
                x=point.speedup, y=point.psnr_db, text=point.title, showarrow=False, xanchor="right", xshift=-11
            )
    figure.update_layout(**LAYOUT, height=460)
    figure.update_xaxes(**AXIS, title="measured speed-up of denoising", ticksuffix="×")
    figure.update_yaxes(**AXIS, title="PSNR against uncached, dB")
    return Chart(figure.to_json(), "PSNR against measured speed-up", lambda: pareto_figure(points))


def _kind(key: str, points: list[Point], sizes: dict[int, float]) -> go.Scatter:
    group, mine = GROUPS[key], [point for point in points if point.group == key]
    return go.Scatter(
        x=[point.speedup for point in mine],
        y=[point.psnr_db for point in mine],
        mode="markers",
        name=group.text,
        marker={
            "color": group.colour,
            "symbol": MARKERS[group.marker],
            "opacity": 1,
            "size": [sizes[point.budget] for point in mine],
            "line": {"width": [2 if point.is_reference else 0 for point in mine], "color": REUSED},
        },
        customdata=[[point.title, point.budget, point.low, point.high] for point in mine],
        hovertemplate="<b>%{customdata[0]}</b>, %{customdata[1]} computed steps<br>"
        "%{y:.1f} dB [%{customdata[2]:.1f}, %{customdata[3]:.1f}], %{x:.2f}×<extra></extra>",
    )


def step_map(mask: list[int], sigmas: list[float]) -> Chart:
    """Computed and reused steps along the grid of sigmas that was integrated, which is one longer than the steps."""
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.2, 0.8], vertical_spacing=0.04)
    for name, wanted, colour in (("computed", 1, COMPUTED), ("reused", 0, REUSED)):
        steps = [step for step, computed in enumerate(mask) if computed == wanted]
        about = {"name": f"{name} ({len(steps)})", "legendgroup": name, "marker": {"color": colour}}
        figure.add_bar(
            x=steps, y=[1] * len(steps), width=0.9, hoverinfo="skip", showlegend=False, **about, row=1, col=1
        )
        hover = f"step %{{x}}, {name}<br>sigma %{{y:.4f}}<extra></extra>"
        sigma = [sigmas[step] for step in steps]
        figure.add_scatter(x=steps, y=sigma, mode="markers", hovertemplate=hover, **about, row=2, col=1)
    figure.update_layout(**LAYOUT, height=330, bargap=0)
    figure.update_xaxes(**AXIS)
    figure.update_yaxes(**AXIS)
    figure.update_yaxes(visible=False, row=1, col=1)
    figure.update_xaxes(title="step", row=2, col=1)
    figure.update_yaxes(title="sigma", row=2, col=1)
    return Chart(figure.to_json(), "Computed and reused steps", lambda: plots.step_map_figure(mask, sigmas))


def decomposition(record: DecompositionRecord) -> list[Chart]:
    """Shares of the final error by part; the same by step; and how much small errors have grown at the end."""
    parts, values = list(record.shares), list(record.shares.values())
    colours = dict(zip(parts, (REUSED, COMPUTED, GREY), strict=False))
    by_part = go.Figure(
        go.Bar(
            x=values,
            y=parts,
            orientation="h",
            marker={"color": [colours.get(part, GREY) for part in parts]},
            text=[f"{value:+.0%}" for value in values],
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{y}: %{x:.1%}<extra></extra>",
        )
    )
    by_part.update_layout(**LAYOUT, height=210)
    least, most = min([0, *values]), max([0, *values])
    room = 0.25 * (most - least)  # for the numbers beside the bars
    by_part.update_xaxes(**AXIS, title="share of the final error", tickformat=".0%", range=[least - room, most + room])
    by_part.update_yaxes(**{**AXIS, "autorange": "reversed"})
    made = [Chart(by_part.to_json(), "Shares of the final error by part", lambda: _bars(record.shares))]
    if record.by_step:
        shares = {part: np.array(values) for part, values in record.by_step.items()}
        by_step = _by_step(record, colours).to_json()
        whole = partial(plots.decomposition_figure, shares, record.growth)
        made.append(Chart(by_step, "Shares of the final error by step", whole))
    if record.growth:
        alt = "Growth of a small error by the step after which it is put in"
        made.append(Chart(_growth(record).to_json(), alt))
    return made


def _by_step(record: DecompositionRecord, colours: dict[str, str]) -> go.Figure:
    figure = go.Figure()
    for part, shares in record.by_step.items():
        hover = f"step %{{x}}, {part}: %{{y:.2%}}<extra></extra>"
        figure.add_bar(
            x=list(range(len(shares))), y=shares, name=part, marker_color=colours.get(part, GREY), hovertemplate=hover
        )
    figure.update_layout(**LAYOUT, height=360, barmode="relative", bargap=0.1)
    figure.update_xaxes(**AXIS, title="step")
    figure.update_yaxes(**AXIS, title="share of the final error", tickformat=".0%")
    return figure


def _growth(record: DecompositionRecord) -> go.Figure:
    steps = list(record.growth)
    least, lower, median, upper, most = plots.growth_quartiles(record.growth)
    look = {"line": {"color": COMPUTED}, "legendgroup": "half"}
    edge = {**look, "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
    figure = go.Figure()
    figure.add_scatter(x=steps, y=upper, showlegend=False, **edge)
    figure.add_scatter(x=steps, y=lower, fill="tonexty", fillcolor="rgba(0,114,178,0.25)", name="middle half", **edge)
    hover = "after step %{x}: %{y:.3g} of it is left<br>%{customdata[0]:.2g} to %{customdata[1]:.2g}<extra></extra>"
    figure.add_scatter(
        x=steps,
        y=median,
        mode="lines+markers",
        name="median over prompts and directions",
        line={"color": COMPUTED},
        customdata=np.stack([least, most], axis=1).tolist(),
        hovertemplate=hover,
    )
    figure.update_layout(**LAYOUT, height=320)
    figure.update_xaxes(**AXIS, title="error put in after step")
    figure.update_yaxes(**AXIS, title="of it at the end", type="log", dtick=1)
    return figure


def _bars(shares: dict[str, float]) -> Figure:
    figure = Figure((plots.WIDTH, 0.5 + 0.35 * len(shares)))
    axis = figure.subplots()
    axis.bar_label(axis.barh(list(shares), list(shares.values()), color=COMPUTED), fmt="{:+.0%}")
    axis.invert_yaxis()
    axis.set(xlabel="share of the final error")
    axis.margins(x=0.12)
    return figure
