"""The streamed file is what safetensors itself would read, whatever goes in; and a failure leaves nothing."""

from __future__ import annotations

import json
import resource
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qlora_cli.errors import Exit, UserError
from qlora_cli.model.safetensors_stream import (
    DTYPES,
    Entry,
    SafetensorsWriter,
    disk,
    read_checkpoint,
    read_entries,
    read_tensor,
)


def random_tensor(dtype, shape, seed):
    """Random bytes as a tensor: every bit pattern, NaN included; 0 and 1 for bool."""
    generator = torch.Generator().manual_seed(seed)
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    return torch.randint(0, high, (num_bytes,), generator=generator, dtype=torch.uint8).view(dtype).reshape(shape)


def same(one, other):
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )


def write(path, tensors, order=None, metadata=None):
    entries = [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with SafetensorsWriter(path, entries, metadata) as writer:
        for name in order or tensors:
            writer.write(name, tensors[name])


tensors = st.dictionaries(
    st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__" and name.isprintable()),
    st.builds(
        random_tensor,
        st.sampled_from(list(DTYPES.values())),
        st.lists(st.integers(0, 5), max_size=4).map(tuple),
        st.integers(0, 2**32),
    ),
    max_size=6,
)


@settings(max_examples=80, deadline=None)
@given(tensors, st.randoms())
def test_any_tensors_in_any_order_are_read_back_by_safetensors(given_tensors, random):
    order = list(given_tensors)
    random.shuffle(order)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        write(path, given_tensors, order)
        loaded = load_file(path)
        assert loaded.keys() == given_tensors.keys()
        assert all(same(loaded[name], tensor) for name, tensor in given_tensors.items())
        entries = {entry.name: entry for entry in read_entries(path)}
        assert entries.keys() == given_tensors.keys()
        assert all(same(read_tensor(path, name), tensor) for name, tensor in given_tensors.items())
        assert sum(entry.num_bytes for entry in entries.values()) == sum(t.nbytes for t in given_tensors.values())


def test_file_equals_the_library_s_byte_for_byte(tmp_path):
    content = {"b": torch.randn(3, 4), "a": torch.randn(5).half(), "c": torch.tensor(7)}
    save_file(content, tmp_path / "theirs", metadata={"format": "pt"})
    write(tmp_path / "ours", content, metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_strided_tensors_and_metadata_are_kept(tmp_path):
    content = {"t": torch.randn(4, 6).T, "slice": torch.randn(6, 6)[:, ::2]}
    write(tmp_path / "file", content, metadata={"format": "pt"})
    assert all(torch.equal(load_file(tmp_path / "file")[name], tensor) for name, tensor in content.items())
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_failure_leaves_no_file(tmp_path):
    entries = [Entry("a", torch.float32, (2,)), Entry("b", torch.float32, (2,))]
    with pytest.raises(KeyError), SafetensorsWriter(tmp_path / "file", entries) as writer:
        writer.write("unknown", torch.zeros(2))
    assert list(tmp_path.iterdir()) == []


def test_a_forgotten_tensor_is_a_bug_and_leaves_no_file(tmp_path):
    with (
        pytest.raises(AssertionError, match="never written"),
        SafetensorsWriter(tmp_path / "file", [Entry("a", torch.float32, (2,))]),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_another_shape_or_a_name_twice_is_a_bug(tmp_path):
    entry = Entry("a", torch.float32, (2,))
    with pytest.raises(AssertionError, match="a: not as announced"), SafetensorsWriter(tmp_path / "f", [entry]) as w:
        w.write("a", torch.zeros(3))
    with pytest.raises(AssertionError, match="a twice"):
        SafetensorsWriter(tmp_path / "f", [entry, entry])


def test_a_full_disk_names_the_bytes_needed_and_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # Python ignores SIGXFSZ: writes fail with EFBIG
    try:
        with pytest.raises(UserError) as caught:
            write(tmp_path / "file", {"a": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot write: File too large; 400,0" in str(caught.value)
    assert "ree space there" in str(caught.value)
    assert caught.value.code == Exit.FAILED
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_folder_is_the_user_s_error(tmp_path):
    (tmp_path / "plain").write_text("a file, not a folder")
    with pytest.raises(UserError, match="cannot write: Not a directory; 12 bytes are needed"), disk(tmp_path, 12):
        (tmp_path / "plain" / "x").write_text("")


def sharded(folder, weight_map=None):
    save_file({"a": torch.zeros(2), "b": torch.ones(3)}, folder / "one.safetensors")
    save_file({"c": torch.zeros(4).half()}, folder / "two.safetensors")
    weight_map = weight_map or {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_single_and_sharded_folders_are_read(tmp_path):
    sharded(tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    assert {shard: [e.name for e in entries] for shard, entries in checkpoint.shards.items()} == {
        "one.safetensors": ["a", "b"],
        "two.safetensors": ["c"],
    }
    assert checkpoint.entries()["c"] == Entry("c", torch.float16, (4,))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")  # transformers prefers the single file
    assert list(read_checkpoint(tmp_path).entries()) == ["x"]


def test_a_missing_shard_is_named(tmp_path):
    sharded(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(UserError, match=r"two\.safetensors: this file is missing\. .omplete the folder"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b"\xff" * 8 + b[8:], lambda b: b[:-1], lambda b: b[:20]])
def test_a_damaged_shard_is_named(tmp_path, damage):
    sharded(tmp_path)
    shard = tmp_path / "two.safetensors"
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(UserError, match=r"two\.safetensors: damaged safetensors file .*.opy or download it again"):
        read_checkpoint(tmp_path)


def test_an_index_that_names_a_missing_tensor_says_which(tmp_path):
    sharded(tmp_path, {"a": "one.safetensors", "ghost": "two.safetensors"})
    with pytest.raises(UserError, match=r"tensor ghost is not in two\.safetensors"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', "\xff"])
def test_a_damaged_index_is_named(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match="damaged index: no JSON with a weight_map"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("shard", ["../one.safetensors", "/etc/x.safetensors", "one.bin", "sub/one.safetensors"])
def test_an_index_cannot_point_outside_its_folder(tmp_path, shard):
    sharded(tmp_path, {"a": shard})
    with pytest.raises(UserError, match="is not the name of a safetensors file"):
        read_checkpoint(tmp_path)


def test_pickles_are_refused_and_an_empty_folder_says_what_it_lacks(tmp_path):
    with pytest.raises(UserError, match=r"found neither model\.safetensors nor model\.safetensors\.index\.json"):
        read_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match=r"only the pickle pytorch_model\.bin, which is never read"):
        read_checkpoint(tmp_path)


def test_a_dtype_that_we_do_not_know_is_named(tmp_path):
    save_file({"w": torch.zeros(4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="tensor w has dtype F8_E4M3, which is not available yet"):
        read_checkpoint(tmp_path)
