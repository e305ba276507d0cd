"""Give an answer a time limit, and keep what came within it.

python examples/deadline.py [HOST:PORT]
"""

import sys

import grpc

from millrace.client import CallFailed, Client

target = sys.argv[1] if len(sys.argv) > 1 else "localhost:50051"

with Client(target) as client:
    # Longer than the limit allows: the end of the text is ignored, up to the model's context.
    stream = client.generate("Step one:", max_tokens=8000, ignore_eos=True, timeout_ms=1500)
    try:
        for text in stream:
            print(text, end="", flush=True)
    except CallFailed as error:
        if error.code is not grpc.StatusCode.DEADLINE_EXCEEDED:
            raise
        print(f"\n\n{error.message}; {len(stream.answer.token_ids)} tokens came in time")
