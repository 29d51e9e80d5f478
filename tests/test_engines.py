"""vLLM, OpenAI-compatible servers (well-behaved and not), run logs: the budget holds in all."""

import copy
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from roi_lib import engines
from roi_lib.__main__ import main
from roi_lib.checkpoints import load_model, load_tokenizer, locate
from roi_lib.engines import OpenAIGenerator, Usage, VLLMGenerator, make_engine, vllm_installed
from roi_lib.evaluation import sit
from roi_lib.exams import Exam, draw_papers, encode_prompt, exam_prompt, order_problems
from roi_lib.generation import ReplayGenerator, Request, Rollout, TorchGenerator, within_budget
from roi_lib.runlog import LoggedGenerator, Progress, RunLog, model_hash
from roi_lib.worlds import DATA, POCKET

KEY = "sk-test-0123456789"
needs_vllm = pytest.mark.skipif(not vllm_installed(), reason=engines.INSTALL_VLLM)


class Misbehaving(BaseHTTPRequestHandler):
    """A server that does, request by request, what its `plan` says; "ok" once the plan is over."""

    def log_message(self, *args):
        pass

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.seen.append((self.path, asked, self.headers["authorization"]))
            act = self.server.plan.pop(0) if self.server.plan else "ok"
        getattr(self, f"act_{act}", self.act_status)(asked, act)

    def answer(self, body: str, status=200, length=None, kind="application/json", **headers):
        data = body.encode()
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(length or len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def act_ok(self, asked, act):
        n = asked["max_tokens"] + 40 if act == "more" else min(3, asked["max_tokens"])
        choice = {"index": 0, "finish_reason": "stop" if act == "ok" else "length"}
        if "messages" in asked:
            text = " ".join(["+"] * (n - 1 if act == "ok" else n))
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice |= {"text": "", "token_ids": [9] * (n - 1) + [3 if act == "ok" else 9]}
        usage = {"prompt_tokens": 10, "completion_tokens": n, "total_tokens": 10 + n}
        self.answer(json.dumps({"id": "x", "object": "x", "created": 0, "model": "m",
                                "choices": [choice], "usage": usage}))

    act_more = act_ok

    def act_status(self, asked, act):
        words = json.dumps({"error": {"message": f"the key {KEY} is bad"}})
        self.answer(words, int(act), **({"retry-after": "0"} if act == "429" else {}))

    def act_cut(self, asked, act):
        self.answer('{"id": "x", "choi', length=5_000)
        self.close_connection = True

    def act_empty(self, asked, act):
        self.answer('{"id": "x", "object": "x", "created": 0, "model": "m", "choices": []}')

    def act_noids(self, asked, act):
        self.answer('{"id": "x", "object": "x", "created": 0, "model": "m", "choices": '
                    '[{"index": 0, "text": "hello", "finish_reason": "stop"}]}')

    def act_malformed(self, asked, act):
        self.answer('{"id": "x", "choices": [{"text"')

    def act_html(self, asked, act):
        self.answer("<html>busy</html>", kind="text/html")

    def act_hang(self, asked, act):
        time.sleep(1.0)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Misbehaving)
    server.plan, server.seen, server.lock = [], [], threading.Lock()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def client(server, tokenizer, **options):
    options = {"retries": 2, "timeout": 0.4, "backoff": 0.01, "concurrency": 1} | options
    return OpenAIGenerator("m", tokenizer, [3], base_url=server.url, **options)


REQUESTS = [Request((2, 5, i), 8, (0, i), message=f"solve {i}") for i in range(3)]


@pytest.mark.parametrize("fault", ["hang", "429", "500", "cut", "empty", "malformed", "html",
                                   "noids"])
def test_API_faults_are_retried_and_then_the_row_is_marked(server, tokenizer, fault, capsys):
    server.plan = [fault, "ok", fault, fault, fault]  # mended by a retry; never mended; ok
    generator = client(server, tokenizer)
    once, never, good = (group[0] for group in generator.generate(REQUESTS))
    assert once == good == Rollout((9, 9, 3), True)
    assert never.failed and never.ids == () and not never.finished
    assert KEY not in never.failed and KEY not in str(capsys.readouterr())
    usage = generator.usage
    assert (usage.responses, usage.failed, usage.retries) == (2, 1, 3)
    assert len(server.seen) == 6, "bounded retries, no others"


