/* The threads of a block as real threads, for `emulator.hpp`: what a sanitizer can follow.

   Each barrier has a lock of its own (one for the block, one for each warp), so that a barrier
   orders what it orders on a GPU and no more; all other counts are relaxed atomics. */
#include <atomic>
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

thread_local Index thread_index;
thread_local unsigned shuffle_count;
Barrier block_barrier, warp_barriers[MOST / 32];

/* Threads that wait or have returned, plus WAITING for each that waits. */
const int WAITING = 1 << 16;
std::atomic<int> stopped;

inline unsigned &shuffles()
{
    return shuffle_count;
}

void stop(const char *what, int line)
{
    diverged(what, line);
    fprintf(stderr, "%s\n", message);
    fflush(stderr);
    _Exit(3);
}

/* Count a thread as stopped: if it is the last and one waits, none can ever go on. */
void count_stopped(int what, int line)
{
    int now = stopped.fetch_add(what, std::memory_order_relaxed) + what;
    if (now % WAITING == int(block_size.x) && now >= WAITING)
        stop("a thread has returned, or the others are at another barrier", line);
}

void wait(Scope scope, int line)
{
    Barrier &b = scope == BLOCK ? block_barrier : warp_barriers[thread_index.x / 32];
    std::unique_lock<std::mutex> held(b.lock);
    if (b.arrived && b.line != line)
        stop("the others are at another barrier", line);
    b.line = line;
    if (++b.arrived == b.size) {
        b.arrived = 0;
        ++b.round;
        stopped.fetch_sub((b.size - 1) * (WAITING + 1), std::memory_order_relaxed);
        b.opened.notify_all();
        return;
    }
    count_stopped(WAITING + 1, line);
    unsigned round = b.round;
    b.opened.wait(held, [&] { return b.round != round; });
}

/* All threads wait for each other; no part of the kernel's own barriers. */
void meet()
{
    static Barrier between;
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

void begin_block(int block, long shared)
{
    block_index = {block % grid_size.x, block / grid_size.x, 0};
    free(dynamic);
    dynamic = static_cast<unsigned char *>(malloc(shared));
    poison(shared);
    stopped = 0;
}

void run_thread(int i, const Kernel *kernel, long shared, void **arguments)
{
    thread_index = {unsigned(i), 0, 0};
    for (unsigned block = 0; block < grid_size.x * grid_size.y; ++block) {
        if (i == 0)
            begin_block(block, shared);
        meet();
        kernel->call(arguments);
        count_stopped(1, 0);
        meet();
    }
}

void run(const Kernel &kernel, int blocks_x, int blocks_y, int threads, long shared,
         void **arguments)
{
    grid_size = {unsigned(blocks_x), unsigned(blocks_y), 1};
    block_size = {unsigned(threads), 1, 1};
    block_barrier.size = threads;
    for (Barrier &warp : warp_barriers)
        warp.size = 32;
    std::vector<std::thread> all;
    for (int i = 0; i < threads; ++i)
        all.emplace_back(run_thread, i, &kernel, shared, arguments);
    for (std::thread &thread : all)
        thread.join();
    free(dynamic);
}

}  // namespace emulator
