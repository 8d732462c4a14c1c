"""What torch.save wrote is read as torch reads it, and nothing of it runs."""

from __future__ import annotations

import io
import random
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.errors import InvalidFile, NotFound, Refused
from lorakit.files.torch_file import Stub, is_cut_short, is_torch_file, read_pickle_with_stubs, read_torch_file
from lorakit.files.torch_tensors import DTYPES, StoredTorchTensor, TorchStorage, load_torch_tensor

NEW_AND_OLD = pytest.mark.parametrize("new", [True, False], ids=["zip", "before torch 1.6"])

OLD = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64", "complex64")


def saved(file: Path, value: Any, *, new: bool = True) -> Path:
    torch.save(value, file, _use_new_zipfile_serialization=new)
    return file


def loaded(value: Any) -> Any:
    """With the tensors in place of where they stand."""
    if isinstance(value, StoredTorchTensor):
        return load_torch_tensor("it", value)
    if isinstance(value, dict):
        return {key: loaded(one) for key, one in value.items()}
    return type(value)(loaded(one) for one in value) if isinstance(value, list | tuple) else value


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert found.numel() < 2 or found.stride() == expected.stride()
        assert as_bytes(found) == as_bytes(expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected
        assert type(found) is type(expected)


def as_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8).numpy())


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer, Any]:
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7), torch.nn.Linear(7, 3, bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, amsgrad=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for _ in range(3):
        model(torch.randn(2, 5)).square().sum().backward()
        optimizer.step()
        scheduler.step()
    return model, optimizer, scheduler


@NEW_AND_OLD
def test_states_of_model_optimizer_and_scheduler_are_those_that_torch_loads(tmp_path: Path, new: bool) -> None:
    model, optimizer, scheduler = trained()
    value = {
        "epoch": 3, "global_step": 12, "pytorch-lightning_version": "2.6.6", "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()], "lr_schedulers": [scheduler.state_dict()],
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 3}}}}, "none": None,
        "hparams": OrderedDict(rank=8, names=("q", "v"), both={1, 2}), "raw": b"\x00\xff", "rate": 1e-4, "z": 1 + 2j,
    }  # fmt: skip
    file = saved(tmp_path / "it.ckpt", value, new=new)
    assert_same(loaded(read_torch_file(file)), torch.load(file, weights_only=True))


@pytest.mark.parametrize(
    ("dtype", "new"), [*((dtype, True) for dtype in DTYPES), *((dtype, False) for dtype in DTYPES if dtype in OLD)]
)
def test_every_dtype_is_read(tmp_path: Path, dtype: str, new: bool) -> None:
    kind = getattr(torch, dtype)
    values = torch.arange(12).float().exp2().to(kind) if dtype == "float8_e8m0fnu" else torch.arange(12).to(kind)
    file = saved(tmp_path / "it.pt", {"t": values.reshape(3, 4), "none": values[:0]}, new=new)
    assert_same(loaded(read_torch_file(file)), torch.load(file, weights_only=True))


@NEW_AND_OLD
def test_views_are_read_as_views(tmp_path: Path, new: bool) -> None:
    whole = torch.arange(60, dtype=torch.float32).reshape(5, 12)
    value = {
        "whole": whole, "columns": whole[:, 3:7], "transposed": whole.T, "steps": whole[::2, ::3],
        "row": whole[2], "one": whole[1, 1], "spread": whole[0, :1].expand(1000), "empty": whole[:0],
        "parameter": torch.nn.Parameter(whole[1:]), "buffer": torch.nn.Buffer(whole[:1]),
    }  # fmt: skip
    file = saved(tmp_path / "it.pt", value, new=new)
    found = read_torch_file(file)
    assert_same(loaded(found), {name: one.detach() for name, one in torch.load(file, weights_only=True).items()})
    assert found["transposed"].storage == found["whole"].storage
    assert [found[name].is_contiguous for name in ("whole", "columns", "row", "empty")] == [True, False, True, True]


