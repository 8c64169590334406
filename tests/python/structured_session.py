#!/usr/bin/env python3
"""Structured output, asked for by the official OpenAI client: what is drawn parses and validates, and what cannot be
promised is refused. Each generation has a prompt and a seed of its own, at temperature 1.

usage: structured_session.py http://HOST:PORT/v1 [--model NAME] [--runs 20] [--first 0] [--speed PAIRS]

--speed N measures besides: N pairs by turns, a constrained answer and a free one of as many tokens, in time per token
after the first; prints the medians and the ratio.
Exit code 0: every check passed; 1: the line that begins with FAILED says which did not, and why.
"""

import argparse
import json
import re
import statistics
import time

import jsonschema
import openai

from session import check, equal, refused, run

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("base_url", help="the OpenAI API's root, ending in /v1")
arguments.add_argument("--model", help="default: the first one listed")
arguments.add_argument("--runs", type=int, default=20, help="generations; the schemas take turns (default: 20)")
arguments.add_argument("--first", type=int, default=0, help="number of the first generation, from which its seed comes (default: 0)")
arguments.add_argument("--speed", type=int, default=0, help="pairs of answers to time (default: 0)")
options = arguments.parse_args()

client = openai.OpenAI(base_url=options.base_url, api_key="unused", timeout=300, max_retries=0)
model = options.model or client.models.list().data[0].id


def text(longest=16, **more):
    return {"type": "string", "maxLength": longest, **more}


def number(least, most, **more):
    return {"type": "integer", "minimum": least, "maximum": most, **more}


def items(what, most=3, least=0):
    return {"type": "array", "items": what, "minItems": least, "maxItems": most}


def record(optional=(), **properties):
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


