"""The baselines of Section 2.1, each behind the estimator's fit, evaluate, score, save and load.

A baseline names its settings in its constructor, keeps what it has learned in a NamedTuple of
arrays, and says how it fits and how it scores. It predicts each held-out event from the whole
history before it, the training part included: the first one from the last training event.
"""

import importlib
import inspect
import os
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from .. import model
from ..data import EventLog, check_log, concatenate, cut_tail
from ..errors import DataError, ModelError, SettingsError
from ..evaluation import summarise
from ..settings import nearest, whole
from ..training import validation_lengths
from ..windows import Plan

_HOMES = {
    "Bigram": "ngrams",
    "HMM": "hmm",
    "MatrixFactorization": "mf",
    "Personal": "personal",
    "Unigram": "ngrams",
    "Uniform": "ngrams",
}

__all__ = [
    "HMM",
    "Baseline",
    "Bigram",
    "MatrixFactorization",
    "Personal",
    "Targets",
    "Unigram",
    "Uniform",
    "targets",
    "validation_parts",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


class Targets(NamedTuple):
    """The N held-out events to predict, in the order of the log.

    Attributes
    ----------
    log : EventLog
        Each user's training part, then their held-out part.
    at : int64[N]
        Index of each event in ``log.items``.
    user : int64[N]
    first : bool[N]
        Whether it is its user's first held-out event.
    """

    log: EventLog
    at: np.ndarray
    user: np.ndarray
    first: np.ndarray


def targets(train: EventLog, heldout: EventLog) -> Targets:
    """The held-out events that have a history, the same ones that the RNN is scored on."""
    log = concatenate(train, heldout)
    position = np.arange(log.n_events) - np.repeat(log.indptr[:-1], log.lengths)
    begin = np.repeat(train.lengths, log.lengths)
    at = np.flatnonzero(position >= np.maximum(begin, 1))
    user = np.repeat(np.arange(log.n_users), log.lengths)[at]
    return Targets(log, at, user, position[at] == begin[at])


def validation_parts(
    train: EventLog, validation: EventLog | None
) -> tuple[EventLog, EventLog, EventLog]:
    """What to fit on while choosing, what to choose by, and what to fit on in the end.

    Without `validation`, the end of each user's training part is cut off, as long as for the RNN
    (`training.validation_lengths` with the defaults of `Plan`).
    """
    if validation is not None:
        return train, validation, concatenate(train, validation)
    return *cut_tail(train, validation_lengths(Plan(), train.lengths)), train


class Baseline(ABC):
    """What the baselines share.

    Attributes
    ----------
    learned : NamedTuple of arrays or None
        Once fitted.
    """

    Learned: ClassVar[type]
    """A subclass's NamedTuple of arrays."""
    SHAPES: ClassVar[dict[str, tuple[int | str, ...]]]
    """Their shapes, of numbers and letters."""

    def __init__(self) -> None:
        self.learned: Any = None
        self._user_ids = self._item_ids = None

    @abstractmethod
    def _fit(self, train: EventLog, validation: EventLog | None) -> Any:
        """What is learned from a log."""

    @abstractmethod
    def _score(self, events: Targets) -> tuple[np.ndarray, np.ndarray]:
        """Negative log-likelihood float64[N] in nats and rank int64[N] of each target.

        Rank 1 is best; items that score the same as the target are ranked before it.
        """

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.get_params().items())
        fitted = "not fitted"
        if self.learned is not None:
            fitted = f"{len(self._user_ids)} users, {len(self._item_ids)} items"
        return f"{type(self).__name__}({settings})  # {fitted}"

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """All settings, as the constructor takes them; `deep` is accepted and ignored."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self, **settings: Any) -> Self:
        """Change settings for the next fit; returns self."""
        known = self.get_params()
        for name in settings:
            if name not in known:
                advice = nearest(name, known) if known else f"{type(self).__name__} has none"
                raise SettingsError(f"there is no setting {name!r}: {advice}")
        changed = type(self)(**(known | settings))
        for name in known:
            setattr(self, name, getattr(changed, name))
        return self

    def fit(self, train: EventLog, validation: EventLog | None = None) -> Self:
        """Learn from the training part; returns self.

        Parameters
        ----------
        train : EventLog
        validation : EventLog, optional
            The events that follow each user's training part, for the settings that are chosen by
            their error (Eq. 3); cut from the end of `train` where not given. What is learned in
            the end comes from both, unless there is nothing to choose (`Uniform`, an n-gram with
            a given `epsilon`).

        Raises
        ------
        DataError
            There is no event to learn from.
        ModelError
            The validation part is of other users or items.
        """
        check_log(train)
        if train.n_events == 0:
            raise DataError("the training part has no event: at least 1 was expected")
        if validation is not None:
            model.check_ids(train.user_ids, train.item_ids, validation)
        self.learned = self._fit(train, validation)
        self._user_ids, self._item_ids = train.user_ids, train.item_ids
        return self

    def evaluate(
        self, train: EventLog, heldout: EventLog, n: int = 20, per_user: bool = False
    ) -> dict[str, Any]:
        """Errors on the held-out events, each predicted from all before it.

        Parameters
        ----------
        train : EventLog
            History, the training part.
        heldout : EventLog
            Each user's events after it.
        n : int
            Cut-off of Recall@n and MRR@n.
        per_user : bool
            Add every user's errors.

        Returns
        -------
        dict
            As `evaluation.summarise` says; ``nll`` is Eq. 3 in nats.

        Raises
        ------
        ModelError
            The model is not fitted, or was fitted on other users or items.
        SettingsError
            `n` is no whole number from 1.
        """
        self._check_fitted()
        n = whole("n", n, 1)
        for log in (train, heldout):
            model.check_ids(self._user_ids, self._item_ids, log)
        events = targets(train, heldout)
        nll, rank = self._score(events)
        return summarise(events.user, events.first, nll, rank, train.n_users, n, per_user)

    def score(self, train: EventLog, heldout: EventLog) -> float:
        """Minus the error of Eq. 3 in nats per event: larger is better."""
        return -self.evaluate(train, heldout)["nll"]

    def _check_fitted(self) -> None:
        if self.learned is None:
            raise ModelError("the model is not fitted: call fit or load first")

    def save(self, path: str | os.PathLike) -> None:
        """Write what was learned, the settings and the ids to one safetensors file.

        Raises
        ------
        ModelError
            The model is not fitted, or the file cannot be written.
        """
        self._check_fitted()
        settings = {"baseline": type(self).__name__, **self.get_params()}
        model.save(path, self.learned, None, settings, self._user_ids, self._item_ids)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """Read a model that `save` wrote.

        Raises
        ------
        ModelError
            There is no such file, or it is not a model of this class.
        """
        saved = model.load(path, cls.Learned)
        kind = saved.settings.pop("baseline", None)
        if kind != cls.__name__:
            raise ModelError(f"{path}: this is a {kind}, a {cls.__name__} was expected")
        loaded = cls(**saved.settings)
        ids = saved.user_ids, saved.item_ids
        sizes = {"U": len(ids[0]), "U + 1": len(ids[0]) + 1, "I": len(ids[1])}
        model.check_blocks(path, saved.params, cls.SHAPES, **sizes)
        if "indptr" in cls.SHAPES:
            history = EventLog(saved.params.indptr, saved.params.items, None, *ids)
            model.check_history(path, history)
        loaded.learned = saved.params
        loaded._user_ids, loaded._item_ids = saved.user_ids, saved.item_ids
        return loaded
