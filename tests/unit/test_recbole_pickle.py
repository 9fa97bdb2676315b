"""Files from elsewhere: whatever a pickle asks for, nothing but tensors and plain data comes of it."""

from __future__ import annotations

import builtins
import collections
import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from gru4recf_dist.errors import UserError
from gru4recf_dist.recbole.checkpoint_files import read_checkpoint, write_checkpoint
from gru4recf_dist.recbole.inert_pickle import Inert, load_pickle, load_torch, strings, text
from gru4recf_dist.recbole.token_ids import read_ids


class Calls:
    """Pickled, it asks for a call when it is loaded."""

    def __init__(self, function, *arguments) -> None:
        self.asked = (function, arguments)

    def __reduce__(self):
        return self.asked


class Holds:
    """An object of a class that is not allowed, with attributes, elements and items."""

    def __init__(self, **attributes) -> None:
        self.__dict__.update(attributes)


def traps(path) -> list[Calls]:
    """Each leaves the file ``path`` behind if it is run."""
    inner = pickle.dumps(Calls(os.system, f"touch {path}"))
    code = f"open({str(path)!r}, 'w').close()"
    return [
        Calls(os.system, f"touch {path}"),
        Calls(builtins.eval, code),
        Calls(builtins.exec, code),
        Calls(builtins.open, str(path), "w"),
        Calls(pickle.loads, inner),
        Calls(torch.storage._load_from_bytes, _saved(Calls(os.system, f"touch {path}"))),
    ]


def _saved(content, **arguments) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **arguments)
    return stream.getvalue()


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_nothing_that_a_pickle_asks_for_is_run(number, protocol, tmp_path):
    path = tmp_path / "run"
    trap = traps(path)[number]
    # The trap works: plain unpickling falls into it.
    pickle.loads(pickle.dumps(trap, protocol=protocol))
    assert path.exists()
    path.unlink()
    holder = {"config": Holds(trap=trap, inner=[trap]), "state_dict": {"a": torch.ones(2)}, "optimizer": trap}
    for content in (_saved(holder, pickle_protocol=protocol), _saved(trap, pickle_protocol=protocol)):
        loaded, skipped = load_torch(content)
        assert skipped and not path.exists()
    assert isinstance(loaded, Inert)
    load_pickle(pickle.dumps(holder, protocol=protocol))
    assert not path.exists()


def test_what_a_trap_would_call_is_named_and_what_stands_beside_it_is_read(tmp_path):
    path = tmp_path / "run"
    trap = Calls(os.system, f"touch {path}")
    config = Holds(final_config_dict={"model": "GRU4Rec", "trap": trap})
    weights = collections.OrderedDict(a=torch.arange(6.0).view(2, 3), b=torch.ones(2, dtype=torch.float64))
    url = tmp_path / "model.pth"
    url.write_bytes(_saved({"config": config, "state_dict": weights, "optimizer": trap, "other_parameter": trap}))
    checkpoint = read_checkpoint(str(url))
    assert not path.exists()
    assert checkpoint.model == "GRU4Rec" and checkpoint.ids is None
    assert set(checkpoint.skipped) == {f"{os.system.__module__}.system", f"{Holds.__module__}.Holds"}
    assert list(checkpoint.weights) == ["a", "b"]
    for name, tensor in weights.items():
        assert torch.equal(checkpoint.weights[name], tensor) and checkpoint.weights[name].dtype == tensor.dtype


def test_the_format_before_zip_files_is_refused_unread(tmp_path):
    path, url = tmp_path / "run", tmp_path / "old.pth"
    holder = {"config": Calls(os.system, f"touch {path}"), "state_dict": {}}
    url.write_bytes(_saved(holder, _use_new_zipfile_serialization=False))
    with pytest.raises(UserError, match=r"old\.pth: not a RecBole checkpoint .*zip file"):
        read_checkpoint(str(url))
    assert not path.exists()


