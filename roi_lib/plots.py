"""Every figure of the series, in one style.

`use_style()` once at the top of a notebook; then each function takes data, draws a new figure and
returns it. Colors are Okabe and Ito's, which color-blind readers can tell apart; each comes with a
line style, a marker and a hatch, so that the figures can also be read in greyscale. Axes carry
units. End a plot cell with `plt.show()`.
"""

from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch

COLORS = ["#0072B2", "#E69F00", "#222222", "#CC79A7", "#009E73", "#56B4E9"]
LINES = ["-", "--", "-.", ":", (0, (6, 1.5)), (0, (3, 1, 1, 1, 1, 1))]
MARKERS = ["o", "s", "^", "D", "v", "P"]
HATCHES = ["", "///", "...", "xxx", "\\\\\\", "++"]
# Skip is almost white; then light to dark, so that effort reads as darkness in greyscale.
ACTIONS = [("#EFEFEF", ""), ("#56B4E9", "///"), ("#D55E00", "..."), ("#0B3C5D", "xx"),
           ("#F0E442", "\\\\"), ("#009E73", "++"), ("#CC79A7", "oo"), ("#000000", "")]
LIGHT = ["#56B4E9", "#F5D9A3", "#FFFFFF", "#CC79A7", "#BBBBBB", "#9FDCC8"]  # behind text
WIDTH = 7.5  # inches: fits a notebook column at 100 dpi


def use_style():
    """Set matplotlib's defaults for the whole series (fonts, grid, spines, resolution)."""
    plt.rcParams.update({
        "figure.figsize": (WIDTH, 3.4), "figure.dpi": 100, "figure.constrained_layout.use": True,
        "font.size": 11, "axes.titlesize": 12, "axes.titlelocation": "left", "legend.fontsize": 10,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "axes.axisbelow": True, "grid.color": "#DDDDDD", "grid.linewidth": 0.8,
        "lines.linewidth": 2.0, "lines.markersize": 6, "hatch.linewidth": 0.8,
        "legend.frameon": False, "image.cmap": "cividis",
    })


def lines(x, series, xlabel, ylabel, title="", marks=8):
    """Line plot of `series`, {label: array like x}, about `marks` markers a line; a Figure."""
    fig, ax = plt.subplots()
    styles = zip(cycle(COLORS), cycle(LINES), cycle(MARKERS))
    step = max(1, len(x) // marks)
    rows = zip(series.items(), styles, strict=False)
    for j, ((label, y), (color, line, marker)) in enumerate(rows):
        start = j * step // max(1, len(series))  # markers of different lines do not coincide
        ax.plot(x, y, color=color, linestyle=line, marker=marker, markevery=(start, step),
                label=label)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if len(series) > 1:
        ax.legend()
    return fig


def grouped_bars(labels, series, xlabel, ylabel, title=""):
    """Bars side by side: `series` is {name: one number per label}; a Figure."""
    fig, ax = plt.subplots()
    width = 0.8 / len(series)
    styles = zip(cycle(COLORS), cycle(HATCHES))
    rows = zip(series.items(), styles, strict=False)
    for j, ((name, heights), (color, hatch)) in enumerate(rows):
        at = np.arange(len(labels)) + (j - (len(series) - 1) / 2) * width
        ax.bar(at, heights, width, color=color, hatch=hatch, edgecolor="white", label=name)
    ax.set_xticks(np.arange(len(labels)), labels)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    ax.grid(axis="x", visible=False)
    ax.legend()
    return fig


# ---------------------------------------------------------------- OS-MCKP (notebook 01)
def policy_map(solution, problems=None, title="Optimal action"):
    """Remaining budget x problem, colored and hatched by action; a Figure.

    `solution` is an `osmckp.Solution`; `problems` names the rows. Actions of the same name share
    a style.
    """
    classes = solution.instance.classes
    problems = problems or [f"problem {i + 1}" for i in range(len(classes))]
    richest_first = sorted(classes, key=len, reverse=True)
    names = list(dict.fromkeys(a.name for actions in richest_first for a in actions))
    style = dict(zip(names, cycle(ACTIONS)))
    fig, ax = plt.subplots(figsize=(WIDTH, 1.3 + 0.6 * len(classes)))
    for i, (actions, row) in enumerate(zip(classes, solution.policy, strict=True)):
        edges = np.flatnonzero(np.diff(row, prepend=-1, append=-1))
        for start, stop in zip(edges[:-1], edges[1:], strict=True):
            color, hatch = style[actions[row[start]].name]
            ax.barh(i, stop - start, left=start - 0.5, height=0.8, color=color, hatch=hatch,
                    edgecolor="white", linewidth=0)
    ax.set_yticks(range(len(classes)), problems)
    ax.set(xlabel="tokens left", xlim=(-0.5, solution.policy.shape[1] - 0.5), title=title)
    ax.invert_yaxis()
    ax.grid(visible=False)
    handles = [Patch(facecolor=style[n][0], hatch=style[n][1],
                     edgecolor="white" if style[n][1] else "#999999") for n in names]
    ax.legend(handles, names, ncols=len(names), loc="lower right", bbox_to_anchor=(1, 1),
              borderaxespad=0.2)
    return fig


def value_curve(solution, problem=0):
    """V(b) at the start of `problem` above its shadow price V(b + 1) - V(b); a Figure."""
    value, price = solution.value_function[problem], solution.shadow_price[problem]
    fig, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(WIDTH, 5.2))
    top.plot(np.arange(len(value)), value, color=COLORS[0])
    top.set(ylabel="value V(b)\n[points]", title="What a budget is worth")
    bottom.fill_between(np.arange(len(price)), 100 * price, step="mid", color=COLORS[1], alpha=0.4)
    bottom.step(np.arange(len(price)), 100 * price, where="mid", color="#7A5200", linewidth=1.2)
    bottom.set(xlabel="tokens left, b", ylabel="V(b + 1) - V(b)\n[points / 100 tokens]",
               title="What one more token is worth: the shadow price", xlim=(0, len(price)))
    return fig


