// Which level runs, and the switch that tests and benchmarks use to run another.
#pragma once

#include <string>
#include <vector>

namespace endomamba {

std::vector<std::string> levels();          // those this machine can run, best first
void set_level(const std::string& level);   // throws std::invalid_argument for any other

}  // namespace endomamba
