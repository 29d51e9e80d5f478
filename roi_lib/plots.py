"""Every figure of the series, in one style.

`use_style()` once at the top of a notebook; then each function takes data, draws a new figure and
returns it. Colors are Okabe and Ito's, which color-blind readers can tell apart; each comes with a
line style, a marker and a hatch, so that the figures can also be read in greyscale. Axes carry
units. End a plot cell with `plt.show()`.
"""

from html import escape
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML
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
    ax.margins(y=0.3)  # room for the legend
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
    preamble = "preamble" if any(r.preamble for r in responses) else None  # no bar, no legend
    labels = [preamble, *(f"problem {i + 1}" for i in range(parts))]
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
    ax.set_xlim(0, max(ax.get_xlim()[1], 1.03 * budget))
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.legend(ncols=len(labels), loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)
    return fig


# ---------------------------------------------------------------- MFT (notebook 04)
#: What a token is to the loss -> HTML element and look; readable in greyscale and without styles.
TOKENS = {
    "not learned": ("span", "color:#767676"),
    "learned": ("u", "background:#DCEBF7;color:#111;border-bottom:2px solid #0072B2;"
                "text-decoration:none"),
    "level": ("b", "background:#222;color:#FFF;padding:0 2px"),
    "padding": ("s", "color:#999"),
}


def token_lines(lines, names=None):
    """Tokens as text with a look for each kind, and a legend; IPython's HTML object.

    `lines` are (label, words, kinds): one word and one key of `TOKENS` a token. `names` puts other
    words into the legend, {kind: name}.
    """
    lines, names = list(lines), names or {}

    def shown(word, kind):
        element, look = TOKENS[kind]
        return f'<{element} style="{look}">{escape(word)}</{element}>'

    rows = "".join(
        f'<div style="margin:2px 0"><i style="color:#555">{escape(label)}</i> '
        + " ".join(map(shown, words, kinds)) + "</div>" for label, words, kinds in lines)
    used = {kind for _, _, kinds in lines for kind in kinds}
    legend = " &nbsp; ".join(shown(names.get(k, k), k) for k in TOKENS if k in used)
    return HTML(f'<div style="font-family:monospace;line-height:1.7">{rows}<div '
                f'style="margin-top:6px"><i style="color:#555">legend:</i> {legend}</div></div>')


LEVELS = [*ACTIONS[1:4], ACTIONS[0]]  # Level-3, the skip, looks like a skip


def level_shares(rows):
    """Shares of the levels, a bar a family, the mean solve rate on the right; a Figure.

    `rows` are those of `mft.label_statistics`.
    """
    fig, ax = plt.subplots(figsize=(WIDTH, 1.4 + 0.42 * len(rows)))
    left = np.zeros(len(rows))
    for level, (color, hatch) in enumerate(LEVELS):
        width = np.array([row[f"level_{level}"] for row in rows])
        ax.barh(range(len(rows)), width, 0.7, left, color=color, hatch=hatch, edgecolor="#777777",
                linewidth=0.5, label=f"Level-{level}" + (" (skip)" if level == 3 else ""))
        for y, (x, w) in enumerate(zip(left, width, strict=True)):
            if w > 0.06:
                ax.text(x + w / 2, y, f"{w:.0%}", ha="center", va="center",
                        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5})
        left += width
    for y, row in enumerate(rows):
        ax.text(1.07, y, f"{row['solve_rate']:.2f}", ha="right", va="center")
    ax.text(1.07, -0.75, "solved", ha="right", fontsize=9)
    ax.set_yticks(range(len(rows)), [f"{row['family']} ({row['tier']})" for row in rows])
    ax.set(xlabel="share of problems (right: share of samples that are right)", xlim=(0, 1.08))
    ax.set_xticks(np.linspace(0, 1, 6))
    ax.invert_yaxis()
    ax.grid(visible=False)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper left", ncols=4)
    return fig


