"""The emulated device finds what it is there to find: each fault is planted in a kernel."""

import emulator
import numpy as np
import pytest

KERNEL = """
#include "common.cuh"
extern "C" __global__ void __launch_bounds__(64)
rotate(const real *__restrict__ a, real *__restrict__ out, int fault)
{
    SHARED(real, row);
    __shared__ real fixed[64];
    __shared__ real after[64];
    int i = threadIdx.x, n = blockDim.x;
    row[i] = a[i];
    after[i] = 0;
    real *p = fixed;
    p[fault == FIXED ? i + 1 : i] = a[i];
    if (fault == RETURN && i == 33)
        return;
    if (fault == WARP)
        __syncwarp();
    else if (fault != RACE)
        __syncthreads();
    if (fault == APART && i >= 32)
        __syncthreads();
    if (fault == DYNAMIC)
        row[i + 1] = 0;
    real other = row[(i + 40) % n];
    real sum = block_sum(other);
    out[fault == ARRAY ? i + 1 : i] = other + after[i];
    if (fault == SHIFT)
        out[i] = 1 << (i + n);
    if (fault == UNSET)
        out[i] = after[i] + row[n];
    if (sum != 2016)
        out[i] += fixed[63 - i];
}

extern "C" __global__ void add_one(real *a, const unsigned char *where, long long n, real one)
{
    for (long long i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        a[i] += where[i] ? one : 0;
}

extern "C" __global__ void add_rows(const real *a, const real *b, real *out)
{
    int i = blockIdx.y * gridDim.x * blockDim.x + blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = __ldg(a + i) + b[i];
}
"""
GRID_KERNEL = """
#include "common.cuh"
extern "C" __global__ void pass_on(real *a, real *out, unsigned *counter, int fault)
{
    ROW;
    int n = gridDim.x, i = threadIdx.x, block = blockIdx.x;
    row[i] = block;
    for (int step = 0; step < 3; ++step) {
        real *now = a + step * n * blockDim.x;
        now[block * blockDim.x + i] = row[i];
        unsigned arrived = 0;
        if (fault == ONCE && step == 1 && block == 1)
            return;
        if (fault == UNFENCED) {
            __syncthreads();
            if (i == 0)
                arrived = atomicAdd(counter, block ? 1u : 0x80000001u - n);
        } else if (fault != MISSING) {
            arrived = grid_arrive(counter);
        }
        if (fault != MISSING)
            grid_wait(counter, arrived);
        row[i] = 1 + __ldcg(now + (block + 1) % n * blockDim.x + (i + 1) % blockDim.x);
        __syncthreads();
    }
    out[block * blockDim.x + i] = row[i];
}
"""
FAULTS = ["FIXED", "RETURN", "WARP", "RACE", "APART", "DYNAMIC", "ARRAY", "SHIFT", "UNSET"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("kernels") / "faults.cu"
    path.write_text(f"enum Fault {{ NONE, {', '.join(FAULTS)} }};{KERNEL}", encoding="utf-8")
    return path


GRID_FAULTS = ["MISSING", "ONCE", "UNFENCED"]


@pytest.fixture(scope="module")
def grid_sources(tmp_path_factory):
    folder, sources = tmp_path_factory.mktemp("kernels"), {}
    for name, row in (("dynamic", "SHARED(real, row)"), ("static", "__shared__ real row[64]")):
        sources[name] = folder / f"{name}.cu"
        kernel = GRID_KERNEL.replace("ROW", row)
        text = f"enum Fault {{ NONE, {', '.join(GRID_FAULTS)} }};{kernel}"
        sources[name].write_text(text, encoding="utf-8")
    return sources


def pass_on(source, fault=None, **options):
    """Each of three blocks begins with its number, and three times takes the next one's plus 1."""
    device = emulator.EmulatedDevice(np.float64, sources=[source], **options)
    out, counter = device.xp.empty((3, 64)), device.xp.zeros(1, np.uint32)
    number = np.int32(GRID_FAULTS.index(fault) + 1 if fault else 0)
    for _ in range(2):  # the counter is not zero again after three barriers
        a = device.xp.empty((3, 3, 64))
        device.launch("pass_on", 3, 64, (a, out, counter, number), 512)
    return out.get()


def rotate(source, fault, sanitizer=None, reverse=False, dtype=np.float64):
    device = emulator.EmulatedDevice(dtype, sanitizer, reverse, sources=[source])
    a = device.xp.asarray(np.arange(64, dtype=dtype))
    out = device.xp.empty(64, dtype)
    number = np.int32(FAULTS.index(fault) + 1 if fault else 0)
    device.launch("rotate", 2, 64, (a, out, number), 64 * device.dtype.itemsize)
    return out.get()


@pytest.mark.parametrize("sanitizer", [None, "address", "thread"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_right_kernel(source, sanitizer, dtype):
    assert np.array_equal(rotate(source, None, sanitizer, dtype=dtype), (np.arange(64) + 40) % 64)


@pytest.mark.parametrize(
    ("sanitizer", "fault", "text"),
    [
        (None, "RETURN", "a thread has returned"),
        (None, "APART", "barrier in line"),
        (None, "DYNAMIC", "past the dynamic shared memory"),
        ("address", "FIXED", "insufficient space|global-buffer-overflow"),
        ("address", "DYNAMIC", "heap-buffer-overflow"),
        ("address", "ARRAY", "heap-buffer-overflow"),
        ("address", "SHIFT", "shift exponent"),
        ("address", "RETURN", "a thread has returned"),
        ("thread", "RACE", "data race"),
        ("thread", "WARP", "data race"),
        ("thread", "APART", "barrier in line"),
    ],
)
def test_planted_fault_is_found(source, sanitizer, fault, text):
    with pytest.raises(emulator.EmulatorError, match=text):
        rotate(source, fault, sanitizer)


def test_order_of_threads_shows_a_race(source):
    forth, back = rotate(source, "RACE"), rotate(source, "RACE", reverse=True)
    assert np.isnan(forth).any()
    assert np.isnan(back).any()
    assert not np.array_equal(np.isnan(forth), np.isnan(back))


def test_shared_memory_begins_as_nan(source):
    device = emulator.EmulatedDevice(np.float64, sources=[source])
    a, out = device.xp.zeros(64), device.xp.zeros(64)
    number = np.int32(FAULTS.index("UNSET") + 1)
    device.launch("rotate", 1, 64, (a, out, number), 65 * 8)
    assert np.isnan(out.get()).all()


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ("dynamic", {}),
        ("static", {"reverse": True}),
        ("dynamic", {"sanitizer": "thread"}),
    ],
)
def test_blocks_meet(grid_sources, row, options):
    expected = np.repeat([[3.0], [4.0], [5.0]], 64, axis=1)
    assert np.array_equal(pass_on(grid_sources[row], **options), expected)


def test_a_missing_barrier_of_the_grid_is_found(grid_sources):
    for reverse in (False, True):
        assert np.isnan(pass_on(grid_sources["dynamic"], "MISSING", reverse=reverse)).any()


@pytest.mark.parametrize(
    ("row", "sanitizer", "fault", "text"),
    [
        ("dynamic", "thread", "MISSING", "data race"),
        ("dynamic", "thread", "UNFENCED", "data race"),
        ("dynamic", None, "ONCE", r"barrier in line \d+, block \(2, 0\): not all blocks arrive"),
        ("dynamic", "thread", "ONCE", "not all blocks arrive"),
        ("static", "thread", None, "no static shared memory"),
    ],
)
def test_planted_fault_of_a_grid_is_found(grid_sources, monkeypatch, row, sanitizer, fault, text):
    monkeypatch.setattr(emulator, "LONGEST", 1 if fault == "ONCE" else 60)
    with pytest.raises(emulator.EmulatorError, match=text):
        pass_on(grid_sources[row], fault, sanitizer=sanitizer)


def test_a_grid_that_cannot_be_alive_at_once_is_refused(grid_sources):
    with pytest.raises(emulator.EmulatorError, match="a grid of 3 can't be alive"):
        pass_on(grid_sources["dynamic"], multiprocessors=2)


@pytest.mark.parametrize("sanitizer", [None, "address"])
def test_in_place_and_scalars(source, sanitizer):
    device = emulator.EmulatedDevice(np.float32, sanitizer, sources=[source])
    a = device.xp.asarray(np.arange(100, dtype=np.float32))
    where = device.xp.asarray(np.arange(100) % 3 == 0)
    device.launch("add_one", 2, 32, (a, where, np.int64(100), np.float32(1)))
    assert np.array_equal(a.get(), np.arange(100) + (np.arange(100) % 3 == 0))
    b, out = device.xp.ones(128, np.float32), device.xp.empty(128, np.float32)
    device.launch("add_rows", (2, 2), 32, (b, b, out))
    assert np.array_equal(out.get(), np.full(128, 2))
    device.launch("add_rows", (2, 2), 32, (b, b, b))
    assert np.array_equal(b.get(), np.full(128, 2))
    whole = device.xp.asarray(np.arange(256, dtype=np.float32))
    device.launch("add_rows", (2, 2), 32, (whole[128:], b, whole))
    assert np.array_equal(whole.get(), np.r_[130:258, 128:256])


def test_a_race_in_an_array_that_lies_inside_another(source):
    device = emulator.EmulatedDevice(np.float64, "thread", sources=[source])
    b, whole = device.xp.ones(128), device.xp.ones(129)
    with pytest.raises(emulator.EmulatorError, match="data race"):
        device.launch("add_rows", (2, 2), 32, (whole[1:], b, whole))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"arguments": lambda a: (a,)}, "1 arguments"),
        ({"arguments": lambda a: (a, a, 0)}, "a int"),
        ({"arguments": lambda a: (a, a, np.int64(0))}, "int64"),
        ({"arguments": lambda a: (a, np.zeros(64), np.int32(0))}, "a ndarray"),
        ({"arguments": lambda a: (a, a[::2], np.int32(0))}, "not C-contiguous"),
        ({"arguments": lambda a: (a, a.astype(np.float32), np.int32(0))}, "float32"),
        ({"block": 48}, "a block of 48"),
        ({"block": 96}, "a block of 96"),
        ({"grid": 0}, "a grid of 0"),
        ({"name": "rotat"}, "no kernel"),
        ({"shared": 1 << 20}, "bytes of shared memory"),
    ],
)
def test_wrong_launch_is_refused(source, change, text):
    device = emulator.EmulatedDevice(np.float64, sources=[source])
    a = device.xp.zeros(64)
    launch = {"name": "rotate", "grid": 1, "block": 64, "shared": 512} | change
    launch["arguments"] = launch.get("arguments", lambda a: (a, a, np.int32(0)))(a)
    with pytest.raises(emulator.EmulatorError, match=text):
        device.launch(**launch)


