"""A steady decode step sends the device nothing, and fetches three numbers a row."""

import numpy as np

from millrace.engine.runner.copies import SharedMemory


class CountingCopies(SharedMemory):
    """What was sent and fetched, in bytes and shapes."""

    def __init__(self):
        self.sent, self.fetched = [], []

    def send(self, packed):
        self.sent.append(packed.num_bytes)
        return super().send(packed)

    def fetch(self, tensor):
        self.fetched.append(tuple(tensor.shape))
        return super().fetch(tensor)


def decoding_world(make_world, num_requests=3, **settings):
    """A world whose requests all decode at position 17 or so: far from the end of their block."""
    world = make_world(**settings)
    for index in range(num_requests):
        prompt = np.random.default_rng(index).integers(3, 199, 16).tolist()
        world.submit(index, prompt, max_tokens=60, ignore_eos=True)
    copies = world.core._runner._copies = CountingCopies()
    for _ in range(3):
        world.step()
    copies.sent.clear()
    copies.fetched.clear()
    return world, copies


def test_nothing_is_sent_while_the_same_rows_decode(make_world):
    world, copies = decoding_world(make_world)
    for _ in range(8):
        world.step()
    assert copies.sent == []
    assert copies.fetched == [(3, 8)] * 8  # for each of max_running rows


def test_new_blocks_travel_in_one_copy_of_a_few_bytes(make_world):
    world, copies = decoding_world(make_world)
    for _ in range(16):
        world.step()
    assert copies.sent == [32 + 16]  # three places of 8 bytes and three blocks of 4, aligned to 16


def test_an_admission_is_one_copy_whatever_it_brings(make_world):
    world, copies = decoding_world(make_world)
    world.submit(9, [5] * 30, logit_bias={4: 2.0}, repetition_penalty=1.2, stop_token_ids=[7])
    world.submit(10, [6] * 20, temperature=0.5)
    world.step()
    assert len(copies.sent) == 1


def test_no_tensor_of_the_table_moves(make_world):
    world, _ = decoding_world(make_world)
    before = world.core._runner._table.addresses()
    world.submit(9, [5] * 30, logit_bias={4: 2.0}, repetition_penalty=1.2)
    world.run()
    assert world.core._runner._table.addresses() == before


def test_only_who_asks_pays_for_logprobs(make_world):
    """A step in which nobody asks is a replay; a graph would keep its logits to itself."""
    world, _ = decoding_world(make_world)
    calls, replayed = world.core._runner._calls, []
    replay = calls.replay
    calls.replay = lambda shape: (replayed.append(shape.rows), replay(shape))
    world.step()
    assert replayed == [3]
    world.submit(9, [5] * 30, max_tokens=3, logprobs=1)
    world.step()  # computes the prompt beside the decodes: no replay
    world.step()  # decodes with logprobs
    world.step()
    assert replayed == [3]
    world.step()
    world.step()
    assert replayed == [3, 3, 3]
