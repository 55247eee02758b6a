"""Training speed beside PyTorch on the same machine, interleaved.

    pip install '.[bench]'
    python bench/peers.py [DIR] [--quick] [--rounds 7] [--threads 2] [--device gpu] [--json FILE]

Events per second on full windows of the presets' batches, "1 x 128" (paper) and "20 x 64"
(authors), of the collaborative GRU with its tanh candidate, without dropout and at a learning rate
at which no weight overflows however many rounds go over the same windows: for the shapes of
Brightkite and Last.fm in the paper with items drawn Zipf-like, or for the users, items and
sequences of a prepared data set DIR.

Each contender is a process of its own, which waits while another runs; rounds alternate and ratios
are taken round by round. `torch_peers.py` has the peers. Where the host of a virtual machine takes
more than 1 % of its cores' time during a contender's round, that is repeated, at most three times,
and the least disturbed one counts; not with --quick. What was taken even so is printed.

"crnn_np, bfloat16" has products="bfloat16", on processors that can; "torch.compile, bfloat16", with
tuned malloc, is the same in PyTorch, where the logits are rounded too. "crnn_np, output mixture" is
the same network with the output layer of preset `mixture`. With --quick the last two, "PyTorch
eager, tuned malloc" and the second floor are left out: half of the time of this program goes into
compiling for PyTorch.

Tuned malloc: glibc gets from the system, and gives back, every array of more than some MB, whose
pages are then made anew in every window. Two variables of the environment tell it to keep what it
has (MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_, 8 GiB), which is what someone who needs
PyTorch fast would do; "PyTorch eager" is as it comes.

The last column is an epoch's time at the rate of full windows; those of an epoch are not all full.

There are two floors, the three products of the output layer at the rate of the fastest product, and
at that of multiply-adds that need no memory, which is all that the processor can do. The share of a
floor is the median over the rounds, each beside the floor's rate of that round; the share of its
best round is that of our median in the floor's fastest round.

With --device gpu all of them run on the first CUDA device, crnn_np with backend "cupy", and there
is one case more, the pooled GRU with D = 768 beside PyTorch's nn.GRU, which is cuDNN's. Products
are in strict float32, those of cuDNN too, but where a name has TF32: PyTorch then has it
everywhere, crnn_np in the softmax. Peak memory is that on the device, of PyTorch's arrays or of
CuPy's pool. There are two floors: the products' operations at the rate of PyTorch's product of
large matrices, and the bytes that have to move at the rate of a large copy, five times the logits
and, in every window, eight times W_out (read by two products, gradient written and read, weights
and accumulator read and written).

For DIR there is a second table: our rate at the windows of an epoch as they come, short ones
included and with dropout, beside the rate at full windows; events without a target do not count.
"""

import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import products
import records
from machine import cores, describe_machine, peak_bytes, stolen

import crnn_np
from crnn_np import backends
from crnn_np.windows import Slice, epoch_slices


class Shape(NamedTuple):
    """Users, items, D and the events of an epoch."""

    users: int
    items: int
    D: int
    events: int
    sharing: str = "collaborative"


