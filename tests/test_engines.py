"""Engines by name: API servers (well-behaved and not), vLLM, run logs; the budget holds in all."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pandas as pd
import pytest

from roi_lib.__main__ import main
from roi_lib.engines import EngineConfig, logs
from roi_lib.engines.logs import LoggedEngine, RunLog
from roi_lib.engines.openai import OpenAIEngine
from roi_lib.engines.protocol import Usage
from roi_lib.engines.replay import ReplayEngine
from roi_lib.engines.vllm import INSTALL_VLLM, VLLMEngine, vllm_installed
from roi_lib.exams import Exam, draw_papers, in_orders
from roi_lib.generation import Request, Rollout
from roi_lib.sitting import sit, tabulate
from roi_lib.store.checkpoints import load_environment, model_hash
from roi_lib.store.files import DATA
from roi_lib.worlds import ORDERS, POCKET

KEY = "sk-test-0123456789"
REPLY = {"id": "x", "object": "x", "created": 0, "model": "m"}
CHOICE = {"index": 0, "text": "hello", "finish_reason": "stop"}
IDS = {"empty": [], "null": [None], "float": [{"token_ids": [9.0]}], "minus": [{"token_ids": [-1]}],
       "huge": [{"token_ids": [2**40]}], "true": [{"token_ids": [True]}], "dict": {"0": {}},
       "word": "x", "idless": [{"token_ids": {}}], "number": 7}
BODIES = {name: json.dumps(REPLY | {"choices": choices}) for name, choices in IDS.items()} | {
    "textonly": json.dumps(REPLY | {"choices": [CHOICE]}), "cut": '{"id": "x", "choi',
    "malformed": '{"id": "x", "choices": [{"text"', "html": "<html>busy</html>", "list": "[]",
    "wrapped": json.dumps({"error": {"code": 502, "message": "upstream is away"}}),
    "deep": "[" * 200_000, "digits": '{"choices": %s}' % ("7" * 4_400)}


class Misbehaving(BaseHTTPRequestHandler):
    """A server that does, request by request, what its `plan` says; "ok" once the plan is over."""

    def log_message(self, *args):
        """Say nothing."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.seen.append((self.path, asked, self.headers["authorization"]))
        act = self.server.plan.pop(0) if self.server.plan else self.server.judge(asked)
        if act == "hang":
            return time.sleep(3.0)
        if callable(act) or isinstance(act, tuple):
            return act(self) if callable(act) else self.send(*act)
        body = BODIES.get(act) or self.response(asked, act)
        self.send_response(int(act) if act.isdigit() else 200)
        self.send_header("content-type", "text/html" if act == "html" else "application/json")
        self.send_header("content-length", str(len(body) + 5_000 * (act == "cut")))
        self.send_header("retry-after", "0" if act == "429" else "soon")
        self.end_headers()
        self.wfile.write(body.encode())
        self.close_connection = True

    def send(self, status, body, wait="soon"):
        """Any status and any body."""
        self.send_response(status)
        self.send_header("retry-after", wait)
        self.end_headers()
        self.wfile.write((body if isinstance(body, str) else json.dumps(body)).encode())

    def response(self, asked, act):
        if act.isdigit():
            return json.dumps({"error": {"message": f"the key {KEY} is bad"}})
        budget = asked.get("max_tokens", 8)
        n = budget + 40 if act == "more" else min(3, budget)
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
        server.plan, server.seen, server.judge = [], [], lambda asked: "ok"
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield server
        server.shutdown()


def client(server, tokenizer, **options):
    options = {"retries": 2, "timeout": 30, "backoff": 0.01, "concurrency": 1} | options
    url = f"http://127.0.0.1:{server.server_port}/v1"
    return OpenAIEngine("m", tokenizer, [3], base_url=url, **options)


REQUESTS = [Request((2, 5, i), 8, (0, i), message=f"solve {i}") for i in range(3)]


@pytest.mark.parametrize("fault", (
    "hang 429 500 cut malformed html list wrapped deep digits " + " ".join(IDS)).split())
