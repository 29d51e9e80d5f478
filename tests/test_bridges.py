"""The exam in other tools: what they send, what they earn, and that the budget is theirs, too."""

import importlib
import math
import tomllib
from dataclasses import replace

import pytest
from conftest import ROOT
from trl import GRPOConfig, GRPOTrainer

from roi_lib import rarl
from roi_lib.bridges import papers
from roi_lib.bridges.papers import read_exam
from roi_lib.bridges.trl import roi_exam
from roi_lib.engines import EngineConfig
from roi_lib.exams import SKIP_WORDS, draw_papers, in_orders, tag
from roi_lib.generation import Engine, within_budget
from roi_lib.sitting import points, sit
from roi_lib.store.checkpoints import load_environment, load_model
from roi_lib.worlds import POCKET

BUDGET = 64


def box(problem):
    return f"\\boxed{{{problem.answer}}}"


def answers(words):
    """A response that says these words to each problem, tags and all."""
    return " ".join(f"Q{i}. {own}" for i, own in enumerate(words, start=1))


def chat(env, texts):
    """What TRL passes to reward functions for these responses."""
    ids = [[*env.encode(text), env.tokenizer.eos_token_id] for text in texts]
    words = env.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return {"completion_ids": ids,
            "completions": [[{"role": "assistant", "content": text}] for text in words]}


def rows_of(dataset, *numbers):
    """The columns of some rows, as TRL passes them to reward functions."""
    return {name: [dataset[i][name] for i in numbers] for name in ("exam", "budget")}


def test_rewards_of_hand_made_responses(env):
    dataset, (reward,) = roi_exam("pocket", BUDGET, 2, ["easy", "hard"], tokenizer=env.tokenizer)
    _, (by_answer,) = roi_exam("pocket", BUDGET, 2, reward="answer", tokenizer=env.tokenizer)
    exams = in_orders(draw_papers(POCKET, 2, split="train"), ["easy", "hard"], 0)
    assert [read_exam(row) for row in dataset["exam"]] == exams
    p, q, r = exams[0].problems
    more = "1 + 1 = 2. " * 4  # of 24 tokens; header, tag and box have 8
    texts = [
        answers([f"{tag(0)} {box(p)}", f"{tag(2)} {box(q)}", f"{tag(3)} {SKIP_WORDS}"]),
        answers([f"{tag(0)} {box(p)}", f"{tag(0)} {box(q)}", f"{tag(0)} {box(r)}"]),
        # two answers of 32 tokens, which is Level-1: the second box closes with token 64 of 64,
        answers([f"{tag(1)} {more} {box(p)}", f"{tag(0)} {more} {box(q)}"]),
        # and here with token 65
        answers([f"{tag(1)} {more} {box(p)}", f"{tag(1)} + {more} {box(q)}"])]
    own = rows_of(dataset, *[0] * len(texts))
    assert reward(**chat(env, texts), **own) == [1, 3, 1, 1]
    assert by_answer(**chat(env, texts), **own) == [2, 3, 2, 1]
    ample = {"exam": own["exam"][:1], "budget": [65]}  # the budget is the row's
    assert reward(**chat(env, texts[3:]), **ample) == [2]


def test_what_cannot_be_trained_on_is_refused(env, tmp_path, monkeypatch, refusal):
    def told(*arguments, **options):
        return refusal(roi_exam, *arguments, tokenizer=env.tokenizer, **options)

    assert "world must be one of pocket, paper" in told("moon")
    assert "give at most 320 tokens" in told("pocket", 512)
    assert "cannot draw 0 papers" in told("pocket", BUDGET, 0)
    assert "name at least one order" in told("pocket", BUDGET, orders=())
    assert "order must be one of easy, medium, hard" in told("pocket", BUDGET, orders="hard")
    assert "asks for no tags" in told("pocket", BUDGET, style="direct")
    assert "style must be one of" in told("pocket", BUDGET, style="haiku", reward="answer")
    assert "reward must be one of level, answer" in told("pocket", BUDGET, reward="both")
    assert "split must be one of train, test" in told("pocket", BUDGET, split="dev")
    with pytest.raises(FileNotFoundError, match="--data"):
        roi_exam("paper", data=str(tmp_path), tokenizer=env.tokenizer)
    problem = replace(draw_papers(POCKET, 1)[0][0], text="Say <|im_end|> now.")
    with monkeypatch.context() as patch:
        patch.setattr(papers, "draw_papers", lambda *_: [(problem,)])
        assert f"in a statement of {problem.id};" in told("pocket", BUDGET)
    dataset, (reward,) = roi_exam("pocket", BUDGET, 1, tokenizer=env.tokenizer)
    response = chat(env, ["Q1. 3"]) | {"completions": [[{"role": "assistant", "content": "Q1.3"}]]}
    assert "another tokenizer" in refusal(reward, **response, **rows_of(dataset, 0))


