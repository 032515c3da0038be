// How the kernels share out work: units of equal kind, and waves of rows that bound the memory.
#pragma once

#include <algorithm>
#include <cstddef>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace scrimp {

// body(unit) for every unit, over the threads
template <class Body>
void for_units(std::ptrdiff_t units, const Body &body) {
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic, 1) if (units > 1)
#endif
    for (std::ptrdiff_t unit = 0; unit < units; ++unit) body(unit);
}

// body(first, count) for runs of rows, enough of them to keep the threads busy: scratch a row is then needed for one
// run only, however large the batch.
template <class Body>
void for_waves(std::ptrdiff_t rows, const Body &body) {
    std::ptrdiff_t wave = 16;
#ifdef _OPENMP
    wave = std::max<std::ptrdiff_t>(wave, omp_get_max_threads());
#endif
    for (std::ptrdiff_t first = 0; first < rows; first += wave) body(first, std::min(wave, rows - first));
}

// Whole registers of the widest instruction set
inline std::ptrdiff_t padded(std::ptrdiff_t count) { return (count + 15) / 16 * 16; }

}  // namespace scrimp
