#pragma once

#include <nanobind/nanobind.h>

namespace scrimp {

void bind_splat_adam(nanobind::module_ &module);

}  // namespace scrimp
