"""The models by the names that they have in the tables and on the command line."""

import inspect
import os
from typing import Any

from . import baselines, model
from .baselines import Baseline
from .errors import ModelError, SettingsError
from .estimator import CollaborativeRNN
from .settings import nearest

BASELINES = {
    "uniform": "Uniform",
    "unigram": "Unigram",
    "bigram": "Bigram",
    "personal": "Personal",
    "mf": "MatrixFactorization",
    "hmm": "HMM",
}
RNNS = {
    "p-gru": {"cell": "gru", "sharing": "pooled", "output": "softmax"},
    "c-tanh": {"cell": "tanh", "sharing": "collaborative", "output": "softmax"},
    "c-gru": {"cell": "gru", "sharing": "collaborative", "output": "softmax"},
    "mixture": {"cell": "gru", "sharing": "collaborative", "output": "mixture"},
}
NAMES = (*BASELINES, *RNNS)

Model = Baseline | CollaborativeRNN


def new(name: str, **settings: Any) -> Model:
    """A model that is not fitted.

    Parameters
    ----------
    name : str
        One of `NAMES`.
    **settings
        As the class takes them: `CollaborativeRNN`, or the class in `baselines`.

    Raises
    ------
    SettingsError
        There is no such model or setting, a value is out of range, or a setting contradicts the
        name.
    """
    if name in RNNS:
        for key, value in RNNS[name].items():
            if settings.get(key, value) != value:
                raise SettingsError(
                    f"{name} has {key} {value!r} and {settings[key]!r} was given: leave the "
                    "setting out or take another model"
                )
        return CollaborativeRNN(**settings | RNNS[name])
    if name not in BASELINES:
        raise SettingsError(f"there is no model {name!r}: {nearest(name, NAMES)}")
    kind = getattr(baselines, BASELINES[name])
    known = inspect.signature(kind).parameters
    for key in settings:
        if key not in known:
            advice = nearest(key, known) if known else "it has none"
            raise SettingsError(f"there is no setting {key!r} of {name}: {advice}")
    return kind(**settings)


def load(path: str | os.PathLike) -> Model:
    """Read a model file, whatever model it holds.

    Raises
    ------
    ModelError
        There is no such file, or it is not a model of this package.
    """
    kind = model.load_settings(path).get("baseline")
    if kind is None:
        return CollaborativeRNN.load(path)
    if kind not in BASELINES.values():
        raise ModelError(
            f"{path}: a model of kind {kind!r}: expected one of {', '.join(BASELINES.values())}; "
            "was it written by another version?"
        )
    return getattr(baselines, kind).load(path)
