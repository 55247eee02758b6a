"""`explain`: shares, parts and weights that add up, in the API, on the command line, in a file."""

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from crnn_np import Explanation, explain, methods
from crnn_np.cli import main
from crnn_np.data import concatenate, cut_tail, from_sequences
from crnn_np.errors import ModelError, SettingsError
from crnn_np.estimator import CollaborativeRNN
from crnn_np.outputs import lag_buckets

RNG = np.random.default_rng(0)
N_ITEMS, MEMORY, POINTERS = 9, 16, 3
SEQUENCES = [RNG.integers(0, N_ITEMS, n).tolist() for n in (30, 12, 1, 150)]
USERS = np.array(["ann", "bo$b$", "cee", "dan"], object)
ITEMS = np.array([f"item {k} " + 40 * "x" for k in range(N_ITEMS)], object)
LOG = from_sequences(SEQUENCES, N_ITEMS)._replace(user_ids=USERS, item_ids=ITEMS)
TIMED = LOG._replace(times=10**9 + 60 * np.arange(LOG.n_events))
SMALL = {
    "preset": None,
    "backend": "numpy",
    "output": "mixture",
    "hidden_size": 3,
    "pointers": POINTERS,
    "memory": MEMORY,
    "gate_size": 4,
    "learning_rate": 0.05,
    "window": 8,
    "dropout_in": 0.2,
    "dropout_out": 0.2,
    "dtype": "float64",
    "epochs": 1,
}


def small(**changes):
    return CollaborativeRNN(**(SMALL | changes))


@pytest.fixture(scope="module")
def model():
    return small().fit(TIMED)


@pytest.fixture(scope="module")
def model_file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("explain") / "m"
    model.save(path)
    return path


def run(*arguments):
    return CliRunner().invoke(main, ["explain", *map(str, arguments)])


