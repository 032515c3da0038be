#pragma once

#include <nanobind/nanobind.h>

namespace scrimp {

void bind_hamming(nanobind::module_ &module);

}  // namespace scrimp
