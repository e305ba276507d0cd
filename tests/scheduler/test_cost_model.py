"""CostModel against a simulated device: a known cost, noise, pauses, and a change of pace."""

from random import Random

import numpy as np
import pytest

from millrace.scheduler.cost_model import FIRST_S, MIN_CHUNK, CostModel, StepLoad


def device_s(load: StepLoad, pace: float = 1.0) -> float:
    """A GPU of sorts: launch, prefill compute, weights and cache read once."""
    fixed, prefill, decodes = 0.006, 4e-5 * load.prefill_tokens, 1e-5 * load.decodes
    return pace * (fixed + prefill + decodes + 2e-8 * load.context_tokens)


def draw_load(rng: Random) -> StepLoad:
    decodes = rng.randint(0, 256)
    prefill = rng.choice([0, 0, rng.randint(1, 2048)])
    return StepLoad(prefill, decodes, decodes * rng.randint(100, 4000))


def train(model: CostModel, rng: Random, steps: int, noise: float = 0.03, pace: float = 1.0):
    for _ in range(steps):
        load = draw_load(rng)
        model.measured(load, device_s(load, pace) * rng.gauss(1.0, noise))


def errors(model: CostModel, rng: Random, pace: float = 1.0) -> list[float]:
    loads = [draw_load(rng) for _ in range(200)]
    return [abs(model.predict_s(load) / device_s(load, pace) - 1.0) for load in loads]


def test_before_any_measurement_it_guesses_and_asks_for_little():
    model = CostModel()
    assert model.predict_s(StepLoad(100, 10, 1000)) == FIRST_S
    assert model.budget(0.05, 10, 1000) == MIN_CHUNK
    assert model.prefill_s(1000) == 0.0, "nobody is shed on a guess"


@pytest.mark.parametrize("seed", range(4))
def test_it_learns_what_a_step_costs_within_a_few_percent(seed):
    rng, model = Random(seed), CostModel()
    train(model, rng, 400)
    assert np.median(errors(model, rng)) < 0.03
    assert max(errors(model, rng)) < 0.15


def test_it_follows_a_device_that_slows_down():
    rng, model = Random(0), CostModel()
    train(model, rng, 500)
    train(model, rng, 1500, pace=1.7)
    assert np.median(errors(model, rng, pace=1.7)) < 0.05


def test_pauses_of_the_machine_are_not_taken_for_the_cost_of_a_step():
    rng, model = Random(1), CostModel()
    train(model, rng, 300)
    for _ in range(300):
        load = draw_load(rng)
        model.measured(load, device_s(load) * (30.0 if rng.random() < 0.02 else 1.0))
    assert np.median(errors(model, rng)) < 0.03


def test_a_device_that_is_slower_for_good_is_believed_even_if_it_is_many_times_slower():
    rng, model = Random(2), CostModel()
    train(model, rng, 300)
    train(model, rng, 3000, pace=6.0)
    assert np.median(errors(model, rng, pace=6.0)) < 0.1


def test_a_day_of_equal_steps_does_not_make_it_forget_prefill():
    rng, model = Random(3), CostModel()
    train(model, rng, 400)
    for _ in range(20_000):
        load = StepLoad(0, 64, 64_000)
        model.measured(load, device_s(load) * rng.gauss(1.0, 0.02))
    load = StepLoad(1024, 64, 64_000)
    model.measured(load, device_s(load))
    assert model.predict_s(load) == pytest.approx(device_s(load), rel=0.2)


@pytest.mark.parametrize("target_s", [0.015, 0.03, 0.06])
def test_steps_planned_by_the_budget_keep_the_target(target_s):
    rng, model = Random(4), CostModel()
    train(model, rng, 400)
    late, used = 0, []
    for _ in range(1000):
        decodes = rng.randint(1, 200)
        context = decodes * rng.randint(100, 1000)
        load = StepLoad(model.budget(target_s, decodes, context), decodes, context)
        seconds = device_s(load) * rng.gauss(1.0, 0.03)
        model.measured(load, seconds)
        is_minimum = load.prefill_tokens == MIN_CHUNK
        late += seconds > target_s and not is_minimum
        used.append(seconds / target_s)
    assert late <= 1000 * 0.08
    assert np.median(used) > 0.9, "and do not waste it"


def test_a_target_that_decodes_alone_miss_still_lets_prompts_go_on():
    rng, model = Random(5), CostModel()
    train(model, rng, 400)
    assert model.budget(0.001, 200, 100_000) == MIN_CHUNK
