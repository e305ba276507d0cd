"""A gRPC load generator for Millrace servers: closed and open loop, every token timed.

`python -m millrace.perf.loadgen --help`. It knows the protos alone, nothing of the engine.

Definitions, with all times taken on the client:
    intended  when the request should have been sent: drawn beforehand in the open loop
    TTFT      intended to first token
    ITL       between the arrivals of neighbouring tokens of one output; tokens of one message
              share a time, so that k of them give k - 1 zeros
    TPOT      (last token - first token) / (tokens - 1) of each output of two tokens or more
    E2EL      intended to the end of the stream
"""
