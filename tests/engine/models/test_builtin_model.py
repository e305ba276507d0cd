"""The built-in model against transformers in fp32: 20 real prompts of 1 to 2,000 tokens."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from millrace.engine import LLM, SamplingParams
from millrace.engine.core.loop import EngineCore
from millrace.engine.errors import InvalidRequest
from millrace.engine.weights.locate import resolve
from millrace.scheduler.scheduler import Scheduler

pytestmark = pytest.mark.model

LENGTHS = (1, 2, 3, 5, 8, 12, 15, 16, 17, 24, 31, 32, 48, 64, 100, 150, 256, 500, 1000, 2000)
NEW_TOKENS = 12
NUM_TOP = 5
TEXT = Path(__file__).parents[3] / "LICENSE"


@pytest.fixture(scope="module")
def llm():
    return LLM(dtype="float32", device="cpu", max_running=24, max_context=4096)


@pytest.fixture(scope="module")
def reference():
    path = resolve(None).path
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.float32,
    ).eval()


@pytest.fixture(scope="module")
def prompts(llm):
    """Stretches of real text, each from another place."""
    ids = llm.get_tokenizer().encode(TEXT.read_text(encoding="utf-8"))
    assert len(ids) >= max(LENGTHS)
    starts = [index * (len(ids) - length) // len(LENGTHS) for index, length in enumerate(LENGTHS)]
    return [ids[start : start + n] for start, n in zip(starts, LENGTHS, strict=True)]


@pytest.fixture(scope="module")
def outputs(llm, prompts):
    """All prompts at once, greedy, with the scores of every position."""
    params = SamplingParams(
        temperature=0.0,
        max_tokens=NEW_TOKENS,
        ignore_eos=True,
        logprobs=NUM_TOP,
        prompt_logprobs=NUM_TOP,
    )
    token_prompts = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(token_prompts, params, use_tqdm=False)


@pytest.fixture(scope="module")
def expected(reference, prompts, outputs):
    """log_softmax [length + NEW_TOKENS - 1, V] of each prompt and what we made of it."""
    rows = []
    for prompt, output in zip(prompts, outputs, strict=True):
        whole = torch.tensor([prompt + output.outputs[0].token_ids[:-1]])
        with torch.inference_mode():
            rows.append(reference(whole).logits[0].log_softmax(-1))
    return rows


def test_greedy_tokens_are_the_reference_s_own_choice(prompts, outputs, expected):
    for prompt, output, rows in zip(prompts, outputs, expected, strict=True):
        choice = rows[len(prompt) - 1 :].argmax(-1).tolist()
        assert output.outputs[0].token_ids == choice, f"prompt of {len(prompt)} tokens"


def test_logprobs_of_output_equal_the_reference(prompts, outputs, expected):
    for prompt, output, rows in zip(prompts, outputs, expected, strict=True):
        for row, entry in zip(rows[len(prompt) - 1 :], output.outputs[0].logprobs, strict=True):
            top = row.topk(NUM_TOP)
            assert entry.top_logprobs == pytest.approx(top.values.tolist(), abs=2e-3)


def test_logprobs_of_the_prompt_equal_the_reference(prompts, outputs, expected):
    for prompt, output, rows in zip(prompts, outputs, expected, strict=True):
        targets = torch.tensor(prompt[1:], dtype=torch.int64)
        of_reference = rows[: len(targets)].gather(1, targets[:, None])[:, 0]
        ours = torch.tensor([entry.logprob for entry in output.prompt_logprobs or []])
        torch.testing.assert_close(ours, of_reference, atol=5e-3, rtol=1e-3)


def test_a_seeded_request_gives_the_same_tokens_alone_and_in_a_crowd(llm, prompts):
    params = SamplingParams(temperature=0.9, top_p=0.95, seed=11, max_tokens=16, ignore_eos=True)
    crowd = [{"prompt_token_ids": prompt} for prompt in prompts if len(prompt) <= 256]
    alone = llm.generate(crowd[10], params, use_tqdm=False)[0].outputs[0]
    together = llm.generate(crowd, params, use_tqdm=False)[10].outputs[0]
    assert together.token_ids == alone.token_ids


@pytest.fixture
def scheduled(llm, monkeypatch):
    """scheduled(**limits): the model's runner under a new scheduler, which is returned."""

    core = llm._core

    def schedule(**limits):
        core._runner.forget_decodes()
        scheduler = Scheduler(replace(core.scheduler.limits, **limits))
        monkeypatch.setattr(llm, "_core", EngineCore(scheduler, core._runner))
        return scheduler

    return schedule