def test_faults_are_retried_and_then_the_row_is_marked(server, tokenizer, fault, capsys):
    server.plan = [fault, "ok", fault, fault, fault]  # mended by a retry; never mended; ok
    # only what hangs is to run out of time, however busy the machine
    engine = client(server, tokenizer, timeout=1.5 if fault == "hang" else 30)
    once, never, good = (group[0] for group in engine.generate(REQUESTS))
    assert once == good == Rollout((9, 9, 3), True)
    assert never.failed and never.ids == () and not never.finished
    assert KEY not in never.failed and KEY not in str(capsys.readouterr())
    assert engine.usage == Usage(2, 1, 3, 0, 20, 6)
    assert "6 out, 0 beyond the budget; cost 8.0000 at" in engine.usage.report(1e5, 1e6)
    assert len(server.seen) == 6, "bounded retries, no others"


def test_refusals_stop_the_run_without_the_key(server, tokenizer, refusal):
    for status, words in (("401", "the API key"), ("402", "HTTP 402"), ("404", "HTTP 404"),
                          ("textonly", "--api chat")):
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


def test_a_chat_cannot_be_made_to_begin_with_given_words(server, env, refusal):
    exams = [Exam(paper, "easy") for paper in draw_papers(POCKET, 2)]
    assert "take --api completions" in refusal(
        sit, env, client(server, env.tokenizer, api="chat"), exams, 64, opening="Q1.")
    assert not server.seen


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
    for proxy in ("socks5://127.0.0.1:9", "gopher://me:secret@127.0.0.1:9"):  # case 16
        monkeypatch.setenv("ALL_PROXY", proxy)
        told = refusal(client, server, tokenizer)
        assert "unset ALL_PROXY" in told and "secret" not in told
    monkeypatch.delenv("ALL_PROXY")
    for address in ("ftp://a", "a.b/v1", "http://", "http://a:b/v1", "http://[::1"):
        assert "mend --base-url" in refusal(OpenAIEngine, "m", tokenizer, [3], base_url=address)
    for options in ({"timeout": 0}, {"timeout": float("nan")}, {"retries": -1}, {"concurrency": 0}):
        assert "must be above 0" in refusal(client, server, tokenizer, **options)
    for word in ("seed", "=7", ""):
        assert "--request takes NAME=" in refusal(client, server, tokenizer, request=[word])


