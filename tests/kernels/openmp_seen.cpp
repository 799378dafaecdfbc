// What the sanitizer of threads must know of OpenMP, whose runtime was built without it: a parallel region begins after
// what stood before it and ends before what follows, and so does a barrier. Loaded before everything else
// (test_sanitizers.py), so that the kernels and PyTorch call these instead of the runtime's, which they call.

#include <dlfcn.h>

extern "C" void __tsan_acquire(void* of);  // what stood before the releases of it is seen from here on
extern "C" void __tsan_release(void* of);

namespace {

struct Region {
    void (*share)(void*);
    void* data;
    // Of each moment one of its own, or a thread that is late would seem to wait for what others did after it. Two of
    // barriers: none is passed before all have left the one before.
    char begin, end, barriers[2];
};

thread_local Region* region = nullptr;
thread_local int passed = 0;  // barriers of the region

template <class Function>
Function runtime(const char* name) {
    return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
}

void share(void* given) {
    Region *const before = region, *const own = static_cast<Region*>(given);
    const int passed_before = passed;
    region = own, passed = 0;
    __tsan_acquire(&own->begin);
    own->share(own->data);
    __tsan_release(&own->end);
    region = before, passed = passed_before;
}

}  // namespace

extern "C" void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned flags) {
    static const auto parallel = runtime<void (*)(void (*)(void*), void*, unsigned, unsigned)>("GOMP_parallel");
    Region own{work, data};
    __tsan_release(&own.begin);
    parallel(share, &own, threads, flags);
    __tsan_acquire(&own.end);
}

extern "C" void GOMP_barrier() {
    static const auto barrier = runtime<void (*)()>("GOMP_barrier");
    char* const all = region ? &region->barriers[passed++ % 2] : nullptr;
    if (all) __tsan_release(all);
    barrier();
    if (all) __tsan_acquire(all);
}
