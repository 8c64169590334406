#!/usr/bin/env python3
"""A session of a gRPC client, built here by grpcio from Baton's .proto files, with a running cluster.

usage: grpc_session.py HOST:PORT [--model NAME] [--proto FOLDER]
Exit code 0: every check passed; 1: the line that begins with FAILED says which did not, and why.
"""

import argparse
import pathlib
import sys
import tempfile

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from grpc_tools import protoc

from session import check, equal, refused, run

PROTO = pathlib.Path(__file__).resolve().parents[2] / "proto" / "proto"
arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("target", help="the coordinator's gRPC address, HOST:PORT")
arguments.add_argument("--model", default="", help="default: the only one served")
arguments.add_argument("--proto", type=pathlib.Path, default=PROTO, help="the folder that holds baton/v1")
options = arguments.parse_args()

stubs = tempfile.TemporaryDirectory()
files = [str(options.proto / "baton" / "v1" / name) for name in ("common.proto", "inference.proto")]
if protoc.main(["protoc", f"-I{options.proto}", f"--python_out={stubs.name}", f"--grpc_python_out={stubs.name}", *files]) != 0:
    sys.exit(f"FAILED grpc: protoc does not compile {files}")
sys.path.insert(0, stubs.name)
from baton.v1 import common_pb2, inference_pb2, inference_pb2_grpc  # noqa: E402

channel = grpc.insecure_channel(options.target)
inference = inference_pb2_grpc.InferenceStub(channel)
TIMEOUT = 120
CHAT = inference_pb2.ChatMessages(messages=[inference_pb2.ChatMessage(role="user", content="Why is the sky blue?")])


def sampling(**more):
    return common_pb2.SamplingParams(**{"temperature": 0, "max_tokens": 24, "ignore_eos": True, **more})


def request(**more):
    given = {"model": options.model, "sampling": sampling(), **more}
    if not {"prompt", "prompt_tokens", "messages"} & given.keys():
        given["messages"] = CHAT
    return inference_pb2.GenerateRequest(**given)


class Answer:
    """A whole stream, checked: tokens in order without a gap, one last message."""

    def __init__(self, asked, **call):
        stream = inference.Generate(asked, timeout=TIMEOUT, **call)
        self.messages = list(stream)
        self.metadata = dict([*stream.initial_metadata(), *(stream.trailing_metadata() or [])])
        self.text, self.tokens, self.logprobs = "", [], []
        for message in self.messages:
            if message.tokens:
                equal(message.first_index, len(self.tokens), "first_index")
            check(len(message.tokens) <= 8, "a frame of", len(message.tokens), "tokens")
            self.text += message.text
            self.tokens += message.tokens
            self.logprobs += message.logprobs
        self.last = self.messages[-1]
        reasons = [message.finish_reason for message in self.messages]
        check(not any(reasons[:-1]) and reasons[-1], "finish_reason of the messages:", reasons)
        equal(len({message.request_id for message in self.messages}), 1, "request ids in one stream")


def fails(code, call, *parts):
    """`call` fails with this status, whose message names `parts`."""
    error = refused(grpc.RpcError, call)
    equal(error.code(), code, f"the status ({error.details()})")
    for part in parts:
        check(part in error.details(), f"the error does not name {part!r}: {error.details()}")
    return error


def models():
    listed = inference.ListModels(inference_pb2.ListModelsRequest(), timeout=TIMEOUT).models
    check(listed, "no model is served")
    check(all(one.id and one.context_tokens and one.created for one in listed), "the models say", listed)


def context_tokens():
    listed = inference.ListModels(inference_pb2.ListModelsRequest(), timeout=TIMEOUT).models
    return next(one.context_tokens for one in listed if options.model in ("", one.id))


def tokenizes():
    def tokens(**given):
        return inference.Tokenize(inference_pb2.TokenizeRequest(model=options.model, **given), timeout=TIMEOUT).tokens

    check(len(tokens(text="Why is the sky blue?")) > 3, "a sentence of few tokens")
    check(len(tokens(messages=CHAT)) > len(tokens(text="Why is the sky blue?")), "the chat template added nothing")


def generates():
    chat = Answer(request())
    equal((chat.last.finish_reason, len(chat.tokens)), (common_pb2.FINISH_REASON_LENGTH, 24), "reason and tokens")
    check(chat.text, "the answer is empty")
    usage = chat.last.usage
    prompt = inference.Tokenize(inference_pb2.TokenizeRequest(model=options.model, messages=CHAT), timeout=TIMEOUT).tokens
    equal((usage.prompt_tokens, usage.completion_tokens), (len(prompt), 24), "usage")
    equal(chat.metadata.get("x-request-id"), chat.last.request_id, "x-request-id")
    timeline = chat.last.timeline
    check(timeline.decode_node and timeline.handover_path and timeline.attempts >= 1 and timeline.ttft_us > 0, "timeline:", timeline)
    by_id = Answer(request(prompt_tokens=inference_pb2.TokenIds(ids=prompt)))
    equal(by_id.tokens, chat.tokens, "the same prompt as token ids")
    check(Answer(request(prompt="The sky is")).text, "the answer to a prompt is empty")


