"""Every registered exercise accepts its solution, rejects wrong answers and knows its stub."""

import pytest
from solutions import SOLUTIONS, WRONG

from roi_lib.teaching.exercises import EXERCISES, check


def line(capsys, exercise_id, answer):
    check(exercise_id, answer)
    out = capsys.readouterr().out
    assert out.endswith("\n") and out.count("\n") == 1
    return out.rstrip("\n")


def test_every_exercise_has_a_solution_and_wrong_answers():
    assert set(SOLUTIONS) == set(WRONG) == set(EXERCISES)
    assert all(WRONG.values())


@pytest.mark.parametrize("exercise_id", sorted(EXERCISES))
def test_solution_passes(exercise_id, capsys):
    assert line(capsys, exercise_id, SOLUTIONS[exercise_id]) == f"[PASS] {exercise_id}"


@pytest.mark.parametrize(("exercise_id", "number"),
                         [(key, j) for key in sorted(WRONG) for j in range(len(WRONG[key]))])
def test_wrong_answers_get_a_hint(exercise_id, number, capsys):
    text = line(capsys, exercise_id, WRONG[exercise_id][number])
    assert text.startswith(f"[TRY AGAIN] {exercise_id}: ") and len(text) > 30


@pytest.mark.parametrize("exercise_id", sorted(EXERCISES))
@pytest.mark.parametrize("count", [None, 2, 5, 6, 10])
def test_no_number_is_never_right(exercise_id, count, capsys):
    """As a mean over nothing, say; alone, or in the place of each of several numbers."""
    nan = float("nan") if count is None else [float("nan")] * count
    text = line(capsys, exercise_id, (lambda *args: nan) if callable(SOLUTIONS[exercise_id])
                else nan)
    assert text.startswith(f"[TRY AGAIN] {exercise_id}: ")


@pytest.mark.parametrize("exercise_id", sorted(EXERCISES))
def test_stub_is_not_answered(exercise_id, capsys):
    stubs = [..., None]
    if callable(SOLUTIONS[exercise_id]):
        stubs += [lambda *args: ..., lambda *args: None]
    for stub in stubs:
        assert line(capsys, exercise_id, stub) == f"[ ] {exercise_id}: not answered yet"


def test_hint_does_not_give_the_number_away(capsys):
    for key, answer in SOLUTIONS.items():
        if isinstance(answer, int | float):
            assert str(answer) not in line(capsys, key, -1)


def test_an_unknown_id_is_refused():
    with pytest.raises(ValueError, match=r"no exercise '99\.9'.*01\.1"):
        check("99.9", 1)