SHAPES = {
    "Brightkite": Shape(1679, 23243, 32, 599_618),
    "Last.fm": Shape(954, 48188, 128, 4_320_000),
    "Last.fm, pooled": Shape(954, 48188, 768, 4_320_000, "pooled"),  # on a GPU
}
BATCHES = {"1 x 128": "paper", "20 x 64": "authors"}
DISTURBED = 0.01  # of the cores' time, taken by the host of a virtual machine
TUNED = {"MALLOC_MMAP_THRESHOLD_": str(8 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}
BLAS_THREADS = "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"  # of NumPy's too
BACKENDS = {"cpu": "numba", "gpu": "cupy"}
TORCH_DEVICES = {"cpu": "cpu", "gpu": "cuda"}
OURS = "crnn_np"
VARIANTS = {  # name: settings
    OURS: {},
    "crnn_np, bfloat16": {"products": "bfloat16"},
    "crnn_np, TF32": {"products": "tf32"},
    "crnn_np, output mixture": {"output": "mixture"},
}


class Peer(NamedTuple):
    """A class of `torch_peers`, the environment of its process, and where it runs."""

    kind: str
    environment: dict[str, str] = {}
    devices: tuple[str, ...] = tuple(BACKENDS)


PEERS = {
    "PyTorch eager": Peer("Eager"),
    "PyTorch eager, tuned malloc": Peer("Eager", TUNED, devices=("cpu",)),
    "PyTorch by hand, tuned malloc": Peer("ByHand", TUNED),
    "torch.compile, tuned malloc": Peer("Compiled", TUNED),
    "torch.compile, bfloat16": Peer("CompiledHalf", TUNED, devices=("cpu",)),
    "torch.compile, TF32": Peer("Compiled", devices=("gpu",)),
    "pooled nn.GRU, tuned malloc": Peer("Pooled", TUNED),
    "pooled nn.GRU by hand": Peer("PooledByHand", devices=("gpu",)),
    "pooled nn.GRU by hand, TF32": Peer("PooledByHand", devices=("gpu",)),
}
FLOOR, COPY = "best product", "device copy"
LEFT_OUT = (  # with --quick
    "crnn_np, output mixture",
    "PyTorch eager, tuned malloc",
    "torch.compile, bfloat16",
    products.PEAK,
)
FLOORS = {"cpu": [FLOOR, products.PEAK], "gpu": [FLOOR, f"{FLOOR}, TF32", COPY]}
QUOTED = (
    "The authors' TensorFlow code was not run here. Quoted, measured once on 2 cores of a Zen 5 "
    "EPYC: an early prototype of this package was 19.2 (Brightkite 1 x 128), 6.9 (20 x 64), 5.0 "
    "(Last.fm 1 x 128) and 2.8 times (20 x 64) as fast."
)


# ---------------------------------------------------------------- the windows


def zipf_log(users: int, items: int, length: int) -> crnn_np.EventLog:
    """Sequences whose items are drawn with probability 1 / rank."""
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, items + 1)
    draws = rng.choice(items, (users, length), p=share / share.sum())
    return crnn_np.from_sequences(draws, items)


def full_windows(log, plan, K: int | None = None) -> Slice:
    """The windows of an epoch in which every step of every column has a target, at most K."""
    run = epoch_slices(plan, log.lengths, 1)
    full = (run.length == plan.window) & (run.start + run.length < log.lengths[run.user])
    which = np.flatnonzero(full.all(axis=1))[:K]
    if not which.size:
        raise crnn_np.DataError(
            f"none of the {run.key.size} windows of {plan.batch} x {plan.window} is full: more "
            f"than {plan.window} events of {plan.batch} users at once were expected; take a "
            "larger data set"
        )
    return Slice(*(field[which] for field in run))


def torch_windows(log, run: Slice, device: str) -> Iterator:
    """The same windows for PyTorch: users, and x [B, T + 1] with the event that follows."""
    import torch

    for k in range(run.key.size):
        piece = run.one(k)
        at = log.indptr[piece.user] + piece.start
        index = np.minimum(at[:, None] + np.arange(piece.length.max() + 1), log.n_events - 1)
        users = torch.from_numpy(piece.user.astype(np.int64)).to(device)
        yield users, torch.from_numpy(log.items[index].astype(np.int64)).to(device)


def case_of(spec: dict):
    """Log, settings and D of a case."""
    settings = crnn_np.resolve(
        spec["preset"],
        hidden_size=spec["D"],
        candidate="tanh",
        dropout_in=0.0,
        dropout_out=0.0,
        learning_rate=1e-4,
        sharing=spec["sharing"],
        **VARIANTS.get(spec["name"], {}),
    )
    if spec["directory"]:
        return crnn_np.load(spec["directory"]).train, settings
    shape = SHAPES[spec["shape"]]
    return zipf_log(shape.users, shape.items, 1024), settings


def names_of(device: str, sharing: str, quick: bool) -> list[str]:
    """The contenders of a case."""
    there = backends.get(BACKENDS[device]).PRODUCTS
    names = [name for name, own in VARIANTS.items() if own.get("products", "full") in there]
    peers = [name for name, peer in PEERS.items() if device in peer.devices]
    if sharing == "pooled":
        names = [name for name in names if "output" not in VARIANTS[name]]
        peers = [name for name in peers if PEERS[name].kind.startswith("Pooled")]
    return [name for name in (*names, *peers) if not (quick and name in LEFT_OUT)]


def set_torch(spec: dict):
    """PyTorch with TF32 where the contender's name has it, and nowhere else."""
    import torch

    torch.set_num_threads(spec["threads"])
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = "TF32" in spec["name"]
    return torch


