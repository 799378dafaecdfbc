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

// Each of a team's threads keeps a processor of its own while it works. Otherwise one that wakes up may be put where
// another runs, and stay there for tens of milliseconds while other processors are idle, which virtual machines do: ten
// steps of one image took 35 ms instead of 8, a while after the last call (two cores of an EPYC).
class Seats {
  public:
    // By the caller of a run: those that it may use, none of them taken. A thread alone takes none: it would only be kept
    // on the processor that it shares with another process while others are idle.
    void open(int64_t threads) {
        known = threads > 1 && !sched_getaffinity(0, sizeof allowed, &allowed);
        for (auto& each : taken) each.store(0, std::memory_order_relaxed);
    }

    // The processor that the thread is on, or the next that is free; where there is none, any that it may use.
    void take() {
        const int here = sched_getcpu();
        if (!known || here < 0) return;
        for (int k = 0; k < CPU_SETSIZE; ++k) {
            const int seat = (here + k) % CPU_SETSIZE;
            if (CPU_ISSET(seat, &allowed) && claim(seat)) {
                cpu_set_t one;
                CPU_ZERO(&one);
                CPU_SET(seat, &one);
                sched_setaffinity(0, sizeof one, &one);
                return;
            }
        }
        leave();
    }

    void leave() const {
        if (known) sched_setaffinity(0, sizeof allowed, &allowed);
    }

  private:
    // -> whether it was free.
    bool claim(int seat) {
        const uint64_t bit = uint64_t(1) << seat % 64;
        return !(taken[seat / 64].fetch_or(bit) & bit);
    }

    cpu_set_t allowed;
    bool known = false;
    std::atomic<uint64_t> taken[CPU_SETSIZE / 64] = {};
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
        seats.open(threads);
        seats.take();
        barrier.wait();
        work(what, 0);
        seats.leave();
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
            team->seats.take();
            team->work(team->what, thread);
            team->seats.leave();
            team->barrier.wait();
        }
    }

    Barrier barrier;
    Seats seats;
    void (*work)(const void*, int64_t) = nullptr;
    const void* what = nullptr;
    unsigned rounding = 0;
};

}  // namespace