@pytest.mark.parametrize(("status", "words"), [
    ("401", "refused the API key"), ("403", "refused the API key"), ("404", "HTTP 404"),
    ("400", "HTTP 400")])
def test_API_refusals_stop_the_run_without_the_key(server, tokenizer, status, words):
    server.plan = [status] * 9
    with pytest.raises(ValueError, match=words) as error:
        client(server, tokenizer).generate(REQUESTS)
    assert KEY not in str(error.value) and len(server.seen) <= 3


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_F12_more_tokens_than_asked_are_cut_flagged_and_counted(server, tokenizer, api):
    server.plan = ["more"]
    generator = client(server, tokenizer, api=api)
    long, short, _ = (group[0] for group in generator.generate(REQUESTS))
    assert len(long.ids) == 8 and long.overrun == 40 and not long.finished
    assert short.overrun == 0 and short.finished and short.ids[-1] == 3
    assert generator.usage.overrun == 40 and generator.usage.tokens_out == 48 + 3 + 3


def test_chat_sends_the_message_and_charges_the_worlds_tokens(server, tokenizer):
    rollout = client(server, tokenizer, api="chat").generate(REQUESTS)[0][0]
    path, asked, _ = server.seen[0]
    assert path == "/v1/chat/completions" and asked["max_tokens"] == 8
    assert asked["messages"] == [{"role": "user", "content": "solve 0"}]
    plus = tokenizer("+", add_special_tokens=False).input_ids
    assert rollout.ids == (*plus * 2, tokenizer.eos_token_id)


def test_completions_send_ids_and_every_rollout_its_own_seed(server, tokenizer):
    requests = [Request((2, 5), 8, (0, 1), n=3), Request((2, 6), 5, (0, 2))]
    rollouts = client(server, tokenizer, concurrency=4).generate(requests, 0.5)
    assert [len(group) for group in rollouts] == [3, 1]
    asked = [body for _, body, _ in server.seen]
    assert sorted(body["prompt"] for body in asked) == [[2, 5]] * 3 + [[2, 6]]
    assert len({body["seed"] for body in asked}) == 4
    assert {body["max_tokens"] for body in asked} == {8, 5}
    assert all(body["return_token_ids"] and body["temperature"] == 0.5 for body in asked)


def test_keys_come_from_the_environment_alone(server, tokenizer, monkeypatch):
    client(server, tokenizer).generate(REQUESTS[:1])
    assert server.seen[0][2] == f"Bearer {KEY}"
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ValueError, match="set OPENAI_API_KEY"):
        OpenAIGenerator("m", tokenizer, [3])
    with pytest.raises(ValueError, match="set DEEPSEEK_KEY"):
        OpenAIGenerator("m", tokenizer, [3], key_variable="DEEPSEEK_KEY")
    client(server, tokenizer).generate(REQUESTS[:1])  # a server on this machine needs none
    with pytest.raises(ValueError, match="completions or chat"):
        client(server, tokenizer, api="telepathy")


def test_cost_report():
    line = Usage(3, 1, 2, 5, 2_000_000, 500_000).report(0.15, 0.60)
    assert "3 responses, 1 failed, 2 retries" in line and "cost 0.6000" in line


def test_F12_within_budget():
    assert within_budget([5, 6, 3], 3, [3]) == Rollout((5, 6, 3), True)
    assert within_budget([5, 6, 3], 2, [3]) == Rollout((5, 6), False, 1)
    assert within_budget([5, 3, 6, 7], 9, [3]) == Rollout((5, 3), True)
    assert within_budget([], 9, [3]) == Rollout((), False)


# ---------------------------------------------------------------- run logs
HEADER = {"world": "pocket", "method": "base", "model": "abc", "budget": 8, "seed": 0}


def test_a_log_is_continued_without_asking_twice(server, tokenizer, tmp_path):
    path = tmp_path / "log.jsonl"
    server.plan = ["ok", "500", "500", "500", "ok"]
    generator = LoggedGenerator(client(server, tokenizer), RunLog(path, HEADER))
    first = generator.generate(REQUESTS)
    assert [bool(g[0].failed) for g in first] == [False, True, False]
    before = len(server.seen)
    again = LoggedGenerator(client(server, tokenizer), RunLog(path, HEADER)).generate(REQUESTS)
    assert len(server.seen) == before + 1, "only the failed one is asked again"
    assert again[0] == first[0] and not again[1][0].failed
    replay = LoggedGenerator(None, RunLog(path, HEADER))
    assert replay.generate(REQUESTS) == again
    assert KEY not in path.read_text()
    with pytest.raises(ValueError, match="lacks 3 of 3 responses"):
        replay.generate(REQUESTS, temperature=0)


