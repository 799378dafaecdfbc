// A program: calls of operators one after the other, over and over, without Python (../native/program.py records it).
//
// Every thread goes through the same list; between two calls all wait for each other. What changes from one pass to the
// next, a step's row of a table, is an address that grows with the pass.

#include <chrono>
#include <cstring>

#include "team.h"
#include "worker.h"

namespace {

constexpr int64_t MOST_ARGUMENTS = 64;  // of a call; as in program.py

struct Entry {
    void (*share)(const int64_t* call, Worker* worker);
    int64_t first, count;         // its arguments
    int64_t moving_first, moving;  // those of them that change
};

struct Moving {
    int64_t argument, bytes;  // its number in the call, what is added to it with each pass
};

struct Program {
    const Entry* entries;
    int64_t count;
    const int64_t* arguments;
    const Moving* moving;
    float* memory;  // scratch of all threads, `stride` floats each
    int64_t stride;
    int64_t* nanoseconds;  // of each entry, summed up; or null
};

int64_t now() {
    const auto since = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::nanoseconds>(since).count();
}

struct Run {
    const Program& program;
    Team& team;
    const int64_t first, deadline;
    // Thread 0 lowers it before the barrier after which it holds; a thread that reads it late reads what is beyond.
    mutable std::atomic<int64_t> end;
};

void go(const void* what, int64_t thread) {
    const Run& run = *static_cast<const Run*>(what);
    const Program& program = run.program;
    const int64_t threads = run.team.threads;
    Worker worker{thread, threads, program.memory + thread * program.stride, program.stride, Team::wait, &run.team};
    int64_t time = now();
    for (int64_t at = run.first; at < run.end.load(std::memory_order_relaxed); ++at) {
        const int64_t pass = at / program.count, number = at % program.count;
        const Entry& entry = program.entries[number];
        const int64_t* call = program.arguments + entry.first;
        int64_t moved[MOST_ARGUMENTS];
        if (entry.moving) {
            std::memcpy(moved, call, entry.count * sizeof(int64_t));
            for (const Moving* m = program.moving + entry.moving_first, *last = m + entry.moving; m < last; ++m) {
                moved[m->argument] += pass * m->bytes;
            }
            call = moved;
        }
        entry.share(call, &worker);
        if (thread == 0 && time > run.deadline) run.end.store(at + 1, std::memory_order_relaxed);
        worker.barrier();
        if (thread == 0) {
            const int64_t ended = now();
            if (program.nanoseconds) program.nanoseconds[number] += ended - time;
            time = ended;
        }
    }
}

}  // namespace

// A team of so many threads, or as many as can be started; it stays for as long as the process.
extern "C" void* program_team(int64_t threads) { return Team::of(threads); }

extern "C" int64_t program_threads(const void* team) { return static_cast<const Team*>(team)->threads; }

// Entries first..end - 1, counted through all passes, but after about so many nanoseconds no further ones. -> the next.
//
// PyTorch's threads, of OpenMP, stay awake for milliseconds after every call, on the cores that the team needs: ten steps
// of one image took 21 ms instead of 7 (two cores of an EPYC). They are ended, and started again when PyTorch needs them.
// alone: in a forked process, which has none.
extern "C" int64_t program(const Program* program, void* team, int64_t first, int64_t end, int64_t nanoseconds,
                           int alone) {
    Team& all = *static_cast<Team*>(team);
    if (all.threads > 1 && !alone) omp_pause_resource(omp_pause_soft, omp_get_initial_device());
    const Run run{*program, all, first, now() + nanoseconds, end};
    all.run(go, &run);
    return run.end.load();
}