def greedy_and_seeded_tokens(llm, prompts):
    """Of three prompts that begin alike: 58 tokens, which are four blocks, and 8 more, a fifth."""
    shared, ends = prompts[13][:56], prompts[12]
    greedy = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    seeded = SamplingParams(temperature=0.9, top_p=0.95, seed=7, max_tokens=8, ignore_eos=True)
    asked = [{"prompt_token_ids": shared + ends[2 * i : 2 * i + 2]} for i in range(3)]
    outputs = llm.generate(asked, [greedy, seeded, greedy], use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def test_tokens_do_not_depend_on_cache_chunks_or_preemption(llm, prompts, scheduled):
    cached = scheduled()
    expected = greedy_and_seeded_tokens(llm, prompts)
    assert cached.counters.prefix_hit_tokens > 0
    uncached = scheduled(prefix_caching=False)
    assert greedy_and_seeded_tokens(llm, prompts) == expected
    assert uncached.counters.prefix_hit_tokens == 0
    scheduled(max_step_tokens=24, prefix_caching=False)
    assert greedy_and_seeded_tokens(llm, prompts) == expected
    for num_blocks, prefix_caching in ((9, False), (6, True)):
        preempting = scheduled(num_blocks=num_blocks, prefix_caching=prefix_caching)
        assert greedy_and_seeded_tokens(llm, prompts) == expected
        assert preempting.counters.preemptions > 0


def test_tenants_share_no_prompts(llm, prompts, scheduled):
    scheduled()
    params = SamplingParams(temperature=0.0, max_tokens=1)
    asked = {
        "prompt_token_ids": prompts[12]
    }  # 48 tokens: two full blocks, and one token to compute

    def cached(tenant):
        return llm.generate(asked, params, use_tqdm=False, tenant=tenant)[0].num_cached_tokens

    assert [cached(tenant) for tenant in ("a", "b", "", "a", "b", "")] == [0, 0, 0, 32, 32, 32]


def test_classes_and_tenants_are_checked_before_anything_runs(llm, prompts):
    asked = [{"prompt_token_ids": prompts[0]}] * 2
    for wrong in ({"priority": 10}, {"priority": [0]}, {"tenant": "two words"}, {"tenant": ["a"]}):
        with pytest.raises(InvalidRequest) as caught:
            llm.generate(asked, use_tqdm=False, **wrong)
        assert caught.value.field in wrong


def test_chat_answers_a_question(llm):
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answer = llm.chat(question, SamplingParams(temperature=0.0, max_tokens=24), use_tqdm=False)[0]
    assert "Paris" in answer.outputs[0].text


def test_deterministic_logprobs_are_the_same_bits_alone_and_in_a_crowd(prompts):
    engine = LLM(device="cpu", deterministic=True, max_running=8, max_step_tokens=40)
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=3, ignore_eos=True, logprobs=2)
    crowd = [{"prompt_token_ids": prompt} for prompt in prompts if len(prompt) in (5, 24, 64)]
    alone = [engine.generate(one, params, use_tqdm=False)[0].outputs[0] for one in crowd]
    together = engine.generate(crowd, params, use_tqdm=False)
    for output, expected in zip(together, alone, strict=True):
        assert output.outputs[0].token_ids == expected.token_ids
        assert output.outputs[0].logprobs == expected.logprobs
