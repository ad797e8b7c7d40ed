// SPDX-License-Identifier: Apache-2.0
//
// Loops on the threads that torch computes with, and no others. A second thread pool beside torch's would compete with it for
// the cores, so torch's OpenMP runtime is looked up in the process. If there is none, loops run on the calling thread.

#pragma once

#include <atomic>
#include <cstdint>

#if defined(__linux__)
#include <dlfcn.h>
#endif

#if defined(__GNUC__)
#define INLINE inline __attribute__((always_inline))
#else
#define INLINE inline
#endif

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define FOR_EVERY_X86 __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EVERY_X86
#endif

namespace dpquant {

// libgomp's entry for `#pragma omp parallel`: runs function(data) on `threads` threads and waits for all.
using GompParallel = void (*)(void (*function)(void *), void *data, unsigned threads, unsigned flags);

inline GompParallel gomp_parallel() {
#if defined(__linux__)
    static const auto found = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
#else
    return nullptr;
#endif
}

// Calls body(i) for i in 0 .. count - 1, each once, in any order, on up to `threads` threads. The body must not throw.
template <class Body>
void parallel_for(int64_t count, int threads, const Body &body) {
    struct Work {
        std::atomic<int64_t> next{0};
        int64_t count;
        const Body *body;
    } work{.count = count, .body = &body};
    const auto run = [](void *data) {
        auto &mine = *static_cast<Work *>(data);
        for (int64_t i; (i = mine.next.fetch_add(1, std::memory_order_relaxed)) < mine.count;) (*mine.body)(i);
    };
    const GompParallel parallel = threads > 1 && count > 1 ? gomp_parallel() : nullptr;
    if (parallel)
        parallel(run, &work, static_cast<unsigned>(threads), 0);
    else
        run(&work);
}

}  // namespace dpquant