def score_bars(distributions):
    """Score distributions side by side: {name: osmckp.Distribution}; a Figure."""
    pmfs = {name: dict(zip(*d.of("score"), strict=True)) for name, d in distributions.items()}
    scores = sorted(set().union(*pmfs.values()))
    return grouped_bars([f"{s:g}" for s in scores],
                        {name: [pmf.get(s, 0.0) for s in scores] for name, pmf in pmfs.items()},
                        "score [points]", "probability")


def regret_split(names, earned, given, best, best_label="best order, optimal policy"):
    """How much of what is missing is order and how much is folly; a Figure.

    `earned`: expected scores of the policies `names` in the given order; `given`, `best`: the
    optimal policy's value in the given and in the best order. All in points.
    """
    earned = np.asarray(earned, dtype=float)
    fig, ax = plt.subplots(figsize=(WIDTH, 1.6 + 0.42 * len(names)))
    parts = [("earned", earned, COLORS[0], ""),
             ("lost to folly", given - earned, COLORS[1], "///"),
             ("lost to the order", np.full(len(names), best - given), "#EFEFEF", "...")]
    left = np.zeros(len(names))
    for label, width, color, hatch in parts:
        ax.barh(np.arange(len(names)), width, left=left, height=0.7, color=color, hatch=hatch,
                edgecolor="white" if hatch != "..." else "#777777", linewidth=0, label=label)
        left = left + width
    for row, value in enumerate(earned):
        ax.text(value - 0.02 * best, row, f"{value:.2f}", color="white", ha="right", va="center")
    ax.axvline(best, color="black", linewidth=1.5, linestyle="--", label=best_label)
    ax.set_yticks(np.arange(len(names)), names)
    ax.set(xlabel="expected score [points]", xlim=(0, 1.04 * best))
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    (line, *bars), (line_label, *labels) = ax.get_legend_handles_labels()
    fig.legend([*bars, line], [*labels, line_label], loc="outside upper left", ncols=2)
    return fig


