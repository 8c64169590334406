#!/usr/bin/env python3
"""A session of the official OpenAI client with a running cluster.

usage: openai_session.py http://HOST:PORT/v1 [--model NAME]
Exit code 0: every check passed; 1: the line that begins with FAILED says which did not, and why.
"""

import argparse
import asyncio
import json
import urllib.error
import urllib.request

import openai

from session import check, equal, refused, run

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("base_url", help="the OpenAI API's root, ending in /v1")
arguments.add_argument("--model", help="default: the first one listed")
options = arguments.parse_args()

SETTINGS = {"base_url": options.base_url, "api_key": "unused", "timeout": 120, "max_retries": 0}
client = openai.OpenAI(**SETTINGS)
model = options.model or client.models.list().data[0].id
context_tokens = client.models.retrieve(model).context_tokens
CHAT = [{"role": "system", "content": "You are brief."}, {"role": "user", "content": "Why is the sky blue?"}]
GREEDY = {"model": model, "temperature": 0, "extra_body": {"ignore_eos": True}}


def chat(**more):
    return client.chat.completions.create(**{**GREEDY, "messages": CHAT, "max_tokens": 24, **more})


def completion(**more):
    return client.completions.create(**{**GREEDY, "prompt": "The sky is", "max_tokens": 24, **more})


def sums(usage, completion_tokens):
    equal(usage.completion_tokens, completion_tokens, "completion_tokens")
    check(usage.prompt_tokens > 0, "prompt_tokens is", usage.prompt_tokens)
    equal(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens, "total_tokens")
    cached = usage.prompt_tokens_details.cached_tokens
    check(0 <= cached <= usage.prompt_tokens, "cached_tokens is", cached)


def models():
    listed = client.models.list().data
    check(model in [one.id for one in listed], f"{model} is not among {listed}")
    one = client.models.retrieve(model)
    equal((one.id, one.object), (model, "model"), "the model")
    check(one.created > 1_600_000_000, "created is", one.created)
    check(one.context_tokens > 0 and one.stub in (True, False), "the model says", one)


def chats():
    raw = client.chat.completions.with_raw_response.create(**{**GREEDY, "messages": CHAT, "max_tokens": 24})
    request_id = raw.headers.get("x-request-id")
    check(request_id, "no x-request-id in", raw.headers)
    answer = raw.parse()
    check(request_id in answer.id, f"{answer.id} does not name the request {request_id}")
    equal((answer.object, answer.model), ("chat.completion", model), "the envelope")
    choice = answer.choices[0]
    equal((choice.message.role, choice.finish_reason), ("assistant", "length"), "role and finish_reason")
    check(choice.message.content, "the answer is empty")
    sums(answer.usage, 24)
    equal(chat().choices[0].message.content, choice.message.content, "a greedy answer, asked again")
    # An earlier answer goes back as the client library dumps it, with its null fields.
    turns = [*CHAT, choice.message.model_dump(), {"role": "user", "content": [{"type": "text", "text": "And at night?"}]}]
    check(chat(messages=turns).usage.prompt_tokens > answer.usage.prompt_tokens, "the longer chat has no longer prompt")


def streams():
    whole = chat()
    chunks = list(chat(stream=True, stream_options={"include_usage": True}))
    equal(chunks[0].choices[0].delta.role, "assistant", "the first chunk's role")
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    equal(text, whole.choices[0].message.content, "the streamed text")
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    equal((reasons[-1], set(reasons[:-1])), ("length", {None}), "finish_reason of the chunks")
    equal([chunk.usage is not None for chunk in chunks], [False] * (len(chunks) - 1) + [True], "chunks with usage")
    sums(chunks[-1].usage, 24)
    equal({chunk.id for chunk in chunks}, {chunks[0].id}, "ids of one stream")
    check(len(chunks) > 5, "24 tokens came in", len(chunks), "chunks")
    check(all(chunk.usage is None for chunk in chat(stream=True)), "a usage that nobody asked for")


def completions():
    whole = completion()
    equal((whole.object, whole.choices[0].finish_reason), ("text_completion", "length"), "the envelope")
    sums(whole.usage, 24)
    text = "".join(chunk.choices[0].text for chunk in completion(stream=True))
    equal(text, whole.choices[0].text, "the streamed text")
    equal(completion(prompt=["The sky is"]).choices[0].text, text, "a prompt in an array")
    default = client.completions.create(**{**GREEDY, "prompt": "The sky is"})
    equal(default.usage.completion_tokens, 16, "tokens of a completion without max_tokens")
    by_id = completion(prompt=[5, 6, 7])
    equal(by_id.usage.prompt_tokens, 3, "prompt_tokens of three token ids")


def seeds():
    def sampled(seed):
        return chat(temperature=1, seed=seed, top_p=0.95, extra_body={"ignore_eos": True, "top_k": 50}).choices[0].message.content

    texts = [sampled(seed) for seed in (1, 2, 3, 4)]
    equal([sampled(seed) for seed in (1, 2, 3, 4)], texts, "sampled answers with equal seeds")
    check(len(set(texts)) > 1, "four seeds gave one text:", texts[0])


def stops():
    text = chat().choices[0].message.content
    middle = len(text) // 2
    stop = text[middle : middle + 3]
    before = text[: text.index(stop)]
    stopped = chat(stop=["never in any text", stop])
    equal((stopped.choices[0].message.content, stopped.choices[0].finish_reason), (before, "stop"), f"the text before {stop!r}")
    check(stopped.usage.completion_tokens <= 24, "tokens behind the stop string were counted")
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chat(stop=stop, stream=True) if chunk.choices)
    equal(streamed, before, "the streamed text before the stop string")