@settings(max_examples=60)
@given(
    shape=st.lists(st.integers(0, 4), max_size=4),
    steps=st.lists(st.integers(1, 3), min_size=4, max_size=4),
    order=st.permutations(range(4)),
    new=st.booleans(),
)
def test_any_view_is_the_tensor_that_torch_loads(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], steps: list[int], order: list[int], new: bool
) -> None:
    whole = torch.arange(12 ** len(shape), dtype=torch.int32).reshape([12] * len(shape))
    view = whole[tuple(slice(step, step + size * step, step) for size, step in zip(shape, steps, strict=False))]
    view = view.permute([axis for axis in order if axis < len(shape)])
    file = saved(tmp_path_factory.mktemp("view") / "it.pt", view, new=new)
    found = read_torch_file(file)
    assert_same(loaded(found), torch.load(file, weights_only=True))
    assert found.nbytes == view.nbytes
    if view.numel():
        assert found.is_contiguous == view.is_contiguous()


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.usefixtures("plain_modules")
def test_what_is_no_view_of_numbers_is_a_stub(tmp_path: Path) -> None:
    value = {
        "sparse": torch.eye(3).to_sparse(),
        "quantised": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
        "conjugate": torch.ones(2, dtype=torch.complex64).conj(),
        "wide": torch.ones(2, dtype=torch.complex128),
        "meta": torch.ones(3, device="meta"),
        "dtype": torch.bfloat16,
        "device": torch.device("cuda", 1),
    }
    found = read_torch_file(saved(tmp_path / "it.pt", value))
    assert {type(one) for one in found.values()} == {Stub}
    assert (found["dtype"].name, found["dtype"].args) == ("torch.bfloat16", None)
    assert (found["device"].name, found["device"].args) == ("torch.device", ("cuda", 1))


def test_of_a_dtype_that_safetensors_lacks_the_bytes_are_there(tmp_path: Path) -> None:
    wide = torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex128)
    file = saved(tmp_path / "it.pt", wide)
    storage = read_torch_file(file).args[0]
    assert storage.name == "torch.ComplexDoubleStorage"
    found, count = storage.args
    assert (count, file.read_bytes()[found.start : found.end]) == (2, wide.numpy().tobytes())
    with pytest.raises(Refused, match="a dtype that safetensors lacks: save it again"):
        read_torch_file(saved(tmp_path / "old.pt", wide, new=False))


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@NEW_AND_OLD
def test_a_whole_module_is_a_stub_with_its_parameters(tmp_path: Path, new: bool) -> None:
    model = torch.nn.Linear(3, 2)
    found = read_torch_file(saved(tmp_path / "it.pt", model, new=new))
    assert found.name == "torch.nn.modules.linear.Linear"
    assert_same(loaded(found.fields["_parameters"]), {name: one.data for name, one in model.named_parameters()})


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_a_bare_storage_is_a_range_of_bytes(tmp_path: Path) -> None:
    file = saved(tmp_path / "it.pt", [torch.arange(3, dtype=torch.int16).untyped_storage(), torch.FloatStorage([1.0])])
    bare, typed = read_torch_file(file)
    assert isinstance(bare, TorchStorage)
    assert (bare.dtype, file.read_bytes()[bare.start : bare.end]) == ("U8", b"\0\0\1\0\2\0")
    assert (typed.dtype, typed.nbytes) == ("F32", 4)


def test_states_of_random_numbers_keep_their_bytes(tmp_path: Path) -> None:
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    found = read_torch_file(saved(tmp_path / "rng_state.pth", state))
    assert found["python"] == state["python"]
    assert torch.equal(loaded(found["cpu"]), state["cpu"])
    kind, keys, *rest = found["numpy"]
    assert (kind, rest) == (state["numpy"][0], list(state["numpy"][2:]))
    _, shape, dtype, _, content = keys.state
    assert keys.name.endswith("multiarray._reconstruct")
    assert (shape, dtype.args[0]) == ((624,), "u4")
    assert np.array_equal(np.frombuffer(content, "<u4"), state["numpy"][1])


def test_arguments_of_a_trainer_are_a_stub_with_their_fields(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    arguments = TrainingArguments(output_dir=str(tmp_path), learning_rate=3e-4, save_steps=50, use_cpu=True)
    found = read_torch_file(saved(tmp_path / "training_args.bin", arguments))
    assert isinstance(found, Stub)
    assert found.name == "transformers.training_args.TrainingArguments"
    assert (found.fields["learning_rate"], found.fields["save_steps"]) == (3e-4, 50)
    assert found.fields["save_strategy"].args == ("steps",)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_metadata_of_a_distributed_checkpoint_says_where_its_tensors_stand(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    model, optimizer, _ = trained()
    dcp.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3}, checkpoint_id=tmp_path)
    metadata = read_pickle_with_stubs(tmp_path / ".metadata")
    described = metadata.fields["state_dict_metadata"]["model.0.weight"].fields
    assert described["size"] == (7, 5)
    assert described["properties"].state[0].name == "torch.float32"
    found = {}
    for index, place in metadata.fields["storage_data"].items():
        file = tmp_path / place.fields["relative_path"]
        value = read_torch_file(file, place.fields["offset"], place.fields["length"])
        found[index.fields["fqn"]] = loaded(value.getvalue() if isinstance(value, io.BytesIO) else value)
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[f"model.{name}"], tensor)
    assert found["step"] == 3