# ---------------------------------------------------------------- exams (notebook 00)
def tokens_by_position(records):
    """Where the budget went: mean tokens of each position, stacked, a bar an order; a Figure.

    `records` are those of one method (see `evaluation.run_method`); each budget gets a panel. The
    share of right answers is written into each part. A line marks the budget.
    """
    budgets = sorted({r["budget"] for r in records})
    fig, axes = plt.subplots(len(budgets), 1, squeeze=False, sharex=True,
                             figsize=(WIDTH, 0.7 + 1.55 * len(budgets)))
    for ax, budget in zip(axes[:, 0], budgets, strict=True):
        rows = [r for r in records if r["budget"] == budget]
        for y, record in enumerate(rows):
            left = 0.0
            parts = zip(record["position_tokens"], record["position_accuracy"], cycle(LIGHT),
                        cycle(HATCHES))
            for position, (tokens, right, color, hatch) in enumerate(parts, start=1):
                ax.barh(y, tokens, 0.7, left, color=color, hatch=hatch, edgecolor="#777777",
                        label=f"position {position}" if y == 0 else None)
                if tokens > 0.07 * budgets[-1]:
                    ax.text(left + tokens / 2, y, f"{right:.0%}", ha="center", va="center",
                            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5})
                left += tokens
        ax.axvline(budget, color="black", linestyle="--", linewidth=1.5)
        ax.set_yticks(range(len(rows)), [r["order"] for r in rows])
        ax.set(ylabel=f"order\n(budget {budget})")
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
    axes[-1, 0].set_xlabel("mean tokens spent (dashed: the budget); per cent: right answers")
    axes[0, 0].legend(ncols=len(rows[0]["position_tokens"]), loc="lower right",
                      bbox_to_anchor=(1, 1), borderaxespad=0.2)
    axes[0, 0].set_title("Where the budget went")
    return fig


# ---------------------------------------------------------------- exam building (notebook 02)
def length_ranges(ranges, edges, xlabel):
    """How long texts are, a row a source, on a logarithmic axis; a Figure.

    `ranges` is {label: the 5, 25, 50, 75 and 95 % percentiles}: a thin line from the first to the
    last, a bar over the middle half, the median as a dot. Dashed lines mark `edges`, {label: x}.
    """
    fig, ax = plt.subplots(figsize=(WIDTH, 1.5 + 0.42 * len(ranges)))
    for y, (p5, p25, p50, p75, p95) in enumerate(ranges.values()):
        ax.plot([p5, p95], [y, y], color=COLORS[2], linewidth=1.5)
        ax.barh(y, p75 - p25, 0.5, p25, color=LIGHT[0], edgecolor="#555555")
        ax.plot(p50, y, "o", color=COLORS[2])
    for label, x in edges.items():
        ax.axvline(x, color="black", linestyle="--", linewidth=1.2)
        ax.annotate(label, (x, 1), (0, 2), xycoords=("data", "axes fraction"),
                    textcoords="offset points", ha="center", va="bottom", fontsize=9)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    ax.set_yticks(range(len(ranges)), ranges)
    ax.set(xlabel=xlabel, ylim=(len(ranges) - 0.4, -0.6))
    ax.grid(axis="y", visible=False)
    return fig


# ---------------------------------------------------------------- generation (notebook 03)
def token_strips(names, responses, budget):
    """One bar a response, cut into preamble and segments, in tokens; a Figure.

    `responses` are `exams.Response`s; a dashed line marks the budget.
    """
    fig, ax = plt.subplots(figsize=(WIDTH, 1.4 + 0.42 * len(names)))
    parts = max(len(r.segments) for r in responses)
    labels = ["preamble", *(f"problem {i + 1}" for i in range(parts))]
    for y, response in enumerate(responses):
        left = 0
        costs = [response.preamble, *(segment.cost for segment in response.segments)]
        styles = zip(labels, costs, ["#BBBBBB", *LIGHT], ["++", *HATCHES], strict=False)
        for label, cost, color, hatch in styles:
            ax.barh(y, cost, 0.7, left, color=color, hatch=hatch, edgecolor="#777777",
                    label=label if y == 0 else None)
            if cost > 0.05 * budget:
                ax.text(left + cost / 2, y, cost, ha="center", va="center",
                        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5})
            left += cost
    ax.axvline(budget, color="black", linestyle="--", linewidth=1.5)
    ax.set_yticks(range(len(names)), names)
    ax.set(xlabel=f"tokens (dashed: the budget of {budget})")
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.legend(ncols=len(labels), loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)
    return fig
