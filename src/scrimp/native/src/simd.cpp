#include "simd.hpp"

#include <atomic>
#include <stdexcept>

namespace scrimp {
namespace {

constexpr const char *names[] = {"generic", "avx2", "avx512", "neon"};

Simd widest() {
#if SCRIMP_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx512 ? Simd::avx512 : avx2 ? Simd::avx2 : Simd::generic;
#elif defined(__ARM_NEON) || defined(__aarch64__)
    return Simd::neon;
#else
    return Simd::generic;
#endif
}

std::atomic<Simd> &current() {
    static std::atomic<Simd> level{widest()};
    return level;
}

// NEON belongs to the baseline of 64-bit ARM: there is no narrower build of the kernels to fall back to.
bool runs(Simd wanted) {
    const Simd best = widest();
    return best == Simd::neon || wanted == Simd::neon ? wanted == best : wanted <= best;
}

}  // namespace

Simd simd() { return current().load(std::memory_order_relaxed); }

const char *simd_name() { return names[static_cast<int>(simd())]; }

void set_simd(const std::string &name) {
    for (int index = 0; index < 4; ++index) {
        const Simd wanted = static_cast<Simd>(index);
        if (name == names[index] && runs(wanted)) {
            current().store(wanted, std::memory_order_relaxed);
            return;
        }
    }
    throw std::invalid_argument("expected an instruction set of this processor, at most '" +
                                std::string(names[static_cast<int>(widest())]) + "'; got '" + name +
                                "'; choose generic, avx2, avx512 or neon");
}

}  // namespace scrimp
