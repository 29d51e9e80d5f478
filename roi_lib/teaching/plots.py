"""Every figure of the series, in one style: `use_style()` once, then a function a figure.

Each function draws a new Figure and returns it. Colors are Okabe and Ito's, which color-blind
readers can tell apart; hatches, markers and line styles tell the same in greyscale. Records are
DataFrames or lists of rows; a table is `sitting`'s, with a column `method`."""

from html import escape
from itertools import cycle, pairwise

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import HTML, clear_output, display

from roi_lib.worlds import ORDERS, TIERS

COLORS = ["#0072B2", "#E69F00", "#222222", "#CC79A7", "#009E73", "#56B4E9"]
LINES = ["-", "--", "-.", ":", (0, (6, 1.5)), (0, (3, 1, 1, 1, 1, 1))]
MARKERS, HATCHES = ["o", "s", "^", "D", "v", "P"], ["", "///", "...", "xxx", "\\\\\\", "++"]
# Skip is almost white; then light to dark, so that effort reads as darkness in greyscale.
ACTIONS = [("#EFEFEF", ""), ("#56B4E9", "///"), ("#D55E00", "..."), ("#0B3C5D", "xx")]
SPLIT = [("#0072B2", ""), ("#E69F00", "///"), ("#EFEFEF", "...")]  # a Score, and what it lost
PARTS = [("#BBBBBB", "++"), ("#56B4E9", ""), ("#F5D9A3", "///"), ("#FFFFFF", "..."),
         ("#CC79A7", "xxx"), ("#DDDDDD", "\\\\\\"), ("#9FDCC8", "oo")]  # preamble, problems
METHODS = {  # label, color, line style, marker, hatch: the same in every figure
    "base": ("base", "#222222", "-", "o", ""), "brief": ("in brief", "#999999", ":", "o", "///"),
    "best_rule": ("best rule", "#D55E00", "--", "s", ""),
    "optimal_statement": ("optimal", "#D55E00", "-", "", ""),
    "plan_and_solve": ("Plan-and-Solve", "#CC79A7", ":", "D", "xxx"),
    "least_to_most": ("Least-to-Most", "#E69F00", "-.", "s", "///"),
    "mft": ("MFT", "#009E73", "--", "^", "..."), "rarl": ("MFT + RARL", "#0072B2", "-", "X", "--"),
    "mft_greedy_knapsack": ("MFT + knapsack", "#56B4E9", (0, (6, 1.5)), "v", "\\\\\\"),
    "mft_greedy_knapsack_charged": ("the same, charged", "#7A5200", (0, (3, 1, 1, 1)), "P", "++")}
FEW = 30  # a share or a percentile of fewer says little
WIDTH, ABOVE = 7.5, {"loc": "outside upper left", "ncols": 4}


def use_style():
    """Set matplotlib's defaults for the whole series (fonts, grid, spines, resolution)."""
    plt.rcParams.update({
        "figure.figsize": (WIDTH, 3.4), "figure.dpi": 100, "figure.constrained_layout.use": True,
        "font.size": 11, "axes.titlesize": 12, "axes.titlelocation": "left", "legend.fontsize": 10,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "axes.axisbelow": True, "grid.color": "#DDDDDD", "lines.linewidth": 2.0,
        "hatch.linewidth": 0.8, "legend.frameon": False})


def method_look(name, j=0):
    """Label, color, line style, marker and hatch of a method; of any other name the j-th ones."""
    return METHODS.get(name) or (name, *(x[j % 6] for x in (COLORS, LINES, MARKERS, HATCHES)))


def share_interval(share, count):
    """Ends of the 95 % intervals of shares among so many, [2, ...] (Wilson, 1927); NaN for none."""
    z, share, count = 1.96, np.asarray(share), np.where(np.asarray(count) > 0, count, np.nan)
    centre = share + z**2 / (2 * count)
    half = z * np.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return np.stack([centre - half, centre + half]) / (1 + z**2 / count)


def _rows(ax, names, title):
    """A labelled row a name, the first on top."""
    ax.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5), title=title)
    ax.grid(axis="y", visible=False)


