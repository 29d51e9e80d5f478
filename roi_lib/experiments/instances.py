"""OS-MCKP instances in JSON files, read and solved: the command `osmckp INSTANCE.json`."""

from pathlib import Path

from roi_lib import osmckp
from roi_lib.experiments import knapsack
from roi_lib.osmckp import Action, Instance, require
from roi_lib.store.files import read_json

KINDS = {"list": list, "text": str, "number": (int, float)}
MAX_CELLS = 10**8  # actions x budgets: their arrays take at most about 5 GB


def read_instance(path: str | Path) -> Instance:
    """Read {"budget": B, "classes": [[{"name": ..., "outcomes": [{"p", "cost", "reward"}]}]]};
    `ValueError` names file, class and action (both counted from 0) and field."""
    document, classes, where = read_json(Path(path)), [], "instance"
    try:
        for i, actions in enumerate(_field(document, "classes", "list")):
            classes.append([])
            for k, entry in enumerate(actions if isinstance(actions, list) else ()):
                where = f"class {i}, action {k}"
                rows = [[_field(outcome, field, "number") for field in ("p", "cost", "reward")]
                        for outcome in _field(entry, "outcomes", "list")]
                classes[i].append(Action(_field(entry, "name", "text"), rows))
        where = "instance"
        instance = Instance(_field(document, "budget", "number"), classes)
        require((instance.budget + 1) * sum(map(len, classes)) <= MAX_CELLS,
                f"field budget: {instance.budget} tokens need too much memory, give a smaller one")
    except ValueError as error:
        raise ValueError(f"{path}: {where}, {error}") from error
    return instance


def _field(entry, field, kind):
    value = entry.get(field) if isinstance(entry, dict) else None
    require(isinstance(value, KINDS[kind]) and not isinstance(value, bool),
            f"field {field}: missing, or no {kind}, in {str(entry)[:60]}")
    return value


def solve_document(exam: Instance) -> dict:
    """Expected rewards in points; hindsight_se 0: exact; order_regret null: above 7 problems."""
    best, ahead = osmckp.solve(exam), knapsack.hindsight(exam)
    return {"value": best.value, "open_loop": knapsack.open_loop(exam).value,
            "greedy": float(osmckp.evaluate(exam, knapsack.greedy_roi(exam))[0, -1]),
            "hindsight": ahead.value, "hindsight_se": ahead.se, "first_action": best.first_action,
            "order_regret": knapsack.order_regret(exam) if len(exam) <= 7 else None}
