/* The threads of all blocks alive as real threads, for `emulator.hpp`: what a sanitizer can follow.

   Each barrier has a lock of its own (one for a block, one for each warp), so that a barrier orders
   what it orders on a GPU and no more; all other counts are relaxed atomics. So is a counter of the
   kernel, but for an addition after a fence and a fence after a look at it. */
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace emulator {

struct Barrier {
    std::mutex lock;
    std::condition_variable opened;
    int size, arrived, line;
    unsigned round;
};

/* `stopped`: threads that wait or have returned, plus WAITING for each that waits. */
const int WAITING = 1 << 16;
struct Block {
    Index index;
    unsigned char *dynamic;
    Barrier barrier, warps[MOST / 32], between;
    std::atomic<int> stopped;
    unsigned long long slots[2][MOST];
};

thread_local Index thread_index;
thread_local Block *here;
thread_local unsigned shuffle_count;
thread_local unsigned *polled; /* since the last fence */
thread_local bool fenced;      /* since the last addition */

inline unsigned &shuffles()
{
    return shuffle_count;
}

void stop(const char *what, int line)
{
    diverged(what, line, here->index);
    fprintf(stderr, "%s\n", message);
    fflush(stderr);
    _Exit(3);
}

/* Count a thread as stopped: if it is the last and one waits, none can ever go on. */
void count_stopped(int what, int line)
{
    int now = here->stopped.fetch_add(what, std::memory_order_relaxed) + what;
    if (now % WAITING == int(block_size.x) && now >= WAITING)
        stop("a thread has returned, or the others are at another barrier", line);
}

void wait(Scope scope, int line)
{
    Barrier &b = scope == BLOCK ? here->barrier : here->warps[thread_index.x / 32];
    std::unique_lock<std::mutex> held(b.lock);
    if (b.arrived && b.line != line)
        stop("the others are at another barrier", line);
    b.line = line;
    if (++b.arrived == b.size) {
        b.arrived = 0;
        ++b.round;
        here->stopped.fetch_sub((b.size - 1) * (WAITING + 1), std::memory_order_relaxed);
        b.opened.notify_all();
        return;
    }
    count_stopped(WAITING + 1, line);
    unsigned round = b.round;
    b.opened.wait(held, [&] { return b.round != round; });
}

inline unsigned poll(unsigned *counter, int)
{
    std::this_thread::sleep_for(std::chrono::microseconds(100));
    polled = counter;
    return __atomic_load_n(counter, __ATOMIC_RELAXED);
}

inline void fence()
{
    if (polled)
        __atomic_load_n(polled, __ATOMIC_ACQUIRE);
    polled = nullptr;
    fenced = true;
}

inline unsigned add(unsigned *counter, unsigned value)
{
    bool release = fenced;
    fenced = false;
    return release ? __atomic_fetch_add(counter, value, __ATOMIC_ACQ_REL)
                   : __atomic_fetch_add(counter, value, __ATOMIC_RELAXED);
}

/* All threads of a block wait for each other; no part of the kernel's own barriers. */
void meet()
{
    Barrier &between = here->between;
    std::unique_lock<std::mutex> held(between.lock);
    if (++between.arrived == int(block_size.x)) {
        between.arrived = 0;
        ++between.round;
        between.opened.notify_all();
        return;
    }
    unsigned round = between.round;
    between.opened.wait(held, [&] { return between.round != round; });
}

void begin_block(unsigned number, long shared)
{
    here->index = {number % grid_size.x, number / grid_size.x, 0};
    free(here->dynamic);
    here->dynamic = static_cast<unsigned char *>(malloc(shared));
    fill(here->dynamic, here->dynamic + shared);
    fill(__start_shared_memory, __stop_shared_memory);
    here->stopped = 0;
}

void run_thread(int i, Block *block, unsigned first, unsigned alive, const Kernel *kernel,
                long shared, void **arguments)
{
    thread_index = {unsigned(i), 0, 0};
    here = block;
    for (unsigned number = first; number < grid_size.x * grid_size.y; number += alive) {
        if (i == 0)
            begin_block(number, shared);
        meet();
        kernel->call(arguments);
        count_stopped(1, 0);
        meet();
    }
}

void run(const Kernel &kernel, int blocks_x, int blocks_y, int threads, long shared,
         bool cooperative, void **arguments)
{
    unsigned alive = cooperative ? blocks_x * blocks_y : 1;
    if (alive > 1 && __start_shared_memory != __stop_shared_memory) {
        fprintf(stderr, "blocks that are alive together have no static shared memory here\n");
        _Exit(3);
    }
    grid_size = {unsigned(blocks_x), unsigned(blocks_y), 1};
    block_size = {unsigned(threads), 1, 1};
    std::vector<Block> blocks(alive);
    std::vector<std::thread> all;
    for (unsigned k = 0; k < alive; ++k) {
        blocks[k].barrier.size = threads;
        for (Barrier &warp : blocks[k].warps)
            warp.size = 32;
        for (int i = 0; i < threads; ++i)
            all.emplace_back(run_thread, i, &blocks[k], k, alive, &kernel, shared, arguments);
    }
    for (std::thread &thread : all)
        thread.join();
    for (Block &block : blocks)
        free(block.dynamic);
}

}  // namespace emulator