def logprobs():
    content = chat(logprobs=True, top_logprobs=3).choices[0].logprobs.content
    equal(len(content), 24, "tokens with a log probability")
    for entry in content:
        top = [rival.logprob for rival in entry.top_logprobs]
        equal(len(top), 3, "rivals")
        check(entry.logprob <= 0.001 and top == sorted(top, reverse=True), "log probabilities", entry)
        check(abs(entry.logprob - top[0]) < 1e-4, "the greedy token is not the likeliest:", entry)
    text = b"".join(bytes(entry.bytes) for entry in content).decode(errors="replace")
    check(chat().choices[0].message.content.rstrip("\ufffd") in text, "the tokens' bytes are not the answer:", text)
    streamed = [entry for chunk in chat(logprobs=True, stream=True) if chunk.choices and chunk.choices[0].logprobs
                for entry in chunk.choices[0].logprobs.content]
    equal([entry.bytes for entry in streamed], [entry.bytes for entry in content], "the streamed tokens")
    old = completion(logprobs=2).choices[0].logprobs
    equal([len(old.tokens), len(old.token_logprobs), len(old.text_offset)], [24, 24, 24], "tokens with a log probability")
    check(all(1 <= len(top) <= 2 for top in old.top_logprobs), "rivals:", old.top_logprobs)
    equal(old.text_offset, sorted(old.text_offset), "text_offset")
    # A bias of 100 decides: the answer is that token over and over.
    biased = completion(prompt=[5, 6, 7], logit_bias={"40": 100}, max_tokens=4, logprobs=0).choices[0].logprobs
    equal(len(set(biased.tokens)), 1, "different tokens under a bias of 100")


def caches():
    words = " ".join(f"word{i}" for i in range(60))
    completion(prompt=words, max_tokens=2)
    again = completion(prompt=words, max_tokens=2)
    check(again.usage.prompt_tokens_details.cached_tokens > 0, "a repeated prompt was not found in a cache:", again.usage)
    for cached, salt in [(0, "a"), (1, "a"), (0, "b")]:
        usage = completion(prompt=words, max_tokens=2, extra_body={"cache_salt": salt}).usage
        equal(min(usage.prompt_tokens_details.cached_tokens, 1), cached, f"a prefix found in the cache under salt {salt}")
    refused(openai.BadRequestError, lambda: completion(prompt=words, extra_body={"cache_salt": "x" * 257}), "cache_salt")


def errors():
    missing = refused(openai.NotFoundError, lambda: chat(model="no-such-model"), "no-such-model")
    equal((missing.code, missing.param), ("model_not_found", "model"), "code and param")
    check(missing.request_id, "an error without x-request-id")
    for field, value in [("temperature", -1), ("top_p", 2), ("n", 2), ("tools", [{"type": "function", "function": {"name": "f"}}]),
                         ("response_format", "json"), ("max_tokens", -5), ("max_tokens", context_tokens + 1),
                         ("top_logprobs", 3), ("stop", "")]:
        error = refused(openai.BadRequestError, lambda: chat(**{field: value}), field)
        equal(error.param, field, "param")
    refused(openai.BadRequestError, lambda: chat(extra_body={"no_such_field": 1}), "no_such_field")
    refused(openai.BadRequestError, lambda: chat(messages=[{"role": "user"}]), "messages[0].content")
    refused(openai.BadRequestError, lambda: completion(prompt=[5] * (context_tokens + 1)))
    refused(openai.BadRequestError, lambda: completion(prompt=[2**31]), "prompt")
    # The error comes as a status in a stream too, as long as no token was sent.
    refused(openai.BadRequestError, lambda: chat(stream=True, max_tokens=context_tokens + 1), "max_tokens")


def raw_errors():
    for body, part in [(b'{"model": ', "JSON"), (b'{"model": "\xff"}', "UTF-8"), (b"[]", "object")]:
        request = urllib.request.Request(options.base_url + "/chat/completions", data=body, headers={"content-type": "application/json"})
        error = refused(urllib.error.HTTPError, lambda: urllib.request.urlopen(request, timeout=30))
        equal(error.code, 400, "the status")
        message = json.load(error)["error"]["message"]
        check(part in message, f"the error does not name {part!r}: {message}")


def cancels():
    long = min(2000, context_tokens - 200)
    for _ in range(3):
        with chat(stream=True, max_tokens=long) as stream:
            for count, _chunk in enumerate(stream):
                if count == 3:
                    break
    check(chat().choices[0].message.content, "no answer after cancelled streams")


def many_at_once():
    alone = chat().choices[0].message.content

    async def one(ask, number):
        if number % 4 == 3:
            stream = await ask.chat.completions.create(**{**GREEDY, "messages": CHAT, "max_tokens": 200, "stream": True})
            async for _ in stream:
                break
            await stream.close()
            return None
        answer = await ask.chat.completions.create(**{**GREEDY, "messages": CHAT, "max_tokens": 24})
        return answer.choices[0].message.content

    async def all_of_them():
        async with openai.AsyncOpenAI(**SETTINGS) as ask:
            return await asyncio.gather(*(one(ask, number) for number in range(12)))

    texts = [text for text in asyncio.run(all_of_them()) if text is not None]
    equal(texts, [alone] * 9, "greedy answers in a batch")


run("openai", [(function.__name__, function) for function in (
    models, chats, streams, completions, seeds, stops, logprobs, caches, errors, raw_errors, cancels, many_at_once)])
