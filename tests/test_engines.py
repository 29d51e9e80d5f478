"""Engines by name: API servers (well-behaved and not), vLLM, run logs; the budget holds in all."""

import dataclasses
import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from roi_lib.engines import EngineConfig, logs, make_engine
from roi_lib.engines.logs import LoggedEngine, RunLog
from roi_lib.engines.openai import OpenAIEngine, Usage
from roi_lib.engines.replay import ReplayEngine
from roi_lib.engines.vllm import INSTALL_VLLM, VLLMEngine, vllm_installed
from roi_lib.exams import draw_papers, in_orders
from roi_lib.generation import Request, Rollout
from roi_lib.sitting import sit
from roi_lib.store.checkpoints import load_environment, model_hash
from roi_lib.store.files import DATA
from roi_lib.worlds import ORDERS, POCKET

KEY = "sk-test-0123456789"
REPLY = {"id": "x", "object": "x", "created": 0, "model": "m"}
CHOICE = {"index": 0, "text": "hello", "finish_reason": "stop"}
BODIES = {"empty": json.dumps(REPLY | {"choices": []}),
          "noids": json.dumps(REPLY | {"choices": [CHOICE]}),
          "cut": '{"id": "x", "choi', "malformed": '{"id": "x", "choices": [{"text"',
          "html": "<html>busy</html>"}


