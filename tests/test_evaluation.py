"""Score, Regret, intervals, grading; replays as exams with known results."""

import numpy as np
import pytest

from roi_lib.evaluation import (
    bootstrap_means,
    by_position,
    confusion,
    interval,
    position_table,
    reference_generator,
    regret,
    segment_table,
    sit,
    smallest_budget,
    summarize,
)
from roi_lib.exams import Exam, draw_papers, order_problems
from roi_lib.grading import GRADERS, is_correct
from roi_lib.sources import load_problems
from roi_lib.worlds import PAPER, POCKET


def sat(tokenizer, order, budget, papers=20):
    exams = [Exam(order_problems(p, order, str(i)), order)
             for i, p in enumerate(draw_papers(POCKET, papers))]
    generator = reference_generator(POCKET, tokenizer, exams, [budget], "direct")
    return sit(POCKET, tokenizer, generator, exams, budget)


def test_a_faultless_writer_with_ample_budget_scores_all(tokenizer):
    easy, hard = (sat(tokenizer, order, 1_000) for order in ("easy", "hard"))
    summary = summarize(POCKET, hard, easy)
    assert summary["score"] == summary["score_easy"] == 3 and summary["regret"] == 0
    assert summary["position_accuracy"] == [1, 1, 1] and summary["over_budget"] == 0
    assert summary["position_accuracy_ci"] == [[1, 1]] * 3
    assert summary["score_ci"] == [3, 3] and summary["level_accuracy"] is None


def test_score_and_regret_by_hand(tokenizer):
    """The budget alone decides: count the solutions that fit, in order."""
    easy, hard = (sat(tokenizer, order, 64) for order in ("easy", "hard"))

    def fits(sitting):
        costs = np.cumsum([len(tokenizer(f"Q1. {p.solution}").input_ids)
                           for p in sitting.exam.problems])
        return int((costs <= 64).sum())

    expected, expected_easy = (np.mean([fits(s) for s in way]) for way in (hard, easy))
    summary = summarize(POCKET, hard, easy)
    assert summary["score"] == pytest.approx(expected)
    assert summary["regret"] == pytest.approx((expected_easy - expected) / expected_easy)
    assert 0 < summary["regret"] < 1 and summary["mean_tokens"] <= 64
    low, high = summary["regret_ci"]
    assert low < summary["regret"] < high
    assert sum(summary["position_tokens"]) == pytest.approx(summary["mean_tokens"], abs=1)


def test_the_problem_that_the_budget_cut_is_marked(tokenizer):
    for s in sat(tokenizer, "hard", 64):
        table = segment_table(POCKET, [s])
        assert table["cut"].sum() == (not s.finished)
        if not s.finished:
            assert table["cut"].tolist().index(True) == table["reached"].sum() - 1


def test_regret_needs_the_same_papers(tokenizer):
    easy = sat(tokenizer, "easy", 64)
    with pytest.raises(ValueError, match="same papers"):
        summarize(POCKET, easy[1:] + easy[:1], easy)
    assert regret(0.0, 0.0) is None and regret(1.0, 2.0) == 0.5


def test_bootstrap_interval_has_its_width():
    values = np.random.default_rng(0).normal(size=(400, 1))
    low, high = interval(bootstrap_means(values)[:, 0])
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    pair = np.repeat(values, 2, axis=1)
    means = bootstrap_means(pair)
    assert np.array_equal(means[:, 0], means[:, 1]), "columns share each resample"


def test_intervals_by_position_are_those_of_a_share():
    right = np.zeros((400, 3))
    right[:100, 1] = right[:, 2] = 1
    found = by_position(right)
    assert found["position_accuracy"] == [0, 0.25, 1]
    never, (low, high), always = found["position_accuracy_ci"]
    assert never == [0, 0] and always == [1, 1]
    half = 1.96 * (0.25 * 0.75 / 400) ** 0.5  # of the binomial, by the normal approximation
    assert low == pytest.approx(0.25 - half, abs=0.006)
    assert high == pytest.approx(0.25 + half, abs=0.006)
    table = position_table([{"method": "a", "budget": 64, "order": "hard"} | found])
    assert f"0.250 [{low:.3f},{high:.3f}]" in table.splitlines()[1]


