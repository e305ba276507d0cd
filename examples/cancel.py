"""Stop an answer half way. The server frees its slot and its KV blocks at the next step.

python examples/cancel.py [HOST:PORT]
"""

import sys
import time

from millrace.client import Client
from millrace.v1.admin_pb2 import GetLoadRequest

target = sys.argv[1] if len(sys.argv) > 1 else "localhost:50051"
ENOUGH = 80  # characters

with Client(target) as client:
    stream = client.generate("Once upon a time", max_tokens=1000, temperature=0.8, seed=1)
    for text in stream:
        print(text, end="", flush=True)
        if len(stream.answer.text) >= ENOUGH:
            break  # leaving the loop cancels; so does stream.cancel(), from any thread

    time.sleep(0.5)  # a few steps
    load = client.admin.GetLoad(GetLoadRequest())
    print(f"\n\ncancelled after {len(stream.answer.token_ids)} of 1000 tokens; ", end="")
    print(f"{load.running} running, {load.kv_blocks_used} of {load.kv_blocks_total} blocks in use")