@pytest.mark.parametrize(
    "mix",
    [
        lambda a, host: a + host,
        lambda a, host: host + a,
        lambda a, host: np.asarray(a),
        lambda a, host: np.concatenate([a, host]),
        lambda a, host: host[a.astype(np.int64)],
        lambda a, host: a[host.astype(np.int64)],
        lambda a, host: a.__setitem__(slice(None), host),
        lambda a, host: a.take(host),
    ],
)
def test_host_and_device_do_not_mix(mix):
    xp = emulator.EmulatedDevice(np.float64).xp
    with pytest.raises(TypeError):
        mix(xp.zeros(3), np.zeros(3))


def test_arrays():
    xp = emulator.EmulatedDevice(np.float64).xp
    a = xp.asarray(np.arange(6.0))
    assert float((2 * a + 1).sum()) == 36
    assert np.isnan(xp.empty((2, 3)).get()).all()
    assert np.array_equal((a.reshape(2, 3).T[1:] > 1).get(), [[False, True], [True, True]])
    a[a > 3] = 0
    assert np.array_equal(a.get(), [0, 1, 2, 3, 0, 0])
    with pytest.raises(AttributeError):
        xp.nothing_of_cupy()


@pytest.mark.parametrize("beta", [0.0, 1.0, 0.5])
def test_product(beta):
    rng = np.random.default_rng(1)
    device = emulator.EmulatedDevice(np.float64)
    a, b, c = rng.normal(size=(3, 5)), rng.normal(size=(5, 4)), rng.normal(size=(3, 4))
    out = device.xp.asarray(c)
    device.product(device.xp.asarray(a), device.xp.asarray(b.T.copy()).T, out, beta)
    assert np.allclose(out.get(), a @ b + beta * c)
