"""Settings: a flag beats the environment, which beats the file; each bad value is named."""

import dataclasses

import pytest

from millrace.engine.config import EngineConfig, load_config
from millrace.engine.errors import InvalidRequest


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for field in dataclasses.fields(EngineConfig):
        monkeypatch.delenv(f"MILLRACE_{field.name.upper()}", raising=False)


@pytest.fixture
def yaml_file(tmp_path):
    def write(text):
        path = tmp_path / "server.yaml"
        path.write_text(text)
        return path

    return write


def test_nothing_given_gives_the_defaults():
    assert load_config({}) == EngineConfig()
    assert load_config({"port": None, "prefix_caching": None}) == EngineConfig()


def test_a_flag_beats_the_environment_which_beats_the_file(monkeypatch, yaml_file):
    path = yaml_file("port: 1\nhttp_port: 1\nmax_waiting: 1\n")
    monkeypatch.setenv("MILLRACE_PORT", "2")
    monkeypatch.setenv("MILLRACE_HTTP_PORT", "2")
    config = load_config({"port": 3}, path)
    assert (config.port, config.http_port, config.max_waiting) == (3, 2, 1)


def test_a_flag_can_say_false_and_zero(monkeypatch):
    monkeypatch.setenv("MILLRACE_PREFIX_CACHING", "true")
    monkeypatch.setenv("MILLRACE_PORT", "2")
    config = load_config({"prefix_caching": False, "port": 0})
    assert (config.prefix_caching, config.port) == (False, 0)


def test_every_setting_can_come_from_each_place(monkeypatch, yaml_file):
    """Both spellings of the file's keys, and the types that the fields declare."""
    values = {
        **{"model": "m", "revision": "r", "served_name": "s", "device": "cpu", "dtype": "float32"},
        **{"attention_backend": "torch", "threads": 1, "max_context": 99, "max_running": 7},
        **{"max_waiting": 8, "max_waiting_tokens": 9, "max_step_tokens": 64, "block_size": 32},
        **{"kv_cache_memory": 10, "gpu_memory_fraction": 0.5, "prefix_caching": False},
        **{"swap_memory": 1 << 20},
        **{"host": "::1", "port": 11, "http_port": 12, "drain_timeout_s": 1.5},
        **{"default_timeout_s": 2.5, "seed": 13, "policy": "fair_share", "max_wait_s": 3.5},
        **{"priority_aging_s": 4.5, "itl_target_ms": 50.0, "run_ahead": 2},
        **{"deterministic": True},
        **{"tenant_weights": {"gold": 4.0, "acme:eu": 0.5}},
    }
    expected = EngineConfig(**values)
    assert set(values) == {field.name for field in dataclasses.fields(EngineConfig)}
    assert load_config(values) == expected
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in values.items()]
    assert load_config({}, yaml_file("\n".join(lines))) == expected
    spelled = values | {"tenant_weights": "gold=4,acme:eu=0.5"}
    assert load_config(spelled) == expected
    for name, value in spelled.items():
        monkeypatch.setenv(f"MILLRACE_{name.upper()}", str(value))
    assert load_config({}) == expected


def test_an_empty_variable_counts_as_unset(monkeypatch):
    monkeypatch.setenv("MILLRACE_THREADS", "")
    assert load_config({}).threads is None


def test_an_empty_file_is_no_settings(yaml_file):
    assert load_config({}, yaml_file("# nothing yet\n")) == EngineConfig()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", "int8"),
        ("attention_backend", "flash"),
        ("threads", 0),
        ("max_context", 1),
        ("max_running", 0),
        ("max_waiting", 0),
        ("max_waiting_tokens", 0),
        ("max_step_tokens", 0),
        ("run_ahead", -1),
        ("block_size", 24),
        ("policy", "lottery"),
        ("max_wait_s", -1.0),
        ("priority_aging_s", -1.0),
        ("itl_target_ms", -1.0),
        ("tenant_weights", {"gold": 0.0}),
        ("tenant_weights", {"gold": 1000.5}),
        ("tenant_weights", {"gold": float("inf")}),
        ("tenant_weights", {"two words": 1.0}),
        ("tenant_weights", {"": 1.0}),
        ("tenant_weights", {"x" * 65: 1.0}),
        ("kv_cache_memory", 0),
        ("swap_memory", -1),
        ("gpu_memory_fraction", 0.0),
        ("gpu_memory_fraction", 1.01),
        ("gpu_memory_fraction", float("nan")),
        ("port", -1),
        ("http_port", -1),
        ("drain_timeout_s", -0.1),
        ("drain_timeout_s", float("nan")),
        ("default_timeout_s", -1.0),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(InvalidRequest) as caught:
        EngineConfig(**{name: value})
    assert caught.value.field == name
    assert caught.value.limit
    assert name in str(caught.value) and str(value) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("port", "http"),
        ("gpu_memory_fraction", "most"),
        ("prefix_caching", "maybe"),
        ("seed", "1.5"),
        ("tenant_weights", "gold"),
        ("tenant_weights", "gold=4,gold=2"),
        ("tenant_weights", "gold=much"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(monkeypatch, yaml_file, name, text):
    with pytest.raises(InvalidRequest) as in_file:
        load_config({}, yaml_file(f"{name}: {text}\n"))
    monkeypatch.setenv(f"MILLRACE_{name.upper()}", text)
    with pytest.raises(InvalidRequest) as in_environment:
        load_config({})
    for caught in (in_file, in_environment):
        assert caught.value.field == name
        assert name in str(caught.value) and text in str(caught.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("prot: 1\n", "prot"),
        ("- port\n", "not a mapping"),
        ("port: [1\n", "server.yaml"),
        ("port: 1\nport: !!python/object:os.system {}\n", "server.yaml"),
    ],
)
def test_a_bad_file_is_refused_with_what_is_wrong(yaml_file, text, named):
    with pytest.raises(InvalidRequest, match=named):
        load_config({}, yaml_file(text))


def test_a_missing_file_is_refused_by_its_path(tmp_path):
    with pytest.raises(InvalidRequest, match=r"absent\.yaml"):
        load_config({}, tmp_path / "absent.yaml")


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig().port = 1  # type: ignore[misc]