def test_a_program_is_refused(tmp_path):
    url = tmp_path / "program.pth"
    with zipfile.ZipFile(url, "w", zipfile.ZIP_STORED) as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"program/{name}", b"")
    with pytest.raises(UserError, match="TorchScript"):
        read_checkpoint(str(url))


def test_a_saved_data_set_is_not_run_either(tmp_path):
    path, url = tmp_path / "run", tmp_path / "shop-SequentialDataset.pth"
    tokens = {"item_id": np.array(["[PAD]", "a", "b"]), "brand": np.array(["[PAD]", "x"], dtype=object)}
    trap = Calls(os.system, f"touch {path}")
    url.write_bytes(pickle.dumps(Holds(field2id_token=tokens, iid_field="item_id", inter_feat=trap), protocol=4))
    ids = read_ids(str(url))
    assert not path.exists()
    assert ids.items == ["[PAD]", "a", "b"] and ids.features == {"brand": ["[PAD]", "x"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "zip file"),
        (b"PK\x03\x04 and then nothing of a zip", "not a RecBole checkpoint"),
        (_saved([1, 2]), "no config and state_dict"),
        (_saved({"state_dict": {}}), "no config and state_dict"),
        (_saved({"config": 3, "state_dict": {}}), "config is not RecBole's"),
        (_saved({"config": {"model": "SASRec"}, "state_dict": {}}), "holds a model 'SASRec'"),
        (_saved({"config": {"model": ["GRU4Rec"]}, "state_dict": {}}), "holds a model"),
        (_saved({"config": {}, "state_dict": {}}), "holds a model None"),
        (_saved({"config": {"model": "GRU4Rec"}, "state_dict": {"a": 1}}), "more than tensors"),
        (_saved({"config": {"model": "GRU4Rec"}, "state_dict": Holds()}), "more than tensors"),
        (_saved({"config": {"model": "GRU4Rec"}, "state_dict": {"a": torch.arange(3)}}), "more than tensors"),
    ],
)
def test_what_is_no_checkpoint_is_one_clear_line(content, message, tmp_path):
    url = tmp_path / "model.pth"
    url.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_checkpoint(str(url))
    assert str(url) in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_checkpoint_is_one_clear_line(tmp_path):
    url = tmp_path / "model.pth"
    weights = {"a": torch.rand(50, 50)}
    with url.open("wb") as stream:
        write_checkpoint(stream, {"model": "GRU4Rec"}, weights, 0.1)
    whole = url.read_bytes()
    for cut in range(0, len(whole), 997):
        url.write_bytes(whole[:cut])
        with pytest.raises(UserError, match="not a RecBole checkpoint"):
            read_checkpoint(str(url))
    # Tensors that reach beyond what is stored.
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    largest = max((name for name in members if "/data/" in name), key=lambda name: len(members[name]))
    members[largest] = members[largest][:8]
    with zipfile.ZipFile(url, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(UserError, match="not a RecBole checkpoint"):
        read_checkpoint(str(url))


@pytest.mark.parametrize("values", [["[PAD]", "a", "größer", "\U0001f600"], ["one"], ["", "a"]])
@pytest.mark.parametrize("dtype", [None, object])
def test_arrays_of_text_are_read_without_numpy_making_them(values, dtype):
    loaded, _ = load_pickle(pickle.dumps(np.array(values, dtype=dtype), protocol=4))
    assert strings(loaded) == values


def test_arrays_of_other_things_are_none():
    for array in (np.arange(3), np.array([1, "a"], dtype=object), np.array([b"a"])):
        loaded, _ = load_pickle(pickle.dumps(array, protocol=4))
        assert strings(loaded) is None
    assert strings(["a"]) is None
    loaded, _ = load_pickle(pickle.dumps(np.str_("größer"), protocol=4))
    assert text(loaded) == "größer" and text("plain") == "plain" and text(3) is None
