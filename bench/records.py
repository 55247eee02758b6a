"""The files of ``make reproduce``: the runs as read, beside what the paper published."""

import json
import statistics
import tomllib
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import click
import numpy as np

PUBLISHED = tomllib.loads(Path(__file__).with_name("published.toml").read_text("utf-8"))
NAMES = {
    "uniform": "Uniform",
    "unigram": "Unigram",
    "mf": "MF",
    "hmm": "HMM",
    "bigram": "Bigram",
    "personal": "Personal",
    "p-gru": "P-GRU",
    "c-tanh": "C-tanh",
    "c-gru": "C-GRU",
    "mixture": "C-GRU mixture",
}
STATIC, RNNS = ("unigram", "mf", "hmm"), ("p-gru", "c-tanh", "c-gru")
TABLE2 = ("unigram", "mf", "hmm", "bigram", "c-gru")
BEYOND = ("personal", "mixture")
BINS = ("low", "middle", "high")


class Score(NamedTuple):
    """Mean over a model's runs, standard deviation (None for one run), number of runs."""

    mean: float
    spread: float | None
    n: int


class DataSet(NamedTuple):
    """A data set's folder as read.

    Attributes
    ----------
    facts : dict
        ``data.json``.
    runs : dict of str to list of dict
        Finished runs of each model, by seed; each has its address as ``href``.
    trials : dict of str to list of dict
        Finished trials on the validation part.
    failed, stale : list of dict
        Runs and trials that failed, and those made on other data than ``data.json`` tells.
    """

    facts: dict[str, Any]
    runs: dict[str, list[dict[str, Any]]]
    trials: dict[str, list[dict[str, Any]]]
    failed: list[dict[str, Any]]
    stale: list[dict[str, Any]]

    @property
    def published(self) -> dict[str, dict[str, float]]:
        none = {"table1": {}, "table2": {}, "figure1_left": {}}
        return PUBLISHED.get(self.facts["published"], none)

    def score(self, model: str, measure: str = "nll") -> Score | None:
        values = [run["scores"][measure] for run in self.runs[model]]
        if not values:
            return None
        spread = statistics.stdev(values) if len(values) > 1 else None
        return Score(statistics.fmean(values), spread, len(values))

    def known(self, table: str) -> list[str]:
        """Models of a table of the paper, ours behind them."""
        return [*TABLE2, "uniform", *BEYOND] if table == "table2" else list(RNNS)

    def per_user(self, model: str) -> dict[int, float]:
        """Each user's error, the mean over the model's runs."""
        errors: dict[int, list[float]] = {}
        for run in self.runs[model]:
            for user, nll in zip(run["per_user"]["user"], run["per_user"]["nll"], strict=True):
                errors.setdefault(user, []).append(nll)
        return {user: statistics.fmean(values) for user, values in sorted(errors.items())}

    def users(self) -> list[tuple[int, float, int, float | None, float | None]]:
        """User, entropy, bin, errors of C-GRU and bigram; bins of equal numbers of users."""
        ours, theirs = self.per_user("c-gru"), self.per_user("bigram")
        entropy = self.facts["entropy"]
        ranked = sorted({*ours, *theirs}, key=lambda user: (entropy[user], user))
        rows = []
        for k, part in enumerate(np.array_split(np.array(ranked, int), len(BINS))):
            rows += [(u, entropy[u], k, ours.get(u), theirs.get(u)) for u in part.tolist()]
        return sorted(rows)


def in_a_folder(context: click.Context, parameter: click.Parameter, path: Path | None):
    """Callback of an option: a file of results has a folder before hours are spent."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise click.BadParameter(f"{path} is no file in a folder that is there: make the folder")
    return path


def write_json(path: Path, value: Any) -> None:
    """Written beside `path` and renamed, so that it is never half there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def read(folder: Path) -> DataSet:
    """Read a data set's folder."""
    facts = json.loads((folder / "data.json").read_text("utf-8"))
    of = DataSet(facts, {name: [] for name in NAMES}, {name: [] for name in NAMES}, [], [])
    for kept, place in ((of.runs, folder), (of.trials, folder / "trials")):
        for model in NAMES:
            for file in sorted(place.glob(f"{model}-*.json")):
                run = json.loads(file.read_text("utf-8"))
                run["href"] = quote(file.relative_to(folder.parent).as_posix())
                if run.get("data_sha256", facts["sha256"]) != facts["sha256"]:
                    of.stale.append(run)
                elif run["status"] != "done":
                    of.failed.append(run)
                else:
                    kept[model].append(run)
            kept[model].sort(key=lambda run: run["seed"])
    return of
