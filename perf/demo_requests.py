"""What `make demo` asks for: many lengths, every way of sampling, and two that go wrong."""

from __future__ import annotations

from dataclasses import dataclass

from millrace.v1 import inference_pb2 as pb

STORY = (
    "The mill stood where the two rivers met. Every morning the miller opened the sluice, and "
    "the water turned the wheel, and the wheel turned the stones, and the stones ground the corn. "
)
OPENINGS = (
    "Once upon a time",
    "The capital of France is",
    "def fibonacci(n):",
    "Water boils at",
    "Roses are red,",
    "The three laws of motion are",
)
QUESTIONS = (
    "Why is the sky blue?",
    "Write a haiku about rivers.",
    "What is 17 times 3?",
    "Name three planets.",
    "How do I boil an egg?",
    "Tell me a joke about computers.",
)
LENGTHS = (1, 2, 4, 8)  # copies of STORY, about 40 tokens each
SEED = 7
CANCEL_AFTER = 4  # tokens


@dataclass(frozen=True, slots=True)
class Case:
    """One request and how it has to end."""

    label: str
    request: pb.GenerateRequest
    cancel_after: int | None = None  # tokens, then the client cancels
    status: str = "OK"  # name of the gRPC status that must end it
    field: str = ""  # that the refusal must name


def demo_cases() -> list[Case]:
    """All requests, in the order in which they are sent."""
    cases = [
        *(_text("greedy", text, 24, temperature=0.0) for text in OPENINGS),
        *(_text("temperature 0.8", text, 24, temperature=0.8) for text in OPENINGS),
        *(_text(f"long prompt x{n}", STORY * n, 16, temperature=0.0) for n in LENGTHS),
        *(_chat("chat, top-p 0.9", text, temperature=0.7, top_p=0.9) for text in QUESTIONS),
        _text("top-k 20", OPENINGS[0], 32, temperature=1.0, top_k=20),
        _text("min-p 0.1", OPENINGS[4], 32, temperature=1.2, min_p=0.1),
        _text("repetition penalty", OPENINGS[3], 32, temperature=0.0, repetition_penalty=1.3),
        _text("seed 7", OPENINGS[0], 20, temperature=1.0, seed=SEED),
        _text("seed 7 again", OPENINGS[0], 20, temperature=1.0, seed=SEED),
        _text("seed 7, n = 2", OPENINGS[4], 20, temperature=1.0, seed=SEED, n=2),
        _stop("stop at a full stop", OPENINGS[1], "."),
        _stop("stop at a new line", OPENINGS[2], "\n"),
    ]
    endless = _text("cancelled by us", OPENINGS[5], 2000, temperature=0.8).request
    refused = _text("refused", OPENINGS[0], 8, temperature=-1.0).request
    return [
        *cases,
        Case("cancelled by us", endless, cancel_after=CANCEL_AFTER, status="CANCELLED"),
        Case("refused: temperature -1", refused, status="INVALID_ARGUMENT", field="temperature"),
    ]


def _text(label: str, text: str, max_tokens: int, **sampling: object) -> Case:
    request = pb.GenerateRequest(
        prompt=pb.Prompt(text=text),
        sampling=pb.SamplingParams(**sampling),  # type: ignore[arg-type]
        stopping=pb.Stopping(max_tokens=max_tokens),
    )
    return Case(label, request)


def _chat(label: str, text: str, **sampling: object) -> Case:
    messages = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content=text)])
    request = pb.GenerateRequest(
        prompt=pb.Prompt(messages=messages),
        sampling=pb.SamplingParams(**sampling),  # type: ignore[arg-type]
        stopping=pb.Stopping(max_tokens=32),
    )
    return Case(label, request)


def _stop(label: str, text: str, stop: str) -> Case:
    case = _text(label, text, 48, temperature=0.0)
    case.request.stopping.stop.append(stop)
    return case