class Misbehaving(BaseHTTPRequestHandler):
    """A server that does, request by request, what its `plan` says; "ok" once the plan is over."""

    def log_message(self, *args):
        """Say nothing."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.seen.append((self.path, asked, self.headers["authorization"]))
        act = self.server.plan.pop(0) if self.server.plan else "ok"
        if act == "hang":
            return time.sleep(1.0)
        body = BODIES.get(act) or self.response(asked, act)
        self.send_response(int(act) if act.isdigit() else 200)
        self.send_header("content-type", "text/html" if act == "html" else "application/json")
        self.send_header("content-length", str(len(body) + 5_000 * (act == "cut")))
        self.send_header("retry-after", "0" if act == "429" else "soon")
        self.end_headers()
        self.wfile.write(body.encode())
        self.close_connection = True

    def response(self, asked, act):
        if act.isdigit():
            return json.dumps({"error": {"message": f"the key {KEY} is bad"}})
        n = asked["max_tokens"] + 40 if act == "more" else min(3, asked["max_tokens"])
        if "messages" in asked:
            words = {"role": "assistant", "content": " ".join(["+"] * (n - (act == "ok")))}
            choice = {"message": words}
        else:
            choice = {"text": "", "token_ids": [9] * (n - 1) + [3 if act == "ok" else 9]}
        choice |= {"index": 0, "finish_reason": "stop" if act == "ok" else "length"}
        return json.dumps(REPLY | {"choices": [choice], "usage": {
            "prompt_tokens": 10, "completion_tokens": n, "total_tokens": 10 + n}})


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with ThreadingHTTPServer(("127.0.0.1", 0), Misbehaving) as server:
        server.plan, server.seen = [], []
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield server
        server.shutdown()


def client(server, tokenizer, **options):
    options = {"retries": 2, "timeout": 0.4, "backoff": 0.01, "concurrency": 1} | options
    url = f"http://127.0.0.1:{server.server_port}/v1"
    return OpenAIEngine("m", tokenizer, [3], base_url=url, **options)


REQUESTS = [Request((2, 5, i), 8, (0, i), message=f"solve {i}") for i in range(3)]


@pytest.mark.parametrize("fault", "hang 429 500 cut empty malformed html noids".split())
def test_faults_are_retried_and_then_the_row_is_marked(server, tokenizer, fault, capsys):
    server.plan = [fault, "ok", fault, fault, fault]  # mended by a retry; never mended; ok
    engine = client(server, tokenizer)
    once, never, good = (group[0] for group in engine.generate(REQUESTS))
    assert once == good == Rollout((9, 9, 3), True)
    assert never.failed and never.ids == () and not never.finished
    assert KEY not in never.failed and KEY not in str(capsys.readouterr())
    assert engine.usage == Usage(2, 1, 3, 0, 20, 6)
    assert "6 out, 0 beyond the budget; cost 8.0000 at" in engine.usage.report(1e5, 1e6)
    assert len(server.seen) == 6, "bounded retries, no others"


def test_refusals_stop_the_run_without_the_key(server, tokenizer, refusal):
    for status, words in (("401", "the API key"), ("403", "the API key"), ("404", "HTTP 404")):
        server.plan, server.seen = [status] * 9, []
        told = refusal(client(server, tokenizer).generate, REQUESTS)
        assert words in told and KEY not in told and len(server.seen) <= 3


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_more_tokens_than_asked_are_cut_flagged_and_counted(server, tokenizer, api):
    server.plan = ["more"]
    engine = client(server, tokenizer, api=api)
    long, short, _ = (group[0] for group in engine.generate(REQUESTS))
    assert len(long.ids) == 8 and long.overrun == 40 and not long.finished
    assert short.overrun == 0 and short.finished and short.ids[-1] == 3
    assert engine.usage == Usage(3, 0, 0, 40, 30, 48 + 3 + 3)


def test_chat_sends_the_message_and_charges_the_worlds_tokens(server, env):
    rollout = client(server, env.tokenizer, api="chat").generate(REQUESTS)[0][0]
    path, asked, _ = server.seen[0]
    assert path == "/v1/chat/completions" and asked["max_tokens"] == 8 and asked["top_p"] == 1
    assert asked["messages"] == [{"role": "user", "content": "solve 0"}]
    assert rollout.ids == (*env.encode("+ +"), env.tokenizer.eos_token_id)


def test_completions_send_ids_and_every_rollout_its_own_seed(server, tokenizer):
    requests = [Request((2, 5), 8, (0, 1), n=3), Request((2, 6), 5, (0, 2))]
    rollouts = client(server, tokenizer, concurrency=4).generate(requests, 0.5)
    assert [len(group) for group in rollouts] == [3, 1]
    asked = sorted((body for _, body, _ in server.seen), key=lambda body: body["prompt"])
    assert [(b["prompt"], b["max_tokens"]) for b in asked] == [([2, 5], 8)] * 3 + [([2, 6], 5)]
    assert all(body["return_token_ids"] and body["temperature"] == 0.5 for body in asked)
    assert len({body["seed"] for body in asked}) == 4


def test_keys_and_proxies_come_from_the_environment(server, tokenizer, monkeypatch, refusal):
    client(server, tokenizer).generate(REQUESTS[:1])
    assert server.seen[0][2] == f"Bearer {KEY}"
    monkeypatch.delenv("OPENAI_API_KEY")
    assert "set OPENAI_API_KEY" in refusal(OpenAIEngine, "m", tokenizer, [3])
    assert "set A_KEY" in refusal(OpenAIEngine, "m", tokenizer, [3], key_variable="A_KEY")
    client(server, tokenizer).generate(REQUESTS[:1])  # a server on this machine needs none
    assert "completions, chat" in refusal(client, server, tokenizer, api="telepathy")
    for proxy in ("socks5://127.0.0.1:9", "gopher://127.0.0.1:9"):
        monkeypatch.setenv("ALL_PROXY", proxy)
        assert "unset ALL_PROXY" in refusal(client, server, tokenizer)


# ---------------------------------------------------------------- run logs
HEADER = {"world": "pocket", "method": "base", "model": "abc", "budget": 8, "seed": 0}
REPLAY = ReplayEngine({r.prompt: [7] for r in REQUESTS}, 3)


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_log_is_continued_without_asking_twice(server, tokenizer, tmp_path, in_memory, refusal):
    path = None if in_memory else tmp_path / "new" / "log.jsonl"
    server.plan = ["ok", "500", "500", "500", "ok"]
    log = RunLog(path, HEADER)
    first = LoggedEngine(client(server, tokenizer), log).generate(REQUESTS)
    assert [bool(g[0].failed) for g in first] == [False, True, False]
    before, log = len(server.seen), log if in_memory else RunLog(path, HEADER)
    dated = [dataclasses.replace(r, prompt=(*r.prompt, 8)) for r in REQUESTS]  # by its template
    again = LoggedEngine(client(server, tokenizer), log).generate(dated)
    assert len(server.seen) == before + 1, "only the failed one is asked again"
    assert again[::2] == first[::2] and not again[1][0].failed
    replay = LoggedEngine(None, log)
    assert replay.generate(REQUESTS) == again
    assert "lacks 3 of 3 responses" in refusal(replay.generate, REQUESTS, temperature=0)
    assert in_memory or KEY not in path.read_text()


def test_an_interrupted_run_keeps_what_it_had(tmp_path):
    stream = LoggedEngine(REPLAY, RunLog(tmp_path / "log", HEADER)).stream(REQUESTS)
    next(stream), next(stream), stream.close()
    assert len(RunLog(tmp_path / "log", HEADER).rows) == 2


@pytest.fixture
def path(tmp_path):
    """A log with all three responses."""
    LoggedEngine(REPLAY, RunLog(tmp_path / "log.jsonl", HEADER)).generate(REQUESTS)
    return tmp_path / "log.jsonl"


def test_one_process_writes_a_log_and_others_read_it(path, refusal):
    """A last line cut short, by a kill or because it is under way, is dropped, and that is said."""
    whole = path.read_bytes()
    script = ("import sys; from pathlib import Path; from roi_lib.engines.logs import RunLog\n"
              f"with RunLog(Path({str(path)!r}), {HEADER}).writing():\n"
              "    print('mine', flush=True); sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline() == b"mine\n"
        path.write_bytes(whole[:-20])
        with pytest.warns(UserWarning, match="line 4: cut short"):
            log = RunLog(path, HEADER)
        told = refusal(LoggedEngine(REPLAY, log).generate, REQUESTS)
        assert f"another process is writing {path}; wait" in told
        assert path.read_bytes() == whole[:-20], "nobody else's line is touched"
        assert LoggedEngine(None, log).generate(REQUESTS[:2]), "a replay needs no lock"
        writer.kill()
    LoggedEngine(REPLAY, log).generate(REQUESTS)
    assert path.read_bytes() == whole, "the lock went with its process"


def test_bad_lines_and_the_logs_of_other_runs_are_named(path, refusal):
    for key in HEADER:
        told = refusal(RunLog, path, HEADER | {key: "other"})
        assert f"log of another run: its {key} is" in told
    rows = path.read_bytes().split(b"\n")
    for line in (b"{", b"[]", b'{"key": "x"}', b'{"key": "x", "rollouts": [{"a": 1}]}', b"\xff",
                 b"[" * 100_000, b"9" * 5_000):
        path.write_bytes(b"\n".join([*rows[:2], line, *rows[3:]]))
        assert "log.jsonl, line 3: not a line of a run log" in refusal(RunLog, path, HEADER)


ROW = {"ids": [7, 3], "finished": True, "overrun": 0, "failed": ""}


@pytest.mark.parametrize("change", [
    *({"ids": ids} for ids in ([-1], [264], [2**70], [1.0], [True], ["7"], [[7]], [None], None, 7)),
    {"finished": 1}, {"overrun": "2"}, {"failed": None}, {"more": 1}])
def test_a_row_that_holds_no_tokens_is_named(path, refusal, change):
    head, _, *rows = path.read_text().split("\n")
    row = json.dumps({"key": "x", "rollouts": [ROW, ROW | change]})
    path.write_text("\n".join([head, row, *rows]))
    assert "line 2: not a line of a run log" in refusal(RunLog, path, HEADER, 264)


def test_a_row_beyond_its_budget_is_cut_and_that_is_said(path, refusal):
    lines = list(map(json.loads, path.read_text().splitlines()))
    lines[1]["rollouts"][0]["ids"] = [7] * 8
    lines[2]["rollouts"][0]["ids"] = [7] * 30 + [3]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.warns(UserWarning, match="longer than its budget of 8 tokens is cut") as told:
        whole, cut, other = LoggedEngine(None, RunLog(path, HEADER)).generate(REQUESTS)
    assert len(told) == 1 and whole == [Rollout((7,) * 8, True)] and other[0].finished
    assert cut == [Rollout((7,) * 8, False, 23)]
    for n in (0, 2):
        lines[3]["rollouts"] = [ROW] * n
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        replay = LoggedEngine(None, RunLog(path, HEADER))
        assert f"{n} responses, but 1 are" in refusal(replay.generate, REQUESTS[2:])


def test_progress_shows_only_where_it_takes_long(capsys, monkeypatch):
    LoggedEngine(REPLAY, progress="base-64").generate(REQUESTS)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(logs, "BAR", {})
    LoggedEngine(REPLAY, progress="base-64").generate(REQUESTS)
    assert "base-64: 100%" in capsys.readouterr().err


# ---------------------------------------------------------------- engines by name
def test_unknown_names_are_refused_before_any_work(tokenizer, refusal):
    assert "torch, vllm, openai" in refusal(make_engine, "abacus", "pocket-base", tokenizer)
    assert "'float9'" in refusal(make_engine, "torch", "no/such-model", tokenizer, "float9")
    assert "'float9'" in refusal(EngineConfig, dtype="float9")


def test_a_log_names_the_model(tmp_path, refusal):
    """By a hash where it is a folder; a server's by the name that the server has for it."""
    run = {"world": "pocket", "model": "pocket-base", "seed": 0}
    for name, model in (("torch", model_hash("pocket-base")), ("openai", "pocket-base")):
        written, read = (EngineConfig(kind, log=tmp_path / name) for kind in (name, "replay"))
        written.logged(REPLAY, "base", 8, run).generate(REQUESTS)
        line = (tmp_path / name / "base-8.jsonl").read_text().splitlines()[0]
        assert json.loads(line)["run"] == run | {
            "model": model, "method": "base", "budget": 8, "engine": name, "dtype": None}
        again = read.logged(None, "base", 8, run).generate(REQUESTS)
        assert again == REPLAY.generate(REQUESTS)
        assert "its model is" in refusal(read.logged, None, "base", 8, run | {"model": "a/b"})