def lines(*panels, columns=2, height=3.2, **shared):
    """Line plots side by side. A panel is (x, {label: y}, xlabel, ylabel, title): y is an array
    like x, or three of them, values and the ends of their intervals; where x is None, y has them
    over its own index. NaN leaves a gap. A method's name gives its look."""
    rows, columns = -(-len(panels) // columns), min(columns, len(panels))
    fig, axes = plt.subplots(rows, columns, squeeze=False, figsize=(WIDTH, rows * height), **shared)
    alike = len({tuple(series) for _, series, *_ in panels}) == 1  # one legend is enough
    for ax, (x, series, xlabel, ylabel, title) in zip(axes.flat, panels, strict=False):
        for j, (label, y) in enumerate(series.items()):
            at, y = (y.index, y.T) if x is None else (x, y)
            name, color, line, marker, _ = method_look(label, j)
            y, *ends = np.atleast_2d(np.asarray(y, float))[: 3 if marker else 1]  # a bound has none
            # Intervals stand beside each other, and markers of different lines do not coincide.
            shift = 0.06 * min(np.abs(np.diff(at)), default=1) * (j - (len(series) - 1) / 2)
            step = 1 if ends else max(1, len(y) // 7)
            ax.errorbar(np.asarray(at) + (shift if ends else 0), y,
                        np.abs(ends - y) if ends else None, label=name, color=color, linestyle=line,
                        marker=marker, markevery=(j * step // len(series), step), capsize=2,
                        linewidth=1.5 if ends else 2)
        ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
        if not alike:
            ax.legend()
    if alike and len(series) > 1:
        fig.legend(*ax.get_legend_handles_labels(), **ABOVE)
    for ax in axes.flat[len(panels):]:
        ax.remove()
    return fig


def bars(labels, series, xlabel, ylabel, title=""):
    """Bars side by side: {name: numbers, or three: value, low, high}."""
    fig, ax = plt.subplots()
    place, n = np.arange(len(labels)), len(series)
    for j, (name, y) in enumerate(series.items()):
        label, color, _, _, hatch = method_look(name, j)
        y, *ends = np.atleast_2d(np.asarray(y, float))
        ax.bar(place + (j - (n - 1) / 2) * 0.8 / n, y, 0.8 / n, label=label, capsize=3, hatch=hatch,
               yerr=np.abs(ends - y) if ends else None, color=color, edgecolor="white")
    ax.set_xticks(place, labels)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title, ylim=(0, None))
    ax.grid(axis="x", visible=False)
    fig.legend(**ABOVE)
    return fig


def ranges(panels, xlabel, lines=None, log=False):
    """Values with intervals, {title of a panel: {label: (low, value, high)}}; of five numbers, as
    of percentiles, the inner ones are a bar. `lines` {label: x} are dashed, `log` is base 2."""
    height = 0.6 + len(panels) * (0.5 + 0.35 * max(map(len, panels.values())))
    fig, axes = plt.subplots(len(panels), squeeze=False, sharex=True, figsize=(WIDTH, height))
    for ax, (title, values) in zip(axes.flat, panels.items(), strict=True):
        for y, row in enumerate(values.values()):
            ax.plot([row[0], row[-1]], [y, y], color=COLORS[0], linewidth=1.5)
            ax.plot(row[len(row) // 2], y, "o", color=COLORS[0], markeredgecolor="white")
            if len(row) == 5:
                ax.barh(y, row[3] - row[1], 0.55, row[1], color="#56B4E988", edgecolor=COLORS[0])
        for label, x in (lines or {}).items():
            ax.axvline(x, color="black", linestyle="--")
            ax.text(x, -0.55, label, ha="center", va="bottom", fontsize=9)
        if log:
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_formatter("{x:g}")
        _rows(ax, values, title)
    ax.set(xlabel=xlabel)
    return fig


def strips(panels, xlabel, looks=SPLIT):
    """Bars of parts laid end to end. A panel is (title, table, texts, line): a row a bar, a column
    a part; texts, a table or None, for parts that are wide enough; a dashed line's x, or None."""
    height = 0.8 + sum(0.45 + 0.4 * len(table) for _, table, *_ in panels)
    fig, axes = plt.subplots(len(panels), squeeze=False, sharex=True, figsize=(WIDTH, height))
    right = max(max(table.sum(axis=1).max(), line or 0) for _, table, _, line in panels)
    for ax, (title, table, texts, line) in zip(axes.flat, panels, strict=True):
        left = table.cumsum(axis=1) - table
        for (label, widths), (color, hatch) in zip(table.items(), cycle(looks)):
            part = ax.barh(range(len(table)), widths, 0.7, left[label], color=color, hatch=hatch,
                           edgecolor="#777777", linewidth=0.6, label=label)
            if texts is not None:
                shown = texts[label].where(widths > right / 17, "")
                ax.bar_label(part, shown, label_type="center",
                             bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5})
        if line:
            ax.axvline(line, color="black", linestyle="--")
        _rows(ax, table.index, title)
    ax.set(xlabel=xlabel, xlim=(0, 1.03 * right))
    fig.legend(*ax.get_legend_handles_labels(), **ABOVE)
    return fig


def policy_map(solution, problems):
    """The action of an `osmckp.Solution` for each of the `problems` and number of tokens left."""
    classes = solution.instance.classes
    names = (a.name for actions in sorted(classes, key=len, reverse=True) for a in actions)
    looks = {name: {"color": color, "hatch": hatch, "edgecolor": "white", "linewidth": 0}
             for name, (color, hatch) in zip(dict.fromkeys(names), cycle(ACTIONS))}
    fig, ax = plt.subplots(figsize=(WIDTH, 1.3 + 0.6 * len(classes)))
    for i, (actions, row) in enumerate(zip(classes, solution.policy, strict=True)):
        for start, stop in pairwise(np.flatnonzero(np.diff(row, prepend=-1, append=-1))):
            ax.barh(i, stop - start, left=start - 0.5, **looks[actions[row[start]].name])
    _rows(ax, problems, "Optimal action")
    ax.set(xlabel="tokens left", xlim=(-0.5, len(row) - 0.5))
    fig.legend(handles=[ax.barh(0, 0, label=name, **look) for name, look in looks.items()], **ABOVE)
    return fig


def value_curve(solution):
    """V(b) of the exam above its shadow price V(b + 1) - V(b)."""
    value, price = map(pd.Series, (solution.value_function[0], 100 * solution.shadow_price[0]))
    fig = lines((None, {"": value}, "", "V(b) [points]", "What a budget is worth"),
                (None, {"": price}, "tokens left, b", "[points / 100 tokens]",
                 "What one more token is worth: the shadow price V(b + 1) - V(b)"),
                columns=1, height=2.6)
    plt.setp([ax.lines[0] for ax in fig.axes], drawstyle="steps-mid", marker="")
    return fig


def score_bars(distributions):
    """Score distributions side by side: {name: osmckp.Distribution}."""
    table = pd.DataFrame({name: pd.Series(dict(zip(*d.of("score"), strict=True)))
                          for name, d in distributions.items()}).sort_index().fillna(0.0)
    return bars([f"{s:g}" for s in table.index], table, "score [points]", "probability")


def regret_split(*panels):
    """What is earned, lost to allocation and lost to the order, of (title, names, earned, given,
    best): Scores of the policies `names`, and the optimal one's in this and in the best order."""
    tables, parts = [], ["earned", "lost to allocation", "lost to the order"]
    for title, names, *scores in panels:
        # A policy that earns more than the optimal one loses nothing to allocation.
        points = np.diff(np.maximum.accumulate(np.broadcast_arrays(*scores)), axis=0, prepend=0)
        names = [f"{name}  {x:.2f}" for name, x in zip(names, points[0], strict=True)]
        tables.append((title, pd.DataFrame(points.T, names, parts), None, None))
    return strips(tables, "Score [points]")


def score_split(records, budget, orders=("medium", "hard")):
    """`regret_split` of the records, by order, with the 95 % intervals of the Scores in black."""
    kept = pd.DataFrame(records).query("budget == @budget").dropna(subset="bound_statement")
    parts = {f"{order} order, {budget} tokens": kept[kept["order"] == order] for order in orders}
    fig = regret_split(*((
        title, [method_look(name)[0] for name in rows["method"]], rows["score"],
        rows["bound_statement"], rows["bound_statement"] + rows["lost_to_order"])
        for title, rows in parts.items()))
    for ax, rows in zip(fig.axes, parts.values(), strict=True):
        ax.errorbar(rows["score"], range(len(rows)), fmt="none", color="black", capsize=3,
                    xerr=rows[["score_low", "score_high"]].sub(rows["score"], axis=0).abs().T)
    return fig


def sweep_lines(rows, xlabel, orders=("easy", "hard"), value="score",
                ylabel="Score [problems solved]"):
    """Score (or another value of records) by their x, a panel an order, with 95 % intervals."""
    rows = pd.DataFrame(rows).set_index("x")
    fig = lines(*((None, {method: own[[value, f"{value}_low", f"{value}_high"]] for method, own in
                          rows[rows["order"] == order].groupby("method", sort=False)},
                   xlabel, ylabel if order == orders[0] else "", f"{order} order")
                  for order in orders), columns=len(orders), height=4.0, sharey=True)
    if rows.index.nunique() < 7:
        plt.setp(fig.axes, xticks=rows.index.unique())
    return fig


def position_accuracy(table, budget, orders=ORDERS):
    """Share of right answers by position, a panel an order, with `share_interval`."""
    own = table[table["budget"] == budget].groupby(["method", "order", "position"], sort=False)
    shares = own["correct"].agg(["mean", "size"]).reset_index().rename(columns={"position": "x"})
    shares["mean_low"], shares["mean_high"] = share_interval(shares["mean"], shares["size"])
    fig = sweep_lines(shares, "position", orders, "mean", f"right answers ({budget} tokens)")
    plt.setp(fig.axes, ylim=(-0.03, 1.03))
    return fig


def tokens_by_position(records):
    """Mean tokens and right answers by position: a bar an order, a panel a budget; one method's."""
    panels = []
    for budget, rows in pd.DataFrame(records).set_index("order").groupby("budget"):
        tokens, right = (rows.filter(regex=rf"^{what}_\d+$") for what in ("tokens", "accuracy"))
        tokens.columns = right.columns = tokens.columns.str.replace("tokens_", "position ")
        panels.append((f"Where a budget of {budget} tokens went, by order", tokens,
                       right.map("{:.0%}".format), budget))
    return strips(panels, "mean tokens spent (dashed: the budget); per cent: right answers",
                  PARTS[1:])


def token_strips(names, costs, budget):
    """One bar a response, cut into `costs`: [preamble, problem 1, problem 2, ...], in tokens."""
    table = pd.DataFrame(list(costs), list(names))
    table.columns = ["preamble", *(f"problem {i}" for i in range(1, table.shape[1]))]
    first = int(not table["preamble"].any())  # no bar, no legend
    table = table.iloc[:, first:]
    return strips([("", table, table.astype(str), budget)],
                  f"tokens (dashed: the budget of {budget})", PARTS[first:])


def token_lengths(table, budget, order):
    """Tokens of the problems that were tried, a panel a tier, a row a method: 5, 25, 50, 75 and
    95 % percentiles (of `FEW` problems at least), and who tried, skipped, or had none left."""
    table = table[(table["budget"] == budget) & (table["order"] == order)]
    panels = {}
    for tier in TIERS:
        rows = panels[f"{tier} problems (tried / skipped / budget run dry)"] = {}
        for method, own in table[table["tier"] == tier].groupby("method", sort=False):
            parts = own["reached"] & ~own["skipped"], own["skipped"], ~own["reached"]
            shares = " / ".join(f"{part.mean():.0%}" for part in parts)
            cost = own["cost"][parts[0]]
            rows[f"{method_look(method)[0]} ({shares})"] = (
                np.percentile(cost, (5, 25, 50, 75, 95)) if len(cost) >= FEW else [np.nan] * 5)
    fig = ranges(panels, f"tokens of a problem that was tried (dashed: the budget of {budget})",
                 lines={"": budget})
    plt.setp(fig.axes, xlim=(0, None))
    return fig


def level_shares(rows):
    """Shares of the levels by family, of rows with family, tier, level_0 to 3 and solve_rate."""
    rows = pd.DataFrame(rows)
    shares = rows.filter(regex=r"^level_\d$").set_axis(
        [f"{r.family} ({r.tier})  {r.solve_rate:.2f}" for r in rows.itertuples()])
    shares.columns = ["Level-0", "Level-1", "Level-2", "Level-3 (skip)"]
    return strips([("", shares, shares.map("{:.0%}".format), None)],
                  "share of problems (beside each family: its share of right samples)",
                  [*ACTIONS[1:4], ACTIONS[0]])  # Level-3, the skip, looks like a skip


def level_errors(table):
    """Predicted minus real level by method, of the problems that were tried, tagged and not cut."""
    tried = table.query("reached and not skipped and not cut and predicted >= 0")
    error, count = tried["predicted"].astype(int) - tried["real"], tried["method"].value_counts()
    shares = pd.crosstab(error, tried["method"], normalize="columns").reindex(
        range(-3, 4), fill_value=0.0)[tried["method"].unique()]
    fig = bars(["-3", "-2", "-1", "0", "+1", "+2", "+3"],
               {name: [y, *share_interval(y, count[name])] for name, y in shares.items()},
               "predicted minus real level (below 0: the cost was underestimated)",
               "share of problems finished")
    for text, exact in zip(fig.legends[0].get_texts(), shares.loc[0], strict=True):
        text.set_text(f"{text.get_text()} (exact: {exact:.1%})")
    return fig


def confusion_matrix(counts):
    """Counts [predicted, real level], and shares of each row (shaded in rows of 20 or more)."""
    counts, total = np.asarray(counts), np.sum(counts, axis=1, keepdims=True)
    shares = counts / np.maximum(total, 1)
    fig, ax = plt.subplots(figsize=(5.6, 4.2))
    ax.imshow(np.where(total < 20, 0, shares), cmap="Greys", vmin=0, vmax=2)  # black text on it
    for (i, j), n in np.ndenumerate(counts):
        ax.text(j, i, f"{n:,}\n{shares[i, j]:.0%}", ha="center", va="center")
    ax.set_xticks(range(len(counts)), [f"Level-{k}" for k in range(len(counts))])
    ax.set_yticks(range(len(counts)), [f"Level-{k}\n({n:,})" for k, n in enumerate(total[:, 0])])
    ax.set(xlabel="real level of the cost", ylabel="predicted level (problems)")
    ax.grid(visible=False)
    return fig


def mft_log(log):
    """How a run of MFT learned, a DataFrame of its `log.csv`: tags, answers, skips."""
    tags = {tier: log[f"tag_{tier}"] for tier in TIERS}
    rest = {"right, of those tried": log.answer_accuracy, "hard problems skipped": log.skip_hard}
    return lines((log.step, tags, "optimizer step", "share of problems", "right tags"),
                 (log.step, rest, "optimizer step", "", "answers and skips"), height=3.6)


def training_curves(logs, columns, window=1):
    """Columns of logs, {label: DataFrame}, a panel each: means of the last `window` numbers."""
    fig = lines(*((None, {label: log.set_index("step")[name].dropna().rolling(
        window, min_periods=1).mean() for label, log in logs.items()}, "step",
        f"{name} [nats]" if name.endswith("entropy") else name, "") for name in columns),
        height=2.1)
    for ax, name in zip(fig.axes, columns, strict=True):
        share = name in ("level_accuracy", "accuracy", "cut", "no_spread") or "skip_" in name
        ax.set_ylim(0, 1.03 if share else None)
    return fig


class LiveCurves:
    """Curves that grow with a training, as its `on_step`; drawn `every` so many, or by `figure`."""

    def __init__(self, columns, every=0):
        self.columns, self.every, self.rows = columns, every, []

    def __call__(self, row):
        self.rows.append(row)
        if self.every and len(self.rows) % self.every == 0:
            clear_output(wait=True)
            display(self.figure())
            plt.close()

    def figure(self, window=1):
        """The curves so far."""
        return training_curves({"run": pd.DataFrame(self.rows)}, self.columns, window)


TOKENS = {  # what a token is to the loss: readable in greyscale, and without styles
    "not learned": '<span style="color:#767676">{}</span>',
    "learned": '<u style="background:#DCEBF7;color:#111;border-bottom:2px solid #0072B2">{}</u>',
    "level": '<b style="background:#222;color:#FFF;padding:0 2px">{}</b>',
    "padding": '<s style="color:#999">{}</s>'}


def token_lines(lines, names=None):
    """(label, words, kinds) as text with a look for each kind of word, a key of `TOKENS`, and a
    legend, with other `names`, {kind: name}; IPython's HTML object."""
    lines = list(lines)
    used = [kind for kind in TOKENS if any(kind in kinds for _, _, kinds in lines)]
    lines.append(("legend:", [(names or {}).get(kind, kind) for kind in used], used))
    html = '<div style="font-family:monospace;line-height:1.8">'
    for label, words, kinds in lines:
        shown = " ".join(TOKENS[k].format(escape(w)) for w, k in zip(words, kinds, strict=True))
        html += f'<div><i style="color:#555">{escape(label)}</i> {shown}</div>'
    return HTML(html + "</div>")
