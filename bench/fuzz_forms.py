"""What an answer must look like: OpenAI's forms, whole and streamed, and its error object.

complaint(answer, form="chat", wants={"stream": False, "answers": 1, "usage": True})      "" where all is well
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fuzz_client import Answer

STATUSES = frozenset({200, 400, 401, 403, 404, 405, 408, 413, 415, 429, 431, 499, 503, 504})
PLAIN = ("/metrics",)
FAILED = "the engine failed on this request"
LATE = "longer than the request allowed"


def complaint(answer: Answer, *, form: str = "", wants: Mapping[str, Any] | None = None) -> str:
    """Why an answer is none; empty when it is one."""
    if answer.status == 0:
        return answer.body.decode("utf-8", "replace")
    if answer.status != 500 and answer.status not in STATUSES:
        return f"status {answer.status}"
    kind = answer.headers.get("content-type", "").partition(";")[0]
    try:
        if answer.status >= 400:
            return error_complaint(answer) if answer.body else ""
        if kind == "text/event-stream":
            return stream_complaint(answer.body, form=form, wants=wants or {})
        return _whole_complaint(answer, kind, form=form, wants=wants or {})
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        return f"an answer that cannot be read: {error!r}"


def has_failed(answer: Answer) -> bool:
    """Whether the server says that it is its own fault: status 500, or the same within a stream."""
    if answer.status == 500:
        return True
    is_stream = answer.headers.get("content-type", "").startswith("text/event-stream")
    return is_stream and any(_is_failure(event) for event in _events(answer.body))


def _is_failure(event: Any) -> bool:
    if not isinstance(event, dict):
        return False
    error = event.get("error") or (event.get("response") or {}).get("error")
    return bool(error) and LATE not in json.dumps(error)


def error_complaint(answer: Answer) -> str:
    """OpenAI's error object, with a message."""
    value = json.loads(answer.body)
    error = value.get("error") if isinstance(value, dict) else None
    if not isinstance(error, dict) or set(error) != {"message", "type", "param", "code"}:
        return f"status {answer.status} without OpenAI's error object"
    return "" if isinstance(error["message"], str) and error["message"] else "an error without a message"


def _whole_complaint(answer: Answer, kind: str, *, form: str, wants: Mapping[str, Any]) -> str:
    if kind == "text/plain":
        return "" if answer.body else "an empty page"
    if not answer.body:
        return ""  # to HEAD
    value = json.loads(answer.body, parse_constant=_no_constant)
    if wants.get("stream"):
        return "a whole answer where a stream was asked for"
    check = _FORMS.get(form)
    return check(value, wants) if check is not None else ""


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _chat(value: Any, wants: Mapping[str, Any]) -> str:
    choices = value["choices"]
    if [choice["index"] for choice in choices] != list(range(wants.get("answers", 1))):
        return f"{len(choices)} choices instead of {wants.get('answers', 1)}"
    for choice in choices:
        if choice["finish_reason"] not in ("stop", "length", "tool_calls"):
            return f"finish_reason {choice['finish_reason']!r}"
        if value["object"] == "chat.completion":
            message = choice["message"]
            if message["role"] != "assistant" or not (message.get("tool_calls") or isinstance(message["content"], str)):
                return "a message without content"
        elif not isinstance(choice["text"], str):
            return "a choice without text"
    return _usage(value["usage"])


def _usage(usage: Any) -> str:
    fits = usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    return "" if fits else "a usage that does not add up"


def _responses(value: Any, wants: Mapping[str, Any]) -> str:
    if value["status"] not in ("completed", "incomplete") or not value["output"]:
        return f"a response of status {value['status']!r} with {len(value['output'])} items"
    return "" if value["usage"]["total_tokens"] > 0 else "a response without usage"


def _embeddings(value: Any, wants: Mapping[str, Any]) -> str:
    return "" if value["data"] and all(row["embedding"] for row in value["data"]) else "no vector"


_FORMS: dict[str, Any] = {
    "chat": _chat,
    "completions": _chat,
    "responses": _responses,
    "embeddings": _embeddings,
    "rerank": lambda value, wants: "" if value["results"] else "no result",
    "score": lambda value, wants: "" if len(value["scores"]) == 2 else "scores are missing",
    "tokenize": lambda value, wants: "" if value["tokens"] else "no tokens",
    "detokenize": lambda value, wants: "" if isinstance(value.get("prompt", value.get("text")), str) else "no text",
}


# -- streams ---------------------------------------------------------------------------------------------------


def _events(body: bytes) -> list[Any]:
    """The data of server-sent events; `[DONE]` stays text."""
    found = []
    for block in body.decode("utf-8").replace("\r\n", "\n").split("\n\n"):
        rows = [row for row in block.split("\n") if row and not row.startswith((":", "event: "))]
        if not rows:
            continue
        if len(rows) != 1 or not rows[0].startswith("data: "):
            raise ValueError(f"no event: {block[:60]!r}")
        data = rows[0].removeprefix("data: ")
        found.append(data if data == "[DONE]" else json.loads(data, parse_constant=_no_constant))
    return found


def stream_complaint(body: bytes, *, form: str, wants: Mapping[str, Any]) -> str:
    """Exactly one end for each answer, `[DONE]` last, usage where asked for."""
    events = _events(body)
    if not events:
        return "an empty stream"
    if isinstance(events[0], dict) and str(events[0].get("type", "")).startswith("response."):
        return _response_stream(events)
    if events[-1] != "[DONE]" or events.count("[DONE]") != 1:
        return "a stream without [DONE] at its end"
    chunks = events[:-1]
    if any("error" in chunk for chunk in chunks):
        return ""  # it says so; who is to blame is asked elsewhere
    return _chunk_complaint(chunks, wants) if form else ""


def _chunk_complaint(chunks: list[Any], wants: Mapping[str, Any]) -> str:
    ends = dict.fromkeys(range(wants.get("answers", 1)), 0)
    usages = 0
    for chunk in chunks:
        usages += chunk.get("usage") is not None
        for choice in chunk["choices"]:
            if ends.setdefault(choice["index"], 0):
                return f"answer {choice['index']} goes on after its end"
            ends[choice["index"]] += choice["finish_reason"] is not None
    if len(ends) != wants.get("answers", 1) or any(count != 1 for count in ends.values()):
        return f"ends of the answers: {ends}"
    return "a stream without the usage that was asked for" if wants.get("usage") and usages != 1 else ""


def _response_stream(events: list[Any]) -> str:
    if [event["sequence_number"] for event in events] != list(range(len(events))):
        return "sequence numbers with gaps"
    last = [event["type"] for event in events if event["type"] in _LAST]
    return "" if len(last) == 1 and events[-1]["type"] in _LAST else f"a response that ends {len(last)} times"


_LAST = ("response.completed", "response.incomplete", "response.failed")
