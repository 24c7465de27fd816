"""Results on the evaluation sets as one HTML file: tables, errors by circumstance, estimates against truths."""
from __future__ import annotations

import base64
import html
import io

import torch

from ssl_gpu.assess import Assessment
from ssl_gpu.plots import COLOURS, GREY
from ssl_gpu.report import is_leaked

CONDITIONS = {"separation_deg": "separation (degrees)", "angle_deg": "cone angle (degrees)", "t20_s": "T20 (s)",
              "drr_db": "direct-to-reverberant ratio (dB)", "level_gap_db": "level gap (dB)", "snr_db": "SNR (dB)"}
STYLE = "body{font:15px sans-serif;max-width:75em;margin:2em auto;padding:0 1em}pre{overflow-x:auto}img{max-width:100%}"


def page(found: dict[str, Assessment], table: str) -> str:
    """The page as text. Raises ValueError without matplotlib."""
    parts = [f"<h1>Localisation of two talkers with two microphones</h1><pre>{html.escape(table)}</pre>"]
    for name, assessment in found.items():
        leaked = ", LEAKED" if is_leaked(assessment.result) else ""
        parts.append(f"<h2>{html.escape(name)}{leaked}</h2>")
        parts += [f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
                  for png in (_by_condition(assessment), _against_truth(assessment)) if png is not None]
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>ssl_gpu: evaluation</title>'
            f"<style>{STYLE}</style>{''.join(parts)}</html>\n")


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _by_condition(assessment: Assessment) -> bytes | None:
    """Mean cone error in the bins of every condition that has more than one, as bars: model and GCC-PHAT."""
    from matplotlib.figure import Figure

    rows = {"GCC-PHAT": assessment.result["baseline"]["by"]}
    if "by" in assessment.result:
        rows = {"model": assessment.result["by"], **rows}
    names = [name for name in CONDITIONS if len(rows["GCC-PHAT"].get(name, ())) > 1]
    if not names:
        return None
    figure = Figure(figsize=(4.2 * len(names), 3.2), dpi=80, layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        for place, ((who, by), colour) in enumerate(zip(rows.items(), COLOURS)):
            bins = by[name]
            at = torch.arange(len(bins)) + 0.4 * (place - 0.5 * (len(rows) - 1))
            axes.bar(at, [bin["cone_mae_deg"] for bin in bins], 0.38, color=colour, label=who)
        labels = [f"{bin['from']:g}.." + ("" if bin["to"] is None else f"{bin['to']:g}") for bin in bins]
        axes.set_xticks(range(len(bins)), labels, fontsize=8)
        axes.set(xlabel=CONDITIONS[name], ylabel="cone MAE (degrees)")
        axes.grid(alpha=0.25, axis="y")
        axes.legend(frameon=False)
    return _png(figure)


def _against_truth(assessment: Assessment) -> bytes | None:
    """Every estimate of the model against its truth, and the share of sources within an error."""
    from matplotlib.figure import Figure

    if assessment.cone is None:
        return None
    truth, heard = torch.rad2deg(assessment.truth.cone), torch.rad2deg(assessment.cone.double())
    figure = Figure(figsize=(9, 4.2), dpi=80, layout="constrained")
    left, right = figure.subplots(1, 2)
    for source, colour in zip(range(truth.shape[1]), COLOURS):
        left.plot(truth[:, source], heard[:, source], ".", color=colour, markersize=2, alpha=0.5)
    left.plot((0, 180), (0, 180), color=GREY, linewidth=0.8)
    left.set(xlabel="true cone angle (degrees)", ylabel="estimate (degrees)", aspect="equal")
    error = (heard - truth).abs().flatten().sort().values
    right.plot(error, (torch.arange(len(error)) + 1) / len(error), color=COLOURS[0])
    right.set(xlabel="at most so many degrees off", ylabel="share of sources", xlim=(0, 20), ylim=(0, 1))
    for axes in (left, right):
        axes.grid(alpha=0.25)
    return _png(figure)
