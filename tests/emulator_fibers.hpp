/* The threads of all blocks alive as fibers on one thread, for `emulator.hpp`. */
#include <sys/mman.h>
#include <ucontext.h>

#include <vector>

namespace emulator {

enum State { READY, AT_BARRIER, POLLING, DONE };
struct Fiber {
    jmp_buf place;
    void *stack;
    State state;
    Scope scope;
    int line;
    unsigned shuffles;
};

/* `fixed` is its static shared memory while another block runs. */
struct Block {
    Index index;
    Fiber *fibers;
    unsigned char *dynamic;
    std::vector<unsigned char> fixed;
    unsigned long long slots[2][MOST];
    bool done;
};

const size_t STACK = 1 << 18;
const int MOST_ALIVE = 4 * MOST;

Index thread_index;
Block *here;
Fiber fibers[MOST_ALIVE];
int made;
bool reverse, moved; /* whether a thread did more than to look at a counter */
jmp_buf scheduler;
ucontext_t first, before;
const Kernel *kernel;
void **arguments;

inline Fiber &self()
{
    return here->fibers[thread_index.x];
}

inline unsigned &shuffles()
{
    return self().shuffles;
}

__attribute__((noinline)) void pause()
{
    if (!_setjmp(self().place))
        _longjmp(scheduler, 1);
}

__attribute__((noinline)) void resume(int i)
{
    thread_index.x = i;
    if (!_setjmp(scheduler))
        _longjmp(self().place, 1);
}

void live()
{
    if (!_setjmp(fibers[made].place))
        setcontext(&before);
    for (;;) {
        kernel->call(arguments);
        self().state = DONE;
        pause();
    }
}

void make(int n)
{
    for (; made < n; ++made) {
        void *&stack = fibers[made].stack;
        if (!stack)
            stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        getcontext(&first);
        first.uc_stack.ss_sp = stack;
        first.uc_stack.ss_size = STACK;
        first.uc_link = nullptr;
        makecontext(&first, live, 0);
        swapcontext(&before, &first);
    }
}

inline void wait(Scope scope, int line)
{
    Fiber &fiber = self();
    fiber.state = AT_BARRIER;
    fiber.scope = scope;
    fiber.line = line;
    pause();
}

/* Let the other threads and blocks run, then look. */
inline unsigned poll(unsigned *counter, int line)
{
    unsigned seen = *counter;
    self().state = POLLING;
    self().line = line;
    pause();
    moved |= *counter != seen;
    return *counter;
}

inline void fence() {}

inline unsigned add(unsigned *counter, unsigned value)
{
    return (*counter += value) - value;
}

/* Let the block's fibers from..to - 1 go on if all of them are at one barrier. */
bool release(Scope scope, int from, int to)
{
    Fiber *fibers = here->fibers;
    for (int i = from; i < to; ++i)
        if (fibers[i].state != AT_BARRIER || fibers[i].scope != scope
            || fibers[i].line != fibers[from].line)
            return false;
    for (int i = from; i < to; ++i)
        fibers[i].state = READY;
    return true;
}

/* Until all threads of the block have returned, or those that can go on poll. */
bool run_block(int n)
{
    Fiber *fibers = here->fibers;
    for (int i = 0; i < n; ++i)
        if (fibers[i].state == POLLING)
            fibers[i].state = READY;
    for (;;) {
        int done = 0, polling = 0;
        for (int k = 0; k < n; ++k) {
            int i = reverse ? n - 1 - k : k;
            if (fibers[i].state == READY) {
                resume(i);
                moved |= fibers[i].state != POLLING;
            }
            done += fibers[i].state == DONE;
            polling += fibers[i].state == POLLING;
        }
        here->done = done == n;
        if (here->done)
            return true;
        bool released = false;
        for (int i = 0; i < n; i += 32)
            released |= release(WARP, i, i + 32);
        if (!released && !release(BLOCK, 0, n)) {
            if (polling)
                return true;
            int line = 0;
            for (int i = 0; i < n; ++i)
                line = fibers[i].state == AT_BARRIER ? fibers[i].line : line;
            diverged(done ? "a thread has returned" : "the others are at another barrier", line,
                     here->index);
            return false;
        }
    }
}

/* Blocks that are alive together, in turns. */
bool run_blocks(std::vector<Block> &blocks, int n)
{
    for (;;) {
        const Block *waits = nullptr;
        moved = false;
        for (Block &block : blocks) {
            if (block.done)
                continue;
            here = &block;
            std::copy(block.fixed.begin(), block.fixed.end(), __start_shared_memory);
            if (!run_block(n))
                return false;
            std::copy_n(__start_shared_memory, block.fixed.size(), block.fixed.begin());
            waits = block.done ? waits : &block;
        }
        if (!waits)
            return true;
        if (!moved) {
            int line = 0;
            for (int i = 0; i < n; ++i)
                line = waits->fibers[i].state == POLLING ? waits->fibers[i].line : line;
            diverged("not all blocks arrive", line, waits->index);
            return false;
        }
    }
}

bool run(const Kernel &which, int blocks_x, int blocks_y, int threads, long shared,
         bool cooperative, void **given)
{
    int blocks = blocks_x * blocks_y;
    if (cooperative && blocks * threads > MOST_ALIVE) {
        snprintf(message, sizeof message, "at most %d threads can be alive here", MOST_ALIVE);
        return false;
    }
    std::vector<Block> alive(cooperative ? blocks : 1);
    unsigned char guard[GUARD];
    memset(guard, 0xA5, GUARD);
    kernel = &which;
    arguments = given;
    grid_size = {unsigned(blocks_x), unsigned(blocks_y), 1};
    block_size = {unsigned(threads), 1, 1};
    make(int(alive.size()) * threads);
    bool good = true;
    for (Block &block : alive) {
        size_t bytes = shared / 64 * 64 + 128;
        block.dynamic = static_cast<unsigned char *>(aligned_alloc(64, bytes));
        block.fibers = fibers + (&block - &alive[0]) * threads;
    }
    for (int first = 0; good && first < blocks; first += int(alive.size())) {
        for (Block &block : alive) {
            int k = first + int(&block - &alive[0]), number = reverse ? blocks - 1 - k : k;
            block.index = {unsigned(number % blocks_x), unsigned(number / blocks_x), 0};
            block.done = false;
            block.fixed.assign(__stop_shared_memory - __start_shared_memory, 0xFF);
            memset(block.dynamic, 0xFF, shared);
            memcpy(block.dynamic + shared, guard, GUARD);
            for (int i = 0; i < threads; ++i) {
                block.fibers[i].state = READY;
                block.fibers[i].shuffles = 0;
            }
        }
        good = run_blocks(alive, threads);
        if (!good)
            made = 0;
        for (Block &block : alive)
            if (good && memcmp(block.dynamic + shared, guard, GUARD)) {
                snprintf(message, sizeof message, "a write past the dynamic shared memory");
                good = false;
            }
    }
    for (Block &block : alive)
        free(block.dynamic);
    return good;
}

}  // namespace emulator