def mft_log(log):
    """How a run of MFT learned: its tags by tier, and its answers and skips; a Figure.

    `log` maps the columns of `log.csv` to arrays.
    """
    panels = [("right tags", {"tag_easy": "easy", "tag_medium": "medium", "tag_hard": "hard"}),
              ("answers and skips", {"answer_accuracy": "right, of those tried",
                                     "skip_hard": "hard problems skipped"})]
    fig, axes = plt.subplots(1, 2, sharey=True, figsize=(WIDTH, 3.6))
    for ax, (title, columns) in zip(axes, panels, strict=True):
        for (name, label), color, line, marker in zip(columns.items(), COLORS, LINES, MARKERS,
                                                      strict=False):
            ax.plot(log["step"], log[name], color=color, linestyle=line, marker=marker, label=label)
        ax.set(xlabel="optimizer step", title=title, ylim=(-0.03, 1.03))
        ax.legend(loc="center right" if ax is axes[1] else "lower right")
    axes[0].set_ylabel("share of problems")
    return fig


def confusion_matrix(counts, title=""):
    """Predicted against real level, [predicted, real]: counts, and shares of each row; a Figure.

    A row of fewer than 20 problems is not shaded.
    """
    counts = np.asarray(counts)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    shades = np.where(counts.sum(1, keepdims=True) < 20, 0, shares)
    fig, ax = plt.subplots(figsize=(5.6, 4.2))
    ax.imshow(shades, cmap="Greys", vmin=0, vmax=1)
    for (i, j), n in np.ndenumerate(counts):
        ax.text(j, i, f"{n:,}\n{shares[i, j]:.0%}", ha="center", va="center",
                color="white" if shades[i, j] > 0.55 else "black",
                fontweight="bold" if i == j else "normal")
    names = [f"Level-{level}" for level in range(len(counts))]
    ax.set_xticks(range(len(counts)), names)
    ax.set_yticks(range(len(counts)), [f"{n}\n({c:,})" for n, c in
                                       zip(names, counts.sum(1), strict=True)])
    ax.set(xlabel="real level of the cost", ylabel="predicted level (problems)", title=title)
    ax.grid(visible=False)
    return fig


# ---------------------------------------------------------------- RARL (notebook 05)
def _style(j, label):
    """Options of a labelled line: a method's own look, or the j-th style."""
    if label in METHODS:
        name, color, line, marker, _ = method_look(label)
    else:
        name = label
        color, line, marker = (some[j % len(some)] for some in (COLORS, LINES, MARKERS))
    return {"label": name, "color": color, "linestyle": line, "marker": marker}


