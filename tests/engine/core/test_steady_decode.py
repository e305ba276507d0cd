"""A steady decode step sends the device nothing, and fetches three numbers a row."""

import numpy as np
import pytest

from millrace.engine.runner.copies import SharedMemory
from millrace.engine.runner.graphs import Draws
from millrace.engine.runner.logprobs import score_rows


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


@pytest.mark.parametrize(
    ("asked", "draws"),
    [
        ({"temperature": 0.7}, Draws.PLAIN),
        ({"temperature": 0.7, "top_p": 0.9}, Draws.FILTERED),
        ({"temperature": 0.0, "top_p": 0.9}, Draws.PLAIN),
        ({"repetition_penalty": 1.1}, Draws.FILTERED),
        ({"logprobs": 0}, Draws.SCORED),
        ({"logprobs": 3, "top_k": 5}, Draws.SCORED),
    ],
    ids=str,
)
def test_a_step_draws_as_the_most_demanding_of_its_rows(make_world, asked, draws):
    """Each is a replay, whatever is asked; and nobody pays for who is gone."""
    world, copies = decoding_world(make_world)
    calls, replayed = world.core._runner._calls, []
    replay = calls.replay
    calls.replay = lambda shape: (replayed.append((shape.rows, shape.draws)), replay(shape))
    world.step()
    world.submit(9, [5] * 30, max_tokens=3, ignore_eos=True, **asked)
    for _ in range(4):  # the prompt beside the decodes, and draws its first token; then two more
        world.step()
    plain = (3, Draws.PLAIN)
    assert replayed == [plain, (4, draws), (4, draws), plain]
    rows = score_rows(20) if draws is Draws.SCORED else 0
    assert copies.fetched == [(3, 8), *[(3 + rows, 8)] * 3, (3, 8)]
