// How threads share one call of an operator, and how an operator on its own gets them: from PyTorch's OpenMP runtime.
//
// An operator OP is in OP.h: `struct OpCall`, 8-byte fields in the order in which Python passes them;
// `int64_t op_floats(const OpCall&, int64_t threads)`, the floats of scratch memory that each of so many threads, or of
// fewer, needs; and
// `void op(const OpCall&, Worker&)`, one thread's share, which every thread of a team calls with the same call. In there:
// no allocation, no OpenMP, no exception. Work is dealt out by the thread's number, and sums are in an order that does
// not depend on how many threads there are, so that results are the same bits for any number.

#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <mutex>
#include <omp.h>
#include <thread>
#include <vector>

namespace {

constexpr int64_t LINE = 64 / sizeof(float);  // of a cache

inline int64_t split(int64_t whole, int64_t parts) { return (whole + parts - 1) / parts; }

// One thread of a team, during one call.
struct Worker {
    int64_t thread, threads;
    float* memory;   // of its own: op_floats floats at the start of a line, with anything in them
    int64_t stride;  // floats from one thread's memory to the next one's
    void (*wait)(void*);
    void* team;

    // Returns when every thread of the team has come here.
    void barrier() const {
        if (threads > 1) wait(team);
    }
    // The memory of any thread, for what they share (a barrier between writing and reading).
    float* memory_of(int64_t other) const { return memory + (other - thread) * stride; }

    struct Range {
        int64_t first, last;
    };
    // This thread's part of `count` items: [first, last), whole grains.
    Range share(int64_t count, int64_t grain = 1) const {
        const int64_t grains = split(count, grain);
        return {std::min(grains * thread / threads * grain, count),
                std::min(grains * (thread + 1) / threads * grain, count)};
    }
};

// As many of these threads as can be had: OpenMP's runtime ends the process where it cannot start one.
inline int64_t startable(int64_t threads) {
    static thread_local int64_t known = 1;  // each thread of Python has a team of its own
    if (threads > known) {
        std::vector<std::thread> tried;
        tried.reserve(threads);
        std::mutex gate;
        {
            std::lock_guard<std::mutex> held(gate);
            try {
                while (int64_t(tried.size()) + 1 < threads) {
                    tried.emplace_back([&] { std::lock_guard<std::mutex> pass(gate); });
                }
            } catch (const std::exception&) {  // there are no more
            }
        }
        for (std::thread& each : tried) each.join();
        known = 1 + int64_t(tried.size());
    }
    return std::min(threads, known);
}

// The memory of `threads` threads, kept: fresh memory would be cleared page by page. Made by their caller, since whatever
// a thread of OpenMP throws ends the process. Aligned, so that no vector spans two lines.
class Workspaces {
  public:
    Workspaces(int64_t floats, int64_t threads) {
        static thread_local std::vector<float> memory;
        static thread_local int64_t most = 0;
        stride = std::max(most, split(floats, LINE) * LINE);
        const size_t size = stride * threads + LINE;
        if (memory.size() < size) {
            std::vector<float>().swap(memory);  // before there are both
            most = 0;
            memory.resize(size);
        }
        most = stride;
        first = memory.data() + LINE - reinterpret_cast<uintptr_t>(memory.data()) / sizeof(float) % LINE;
    }
    float* of(int64_t thread) const { return first + stride * thread; }

    int64_t stride;

  private:
    float* first;
};

inline void openmp_barrier(void*) {
#pragma omp barrier
}

// One call, at once, by `threads` threads of OpenMP. floats: of scratch that each needs. -> 0, or 1 without memory.
template <class Call>
int run_team(const Call& call, int64_t (*floats)(const Call&, int64_t), void (*op)(const Call&, Worker&),
             int64_t threads) try {
    threads = startable(threads);
    const Workspaces workspaces(floats(call, threads), threads);
#pragma omp parallel num_threads(threads)
    {
        const int64_t own = omp_get_thread_num();
        Worker worker{own, omp_get_num_threads(), workspaces.of(own), workspaces.stride, openmp_barrier, nullptr};
        op(call, worker);
    }
    return 0;
} catch (const std::exception&) {  // bad_alloc, or length_error: none may pass into C
    return 1;
}

}  // namespace

// What Python finds in the library of an operator OP: the call at once on OpenMP's threads (0, or 1 without memory), and
// what a program (program.cpp) takes of it, one thread's share and the floats of scratch.
#define NATIVE_OPERATOR(OP, CALL)                                                                              \
    extern "C" int OP(const int64_t* call, int64_t threads) {                                                  \
        return run_team<CALL>(*reinterpret_cast<const CALL*>(call), OP##_floats, OP, threads);                 \
    }                                                                                                          \
    extern "C" void OP##_share(const int64_t* call, Worker* worker) {                                          \
        OP(*reinterpret_cast<const CALL*>(call), *worker);                                                     \
    }                                                                                                          \
    extern "C" int64_t OP##_scratch(const int64_t* call, int64_t threads) {                                    \
        return OP##_floats(*reinterpret_cast<const CALL*>(call), threads);                                     \
    }
