/* The threads of a block as fibers on one thread, for `emulator.hpp`. */
#include <sys/mman.h>
#include <ucontext.h>

namespace emulator {

enum State { READY, AT_BARRIER, DONE };
struct Fiber {
    jmp_buf place;
    State state;
    Scope scope;
    int line;
    unsigned shuffles;
};

const size_t STACK = 1 << 18;

Index thread_index;
Fiber fibers[MOST];
int made;
bool reverse;
jmp_buf scheduler;
ucontext_t first, before;
const Kernel *kernel;
void **arguments;

inline unsigned &shuffles()
{
    return fibers[thread_index.x].shuffles;
}

__attribute__((noinline)) void pause()
{
    if (!_setjmp(fibers[thread_index.x].place))
        _longjmp(scheduler, 1);
}

__attribute__((noinline)) void resume(int i)
{
    thread_index.x = i;
    if (!_setjmp(scheduler))
        _longjmp(fibers[i].place, 1);
}

void live()
{
    if (!_setjmp(fibers[thread_index.x].place))
        setcontext(&before);
    for (;;) {
        kernel->call(arguments);
        fibers[thread_index.x].state = DONE;
        pause();
    }
}

void make(int n)
{
    static char *stacks = static_cast<char *>(mmap(nullptr, STACK *MOST, PROT_READ | PROT_WRITE,
        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    for (; made < n; ++made) {
        thread_index.x = made;
        getcontext(&first);
        first.uc_stack.ss_sp = stacks + STACK * made;
        first.uc_stack.ss_size = STACK;
        first.uc_link = nullptr;
        makecontext(&first, live, 0);
        swapcontext(&before, &first);
    }
}

inline void wait(Scope scope, int line)
{
    Fiber &self = fibers[thread_index.x];
    self.state = AT_BARRIER;
    self.scope = scope;
    self.line = line;
    pause();
}

/* Let fibers from..to - 1 go on if all of them are at one barrier. */
bool release(Scope scope, int from, int to)
{
    for (int i = from; i < to; ++i)
        if (fibers[i].state != AT_BARRIER || fibers[i].scope != scope
            || fibers[i].line != fibers[from].line)
            return false;
    for (int i = from; i < to; ++i)
        fibers[i].state = READY;
    return true;
}

bool run_block(int n)
{
    for (int i = 0; i < n; ++i) {
        fibers[i].state = READY;
        fibers[i].shuffles = 0;
    }
    for (;;) {
        int done = 0;
        for (int k = 0; k < n; ++k) {
            int i = reverse ? n - 1 - k : k;
            if (fibers[i].state == READY)
                resume(i);
            done += fibers[i].state == DONE;
        }
        if (done == n)
            return true;
        bool released = false;
        for (int i = 0; i < n; i += 32)
            released |= release(WARP, i, i + 32);
        if (!released && !release(BLOCK, 0, n)) {
            int line = 0;
            for (int i = 0; i < n; ++i)
                line = fibers[i].state == AT_BARRIER ? fibers[i].line : line;
            diverged(done ? "a thread has returned" : "the others are at another barrier", line);
            made = 0;
            return false;
        }
    }
}

bool run(const Kernel &which, int blocks_x, int blocks_y, int threads, long shared, void **given)
{
    unsigned char *buffer = static_cast<unsigned char *>(aligned_alloc(64, shared / 64 * 64 + 128));
    unsigned char guard[GUARD];
    memset(guard, 0xA5, GUARD);
    memcpy(buffer + shared, guard, GUARD);
    dynamic = buffer;
    kernel = &which;
    arguments = given;
    grid_size = {unsigned(blocks_x), unsigned(blocks_y), 1};
    block_size = {unsigned(threads), 1, 1};
    make(threads);
    bool good = true;
    for (int k = 0, blocks = blocks_x * blocks_y; good && k < blocks; ++k) {
        int block = reverse ? blocks - 1 - k : k;
        block_index = {unsigned(block % blocks_x), unsigned(block / blocks_x), 0};
        poison(shared);
        good = run_block(threads);
        if (good && memcmp(buffer + shared, guard, GUARD)) {
            snprintf(message, sizeof message, "a write past the dynamic shared memory");
            good = false;
        }
    }
    free(buffer);
    return good;
}

}  // namespace emulator