def test_equal_requests_are_answered_once_without_a_log_too(server, tokenizer):
    server.plan = ["ok", "500", "500", "500", "ok"]
    generator = LoggedGenerator(client(server, tokenizer))
    first = generator.generate(REQUESTS)
    assert [bool(g[0].failed) for g in first] == [False, True, False]
    before = len(server.seen)
    again = generator.generate(REQUESTS)
    assert len(server.seen) == before + 1, "only the failed one is asked again"
    assert again[::2] == first[::2] and not again[1][0].failed
    generator.generate(REQUESTS, temperature=0.5)
    assert len(server.seen) == before + 4, "these are others"


def test_an_interrupted_run_keeps_what_it_had(tmp_path):
    class Interrupted(ReplayGenerator):
        def stream(self, requests, temperature=1.0):
            for n, row in enumerate(super().stream(requests, temperature)):
                if n == 2:
                    raise KeyboardInterrupt
                yield row
    path, responses = tmp_path / "log.jsonl", {r.prompt: [7] for r in REQUESTS}
    with pytest.raises(KeyboardInterrupt):
        LoggedGenerator(Interrupted(responses, 3), RunLog(path, HEADER)).generate(REQUESTS)
    assert len(RunLog(path, HEADER).rows) == 2


def written(tmp_path, responses=(7,)):
    path = tmp_path / "log.jsonl"
    engine = ReplayGenerator({r.prompt: list(responses) for r in REQUESTS}, 3)
    LoggedGenerator(engine, RunLog(path, HEADER)).generate(REQUESTS)
    return path


def test_F1_a_last_line_cut_short_is_dropped_and_said(tmp_path):
    path = written(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.warns(UserWarning, match="line 4: cut short"):
        log = RunLog(path, HEADER)
    assert len(log.rows) == 2
    LoggedGenerator(ReplayGenerator({r.prompt: [7] for r in REQUESTS}, 3), log).generate(REQUESTS)
    assert path.read_bytes() == whole


def test_F5_one_process_writes_a_log_and_others_read_it(tmp_path):
    path = written(tmp_path)
    whole = path.read_bytes()
    script = ("import sys; from pathlib import Path; from roi_lib.runlog import RunLog\n"
              f"with RunLog(Path({str(path)!r}), {HEADER}).writing():\n"
              "    print('mine', flush=True); sys.stdin.read()")
    writer = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE)
    try:
        assert writer.stdout.readline() == b"mine\n"
        path.write_bytes(whole[:-20])  # as a reader sees a line that is under way
        engine = ReplayGenerator({r.prompt: [7] for r in REQUESTS}, 3)
        with pytest.warns(UserWarning, match="line 4: cut short"):
            log = RunLog(path, HEADER)
        with pytest.raises(ValueError, match=r"another process is writing .*log\.jsonl; wait"):
            LoggedGenerator(engine, log).generate(REQUESTS)
        assert path.read_bytes() == whole[:-20], "nobody else's line is touched"
        assert LoggedGenerator(None, log).generate(REQUESTS[:2]), "a replay needs no lock"
    finally:
        writer.kill()
        writer.communicate()
    LoggedGenerator(engine, log).generate(REQUESTS)
    assert path.read_bytes() == whole, "the lock went with its process"


@pytest.mark.parametrize("line", ["{", "[]", '{"key": "x"}', '{"key": "x", "rollouts": [{"a": 1}]}',
                                  "\udcff"])
def test_F28_a_bad_line_is_named(tmp_path, line):
    path = written(tmp_path)
    rows = path.read_bytes().split(b"\n")
    rows[2] = line.encode(errors="surrogateescape")
    path.write_bytes(b"\n".join(rows))
    with pytest.raises(ValueError, match=r"log\.jsonl, line 3: not a line of a run log"):
        RunLog(path, HEADER)


@pytest.mark.parametrize("key", sorted(HEADER))
def test_the_log_of_another_run_is_refused(tmp_path, key):
    path = written(tmp_path)
    with pytest.raises(ValueError, match=f"log of another run: its {key} is"):
        RunLog(path, HEADER | {key: "other"})


