// One kernel body, compiled once for each instruction set and chosen while running.
//
// The body is always inlined into a thin function per set, so it is the set's own code. Keep `#pragma omp parallel`
// outside the body: OpenMP moves a parallel region into a function of its own before inlining, and that function
// would be compiled for the baseline processor only.
#pragma once

#include <string>

namespace scrimp {

enum class Simd { generic = 0, avx2 = 1, avx512 = 2, neon = 3 };

// The set the kernels use: the widest this processor has, unless `set_simd` asked for a narrower one.
Simd simd();
const char *simd_name();

// Use "generic", "avx2", "avx512" or "neon" from now on, in every thread. For tests and benchmarks.
// Throws std::invalid_argument when this processor or this build lacks the set.
void set_simd(const std::string &name);

}  // namespace scrimp

#if defined(__GNUC__)
#define SCRIMP_BODY static inline __attribute__((always_inline))
#else
#define SCRIMP_BODY static inline
#endif

// SCRIMP_DISPATCH(result, name, (parameters), (arguments)) defines `name` from `name_body`, a SCRIMP_BODY.
// The wide variants say fma because the processors that have AVX2 have it; whether a product and a sum are fused
// is still the compiler flag -ffp-contract's to say (off: the same bits on every set).
#if defined(__GNUC__) && defined(__x86_64__)
#define SCRIMP_X86 1
#define SCRIMP_DISPATCH(RESULT, NAME, PARAMETERS, ARGUMENTS)                                                        \
    static RESULT NAME##_generic PARAMETERS { return NAME##_body ARGUMENTS; }                                       \
    __attribute__((target("avx2,fma"))) static RESULT NAME##_avx2 PARAMETERS { return NAME##_body ARGUMENTS; }      \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))) static RESULT NAME##_avx512 PARAMETERS { \
        return NAME##_body ARGUMENTS;                                                                               \
    }                                                                                                               \
    static RESULT NAME PARAMETERS {                                                                                 \
        switch (scrimp::simd()) {                                                                                   \
            case scrimp::Simd::avx512: return NAME##_avx512 ARGUMENTS;                                              \
            case scrimp::Simd::avx2: return NAME##_avx2 ARGUMENTS;                                                  \
            default: return NAME##_generic ARGUMENTS;                                                               \
        }                                                                                                           \
    }
#else
#define SCRIMP_X86 0
#define SCRIMP_DISPATCH(RESULT, NAME, PARAMETERS, ARGUMENTS) \
    static RESULT NAME PARAMETERS { return NAME##_body ARGUMENTS; }
#endif
