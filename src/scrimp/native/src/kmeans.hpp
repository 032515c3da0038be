#pragma once

#include <nanobind/nanobind.h>

namespace scrimp {

void bind_kmeans(nanobind::module_ &module);

}  // namespace scrimp
