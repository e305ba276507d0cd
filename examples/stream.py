"""Stream one answer as it is generated.

python examples/stream.py [HOST:PORT]
"""

import sys

from millrace.client import Client

target = sys.argv[1] if len(sys.argv) > 1 else "localhost:50051"

with Client(target) as client:
    stream = client.generate("The best way to learn to sail is", max_tokens=40, temperature=0)
    for text in stream:
        print(text, end="", flush=True)

    answer = stream.answer
    usage, timing = answer.summary.usage, answer.summary.timing
    print(f"\n\nended by {answer.finish_reason}; {usage.prompt_tokens} tokens in, ", end="")
    print(f"{usage.output_tokens} out; the first after {timing.first_token_ms:.0f} ms")