def fails(*arguments):
    """Run, expect one line and status 1, return the line."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    [line] = result.output.splitlines()
    assert line.startswith("Error: ")
    return line


def same(one, other):
    assert (one.user, one.experts) == (other.user, other.experts)
    for a, b in zip(one[2:], other[2:], strict=True):
        np.testing.assert_array_equal(a, b)


# The numbers


@pytest.mark.parametrize("user", USERS)
def test_everything_adds_up(model, user):
    found = model.explain(user, n=N_ITEMS)
    assert isinstance(found, Explanation)
    assert found.experts == (
        *("softmax", "bigram", "unigram"),
        *(f"pointer {k + 1}" for k in range(POINTERS)),
    )
    assert found.shares.sum() == pytest.approx(1)
    assert found.p.sum() == pytest.approx(1)
    assert sorted(found.items) == sorted(ITEMS)
    assert (np.diff(found.p) <= 0).all()
    np.testing.assert_allclose(found.parts.sum(axis=1), found.p, rtol=1e-12)
    np.testing.assert_allclose(found.parts.sum(axis=0), found.shares, rtol=1e-12)
    np.testing.assert_allclose(found.weights.sum(axis=0), found.shares[3:], rtol=1e-12)
    for item, parts in zip(found.items, found.parts, strict=True):
        there = found.past_items == item
        np.testing.assert_allclose(found.weights[there].sum(axis=0), parts[3:], atol=1e-15)


def test_backends_agree(model):
    other = CollaborativeRNN(**model.get_params() | {"backend": "numba"})
    vars(other).update(vars(model) | {"backend": "numba"})
    for user in USERS:
        one, two = model.explain(user), other.explain(user)
        np.testing.assert_array_equal(one.items, two.items)
        np.testing.assert_allclose(one.parts, two.parts, rtol=1e-9)


def test_fewer_items_are_the_first_ones(model):
    every, some = model.explain("ann", N_ITEMS), model.explain("ann", 4)
    assert len(model.explain("ann", 1000).items) == N_ITEMS
    for name in ("items", "p", "parts"):
        np.testing.assert_array_equal(getattr(every, name)[:4], getattr(some, name))


@pytest.mark.parametrize("cell", ["gru", "tanh"])
@pytest.mark.parametrize("sharing", ["collaborative", "pooled"])
def test_it_is_what_evaluation_scores(cell, sharing):
    """The negative log-likelihood of the first held-out event, of users replayed side by side."""
    train, heldout = cut_tail(LOG, [1, 1, 0, 1])
    model = small(cell=cell, sharing=sharing, init_state=0.3).fit(train)
    scored = model.evaluate(train, heldout, per_user=True)["per_user"]
    for u, nll in zip(scored["user"], scored["nll"], strict=True):
        found = model.explain(USERS[u], N_ITEMS)
        [p] = found.p[found.items == ITEMS[heldout.items[heldout.indptr[u]]]]
        assert -np.log(p) == pytest.approx(nll, rel=1e-9)


@pytest.mark.parametrize("u", range(4))
def test_the_past_recomputed(model, u):
    """Plain loops over the sequence, from the equations at the top of outputs.py."""
    found, sequence = model.explain(USERS[u]), SEQUENCES[u]
    n, reach = len(sequence), min(len(SEQUENCES[u]), MEMORY)
    buckets = lag_buckets(MEMORY)
    wanted = {"items": [], "times": [], "match": [], "scores": []}
    for s in range(1, reach + 1):
        at = n - s
        before, context = sequence[:at][::-1], sequence[::-1]
        equal = [a == b for a, b in zip(before, context, strict=False)][:3]
        equal += [False] * (3 - len(equal))
        if equal[0]:
            match = 2 + (equal[1] + (equal[1] and equal[2]))
        else:
            match = int(equal[1])
        wanted["items"].append(ITEMS[sequence[at]])
        wanted["times"].append(TIMED.times[TIMED.indptr[u] + at])
        wanted["match"].append(match)
        tau = model.params.tau[:, buckets[s - 1], match]
        nu = model.params.nu[u]
        wanted["scores"].append(tau + nu[:, match] + nu[:, -1] * np.log(s) / 4)
    alpha = np.exp(wanted["scores"])
    np.testing.assert_array_equal(found.past_items, wanted["items"])
    np.testing.assert_array_equal(found.past_times, wanted["times"])
    np.testing.assert_array_equal(found.match, wanted["match"])
    np.testing.assert_allclose(found.weights, found.shares[3:] * alpha / alpha.sum(axis=0))


def test_every_match_has_a_name():
    sequence = [1, 2, 3, 0, 1, 2, 3, 4, 8, 2, 3, 5, 8, 8, 3, 6, 2, 8, 7, 1, 2, 3]
    log = from_sequences([sequence, [0, 1]], N_ITEMS)
    found = small(memory=64).fit(log).explain("0")
    names = {s + 1: explain.MATCHED[k] for s, k in enumerate(found.match)}
    followed = {item: len(sequence) - sequence.index(item) for item in (0, 4, 5, 6, 7)}
    assert names[followed[0]] == "three"
    assert names[followed[4]] == "three"
    assert names[followed[5]] == "two"
    assert names[followed[6]] == "one"
    assert names[followed[7]] == "skip"
    assert names[1] == "none"
    assert len(explain.MATCHED) == found.match.max() + 1


# What is known of the users


def test_a_file_has_the_sequences(model, model_file):
    again = CollaborativeRNN.load(model_file)
    for user in USERS:
        same(again.explain(user), model.explain(user))
    again.save(model_file.with_name("again"))
    one, other = load_file(model_file), load_file(model_file.with_name("again"))
    assert one.keys() == other.keys() >= {"history.indptr", "history.items", "history.times"}
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name])


def test_a_log_without_times(tmp_path):
    small().fit(LOG).save(tmp_path / "m")
    assert CollaborativeRNN.load(tmp_path / "m").explain("ann").past_times is None
    arrays = load_file(tmp_path / "m")
    assert "history.items" in arrays
    assert "history.times" not in arrays


def test_a_softmax_file_is_as_before(tmp_path):
    small(output="softmax").fit(TIMED).save(tmp_path / "m")
    assert not [name for name in load_file(tmp_path / "m") if name.startswith("history")]


def test_a_checkpoint_has_no_sequences(tmp_path):
    small().fit(TIMED, checkpoint=tmp_path / "c")
    assert not [name for name in load_file(tmp_path / "c") if name.startswith("history")]


def test_partial_fit_keeps_the_newest_log():
    train, heldout = cut_tail(TIMED, [5, 3, 0, 8])
    model = small().fit(train)
    assert model.explain("ann").past_items[0] == ITEMS[SEQUENCES[0][-6]]
    model.partial_fit(TIMED)
    assert model.explain("ann").past_items[0] == ITEMS[SEQUENCES[0][-1]]
    fresh = small().partial_fit(train)
    assert fresh.explain("ann").past_items[0] == ITEMS[SEQUENCES[0][-6]]


def test_a_validation_part_is_known_too():
    train, validation = cut_tail(TIMED, [5, 3, 0, 8])
    found = small(patience=1).fit(train, validation).explain("ann")
    assert found.past_items[0] == ITEMS[SEQUENCES[0][-1]]
    np.testing.assert_array_equal(found.past_times, TIMED.times[29 - np.arange(MEMORY)])
    assert concatenate(train, validation).items.tolist() == TIMED.items.tolist()


# Errors


def test_errors(model, model_file, tmp_path):
    with pytest.raises(ModelError, match="not fitted"):
        small().explain("ann")
    for user, advice in (("anne", "did you mean 'ann'"), ("zzz", "one of ann, bo"), (7, "ann, bo")):
        with pytest.raises(ModelError, match=advice):
            model.explain(user)
    assert "no user 'anne': did you mean 'ann'?" in fails(model_file, "--user", "anne")
    with pytest.raises(SettingsError, match="n is 0: 1 or more was expected"):
        model.explain("ann", 0)
    assert "no such model file" in fails(tmp_path / "nothing", "--user", "ann")
    assert run(model_file).exit_code == 2
    assert run(model_file, "--user", "ann", "--top", 0).exit_code == 2


def test_many_users_are_counted(model):
    many = np.array([f"user {n}" for n in range(200)], object)
    log = from_sequences([[0, 1]] * 200, N_ITEMS)._replace(user_ids=many)
    with pytest.raises(ModelError, match="'zzz': expected one of the 200 that are known$"):
        small().fit(log).explain("zzz")


def test_a_user_without_events():
    log = from_sequences([[0, 1, 2], []], N_ITEMS)
    with pytest.raises(ModelError, match="no event of user '1'"):
        small().fit(log).explain("1")


@pytest.mark.parametrize(
    ("name", "settings"), [("c-gru", SMALL | {"output": "softmax"}), ("bigram", {})]
)
def test_other_models(tmp_path, name, settings):
    methods.new(name, **settings).fit(LOG).save(tmp_path / "m")
    assert explain.NEEDED in fails(tmp_path / "m", "--user", "ann")
    if settings:
        with pytest.raises(ModelError, match="needs a model with output 'mixture'"):
            CollaborativeRNN.load(tmp_path / "m").explain("ann")


def test_a_file_without_sequences(model, tmp_path):
    older = CollaborativeRNN(**model.get_params())
    vars(older).update(vars(model) | {"_history": None})
    older.save(tmp_path / "m")
    assert "no sequences of its users" in fails(tmp_path / "m", "--user", "ann")


@pytest.mark.parametrize("name", ["nowhere/p.png", "p.jpgx", "p"])
def test_wrong_pictures(model_file, tmp_path, name):
    line = fails(model_file, "--user", "ann", "--plot", tmp_path / name)
    assert "its folder does not exist" in line or "end in .png, .svg, .pdf or" in line
    assert not list(tmp_path.iterdir())


def test_no_picture_of_an_error(model_file, tmp_path):
    fails(model_file, "--user", "nobody", "--plot", tmp_path / "p.png")
    assert not list(tmp_path.iterdir())


def test_a_picture_that_cannot_be_written(model, tmp_path):
    (tmp_path / "p.png").mkdir()
    with pytest.raises(SettingsError, match="could not be written"):
        explain.picture(model.explain("ann"), tmp_path / "p.png")
    assert [path.name for path in tmp_path.iterdir()] == ["p.png"]


# Command line


def test_tables(model, model_file):
    result = run(model_file, "--user", "ann", "--top", 4)
    assert result.exit_code == 0, result.output
    found = model.explain("ann", 4)
    head, shares, items, past = (part.splitlines() for part in result.output.split("\n\n"))
    assert head == [f"User ann: the event after {found.past_items[0]} at 2001-09-09 02:15:40 UTC"]
    assert [line.split() for line in shares[1:]] == [
        [*name.split(), f"{g:.4f}"] for name, g in zip(found.experts, found.shares, strict=True)
    ]
    assert len(items) == len(past) == 6
    for line, item, p, parts in zip(items[1:5], found.items, found.p, found.parts, strict=True):
        assert line.startswith(item)
        assert line.split()[-7:] == [f"{v:.4f}" for v in (p, *parts)]
    assert items[5].split()[:3] == ["5", "others", f"{1 - found.p.sum():.4f}"]
    weight = found.weights.sum(axis=1)
    largest = np.sort(weight)[::-1]
    for line, wanted in zip(past[1:5], largest, strict=False):
        *_, lag, day, time, match, total = line.split()[:-POINTERS]
        s = int(lag) - 1
        assert line.startswith(found.past_items[s])
        assert total == f"{wanted:.4f}" == f"{weight[s]:.4f}"
        assert match == explain.MATCHED[found.match[s]]
        assert f"{day}T{time}" == str(np.datetime64(int(found.past_times[s]), "s"))
    assert past[5].split()[:3] == ["12", "others", f"{largest[4:].sum():.4f}"]
    for lines in (shares, items, past):
        assert len({len(line) for line in lines}) == 1


def test_tables_with_nothing_left_out_and_no_times(tmp_path):
    small().fit(LOG).save(tmp_path / "m")
    result = run(tmp_path / "m", "--user", "cee")
    assert result.exit_code == 0, result.output
    assert "others" not in result.output
    assert "UTC" not in result.output
    assert len(result.output.split("\n\n")[3].splitlines()) == 2


@pytest.mark.parametrize(
    ("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")]
)
def test_pictures(model_file, tmp_path, suffix, start):
    """Also of a user with one event, and of one whose id looks like a formula."""
    for user in ("cee", "bo$b$"):
        path = tmp_path / f"{user}.{suffix}"
        result = run(model_file, "--user", user, "--plot", path)
        assert result.exit_code == 0, result.output
        assert result.output.endswith(f"Picture: {path}\n")
        assert path.read_bytes().startswith(start)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_picture_of_many_items(tmp_path):
    """It stays within what matplotlib can draw, and ids that no font has give no warning."""
    ids = np.array([f"アーティスト {n}" for n in range(3000)], object)
    log = from_sequences(SEQUENCES, 3000)._replace(item_ids=ids)
    found = small().fit(log).explain("0", 3000)
    explain.picture(found, tmp_path / "p.png")
    assert len(found.items) == 3000
    assert (tmp_path / "p.png").stat().st_size < 1e6


def test_shorten():
    assert explain.shorten("short") == "short"
    assert explain.shorten("0123456789", 7) == "012…789"
    assert explain.shorten("0123456789", 10) == "0123456789"
    assert len(explain.shorten("x" * 99, 12)) <= 12
    assert explain.shorten("two\nlines") == "two lines"
