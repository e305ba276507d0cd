"""Weights on their way to the device: sharded files, several threads, pinned buffers."""

import json
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from millrace.engine.errors import WeightsError
from millrace.engine.models.layers import WeightLoader, load_layers
from millrace.engine.models.registry import model_config
from millrace.engine.models.upload import Uploader, uploader
from millrace.engine.weights.checkpoint import open_checkpoint
from millrace.kernels.dispatch import REFERENCE

CPU = torch.device("cpu")
CPU0 = torch.device("cpu", 0)  # another device than the CPU of host tensors, to those who compare


@pytest.fixture(scope="module")
def sharded(tiny_llama, tmp_path_factory):
    """The tiny model in five files, tensors dealt out in turn."""
    folder = tmp_path_factory.mktemp("sharded")
    tensors = load_file(tiny_llama.path / "model.safetensors")
    places = {name: f"model-{i % 5}.safetensors" for i, name in enumerate(tensors)}
    for file in set(places.values()):
        save_file({n: t for n, t in tensors.items() if places[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text((tiny_llama.path / "config.json").read_text())
    return folder


def layers_of(folder, threads, progress=None):
    checkpoint = open_checkpoint(folder)
    config = model_config(checkpoint.config, {})
    loader = WeightLoader(checkpoint, REFERENCE, torch.float32, CPU)
    return loader, load_layers(loader, config, threads, progress)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_shards_and_threads_change_no_weight(tiny_llama, sharded, threads):
    single, expected = layers_of(tiny_llama.path, 1)
    loader, layers = layers_of(sharded, threads)
    assert loader.num_parameters == single.num_parameters > 0
    for layer, other in zip(layers, expected, strict=True):
        assert torch.equal(layer.qkv.weight, other.qkv.weight)
        assert torch.equal(layer.gate_up.weight, other.gate_up.weight)
        assert torch.equal(layer.mlp_norm, other.mlp_norm)


def test_progress_counts_up_in_order_whoever_is_first(sharded):
    seen = []
    layers_of(sharded, 3, lambda *step: seen.append(step))
    assert seen == [("layer 0", 1, 3), ("layer 1", 2, 3), ("layer 2", 3, 3)]


def test_an_error_in_a_thread_ends_the_loading_and_names_the_tensor(sharded, tmp_path):
    for file in sharded.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    index = tmp_path / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    del places["model.layers.1.mlp.down_proj.weight"]
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(WeightsError, match=r"layers\.1\.mlp\.down_proj"):
        layers_of(tmp_path, 4)


class LateEvent:
    """The copies recorded before it happen when it is waited for."""

    def __init__(self, queue):
        self.queue, self.copies = queue, []

    def record(self):
        self.copies, self.queue[:] = list(self.queue), []

    def synchronize(self):
        while self.copies:
            self.copies.pop(0)()


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 1000])
def test_a_pinned_buffer_is_not_refilled_before_the_device_has_read_it(monkeypatch, count):
    queue, events = [], []
    copy = torch.Tensor.copy_

    def late_copy(target, source, non_blocking=False):
        if not non_blocking:
            return copy(target, source)
        queue.append(lambda: copy(target, source))
        return target

    def make_event():
        events.append(LateEvent(queue))
        return events[-1]

    def pin(size):
        return torch.full((size,), 255, dtype=torch.uint8)

    upload = Uploader(CPU0, pin, make_event, chunk_bytes=128)
    tensor = torch.arange(count, dtype=torch.bfloat16).view(-1, 1)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", late_copy)
        arrived = upload(tensor)
        for event in events:
            event.synchronize()
    assert torch.equal(arrived, tensor)


def test_threads_have_buffers_of_their_own():
    pinned = []

    class Event:
        def record(self): ...

        def synchronize(self): ...

    def pin(size):
        pinned.append(threading.get_ident())
        return torch.empty(size, dtype=torch.uint8)

    upload = Uploader(CPU0, pin, Event, chunk_bytes=64)
    threads = [threading.Thread(target=upload, args=(torch.ones(9),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    upload(torch.ones(9))
    upload(torch.ones(9))
    assert len(pinned) == 2 * 4


def test_on_a_cpu_nothing_is_copied():
    tensor = torch.ones(3)
    assert uploader(CPU)(tensor) is tensor
