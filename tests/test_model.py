"""Initial parameters, and model files."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from crnn_np import model
from crnn_np.errors import ModelError
from crnn_np.model import Accumulators, Params, Spec

USER_IDS = np.array(["1", "zwei\nZeilen", "", "  ", "\x00", "Ünïcode"], object)
ITEM_IDS = np.array(["東京", "🙂", 'a"b', "tab\there", "\r\n", "a,b", "x" * 5000], object)
SETTINGS = {"hidden_size": 3, "eps": 1e-8, "refit": True, "validation_range": [3, 500], "x": "é"}


def make(dtype="float32", with_accumulators=True):
    spec = Spec(hidden_size=3, dtype=dtype)
    params = model.initialise(spec, USER_IDS.size, ITEM_IDS.size, 1)
    acc = None
    if with_accumulators:
        acc = model.new_accumulators(params)
        rng = np.random.default_rng(2)
        for block in acc[:3]:
            block += rng.random(block.shape).astype(dtype)
        acc.stamp[:] = rng.integers(0, 10**12, acc.stamp.size)
        acc.step[0] = 10**12
    return params, acc, SETTINGS, USER_IDS, ITEM_IDS


# Initial parameters


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("cell", "sharing", "shapes"),
    [
        ("gru", "collaborative", [(7, 5, 15), (9, 15), (9, 5)]),
        ("gru", "pooled", [(1, 5, 15), (9, 15), (9, 5)]),
        ("tanh", "collaborative", [(7, 5, 5), (9, 5), (9, 5)]),
        ("tanh", "pooled", [(1, 5, 5), (9, 5), (9, 5)]),
    ],
)
def test_shapes(dtype, cell, sharing, shapes):
    spec = Spec(hidden_size=5, cell=cell, sharing=sharing, dtype=dtype)
    params = model.initialise(spec, 7, 9, 0)
    assert [block.shape for block in params] == shapes
    assert {block.dtype.name for block in params} == {dtype}
    acc = model.new_accumulators(params)
    assert [block.shape for block in acc] == [*shapes, (9,), (1,)]
    assert [block.dtype.name for block in acc] == [dtype] * 3 + ["int64"] * 2
    assert not any(block.any() for block in acc)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("D", [1, 8, 32])
def test_initial_weights_are_normal_with_variance_1_over_D(dtype, D):
    spec = Spec(hidden_size=D, dtype=dtype)
    params = model.initialise(spec, 4000 // (3 * D) + 1, 4000 // D + 1, 3)
    for block in params:
        z = block.ravel().astype(float) * np.sqrt(D)
        n = z.size
        assert n >= 4000
        assert abs(z.mean()) < 5 / np.sqrt(n)
        assert abs((z**2).mean() - 1) < 5 * np.sqrt(2 / n)
        assert abs((z**4).mean() - 3) < 5 * np.sqrt(96 / n)


def test_each_block_has_a_stream_of_its_own():
    blocks = model.initialise(Spec(hidden_size=20, cell="tanh"), 25, 500, 0)
    flat = [block.ravel()[:10_000] * np.sqrt(20) for block in blocks]
    for i in range(3):
        for j in range(i):
            assert abs(np.mean(flat[i] * flat[j])) < 5 / np.sqrt(10_000)


def test_a_block_does_not_depend_on_the_others():
    spec = Spec(hidden_size=4)
    one = model.initialise(spec, 3, 6, 0)
    other = model.initialise(spec, 5, 6, 0)
    pooled = model.initialise(Spec(hidden_size=4, sharing="pooled"), 3, 6, 0)
    for name in ("W_in", "W_out"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        np.testing.assert_array_equal(getattr(one, name), getattr(pooled, name))
    np.testing.assert_array_equal(one.W_h, other.W_h[:3])


def test_seeds():
    draws = [model.initialise(Spec(hidden_size=4), 3, 6, seed) for seed in (0, 0, 1, 2**62)]
    for block in range(3):
        values = [draw[block].tobytes() for draw in draws]
        assert values[0] == values[1]
        assert len(set(values)) == 3


# Model files


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("with_accumulators", [True, False])
def test_load_returns_what_was_saved(tmp_path, dtype, with_accumulators):
    saved = make(dtype, with_accumulators)
    model.save(tmp_path / "m", *saved)
    loaded = model.load(tmp_path / "m")
    blocks = [(saved[0], loaded.params)]
    if with_accumulators:
        blocks.append((saved[1], loaded.accumulators))
        assert isinstance(loaded.accumulators, Accumulators)
    else:
        assert loaded.accumulators is None
    assert isinstance(loaded.params, Params)
    for ours, theirs in blocks:
        for a, b in zip(ours, theirs, strict=True):
            assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
            assert b.flags.writeable
    assert loaded.settings == SETTINGS
    for ours, theirs in ((USER_IDS, loaded.user_ids), (ITEM_IDS, loaded.item_ids)):
        assert theirs.dtype == object
        assert theirs.tolist() == ours.tolist()


def test_others_may_read_a_file_as_any_other(tmp_path):
    model.save(tmp_path / "m", *make())
    (tmp_path / "other").touch()
    assert (tmp_path / "m").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_ids_that_are_all_empty(tmp_path):
    params, acc, settings, _, items = make()
    users = np.array([""] * USER_IDS.size, object)
    model.save(tmp_path / "m", params, acc, settings, users, items)
    assert model.load(tmp_path / "m").user_ids.tolist() == users.tolist()


def test_a_view_is_saved_as_its_values(tmp_path):
    params, *rest = make()
    strided = Params(*(np.repeat(block, 2, axis=-1)[..., ::2] for block in params))
    model.save(tmp_path / "m", strided, *rest)
    for a, b in zip(params, model.load(tmp_path / "m").params, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_path_may_be_text(tmp_path):
    model.save(str(tmp_path / "m"), *make())
    assert model.load(str(tmp_path / "m")).settings == SETTINGS
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_file_repeats_to_the_byte(tmp_path):
    files = [tmp_path / str(n) for n in range(8)]
    for file in files:
        model.save(file, *make())
    assert len({file.read_bytes() for file in files}) == 1


def bfloat16_file():
    header = {"weight": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"\0\0\0\0"


def others(folder):
    """Files that are no models, by what is wrong with them."""
    model.save(folder / "whole", *make())
    whole = (folder / "whole").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    files = {
        "empty": b"",
        "in its first bytes": whole[:5],
        "in its header": whole[: header // 2],
        "without its arrays": whole[:header],
        "one byte short": whole[:-1],
        "one byte too long": whole + b"\0",
        "text": b"user,item,time\n" * 50,
        "of types that NumPy lacks": bfloat16_file(),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    array = {"weight": np.zeros(2, np.float32)}
    save_file(array, folder / "without metadata")
    save_file(array, folder / "of another program", {"format": "pt"})
    save_file(array, folder / "of another version", {"crnn_np model 999": "{}"})
    save_file(array, folder / "without parameters", {model.FORMAT: "{}"})
    params = {f"params.{name}": block for name, block in make()[0]._asdict().items()}
    save_file(params, folder / "without ids", {model.FORMAT: "{}"})
    (folder / "a folder").mkdir()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("missing", "no such model file"),
        ("a folder", "no such model file"),
        ("missing/model", "no such model file"),
        ("empty", "cut short"),
        ("in its first bytes", "cut short"),
        ("in its header", "cut short"),
        ("without its arrays", "cut short"),
        ("one byte short", "cut short"),
        ("one byte too long", "not a safetensors file"),
        ("text", "not a safetensors file"),
        ("of types that NumPy lacks", "not a safetensors file of NumPy arrays"),
        ("without metadata", "header has nothing, expected"),
        ("of another program", "header has 'format', expected"),
        ("of another version", "header has 'crnn_np model 999', expected"),
        ("without parameters", "no 'params.W_h'"),
        ("without ids", "no 'user_ids.utf8'"),
    ],
)
def test_what_is_no_model_is_refused_in_one_line(tmp_path, name, text):
    others(tmp_path)
    with pytest.raises(ModelError) as caught:
        model.load(tmp_path / name)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / name}: ")
    assert text in message
    assert "\n" not in message


def test_saving_into_a_folder_that_is_not_there(tmp_path):
    path = tmp_path / "missing" / "m"
    with pytest.raises(ModelError, match="could not be written .* existing folder") as caught:
        model.save(path, *make())
    assert str(caught.value).startswith(f"{path}: ")
    assert not list(tmp_path.iterdir())


def test_saving_over_a_folder(tmp_path):
    (tmp_path / "m").mkdir()
    with pytest.raises(ModelError, match="could not be written"):
        model.save(tmp_path / "m", *make())
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_failed_save_leaves_the_old_model_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "m"
    model.save(path, *make())
    before = path.read_bytes()

    def full_disk(arrays, filename, metadata):
        with open(filename, "wb") as file:
            file.write(before[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full_disk)
    with pytest.raises(ModelError, match="No space left on device"):
        model.save(path, *make("float64"))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_save_replaces_the_old_model(tmp_path):
    path = tmp_path / "m"
    model.save(path, *make())
    model.save(path, *make("float64", with_accumulators=False))
    loaded = model.load(path)
    assert loaded.params.W_in.dtype == np.float64
    assert loaded.accumulators is None
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_settings_without_the_arrays(tmp_path):
    path = tmp_path / "m"
    model.save(path, *make())
    assert model.load_settings(path) == model.load(path).settings
    with pytest.raises(ModelError, match="no such model file"):
        model.load_settings(tmp_path / "nothing")