def line_panels(panels, columns=2, height=3.2):
    """Line plots side by side; a Figure.

    `panels` holds (x, {label: y}, xlabel, ylabel, title) for each: y is an array like x, or three
    of them: values, and the ends of their intervals. NaN leaves a gap. A label that is the name of
    a method gets the method's look.
    """
    fig, axes = plt.subplots(-(-len(panels) // columns), columns, squeeze=False)
    fig.set_size_inches(WIDTH, height * len(axes))
    for ax, (x, series, xlabel, ylabel, title) in zip(axes.flat, panels, strict=False):
        for j, (label, y) in enumerate(series.items()):
            y, *ends = np.atleast_2d(y)
            line = ax.plot(x, y, markevery=1 if ends else max(1, len(x) // 6), **_style(j, label))
            if ends:
                ax.errorbar(x, y, np.abs(ends - y), color=line[0].get_color(), fmt="none",
                            capsize=2, elinewidth=1.2)
        ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
        if len(series) > 1:
            ax.legend()
    for ax in axes.flat[len(panels):]:
        ax.set_visible(False)
    return fig


def training_curves(logs, columns, window=1):
    """Columns of training logs over the steps, a panel a column; a Figure.

    `logs` is {label: rows of a log, column -> number}. Each line is the mean of `window` rows
    measured (NaN is left out), and stands at the last one's step.
    """
    fig, axes = plt.subplots(-(-len(columns) // 2), 2, squeeze=False, sharex=True)
    fig.set_size_inches(WIDTH, 0.5 + 1.8 * len(axes))
    for ax, column in zip(axes.flat, columns, strict=False):
        for j, (label, rows) in enumerate(logs.items()):
            known = [(r["step"], r[column]) for r in rows if not np.isnan(r[column])]
            steps, values = np.array(known).T if known else np.empty((2, 0))
            width = min(window, len(values)) or 1
            smooth = np.convolve(values, np.full(width, 1 / width), "valid") if known else values
            ax.plot(steps[width - 1:], smooth, markevery=max(1, len(smooth) // 6),
                    **_style(j, label))
        ax.set_ylabel(f"{column} [nats]" if column == "entropy" else column)
        share = column.startswith("skip_") or column in ("level_accuracy", "accuracy", "cut",
                                                         "no_spread")
        ax.set_ylim(0, 1.03 if share else None)
    for ax in axes.flat[len(columns):]:
        ax.set_visible(False)
    for ax in axes.flat[max(0, len(columns) - 2): len(columns)]:
        ax.set_xlabel("step")
        ax.tick_params(labelbottom=True)
    if len(logs) > 1:
        _legend_above(fig, axes[0, 0])
    return fig


class LiveCurves:
    """Curves that grow while a training runs: give it to `rarl_loop.train` as `on_step`.

    `columns` are those of the log. With `every` above 0 the picture below the cell is replaced
    each so many steps; with 0 nothing is shown until you ask for `figure()`.
    """

    def __init__(self, columns, every=0):
        self.columns, self.every, self.rows = columns, every, []

    def __call__(self, row):
        """Take in the log's newest row."""
        self.rows.append(row)
        if self.every and len(self.rows) % self.every == 0:
            from IPython.display import clear_output, display

            clear_output(wait=True)
            fig = self.figure()
            display(fig)
            plt.close(fig)

    def figure(self, window=1):
        """The curves so far; a Figure."""
        return training_curves({"run": self.rows}, self.columns, window)


def stacked_bars(labels, parts, xlabel, ylabel):
    """A bar a label, of parts that add up to at most 1: {name: one share per label}; a Figure."""
    fig, ax = plt.subplots()
    left = np.zeros(len(labels))
    styles = zip(LIGHT, HATCHES, strict=True)
    for (name, shares), (color, hatch) in zip(parts.items(), styles, strict=False):
        ax.bar(range(len(labels)), shares, 0.7, left, color=color, hatch=hatch,
               edgecolor="#555555", label=name)
        left += shares
    ax.set_xticks(range(len(labels)), labels)
    ax.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, 1))
    ax.grid(axis="x", visible=False)
    _legend_above(fig, ax)
    return fig


def interval_dots(panels, xlabel):
    """Values with intervals, a row a label, panels side by side; a Figure.

    `panels` is {title: {label: (value, low, high)}}, with the same labels in each.
    """
    rows = max(map(len, panels.values()))
    fig, axes = plt.subplots(1, len(panels), sharey=True, squeeze=False,
                             figsize=(WIDTH, 1.2 + 0.36 * rows))
    for ax, (title, values) in zip(axes[0], panels.items(), strict=True):
        for y, (value, low, high) in enumerate(values.values()):
            ax.plot([low, high], [y, y], color=COLORS[2], linewidth=1.5)
            ax.plot(value, y, "o", color=COLORS[0], markeredgecolor="white", markersize=8)
        ax.set_yticks(range(len(values)), values)
        ax.set(title=title, xlabel=xlabel, ylim=(len(values) - 0.5, -0.5))
    return fig


# ---------------------------------------------------------------- regret, behaviour (06 and 07)
#: method -> label, color, line style, marker, hatch: the same in every figure.
METHODS = {
    "base": ("base", "#222222", "-", "o", ""),
    "plan_and_solve": ("Plan-and-Solve", "#CC79A7", ":", "D", "xxx"),
    "least_to_most": ("Least-to-Most", "#E69F00", "-.", "s", "///"),
    "mft": ("MFT", "#56B4E9", "--", "^", "..."),
    "mft_greedy_knapsack": ("MFT + knapsack", "#009E73", (0, (6, 1.5)), "v", "\\\\\\"),
    "mft_greedy_knapsack_charged": ("the same, charged", "#7A5200", (0, (3, 1, 1, 1)), "P", "++"),
    "rarl": ("MFT + RARL", "#0072B2", "-", "X", "--"),
    "optimal": ("rational", "#D55E00", "-", "", ""),
    "optimal_tagged": ("rational, with tags", "#D55E00", "--", "", ""),
}


BOUNDS = ("optimal", "optimal_tagged")


def method_look(name):
    """Label, color, line style, marker and hatch of a method; any other name is its own label."""
    return METHODS.get(name, (name, "#777777", "-", "h", "oo"))


def _chosen(rows, **wanted):
    return [r for r in rows if all(r[key] == value for key, value in wanted.items())]


def sweep_lines(rows, xlabel, budget=None, orders=("easy", "hard"), value="score", ylabel=None):
    """Score (or regret) along a sweep, a panel an order, with 95 % intervals; a Figure.

    `rows` are those of `sweeps.read_sweep`; `budget` picks one where a setting has several. The
    rational test-taker is a band from its achievable to its plug-in side.
    """
    rows = rows if budget is None else _chosen(rows, budget=budget)
    names = list(dict.fromkeys(r["x"] for r in rows))
    plain = all(name.replace(".", "").isdigit() for name in names)
    place = {name: float(name) if plain else i for i, name in enumerate(names)}
    methods = list(dict.fromkeys(r["method"] for r in rows))
    gap = np.diff(sorted(place.values())).min() if len(place) > 1 else 1.0
    sat = [m for m in methods if m not in BOUNDS]
    fig, axes = plt.subplots(1, len(orders), sharey=True, squeeze=False, figsize=(WIDTH, 4.0))
    for ax, order in zip(axes[0], orders, strict=True):
        for method in methods:
            own = _chosen(rows, method=method, order=order)
            label, color, line, marker, _ = method_look(method)
            x = np.array([place[r["x"]] for r in own])
            y = np.array([r[value] for r in own], float)
            if method in BOUNDS:
                ax.plot(x, y, color=color, linestyle=line, label=label, zorder=1.5)
                if value == "score":
                    ax.fill_between(x, y, [r["rational_plug_in"] for r in own], color=color,
                                    alpha=0.25, linewidth=0)
                continue
            ends = np.array([[r[f"{value}_low"], r[f"{value}_high"]] for r in own], float).T
            # intervals stand side by side
            shift = (sat.index(method) - (len(sat) - 1) / 2) * 0.06 * gap
            ax.errorbar(x + shift, y, np.abs(ends - y), color=color, linestyle=line, capsize=2,
                        marker=marker, markersize=5, linewidth=1.5, elinewidth=1.2, label=label)
        ax.set(xlabel=xlabel, title=f"{order} order")
        if not plain:
            ax.set_xticks(list(place.values()), [n.replace("-", "\n") for n in names], fontsize=9)
        elif len(names) < 9:
            ax.set_xticks(list(place.values()), names, fontsize=9 if len(names) > 6 else None)
    axes[0, 0].set_ylabel(ylabel or {"score": "Score [problems solved]"}.get(value, value))
    _legend_above(fig, axes[0, 0])
    return fig


def _legend_above(fig, ax, ncols=4):
    handles, labels = ax.get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper left", ncols=ncols)


def score_split(records, budget, orders=("medium", "hard")):
    """What each method earned, lost to folly, and lost to the order; a panel an order; a Figure.

    `records` are those of `evaluation.make_records` with the rational method among them. The
    three parts add up to V*(easy), with tags for the methods that must write them. Black: the 95 %
    interval of the Score. Where a method earns more than V*, nothing is lost to folly.
    """
    fig, axes = plt.subplots(len(orders), 1, sharex=True, squeeze=False)
    height = 0.5
    for ax, order in zip(axes[:, 0], orders, strict=True):
        rows = [r for r in _chosen(records, budget=budget, order=order) if "rational" in r]
        height += 0.55 + 0.36 * len(rows)
        score, best, order_loss = (np.array([r[key] for r in rows]) for key in (
            "score", "rational", "lost_to_order"))
        reached = np.maximum(best, score)
        parts = [("earned", np.zeros(len(rows)), score, "#0072B2", ""),
                 ("lost to folly", score, reached - score, "#E69F00", "///"),
                 ("lost to the order", reached, best + order_loss - reached, "#EFEFEF", "...")]
        for label, left, width, color, hatch in parts:
            ax.barh(range(len(rows)), np.maximum(width, 0), 0.7, left, color=color, hatch=hatch,
                    edgecolor="#777777" if hatch else color, linewidth=0.5, label=label)
        ends = np.array([r["score_ci"] or [r["score"]] * 2 for r in rows]).T
        ax.errorbar(score, range(len(rows)), xerr=np.abs(ends - score), fmt="none", color="black",
                    capsize=3, elinewidth=1.5)
        for y, (value, end) in enumerate(zip(score, ends[1], strict=True)):
            inside = value > 0.2 * best.max()  # else beside the bar
            ax.text(0.03 if inside else end + 0.03, y, f"{value:.2f}", va="center",
                    color="white" if inside else "black", fontweight="bold",
                    bbox=None if inside else {"facecolor": "white", "edgecolor": "none", "pad": 1})
        ax.set_yticks(range(len(rows)), [method_look(r["method"])[0] for r in rows])
        ax.set_title(f"{order} order, {budget} tokens")
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
    axes[-1, 0].set_xlabel("Score [problems solved]")
    fig.set_size_inches(WIDTH, height + 0.5)
    _legend_above(fig, axes[0, 0])
    return fig


FEW = 30  # a share or a percentile of fewer says little


def share_interval(share, count):
    """The ends of the 95 % intervals of shares among so many, [2, ...] (Wilson, 1927).

    Unlike the normal interval it has a width at 0 and at 1, too. NaN where there are none.
    """
    z = 1.96
    share, count = np.asarray(share, float), np.where(np.asarray(count) > 0, count, np.nan)
    centre = share + z**2 / (2 * count)
    half = z * np.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return np.stack([centre - half, centre + half]) / (1 + z**2 / count)


def token_lengths(columns, budget, order):
    """Tokens spent on the problems that were tried, a panel a tier, a row a method; a Figure.

    `columns` is {method: `rollouts.load_columns`}. A line from the 5 to the 95 % percentile, a bar
    over the middle half, the median as a dot (nothing for fewer than `FEW`); on the right, how many
    were tried, skipped, or met a budget run dry.
    """
    tiers = ("easy", "medium", "hard")
    fig, axes = plt.subplots(len(tiers), 1, sharex=True, layout="constrained",
                             figsize=(WIDTH, 1.0 + len(tiers) * (0.45 + 0.3 * len(columns))))
    for ax, tier in zip(axes, tiers, strict=True):
        for y, (method, c) in enumerate(columns.items()):
            here = (c["budget"] == budget) & (c["order"] == order) & (c["tier"] == tier)
            tried, skipped = here & c["reached"] & ~c["skipped"], here & c["skipped"]
            if tried.sum() >= FEW:
                p5, p25, p50, p75, p95 = np.percentile(c["cost"][tried], (5, 25, 50, 75, 95))
                color = method_look(method)[1]
                ax.plot([p5, p95], [y, y], color=color, linewidth=1.5)
                ax.barh(y, p75 - p25, 0.55, p25, color=color, alpha=0.45, edgecolor=color)
                ax.plot(p50, y, "o", color=color, markeredgecolor="white")
            shares = [f"{x.sum() / here.sum():.0%}" for x in (
                tried, skipped, here & ~tried & ~skipped)]
            for share, x in zip(shares, (1.1, 1.22, 1.34), strict=True):
                ax.text(x, y, share, transform=ax.get_yaxis_transform(), ha="right", va="center")
        ax.axvline(budget, color="black", linestyle="--", linewidth=1.2)
        ax.set_yticks(range(len(columns)), [method_look(name)[0] for name in columns])
        ax.set(title=f"{tier} problems", ylim=(len(columns) - 0.4, -0.6))
        ax.set_xlim(left=0)
        ax.grid(axis="y", visible=False)
    for x, word in zip((1.1, 1.22, 1.34), ("tried", "skipped", "dry"), strict=True):
        axes[0].text(x, 1.04, word, transform=axes[0].transAxes, ha="right", fontsize=9)
    axes[-1].set_xlabel(f"tokens of a problem that was tried (dashed: the budget of {budget})")
    return fig


def level_errors(columns):
    """Predicted minus real level of the problems that were tried, bars by method; a Figure.

    `columns` is {method: `rollouts.load_columns`}. Problems without a tag are left out, and those
    that the budget cut, whose real level nobody knows. The share of exact predictions stands in
    the legend; the 95 % intervals are over problems (`share_interval`).
    """
    steps = np.arange(-3, 4)
    series = {}
    for method, c in columns.items():
        tried = c["reached"] & ~c["skipped"] & ~c["cut"] & (c["predicted"] >= 0)
        error = c["predicted"][tried].astype(int) - c["real"][tried].astype(int)
        shares = np.array([(error == step).mean() for step in steps])
        ends = share_interval(shares, len(error))
        series[f"{method_look(method)[0]} (exact: {shares[3]:.1%})"] = (method, shares, ends)
    fig, ax = plt.subplots(figsize=(WIDTH, 3.4))
    width = 0.8 / len(series)
    for j, (label, (method, shares, ends)) in enumerate(series.items()):
        _, color, _, _, hatch = method_look(method)
        ax.bar(steps + (j - (len(series) - 1) / 2) * width, shares, width, color=color,
               hatch=hatch, edgecolor="white", label=label, yerr=np.abs(ends - shares), capsize=3)
    ax.set_xticks(steps, [f"{step:+d}" if step else "0" for step in steps])
    ax.set(xlabel="predicted minus real level (below 0: the cost was underestimated)",
           ylabel="share of problems finished")
    ax.grid(axis="x", visible=False)
    ax.legend()
    return fig


def position_accuracy(columns, budget, orders=("easy", "medium", "hard")):
    """Share of right answers by position, a panel an order, with 95 % intervals; a Figure.

    `columns` is {method: `rollouts.load_columns`}; the intervals are over papers
    (`share_interval`).
    """
    fig, axes = plt.subplots(1, len(orders), sharey=True, squeeze=False, figsize=(WIDTH, 3.8))
    for ax, order in zip(axes[0], orders, strict=True):
        for i, (method, c) in enumerate(columns.items()):
            here = (c["budget"] == budget) & (c["order"] == order)
            positions = np.unique(c["position"])
            marks = [c["correct"][here & (c["position"] == p)] for p in positions]
            share = np.array([m.mean() for m in marks])
            ends = share_interval(share, [len(m) for m in marks])
            label, color, line, marker, _ = method_look(method)
            shift = (i - (len(columns) - 1) / 2) * 0.09
            ax.errorbar(positions + shift, share, np.abs(ends - share), color=color,
                        marker=marker, capsize=2, linestyle=line, linewidth=1.0, elinewidth=1.5,
                        label=label)
        ax.set_xticks(positions)
        ax.set(xlabel="position", title=f"{order} order", ylim=(-0.03, 1.03))
    axes[0, 0].set_ylabel(f"right answers ({budget} tokens)")
    _legend_above(fig, axes[0, 0])
    return fig