@NEW_AND_OLD
def test_a_file_cut_anywhere_is_known_to_be(tmp_path: Path, new: bool) -> None:
    whole = saved(tmp_path / "whole.pt", {"a": torch.ones(7), "b": torch.ones(2, 3)}, new=new).read_bytes()
    file = tmp_path / "it.pt"
    for size in range(0, len(whole), 1 if len(whole) < 1000 else 7):
        file.write_bytes(whole[:size])
        with pytest.raises(InvalidFile, match=r"cut short|no file that torch\.save wrote"):
            read_torch_file(file)
        assert is_cut_short(file)
    file.write_bytes(whole)
    assert not is_cut_short(file)


def test_a_torch_file_inside_of_a_tensor_is_not_taken_for_the_end(tmp_path: Path) -> None:
    inner = saved(tmp_path / "inner.pt", torch.ones(3)).read_bytes()
    file = saved(tmp_path / "it.pt", torch.frombuffer(bytearray(inner), dtype=torch.uint8))
    content = file.read_bytes()
    assert loaded(read_torch_file(file)).numpy().tobytes() == inner
    file.write_bytes(content[: content.index(inner) + len(inner)])
    assert is_cut_short(file)
    with pytest.raises(InvalidFile, match="cut short"):
        read_torch_file(file)


@NEW_AND_OLD
def test_a_torch_file_is_known_by_its_beginning(tmp_path: Path, new: bool) -> None:
    file = saved(tmp_path / "noname", torch.ones(3), new=new)
    assert is_torch_file(file)
    file.write_bytes(file.read_bytes()[:60])
    assert is_torch_file(file)


def test_other_files_are_none(tmp_path: Path) -> None:
    other = tmp_path / "other.bin"
    for content in (b"", b"PK\x03\x04", b"\x80\x04N.", b"{}", b"\0" * 100):
        other.write_bytes(content)
        assert not is_torch_file(other)
        with pytest.raises(InvalidFile):
            read_torch_file(other)
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("model.safetensors", b"x")
    assert not is_torch_file(other)
    with pytest.raises(InvalidFile, match=r"not one that torch\.save wrote"):
        read_torch_file(other)
    assert not is_torch_file(tmp_path)
    assert not is_torch_file(tmp_path / "nowhere")
    with pytest.raises(NotFound):
        read_torch_file(tmp_path / "nowhere")


def test_a_plain_pickle_is_named_as_that(tmp_path: Path) -> None:
    file = tmp_path / "it.pkl"
    file.write_bytes(b"\x80\x04N.")
    with pytest.raises(InvalidFile, match=r"a plain pickle.*save it again with torch\.save"):
        read_torch_file(file)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_program_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "program.pt"
    torch.jit.script(torch.nn.ReLU()).save(str(file))
    with pytest.raises(Refused, match=r"TorchScript program.*state_dict"):
        read_torch_file(file)


def test_a_file_of_a_big_endian_machine_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "it.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.byteorder", "big")
        torch.save(torch.ones(3), file)
    with pytest.raises(Refused, match="big-endian"):
        read_torch_file(file)


def test_a_file_without_checksums_is_read(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        file = saved(tmp_path / "it.pt", torch.ones(3))
    finally:
        torch.serialization.set_crc32_options(before)
    assert_same(loaded(read_torch_file(file)), torch.ones(3))


def test_an_archive_of_before_torch_2_is_read(tmp_path: Path) -> None:
    """Those had no byteorder, and called their folder `archive`."""
    source = saved(tmp_path / "archive.pt", {"w": torch.arange(5)})
    file = tmp_path / "old.pt"
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(file, "w") as old:
        for name in ("archive/data.pkl", "archive/data/0", "archive/version"):
            old.writestr(name, archive.read(name))
    assert is_torch_file(file)
    assert_same(loaded(read_torch_file(file)), torch.load(file, weights_only=True))
