"""The command line: its help, its errors, and its commands on a tiny model."""

import dataclasses
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from millrace.engine.cli import app
from millrace.engine.cli.settings import flag
from millrace.engine.cli.text_stream import Usage, interrupt_cancels
from millrace.engine.cli.tokenize import coloured
from millrace.engine.config import EngineConfig
from millrace.engine.server import grpc_server
from millrace.engine.text.tokenizer import load_tokenizer

COMMANDS = ("serve", "generate", "chat", "tokenize", "bench", "plan", "doctor", "compile")
LETTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ.,!?"


@pytest.fixture
def run(monkeypatch):
    """run(*arguments, input=None): the exit code and what was printed, on a wide terminal."""
    monkeypatch.setenv("COLUMNS", "200")
    runner = CliRunner()
    return lambda *arguments, input=None: runner.invoke(app, list(arguments), input=input)


@pytest.fixture(scope="module")
def model(tiny_llama):
    """A random model in a folder, with a tokenizer of one token for each of some characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {letter: index + 3 for index, letter in enumerate(LETTERS)}
    vocabulary |= {"<unk>": 0, "<s>": 1, "</s>": 2}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(tiny_llama.path / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}"
    (tiny_llama.path / "chat_template.jinja").write_text(template)
    return str(tiny_llama.path)


SMALL = ("--device", "cpu", "--dtype", "float32", "--kv-cache-memory", "1000000")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_every_option_with_its_text(run, command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.stdout


def test_serve_has_an_option_for_every_setting_with_unit_and_default(run):
    page = " ".join(run("serve", "--help").stdout.split())
    for field in dataclasses.fields(EngineConfig):
        assert flag(field.name) in page
        unit = {"s": "SECONDS"}.get(field.metadata["unit"], field.metadata["unit"].upper())
        assert unit in page
        assert field.metadata["help"].split(";")[0].split(",")[0] in page
        if field.default is not None:
            assert f"[default: {str(field.default).lower()}]" in page.lower()


def test_commands_that_do_not_listen_have_no_port(run):
    assert "--http-port" not in run("generate", "--help").stdout


def test_serve_is_given_the_merged_settings(run, monkeypatch, tmp_path):
    given = []

    async def serve(config):
        given.append(config)
        return 3

    monkeypatch.setattr(grpc_server, "serve", serve)
    monkeypatch.setenv("MILLRACE_MAX_WAITING", "5")
    (tmp_path / "c.yaml").write_text("max-running: 4\nport: 1\n")
    result = run(
        "serve", "--port", "2", "--no-prefix-caching", "--config", str(tmp_path / "c.yaml")
    )
    expected = EngineConfig(port=2, max_waiting=5, max_running=4, prefix_caching=False)
    assert given == [expected]
    assert result.exit_code == 3


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (("serve", "--max-running", "0"), 2, "max_running must be at least 1"),
        (("serve", "--max-running", "many"), 2, "--max-running"),
        (("serve", "--no-such-option"), 2, "--no-such-option"),
        (("serve", "--config", "/absent.yaml"), 2, "/absent.yaml"),
        (("generate", "hi", "--model", "/absent"), 1, "/absent"),
        (("tokenize", "hi", "--model", "/absent"), 1, "/absent"),
        (("generate", "hi", "--device", "tpu"), 2, "device"),
        (("bench", "--repeats", "0"), 2, "repeats"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(run, model, arguments, code, named):
    if "--device" in arguments:
        arguments = (*arguments, "--model", model)
    result = run(*arguments)
    assert result.exit_code == code
    assert named in result.stderr
    assert "Traceback" not in result.stderr


def test_a_target_that_does_not_answer_is_named(run, monkeypatch):
    monkeypatch.setattr("millrace.engine.cli.remote.CONNECT_TIMEOUT_S", 0.5)
    result = run("generate", "hi", "--target", "127.0.0.1:1")
    assert result.exit_code == 1
    assert "127.0.0.1:1" in result.stderr


# ---------------------------------------------------------------- generate and chat


def test_generate_streams_a_completion_and_says_what_it_took(run, model):
    arguments = ("generate", "--model", model, *SMALL, "--temperature", "0", "--max-tokens", "5")
    result = run(*arguments, "abc")
    assert result.exit_code == 0, result.stderr
    assert "3 prompt tokens, " in result.stderr
    assert result.stdout == run(*arguments, "-", input="abc").stdout


def test_generate_with_a_seed_repeats_itself(run, model):
    arguments = ("generate", "--model", model, *SMALL, "--max-tokens", "12", "--seed", "4", "ab")
    first = run(*arguments)
    assert first.stdout == run(*arguments).stdout
    assert first.stdout != run(*arguments, "--seed", "5").stdout


@pytest.mark.parametrize(
    ("option", "value", "field"),
    [
        ("--top-p", "0", "top_p"),
        ("--temperature", "-1", "temperature"),
        ("--max-tokens", "0", "max_tokens"),
    ],
)
def test_generate_names_a_bad_sampling_parameter(run, model, option, value, field):
    result = run("generate", "hi", "--model", model, *SMALL, option, value)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"millrace: {field} ")


def test_chat_remembers_and_forgets(run, model, monkeypatch):
    """The prompt grows with each turn until /reset."""
    from millrace.engine.cli import local

    prompts = []
    stream = local.LocalModel.stream

    def spy(self, prompt, params):
        prompts.append(list(prompt))
        return stream(self, prompt, params)

    monkeypatch.setattr(local.LocalModel, "stream", spy)
    arguments = ("chat", "--model", model, *SMALL, "--max-tokens", "2", "--system", "be brief")
    result = run(*arguments, input="one\n\ntwo\n/reset\nthree\n")
    assert result.exit_code == 0, result.stderr
    system, users = ("system", "be brief"), [p[-1] for p in prompts]
    assert users == [("user", "one"), ("user", "two"), ("user", "three")]
    assert [len(p) for p in prompts] == [2, 4, 2]
    assert all(p[0] == system for p in prompts)
    assert prompts[1][2][0] == "assistant"


def test_chat_goes_on_after_a_turn_that_does_not_fit(run, model):
    arguments = ("chat", "--model", model, *SMALL, "--max-tokens", "2", "--max-context", "32")
    result = run(*arguments, input="a" * 40 + "\nshort\n")
    assert result.exit_code == 0, result.stderr
    assert "at most 31 tokens" in result.stdout


def test_an_interrupt_cancels_the_answer_and_nothing_else():
    cancelled = []
    stream = SimpleNamespace(cancel=lambda: cancelled.append(True))
    before = signal.getsignal(signal.SIGINT)
    with interrupt_cancels(stream):
        os.kill(os.getpid(), signal.SIGINT)
    assert cancelled == [True]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_local_answer_can_be_cancelled_and_the_model_used_again(model):
    from millrace.engine.cli.local import LocalModel
    from millrace.engine.sampling_params import SamplingParams

    config = EngineConfig(model=model, device="cpu", dtype="float32", kv_cache_memory=1_000_000)
    source = LocalModel(config)
    endless = SamplingParams(max_tokens=400, ignore_eos=True, temperature=0.0)
    stream = source.stream("abc", endless)
    for _ in stream:
        stream.cancel()
    assert stream.usage is not None and stream.usage.finish == "cancelled"
    assert stream.usage.output_tokens < 400
    again = source.stream("abc", SamplingParams(max_tokens=4, ignore_eos=True, temperature=0.0))
    list(again)
    assert again.usage is not None and again.usage.finish == "length"
    assert again.usage.output_tokens == 4


def test_usage_tells_the_rate_of_the_tokens_after_the_first():
    usage = Usage(3, 11, first_token_s=1.0, total_s=3.0, finish="length")
    assert "5.0 tokens/s" in str(usage)
    assert "tokens/s" not in str(Usage(3, 0, 0.0, 0.0, "cancelled"))


# ---------------------------------------------------------------- tokenize, doctor, help


def test_tokenize_prints_a_line_for_each_token(run, model):
    result = run("tokenize", "ab!", "--model", model)
    assert result.stdout.splitlines() == ["3\t'a'", "4\t'b'", f"{LETTERS.index('!') + 3}\t'!'"]
    assert run("tokenize", "-", "--model", model, input="ab!").stdout == result.stdout


def test_tokenize_gives_neighbours_different_colours(model):
    text = coloured(
        load_tokenizer(SimpleNamespace(path=__import__("pathlib").Path(model))), [3, 4, 3]
    )
    assert text.plain == "a3 b4 a3 "
    styles = [str(span.style) for span in text.spans if "black" in str(span.style)]
    assert len(styles) == 3
    assert styles[0] != styles[1] and styles[0] == styles[2]


def test_doctor_names_backend_model_and_room(run, model):
    result = run("doctor", "--model", model, "--device", "cpu", "--dtype", "float32")
    assert result.exit_code == 0
    page = " ".join(result.stdout.split())
    for expected in ("cpu, float32, torch kernels", "LlamaForCausalLM", model, "blocks of 16", "✓"):
        assert expected in page
    assert "✗" not in page


def test_doctor_fails_where_something_is_missing(run, model):
    result = run("doctor", "--model", "/absent")
    assert result.exit_code == 1
    assert "✗" in result.stdout and "/absent" in result.stdout
    broken = run("doctor", "--model", model, "--kv-cache-memory", "1")
    assert broken.exit_code == 1
    assert "kv_cache_memory" in broken.stdout


def test_compile_needs_a_gpu_or_a_target(run):
    result = run("compile")
    assert result.exit_code == 2
    assert "--target" in result.stderr


def test_compile_names_the_targets_there_are(run):
    result = run("compile", "--target", "sm_1")
    assert result.exit_code == 2
    assert "sm_90" in result.stderr and "gfx942" in result.stderr


def test_compile_for_a_gpu_that_is_not_here_says_where_the_cache_is(run, monkeypatch, tmp_path):
    from millrace.kernels import aot

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    merge = [spec for spec in aot.SPECS if spec.name == "attention merge D128"]
    monkeypatch.setattr(aot, "SPECS", merge)
    result = run("compile", "--target", "sm_90")
    assert result.exit_code == 0
    assert f"1 kernels compiled into {tmp_path}" in result.stdout
    assert list(tmp_path.rglob("*.cubin"))


def test_compile_on_a_gpu_starts_an_engine_and_counts_what_was_compiled(run, monkeypatch):
    """Here without a GPU: the engine is a stand-in whose start compiles two kernels."""
    import triton

    from millrace.engine.core import build

    def build_core(config, location, progress):
        for cache_hit in (False, True, False):
            triton.knobs.compilation.listener(cache_hit=cache_hit, metadata={})

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(build, "build_core", build_core)
    result = run("compile")
    assert result.exit_code == 0
    assert "2 kernels compiled into" in result.stdout
    assert triton.knobs.compilation.listener is None


def test_doctor_agrees_with_the_engine_about_the_blocks(run, model):
    from millrace.engine import LLM

    llm = LLM(model, device="cpu", dtype="float32", kv_cache_memory=500_000)
    result = run(
        "doctor",
        "--model",
        model,
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--kv-cache-memory",
        "500000",
    )
    assert f"{llm.model.num_blocks} blocks of 16" in result.stdout


def test_the_module_runs_as_a_program():
    command = [sys.executable, "-P", "-m", "millrace.engine.cli", "--help"]
    page = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert all(command in page for command in COMMANDS)


def test_styles_are_ones_that_rich_knows():
    from millrace.engine.cli.tokenize import ID_STYLE, STYLES

    console = Console()
    assert all(console.get_style(style) for style in (*STYLES, ID_STYLE))