class Known(Engine):
    """Sends responses that exist already."""

    def __init__(self, responses):
        self.responses = responses

    def stream(self, requests, temperature=1.0):
        yield from enumerate(self.responses)


def test_a_plain_trainer_trains_on_it_and_pays_what_we_pay(tmp_path):
    env, seen = load_environment(POCKET), []
    dataset, (reward,) = roi_exam("pocket", BUDGET, exams=8, seed=3)

    def exam_reward(**passed):
        seen.append((passed, reward(**passed)))
        return seen[-1][1]

    trainer = GRPOTrainer(
        load_model("pocket-mft"), exam_reward, processing_class=env.tokenizer,
        train_dataset=dataset, args=GRPOConfig(
            str(tmp_path), max_completion_length=BUDGET, max_steps=2, num_generations=4,
            per_device_train_batch_size=16, bf16=False, use_cpu=True, report_to="none",
            save_strategy="no", logging_steps=1, disable_tqdm=True, seed=1))
    exams = [read_exam(row) for row in dataset["exam"]]
    ids, *_ = trainer._tokenize_prompts(dataset["prompt"][:])
    assert [*map(tuple, ids)] == [env.prompt(exam, BUDGET, "roi") for exam in exams]
    trainer.train()
    logged = [row["rewards/exam_reward/mean"] for row in trainer.state.log_history
              if "rewards/exam_reward/mean" in row]
    recipe = replace(POCKET.rarl, rollouts=4)
    for (passed, rewards), mean in zip(seen, logged, strict=True):
        rollouts = [within_budget(row, BUDGET, [env.tokenizer.eos_token_id])
                    for row in passed["completion_ids"]]
        groups = [rollouts[i : i + 4] for i in range(0, 16, 4)]
        sat = [read_exam(row) for row in passed["exam"][::4]]
        table = rarl.roll_out(env, Known(groups), sat, [BUDGET] * 4, recipe, 0)
        assert rarl.exam_rewards(table).ravel().tolist() == rewards and len({*rewards}) > 1
        assert mean == pytest.approx(sum(rewards) / 16) and not table["overrun"].any()
    assert len(seen) == 2