def test_a_key_is_stripped_and_only_a_real_secret_is_masked(
        server, tokenizer, monkeypatch, refusal):
    for key, sent, words in ((f" {KEY}\r\n", f"Bearer {KEY}", "the key *** is none"),  # case 15
                             ("none", "Bearer none", f"the key {KEY} is none"),
                             ("", None, f"the key {KEY} is none")):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        server.plan, server.seen = [(400, f"the key {KEY}\n\x1b is none")], []
        assert words in client(server, tokenizer).generate(REQUESTS[:1])[0][0].failed
        assert server.seen[0][2] == sent
    for key in ("sk-\xe9", "sk-a\nb", "sk a"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        told = refusal(client, server, tokenizer)
        assert "copy it again" in told and "sk" not in told


def answer(content, finish="stop", usage=None, **message):
    """A chat's reply, as the plan of a server has it."""
    choice = {"message": {"role": "assistant", "content": content} | message}
    reply = REPLY | {"choices": [choice | {"finish_reason": finish}]}
    return 200, reply | ({} if usage == "none" else {"usage": usage})


def spent(n, **details):
    return {"prompt_tokens": 10, "completion_tokens": n, "completion_tokens_details": details}


PARTS = [{"type": "thinking", "thinking": [{"type": "text", "text": "+"}]}, {"type": "odd"}, None,
         7, {"type": "text", "text": "+ "}, {"type": "text", "text": "+"}, {"type": "text"}]


@pytest.mark.parametrize(("sent", "ids", "finished", "hidden", "note", "out"), [
    (answer("", "length", spent(8, reasoning_tokens=8)), 0, False, 8, "length", 8),  # case 4
    (answer("", "length"), 0, False, 8, "length", 8),
    (answer(None, "length", spent(5), reasoning_content="+ +"), 0, False, 5, "length", 5),
    (answer(PARTS, "stop", spent(4)), 3, True, 1, "", 4),  # case 6
    (answer(None, "stop", None, reasoning_content="+ + +"), 1, True, 3, "stop", 4),  # case 7
    (answer(None, "stop", spent(6), refusal="I can not"), 1, True, 5, "I can not", 6),
    (answer(None, "content_filter"), 0, False, 0, "content_filter", 0),
    (answer("+ +", "content_filter", spent(2)), 2, False, 0, "content_filter", 2),
    (answer("+ +", "stop", spent(7, reasoning_tokens=4)), 3, True, 4, "", 7),
    (answer("+ +", ["stop"], spent(7, reasoning_tokens=7)), 1, False, 7, "", 7),
    (answer("+\ud800", "stop", spent(3)), 3, True, 0, "", 3),
    *[(answer("+ +", "stop", usage), 3, True, 0, "", 3) for usage in (  # case 5
        None, "none", {}, 7, [], {"prompt_tokens": 10}, {"completion_tokens": None}, spent("3"),
        spent(-3), spent(True), spent(10**4_000), spent(3.0))]])
def test_chat_replies_of_any_shape_are_read(server, env, sent, ids, finished, hidden, note, out):
    server.plan = [sent]
    engine = client(server, env.tokenizer, api="chat")
    rollout = engine.generate(REQUESTS[:1])[0][0]
    assert (len(rollout.ids), rollout.finished, rollout.hidden, rollout.note, rollout.failed) == (
        ids, finished, hidden, note, "")
    assert len(server.seen) == engine.usage.responses == 1 and engine.usage.tokens_out == out
    whole = isinstance(sent[1].get("usage"), dict) and sent[1]["usage"].get("completion_tokens")
    known = type(whole) is int and 0 <= whole < 99
    assert ("true cost unknown" in engine.usage.report()) == (not known)
    exams = in_orders(draw_papers(POCKET, 1), ["easy"], 0)
    table = tabulate(env, exams, 8, [[rollout]])
    assert (table["tokens"] == hidden + ids).all() and (table["preamble"] >= hidden).all()


@pytest.mark.parametrize("content", [7, True, {"text": "x"}, "message"])
def test_what_is_no_message_is_a_failed_try_that_is_billed(server, env, content):
    bad = answer(content, "stop", spent(5))
    if content == "message":
        bad[1]["choices"][0] = {"message": None}
    server.plan = [bad, bad, bad]
    engine = client(server, env.tokenizer, api="chat")
    assert "no message in the reply: HTTP 200" in engine.generate(REQUESTS[:1])[0][0].failed
    assert engine.usage == Usage(0, 1, 2, 0, 30, 15)


def dribble(first, part, seconds, pause):
    """Headers, then a part every so often."""
    def act(handler):
        end = time.monotonic() + seconds
        handler.wfile.write(first)
        while time.monotonic() < end:
            handler.wfile.write(part)
            time.sleep(pause)
    return act


@pytest.mark.parametrize(("first", "part", "pause", "words"), [
    (b"HTTP/1.1 200 OK\r\n\r\n", b"\n", 0.1, "no whole reply within 0.5 s"),  # case 13
    (b"HTTP/1.1 200 OK\r\n\r\n", b"7", 0.3, "no whole reply"),
    (b"HTTP/1.1 200 OK\r\nx: ", b"y", 0.1, "no whole reply"),
    (b"HTTP/1.1 200 OK\r\n\r\n", b"7" * 2**16, 0, "larger than 525088 bytes"),
    (b"HTTP/1.1 ", b"7" * 2**16, 0, "RemoteProtocolError")])
def test_a_try_is_bounded_in_seconds_and_bytes(server, tokenizer, first, part, pause, words):
    server.plan = [dribble(first, part, 5, pause)]
    start, engine = time.monotonic(), client(server, tokenizer, timeout=0.5, retries=0)
    assert words in engine.generate(REQUESTS[:1])[0][0].failed
    assert time.monotonic() - start < 1.5


def test_waits_are_those_that_the_server_asks_for(server, tokenizer, refusal):  # cases 9, 10
    for wait, seconds in (("1.5", 1.5), ("nan", 0), ("-1", 0), ("soon", 0), ("9" * 400, 0)):
        start, server.plan = time.monotonic(), [(503, "busy", wait)]
        assert client(server, tokenizer).generate(REQUESTS[:1])[0][0].finished
        assert seconds <= time.monotonic() - start < seconds + 1
    server.plan = [(429, "daily limit", "432")]
    told = refusal(client(server, tokenizer).generate, REQUESTS[:1])
    assert "wait 432 s, longer than 60 s" in told and "daily limit" in told
    server.plan, server.seen = [(429, {"error": {"code": "insufficient_quota"}})], []
    assert "insufficient_quota" in refusal(client(server, tokenizer).generate, REQUESTS)
    assert len(server.seen) == 1


def interrupt(*delays):
    """Ctrl-C, after so many seconds each."""
    for delay in delays:
        threading.Timer(delay, os.kill, [os.getpid(), signal.SIGINT]).start()


@pytest.mark.parametrize("trouble", ["interrupt", "401"])
def test_what_is_under_way_is_drained_into_the_log(server, tokenizer, tmp_path, trouble, capsys):
    def slow(handler):
        time.sleep(1.0)
        handler.send(200, handler.response({"max_tokens": 8}, "ok"))

    server.plan, requests = [slow] * 8, [Request((2, 5, i), 8, (0, i)) for i in range(40)]
    server.plan[3:4] = ["401"] if trouble == "401" else [slow]
    engine, log = client(server, tokenizer, concurrency=8, timeout=5), tmp_path / "log.jsonl"
    if trouble == "interrupt":
        interrupt(0.5)
    with pytest.raises((KeyboardInterrupt, ValueError)) as told:
        LoggedEngine(engine, RunLog(log, HEADER)).generate(requests)
    assert told.type is (KeyboardInterrupt if trouble == "interrupt" else ValueError)
    rows = RunLog(log, HEADER).rows  # case 14
    assert len(rows) == 8 - (trouble == "401") and len(server.seen) == 8
    assert ("Ctrl-C again gives it up" in capsys.readouterr().err) == (trouble == "interrupt")
    LoggedEngine(engine, RunLog(log, HEADER)).generate(requests)
    assert len(server.seen) == 8 + 40 - len(rows), "no logged row is paid for again"


def test_a_second_interrupt_aborts(server, tokenizer):
    server.judge = lambda asked: dribble(b"", b"", 4, 4)
    start, usual = time.monotonic(), signal.getsignal(signal.SIGINT)
    interrupt(0.3, 0.7)
    with pytest.raises(KeyboardInterrupt):
        client(server, tokenizer, timeout=60, concurrency=2).generate(REQUESTS)
    assert time.monotonic() - start < 3 and signal.getsignal(signal.SIGINT) is usual


# ---------------------------------------------------------------- exams by a server
@pytest.fixture
def exam(server, capsys, monkeypatch, tmp_path):
    """Exit status, standard output and error of an exam of some papers that the server sits."""
    def command(papers, *words):
        status, address = 0, f"http://127.0.0.1:{server.server_port}/v1"
        try:
            main(["exam", "--exams", str(papers), "--budgets", "64", "--orders", "easy", "--engine",
                  "openai", "--api", "chat", "--base-url", address, "--retries", "0", *words])
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    return command


def refuse(wrong, status, body):
    return lambda asked: (status, body) if wrong(asked) else "ok"


@pytest.mark.parametrize(("judge", "words", "mended"), [  # cases 1, 2, 3
    (refuse(lambda b: "max_tokens" in b or b.get("temperature", 1) != 1, 400, {"error": {
        "message": "'max_tokens' is not supported, use 'max_completion_tokens'"}}),
     "'max_tokens' is not supported", "max_tokens=max_completion_tokens temperature=1"),
    (refuse(lambda b: "seed" in b, 422, {"object": "error", "message": {"detail": [
        {"loc": ["body", "seed"], "msg": "extra fields"}]}}), "extra fields", "seed="),
    (refuse(lambda b: "top_p" in b, 400, "temperature and top_p not both"), "not both", "top_p="),
    (refuse(lambda b: b.get("effort") != "low" or b.get("a") != {"b": [1, 2]}, 400, "no effort"),
     "no effort", 'effort=low a={"b":[1,2]}')])
def test_parameters_are_changed_until_the_server_takes_them(server, exam, judge, words, mended):
    server.judge = judge
    status, text, error = exam(400, "--temperature", "0.5", "--log", "log")
    assert status == 2 and words in error and "Score" not in text
    assert len(server.seen) < 400 and error.startswith("error: the first 8 requests all failed")
    changes = [word for change in mended.split() for word in ("--request", change)]
    status, text, error = exam(12, "--temperature", "0.5", "--log", "new", *changes)
    assert status == 0 and error == "" and "12 responses, 0 failed" in text
    assert "its request is" in exam(12, "--temperature", "0.5", "--log", "new")[2]


def test_one_refused_row_of_twelve_is_missing_and_asked_again(server, exam, tmp_path):  # case 8
    bad = []

    def judge(asked):
        message = asked["messages"][0]["content"]
        bad[:] = bad or [message]
        long = (400, {"error": {"code": "context_length_exceeded", "message": "too long"}})
        return long if message == bad[0] else "ok"

    server.judge = judge
    status, text, error = exam(12, "--log", "log", "--out", "o.csv", "--details")
    assert status == 0 and "missing" in text and "1 of 12 responses failed" in error
    assert "HTTP 400" in error and "context_length_exceeded" in error and len(server.seen) == 12
    (record,) = pd.read_csv("o.csv").to_dict("records")
    assert record["failed"] == 1 and record["n_exams"] == 12 and record["tokens"] == 3
    lines = (tmp_path / "log/base-64.jsonl").read_text().splitlines()
    assert len(lines) == 13 and sum('"failed": "HTTP 400' in line for line in lines) == 1
    assert exam(12, "--log", "log")[0] == 0 and len(server.seen) == 13
    server.judge = lambda asked: "ok"
    status, text, error = exam(12, "--log", "log")
    assert status == 0 and "missing" not in text and error == "" and len(server.seen) == 14


def test_a_run_of_failures_alone_has_no_score(server, exam):  # cases 17, 19
    server.judge = lambda asked: (500, "out of order")
    status, text, error = exam(2)
    assert status == 2 and "every response failed" in error and "out of order" in error
    assert "Score" not in text and "0 responses, 2 failed" in text
    server.judge = lambda asked: (400, "prompt: must be a string")
    status, text, error = exam(2, "--api", "completions")
    assert status == 2 and error.count("\n") == 1 and "Score" not in text
    assert "must be a string" in error and "--api chat" in error


def test_an_interrupted_exam_says_so(server, exam):
    def interrupting(handler):
        interrupt(0)
        time.sleep(0.5)
        handler.send(200, handler.response({"messages": []}, "ok"))

    server.plan = [interrupting]
    status, text, error = exam(2, "--concurrency", "1", "--log", "log")
    assert status == 130 and "interrupted" in error and "Score" not in text
    assert exam(2, "--log", "log")[0] == 0 and len(server.seen) == 2


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
def test_unknown_names_are_refused_before_any_work(refusal):
    assert "torch, vllm, openai" in refusal(EngineConfig, "abacus")
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
    return env, EngineConfig().make("pocket-base", env.tokenizer, "float32")


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