def peak(spec: dict) -> int:
    """The most that a contender has taken: on the device, or all of its process."""
    if spec["device"] == "cpu":
        return peak_bytes()
    if spec["name"] in (*PEERS, *FLOORS["gpu"]):
        import torch

        return torch.cuda.max_memory_allocated()
    import cupy

    return cupy.get_default_memory_pool().total_bytes()


# ---------------------------------------------------------------- contenders, each in a process


def ours(spec: dict, seconds: float) -> Callable[[], tuple[float, float]]:
    """Events and seconds of a run of `train_run`."""
    import numba

    numba.set_num_threads(spec["threads"])
    log, settings = case_of(spec)
    train = trainer(log, settings, BACKENDS[spec["device"]])
    run = full_windows(log, settings.plan, 4096)
    train(run.part(0, 1))
    return paced(lambda K: train(run.part(0, K)), 2, run.key.size, seconds)


def paced(
    run: Callable[[int], tuple[float, float]], few: int, most: int, seconds: float
) -> Callable[[], tuple[float, float]]:
    """`run` with as many windows as take so many seconds, found in the first call."""
    K = 0

    def at_pace() -> tuple[float, float]:
        nonlocal K
        K = K or max(few, min(most, round(few * seconds / run(few)[1])))
        return run(K)

    return at_pace


def trainer(log, settings, name: str = "numba") -> Callable[[Slice], tuple[float, float]]:
    """A function that trains on windows in a backend and tells their events and seconds."""
    from crnn_np import evaluation, model

    spec, rule, plan = settings
    backend = backends.get(name)
    past = model.on_device(backend, evaluation.read_past(spec, log))
    params = model.initialise(spec, log.n_users, log.n_items, 0)
    acc = model.on_device(backend, model.new_accumulators(params))
    params = model.on_device(backend, params)
    work = backend.workspace(spec, log.n_items, plan.batch, plan.window)
    s = backend.to_device(np.zeros((1, plan.batch, spec.hidden_size), spec.dtype))

    def train(run: Slice) -> tuple[float, float]:
        began = time.perf_counter()
        _, events = backend.train_run(spec, rule, plan.scale, params, acc, s, log, run, work, past)
        return events, time.perf_counter() - began

    return train


def peer(spec: dict, seconds: float) -> Callable[[], tuple[float, float]]:
    """Events and seconds of some windows in PyTorch."""
    import torch_peers

    torch, device = set_torch(spec), TORCH_DEVICES[spec["device"]]
    torch.set_default_device(device)
    torch.manual_seed(0)
    log, settings = case_of(spec)
    plan = settings.plan
    windows = list(torch_windows(log, full_windows(log, plan, 64), device))
    contender = getattr(torch_peers, PEERS[spec["name"]].kind)(
        log.n_users, log.n_items, spec["D"], settings.rule, plan.batch
    )

    def run(K: int) -> tuple[float, float]:
        began = time.perf_counter()
        contender.run(windows[:K])
        if device != "cpu":
            torch.cuda.synchronize()
        events = sum(x.shape[0] * (x.shape[1] - 1) for _, x in windows[:K])
        return events, time.perf_counter() - began

    run(2)
    return paced(run, 1, len(windows), seconds)


def floor(spec: dict, seconds: float) -> Callable[[], tuple[float, float]]:
    """Operations (GFLOP) and seconds of the fastest float32 product: ours, NumPy's, PyTorch's.

    Calls alternate, and rates are averages, as those of all contenders are.
    """
    torch, gpu = set_torch(spec), spec["device"] == "gpu"
    size = 8192 if gpu else 1024
    a = np.random.default_rng(0).standard_normal((size, size)).astype(np.float32)
    b = torch.from_numpy(a).to(TORCH_DEVICES[spec["device"]])

    def of_torch() -> None:
        b @ b
        if gpu:
            torch.cuda.synchronize()

    libraries = [of_torch] if gpu else [of_torch, lambda: a @ a]
    groups = [[(call, 2e-9 * size**3) for call in libraries]]
    if not gpu:
        groups.append(products.of_this_package(spec["threads"]))
    for call in libraries:
        call()  # the first one sets up the library

    def best() -> tuple[float, float]:
        found = []
        for calls in groups:
            time.sleep(0.1)  # no thread of a BLAS spins any more
            spent, done = [0.0] * len(calls), 0
            while sum(spent) < seconds:
                for k, (call, _) in enumerate(calls):
                    spent[k] += products.timed(call)
                done += 1
            found += [(done * each, s) for s, (_, each) in zip(spent, calls, strict=True)]
        return max(found, key=lambda pair: pair[0] / pair[1])

    return best


