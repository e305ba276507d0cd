"""A conversation: each turn sends the whole history, whose KV the server still has.

python examples/chat.py [HOST:PORT]
"""

import sys

from millrace.client import Client

target = sys.argv[1] if len(sys.argv) > 1 else "localhost:50051"
QUESTIONS = ["Name three primary colours.", "Which of them is the sky?"]

history = [("system", "You answer in one short sentence.")]
with Client(target) as client:
    for question in QUESTIONS:
        history.append(("user", question))
        print(f"> {question}")
        stream = client.chat(history, max_tokens=60, temperature=0.2, seed=7)
        for text in stream:
            print(text, end="", flush=True)
        history.append(("assistant", stream.answer.text))

        usage = stream.answer.summary.usage
        print(f"\n  ({usage.cached_tokens} of {usage.prompt_tokens} prompt tokens were cached)\n")
