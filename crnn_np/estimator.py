"""`CollaborativeRNN`: settings and parameters behind fit, evaluate, score, save and load."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from . import backends, evaluation, model, planning, training
from . import explain as explanation
from .data import EventLog, check_log, concatenate
from .errors import ModelError, SettingsError
from .presets import Settings, resolve


class CollaborativeRNN:
    """The collaborative recurrent neural network (Ko, Maystre and Grossglauser, 2016).

    Parameters
    ----------
    preset : str or None
        Named settings to start from, "mixture", "authors" or "paper"; None for the bare defaults.
    like : str, optional
        Kind of log, for presets that have settings of their own for it ("lastfm").
    backend : {"numba", "numpy", "cupy"}
        "numpy" is the plain reference.
    **settings
        Any field of `Spec` (the model), `Rule` (the optimiser) and `Plan` (windows, batches,
        epochs, early stopping, seed).

    Attributes
    ----------
    settings : Settings
        Of the next fit.
    fitted : Settings or None
        Of the parameters.
    params : Params, MixtureParams or None
        W_h real[U or 1, D, G*D], W_in real[I, G*D], W_out real[I, D] once fitted, and the blocks of
        `outputs.Mixture` with output "mixture".
    accumulators : Accumulators or None
    reports : list of Report
        One for each epoch of the last fit, without the arrays.

    Raises
    ------
    SettingsError
        There is no such preset, backend or setting, or a value is out of range.

    Examples
    --------
    >>> train, heldout = crnn_np.load("data/brightkite")
    >>> model = CollaborativeRNN(preset="authors", epochs=10).fit(train)
    >>> model.evaluate(train, heldout)["nll"]
    """

    def __init__(
        self,
        *,
        preset: str | None = "paper",
        like: str | None = None,
        backend: str = "numba",
        **settings: Any,
    ) -> None:
        self.settings: Settings = resolve(preset, like, **settings)
        backends.check_name(backend)
        self.backend = backend
        self.fitted: Settings | None = None
        self.params: model.Params | None = None
        self.accumulators: model.Accumulators | None = None
        self.reports: list[training.Report] = []
        self._epoch = 0
        self._user_ids = self._item_ids = None
        self._history: EventLog | None = None

    def __repr__(self) -> str:
        default = resolve(None).flat()
        changed = {k: v for k, v in self.settings.flat().items() if v != default[k]}
        inner = ", ".join(f"{k}={v!r}" for k, v in changed.items())
        fitted = "not fitted"
        if self.params is not None:
            fitted = (
                f"{len(self._user_ids)} users, {len(self._item_ids)} items, {self._epoch} epochs"
            )
        return f"CollaborativeRNN(preset=None, backend={self.backend!r}, {inner})  # {fitted}"

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """All settings, as the constructor takes them; `deep` is accepted and ignored."""
        return {"preset": None, "backend": self.backend, **self.settings.flat()}

    def set_params(self, **settings: Any) -> "CollaborativeRNN":
        """Change settings for the next fit; returns self.

        A preset replaces all of them but the backend.

        Raises
        ------
        SettingsError
            As the constructor; or `like` without a preset.
        """
        if settings.get("like") is not None and settings.get("preset") is None:
            raise SettingsError(
                f"like is {settings['like']!r} and no preset is set that may have settings for it: "
                "give the preset too, or leave like out"
            )
        kept = {"backend": self.backend} if "preset" in settings else self.get_params()
        changed = CollaborativeRNN(**(kept | settings))
        self.settings, self.backend = changed.settings, changed.backend
        return self

    def epochs(
        self,
        train: EventLog,
        validation: EventLog | None = None,
        progress: Callable[[int, int, float], None] | None = None,
        checkpoint: str | os.PathLike | None = None,
    ) -> Iterator[training.Report]:
        """Fit, epoch by epoch: `training.epochs` with the model kept up to date.

        Parameters
        ----------
        train : EventLog
        validation : EventLog, optional
            The events after each user's training part; see `training.epochs`.
        progress : callable, optional
            Called with (events done, events of the epoch, summed loss).
        checkpoint : path, optional
            File to write after each epoch, and to go on from where it is there.
        """
        self.params = self.accumulators = None
        self.reports, self._epoch = [], 0
        self._begin(train)
        if validation is not None and self.settings.plan.patience:
            self._keep(concatenate(train, validation))
        yield from self._follow(
            training.epochs(
                *self.settings,
                train,
                validation=validation,
                backend=self.backend,
                checkpoint=checkpoint,
                progress=progress,
            )
        )

    def estimate(self, train: EventLog, validation: EventLog | None = None) -> planning.Estimate:
        """What `fit` will need: memory, time, parameters (`planning.estimate`).

        Takes some seconds; the model stays as it is.
        """
        return planning.estimate(*self.settings, train, validation=validation, backend=self.backend)

    def _begin(self, train: EventLog) -> None:
        check_log(train)
        self.fitted = self.settings
        self._user_ids, self._item_ids = train.user_ids, train.item_ids
        self._keep(train)

    def _keep(self, log: EventLog) -> None:
        """Keep what `explain` and the model file need of the users."""
        self._history = log if self.settings.spec.output == "mixture" else None

    def _follow(self, reports: Iterator[training.Report]) -> Iterator[training.Report]:
        for report in reports:
            self.params, self.accumulators = report.params, report.accumulators
            self._epoch = report.epoch
            self.reports.append(report._replace(params=None, accumulators=None))
            yield report

    def fit(
        self,
        train: EventLog,
        validation: EventLog | None = None,
        checkpoint: str | os.PathLike | None = None,
    ) -> "CollaborativeRNN":
        """Train from new parameters; returns self.

        Broken off, by Ctrl-C or an error, within an epoch it leaves the parameters of that moment,
        which no further fit goes on from to the numbers of an unbroken one; with `checkpoint` the
        next `fit` does.

        Parameters
        ----------
        train : EventLog
        validation : EventLog, optional
            For early stopping (``patience`` > 0); cut from the end of `train` where not given.
        checkpoint : path, optional
            File to write after each epoch, and to go on from where it is there.
        """
        for _ in self.epochs(train, validation, checkpoint=checkpoint):
            pass
        return self

    def partial_fit(self, train: EventLog) -> "CollaborativeRNN":
        """Train one more epoch from where the model stands; returns self.

        Raises
        ------
        ModelError
            The model was fitted on other users or items, or with another `Spec` (only the dropout
            rates may change).
        """
        spec, rule, plan = self.settings
        if self.params is None:
            self._begin(train)
        model.check_ids(self._user_ids, self._item_ids, train)
        old = self.fitted.spec
        if replace(old, dropout_in=spec.dropout_in, dropout_out=spec.dropout_out) != spec:
            raise ModelError(
                f"the model was fitted with {old} and can't go on with {spec}; call fit"
            )
        self.fitted = self.settings
        self._keep(train)
        plan = replace(plan, epochs=1, patience=0)
        for _ in self._follow(
            training.epochs(
                spec,
                rule,
                plan,
                train,
                params=self.params,
                accumulators=self.accumulators,
                first_epoch=self._epoch + 1,
                backend=self.backend,
            )
        ):
            pass
        return self

    def evaluate(
        self, train: EventLog, heldout: EventLog, n: int = 20, per_user: bool = False
    ) -> dict[str, Any]:
        """Errors on the held-out events after replaying the history (`evaluation.evaluate`).

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
        """
        if self.params is None:
            raise ModelError("the model is not fitted: call fit or load first")
        for log in (train, heldout):
            model.check_ids(self._user_ids, self._item_ids, log)
        return evaluation.evaluate(
            backends.get(self.backend),
            self.fitted.spec,
            self.params,
            train,
            heldout,
            n,
            per_user,
        )

    def score(self, train: EventLog, heldout: EventLog) -> float:
        """Minus the error of Eq. 3 in nats per event: larger is better."""
        return -self.evaluate(train, heldout)["nll"]

    def explain(self, user: str, n: int = 10) -> explanation.Explanation:
        """What a mixture expects of a user's next event, and where from (`explain.explain`).

        The next event is the one after all that the model was fitted on.

        Parameters
        ----------
        user : str
            Original id.
        n : int
            Number of items.

        Raises
        ------
        ModelError
            The model is not fitted, is no mixture, or comes from a file without its users'
            sequences; or there is no such user.
        """
        if self.params is None:
            raise ModelError("the model is not fitted: call fit or load first")
        if self.fitted.spec.output != "mixture":
            raise ModelError(explanation.NEEDED)
        if self._history is None:
            raise ModelError(
                "the model file has no sequences of its users: it was written before files had "
                "them; train the model again"
            )
        backend = backends.get(self.backend)
        return explanation.explain(backend, self.fitted.spec, self.params, self._history, user, n)

    def save(self, path: str | os.PathLike) -> None:
        """Write the model, its optimiser state, settings and ids to one safetensors file.

        A mixture's file also holds the sequences that it was fitted on.

        Raises
        ------
        ModelError
            The model is not fitted, or the file cannot be written.
        """
        if self.params is None:
            raise ModelError("the model is not fitted: there is nothing to save")
        settings = {"preset": None, "backend": self.backend, **self.fitted.flat()}
        settings["epochs_done"] = self._epoch
        ids = self._user_ids, self._item_ids
        model.save(path, self.params, self.accumulators, settings, *ids, self._history)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "CollaborativeRNN":
        """Read a model that `save` wrote; training can go on with `partial_fit`.

        Raises
        ------
        ModelError
            There is no such file, or it is not a model of this package.
        """
        saved = model.load(path)
        if "epochs_done" not in saved.settings:
            raise ModelError(
                f"{path} is a checkpoint, not a model: `crnn-np train --checkpoint` goes on from it"
            )
        epochs_done = saved.settings.pop("epochs_done")
        loaded = cls(**saved.settings)
        model.check_saved(path, saved, loaded.settings.spec)
        loaded.fitted = loaded.settings
        loaded.params, loaded.accumulators = saved.params, saved.accumulators
        loaded._user_ids, loaded._item_ids = saved.user_ids, saved.item_ids
        loaded._history = saved.history
        loaded._epoch = epochs_done
        return loaded