POINT = record(x=number(-99, 99), y=number(-99, 99))
# Every string and array is bounded, and so is every number and the depth: each must come to an end by itself.
SCHEMAS = [
    record(name=text(), age=number(0, 120)),
    record(title=text(40), tags=items(text(10), 4, 1)),
    record(city=text(20), country=text(20), population=number(0, 50_000_000)),
    record(answer={"type": "boolean"}, reason=text(60)),
    record(color={"enum": ["red", "green", "blue"]}, shade={"enum": ["dark", "light", None]}),
    record(points=items(POINT, 4, 2)),
    record(optional=("note",), id=number(1, 9999), note=text(24)),
    items(text(12), 5, 1),
    items(number(-1000, 1000), 8, 4),
    {"anyOf": [record(cat=text(8)), record(dog=text(8))]},
    record(when=text(20, format="date"), at=text(20, format="time")),
    record(code={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"}, count=number(1, 9)),
    record(mail=text(30, pattern="^[a-z]{1,10}@[a-z]{1,10}\\.(com|org)$")),
    record(price={"type": "number", "minimum": 0, "maximum": 1000, "multipleOf": 0.25}, unit={"const": "EUR"}),
    {"type": "array", "prefixItems": [text(8), number(0, 9), {"type": "boolean"}], "items": False, "minItems": 3},
    record(a=record(b=record(c=record(d=text(12))))),
    {
        "$defs": {"point": POINT},
        **record(start={"$ref": "#/$defs/point"}, end={"$ref": "#/$defs/point"}),
    },
    record(kind={"const": "übung"}, größe={"type": ["string", "null"], "maxLength": 20}),
    record(steps=items(record(do=text(30), minutes=number(1, 60)), 3, 1)),
    {"type": "object", "properties": {"id": number(0, 99)}, "required": ["id"], "maxProperties": 2,
     "patternProperties": {"^x_[a-z]{1,4}$": number(0, 9)}, "additionalProperties": False},
]
SUBJECTS = ["a sailor", "the moon", "an old bridge", "bread", "a cat in Rome", "winter", "chess", "a small island", "tea",
            "the number seven", "a lighthouse", "rain", "an engineer", "music", "a red kite", "the desert", "maps"]


def named(schema):
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}


def ask(subject, **more):
    chat = [{"role": "user", "content": f"Write JSON about {subject}."}]
    return client.chat.completions.create(**{"model": model, "messages": chat, "temperature": 1, "max_tokens": 600, **more})


def validates():
    equal(len(SCHEMAS), 20, "schemas")
    outputs, tokens = set(), 0
    for index in range(options.first, options.first + options.runs):
        schema = SCHEMAS[index % len(SCHEMAS)]
        answer = ask(SUBJECTS[index % len(SUBJECTS)], seed=index, response_format=named(schema))
        choice = answer.choices[0]
        said = f"generation {index}, schema {index % len(SCHEMAS)}: {choice.message.content!r}"
        equal(choice.finish_reason, "stop", f"finish_reason of {said}")
        try:
            jsonschema.validate(json.loads(choice.message.content), schema, jsonschema.Draft202012Validator)
        except ValueError as error:
            check(False, f"{said} does not parse: {error}")
        except jsonschema.ValidationError as error:
            check(False, f"{said} does not validate: {error.message}")
        outputs.add(choice.message.content)
        tokens += answer.usage.completion_tokens
    print(f"{options.runs} generations over {len(SCHEMAS)} schemas parse and validate; "
          f"{len(outputs)} different, {tokens} tokens")
    check(len(outputs) > options.runs * 0.7, "few different outputs:", len(outputs))


def forms():
    code = ask("tea", seed=5, extra_body={"structured_outputs": {"regex": "[A-Z]{3}-[0-9]{2}"}}).choices[0]
    check(re.fullmatch("[A-Z]{3}-[0-9]{2}", code.message.content), "the regex gave", code.message.content)
    equal(code.finish_reason, "stop", "finish_reason")
    plain = client.completions.create(model=model, prompt="Is tea hot?", max_tokens=9,
                                      extra_body={"structured_outputs": {"regex": " (yes|no)"}}).choices[0]
    check(plain.text in (" yes", " no"), "the completion is", plain.text)
    schema = record(name=text(), tags=items(text(6), 3, 1))
    pieces = ask("bread", seed=3, stream=True, response_format=named(schema))
    streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    whole = ask("bread", seed=3, response_format=named(schema)).choices[0].message.content
    equal(streamed, whole, "the streamed answer")
    # Cut short, an answer says so.
    short = ask("bread", seed=3, response_format=named(schema), max_tokens=3).choices[0]
    equal(short.finish_reason, "length", "finish_reason of an answer that was cut")
    check(whole.startswith(short.message.content), "the answer that was cut is", short.message.content)


def refusals():
    def schema(value, *parts):
        error = refused(openai.BadRequestError, lambda: ask("x", response_format=named(value)), *parts)
        equal(error.param, "response_format.json_schema.schema", "param")

    schema({"type": "array", "uniqueItems": True}, "uniqueItems")
    schema({"type": "word"}, "word")
    schema({"$ref": "#/$defs/no_such_thing"}, "no_such_thing")
    schema({"type": "string", "pattern": "(?=a)b"}, "look")
    schema({"enum": ["x" * 70_000]}, "65536")
    error = refused(openai.BadRequestError, lambda: ask("x", extra_body={"structured_outputs": {"regex": "("}}), "unclosed")
    equal(error.param, "structured_outputs.regex", "param")
    error = refused(openai.BadRequestError, lambda: ask("x", response_format={"type": "xml"}), "json_schema")
    equal(error.param, "response_format.type", "param")
    refused(openai.BadRequestError, lambda: ask("x", response_format={"type": "json_object"}, extra_body={"ignore_eos": True}),
            "ignore_eos")


def timed(**more):
    """(microseconds a token after the first, tokens)"""
    first, tokens, last = None, 0, None
    for piece in ask("a lighthouse", stream=True, stream_options={"include_usage": True}, **more):
        if piece.choices and piece.choices[0].delta.content:
            last = time.perf_counter()
            first = first or last
        if piece.usage:
            tokens = piece.usage.completion_tokens
    return (last - first) / max(tokens - 1, 1) * 1e6, tokens


def speed():
    schema = items(record(name=text(24), text=text(60), count=number(0, 9999), ok={"type": "boolean"}), 6, 6)
    ratios, held, free = [], [], []
    for pair in range(options.speed):
        constrained, tokens = timed(seed=pair, response_format=named(schema))
        plain, as_many = timed(seed=pair, max_tokens=tokens, extra_body={"ignore_eos": True})
        equal(as_many, tokens, "tokens of the free answer")
        ratios.append(constrained / plain)
        held.append(constrained)
        free.append(plain)
    if ratios:
        print(f"{len(ratios)} pairs: held to a schema {statistics.median(held):.0f} us/token, free "
              f"{statistics.median(free):.0f} us/token, median ratio {statistics.median(ratios):.3f}, "
              f"quartiles {statistics.quantiles(ratios, n=4)[0]:.3f} and {statistics.quantiles(ratios, n=4)[2]:.3f}")


run("structured output", [(function.__name__, function) for function in (validates, forms, refusals, speed)])
