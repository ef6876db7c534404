#include "settings.h"

#include <unistd.h>

#include <algorithm>

namespace mla {

// One pass instead of a getenv for each: an environment may have hundreds of variables, and each call asks.
Settings read_settings() {
  Settings settings;
  for (char** variable = environ; variable && *variable; ++variable) {
    const char* const first = *variable;
    if (first[0] != 'M' || first[1] != 'L' || first[2] != 'A' || first[3] != '_') continue;
    const std::string_view text = first;
    const size_t equals = text.find('=');
    const std::string_view name = text.substr(0, equals), value = text.substr(std::min(equals + 1, text.size()));
    if (name == kVariantVariable) settings.forced_variant = value;
    else if (name == kLogVariable) settings.logs_dispatch = value == "dispatch";
    else if (name == kValidateVariable) settings.validates = !value.empty() && value != "0";
  }
  return settings;
}

}  // namespace mla