def samples():
    def sampled(seed):
        return Answer(request(sampling=sampling(temperature=1, seed=seed, top_p=0.95, top_k=50))).tokens

    drawn = [sampled(seed) for seed in (1, 2, 3)]
    equal([sampled(seed) for seed in (1, 2, 3)], drawn, "sampled tokens with equal seeds")
    check(len({tuple(tokens) for tokens in drawn}) > 1, "three seeds gave the same tokens")
    biased = Answer(request(sampling=sampling(logit_bias={40: 100})))
    equal(set(biased.tokens), {40}, "tokens under a bias of 100")
    scored = Answer(request(sampling=sampling(logprobs=2)))
    equal(len(scored.logprobs), 24, "tokens with a log probability")
    check(all(one.logprob <= 0.001 and len(one.top) == 2 for one in scored.logprobs), "log probabilities:", scored.logprobs)
    equal([one.top[0].token for one in scored.logprobs], scored.tokens, "the likeliest tokens of a greedy answer")


def stops():
    text = Answer(request()).text
    stop = text[len(text) // 2 :][:3]
    stopped = Answer(request(stop=[stop]))
    equal(stopped.text, text[: text.index(stop)], f"the text before {stop!r}")
    equal(stopped.last.finish_reason, common_pb2.FINISH_REASON_STOP, "finish_reason")


def statuses():
    def generate(**more):
        return lambda: list(inference.Generate(request(**more), timeout=TIMEOUT))

    invalid = grpc.StatusCode.INVALID_ARGUMENT
    fails(grpc.StatusCode.NOT_FOUND, generate(model="no-such-model"), "no-such-model")
    error = fails(invalid, generate(sampling=sampling(temperature=-1)), "temperature")
    check(dict([*(error.initial_metadata() or []), *(error.trailing_metadata() or [])]).get("x-request-id"), "an error without x-request-id")
    fails(invalid, generate(sampling=sampling(top_p=1.5)), "top_p")
    fails(invalid, generate(sampling=sampling(max_tokens=0)), "max_tokens")
    fails(invalid, generate(sampling=sampling(max_tokens=context_tokens() + 1)), "max_tokens")
    fails(invalid, generate(prompt_tokens=inference_pb2.TokenIds(ids=[5] * (context_tokens() + 1))))
    fails(invalid, lambda: list(inference.Generate(inference_pb2.GenerateRequest(model=options.model), timeout=TIMEOUT)))
    fails(invalid, generate(stop=["x" * 257]), "stop")
    fails(grpc.StatusCode.NOT_FOUND, lambda: inference.Tokenize(inference_pb2.TokenizeRequest(model="no-such-model", text="a"), timeout=TIMEOUT))
    fails(grpc.StatusCode.UNIMPLEMENTED, lambda: channel.unary_unary("/baton.v1.Inference/NoSuchMethod")(b"", timeout=TIMEOUT))


def long_request(**more):
    return request(sampling=sampling(max_tokens=min(4000, context_tokens() - 200)), **more)


def deadlines():
    fails(grpc.StatusCode.DEADLINE_EXCEEDED, lambda: list(inference.Generate(long_request(timeout_ms=300), timeout=TIMEOUT)))
    fails(grpc.StatusCode.DEADLINE_EXCEEDED, lambda: list(inference.Generate(long_request(), timeout=0.3)))


def cancels():
    stream = inference.Generate(long_request(), timeout=TIMEOUT)
    request_id = next(stream).request_id
    cancel = inference_pb2.CancelRequest(request_id=request_id)
    check(inference.Cancel(cancel, timeout=TIMEOUT).cancelled, "a running request was not found")
    try:
        reason = [message.finish_reason for message in stream][-1:]
        equal(reason, [common_pb2.FINISH_REASON_CANCELLED], "finish_reason of a cancelled request")
    except grpc.RpcError as error:
        equal(error.code(), grpc.StatusCode.CANCELLED, "the status of a cancelled request")
    check(not inference.Cancel(cancel, timeout=TIMEOUT).cancelled, "a request was cancelled twice")
    for _ in range(3):
        stream = inference.Generate(long_request(), timeout=TIMEOUT)
        next(stream)
        stream.cancel()
    check(Answer(request()).text, "no answer after cancelled streams")


def health():
    stub = health_pb2_grpc.HealthStub(channel)
    for service in ("", "baton.v1.Inference"):
        status = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT).status
        equal(status, health_pb2.HealthCheckResponse.SERVING, f"health of {service!r}")
    fails(grpc.StatusCode.NOT_FOUND, lambda: stub.Check(health_pb2.HealthCheckRequest(service="no.such.Service"), timeout=TIMEOUT))


def reflects():
    # grpcio knows only v1alpha by name; v1 has the same messages.
    ask = channel.stream_stream("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
                                request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
                                response_deserializer=reflection_pb2.ServerReflectionResponse.FromString)
    answer = next(ask(iter([reflection_pb2.ServerReflectionRequest(list_services="*")]), timeout=TIMEOUT))
    services = [service.name for service in answer.list_services_response.service]
    check("baton.v1.Inference" in services, "baton.v1.Inference is not among", services)


run("grpc", [(function.__name__, function) for function in (
    models, tokenizes, generates, samples, stops, statuses, deadlines, cancels, health, reflects)])