def registers(spec: dict, seconds: float) -> Callable[[], tuple[float, float]]:
    """Operations (GFLOP) and seconds of multiply-adds that need no memory."""
    call, each = products.in_registers(spec["threads"])

    def run(times: int) -> tuple[float, float]:
        return times * each, sum(products.timed(call) for _ in range(times))

    run(1)
    return paced(run, 1, 1 << 20, seconds)


def copy(spec: dict, seconds: float) -> Callable[[], tuple[float, float]]:
    """Bytes (GB) and seconds of the fastest copy from the device's memory to itself."""
    torch = set_torch(spec)
    a = torch.ones(1 << 28, device=TORCH_DEVICES[spec["device"]])
    b = torch.empty_like(a)

    def rate() -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        b.copy_(a)
        torch.cuda.synchronize()
        return 2e-9 * a.nbytes / (time.perf_counter() - began)

    return lambda: (max(rate() for _ in range(10)), 1.0)


def ragged(spec: dict, seconds: float) -> Callable[[], tuple[float, float]]:
    """Rate at an epoch's windows as they come and at full ones, with the preset's dropout."""
    import numba

    numba.set_num_threads(spec["threads"])
    log = crnn_np.load(spec["directory"]).train
    settings = crnn_np.resolve(spec["preset"], hidden_size=spec["D"])
    train = trainer(log, settings, BACKENDS[spec["device"]])
    full = full_windows(log, settings.plan, 4096)
    train(full.part(0, 1))
    _, took = train(full.part(0, 2))
    K = max(2, min(full.key.size, round(2 * seconds / took)))
    epoch = epoch_slices(settings.plan, log.lengths, 1)
    # pieces from all over the epoch, whose short windows come together
    starts = np.linspace(0, max(epoch.key.size - 4, 0), max(K // 4, 1)).astype(int)
    pick = np.unique(starts[:, None] + np.arange(4))
    pick = pick[pick < epoch.key.size]
    some = Slice(*(field[pick] for field in epoch))

    def both() -> tuple[float, float]:
        events, took = train(some)
        full_events, full_took = train(full.part(0, K))
        return events / took, full_events / full_took

    return both


def work(spec: dict) -> None:
    """A contender's process: runs once for each line it reads, and answers with a line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**answer) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    makers = dict.fromkeys(VARIANTS, ours) | dict.fromkeys(FLOORS["gpu"], floor)
    makers |= {products.PEAK: registers, COPY: copy, "ragged": ragged}
    try:
        run = makers.get(spec["name"], peer)(spec, spec["seconds"])
        say(ready=True)
        for _ in sys.stdin:
            amount, seconds = run()
            say(amount=amount, seconds=seconds, peak=peak(spec))
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        say(failed=f"{type(error).__name__}: {lines[0][:120]}")


class Contender:
    """The parent's end of a contender's process."""

    def __init__(self, spec: dict) -> None:
        self.name = spec["name"]
        environment = dict.fromkeys(BLAS_THREADS, str(spec["threads"]))
        environment |= PEERS[self.name].environment if self.name in PEERS else {}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
        self.rates: list[float] = []
        self.answers: list[dict] = []
        self.failed: str | None = None

    def await_ready(self) -> None:
        self.failed = self._answer().get("failed")

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"failed": f"ended with {self.process.wait()}"}

    def run(self, tries: int) -> None:
        """One round: of so many tries the one that the host of this machine disturbed least."""
        answers: list[dict] = []
        while not self.failed and len(answers) < tries:
            time.sleep(0.1)  # the threads of the one before stop spinning
            before, began = stolen(), time.perf_counter()
            with contextlib.suppress(BrokenPipeError):  # it was killed, as its answer tells
                self.process.stdin.write("go\n")
                self.process.stdin.flush()
            answer = self._answer()
            self.failed = answer.get("failed")
            took = (time.perf_counter() - began) * os.cpu_count()
            answers.append(answer | {"stolen": (stolen() - before) / took})
            if answers[-1]["stolen"] < DISTURBED:
                break
        if not self.failed:
            self.answers.append(min(answers, key=lambda answer: answer["stolen"]))
            self.rates.append(self.answers[-1]["amount"] / self.answers[-1]["seconds"])

    def end(self) -> None:
        self.process.communicate()  # closes its pipe, a broken one too


# ---------------------------------------------------------------- the tables


def blas() -> dict:
    """The BLAS of NumPy with its core type, and PyTorch's version and libraries."""
    import threadpoolctl
    import torch

    found = [
        {key: pool.get(key) for key in ("internal_api", "version", "architecture")}
        for pool in threadpoolctl.threadpool_info()
        if pool["user_api"] == "blas"
    ]
    settings = (line.strip() for line in torch.__config__.show().splitlines())
    return {
        "numpy": np.__version__,
        "numpy_blas": found,
        "torch": torch.__version__,
        "torch_libraries": [line for line in settings if "Library" in line or "MKL-DNN" in line],
    }


def warm(spec: dict, names: list[str]) -> list[Contender]:
    """Contenders that are ready to run. Two at a time warm up, but never two of ours.

    Those share Numba's cache, where one could overwrite what the other has just added.
    """
    ours = iter([name for name in names if name in VARIANTS])
    peers = [name for name in names if name not in VARIANTS]
    peers.sort(key=lambda name: not name.startswith("torch.compile"))  # these take longest
    rest = iter(peers)
    found: dict[str, Contender] = {}

    def each_of(*lists: Iterator[str]) -> None:
        for name in itertools.chain(*lists):
            click.echo(f"{spec['title']}: {name} warms up", err=True)
            found[name] = Contender(spec | {"name": name})
            found[name].await_ready()

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(each_of, ours, rest), pool.submit(each_of, rest)]:
            done.result()
    return [found[name] for name in names]


def compare(spec: dict, names: list[str], rounds: int, floors: list[Contender]) -> dict:
    """Rates of all contenders, and of the floors, over alternating rounds of one case."""
    own = warm(spec, names)
    contenders = floors + own
    for contender in floors:
        contender.rates, contender.answers = [], []
    for r in range(rounds):
        click.echo(f"{spec['title']}: round {r + 1} of {rounds}", err=True)
        for contender in contenders:
            contender.run(spec["tries"])
    kept = "operations_per_event", "bytes_per_event", "events_per_epoch"
    row = {"case": spec["title"], **{key: spec[key] for key in kept}, "contenders": {}}
    for contender in own:
        contender.end()
    for contender in contenders:
        if contender.failed:
            row["contenders"][contender.name] = {"failed": contender.failed}
            continue
        row["contenders"][contender.name] = {
            "rates": contender.rates,
            "median": statistics.median(contender.rates),
            "stolen": [a["stolen"] for a in contender.answers],
            "peak_gb": max(a["peak"] for a in contender.answers) / 1e9,
        }
    return row


def show(row: dict) -> None:
    """Print one case."""
    found = row["contenders"]
    mine, events = found[OURS], row["events_per_epoch"]
    columns = f"{'events/s':>10}{'times':>8}  {'(range)':16}{'peak GB':>8}{'s an epoch':>12}"
    click.echo(f"\n{row['case']}\n{'':40}{columns}")
    for name, result in found.items():
        if "failed" in result or "failed" in mine:
            click.echo(f"  {name:38}{'failed: ' + result.get('failed', 'see crnn_np')}")
            continue
        if any(name in floors for floors in FLOORS.values()):
            continue
        ratios = [a / b for a, b in zip(mine["rates"], result["rates"], strict=True)]
        spread = f"({min(ratios):.1f} to {max(ratios):.1f})"
        click.echo(
            f"  {name:38}{result['median']:10,.0f}{statistics.median(ratios):8.1f}  {spread:16}"
            f"{result['peak_gb']:8.2f}{events / result['median']:12,.1f}"
        )
    click.echo(f"  an epoch: {events:,} events, as if all windows were full")
    for name, of, each, unit in (
        (OURS, FLOOR, "operations_per_event", "GFLOP/s"),
        (OURS, products.PEAK, "operations_per_event", "GFLOP/s"),
        ("crnn_np, TF32", f"{FLOOR}, TF32", "operations_per_event", "GFLOP/s"),
        (OURS, COPY, "bytes_per_event", "GB/s"),
        ("crnn_np, TF32", COPY, "bytes_per_event", "GB/s"),
    ):
        rates, top = [found.get(key, {}).get("rates") for key in (name, of)]
        if rates and top:
            shares = [a * row[each] / 1e9 / b for a, b in zip(rates, top, strict=True)]
            share, spread = statistics.median(shares), f"{min(shares):.0%} to {max(shares):.0%}"
            usual = f"{statistics.median(top):,.0f} {unit}, {of}"
            click.echo(f"  {name}, share of the floor: {share:.0%} ({spread}) of {usual}")
            share = statistics.median(rates) * row[each] / 1e9 / max(top)
            click.echo(f"  {name}, share of its best round: {share:.0%} of {max(top):,.0f} {unit}")
    shares = [share for result in found.values() for share in result.get("stolen", [])]
    if any(shares):
        click.echo(
            f"  taken by this machine's host: {statistics.mean(shares):.1%} of its cores' time, "
            f"{max(shares):.0%} of the worst round"
        )


@click.command()
@click.argument("directory", required=False, type=click.Path(exists=True, file_okay=False))
@click.option("--hidden-size", "D", default=32, show_default=True, help="With DIRECTORY.")
@click.option("--quick", is_flag=True, help="At most 8 minutes: fewer contenders.")
@click.option("--rounds", default=7, show_default=True)
@click.option("--threads", default=cores(), show_default=True)
@click.option("--device", type=click.Choice(tuple(BACKENDS)), default="cpu", show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), callback=records.in_a_folder)
@click.option("--worker", hidden=True)
def main(
    directory, D: int, quick: bool, rounds: int, threads: int, device: str, json_file, worker
) -> None:
    """Print training events per second beside PyTorch's, their ratios, and peak memory."""
    if worker:
        work(json.loads(worker))
        return
    gpu = {}
    if device == "gpu":
        try:
            runtime = backends.get("cupy").device().xp.cuda.runtime
        except crnn_np.DeviceError as error:
            raise click.ClickException(str(error)) from error
        gpu = {"gpu": runtime.getDeviceProperties(0)["name"].decode()}
    about = describe_machine() | {
        **gpu,
        "threads": threads,
        "date": time.strftime("%Y-%m-%d"),
        "data": Path(directory).name if directory else "items drawn Zipf-like",
        **blas(),
    }
    click.echo(json.dumps(about, indent=1))
    common = {
        "directory": str(Path(directory).resolve()) if directory else None,
        "threads": threads,
        "device": device,
        "seconds": 0.5 if quick else 1.0,
        "tries": 1 if quick else 4,
    }
    rounds = 3 if quick else rounds
    shapes = SHAPES
    if directory:
        log = crnn_np.load(directory).train
        events = int(np.maximum(log.lengths - 1, 0).sum())
        shapes = {Path(directory).name: Shape(log.n_users, log.n_items, D, events)}
        for batch, preset in BATCHES.items():
            plan = crnn_np.resolve(preset).plan
            try:
                n = full_windows(log, plan).key.size
            except crnn_np.DataError as error:
                raise click.ClickException(f"{directory}: {error}") from error
            click.echo(f"{batch}: {n:,} full windows in an epoch")
    floors = [name for name in FLOORS[device] if not (quick and name in LEFT_OUT)]
    rows, floors = [], warm(common | {"title": "all cases"}, floors)
    for shape, (users, items, size, events, sharing) in shapes.items():
        for batch, preset in BATCHES.items():
            if sharing == "pooled" and (device == "cpu" or preset == "paper"):
                continue
            plan = crnn_np.resolve(preset).plan
            title = f"{shape} {batch} ({users:,} users, {items:,} items, D = {size})"
            spec = common | {"title": title, "shape": shape, "preset": preset, "D": size}
            spec |= {"sharing": sharing, "operations_per_event": 6 * size * items}
            once = 8 * items * size / (plan.batch * plan.window)
            spec |= {"bytes_per_event": 4 * (5 * items + once), "events_per_epoch": events}
            rows.append(compare(spec, names_of(device, sharing, quick), rounds, floors))
            show(rows[-1])
            if directory:
                row = compare(spec | {"title": f"{shape} {batch}"}, ["ragged"], rounds, [])
                rows.append(row)
                result = row["contenders"]["ragged"]
                said = f"{result['median']:.0%}" if "median" in result else result["failed"]
                click.echo(f"  windows as they come, with dropout, of full ones: {said}")
            if json_file:
                records.write_json(json_file, {"about": about, "rows": rows})
    for contender in floors:
        contender.end()
    click.echo(f"\n{QUOTED}")


if __name__ == "__main__":
    main()
