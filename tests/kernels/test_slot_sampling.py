"""Writing a request's parameters into a slot: what is refused, and that nothing is left behind."""

import math

import pytest
import torch

from millrace.kernels.slot_sampling import MAX_STOP_IDS, NO_ID, SlotSampling, SlotValues
from millrace.kernels.token_mask import members

FIELDS = (
    *("scalars", "filter_kind", "seed", "min_position", "stop_ids"),
    *("has_bias", "has_bans", "has_penalties"),
)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", bad) for bad in (-0.1, math.nan, math.inf)),
        ("top_k", -1),
        *(("top_p", bad) for bad in (0.0, 1.01, math.nan)),
        *(("typical_p", bad) for bad in (0.0, 1.01, math.nan)),
        *(("min_p", bad) for bad in (-0.1, 1.01, math.nan)),
        *(("top_n_sigma", bad) for bad in (-0.1, math.inf, math.nan)),
        *(("xtc_probability", bad) for bad in (-0.1, 1.01, math.nan)),
        *(("xtc_threshold", bad) for bad in (-0.1, 1.01, math.nan)),
        *(("repetition_penalty", bad) for bad in (0.0, -1.0, math.nan, math.inf)),
        *(("presence_penalty", bad) for bad in (math.nan, math.inf)),
        *(("frequency_penalty", bad) for bad in (math.nan, -math.inf)),
        *(("logprobs", bad) for bad in (-1, 3)),
        ("stop_ids", list(range(MAX_STOP_IDS + 1))),
    ],
)
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        SlotValues(**{name: value})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bias_that_is_no_bias_is_refused(bad):
    with pytest.raises(ValueError, match=r"^bias\[3\]: expected"):
        SlotValues(bias={3: bad})


@pytest.mark.parametrize("token_id", [-1, 10])
@pytest.mark.parametrize("name", ["stop_ids", "bias", "allowed_ids", "prompt_ids", "output_ids"])
def test_ids_outside_the_vocabulary_are_refused_and_nothing_is_written(name, token_id):
    params = SlotSampling.zeros(1, 10)
    ids = {token_id: 1.0} if name == "bias" else [token_id]
    with pytest.raises(ValueError, match=f"^{name}: expected ids in"):
        params.write(0, SlotValues(temperature=1.0, presence_penalty=1.0, **{name: ids}))
    assert params.temperature.tolist() == [0.0]


def test_a_slot_written_again_keeps_nothing_of_the_last_request():
    busy = SlotValues(
        temperature=0.5,
        temperature_last=True,
        top_n_sigma=2.0,
        top_k=3,
        typical_p=0.8,
        top_p=0.5,
        min_p=0.1,
        xtc_probability=0.5,
        xtc_threshold=0.2,
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        logprobs=1,
        seed=9,
        stop_ids=[1, 2],
        min_position=7,
        bias={4: 1.0, 5: -math.inf, 6: 2.0},
        allowed_ids=[4, 5],
        prompt_ids=[1, 2],
        output_ids=[3, 3],
    )
    params, fresh = SlotSampling.zeros(2, 10), SlotSampling.zeros(2, 10)
    params.write(1, busy)
    assert params.output_counts[1].tolist() == [0, 0, 0, 2, 0, 0, 0, 0, 0, 0]
    assert params.bias[1].tolist() == [0, 0, 0, 0, 1.0, 0, 2.0, 0, 0, 0]
    assert params.allowed[1].tolist() == [1 << 4]
    params.write(1, SlotValues())
    for name in FIELDS:
        assert torch.equal(getattr(params, name), getattr(fresh, name)), name
    # Rows over the vocabulary are stale but unread; the next request that reads them starts anew.
    params.write(1, SlotValues(bias={0: 2.0}, presence_penalty=1.0, prompt_ids=[8]))
    assert params.bias[1].tolist() == [2.0] + [0.0] * 9
    assert params.prompt_seen[1].nonzero().tolist() == [[8]]
    assert not params.output_counts[1].any()
    params.write(1, SlotValues(bias={9: -math.inf}))
    assert members(params.allowed[1], 10).tolist() == [True] * 9 + [False]
    assert torch.equal(params.bias[0], fresh.bias[0])


def test_a_flag_is_set_only_where_its_table_has_something_to_say():
    nothing = SlotValues()
    assert not (nothing.has_bias or nothing.has_bans)
    banning = SlotValues(bias={3: -math.inf})
    assert banning.has_bans and not banning.has_bias
    listing = SlotValues(allowed_ids=[])
    assert listing.has_bans and not listing.has_bias
    both = SlotValues(bias={3: -math.inf, 4: 0.5})
    assert both.has_bans and both.has_bias


def test_scalars_go_by_their_names():
    params = SlotSampling.zeros(2, 10)
    params.write(1, SlotValues(temperature=0.5, top_k=30, xtc_threshold=0.25, min_p=0.125))
    assert params.temperature.tolist() == [0.0, 0.5]
    assert params.top_k.tolist() == [0, 10]  # all there are
    assert params.min_p.tolist() == [0.0, 0.125]
    assert params.xtc_threshold[1] == 0.25
    assert params.top_p.tolist() == [1.0, 1.0]


def test_seeds_are_taken_modulo_two_to_the_64():
    params = SlotSampling.zeros(4, 10)
    for slot, seed in enumerate((-1, (1 << 64) - 1, 1 << 64, 1 << 63)):
        params.write(slot, SlotValues(seed=seed))
    assert params.seed.tolist() == [-1, -1, 0, -(1 << 63)]


def test_stop_ids_are_padded():
    params = SlotSampling.zeros(1, 10)
    params.write(0, SlotValues(stop_ids=[7]))
    assert params.stop_ids.tolist() == [[7] + [NO_ID] * (MAX_STOP_IDS - 1)]


def test_malformed_tensors_are_refused_by_name():
    good = vars(SlotSampling.zeros(2, 10))
    for name in good:
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            SlotSampling(**(good | {name: torch.zeros(2, 11, dtype=torch.float64)}))
