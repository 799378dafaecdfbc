// Threads of a program's own: they wait for work between two runs, and for each other between two calls.
//
// A barrier costs about a microsecond while all threads run. Where one does not (a busy machine, a container with less
// CPU than cores) the others soon sleep, so that it gets their cores.

#pragma once

#include <atomic>
#include <climits>
#include <csignal>
#include <cstdint>
#include <exception>
#include <immintrin.h>
#include <initializer_list>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <thread>
#include <unistd.h>

namespace {

// Ticks of the time stamp counter, 2 to 3 a nanosecond, of waiting awake. Then to yield before sleep is worse than to
// sleep: with four busy processes on two cores a step took 28 times as long as alone, without yielding 5 times.
constexpr uint64_t AWAKE = 40000;

// Where `count` threads wait until the last has come, again and again.
class Barrier {
  public:
    explicit Barrier(int64_t count) : count(uint32_t(count)) {}

    void wait() {
        const uint32_t now = round.load(std::memory_order_acquire);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
            arrived.store(0, std::memory_order_relaxed);
            round.store(now + 1);
            if (asleep.load()) futex(FUTEX_WAKE_PRIVATE, INT_MAX);
            return;
        }
        for (const uint64_t began = __rdtsc(); __rdtsc() - began < AWAKE; _mm_pause()) {
            if (round.load(std::memory_order_acquire) != now) return;
        }
        // Whoever comes last counts the sleepers after it has begun the next round, which the kernel looks at once more.
        asleep.fetch_add(1);
        while (round.load() == now) futex(FUTEX_WAIT_PRIVATE, now);
        asleep.fetch_sub(1);
    }

  private:
    void futex(int what, uint32_t value) {
        syscall(SYS_futex, reinterpret_cast<uint32_t*>(&round), what, value, nullptr, nullptr, 0);
    }

    const uint32_t count;
    // On lines of their own: who waits reads `round` all the time.
    alignas(64) std::atomic<uint32_t> arrived{0};
    alignas(64) std::atomic<uint32_t> round{0};
    alignas(64) std::atomic<uint32_t> asleep{0};
};

// The caller of `run` and threads that are started once and live as long as the process.
class Team {
  public:
    // As many as can be started of `wanted` threads.
    static Team* of(int64_t wanted) {
        // Signals are the caller's, who is a thread of Python; but for errors, which are of who makes them.
        sigset_t blocked, before;
        sigfillset(&blocked);
        for (int error : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigdelset(&blocked, error);
        pthread_sigmask(SIG_SETMASK, &blocked, &before);
        int64_t started = 0;
        Start* start = new Start;
        try {
            for (; started + 1 < wanted; ++started) std::thread(live, start, started + 1).detach();
        } catch (const std::exception&) {  // there are no more
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        Team* team = new Team(1 + started);
        start->team.store(team);
        return team;
    }

    // work(what, thread) by every thread of the team; returns when all have.
    void run(void (*work)(const void*, int64_t), const void* what) {
        this->work = work, this->what = what, rounding = _mm_getcsr();
        barrier.wait();
        work(what, 0);
        barrier.wait();
    }

    static void wait(void* team) { static_cast<Team*>(team)->barrier.wait(); }

    const int64_t threads;

  private:
    struct Start {
        std::atomic<Team*> team{nullptr};
    };

    explicit Team(int64_t threads) : threads(threads), barrier(threads) {}

    static void live(Start* start, int64_t thread) {
        Team* team;
        while (!(team = start->team.load())) sched_yield();
        for (;;) {
            team->barrier.wait();
            _mm_setcsr(team->rounding);  // denormal numbers are treated as the caller treats them
            team->work(team->what, thread);
            team->barrier.wait();
        }
    }

    Barrier barrier;
    void (*work)(const void*, int64_t) = nullptr;
    const void* what = nullptr;
    unsigned rounding = 0;
};

}  // namespace
