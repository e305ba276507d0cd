"""What the host sends is what the table shows: against SlotSampling.write and plain assignments."""

import dataclasses

import numpy as np
import pytest
import torch

from millrace.engine.core.messages import NewRequest
from millrace.engine.runner.changes import ChangePacker, is_plain, slot_values
from millrace.engine.runner.copies import SharedMemory
from millrace.engine.runner.packed import PackedArrays
from millrace.engine.runner.request_table import RequestTable
from millrace.engine.sampling_params import SamplingParams
from millrace.kernels.slot_sampling import FLAG_OF, MAX_STOP_IDS, SlotSampling
from millrace.scheduler.plan import PrefillChunk, StepPlan
from millrace.scheduler.request import Request

CPU = torch.device("cpu")
SLOTS, MAX_CONTEXT = 6, 40
PARAMS = [
    {},
    {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "seed": 2**63 + 5},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": -0.5},
    {"logit_bias": {3: 1.5}, "banned_token_ids": [4], "min_tokens": 7},
    {"allowed_token_ids": [1, 2, 9]},
]


def request_of(slot, prompt, outputs=(), **params):
    settings = SamplingParams(**{"seed": 1} | params)
    message = NewRequest(slot, b"", settings, 8, [2, 7 + slot], 0.0)
    request = Request(slot, np.asarray(prompt, np.int32), 8, payload=message)
    request.slot = slot
    request.outputs = list(outputs)
    return request


def table_of(vocab):
    table = RequestTable(SLOTS, MAX_CONTEXT, 16, vocab, device=CPU)
    for field in dataclasses.fields(SlotSampling):  # what earlier requests left behind
        tensor = getattr(table.sampling, field.name)
        tensor[:SLOTS] = 77 if tensor.dtype == torch.int32 else True
    return table


def apply(table, plan, decode_slots=None):
    packer = ChangePacker(MAX_CONTEXT + 1, table.block_table.shape[1], table.sampling.vocab)
    packed = PackedArrays()
    packer.table_changes(plan, packed)
    if decode_slots is not None:
        packer.chunk_rows(decode_slots, plan.prefill, packed)
    views = packed.views(SharedMemory().send(packed))
    table.apply(views)
    return views


@pytest.mark.parametrize("vocab", [50, MAX_STOP_IDS, 199])
def test_admissions_write_what_the_sampler_would(vocab):
    requests = [
        request_of(slot, range(3, 8 + slot), [5, 6] if slot == 2 else (), **params)
        for slot, params in enumerate(PARAMS)
    ]
    chunks = [PrefillChunk(request.slot, 2, 3, False) for request in requests]
    table, expected = table_of(vocab), table_of(vocab).sampling
    table.ended[:] = True
    apply(table, StepPlan(1, admitted=requests, prefill=chunks))
    for request in requests:
        expected.write(request.slot, slot_values(request))
        tokens = request.known_tokens().tolist()
        assert table.tokens[request.slot, : len(tokens)].tolist() == tokens
    assert table.computed.tolist() == [2] * 5 + [0, 0]
    assert table.ended.tolist() == [False] * 5 + [True, True]
    for field in dataclasses.fields(SlotSampling):
        found, wanted = getattr(table.sampling, field.name), getattr(expected, field.name)
        slots = torch.ones(SLOTS + 1, dtype=torch.bool)
        if field.name in FLAG_OF:
            slots = getattr(expected, FLAG_OF[field.name])
        assert torch.equal(found[slots], wanted[slots]), field.name


@pytest.mark.parametrize(
    ("params", "sent"),
    [
        ({}, {}),
        ({"banned_token_ids": [4]}, {"allowed": [1, 2]}),  # 50 bits
        ({"allowed_token_ids": [4]}, {"allowed": [1, 2]}),
        ({"logit_bias": {4: 1.0}}, {"bias": [1, 50]}),
        ({"presence_penalty": 0.5}, {"prompt_seen": [1, 50], "output_counts": [1, 50]}),
    ],
    ids=str,
)
def test_of_rows_over_the_vocabulary_a_request_sends_those_it_needs(params, sent):
    requests = [request_of(0, [3, 4]), request_of(1, [3, 4], **params)]
    chunks = [PrefillChunk(request.slot, 0, 2, True) for request in requests]
    views = apply(table_of(50), StepPlan(1, admitted=requests, prefill=chunks))
    wide = {name.removeprefix("wide."): view for name, view in views.items() if "wide" in name}
    assert {name: list(view.shape) for name, view in wide.items()} == sent


def test_blocks_go_to_their_places_and_nowhere_else():
    table = table_of(50)
    rows = np.array([(0, 0, 11), (0, 2, 12), (5, 1, 13)], np.int32)
    apply(table, StepPlan(1, block_appends=rows))
    assert table.block_table[0].tolist() == [11, 0, 12]
    assert table.block_table[5].tolist() == [0, 13, 0]
    assert table.block_table[1:5].eq(0).all()
    assert table.block_table[SLOTS].eq(0).all()


def test_a_plan_with_drafts_is_refused_and_names_their_slots():
    plan = StepPlan(7, drafts=np.array([(3, 16, 2)], np.int32))
    with pytest.raises(NotImplementedError, match=r"step 7 checks drafts in slots \[3\]"):
        apply(table_of(50), plan)


def test_rows_of_a_mixed_step_as_in_the_example():
    plan = StepPlan(1, prefill=[PrefillChunk(1, 16, 3, True), PrefillChunk(2, 0, 2, False)])
    views = apply(table_of(50), plan, decode_slots=np.array([4, 5]))
    assert {name: view.tolist() for name, view in views.items()} == {
        "slots": [4, 5, 1, 2],
        "query_start": [0, 1, 2, 5, 7],
        "ends": [19, 2],
        "token_slots": [4, 5, 1, 1, 1, 2, 2],
        "positions": [16, 17, 18, 0, 1],
        "last_tokens": [0, 1, 4],
        "drawing_slots": [4, 5, 1],
    }


@pytest.mark.parametrize(
    ("params", "plain"),
    [
        ({"temperature": 0.0}, True),
        ({"temperature": 0.9}, True),
        ({"temperature": 0.9, "temperature_last": True}, True),
        ({"temperature": 0.0, "top_p": 0.9}, True),  # greedy: a filter leaves the best
        ({"temperature": 0.9, "top_p": 0.9}, False),
        ({"temperature": 0.9, "top_n_sigma": 1.0}, False),
        ({"temperature": 0.0, "min_tokens": 1}, False),  # bans the stop ids at first
        ({"temperature": 0.0, "frequency_penalty": 0.1}, False),
        ({"temperature": 0.0, "logit_bias": {3: 1.0}}, False),
        ({"temperature": 0.0, "allowed_token_ids": [3]}, False),
        ({"temperature": 0.0, "banned_token_ids": [3]}, False),
    ],
    ids=str,
)
def test_a_plain_request_asks_for_a_temperature_at_most(params, plain):
    assert is_plain(request_of(0, [1, 2], **params)) is plain