def test_one_exam_has_no_interval_at_any_position():
    found = by_position(np.ones((1, 2)))
    assert found == {"position_accuracy": [1, 1], "position_accuracy_ci": [None, None]}
    table = position_table([{"method": "a", "budget": 64, "order": "hard"} | found])
    assert table.splitlines()[1].count("1.000 --") == 2


@pytest.mark.parametrize("budget", [0, 1, 4])
def test_F6_budget_below_a_tag(tokenizer, budget):
    assert smallest_budget(POCKET, tokenizer) == 5
    with pytest.raises(ValueError, match="give at least 5 tokens"):
        sit(POCKET, tokenizer, None, [Exam(draw_papers(POCKET, 1)[0], "easy")], budget)


def test_no_exams(tokenizer):
    with pytest.raises(ValueError, match="no exams"):
        sit(POCKET, tokenizer, None, [], 64)


def test_levels_are_compared_with_the_real_cost(tokenizer):
    sittings = sat(tokenizer, "easy", 1_000, papers=1)
    assert summarize(POCKET, sittings, sittings)["level_accuracy"] is None
    words = ("Q1. <predicted_level>Level-0</predicted_level> \\boxed{1} "
             "Q2. <predicted_level>Level-3</predicted_level> \\boxed{NA} "
             "Q3. <predicted_level>Level-2</predicted_level> \\boxed{1}")
    from roi_lib.generation import ReplayGenerator
    class Always(dict):
        def __missing__(self, key):
            return tokenizer(words).input_ids
    exam = sittings[0].exam
    replay = ReplayGenerator(Always(), tokenizer.eos_token_id)
    table = segment_table(POCKET, sit(POCKET, tokenizer, replay, [exam], 64))
    assert table["predicted"].tolist() == [0, 3, 2]
    assert table["real"].tolist() == [0, 3, 0]
    assert table["skipped"].tolist() == [False, True, False]
    assert table["tier"].tolist() == ["easy", "medium", "hard"]
    assert not table["cut"].any() and table["reached"].all()
    counts = confusion(POCKET, table["predicted"], table["real"])
    assert counts.sum() == 3 and counts[0, 0] == counts[3, 3] == counts[2, 0] == 1


@pytest.mark.parametrize(("answer", "gold", "right"), [
    ("7", "7", True), (" 7", "7", True), ("07", "7", True), ("8", "7", False), ("7.0", "7", False),
    ("-7", "7", False), ("seven", "7", False), ("", "7", False), ("٧", "7", False),
])  # fmt: skip
def test_integers(answer, gold, right):
    assert GRADERS["integer"](gold, answer) is right


@pytest.mark.parametrize(("answer", "gold", "right"), [
    (r"\frac{1}{2}", "0.5", True), (r"\frac12", r"\frac{1}{2}", True), ("2", "3", False),
    ("1,000", "1000", True), ("x+1", "1+x", True), (r"\text{east}", r"\text{east}", True),
])  # fmt: skip
def test_math_answers(answer, gold, right):
    assert GRADERS["math"](gold, answer) is right


def test_skips_silence_and_endless_answers_earn_nothing(tokenizer):
    from roi_lib.exams import Segment
    problem = draw_papers(POCKET, 1)[0][0]
    for answer in (None, "NA", problem.answer * 2_000):
        assert not is_correct(POCKET, problem, Segment(5, "", answer, None))
    assert is_correct(POCKET, problem, Segment(5, "", problem.answer, None))


def test_real_reference_solutions_grade_right(real_data):
    """Every GSM8K, MATH-500 and AIME 2025 reference solution earns its own point."""
    from roi_lib.exams import read_segment
    for family, tier, n in (("gsm8k", "easy", 1318), ("math", "medium", 500), ("aime", "hard", 30)):
        problems = load_problems(family, tier, "test", real_data)
        assert len(problems) == n
        for problem in problems:
            segment = read_segment(PAPER, 1, problem.solution)
            assert is_correct(PAPER, problem, segment), problem.id
