"""OS-MCKP instances in JSON files, read and solved: the command `osmckp INSTANCE.json`."""

from pathlib import Path

from roi_lib import osmckp
from roi_lib.osmckp import Action, Instance, require
from roi_lib.store.files import read_json

KINDS = {"object": dict, "list": list, "string": str, "number": (int, float)}
MAX_CELLS = 10**8  # actions x budgets: their arrays take at most about 5 GB


def read_instance(path: str | Path) -> Instance:
    """Read {"budget": B, "classes": [[{"name": ..., "outcomes": [{"p", "cost", "reward"}]}]]}; a
    ValueError names file, class and action (both counted from 0) and field."""
    document = read_json(Path(path))
    try:
        classes = [[_action(entry, f"class {i}, action {k}")
                    for k, entry in enumerate(_check(actions, "list", f"class {i}"))]
                   for i, actions in enumerate(_field(document, "classes", "list", "instance"))]
        instance = Instance(_field(document, "budget", "number", "instance"), classes)
        require((instance.budget + 1) * sum(map(len, classes)) <= MAX_CELLS,
                f"field budget: {instance.budget} tokens need too much memory, give a smaller one")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return instance


def _action(entry, where):
    name = _field(entry, "name", "string", where)
    rows = [[_field(outcome, field, "number", f"{where} ({name!r}), outcome {s}")
             for field in ("p", "cost", "reward")]
            for s, outcome in enumerate(_field(entry, "outcomes", "list", f"{where} ({name!r})"))]
    try:
        return Action(name, rows)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _check(value, kind, where):
    ok = isinstance(value, KINDS[kind]) and not isinstance(value, bool)
    require(ok, f"{where}: need a JSON {kind}, not {type(value).__name__}")
    return value


def _field(entry, field, kind, where):
    require(field in _check(entry, "object", where), f"{where}, field {field}: missing")
    return _check(entry[field], kind, f"{where}, field {field}")


def solve_document(exam: Instance) -> dict:
    """Expected rewards in points; hindsight_se 0: exact; order_regret null: above 7 problems."""
    best, ahead = osmckp.solve(exam), osmckp.hindsight(exam)
    return {"value": best.value, "open_loop": osmckp.open_loop(exam).value,
            "greedy": float(osmckp.evaluate(exam, osmckp.greedy_roi(exam))[0, -1]),
            "hindsight": ahead.value, "hindsight_se": ahead.se, "first_action": best.first_action,
            "order_regret": osmckp.order_regret(exam) if len(exam) <= 7 else None}
