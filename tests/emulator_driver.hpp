/* A process that runs one launch: read from standard input, arrays to standard output. */
#include <stdint.h>

static void read_all(void *to, size_t bytes)
{
    if (fread(to, 1, bytes, stdin) != bytes)
        abort();
}

int main()
{
    int64_t head[7]; /* kernel, blocks_x, blocks_y, threads, shared, cooperative, arguments */
    read_all(head, sizeof head);
    int n = int(head[6]);
    std::vector<void *> memory(n), values(n);
    std::vector<int64_t> bytes(n), pointer(n), within(n), offset(n);
    for (int i = 0; i < n; ++i) {
        int64_t argument[4]; /* is a pointer, the argument in whose memory it lies, where, bytes */
        read_all(argument, sizeof argument);
        pointer[i] = argument[0];
        within[i] = argument[1];
        offset[i] = argument[2];
        bytes[i] = argument[3];
        memory[i] = malloc(bytes[i]);
        read_all(memory[i], bytes[i]);
    }
    for (int i = 0; i < n; ++i) {
        if (within[i] != i) {
            free(memory[i]);
            memory[i] = static_cast<char *>(memory[within[i]]) + offset[i];
        }
        values[i] = pointer[i] ? &memory[i] : memory[i];
    }
    emulator::run(emulator_kernels[head[0]], int(head[1]), int(head[2]), int(head[3]), head[4],
                  head[5], values.data());
    for (int i = 0; i < n; ++i)
        if (pointer[i] == 1)
            fwrite(memory[i], 1, bytes[i], stdout);
    return 0;
}