@pytest.fixture(scope="module")
def pocket():
    """The environment and the torch engine of the pocket model."""
    env = load_environment(POCKET)
    return env, make_engine("torch", "pocket-base", env.tokenizer, "float32")


@pytest.mark.parametrize("name", ["vllm", "openai"])
def test_the_recorded_logs_of_notebook_03_are_those_of_this_model(pocket, name):
    """Where vLLM is not installed, the notebook compares these with the torch engine's tokens."""
    env, engine = pocket
    papers, run = draw_papers(POCKET, 4), {"world": "pocket", "model": "pocket-base", "seed": 0}
    replay = EngineConfig("replay", log=DATA / "engine-logs" / name).logged(None, "base", 64, run)
    for order in ORDERS:
        recorded, expected = (sit(env, e, in_orders(papers, [order], 0), 64, temperature=0)
                              for e in (replay, engine))
        assert recorded["ids"].tolist() == expected["ids"].tolist()


@pytest.mark.skipif(not vllm_installed(), reason=INSTALL_VLLM)
def test_vllm_gives_the_same_greedy_tokens(pocket, refusal):
    env, torch_engine = pocket
    exams = in_orders(draw_papers(POCKET, 32, seed=5), ["hard"], 0)
    requests = [Request(env.prompt(exam, 128), 96 + i) for i, exam in enumerate(exams)]
    engine = VLLMEngine("pocket-base", [7], "float64")
    assert engine.eos_ids == [3, 7], "the model's own, too"
    assert engine.generate(requests, 0) == torch_engine.generate(requests, 0)
    sampled = [Request(r.prompt, 40, (7, i), n=2) for i, r in enumerate(requests)]
    first = engine.generate(sampled, 2.0)  # hot: at 1 the model hardly ever wavers in 40 tokens
    assert first == engine.generate(sampled[:9], 2.0) + engine.generate(sampled[9:], 2.0)
    assert any(a != b for a, b in first) and max(len(r.ids) for g in first for r in g) == 40
    assert "give max_length=1" in refusal(engine.generate, [Request(requests[0].prompt, 1_024)])
