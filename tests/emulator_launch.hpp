/* The entry of a library of kernels, for `emulator.py`. */

/* NULL, or what went wrong. */
extern "C" const char *emulator_launch(int kernel, int blocks_x, int blocks_y, int threads,
                                       long shared, int cooperative, void **arguments,
                                       int reverse)
{
    emulator::reverse = reverse;
    bool good = emulator::run(emulator_kernels[kernel], blocks_x, blocks_y, threads, shared,
                              cooperative, arguments);
    return good ? nullptr : emulator::message;
}