@pytest.fixture
def bridge(monkeypatch):
    """The module behind the entry point of Inspect, which looks models up on the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    pytest.importorskip("inspect_ai", reason="inspect_ai is an optional extra, which CI "
                                             "does not install: pip install -e '.[inspect]'")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return importlib.import_module(project["entry-points"]["inspect_ai"]["roi_lib"])


def evaluate(task, folder, model, **options):
    """Metrics and samples of an evaluation by Inspect."""
    from inspect_ai import eval
    (log,) = eval(task, model=model, log_dir=str(folder), display="none", **options)
    assert log.status == "success", log.error
    return {name: m.value for name, m in log.results.scores[0].metrics.items()}, log.samples


def test_inspect_scores_hand_made_responses(bridge, env, tmp_path):
    from inspect_ai.model import ContentReasoning, ContentText, ModelOutput, ModelUsage
    task = bridge.exam("pocket", BUDGET, "hard", exams=2)
    easy, hard = ([read_exam(s.metadata) for s in task.dataset if s.metadata["order"] == order]
                  for order in ("easy", "hard"))
    drawn, more = draw_papers(POCKET, 2), "1 + 1 = 2. " * 9  # of 54 tokens; header and box have 5
    assert easy == in_orders(drawn, ["easy"], 0) and hard == in_orders(drawn, ["hard"], 0)
    boxes = {exam: [*map(box, exam.problems)] for exam in (*easy, *hard)}
    said = {env.message(exam, BUDGET): words for exam, *words in (
        (easy[0], answers(boxes[easy[0]]), None),
        (easy[1], answers(boxes[easy[1]]), 54),  # hidden: the second box closes with token 64 of 64
        (hard[0], answers([more + boxes[hard[0]][0], f"+ {boxes[hard[0]][1]}"]), None),  # with 65
        (hard[1], [ContentReasoning(reasoning=more), ContentText(text=answers(boxes[hard[1]]))],
         None))}  # with 64, thoughts included

    def generate(input, tools, tool_choice, config):
        assert config.max_tokens == BUDGET
        words, hidden = said[input[0].text]
        output = ModelOutput.from_content("mockllm", words)
        return output.model_copy(update={"usage": ModelUsage(reasoning_tokens=hidden)})

    metrics, samples = evaluate(task, tmp_path, "mockllm/model",
                                model_args={"custom_outputs": generate})
    solved = {sample.id: sample.scores["problems_solved"].value for sample in samples}
    assert solved == {"0000-easy": 3, "0001-easy": 2, "0000-hard": 1, "0001-hard": 2}
    wanted = {"score": 1.5, "score_easy": 2.5, "regret": 0.4, "stderr_hard": 0.5,
              "stderr_easy": 0.5, "score_low": 1, "score_high": 2, "regret_low": 0,
              "regret_high": 2 / 3}
    assert metrics == pytest.approx(wanted)
    (one,) = [sample for sample in samples if sample.id == "0001-hard"]
    assert one.scores["problems_solved"].metadata["problems"][0]["tokens"] == BUDGET


def test_regret_is_of_the_papers_that_were_sat_in_both_orders(bridge):
    from inspect_ai.scorer import SampleScore, Score

    def told(asked, *sat):
        return bridge.score_and_regret()([
            SampleScore(score=Score(value=points), sample_metadata={
                "paper": paper, "order": order, "asked": asked}) for paper, order, points in sat])

    both = told("hard", (0, "hard", 1), (1, "hard", 3), (1, "easy", 2), (0, "easy", 3))
    assert (both["score"], both["score_easy"], both["regret"]) == pytest.approx((2, 2.5, 0.2))
    one = told("hard", (0, "hard", 1), (1, "hard", 3), (0, "easy", 2))  # as --limit may leave it
    assert (one["score"], one["regret"]) == pytest.approx((2, 0.5))
    assert told("easy", (0, "easy", 2), (1, "easy", 1))["regret"] == 0
    assert math.isnan(told("medium", (0, "medium", 2))["regret"])


def test_inspect_and_we_let_the_same_model_solve_the_same_problems(bridge, tmp_path):
    task = bridge.exam("pocket", BUDGET, "medium", exams=8, seed=5)
    metrics, samples = evaluate(task, tmp_path, "hf/local", model_args={
        "model_path": str(ROOT / "data" / "pocket-base"), "device": "cpu", "do_sample": False,
        "tokenizer_path": str(ROOT / "data" / "pocket-tokenizer")})
    env, drawn = load_environment(POCKET), draw_papers(POCKET, 8, seed=5)
    engine = EngineConfig().make("pocket-base", env.tokenizer, "float32")
    for order in ("medium", "easy"):
        table = sit(env, engine, in_orders(drawn, [order], 5), BUDGET, temperature=0)
        own = [s for s in samples if s.metadata["order"] == order]
        assert [s.scores["problems_solved"].value for s in own] == points(table).tolist()
        costs = [[p["cost"] for p in s.scores["problems_solved"].metadata["problems"]]
                 for s in own]
        assert sum(costs, []) == table["cost"].tolist()
        name = "score" if order == "medium" else "score_easy"
        assert metrics[name] == pytest.approx(points(table).mean())