def test_models_are_told_apart(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(name)
    assert model_hash(str(tmp_path / "a")) != model_hash(str(tmp_path / "b"))
    assert model_hash("Some/Model") == "Some/Model"


def test_progress_is_plain_lines(capsys, monkeypatch):
    progress = Progress("base-64", 100, 5)
    for seconds, done in ((2, 10), (4, 20), (6, 30), (8, 40), (14, 70)):
        monkeypatch.setattr(time, "monotonic", lambda s=seconds: progress.start + s)
        progress.show(done, done)
    err = capsys.readouterr().err
    assert err == ("base-64: 40/100 responses, 5.0/s, 12 s left\n"
                   "base-64: 70/100 responses, 5.0/s, 6 s left\n")


def test_progress_is_right_from_the_first_line_on_for_rows_by_the_batch(capsys, monkeypatch):
    """Batches of 50 rows, 20 s each; 100 of the 300 responses were in the log already."""
    progress = Progress("base-64", 300, 5)
    for batch in range(4):
        for row in range(1, 51):
            now = progress.start + 20 * (batch + 1) + row * 1e-3
            monkeypatch.setattr(time, "monotonic", lambda now=now: now)
            progress.show(100 + 50 * batch + row, 50 * batch + row)
    assert capsys.readouterr().err == ("base-64: 151/300 responses, 2.5/s, 40 s left\n"
                                       "base-64: 201/300 responses, 2.5/s, 20 s left\n"
                                       "base-64: 251/300 responses, 2.5/s, 0 s left\n")


def test_exam_runs_are_resumed_and_replayed(capsys, tmp_path):
    def run(*more):
        main(["exam", "--exams", "3", "--budgets", "64", "--log", str(tmp_path), *more])
        return capsys.readouterr().out
    first = run()
    lines = (tmp_path / "base-64.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["run"]["world"] == "pocket" and len(lines) == 1 + 3 * 3
    assert run() == run("--engine", "replay") == first
    with pytest.raises(SystemExit):
        run("--engine", "replay", "--seed", "1")
    assert "its seed is 0, not 1" in capsys.readouterr().err


def test_any_causal_language_model_with_a_chat_template_sits(tokenizer, capsys, tmp_path):
    """`--model` takes a folder of somebody else's: another architecture, its own template."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt_neox", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48,
        num_hidden_layers=1, num_attention_heads=2, eos_token_id=3, pad_token_id=None)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "theirs")
    theirs = copy.deepcopy(tokenizer)
    theirs.chat_template = "{{ messages[0]['content'] }} <|im_end|> "
    theirs.save_pretrained(tmp_path / "theirs")
    main(["exam", "--exams", "2", "--budgets", "64", "--model", str(tmp_path / "theirs"),
          "--log", str(tmp_path)])
    assert "base                64 hard" in capsys.readouterr().out
    rows = [json.loads(row) for row in (tmp_path / "base-64.jsonl").read_text().splitlines()[1:]]
    assert len(rows) == 2 * 3
    exam = Exam(draw_papers(POCKET, 2, seed=0)[0], "easy")
    words = exam_prompt(POCKET, exam, 64)
    assert tokenizer.decode(encode_prompt(theirs, words)).startswith("Budget")
    assert all(1 <= len(r["ids"]) <= 64 for row in rows for r in row["rollouts"])


def test_exam_reports_failures_and_costs(server, capsys):
    server.plan = ["500"] * 2
    main(["exam", "--exams", "2", "--budgets", "64", "--engine", "openai", "--base-url", server.url,
          "--retries", "0", "--concurrency", "1", "--price", "1,2"])
    out, err = capsys.readouterr()
    assert "4 responses, 2 failed, 0 retries; 40 tokens in, 12 out" in out
    assert "cost 0.0001" in out and "warning: 2 responses failed" in err


def test_a_chat_model_needs_no_tokenizer_of_its_name(server, capsys):
    """As GPT-4o-mini, which is no folder and no hub id."""
    main(["exam", "--exams", "2", "--budgets", "64", "--engine", "openai", "--base-url", server.url,
          "--api", "chat", "--model", "gpt-4o-mini"])
    assert "6 responses, 0 failed" in capsys.readouterr().out
    assert {body["model"] for _, body, _ in server.seen} == {"gpt-4o-mini"}
    assert all(body["top_p"] == 1 for _, body, _ in server.seen), "not what the model's file says"


def test_unknown_engine(tokenizer):
    with pytest.raises(ValueError, match="choose from torch, vllm, openai, replay"):
        make_engine("abacus", "pocket-base", tokenizer)


def test_the_recorded_logs_of_notebook_03_are_those_of_this_model():
    """Where vLLM is not installed, the notebook compares these with the torch engine's tokens."""
    tokenizer = load_tokenizer(POCKET.tokenizer)
    engine = TorchGenerator.of(load_model("pocket-base", "float32"), tokenizer)
    papers = draw_papers(POCKET, 4, seed=0)
    exams = [Exam(order_problems(paper, order, f"0/{i}"), order)
             for order in ("easy", "medium", "hard") for i, paper in enumerate(papers)]
    requests = [Request(tuple(encode_prompt(tokenizer, exam_prompt(POCKET, e, 64))), 64)
                for e in exams]
    expected = {r[0].ids for r in engine.generate(requests, temperature=0)}
    for name in ("vllm", "openai"):
        lines = (DATA / "engine-logs" / name / "base-64.jsonl").read_text().splitlines()
        run, *rows = map(json.loads, lines)
        assert run["run"]["engine"] == name and run["run"]["model"] == model_hash("pocket-base")
        assert {tuple(row["rollouts"][0]["ids"]) for row in rows} == expected


# ---------------------------------------------------------------- the real vLLM
@pytest.fixture(scope="module")
def pocket():
    """Tokenizer, greedy requests, and the torch engine's rollouts."""
    tokenizer = load_tokenizer(POCKET.tokenizer)
    exams = [Exam(p, "hard") for p in draw_papers(POCKET, 32, seed=5)]
    requests = [Request(tuple(encode_prompt(tokenizer, exam_prompt(POCKET, e, 128))), 96 + i)
                for i, e in enumerate(exams)]
    engine = TorchGenerator.of(load_model("pocket-base", "float32"), tokenizer)
    return tokenizer, requests, engine.generate(requests, temperature=0)


@needs_vllm
def test_vllm_gives_the_same_greedy_tokens(pocket):
    tokenizer, requests, expected = pocket
    engine = VLLMGenerator("pocket-base", [tokenizer.eos_token_id], "float32")
    assert engine.generate(requests, temperature=0) == expected
    sampled = [Request(r.prompt, 40, (7, i), n=2) for i, r in enumerate(requests)]
    first = engine.generate(sampled, 2.0)  # hot: at 1 the model hardly ever wavers in 40 tokens
    assert first == engine.generate(sampled[:9], 2.0) + engine.generate(sampled[9:], 2.0)
    assert any(a != b for a, b in first) and max(len(r.ids) for g in first for r in g) == 40
    with pytest.raises(ValueError, match="give max_length=1"):  # the pocket model's own is 1,024
        engine.generate([Request(requests[0].prompt, 1_024)])


@pytest.fixture(scope="module")
def vllm_server():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model",
               str(locate("pocket-base")), "--served-model-name", "pocket-base", "--tokenizer",
               str(locate("pocket-tokenizer")), "--dtype", "float32", "--max-model-len", "1024",
               "--enforce-eager", "--no-enable-chunked-prefill", "--host", "127.0.0.1",
               "--port", str(port)]
    process = subprocess.Popen(command, env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"},
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            time.sleep(1)
            assert process.poll() is None, "the vLLM server ended at once"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                break
            except OSError:
                continue
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


@needs_vllm
def test_a_local_vllm_server_gives_the_same_greedy_tokens(pocket, vllm_server):
    tokenizer, requests, expected = pocket
    options = {"base_url": vllm_server}
    engine = make_engine("openai", "pocket-base", tokenizer, **options)
    assert engine.generate(requests, temperature=0) == expected
    assert engine.usage.failed == engine.usage.overrun == 0
    chat = make_engine("openai", "pocket-base", tokenizer, **options, api="chat")
    exam = Exam(draw_papers(POCKET, 1, seed=5)[0], "hard")
    (sitting,) = sit(POCKET, tokenizer, chat, [exam], 128, temperature=0)
    assert not sitting.failed and 1 <= len(sitting.ids) <= 128
