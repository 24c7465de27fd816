"""Results on the evaluation sets as one HTML file: tables, errors by circumstance, estimates against truths, examples.

An SNR is the same in all clips of a set: errors by SNR are drawn where several of e1n0, e1n5 ... and e1, or of e1w0,
e1w5 ... and e1, are there.
"""
from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping

import torch

from ssl_gpu.assess import Assessment
from ssl_gpu.plots import COLOURS, GREY
from ssl_gpu.protocol import NOISES
from ssl_gpu.report import is_leaked
from ssl_gpu.scoring import LEAST_CLUSTERS

CONDITIONS = {"separation_deg": "separation (degrees)", "angle_deg": "cone angle (degrees)", "t20_s": "T20 (s)",
              "drr_db": "direct-to-reverberant ratio (dB)", "level_gap_db": "level gap (dB)", "snr_db": "SNR (dB)"}
KINDS = tuple(tuple(name for name in NOISES if name[:3] == kind) for kind in ("e1n", "e1w"))  # each by ascending SNR
COLOUR_OF = dict(zip(("model", "GCC-PHAT"), COLOURS))  # in all pictures, whether there is a model or not
EXAMPLES = 8  # clips of each set, its first
STYLE = ("body{font:15px sans-serif;max-width:75em;margin:2em auto;padding:0 1em}pre{overflow-x:auto}"
         "img{max-width:100%}td,th{padding:0 1em 0 0;text-align:left}")


def page(found: dict[str, Assessment], table: str, about: Mapping[str, str]) -> str:
    """The page as text. about: title -> text, what stands above the results: of which weights, made when and how.

    Needs matplotlib."""
    head = "".join(f"<tr><th>{html.escape(title)}</th><td>{html.escape(text)}</td></tr>"
                   for title, text in about.items())
    parts = [f"<h1>Localisation of two talkers with two microphones</h1><table>{head}</table>"
             f"<pre>{html.escape(table)}</pre><p>Bars: means with 95 % intervals by a bootstrap over scenes (e3: over "
             f"loudspeaker positions), where a bin has sources of at least {LEAST_CLUSTERS} different ones; n: sources "
             f"in a bin, two of a clip.</p>"]
    for name, assessment in found.items():
        leaked = ", LEAKED" if is_leaked(assessment.result) else ""
        parts.append(f"<h2>{html.escape(name)}{leaked}</h2>")
        parts += [_image(name, png) for png in (_by_condition(_bins(assessment)), _against_truth(assessment))
                  if png is not None]
        parts.append(_examples(assessment))
    for kind in KINDS:
        names = [name for name in (*kind, "e1") if name in found]
        if len(names) > 1:
            by_set = [_bins(found[name]) for name in names]
            joined = {who: {"snr_db": [row for by in by_set for row in by[who]["snr_db"]]} for who in by_set[0]}
            title = " and ".join((", ".join(names[:-1]), names[-1]))
            parts.append(f"<h2>{title}</h2>" + _image("errors by SNR", _by_condition(joined)))
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>ssl_gpu: evaluation</title>'
            f"<style>{STYLE}</style>{''.join(parts)}</html>\n")


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _image(name: str, png: bytes) -> str:
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _examples(assessment: Assessment) -> str:
    """The first clips in a table, a row each: the two talkers by ascending cone angle."""
    truth = torch.rad2deg(assessment.truth.cone)
    heard = None if assessment.cone is None else torch.rad2deg(assessment.cone.double())
    t20 = assessment.truth.conditions["t20_s"]
    head = ("utterances", "cone angles", *(("heard", "off by") if heard is not None else ()), "T20")
    rows = ["".join(f"<th>{title}</th>" for title in head)]
    for clip, names in enumerate(assessment.utterances[:EXAMPLES]):
        cells = [", ".join(names), _pair(truth[clip], "°")]
        if heard is not None:
            cells += [_pair(heard[clip], "°"), _pair((heard[clip] - truth[clip]).abs(), "°")]
        cells.append(_pair(t20[clip], " s", 2))
        rows.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _pair(values: torch.Tensor, unit: str, digits: int = 1) -> str:
    return " / ".join(f"{value:.{digits}f}" if math.isfinite(value) else "?" for value in values.tolist()) + unit


def _bins(assessment: Assessment) -> dict[str, dict[str, list]]:
    """Of model, where there is one, and GCC-PHAT: the bins of every condition."""
    rows = {"GCC-PHAT": assessment.result["baseline"]["by"]}
    return {"model": assessment.result["by"], **rows} if "by" in assessment.result else rows


def _by_condition(rows: dict[str, dict[str, list]]) -> bytes | None:
    """Mean cone error in the bins of every condition that has more than one, as bars with their 95 % intervals: model
    and GCC-PHAT. Under each bin stands of how many sources it is."""
    from matplotlib.figure import Figure

    names = [name for name in CONDITIONS if len(rows["GCC-PHAT"].get(name, ())) > 1]
    if not names:
        return None
    figure = Figure(figsize=(4.2 * len(names), 3.5), dpi=80, layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        for place, (who, by) in enumerate(rows.items()):
            bins = by[name]
            at = torch.arange(len(bins)) + 0.4 * (place - 0.5 * (len(rows) - 1))
            axes.bar(at, [bin["cone_mae_deg"] for bin in bins], 0.38, color=COLOUR_OF[who], label=who)
            for x, bin in zip(at.tolist(), bins):
                if bin["interval_95"] is not None:  # of percentiles: the mean need not lie within
                    axes.plot((x, x), bin["interval_95"], color="black", linewidth=1.2)
        labels = [f"{bin['from']:g}.." + ("" if bin["to"] is None else f"{bin['to']:g}") + f"\nn={bin['num_sources']}"
                  for bin in bins]
        axes.set_xticks(range(len(bins)), labels, fontsize=8)
        axes.set(xlabel=CONDITIONS[name], ylabel="cone MAE (degrees)")
        axes.grid(alpha=0.25, axis="y")
    # One for all, and outside: which corner of a plot is free of bars depends on the results.
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=len(rows), frameon=False)
    return _png(figure)


def _against_truth(assessment: Assessment) -> bytes | None:
    """Every estimate of the model against its truth, and the share of sources within an error. The fewer clips, the
    larger the dots: 2,000 are not to hide each other, and eight are to be seen."""
    from matplotlib.figure import Figure

    if assessment.cone is None:
        return None
    truth, heard = torch.rad2deg(assessment.truth.cone), torch.rad2deg(assessment.cone.double())
    figure = Figure(figsize=(9, 4.5), dpi=80, layout="constrained")
    left, right = figure.subplots(1, 2)
    size = min(max(90 / math.sqrt(len(truth)), 2.0), 9.0)
    for source, (which, colour) in enumerate(zip(("smaller", "larger"), COLOURS)):
        left.plot(truth[:, source], heard[:, source], ".", color=colour, markersize=size, alpha=0.5, markeredgewidth=0,
                  label=f"talker at the {which} angle")
    left.plot((0, 180), (0, 180), color=GREY, linewidth=0.8)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False,
                  markerscale=9.0 / size)
    left.set(xlabel="true cone angle (degrees)", ylabel="estimate (degrees)", aspect="equal")
    error = (heard - truth).abs().flatten().sort().values
    right.plot(error, (torch.arange(len(error)) + 1) / len(error), color=COLOURS[0])
    right.set(xlabel="at most so many degrees off", ylabel="share of sources", xlim=(0, 20), ylim=(0, 1))
    for axes in (left, right):
        axes.grid(alpha=0.25)
    return _png(figure)
